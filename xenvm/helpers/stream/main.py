# SPDX-License-Identifier: GPL-2.0-or-later
"""The stream process: checks a save image whole, then feeds a builder with what it has checked. Or it writes one.

1. become user xenvm-stream, without capabilities and with no file at all;
2. read one Inspect; walk through the image from beginning to end, compare its checksum if it has one;
3. say what it is (Image), or what is wrong with it (Failed);
4. walk through it again and write its stream into the pipe. Should the file have changed meanwhile, what does not pass
   the same checks now ends the pipe.

A compressed image is unpacked on the way, twice. Asked to Write, it puts into an image what a builder writes into the
pipe.
"""

from __future__ import annotations

import os

from xenvm.boundary.images import Image, Inspect, Room, Write, Writing, Written, other_memory
from xenvm.boundary.privileges import Role
from xenvm.errors import ExitCode, ProtocolError, XenvmError
from xenvm.helpers import imagefile, serve
from xenvm.helpers.stream import records, source, writing, zstd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.frames import Channel

NEEDED_DESCRIPTORS: Final = 2
ROUNDS: Final = 4  # of a guest's memory that a compressed image may unpack to: a live one has pages more than once
SLACK_BYTES: Final = 64 << 20  # and this beside it


def main() -> int:
    """Run one stream worker; return its exit status."""
    channel = serve.broker_channel()
    zstd.load()
    channel.send(serve.drop(Role.STREAM, frozenset()))
    received = serve.request(channel)
    if received is None:
        return 0
    message, descriptors = received
    if not isinstance(message, Inspect | Write) or len(descriptors) < NEEDED_DESCRIPTORS:
        raise ProtocolError("a stream worker reads or writes one image, with two descriptors")
    image, pipe, *state = descriptors
    try:
        if isinstance(message, Write):
            return write(channel, message, image, pipe)
        told, at = inspect(image, message.memory_max_kib, *state)
        channel.send(told)
        feed(image, pipe, at, told, hvm=bool(state))
    except XenvmError as error:
        return serve.fail(channel, error)
    except BrokenPipeError:  # the builder has ended; it says why itself
        return int(ExitCode.FAILED)
    return 0


def write(channel: Channel, message: Write, image: int, pipe: int) -> int:
    """Write an image, as soon as it is known how large it will be; return the exit status."""
    form = writing.prepare(image, message.compression)
    received = serve.request(channel)
    if received is None:
        return 0
    room, _ = received
    if not isinstance(room, Room):
        raise ProtocolError("a stream worker that is to write hears next how much")
    writing.check_space(image, form, room.memory_kib)
    channel.send(Writing())
    limit = limit_bytes(max(message.memory_max_kib, room.memory_kib))  # the config may be a newer one than the guest
    channel.send(Written(writing.write(pipe, image, form, limit)))
    return 0


def inspect(image: int, memory_max_kib: int, state: int = -1) -> tuple[Image, int]:
    """Check an image whole; return what it is, and where its stream begins. Raise ImageError for what is wrong.

    That of an HVM guest is wanted when there is a file `state`, where what its device model begins with goes.
    """
    hvm = state >= 0
    try:
        found = source.of(image)
        facts = records.facts(found.read, os.fstat(image).st_size, hvm=hvm)
        if isinstance(found, source.Compressed):
            if facts.memory_max_kib != memory_max_kib:  # else the limit would be that of an image of a larger guest
                raise other_memory(facts.memory_max_kib, memory_max_kib)
            found.limit_bytes = limit_bytes(memory_max_kib)
        elif 0 <= facts.sealed_bytes != os.fstat(image).st_size:
            raise records.cut_off(facts, os.fstat(image).st_size)
        guest = records.Guest(facts.memory_max_kib, facts.vcpus, hvm=hvm)
        if facts.sealed_bytes >= 0:
            found.sum_from(facts.streams_at)
        for _ in records.pieces(found.read, facts.stream_at, guest):
            pass
        records.rest(found.read, guest, lambda content: imagefile.put(state, content))
        size, checksum = found.totals()
        if 0 <= facts.sealed_bytes != size:
            raise records.cut_off(facts, size)
        if facts.sealed_bytes >= 0 and checksum != facts.checksum:
            raise records.ImageError("the checksum of the image is another one: it is damaged")
    except OSError as error:
        raise records.ImageError(f"the image cannot be read: {error.strerror or error}") from error
    told = Image(facts.memory_max_kib, facts.vcpus, guest.xen_major, guest.xen_minor, facts.uuid)
    return told, facts.stream_at


def limit_bytes(memory_max_kib: int) -> int:
    """Return how much a compressed image of a guest of this size may unpack to."""
    return ROUNDS * (memory_max_kib << 10) + SLACK_BYTES


def feed(image: int, pipe: int, at: int, told: Image, *, hvm: bool = False) -> None:
    """Write the stream that begins at `at` into the pipe, each piece after it was checked."""
    found = source.of(image)
    if isinstance(found, source.Compressed):
        found.limit_bytes = limit_bytes(told.memory_max_kib)
    for piece in records.pieces(found.read, at, records.Guest(told.memory_max_kib, told.vcpus, hvm=hvm)):
        if isinstance(piece, bytes):
            imagefile.put(pipe, piece)
        else:
            found.move(pipe, *piece)
