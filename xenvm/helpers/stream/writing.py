# SPDX-License-Identifier: GPL-2.0-or-later
"""A save image on its way from the builder, whose pipe this reads, into the file, as it is or compressed.

What comes is a whole image without a seal, which is put into its head at the end. As it is, a page that is zero becomes
a hole: same bytes, less disk. Compressed, the head goes into a frame of its own in which it stands as it is; unpacking
the file gives what came.
"""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod

from xenvm.errors import ProtocolError, XenvmError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.stream import zstd
from xenvm.helpers.stream.records import CONFIG_LIMIT_BYTES, PAGE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

CHUNK_BYTES: Final = 1 << 20
END: Final = b"}\0"  # what stands behind the seal in the config


class Form(ABC):
    """Base of both: how an image stands in its file."""

    share = 1
    """The part of the guest's memory that room is wanted for: the memory by this."""

    def __init__(self, image: int) -> None:
        self._image = image

    @abstractmethod
    def begin(self, head: bytes, seal_at: int) -> int:
        """Write what stands before the streams; return where in the file its seal is, `seal_at` in the head."""

    @abstractmethod
    def add(self, chunk: bytearray, length: int) -> None:
        """Write what comes next: so many bytes of the chunk."""

    @abstractmethod
    def end(self) -> None:
        """Write what is left."""


class Plain(Form):
    """As it is. Chunks after the first end with a page of the file, so that no page is cut in two."""

    def __init__(self, image: int) -> None:
        super().__init__(image)
        self._at = 0

    def begin(self, head: bytes, seal_at: int) -> int:
        """Write the head; the seal is where it was."""
        imagefile.put(self._image, head)
        self._at = len(head)
        return seal_at

    def add(self, chunk: bytearray, length: int) -> None:
        """Write all but whole pages that are zero: `startswith` compares in place, where a slice would be a copy."""
        written, zeros = 0, bytes(PAGE_BYTES)
        for page in range(-self._at % PAGE_BYTES, length - PAGE_BYTES + 1, PAGE_BYTES):
            if chunk.startswith(zeros, page):
                self._put(chunk, written, page)
                written = page + PAGE_BYTES
        self._put(chunk, written, length)
        self._at += length

    def _put(self, chunk: bytearray, begin: int, end: int) -> None:
        with memoryview(chunk) as view:
            while begin < end:
                begin += os.pwrite(self._image, view[begin:end], self._at + begin)

    def end(self) -> None:
        """Have the file end where the image does, though that be a hole."""
        os.ftruncate(self._image, self._at)


class Compressed(Form):
    """Two frames of zstd: one of the head, one of all the rest."""

    share = 4
    """Should it not do, the guest runs on."""

    def __init__(self, image: int) -> None:
        super().__init__(image)
        self._encoder = zstd.Encoder()

    def begin(self, head: bytes, seal_at: int) -> int:
        """Write the frame of the head."""
        frame, place = zstd.raw_frame(head, seal_at, len(saved.UNSEALED))
        imagefile.put(self._image, frame)
        return place

    def add(self, chunk: bytearray, length: int) -> None:
        """Compress what comes, and write what that gives."""
        with memoryview(chunk) as view:
            self._pack(view[:length], end=False)

    def end(self) -> None:
        """End the frame."""
        self._pack(memoryview(b""), end=True)

    def _pack(self, piece: memoryview, *, end: bool) -> None:
        for packed in self._encoder.pack(piece, end=end):
            imagefile.put(self._image, packed)


def prepare(image: int, compression: str) -> Form:
    """Return what writes an image so; raise XenvmError when there is no libzstd for it."""
    os.lseek(image, 0, os.SEEK_SET)
    return Plain(image) if compression == "none" else Compressed(image)


def check_space(image: int, form: Form, memory_kib: int) -> None:
    """Raise XenvmError when there is no room for the image of a guest with so much memory."""
    imagefile.check_space(image, (memory_kib << 10) // form.share)


def write(pipe: int, image: int, form: Form, limit_bytes: int) -> int:
    """Write all that comes, seal it, have it on the disk; return how long the file is. Raise XenvmError why not.

    More than `limit_bytes` no guest can have come to, and nobody would unpack it.
    """
    head = _read(pipe, len(saved.MAGIC) + saved.HEADER.size)
    *_, length = saved.HEADER.unpack(head[len(saved.MAGIC) :])
    if length > CONFIG_LIMIT_BYTES:
        raise ProtocolError("the head of the image is too long")
    head += _read(pipe, length)
    seal_at = len(head) - len(END) - len(saved.UNSEALED)
    if not head.startswith(saved.MAGIC) or head[seal_at:] != saved.UNSEALED + END:
        raise ProtocolError("what comes is no image without a seal")
    try:
        place = form.begin(head, seal_at)
        total, checksum = _pass_on(pipe, form, len(head), limit_bytes)
        form.end()
        os.pwrite(image, saved.seal(total, checksum), place)
        os.fsync(image)
    except OSError as error:
        raise imagefile.failure(error) from error
    return os.fstat(image).st_size


def _pass_on(pipe: int, form: Form, total: int, limit_bytes: int) -> tuple[int, int]:
    """Write the streams, of which `total` bytes stand before them; return the bytes of all, and the sum of the streams.

    A chunk is filled as far as it ends with a multiple of its size.
    """
    checksum, chunk, filled, ended = 0, bytearray(CHUNK_BYTES), 0, False
    with memoryview(chunk) as view:
        while not ended:
            room = CHUNK_BYTES - (total + filled) % CHUNK_BYTES
            count = os.readv(pipe, [view[filled : filled + room]])
            filled, ended = filled + count, not count
            if count < room and not ended:
                continue
            if total + filled > limit_bytes:
                raise XenvmError(f"the image is to have more than {limit_bytes >> 20} MiB: too much for this guest")
            checksum = zlib.crc32(view[:filled], checksum)
            form.add(chunk, filled)
            total, filled = total + filled, 0
    return total, checksum


def _read(pipe: int, length: int) -> bytes:
    content = imagefile.take(pipe, length)
    if len(content) < length:
        raise ProtocolError("the builder ended in the head of the image")
    return content
