# SPDX-License-Identifier: GPL-2.0-or-later
"""zstd piece by piece, by libzstd, in bounded memory."""

from __future__ import annotations

from xenvm._unpack import ffi, lib
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

MAGIC: Final = b"\x28\xb5\x2f\xfd"
WINDOW_LOG: Final = 23  # 8 MiB, what every reader of zstd should take (RFC 8878, 3.1.1.1.2)
LEVEL: Final = 1  # a fifth to a third of an idle guest; higher ones gain little and take several times as long
ROOM_BYTES: Final = 1 << 20
RAW_BLOCK_BYTES: Final = 128 << 10  # the most that a block may have


class ZstdError(XenvmError):
    """What was read is not what zstd writes."""


class _Loaded:
    library = False


def load() -> None:
    """Load libzstd if the host has it, which must be before a process confines itself."""
    _Loaded.library = lib.xenvm_zstd_load() == 0


def require() -> None:
    """Raise XenvmError when libzstd is not there."""
    if not _Loaded.library:
        raise XenvmError(
            "libzstd.so.1 is not on this host, so that no image can be compressed or read that is",
            hint="install Debian's package libzstd1; or, to save, set image-compression = none",
        )


class _Stream:
    """Room for a piece, and two counters."""

    def __init__(self, state: object) -> None:
        if state == ffi.NULL:
            raise XenvmError("libzstd gave no memory")
        self._state = state
        self._room = ffi.new("char[]", ROOM_BYTES)
        self._written, self._used = ffi.new("size_t *"), ffi.new("size_t *")
        self._view = memoryview(ffi.buffer(self._room, ROOM_BYTES))


class Decoder(_Stream):
    """Frames are unpacked one after the other. `between` tells whether one is complete and no other has begun."""

    def __init__(self) -> None:
        require()
        super().__init__(lib.xenvm_zstd_decoder(WINDOW_LOG))
        self.between = True

    def unpack(self, untrusted: bytes) -> Iterator[memoryview]:
        """Yield what these bytes unpack to; a piece is valid until the next one. Raise ZstdError for what is wrong."""
        content = ffi.from_buffer(untrusted)
        self._used[0] = 0
        while True:
            self._written[0], before = 0, self._used[0]
            result = lib.xenvm_zstd_decode(
                self._state, self._room, ROOM_BYTES, self._written, content, len(untrusted), self._used
            )
            if result < 0:
                raise ZstdError(
                    "the compressed image is damaged, or needs more memory to unpack than is allowed: zstd cannot "
                    "read it",
                    hint=f"`zstd -t` tells which; a window of more than {1 << WINDOW_LOG >> 20} MiB is too much here",
                )
            if self._written[0] or self._used[0] > before:
                self.between = result == 0
            yield self._view[: self._written[0]]
            if self._used[0] == len(untrusted) and self._written[0] < ROOM_BYTES:
                return


class Encoder(_Stream):
    """One frame, with a checksum of zstd's own."""

    def __init__(self) -> None:
        require()
        super().__init__(lib.xenvm_zstd_encoder(LEVEL))

    def pack(self, piece: memoryview, *, end: bool = False) -> Iterator[memoryview]:
        """Yield what is to be written for a piece; each is valid until the next one. With `end` the frame ends."""
        content = ffi.from_buffer(piece)
        self._used[0] = 0
        while True:
            self._written[0] = 0
            result = lib.xenvm_zstd_encode(
                self._state, self._room, ROOM_BYTES, self._written, content, len(piece), self._used, end
            )
            if result < 0:
                raise XenvmError("libzstd failed to compress the image")
            if self._written[0]:
                yield self._view[: self._written[0]]
            if self._used[0] == len(piece) and (not end or result == 0):
                return


def raw_frame(content: bytes, at: int, length: int) -> tuple[bytes, int]:
    """Return a frame in which the content stands as it is, and where in the frame the `length` bytes from `at` on are.

    They must be near the end of the content: it is cut into blocks from there (RFC 8878, 3.1.1).
    """
    frame = MAGIC + b"\xa0" + len(content).to_bytes(4, "little")  # a single segment; its size in four bytes
    begin, place = 0, -1
    while begin < len(content):
        size = (len(content) - begin) % RAW_BLOCK_BYTES or RAW_BLOCK_BYTES
        last = begin + size == len(content)
        frame += (size << 3 | last).to_bytes(3, "little")  # type 0: raw
        if begin <= at and at + length <= begin + size:
            place = len(frame) + at - begin
        frame += content[begin : begin + size]
        begin += size
    return frame, place
