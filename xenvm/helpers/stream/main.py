# SPDX-License-Identifier: GPL-2.0-or-later
"""The stream process: checks a save image whole, then feeds a builder with what it has checked.

1. become user xenvm-stream, without capabilities and with no file at all;
2. read one Inspect; walk through the image from beginning to end, compare its checksum if it has one;
3. say what it is (Image), or what is wrong with it (Failed);
4. walk through it again and write its stream into the pipe. Should the file have changed meanwhile, what does not pass
   the same checks now ends the pipe.
"""

from __future__ import annotations

import errno
import os
import zlib

from xenvm.boundary.images import Image, Inspect
from xenvm.boundary.messages import NO_DOMAIN, Failed, Fault
from xenvm.boundary.privileges import Role
from xenvm.errors import ExitCode, ProtocolError, XenvmError
from xenvm.helpers import serve
from xenvm.helpers.stream import records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

REQUEST_WAIT_S: Final = 900.0  # it may be started before it is needed; it ends with its broker
CHUNK_BYTES: Final = 1 << 20


def main() -> int:
    """Run one stream worker; return its exit status."""
    channel = serve.broker_channel()
    channel.send(serve.drop(Role.STREAM, frozenset()))
    received = channel.receive(deadline_s=REQUEST_WAIT_S)
    if received is None:
        return 0
    message, descriptors = received
    if not isinstance(message, Inspect) or len(descriptors) != Inspect.DESCRIPTORS:
        raise ProtocolError("a stream worker reads one image, with two descriptors")
    image, pipe = descriptors
    try:
        told, at = inspect(image)
        channel.send(told)
        feed(image, pipe, at, records.Guest(told.memory_max_kib, told.vcpus))
    except XenvmError as error:
        channel.send(Failed(0, Fault(int(error.code), error.message[:4000], error.hint[:1000]), NO_DOMAIN))
        return int(ExitCode.FAILED)
    except BrokenPipeError:  # the builder has ended; it says why itself
        return int(ExitCode.FAILED)
    return 0


def inspect(image: int) -> tuple[Image, int]:
    """Check an image whole; return what it is, and where its stream begins. Raise ImageError for what is wrong."""
    try:
        size = os.fstat(image).st_size
        read = _reader(image)
        facts = records.facts(read, size)
        if facts.sealed_bytes >= 0 and facts.sealed_bytes != size:
            raise records.ImageError(f"the image has {size} bytes of {facts.sealed_bytes}: it is cut off or damaged")
        guest = records.Guest(facts.memory_max_kib, facts.vcpus)
        for _ in records.pieces(read, facts.stream_at, guest):
            pass
        if facts.sealed_bytes >= 0 and _checksum(image, facts.streams_at) != facts.checksum:
            raise records.ImageError("the checksum of the image is another one: it is damaged")
    except OSError as error:
        raise records.ImageError(f"the image cannot be read: {error.strerror or error}") from error
    told = Image(facts.memory_max_kib, facts.vcpus, guest.xen_major, guest.xen_minor, facts.uuid)
    return told, facts.stream_at


def feed(image: int, pipe: int, at: int, guest: records.Guest) -> None:
    """Write the stream that begins at `at` into the pipe, each piece after it was checked."""
    for piece in records.pieces(_reader(image), at, guest):
        if isinstance(piece, bytes):
            left = piece
            while left:
                left = left[os.write(pipe, left) :]
        else:
            _move(image, pipe, *piece)


def _move(image: int, pipe: int, offset: int, length: int) -> None:
    """Have the kernel move a range of the file into the pipe; where it cannot, copy it."""
    while length:
        try:
            count = os.splice(image, pipe, length, offset_src=offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            content = os.pread(image, min(length, CHUNK_BYTES), offset)
            count = os.write(pipe, content) if content else 0
        if not count:
            raise records.ImageError("the image was cut off while it was read")
        offset, length = offset + count, length - count


def _reader(image: int) -> records.Read:
    def read(length: int, at: int) -> bytes:
        content = os.pread(image, length, at)
        while content and len(content) < length and (more := os.pread(image, length - len(content), at + len(content))):
            content += more
        return content

    return read


def _checksum(image: int, at: int) -> int:
    chunk = bytearray(CHUNK_BYTES)
    checksum = 0
    with memoryview(chunk) as view:
        while count := os.preadv(image, [chunk], at):
            checksum = zlib.crc32(view[:count], checksum)
            at += count
    return checksum
