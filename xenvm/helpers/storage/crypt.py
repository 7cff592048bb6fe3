# SPDX-License-Identifier: GPL-2.0-or-later
"""Plain dm-crypt over a block device, by the device mapper's own requests: what `cryptsetup open --type plain` makes.

It is the same mapping, with the name and uuid that cryptsetup gives, so its commands know it. Without the program the
key is in no file, argument or child; nothing waits for udev; and the process needs no capability but SYS_ADMIN.

Numbers and layouts: linux/dm-ioctl.h; Documentation/admin-guide/device-mapper/dm-crypt.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from xenvm.errors import BusyError, TimeoutExpiredError, XenvmError
from xenvm.helpers.storage.nbd import size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.workers import Decrypt

CONTROL: Final = "/dev/mapper/control"
# struct dm_ioctl: version (3), size of all, start of the data, targets, openers, flags, event, padding, device, name,
# uuid, 7 bytes
REQUEST: Final = struct.Struct("=IIIIIIiIIIQ128s129s7x")
TARGET: Final = struct.Struct("=QQiI16s")  # struct dm_target_spec: first sector, sectors, status, next, type
VERSION: Final = (4, 27, 0)  # the first that removes on the last close
DM_DEV_CREATE, DM_DEV_REMOVE, DM_DEV_SUSPEND, DM_TABLE_LOAD = 0xC138FD03, 0xC138FD04, 0xC138FD06, 0xC138FD09
DM_READONLY_FLAG: Final = 1 << 0
DM_SECURE_DATA_FLAG: Final = 1 << 15  # the kernel wipes its copy of the request
DM_DEFERRED_REMOVE: Final = 1 << 17

SECTOR_BYTES: Final = 512
NODE_WAIT_S: Final = 10.0
POLL_S: Final = 0.01


def encode(name: str, flags: int, *, uuid: str = "", line: bytes = b"") -> bytearray:
    """Return a request about the mapping `name`; `line` is the table of a request that loads one."""
    texts = name.encode("ascii"), uuid.encode("ascii")
    head = REQUEST.pack(*VERSION, REQUEST.size + len(line), REQUEST.size, 1 if line else 0, 0, flags, 0, 0, 0, *texts)
    return bytearray(head + line)


def table(cipher: str, key: bytes, device: tuple[int, int], sectors: int) -> bytes:
    """Return the one line of the mapping's table: the whole device, each sector numbered from 0."""
    line = f"{cipher} {key.hex()} 0 {device[0]}:{device[1]} 0\0".encode("ascii")
    line += bytes(-len(line) % 8)
    return TARGET.pack(0, sectors, 0, TARGET.size + len(line), b"crypt") + line


def node_of(reply: bytes | bytearray) -> tuple[int, int]:
    """Return major and minor of the device in a reply."""
    device = REQUEST.unpack_from(reply)[10]
    return os.major(device), os.minor(device)


def open_mapping(message: Decrypt, device: int, key_file: int) -> tuple[int, str]:
    """Make the mapping; return it open, and its path. It goes by itself when its last opener closes it."""
    key = _key(key_file, message.key_size_bits)
    status = os.fstat(device)
    if not stat.S_ISBLK(status.st_mode):
        raise XenvmError("encryption: what is to be decrypted is no block device")
    sectors = size_of(device) // SECTOR_BYTES
    if not sectors or not message.cipher:
        raise XenvmError("encryption: the device is empty, or no cipher is named")
    control = _control()
    try:
        lower = (os.major(status.st_rdev), os.minor(status.st_rdev))
        return _map(control, message, table(message.cipher, key, lower, sectors))
    finally:
        os.close(control)


def remove_mappings(names: tuple[str, ...]) -> None:
    """Remove mappings; one that is gone is fine, one in use goes with its last opener. Raise XenvmError naming one."""
    control = _control()
    try:
        for name in names:
            try:
                _remove(control, name)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise XenvmError(f"the mapping {name} cannot be removed: {error.strerror}") from error
    finally:
        os.close(control)


