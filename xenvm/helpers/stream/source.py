# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a stream worker reads an image from: a file as it is, or one unpacked on the way. Both only go forward."""

from __future__ import annotations

import errno
import os
import zlib
from abc import ABC, abstractmethod

from xenvm.helpers import imagefile
from xenvm.helpers.stream import records, zstd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

CHUNK_BYTES: Final = 1 << 20
PACKED_BYTES: Final = 64 << 10  # read at once of a compressed image; what it unpacks to is taken in pieces
BACK_BYTES: Final = (
    records.PAGES_LIMIT + 4
) * records.PAGE_BYTES  # a record of pages is looked through before it is fed
HEAD_BYTES: Final = 2 << 20  # what stands before the streams, and more


class Source(ABC):
    """Base of both: an image of which bytes are asked for by their place."""

    def __init__(self, image: int) -> None:
        self._image = image

    @abstractmethod
    def read(self, length: int, at: int) -> bytes:
        """Return so many bytes from offset `at` on; fewer only at the end."""

    @abstractmethod
    def move(self, pipe: int, at: int, length: int) -> None:
        """Write a range of the image into the pipe."""

    @abstractmethod
    def sum_from(self, at: int) -> None:
        """Have everything from `at` on summed, which was not asked for yet or is still there."""

    @abstractmethod
    def totals(self) -> tuple[int, int]:
        """Return the length of the image, and the CRC-32 of what was to be summed."""


class Plain(Source):
    """A file as it is."""

    def __init__(self, image: int) -> None:
        super().__init__(image)
        self._sum_at = -1

    def read(self, length: int, at: int) -> bytes:
        """Return so many bytes from offset `at` on; fewer only at the end."""
        content = os.pread(self._image, length, at)
        while (
            content
            and len(content) < length
            and (more := os.pread(self._image, length - len(content), at + len(content)))
        ):
            content += more
        return content

    def move(self, pipe: int, at: int, length: int) -> None:
        """Have the kernel move a range of the file into the pipe; where it cannot, copy it."""
        while length:
            try:
                count = os.splice(self._image, pipe, length, offset_src=at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                content = os.pread(self._image, min(length, CHUNK_BYTES), at)
                count = os.write(pipe, content) if content else 0
            if not count:
                raise records.ImageError("the image was cut off while it was read")
            at, length = at + count, length - count

    def sum_from(self, at: int) -> None:
        """Note from where on; the file is read once more for it at the end."""
        self._sum_at = at

    def totals(self) -> tuple[int, int]:
        """Return the size of the file, and the CRC-32 of what was to be summed."""
        size, checksum = os.fstat(self._image).st_size, 0
        if self._sum_at >= 0:
            chunk = bytearray(CHUNK_BYTES)
            with memoryview(chunk) as view:
                while count := os.preadv(self._image, [chunk], self._sum_at):
                    checksum = zlib.crc32(view[:count], checksum)
                    self._sum_at += count
        return size, checksum


class Compressed(Source):
    """A file of zstd frames: unpacked as far as it is asked for, and a few megabytes of that are kept.

    `limit_bytes` is how much it may unpack to, against a small file that unpacks without end.
    """

    def __init__(self, image: int) -> None:
        super().__init__(image)
        self.limit_bytes = HEAD_BYTES
        self._decoder = zstd.Decoder()
        self._packed_at = 0
        self._pieces: Iterator[memoryview] = iter(())
        self._kept, self._kept_at = bytearray(), 0  # what was unpacked last, and its place
        self._ended = False
        self._summing, self._checksum = False, 0

    def read(self, length: int, at: int) -> bytes:
        """Return so many bytes from offset `at` on; fewer only at the end."""
        if at < self._kept_at:
            raise records.ImageError("the image is damaged: its records lead backwards")
        while self._kept_at + len(self._kept) < at + length and not self._ended:
            self._unpack()
        if at - self._kept_at > 2 * BACK_BYTES:
            drop = at - self._kept_at - BACK_BYTES
            del self._kept[:drop]
            self._kept_at += drop
        begin = at - self._kept_at
        return bytes(self._kept[begin : begin + length])

    def _unpack(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            untrusted = os.pread(self._image, PACKED_BYTES, self._packed_at)
            self._packed_at += len(untrusted)
            self._pieces = self._decoder.unpack(untrusted) if untrusted else iter(())
            self._ended = not untrusted
            if self._ended and not self._decoder.between:
                raise records.ImageError(f"the compressed image ends after {self._packed_at} bytes: it is cut off")
            return
        if self._kept_at + len(self._kept) + len(piece) > self.limit_bytes:
            raise records.ImageError(
                f"the compressed image unpacks to more than {self.limit_bytes >> 20} MiB: too much for this VM",
                hint="it is of another guest, damaged, or made to fill memory",
            )
        self._kept += piece
        if self._summing:
            self._checksum = zlib.crc32(piece, self._checksum)

    def move(self, pipe: int, at: int, length: int) -> None:
        """Write a range of what was unpacked into the pipe."""
        while length:
            content = self.read(min(length, CHUNK_BYTES), at)
            if not content:
                raise records.ImageError("the image was cut off while it was read")
            at, length = at + len(content), length - len(content)
            imagefile.put(pipe, content)

    def sum_from(self, at: int) -> None:
        """Sum what has been unpacked from there on, and then what will be."""
        self._summing = True
        with memoryview(self._kept) as kept:
            self._checksum = zlib.crc32(kept[at - self._kept_at :])

    def totals(self) -> tuple[int, int]:
        """Return how much it unpacks to, and the CRC-32 of what was to be summed; all has been asked for by now."""
        return self._kept_at + len(self._kept), self._checksum


def of(image: int) -> Source:
    """Return how to read this image, by its first bytes."""
    return Compressed(image) if os.pread(image, len(zstd.MAGIC), 0) == zstd.MAGIC else Plain(image)
