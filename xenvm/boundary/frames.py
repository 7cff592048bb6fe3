# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames between the processes of one monitor: one message per SOCK_SEQPACKET datagram, descriptors beside it.

A frame is a 12-byte header (magic, version, kind, descriptor count, body length) and a JSON body of at most 64 KiB.
SOCK_SEQPACKET keeps frames apart, so a short, long or merged frame is visible as such and descriptors cannot move to
a neighbour. Whatever does not fit ends the connection with ProtocolError.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import os
import select
import struct
import time

from xenvm import jsontext
from xenvm.boundary.messages import KINDS
from xenvm.errors import ProtocolError, TimeoutExpiredError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Final

    from xenvm.boundary.checks import Message

MAGIC: Final = b"XVMF"
VERSION: Final = 1
HEADER: Final = struct.Struct(">4sBBHI")
BODY_LIMIT_BYTES: Final = 64 * 1024
DESCRIPTOR_LIMIT: Final = 64
SAID_LIMIT: Final = 16  # an honest peer has said all with two or three
_INT: Final = struct.Struct("@i")


def encode(message: Message, descriptor_count: int = 0) -> bytes:
    """Return the frame of `message`; raise ProtocolError when it would be larger than a peer may accept."""
    body = jsontext.dumps(message.as_body()).encode("ascii")
    if len(body) > BODY_LIMIT_BYTES:
        raise ProtocolError(f"{type(message).__name__}: {len(body)} bytes, the limit is {BODY_LIMIT_BYTES}")
    return HEADER.pack(MAGIC, VERSION, message.KIND, descriptor_count, len(body)) + body


def decode(untrusted_frame: bytes, descriptor_count: int = 0) -> Message:
    """Return the message in one frame; raise ProtocolError for every frame that no honest peer sends."""
    if len(untrusted_frame) < HEADER.size:
        raise ProtocolError("frame shorter than its header")
    magic, version, kind, announced, length = HEADER.unpack_from(untrusted_frame)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError("not a frame of this version")
    if length > BODY_LIMIT_BYTES or length != len(untrusted_frame) - HEADER.size:
        raise ProtocolError("frame length does not match its header")
    message_type = KINDS.get(kind)
    if message_type is None:
        raise ProtocolError(f"unknown message kind {kind}")
    if announced != descriptor_count or descriptor_count > message_type.DESCRIPTORS:
        raise ProtocolError(f"{message_type.__name__}: {descriptor_count} descriptors")
    try:
        untrusted_body = jsontext.loads(untrusted_frame[HEADER.size :].decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{message_type.__name__}: body is not JSON") from error
    return message_type.from_body(untrusted_body)


class Channel:
    """One end of a connection between two processes of a monitor.

    Descriptors that arrive belong to the receiver of the message; those that are sent stay the sender's.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    @classmethod
    def from_descriptor(cls, descriptor: int) -> Channel:
        """Take over an inherited socket descriptor."""
        return cls(socket.socket(fileno=descriptor))

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return two connected channels; neither survives an exec unless passed on by number."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; twice is harmless."""
        self._socket.close()

    def send(self, message: Message, descriptors: Iterable[int] = (), *, deadline_s: float = 10.0) -> None:
        """Send one message; raise TimeoutExpiredError when the peer does not take it within `deadline_s` seconds.

        A vanished peer raises ProtocolError.
        """
        passed = list(descriptors)
        frame = encode(message, len(passed))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"@{len(passed)}i", *passed))] if passed else []
        end = time.monotonic() + deadline_s
        while True:
            try:
                self._socket.sendmsg([frame], rights)
            except BlockingIOError:
                self._wait(select.POLLOUT, end, deadline_s)
            except OSError as error:
                raise ProtocolError(f"peer is gone: {error.strerror}") from error
            else:
                return

    def receive(self, *, deadline_s: float) -> tuple[Message, list[int]] | None:
        """Return the next message with its descriptors, or None when the peer has closed.

        Raise TimeoutExpiredError after `deadline_s` seconds, ProtocolError for a bad frame (its descriptors are
        closed).
        """
        end = time.monotonic() + deadline_s
        while True:
            try:
                return self.receive_now()
            except BlockingIOError:
                self._wait(select.POLLIN, end, deadline_s)

    def receive_now(self) -> tuple[Message, list[int]] | None:
        """Like receive, but raise BlockingIOError at once when nothing has arrived."""
        try:
            untrusted_frame, ancillary, flags = self._receive_frame()
        except ConnectionResetError:  # it left something of ours unread, said once; what it had sent is still there
            untrusted_frame, ancillary, flags = self._receive_frame()
        descriptors = [
            number
            for level, kind, data in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for (number,) in _INT.iter_unpack(data[: len(data) // _INT.size * _INT.size])
        ]
        try:
            if not untrusted_frame and not descriptors:
                return None
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("frame or descriptor list too long")  # noqa: TRY301 - its descriptors are closed below
            message = decode(untrusted_frame, len(descriptors))
        except ProtocolError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return message, descriptors

    def said(self) -> Iterator[Message]:
        """Give the messages that have arrived, as far as they are in order, and not too many; closes descriptors."""
        for _ in range(SAID_LIMIT):
            try:
                received = self.receive_now()
            except (BlockingIOError, ProtocolError):
                return
            if received is None:
                return
            for descriptor in received[1]:
                os.close(descriptor)
            yield received[0]

    def _receive_frame(self) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        # Not socket.recv_fds: in Python 3.11 it drops its flags, and the descriptors would be inheritable.
        untrusted_frame, ancillary, flags, _ = self._socket.recvmsg(
            HEADER.size + BODY_LIMIT_BYTES, socket.CMSG_LEN(DESCRIPTOR_LIMIT * _INT.size), socket.MSG_CMSG_CLOEXEC
        )
        return untrusted_frame, ancillary, flags

    def _wait(self, events: int, end: float, deadline_s: float) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        left_ms = (end - time.monotonic()) * 1000
        if left_ms <= 0 or not poll.poll(left_ms):
            raise TimeoutExpiredError(f"no answer within {deadline_s:g} s")
