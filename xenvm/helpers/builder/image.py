# SPDX-License-Identifier: GPL-2.0-or-later
"""A save image as a file: is there room, are its pages on the disk, where are zeros, what is its checksum."""

from __future__ import annotations

import errno
import os
import zlib

from xenvm.errors import XenvmError
from xenvm.helpers import saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    Punch = Callable[[int, int, int], int]

PAGE_KIB: Final = 4
HEADROOM_BYTES: Final = 8 << 20  # of an image above the guest's memory: its records, and the map of its pages
PAGE_BYTES: Final = PAGE_KIB << 10
CHUNK_BYTES: Final = 1 << 20


def check_space(image: int, memory_kib: int) -> None:
    """Raise XenvmError when the file system has not room for the whole image; what it turns out to need may be less."""
    need_bytes = (memory_kib << 10) + HEADROOM_BYTES
    status = os.fstatvfs(image)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < need_bytes:
        raise XenvmError(
            f"the image needs up to {need_bytes >> 20} MiB, {free_bytes >> 20} MiB are free where it is to be written",
            hint="make room, or name a file on another file system",
        )


def finish(image: int, head: saved.Head, punch: Punch) -> int:
    """Make holes of pages that are all zero, seal the image, and have it on the disk; return its length in bytes."""
    try:
        checksum = _read_back(image, head.streams_at, punch)
        length = os.fstat(image).st_size
        os.pwrite(image, saved.seal(length, checksum), head.seal_at)
        os.fsync(image)
    except OSError as error:
        raise XenvmError(f"writing the image: {error.strerror or error}", hint=hint(error.errno)) from error
    return length


def _read_back(image: int, begin: int, punch: Punch) -> int:
    """Return the CRC-32 of everything from `begin` on; whole pages of the file that are zero become holes."""
    zeros, chunk = bytes(PAGE_BYTES), bytearray(CHUNK_BYTES)
    view = memoryview(chunk)
    checksum, at, punching = 0, begin // PAGE_BYTES * PAGE_BYTES, True
    skip = begin - at
    while count := os.preadv(image, [chunk], at):
        checksum = zlib.crc32(view[skip:count], checksum)
        skip = 0
        if punching:
            punching = _punch(image, at, view[:count], zeros, punch)
        at += count
    return checksum


def _punch(image: int, at: int, view: memoryview, zeros: bytes, punch: Punch) -> bool:
    """Make holes of the zero pages in one chunk, neighbours together; False when the file system knows no holes."""
    begin, count = -1, len(view)
    for page in range(0, count + PAGE_BYTES, PAGE_BYTES):
        if page + PAGE_BYTES <= count and view[page : page + PAGE_BYTES] == zeros:
            begin = page if begin < 0 else begin
        elif begin >= 0:
            result = punch(image, at + begin, page - begin)
            if result == -errno.EOPNOTSUPP:
                return False
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            begin = -1
    return True


def write(image: int, content: bytes) -> None:
    """Write all of the content; raise XenvmError with the reason."""
    while content:
        try:
            content = content[os.write(image, content) :]
        except OSError as error:
            raise XenvmError(f"writing the image: {error.strerror}", hint=hint(error.errno)) from error


def hint(number: int | None) -> str:
    """Return what to try against an error of this number."""
    return "make room, or name a file on another file system" if number in (errno.ENOSPC, errno.EDQUOT) else ""
