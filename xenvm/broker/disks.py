# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening the disks that a config grants: block devices, and files behind a loop device that goes by itself.

A loop device is made autoclear: it lives as long as something has it open, first this process, then blkback. A lock
taken on the image belongs to the open file, which the loop device keeps: it too lives as long as the guest's disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from xenvm.boundary.place import HERE
from xenvm.broker import mounts
from xenvm.errors import BusyError, ExitCode, XenvmError

if HERE.simulator:  # no monitor of Xen's loads it
    from xenvm.broker import simulated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.devices import DiskGrant

# linux/loop.h: struct loop_config is fd, block size, struct loop_info64 (232 bytes), 64 reserved ones; of the inner one
# only lo_flags (offset 52) and lo_file_name (offset 56, 64 bytes) matter here
LOOP_CONFIGURE: Final = 0x4C0A
LOOP_CTL_GET_FREE: Final = 0x4C82
LOOP_CONFIG: Final = struct.Struct("=II52xI64s112x64x")
READ_ONLY, AUTOCLEAR, DIRECT_IO = 1, 4, 16
LOOP_TRIES: Final = 16
SECTOR_BYTES: Final = 512
RELEASE_WAIT_S: Final = 5.0  # for the end of an earlier use, which the kernel finishes in the background

IMAGE_FORMATS: Final = frozenset({"qcow", "vhd"})


def open_disk(grant: DiskGrant, handed: int = -1) -> int:
    """Return a descriptor of the disk's device or image, locked against a second writer.

    `handed` is what a client opened under its own authority; it is taken over. Raise XenvmError naming disk and cause.
    """
    if HERE.simulator:
        simulated.refuse(grant)
    label = f"disk {grant.name}: {grant.path}"
    try:
        descriptor = _exclusive(label, grant, handed if handed >= 0 else _open(grant))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(
                f"{label} is in use on this host: mounted, or part of another device",
                hint="share=true opens it all the same",
            ) from error
        raise XenvmError(f"{label}: cannot open it: {error.strerror}") from error
    try:
        _check(label, grant, descriptor)
        _claim(label, grant, descriptor)
    except OSError as error:
        os.close(descriptor)
        raise XenvmError(
            f"{label}: cannot lock it: {error.strerror}", hint="does its file system have locks?"
        ) from error
    except XenvmError:
        os.close(descriptor)
        raise
    return descriptor


def _open(grant: DiskGrant) -> int:
    access = os.O_RDONLY if grant.read_only else os.O_RDWR
    return os.open(grant.path, access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)


def _exclusive(label: str, grant: DiskGrant, descriptor: int) -> int:
    """Return a block device that is to be written opened anew, so that nothing else on this host has it.

    What was handed over for reading only stays as it is: the authority is that of whoever opened it. What is only read
    may be open elsewhere, but not mounted read-write: a guest would see a file system that changes under it.
    """
    status = os.fstat(descriptor)
    if grant.share or not stat.S_ISBLK(status.st_mode):
        return descriptor
    if grant.read_only or grant.cipher:  # dm-crypt, too, keeps away all but other mappings
        if place := mounts.written_at(status.st_rdev):
            os.close(descriptor)
            raise BusyError(
                f"{label} is mounted read-write on this host, at {place[:1000]}",
                hint="what is on it changes under the guest; share=true opens it all the same",
            )
        return descriptor
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return descriptor
    # Of a block device O_EXCL means: not while a file system or another device of this host has it, open(2).
    try:
        exclusive = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(descriptor)
    return exclusive


