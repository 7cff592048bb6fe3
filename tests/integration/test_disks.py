# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks as the broker opens them: real files, real locks, real loop devices. Needs root, and no Xen."""

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from xenvm.boundary.devices import DiskGrant
from xenvm.broker import disks
from xenvm.broker.disks import loop, open_disk
from xenvm.errors import BusyError, ExitCode, XenvmError

WAIT_S = 20
MIB = 1 << 20
BLOCK = Path("/sys/block")


def backing():
    """The loop devices that have a file, by that file."""
    found = {}
    for path in BLOCK.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found[path.read_text().rstrip("\n")] = path.parent.parent
    return found


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def directory(monkeypatch):
    """On a file system with direct I/O, which /tmp need not have; waits are short."""
    monkeypatch.setattr(disks, "RELEASE_WAIT_S", 0.3)
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        yield Path(path)
        until(lambda: not [name for name in backing() if name.startswith(path)])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def image(directory):
    path = directory / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def losetup(image):
    """A loop device that somebody else has made."""
    made = []

    def make(*options):
        done = subprocess.run(
            ["losetup", "--find", "--show", *options, image], capture_output=True, text=True, check=True
        )
        made.append(done.stdout.strip())
        return made[-1]

    yield make
    for device in made:
        subprocess.run(["losetup", "--detach", device], check=True)


def grant(path, **changes):
    made = DiskGrant(51712, "xvda", "file", str(path), False, False, False, "", 0, "")
    return made.but(**changes)


@contextlib.contextmanager
def opened(*arguments, **changes):
    descriptor = open_disk(grant(*arguments, **changes))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def access(descriptor):
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE


# What a disk must be


@pytest.mark.parametrize(("read_only", "wanted"), [(False, os.O_RDWR), (True, os.O_RDONLY)])
def test_a_file_is_opened_as_its_mode_says(image, read_only, wanted):
    with opened(image, read_only=read_only) as descriptor:
        assert access(descriptor) == wanted
        assert not os.get_inheritable(descriptor)


def test_one_that_is_not_there(directory):
    with pytest.raises(XenvmError, match=r"disk xvda: .*/none: cannot open it: No such file or directory"):
        open_disk(grant(directory / "none"))


@pytest.mark.parametrize("size", [0, 1, 511, 513, MIB - 1])
@pytest.mark.parametrize("kind", ["file", "aio"])
def test_a_file_that_is_no_whole_number_of_sectors(directory, size, kind):
    """The kernel would drop its last bytes without a word."""
    path = directory / "odd"
    path.write_bytes(bytes(size))
    with pytest.raises(XenvmError, match=f"has {size} bytes, which is no multiple of 512") as caught:
        open_disk(grant(path, type=kind))
    assert "truncate" in caught.value.hint


def test_an_image_has_whatever_size_it_likes(directory):
    path = directory / "image.qcow2"
    path.write_bytes(b"x" * 1000)
    with opened(path, type="qcow"):
        pass


@pytest.mark.parametrize(
    ("kind", "match"),
    [("phy", "is not a block device"), ("file", "is neither a block device nor a regular file")],
)
def test_a_terminal_is_no_disk(kind, match):
    with pytest.raises(XenvmError, match=f"disk xvda: /dev/zero {match}"):
        open_disk(grant("/dev/zero", type=kind))


def test_a_file_is_not_of_type_phy(image):
    with pytest.raises(XenvmError, match="is not a block device") as caught:
        open_disk(grant(image, type="phy"))
    assert "file or aio" in caught.value.hint


def test_a_fifo_is_refused_without_waiting(directory):
    os.mkfifo(directory / "fifo")
    with pytest.raises(XenvmError, match="neither a block device nor a regular file"):
        open_disk(grant(directory / "fifo"))


def test_a_directory_is_refused(directory):
    for read_only in (True, False):
        with pytest.raises(XenvmError):
            open_disk(grant(directory, read_only=read_only))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY])
