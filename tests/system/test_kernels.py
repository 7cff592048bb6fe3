# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's compressed kernel on real Xen: unpacked by a process of its own, once, and started from what was kept.

And what libxenguest would unpack, which the builder does not hand to it.
"""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import INITRD, run, until

COMPRESSED = "/lab/vmlinuz"  # xz on Debian 12, zstd on Debian 13
CACHE = Path("/var/cache/xenvm")


@pytest.fixture
def cache():
    for entry in CACHE.iterdir():
        entry.unlink()
    yield CACHE
    for entry in CACHE.iterdir():
        entry.unlink()


def answers(guest, act="kernel"):
    """What unpackers have answered, from the act log."""
    records = (json.loads(line) for line in guest.acts.read_text().splitlines())
    return [record["answer"] for record in records if record["act"] == act]


def test_a_compressed_kernel_is_unpacked_once(vm, cache):
    guest = vm(kernel=COMPRESSED)
    guest.start()
    (entry,) = until(lambda: [*cache.iterdir()], "the kernel is kept")
    assert (entry.stat().st_uid, entry.stat().st_mode & 0o7777) == (0, 0o400)
    with entry.open("rb") as kept, open("/lab/vmlinux", "rb") as known:
        assert kept.read() == known.read()
    until(lambda: answers(guest, "kernel kept") == ["Summed"], "so says the act log")
    guest.up()
    assert answers(guest) == ["Unpacked"]
    guest.cmd("restart", "force=true")
    guest.up(2)
    assert answers(guest) == ["Unpacked"]
    words = entry.name.split("-")
    entry.rename(cache / "-".join((*words[:2], "0" * 32)))  # as after a boot of the host
    guest.cmd("destroy")
    guest.cmd("start")
    guest.up(3)
    assert answers(guest) == ["Unpacked", "Summed"]
    assert [one.name for one in cache.iterdir()] == [entry.name]


@pytest.mark.parametrize("harm", ["missing", pytest.param("another's", marks=pytest.mark.long)])
def test_without_the_cache_it_starts_too(vm, cache, harm):
    try:
        if harm == "missing":
            cache.rmdir()
        else:
            os.chown(cache, 12345, 0)
        guest = vm(kernel=COMPRESSED)
        guest.start()
        guest.up()
        assert answers(guest) == ["Unpacked"]
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(0o700)


def test_a_damaged_kernel_is_refused_before_there_is_a_domain(vm, cache, tmp_path):
    image = tmp_path / "vmlinuz"
    data = bytearray(Path(COMPRESSED).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    image.write_bytes(data)
    guest = vm(kernel=image)
    done = guest.start(1)
    assert "kernel: the image is damaged" in done.stdout + done.stderr
    assert guest.left() == []
    assert [*cache.iterdir()] == []


ELF = b"\x7fELF" + bytes(0x1000)
TRAILER = b"070701" + b"0" * 88 + b"0000000B" + b"0" * 8 + b"TRAILER!!!" + bytes(4)  # an empty archive of cpio


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(ELF[:0x202] + b"HdrS" + ELF, "the kernel is no plain ELF file", id="bzImage too"),
        pytest.param(b"no kernel", "the kernel is no plain ELF file", id="neither"),
        pytest.param(gzip.compress(gzip.compress(ELF)), "kernel: what is packed in the image is no plain", id="twice"),
    ],
)
def test_a_kernel_that_libxenguest_would_unpack_is_refused(vm, tmp_path, content, words):
    image = tmp_path / "kernel"
    image.write_bytes(content)
    guest = vm(kernel=image)
    done = guest.start(1)
    assert words in done.stdout + done.stderr
    assert guest.left() == []


def test_a_linux_kernel_is_no_firmware(hvm):
    guest = hvm(kernel=COMPRESSED)
    done = guest.start(1)
    assert "the firmware loader is no plain ELF file" in done.stdout + done.stderr
    assert guest.left() == []


def test_an_initrd_of_two_parts_is_unpacked_by_the_guest_or_refused(vm, tmp_path):
    """Its end says how long the second part is. Of that Xen 4.17 makes how long the whole is, and would unpack it."""
    image = tmp_path / "two.gz"
    image.write_bytes(Path(INITRD).read_bytes() + gzip.compress(TRAILER))
    guest = vm(initrd=image)
    if int(re.search(r"xen_minor\s*:\s*(\d+)", run("xl", "info").stdout)[1]) >= 20:
        guest.start()
        guest.up()
        return
    done = guest.start(1)
    assert f"its end says that they unpack to {len(TRAILER)}" in done.stdout + done.stderr
    assert guest.left() == []