def _check(label: str, grant: DiskGrant, descriptor: int) -> None:
    status = os.fstat(descriptor)
    block = stat.S_ISBLK(status.st_mode)
    if grant.type == "phy" and not block:
        raise XenvmError(f"{label} is not a block device", hint="the type of a file is file or aio")
    if not block and not stat.S_ISREG(status.st_mode):
        raise XenvmError(f"{label} is neither a block device nor a regular file")
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:  # the kernel would read it for whoever may not
        raise XenvmError(f"{label} is not open for reading", code=ExitCode.PERMISSION_REFUSED)
    if not grant.read_only and flags & os.O_ACCMODE != os.O_RDWR:
        raise XenvmError(f"{label} is not open for writing", hint="use mode r")
    if not block and grant.type not in IMAGE_FORMATS and (status.st_size % SECTOR_BYTES or not status.st_size):
        raise XenvmError(
            f"{label} has {status.st_size} bytes, which is no multiple of {SECTOR_BYTES}",
            hint="the rest would be lost to the guest; truncate -s %512 makes it whole",
        )


def _claim(label: str, grant: DiskGrant, descriptor: int) -> None:
    """Lock an image for as long as it is open anywhere: alone for writing, together for reading."""
    if grant.share or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return
    kind = fcntl.LOCK_SH if grant.read_only else fcntl.LOCK_EX
    end = time.monotonic() + RELEASE_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise BusyError(
                    f"{label} is in use by another guest or program (waited {RELEASE_WAIT_S:g} s)",
                    hint="two writers destroy a file system; share=true says that yours do not",
                ) from None
            time.sleep(0.02)
        else:
            break
    busy = _loop_over(os.fstat(descriptor), read_only=grant.read_only)
    if busy:
        raise BusyError(
            f"{label} is in use through {busy}", hint="losetup -l shows by whom; share=true opens it all the same"
        )


def _loop_over(status: os.stat_result, *, read_only: bool) -> str:
    """Name a loop device over the same file; two that only read do not disturb each other.

    It is somebody else's: one of ours would hold the lock.
    """
    for name in os.listdir("/sys/block"):  # noqa: PTH208 - pathlib costs 5 ms
        if not name.startswith("loop"):
            continue
        backing, only_read = _sysfs(f"{name}/loop/backing_file"), _sysfs(f"{name}/ro") == "1"
        if not backing or (read_only and only_read):
            continue
        try:
            other = os.stat(backing)  # noqa: PTH116
        except OSError:
            continue
        if (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino):
            return f"/dev/{name}"
    return ""


def loop(grant: DiskGrant, image: int) -> int:
    """Return an open loop device over the image, which is closed here: with direct I/O where the file system has it."""
    if HERE.simulator:
        return simulated.loop(image)
    label = f"disk {grant.name}: {grant.path}"
    flags = AUTOCLEAR | DIRECT_IO | (READ_ONLY if grant.read_only else 0)
    name = os.fsencode(grant.path)[-63:]
    config = bytearray(LOOP_CONFIG.pack(image, 0, flags, name))
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            device = _configure(control, config, read_only=grant.read_only)
        finally:
            os.close(control)
    except OSError as error:
        raise XenvmError(
            f"{label}: cannot make a loop device: {error.strerror}", hint="is the module loop loaded?"
        ) from error
    finally:
        os.close(image)
    number = os.minor(os.fstat(device).st_rdev)
    if grant.type == "aio" and _sysfs(f"loop{number}/loop/dio") != "1":
        os.close(device)
        raise XenvmError(f"{label}: its file system has no direct I/O", hint="use the type file")
    return device


def number(device: int) -> int:
    """Return the device number of an open disk."""
    if HERE.simulator:
        return simulated.number(device)
    return os.fstat(device).st_rdev


def _configure(control: int, config: bytearray, *, read_only: bool) -> int:
    for _ in range(LOOP_TRIES):  # somebody else may be faster with the free one
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        device = os.open(f"/dev/loop{number}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, LOOP_CONFIGURE, config)
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:
                raise
        else:
            return device
    raise OSError(errno.EBUSY, "others take every free loop device first")


def _sysfs(path: str) -> str:
    try:
        descriptor = os.open(f"/sys/block/{path}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 4096).decode("utf-8", "surrogateescape").rstrip("\n")
    except OSError:
        return ""
    finally:
        os.close(descriptor)
