# SPDX-License-Identifier: GPL-2.0-or-later
"""What libxenguest is handed: nothing that it would unpack beside the hypervisor. The library is one of this test.

And what it is to do about memory.
"""

import gzip
import os
import sys
import types

import cffi
import pytest

import xenvm.helpers.builder
from xenvm.errors import XenvmError
from xenvm.helpers.builder import files
from xenvm.helpers.builder.hypervisor import Channels

CHANNELS = Channels(1, 0, 2, 0)
KERNEL = b"\x7fELF" + bytes(0x300)
BZIMAGE = bytes(0x202) + b"HdrS" + bytes(0x100)
BOTH = KERNEL[:0x202] + b"HdrS" + bytes(0x100)
OLD, NEW = 4 << 16 | 17, 4 << 16 | 20
BOUND = ("xen", "pv", "hvm", "transfer")  # the modules that import the library


class Library:
    """Notes each call; every one succeeds that is not in `fails`."""

    fails = frozenset()

    def __init__(self, ffi, release):
        self.calls, self.XENVM_BUILT_FOR, self._ffi = [], release, ffi

    def __getattr__(self, name):
        if name.isupper():
            return 1

        def call(*arguments):
            self.calls.append((name, *arguments))
            return -1 if name in self.fails else 0

        return call

    def xc_dom_allocate(self, *_arguments):
        self.calls.append(("xc_dom_allocate",))
        self.dom = types.SimpleNamespace(guest_type=self._ffi.new("char[]", b"xen-3.0-x86_64"))
        for name in ("xenstore_pfn", "console_pfn"):
            setattr(self.dom, name, 7)
        for name in ("system_firmware_module", "smbios_module"):
            setattr(self.dom, name, types.SimpleNamespace(guest_addr_out=0))
        self.dom.acpi_modules = [types.SimpleNamespace(guest_addr_out=0)]
        return self.dom

    def of(self, name):
        return [call for call in self.calls if call[0] == name]

    def content(self, image, size):
        return self._ffi.buffer(image)[:size]


class Foreign:
    """An ffi that can do what one of a compiled module can."""

    def __init__(self):
        self._ffi = cffi.FFI()

    def __getattr__(self, name):
        return getattr(self._ffi, name)

    def def_extern(self, **_words):
        return lambda function: function


class Xen:
    handle = None

    def check(self, result, what):
        assert result == 0, what

    def reason(self, _number):
        return "no"


def bind(monkeypatch, release):
    """Import the builder's modules anew, bound to a library of this test."""
    module = types.ModuleType("xenvm._xen")
    module.ffi = Foreign()
    module.lib = Library(module.ffi, release)
    monkeypatch.setitem(sys.modules, "xenvm._xen", module)
    for name in BOUND:
        monkeypatch.delitem(sys.modules, f"xenvm.helpers.builder.{name}", raising=False)
        monkeypatch.delattr(xenvm.helpers.builder, name, raising=False)
    from xenvm.helpers.builder import xen  # noqa: PLC0415

    return module.lib, xen


@pytest.fixture
def bound(monkeypatch, tmp_path):
    """The library, and a function that loads files into a domain of a type."""

    def load(release, hvm, *contents):
        library, xen = bind(monkeypatch, release)
        opened = []
        for number, content in enumerate(contents):
            (tmp_path / str(number)).write_bytes(content)
            opened.append(os.open(tmp_path / str(number), os.O_RDONLY))
        size = {"memory_mib": 64, "vcpus": 1, "channels": CHANNELS}
        try:
            if hvm:
                return library, xen.hvm.load(Xen(), 7, loader=opened[0], bios=opened[1], apic=True, tables={}, **size)
            initrd = opened[1] if len(opened) > 1 else None
            return library, xen.pv.load(Xen(), 7, kernel=opened[0], initrd=initrd, cmdline="", **size)
        except XenvmError:
            assert library.calls == [] or Library.fails  # it has not even begun
            raise
        finally:
            for descriptor in opened:
                os.close(descriptor)

    yield load
    for name in BOUND:
        sys.modules.pop(f"xenvm.helpers.builder.{name}", None)
        if hasattr(xenvm.helpers.builder, name):
            delattr(xenvm.helpers.builder, name)


