# SPDX-License-Identifier: GPL-2.0-or-later
"""The supervisor's end of the device model's QMP: every byte may be hostile.

Nothing of it decides about the VM, but that its guest sleeps or is awake.

What a client asks of it has a deadline. A device model that breaks the protocol loses the connection, no more: whether
it lives is the broker's to see.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import os
import time

from xenvm.boundary.qmp import READ_BYTES, Parser, QmpError, request, rights
from xenvm.errors import TimeoutExpiredError, WrongStateError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from xenvm.errors import XenvmError

ANSWER_WAIT_S: Final = 10.0
FLOOD_BYTES: Final = 1 << 20
FLOOD_S: Final = 10.0
"""More bytes than that in this time are no conversation: an honest one says a few hundred in its life."""


class Step(Record):
    """One command of a sequence; `descriptor` -1: none travels along. `may_fail`: its refusal does not end it."""

    command: str
    arguments: dict[str, object]
    descriptor: int = -1
    may_fail: bool = False


LOOK: Final = Step("query-status", {})
SUSPENDED: Final = "suspended"
SLEEP_EVENTS: Final = {"SUSPEND": True, "WAKEUP": False}


class Sequence:
    """Commands that belong together, one after the other, and who is told how that went."""

    def __init__(self, name: str, steps: list[Step], finish: Callable[[XenvmError | None], None]) -> None:
        self.name, self.steps, self.finish = name, list(steps), finish
        self.end = time.monotonic() + ANSWER_WAIT_S

    def close(self) -> None:
        """Close the descriptors that did not travel."""
        for step in self.steps:
            if step.descriptor >= 0:
                os.close(step.descriptor)
        self.steps.clear()


class Model:
    """The device model as the supervisor knows it."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._parser = Parser()
        self._identifier = 0
        self._asked: Step | None = None
        self._ready = False
        self._flood_end, self._flood = 0.0, 0
        self._sequence: Sequence | None = None
        self.vnc_port = 0
        self.sleeps: bool | None = None
        """What it has last told of the guest's sleep, until somebody has taken note of it."""

    def fileno(self) -> int:
        """Return the descriptor for epoll, -1 without a connection."""
        return self._socket.fileno() if self._socket else -1

    def adopt(self, descriptor: int, vnc_port: int) -> bool:
        """Take a connection instead of the one before (-1: there is no device model); tell whether there is one."""
        self.drop("the device model was replaced")
        self.vnc_port = vnc_port
        if descriptor >= 0:
            self._socket = socket.socket(fileno=descriptor)
            self._socket.setblocking(False)
            self._parser, self._ready, self.sleeps = Parser(), False, None
        return descriptor >= 0

    def drop(self, why: str) -> None:
        """Close the connection; who waits for an answer hears why."""
        if self._socket:
            self._socket.close()
            self._socket = None
        self._asked = None
        self._end(WrongStateError(f"the device model does not answer: {why}"))

    @property
    def due(self) -> float:
        """When whoever waits has waited long enough, 0 when nobody does."""
        return self._sequence.end if self._sequence else 0.0

    def expire(self, now_s: float) -> None:
        """Give up on an answer that does not come, and with it on the connection: it could come later."""
        if self._sequence and now_s >= self._sequence.end:
            name = self._sequence.name
            self._end(TimeoutExpiredError(f"{name}: the device model did not answer within {ANSWER_WAIT_S:g} s"))
            self.drop("an earlier answer never came")

    def begin(self, name: str, steps: list[Step], finish: Callable[[XenvmError | None], None]) -> None:
        """Begin a sequence; `finish` is called with None or the error. Raise WrongStateError when it cannot be."""
        if not self._socket or self._sequence:
            for step in steps:
                if step.descriptor >= 0:
                    os.close(step.descriptor)
            why = "it is busy with another command" if self._sequence else "it does not run, or is not to be talked to"
            raise WrongStateError(f"{name}: no answer from the device model: {why}")
        self._sequence = Sequence(name, steps, finish)
        self._next()

    def read(self) -> None:
        """Take what has arrived; a peer that does not keep to the protocol is dropped."""
        if not self._socket:
            return
        try:
            untrusted = self._socket.recv(READ_BYTES)
            if not untrusted:
                self.drop("it has ended")
                return
            self._count(len(untrusted))
            self._parser.feed(untrusted)
        except BlockingIOError:
            return
        except (OSError, QmpError) as error:
            self.drop(str(error))
            return
        for event in self._parser.events:
            self.sleeps = SLEEP_EVENTS.get(event, self.sleeps)
        self._parser.events.clear()
        if self._parser.greeted and not self._ready and self._asked is None:
            self._send(Step("qmp_capabilities", {}))
        while self._parser.replies and self._socket:
            reply = self._parser.replies.pop(0)
            asked, self._asked = self._asked, None
            if asked is None or reply.identifier != self._identifier:
                self.drop("it answers what it was not asked")
                return
            if not self._ready:
                self._ready = not reply.error
                self._look()
            elif asked is LOOK:
                self._note(reply.value)
            elif reply.error and not asked.may_fail:
                self._end(WrongStateError(f"the device model refuses {asked.command}: {reply.error}"))
            self._next()

    def _look(self) -> None:
        """Ask how it is: what it tells of the guest's sleep is heard by those only who listen just then."""
        if self._ready:
            self._send(LOOK)

    def _note(self, untrusted: object) -> None:
        if self.sleeps is None and isinstance(untrusted, dict) and untrusted.get("status") == SUSPENDED:
            self.sleeps = True

    def _count(self, size: int) -> None:
        """Raise QmpError when the peer sends so much that reading it would be all that this process does."""
        now_s = time.monotonic()
        if now_s >= self._flood_end:
            self._flood_end, self._flood = now_s + FLOOD_S, 0
        self._flood += size
        if self._flood > FLOOD_BYTES:
            raise QmpError(f"it sent more than {FLOOD_BYTES} bytes within {FLOOD_S:g} s")

    def _next(self) -> None:
        if not self._ready or self._asked is not None or not self._sequence:
            return
        if self._sequence.steps:
            self._send(self._sequence.steps.pop(0))
        else:
            self._end(None)

    def _send(self, step: Step) -> None:
        if not self._socket:
            return
        self._identifier += 1
        line = request(self._identifier, step.command, step.arguments)
        passed = [step.descriptor] if step.descriptor >= 0 else []
        try:
            self._socket.sendmsg([line], rights(passed), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self._asked = step
        except OSError as error:
            self.drop(str(error))
        finally:
            for descriptor in passed:
                os.close(descriptor)

    def _end(self, error: XenvmError | None) -> None:
        sequence, self._sequence = self._sequence, None
        if sequence:
            sequence.close()
            sequence.finish(error)
