# SPDX-License-Identifier: GPL-2.0-or-later
"""A save image that is written: are its pages on the disk, where are zeros, what is its checksum."""

from __future__ import annotations

import errno
import os
import zlib

from xenvm.helpers import imagefile, saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    Punch = Callable[[int, int, int], int]

PAGE_KIB: Final = 4
PAGE_BYTES: Final = PAGE_KIB << 10
CHUNK_BYTES: Final = 1 << 20


def finish(image: int, head: saved.Head, punch: Punch) -> int:
    """Make holes of pages that are all zero, seal the image, and have it on the disk; return its length in bytes."""
    try:
        checksum = _read_back(image, head.streams_at, punch)
        length = os.fstat(image).st_size
        os.pwrite(image, saved.seal(length, checksum), head.seal_at)
        os.fsync(image)
    except OSError as error:
        raise imagefile.failure(error) from error
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
            punching = _punch(image, at, chunk, count, zeros, punch)
        at += count
    return checksum


def _punch(image: int, at: int, chunk: bytearray, count: int, zeros: bytes, punch: Punch) -> bool:
    """Make holes of the zero pages in one chunk, neighbours together; False when the file system knows no holes.

    Slices of the bytes are copies, which are compared at once; those of a view are compared byte after byte.
    """
    begin = -1
    for page in range(0, count + PAGE_BYTES, PAGE_BYTES):
        if page + PAGE_BYTES <= count and chunk[page : page + PAGE_BYTES] == zeros:
            begin = page if begin < 0 else begin
        elif begin >= 0:
            result = punch(image, at + begin, page - begin)
            if result == -errno.EOPNOTSUPP:
                return False
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            begin = -1
    return True