@pytest.mark.parametrize("hvm", [False, True])
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(gzip.compress(KERNEL), id="gzip"),
        pytest.param(BZIMAGE, id="bzImage"),
        pytest.param(BOTH, id="both"),
        pytest.param(b"no kernel", id="neither"),
        pytest.param(b"\x7f", id="short"),
    ],
)
def test_a_kernel_that_would_be_unpacked_is_refused(bound, kernel, hvm):
    with pytest.raises(XenvmError, match="is no plain ELF file") as caught:
        bound(NEW, hvm, kernel, b"bios")
    assert caught.value.hint


@pytest.mark.parametrize("hvm", [False, True])
@pytest.mark.parametrize("kernel", [pytest.param(KERNEL, id="whole"), pytest.param(b"\x7fELF", id="short")])
def test_an_elf_file_is_loaded(bound, kernel, hvm):
    library, _rings = bound(NEW, hvm, kernel, b"bios")
    ((_, _, image, size),) = library.of("xc_dom_kernel_mem")
    assert library.content(image, size) == kernel


def gz(content, claimed):
    return gzip.compress(content)[:-4] + claimed.to_bytes(4, "little")


PACKED = gzip.compress(bytes(100_000))


@pytest.mark.parametrize("release", [OLD, NEW])
@pytest.mark.parametrize(
    "initrd",
    [
        pytest.param(PACKED, id="gzip"),
        pytest.param(b"070701" + bytes(100), id="cpio"),
        pytest.param(b"\xfd7zXZ" + bytes(64), id="xz"),
        pytest.param(b"\x1f\x8b", id="short"),
    ],
)
def test_an_initrd_stays_packed(bound, initrd, release):
    """libxenguest is told that its room is what it has packed; where it unpacks at all, it then does not."""
    library, _rings = bound(release, False, KERNEL, initrd)
    assert [call[2] for call in library.of("xc_dom_module_max_size")] == [len(initrd)]
    ((_, _, image, size, _),) = library.of("xc_dom_module_mem")
    assert library.content(image, size) == initrd


@pytest.mark.parametrize("claimed", [0, len(PACKED) - 16])
def test_an_initrd_that_would_be_unpacked_all_the_same_is_refused(bound, claimed):
    """As xc_dom_build_module of Xen 4.17 decides: what says that it is not longer than its room, with 16 more."""
    with pytest.raises(XenvmError, match=f"the initrd has {len(PACKED)} bytes, .* unpack to {claimed}$"):
        bound(OLD, False, KERNEL, gz(bytes(100_000), claimed))


def test_an_initrd_whose_end_says_just_enough_is_loaded(bound):
    bound(OLD, False, KERNEL, gz(bytes(100_000), len(PACKED) - 15))


def test_a_newer_xen_unpacks_no_initrd(bound):
    bound(NEW, False, KERNEL, gz(bytes(100_000), 0))


def test_what_was_checked_does_not_change(tmp_path):
    """Whoever owns the file may write to it at any moment."""
    path = tmp_path / "kernel"
    path.write_bytes(KERNEL + bytes(20_000) + b"tail")
    with path.open("rb") as file:
        image = files.mapped(file.fileno(), "kernel")
    with path.open("r+b") as file:
        file.write(b"\x1f\x8b\x08\x00" + bytes(0x1FE) + b"HdrS")
        file.seek(-4, os.SEEK_END)
        file.write(b"????")
    files.check_elf(image, "kernel", "")
    assert image[-4:] == b"tail"


@pytest.mark.parametrize("size", [0, (1 << 30) + 1])
def test_a_file_of_an_impossible_size_is_refused(tmp_path, size):
    path = tmp_path / "kernel"
    with path.open("wb") as file:
        file.truncate(size)
    with path.open("rb") as file, pytest.raises(XenvmError, match=f"the initrd has {size} bytes"):
        files.mapped(file.fileno(), "initrd")


@pytest.mark.parametrize("hvm", [False, True])
def test_memory_is_claimed_before_any_is_taken(bound, hvm):
    library, _rings = bound(NEW, hvm, KERNEL, b"bios")
    ((_, dom),) = library.of("xc_dom_boot_mem_init")
    assert dom.claim_enabled == 1


@pytest.mark.parametrize("hvm", [False, True])
def test_memory_that_cannot_be_had_is_an_error_that_says_what_to_do(bound, monkeypatch, hvm):
    monkeypatch.setattr(Library, "fails", {"xc_dom_boot_mem_init"})
    with pytest.raises(XenvmError, match="^allocating 64 MiB of memory: no$") as caught:
        bound(NEW, hvm, KERNEL, b"bios")
    assert "another guest was started just now" in caught.value.hint
