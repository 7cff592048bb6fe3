# SPDX-License-Identifier: GPL-2.0-or-later
"""What the system tests stand on: they run in dom0 of a real Xen host, as root, with the project installed."""

import shutil
import tempfile
from pathlib import Path

import pytest
from vms import *  # noqa: F403
from vms import XenHost, folder, nothing_is_left, pytest_runtest_logreport, run, vm  # noqa: F401

MIB = 1 << 20


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
