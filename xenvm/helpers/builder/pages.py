# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a simulated guest as a stream of libxenguest, so that its images are files like all others.

A simulated guest remembers a few numbers and words. They stand, as JSON, in its first page frames; the rest of what it
has touched is filled with the numbers of the frames, which are compared when it comes back. Version 65535 of Xen, that
no real one has, tells such images from those of real guests.
"""

from __future__ import annotations

import struct

from xenvm import jsontext
from xenvm.errors import XenvmError
from xenvm.helpers import imagefile, saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Final

RELEASE: Final = (0xFFFF, 0)
PAGE_BYTES: Final = 4096
TOUCHED: Final = 32  # one of so many frames has content
STATE_LIMIT_BYTES: Final = 64 << 10
BATCH: Final = 1024  # frames of one record, as libxenguest writes them
HEAD: Final = struct.Struct(">QIIHHI")
DOMAIN: Final = struct.Struct("<IHHII")
PAIR: Final = struct.Struct("<II")
LENGTH: Final = struct.Struct("<I")
END, PAGE_DATA, PV_INFO, P2M_FRAMES, VCPU_BASIC, SHARED_INFO = 0, 1, 2, 3, 4, 7
STATIC_DATA_END, CPUID_POLICY = 0x10, 0x11


def stream(state: dict[str, Any], memory_kib: int) -> Iterator[bytes]:
    """Yield the stream of a guest with this state, record by record; about one MiB each."""
    frames = memory_kib * 1024 // PAGE_BYTES
    yield HEAD.pack(2**64 - 1, 0x58454E46, 3, 0, 0, 0) + DOMAIN.pack(1, 12, 0, *RELEASE)
    yield _record(PV_INFO, bytes([8, 4, 0, 0, 0, 0, 0, 0])) + _record(CPUID_POLICY, bytes(24))
    yield _record(STATIC_DATA_END)
    yield _record(P2M_FRAMES, PAIR.pack(0, frames - 1) + bytes(8 * ((frames - 1) // 512 + 1)))
    content = _content(state, frames)
    for first in range(0, len(content), BATCH):
        batch = content[first : first + BATCH]
        numbers = struct.pack(f"<{len(batch)}Q", *range(first, first + len(batch)))
        yield _record(PAGE_DATA, PAIR.pack(len(batch), 0) + numbers + b"".join(batch))
    yield _record(SHARED_INFO, bytes(PAGE_BYTES)) + _record(VCPU_BASIC, PAIR.pack(0, 0) + bytes(64)) + _record(END)


def state_in(pipe: int) -> dict[str, Any]:
    """Return the state of the guest whose stream comes out of a pipe; raise XenvmError when it is not as written."""
    _read(pipe, HEAD.size)
    _kind, _shift, _reserved, *release = DOMAIN.unpack(_read(pipe, DOMAIN.size))
    if tuple(release) != RELEASE:
        raise XenvmError("reading the image: it is of a real guest")
    frames: list[bytes] = []
    last = -1
    while True:
        kind, length = saved.RECORD.unpack(_read(pipe, saved.RECORD.size))
        body = _read(pipe, -(-length // 8) * 8)
        if kind == P2M_FRAMES:
            last = PAIR.unpack_from(body)[1]
        elif kind == PAGE_DATA:
            (count, _reserved) = PAIR.unpack_from(body)
            at = PAIR.size + 8 * count
            frames += [body[one : one + PAGE_BYTES] for one in range(at, at + count * PAGE_BYTES, PAGE_BYTES)]
        elif kind == END:
            break
    state = _state(frames)
    if _content(state, last + 1) != frames:
        raise XenvmError("reading the image: the memory in it is not that of the guest it tells of")
    return state


def _content(state: dict[str, Any], frames: int) -> list[bytes]:
    """Return the frames that a guest of so many has touched."""
    text = jsontext.dumps(state).encode("ascii")
    if len(text) > STATE_LIMIT_BYTES:
        raise XenvmError(f"writing the image: the state of the guest has {len(text)} bytes")
    text = LENGTH.pack(len(text)) + text
    pages = [text[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0") for at in range(0, len(text), PAGE_BYTES)]
    return pages + [_filled(number) for number in range(len(pages), frames // TOUCHED)]


def _filled(number: int) -> bytes:
    """Return what is in a frame of this number; some are empty, as those of real guests."""
    return struct.pack("<Q", number) * (PAGE_BYTES // 8) if number % 4 else bytes(PAGE_BYTES)


def _state(frames: list[bytes]) -> dict[str, Any]:
    try:
        (length,) = LENGTH.unpack_from(frames[0])
        text = b"".join(frames[: (LENGTH.size + length) // PAGE_BYTES + 1])[LENGTH.size : LENGTH.size + length]
        state = jsontext.loads(text.decode("ascii"))
    except (IndexError, ValueError, struct.error):
        state = None
    if not isinstance(state, dict):
        raise XenvmError("reading the image: the guest in it has no state")
    return state


def _record(kind: int, body: bytes = b"") -> bytes:
    return saved.RECORD.pack(kind, len(body)) + body + bytes(-len(body) % 8)


def _read(pipe: int, length: int) -> bytes:
    content = imagefile.take(pipe, length)
    if len(content) < length:
        raise XenvmError("reading the image: its stream was cut off")
    return content