def _control() -> int:
    try:
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise XenvmError(
            f"encryption: {CONTROL} cannot be opened: {error.strerror}", hint="modprobe dm-mod dm-crypt"
        ) from error


def _key(key_file: int, bits: int) -> bytes:
    """Return the first `bits` of the file, as they are."""
    wanted = bits // 8
    if bits % 8:
        raise XenvmError(f"encryption: a key of {bits} bits is no whole number of bytes")
    try:
        key = os.pread(key_file, wanted, 0)
    except OSError as error:
        raise XenvmError(f"encryption: the key file cannot be read: {error.strerror}") from error
    if len(key) < wanted:
        raise XenvmError(
            f"encryption: the key file has {len(key)} bytes; a key of {bits} bits takes {wanted}",
            hint="correct key-size or the key file",
        )
    return key


def _map(control: int, message: Decrypt, line: bytes) -> tuple[int, str]:
    name = message.name
    reading = DM_READONLY_FLAG if message.read_only else 0
    created = encode(name, reading, uuid=f"CRYPT-PLAIN-{name}")
    try:
        fcntl.ioctl(control, DM_DEV_CREATE, created)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(
                f"encryption: a mapping {name} exists already", hint=f"if nothing uses it: cryptsetup close {name}"
            ) from error
        raise XenvmError(f"encryption: the kernel makes no mapping {name}: {error.strerror}") from error
    major, minor = node_of(created)
    path = f"/dev/dm-{minor}"
    opened = -1
    try:
        _load(control, message, reading, line)
        opened = _open(path, os.makedev(major, minor), os.O_RDONLY if message.read_only else os.O_RDWR)
        _remove(control, name)  # from now on it lives as long as something has it open
    except (OSError, XenvmError) as error:
        if opened >= 0:
            os.close(opened)
        left = _removed(control, name)
        if isinstance(error, XenvmError):
            error.message += left
            raise
        raise XenvmError(f"encryption: {path} cannot be used: {error.strerror}{left}") from error
    return opened, path


def _load(control: int, message: Decrypt, reading: int, line: bytes) -> None:
    try:
        fcntl.ioctl(control, DM_TABLE_LOAD, encode(message.name, reading | DM_SECURE_DATA_FLAG, line=line))
        fcntl.ioctl(control, DM_DEV_SUSPEND, encode(message.name, reading))  # without SUSPEND_FLAG: resume
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(
                "encryption: the device under it is in use: mounted, or part of another device",
                hint="lsblk shows by what",
            ) from error
        raise XenvmError(
            f"encryption: the kernel refuses the cipher {message.cipher} with a key of {message.key_size_bits} bits: "
            f"{error.strerror}",
            hint="the kernel log (dmesg) says more; is the module dm-crypt there, and does the key size fit?",
        ) from error


def _remove(control: int, name: str) -> None:
    """Remove the mapping now, or when its last opener closes it."""
    fcntl.ioctl(control, DM_DEV_REMOVE, encode(name, DM_DEFERRED_REMOVE))


def _removed(control: int, name: str) -> str:
    """Remove the mapping after a failure; return what to add to the error, "" when nothing is left."""
    try:
        _remove(control, name)
    except OSError as error:
        return f"; the mapping {name} is left ({error.strerror})"
    return ""


def _open(path: str, device: int, access: int) -> int:
    end = time.monotonic() + NODE_WAIT_S
    while True:
        try:
            opened = os.open(path, access | os.O_CLOEXEC)
        except FileNotFoundError:
            if time.monotonic() >= end:
                raise TimeoutExpiredError(
                    f"encryption: {path} is not there after {NODE_WAIT_S:g} s", hint="is /dev a devtmpfs?"
                ) from None
            time.sleep(POLL_S)
            continue
        if os.fstat(opened).st_rdev != device:
            os.close(opened)
            raise XenvmError(f"encryption: {path} is another device than the mapping")
        return opened