@pytest.mark.parametrize("block", [False, True])
def test_what_a_client_cannot_read_it_cannot_have_read_for_it(directory, image, losetup, block, flags, share):
    """A descriptor with O_PATH needs no permission on the file; the kernel would open the device for the guest."""
    path = image
    if block:
        path = directory / "block"
        os.mknod(path, 0o600 | stat.S_IFBLK, os.stat(losetup()).st_rdev)
    handed = os.open(path, flags)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(XenvmError, match="is not open for reading") as caught:
        open_disk(grant(path, type="phy" if block else "file", read_only=True, share=share), handed)
    assert caught.value.code is ExitCode.PERMISSION_REFUSED
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_file_system_without_locks_is_named(image, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(XenvmError, match=r"disk xvda: .*: cannot lock it: No locks available"):
        open_disk(grant(image))


# Who else has it


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ({}, {}, True),
        ({}, {"read_only": True}, True),
        ({"read_only": True}, {}, True),
        ({"read_only": True}, {"read_only": True}, False),
        ({}, {"share": True}, False),
        ({"share": True}, {}, False),
    ],
)
def test_two_that_open_one_file(image, first, second, refused):
    with opened(image, **first):
        if refused:
            before = time.monotonic()
            with pytest.raises(BusyError, match="disk xvda: .* is in use by another guest or program") as caught:
                open_disk(grant(image, **second))
            assert 0.3 <= time.monotonic() - before < 5
            assert "share=true" in caught.value.hint
        else:
            with opened(image, **second):
                pass
    with opened(image, **second):
        pass


def test_the_one_who_goes_is_waited_for(image, monkeypatch):
    """The kernel ends an earlier use in the background, a moment after the device has gone."""
    monkeypatch.setattr(disks, "RELEASE_WAIT_S", 10.0)
    first, slept = [open_disk(grant(image))], time.sleep

    def sleep(seconds):
        slept(seconds)
        if first:
            os.close(first.pop())

    monkeypatch.setattr(disks.time, "sleep", sleep)
    with opened(image):
        assert first == []


def test_the_lock_belongs_to_the_open_file(image):
    """Whoever has a copy of the descriptor, as blkback through a loop device, has the lock."""
    first = open_disk(grant(image))
    second = os.dup(first)
    os.close(first)
    with pytest.raises(BusyError):
        open_disk(grant(image))
    os.close(second)
    with opened(image):
        pass


def test_what_was_handed_over_keeps_its_own_lock(image):
    """A disk that was added by command is opened again for the next domain, from the same descriptor."""
    ours = os.open(image, os.O_RDWR)
    for _ in range(2):
        os.close(open_disk(grant("/not/to/be/opened"), os.dup(ours)))
    with pytest.raises(BusyError):
        open_disk(grant(image))
    os.close(ours)


def test_what_was_handed_over_for_reading_is_not_written(image):
    ours = os.open(image, os.O_RDONLY)
    with pytest.raises(XenvmError, match="is not open for writing") as caught:
        open_disk(grant(image), os.dup(ours))
    assert "mode r" in caught.value.hint
    os.close(open_disk(grant(image, read_only=True), os.dup(ours)))
    os.close(ours)


@pytest.mark.parametrize(
    ("options", "read_only", "refused"), [((), False, True), (("--read-only",), True, False), ((), True, True)]
)
def test_a_loop_device_of_somebody_else(image, losetup, options, read_only, refused):
    device = losetup(*options)
    if refused:
        with pytest.raises(BusyError, match=f"is in use through {device}"):
            open_disk(grant(image, read_only=read_only))
        with opened(image, read_only=read_only, share=True):
            pass
    else:
        with opened(image, read_only=read_only):
            pass


def test_a_block_device_that_something_else_has(image, losetup):
    """As a mounted file system would: only one may have it exclusively."""
    device = losetup()
    holder = os.open(device, os.O_RDWR | os.O_EXCL)
    for handed in (False, True):
        with pytest.raises(BusyError, match=f"disk xvda: {device} is in use on this host: mounted") as caught:
            open_disk(grant(device, type="phy"), os.open(device, os.O_RDWR) if handed else -1)
        assert "share=true" in caught.value.hint
        os.close(open_disk(grant(device, type="phy", share=True), os.open(device, os.O_RDWR) if handed else -1))
        os.close(open_disk(grant(device, type="phy", read_only=True), os.open(device, os.O_RDONLY) if handed else -1))
    os.close(holder)
    with opened(device, type="phy") as descriptor:
        assert stat.S_ISBLK(os.fstat(descriptor).st_mode)
        with pytest.raises(OSError) as caught:
            os.open(device, os.O_RDWR | os.O_EXCL)
        assert caught.value.errno == errno.EBUSY


@pytest.fixture
def mounted(image, losetup):
    """A block device with a file system that is mounted, and what remounts it."""
    subprocess.run(["mke2fs", "-q", "-F", image], check=True)
    device, place = losetup(), image.parent / "mnt"
    place.mkdir()
    subprocess.run(["mount", device, place], check=True)
    yield device, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("handed", [False, True])
