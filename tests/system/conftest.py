# SPDX-License-Identifier: GPL-2.0-or-later
"""What the system tests stand on: they run in dom0 of a real Xen host, as root, with the project installed."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hvmguest import models
from vms import *  # noqa: F403
from vms import XenHost, folder, nothing_is_left, pytest_runtest_logreport, run, until, vm  # noqa: F401

MIB = 1 << 20
HVM_MIB = 192


@pytest.fixture(scope="session")
def host():
    made = XenHost()
    yield made
    made.close()


@pytest.fixture
def bridge():
    """A bridge with an address, as an administrator would have made it."""
    name = "xenvmbr0"
    run("ip", "link", "add", name, "address", "00:16:3e:00:00:01", "type", "bridge")
    run("ip", "address", "add", "10.77.0.1/24", "dev", name)
    run("ip", "link", "set", name, "up")
    yield name
    run("ip", "link", "delete", name)


@pytest.fixture
def image():
    """Image files on a file system with direct I/O, which /tmp has not."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))

    def make(name, size=16 * MIB, content=b""):
        """A file of at least `size` bytes that begins with `content`."""
        path = directory / name
        with path.open("wb") as file:
            file.truncate(max(size, len(content)))
            file.write(content)
        return path

    yield make
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def sector(tmp_path_factory):
    """The boot sector."""
    place = tmp_path_factory.mktemp("sector")
    source = Path(__file__).with_name("sector.s")
    for words in (
        ("as", "--32", "-o", "sector.o", str(source)),
        ("ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x7c00", "-o", "sector", "sector.o"),
    ):
        done = run(*words, cwd=place)
        assert done.returncode == 0, done.stderr
    return (place / "sector").read_bytes()


@pytest.fixture
def disk(sector, image):
    """Return a maker of disks that boot."""
    made = []

    def make(mark=b"a disk"):
        """A disk whose second sector begins with `mark`."""
        made.append(image(f"hvm-{len(made)}.img", MIB, sector + mark))
        return made[-1]

    return make


@pytest.fixture
def hvm(vm):  # noqa: F811 - the fixture above
    def make(**settings):
        words = {"kernel": "", "initrd": "", "cmdline": ""}
        chosen = {"hvm": "true", "memory": HVM_MIB, "acpi": "true", "apic": "true", "pae": "true", "display": "none"}
        guest = vm(**{**words, **chosen, **settings})
        for key in ("initrd", "cmdline"):
            guest.settings.pop(key)
        guest.write()
        return guest

    return make


@pytest.fixture(autouse=True)
def no_device_model_is_left():
    """Look after everything else has been torn down."""
    yield
    until(lambda: not models(), "no device model is left", 30)
