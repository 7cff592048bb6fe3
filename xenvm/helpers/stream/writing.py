# SPDX-License-Identifier: GPL-2.0-or-later
"""A save image is compressed on its way from the builder, whose pipe this reads, into the file.

What comes is a whole image, as it would be written otherwise, and unpacking the file gives that again. The head goes
into a frame of its own in which it stands as it is, so that the seal can be put into it at the end.
"""

from __future__ import annotations

import os
import zlib

from xenvm.errors import ProtocolError, XenvmError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.stream import zstd
from xenvm.helpers.stream.records import CONFIG_LIMIT_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

CHUNK_BYTES: Final = 1 << 20
NEEDED: Final = 4  # room is wanted for so large a part of the guest's memory; should it not do, the guest runs on
END: Final = b"}\0"  # what stands behind the seal in the config


def prepare(image: int, memory_max_kib: int) -> zstd.Encoder:
    """Return what compresses; raise XenvmError when there is no libzstd, or no room."""
    encoder = zstd.Encoder()
    imagefile.check_space(image, (memory_max_kib << 10) // NEEDED)
    return encoder


def pack(pipe: int, image: int, encoder: zstd.Encoder, limit_bytes: int) -> int:
    """Write all that comes, seal it, have it on the disk; return how long the file is. Raise XenvmError why not.

    More than `limit_bytes` nobody would unpack again.
    """
    head = _read(pipe, len(saved.MAGIC) + saved.HEADER.size)
    *_, length = saved.HEADER.unpack(head[len(saved.MAGIC) :])
    if length > CONFIG_LIMIT_BYTES:
        raise ProtocolError("the head of the image is too long")
    head += _read(pipe, length)
    seal_at = len(head) - len(END) - len(saved.UNSEALED)
    if not head.startswith(saved.MAGIC) or head[seal_at:] != saved.UNSEALED + END:
        raise ProtocolError("what comes is no image without a seal")
    frame, place = zstd.raw_frame(head, seal_at, len(saved.UNSEALED))
    imagefile.write(image, frame)
    checksum, total = 0, len(head)
    with memoryview(bytearray(CHUNK_BYTES)) as view:
        while count := os.readv(pipe, [view]):
            piece = view[:count]
            checksum, total = zlib.crc32(piece, checksum), total + count
            if total > limit_bytes:
                raise XenvmError(f"the image is to have more than {limit_bytes >> 20} MiB: too much for this guest")
            for packed in encoder.pack(piece):
                imagefile.write(image, packed)
        for packed in encoder.pack(view[:0], end=True):
            imagefile.write(image, packed)
    try:
        os.pwrite(image, saved.seal(total, checksum), place)
        os.fsync(image)
    except OSError as error:
        raise imagefile.failure(error) from error
    return os.fstat(image).st_size


def _read(pipe: int, length: int) -> bytes:
    content = b""
    while len(content) < length:
        more = os.read(pipe, length - len(content))
        if not more:
            raise ProtocolError("the builder ended in the head of the image")
        content += more
    return content