def test_a_block_device_that_is_mounted_for_writing_is_not_even_read(mounted, image, handed):
    device, remount = mounted

    def descriptor():
        return os.open(device, os.O_RDONLY) if handed else -1

    for changes in ({}, {"cipher": "aes-xts-plain64"}):
        with pytest.raises(BusyError, match=f"{device} is mounted read-write on this host, at .*/mnt$") as caught:
            open_disk(grant(device, type="phy", read_only=True, **changes), descriptor())
        assert "share=true" in caught.value.hint
    os.close(open_disk(grant(device, type="phy", read_only=True, share=True), descriptor()))
    remount("ro")
    os.close(open_disk(grant(device, type="phy", read_only=True), descriptor()))
    with pytest.raises(BusyError, match="is in use on this host: mounted"):
        open_disk(grant(device, type="phy"))


def test_a_block_device_handed_over_for_reading_is_never_opened_for_writing(image, losetup):
    """The authority is that of whoever opened it, not the broker's."""
    device = losetup()
    with pytest.raises(XenvmError, match="is not open for writing"):
        open_disk(grant(device, type="phy"), os.open(device, os.O_RDONLY))


# Loop devices


def test_a_loop_device_lives_as_long_as_it_is_open(image):
    device = loop(grant(image), open_disk(grant(image)))
    path = backing()[str(image)]
    assert stat.S_ISBLK(os.fstat(device).st_mode)
    assert os.minor(os.fstat(device).st_rdev) == int(path.name.removeprefix("loop"))
    assert (path / "loop/autoclear").read_text() == "1\n"
    assert (path / "loop/partscan").read_text() == "0\n"
    assert (path / "ro").read_text() == "0\n"
    assert access(device) == os.O_RDWR
    os.pwrite(device, b"written", 4096)
    os.fsync(device)
    os.close(device)
    until(lambda: str(image) not in backing())
    assert image.read_bytes()[4096:4103] == b"written"


def test_a_loop_device_keeps_the_lock_of_its_file(image):
    device = loop(grant(image), open_disk(grant(image)))
    with pytest.raises(BusyError):
        open_disk(grant(image))
    os.close(device)
    until(lambda: str(image) not in backing())
    with opened(image):
        pass


def test_a_read_only_disk_has_a_read_only_loop_device(image):
    device = loop(grant(image, read_only=True), open_disk(grant(image, read_only=True)))
    assert (backing()[str(image)] / "ro").read_text() == "1\n"
    assert access(device) == os.O_RDONLY
    os.close(device)


def test_direct_io_where_the_file_system_has_it(image):
    if not has_direct_io(image):
        pytest.fail("/var/tmp is on a file system without direct I/O: nothing is shown here")
    device = loop(grant(image, type="aio"), open_disk(grant(image, type="aio")))
    assert (backing()[str(image)] / "loop/dio").read_text() == "1\n"
    os.close(device)


def test_aio_without_direct_io_is_an_error(image, monkeypatch):
    """The type promises it; `file` does not."""
    monkeypatch.setattr(disks, "DIRECT_IO", 0)
    with pytest.raises(XenvmError, match="its file system has no direct I/O") as caught:
        loop(grant(image, type="aio"), open_disk(grant(image, type="aio")))
    assert "type file" in caught.value.hint
    os.close(loop(grant(image), open_disk(grant(image))))


def has_direct_io(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_many_loop_devices_at_once(directory):
    paths = [directory / f"{number}.img" for number in range(20)]
    for path in paths:
        path.write_bytes(bytes(512))
    devices = [loop(grant(path), open_disk(grant(path))) for path in paths]
    assert len({os.fstat(device).st_rdev for device in devices}) == 20
    assert {str(path) for path in paths} <= set(backing())
    for device in devices:
        os.close(device)


def test_without_loop_devices_it_says_so(image, monkeypatch):
    refused = OSError(errno.ENXIO, "No such device or address")

    def ioctl(*_arguments):
        raise refused

    monkeypatch.setattr(disks.fcntl, "ioctl", ioctl)
    with pytest.raises(XenvmError, match="cannot make a loop device: No such device or address") as caught:
        loop(grant(image), open_disk(grant(image)))
    assert "module loop" in caught.value.hint


def test_a_free_device_that_others_take_is_not_waited_for_for_ever(image, monkeypatch):
    ioctl, tries = fcntl.ioctl, []

    def busy(descriptor, request, *rest):
        if request == disks.LOOP_CONFIGURE:
            tries.append(1)
            raise OSError(errno.EBUSY, "Device or resource busy")
        return ioctl(descriptor, request, *rest)

    monkeypatch.setattr(disks.fcntl, "ioctl", busy)
    with pytest.raises(XenvmError, match="others take every free loop device first"):
        loop(grant(image), open_disk(grant(image)))
    assert len(tries) == disks.LOOP_TRIES
