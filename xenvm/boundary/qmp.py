# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP, the device model's control protocol, towards a peer that may be hostile.

Whatever the peer sends is bounded: a line in length, what is kept in number, an answer in time. What is not understood
is a QmpError, after which the connection is of no more use.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import struct
import time

from xenvm import jsontext
from xenvm.errors import XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Final

LINE_LIMIT_BYTES: Final = 256 * 1024  # the longest honest answer, of query-qmp-schema, is never asked for
READ_BYTES: Final = 64 * 1024
LINES_LIMIT: Final = 256  # lines of one read that are looked at; more of them are no conversation
WORD_LIMIT: Final = 64
EVENTS_LIMIT: Final = 64


class QmpError(XenvmError):
    """The peer has ended, broken the protocol, or refused a command."""


class Reply(Record):
    """What a command led to: `value` of a success, or `error` in the peer's words, bounded and printable."""

    identifier: int
    value: object
    error: str


class Parser:
    """Bytes in, replies and names of events out. No input or output of its own."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.greeted = False
        self.replies: list[Reply] = []
        self.events: list[str] = []

    def feed(self, untrusted: bytes) -> None:
        """Take bytes of the peer; raise QmpError when it does not keep to the protocol."""
        self._buffer += untrusted
        for _ in range(LINES_LIMIT):
            end = self._buffer.find(b"\n")
            if end < 0:
                break
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if line.strip():
                self._take(line)
        else:
            raise QmpError(f"the device model sends more than {LINES_LIMIT} lines at once")
        if len(self._buffer) > LINE_LIMIT_BYTES:
            raise QmpError(f"the device model sends a line of more than {LINE_LIMIT_BYTES} bytes")

    def _take(self, untrusted_line: bytes) -> None:
        if len(untrusted_line) > LINE_LIMIT_BYTES:
            raise QmpError(f"the device model sends a line of more than {LINE_LIMIT_BYTES} bytes")
        try:
            untrusted = jsontext.loads(untrusted_line.decode("utf-8"))
        except (ValueError, RecursionError):
            raise QmpError("the device model sends what is not JSON") from None
        if not isinstance(untrusted, dict):
            raise QmpError("the device model sends what is no object")
        if not self.greeted:
            if not isinstance(untrusted.get("QMP"), dict):
                raise QmpError("the device model does not greet")
            self.greeted = True
        elif "event" in untrusted:
            self.events = [*self.events, shown(untrusted["event"])][-EVENTS_LIMIT:]
        elif "return" in untrusted or "error" in untrusted:
            self._reply(untrusted)
        else:
            raise QmpError("the device model sends neither an event nor an answer")

    def _reply(self, untrusted: Mapping[str, object]) -> None:
        identifier = untrusted.get("id")
        if type(identifier) is not int or len(self.replies) >= EVENTS_LIMIT:
            raise QmpError("the device model answers what it was not asked")
        fault = untrusted.get("error")
        text = ""
        if "error" in untrusted:
            text = shown(fault.get("desc") if isinstance(fault, dict) else "", 400) or "refused without a reason"
        self.replies.append(Reply(identifier, untrusted.get("return"), text))


def request(identifier: int, command: str, arguments: Mapping[str, object]) -> bytes:
    """Return the line that asks for a command."""
    body: dict[str, object] = {"execute": command, "id": identifier}
    if arguments:
        body["arguments"] = dict(arguments)
    return jsontext.dumps(body).encode("ascii") + b"\n"


def rights(descriptors: Iterable[int]) -> list[tuple[int, int, bytes]]:
    """Return the ancillary data of a message that passes descriptors on, cmsg(3)."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", descriptor)) for descriptor in descriptors]


def shown(untrusted: object, limit: int = WORD_LIMIT) -> str:
    """Return a text of the peer fit to log: printable ASCII, bounded; "" for what is no text."""
    if not isinstance(untrusted, str):
        return ""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in untrusted[:limit])


class Conversation:
    """A conversation that waits for each answer. `end` is the deadline of all of it, and may be moved."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        self._socket, self.end = connection, end
        self._parser = Parser()
        self._identifier = 0

    def greet(self) -> None:
        """Wait for the greeting, and take up the conversation; raise QmpError, TimeoutError."""
        while not self._parser.greeted:
            self._read()
        self.ask("qmp_capabilities")

    def ask(
        self, command: str, arguments: Mapping[str, object] | None = None, descriptors: tuple[int, ...] = ()
    ) -> object:
        """Return what a command returns; raise QmpError with its refusal, TimeoutError at the deadline."""
        self._identifier += 1
        line = request(self._identifier, command, arguments or {})
        self._socket.settimeout(self._left())
        try:
            self._socket.sendmsg([line], rights(descriptors))
        except TimeoutError:
            raise
        except OSError as error:
            raise QmpError(f"the device model has ended: {error.strerror}") from error
        while True:
            while not self._parser.replies:
                self._read()
            reply = self._parser.replies.pop(0)
            if 0 < reply.identifier < self._identifier:  # what nobody waited for any more
                continue
            if reply.identifier != self._identifier:
                raise QmpError("the device model answers what it was not asked")
            if reply.error:
                raise QmpError(f"the device model refuses {command}: {reply.error}")
            return reply.value

    def _left(self) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _read(self) -> None:
        self._socket.settimeout(self._left())
        try:
            untrusted = self._socket.recv(READ_BYTES)
        except TimeoutError:
            raise
        except OSError as error:
            raise QmpError(f"the device model has ended: {error.strerror}") from error
        if not untrusted:
            raise QmpError("the device model has ended")
        self._parser.feed(untrusted)
