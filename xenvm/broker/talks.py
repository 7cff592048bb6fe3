# SPDX-License-Identifier: GPL-2.0-or-later
"""What a save or a resume asks of the device model: passed on to a process that talks to it, and its answers back.

The state that the device model says goes into a file in memory: the qmp worker gets a descriptor to write to, which it
hands on to the device model, the builder one to read.
"""

from __future__ import annotations

import os
import time

from xenvm.boundary.machine import Attach, Granted, Wished
from xenvm.boundary.messages import NO_DOMAIN, Failed, Fault
from xenvm.boundary.privileges import Role
from xenvm.broker import host
from xenvm.broker.children import Child
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, TimeoutExpiredError, WrongStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.checks import Message
    from xenvm.broker.models import Models


def state_file() -> int:
    """Return an empty file in memory for the state of a device model; nobody else can find it."""
    return os.memfd_create("device-model-state", os.MFD_CLOEXEC)


class Talk:
    """One qmp worker. `state` is what the builder reads of the state, -1 without one."""

    def __init__(self, uuid: str, log: int, models: Models, *, saves: bool) -> None:
        """Start it; raise WrongStateError when there is no device model to talk to."""
        connection = models.connect(for_saving=True)
        if not connection:
            raise WrongStateError("device model: it does not run, or does not let itself be talked to")
        self.state = -1
        self.asked = False
        passed = list(connection)
        try:
            if saves:
                self.state = state_file()
                passed.append(os.open(f"/proc/self/fd/{self.state}", os.O_WRONLY | os.O_CLOEXEC))
            self.child = Child(Role.QMP, log, {}, uuid)
            with suppress(ProtocolError):  # it has ended already: what it said of that comes next
                self.child.channel.send(Attach(), tuple(passed))
        except BaseException:
            if self.state >= 0:
                os.close(self.state)
            raise
        finally:
            host.close_all(passed)

    def ask(self, wish: Wished) -> Message | None:
        """Pass a wish of the builder on; return the answer if there can be no other.

        A builder that has given up waiting has a next wish before the worker has answered: then that worker is ended,
        since its late answer could pass for one to the next wish.
        """
        if self.asked:
            self.child.end()
        self.asked = True
        if self.child.pidfd < 0:
            return self.gone()
        with suppress(ProtocolError):  # it has ended: its end is dealt with as such
            self.child.channel.send(wish)
        return None

    def take(self, message: Message) -> Message | None:
        """Return what the builder is to hear of an answer, if it has asked."""
        if not isinstance(message, Granted | Failed):
            message = _failed("the qmp worker has answered something that was not asked for")
        elif isinstance(message, Failed):
            message = message.but(domain=NO_DOMAIN)
        asked, self.asked = self.asked, False
        return message if asked else None

    def gone(self) -> Message | None:
        """Learn that it has ended; return what the builder is to hear of that, if it waits."""
        self.child.end()
        asked, self.asked = self.asked, False
        return _failed(f"device model: the qmp worker {self.child.how()} without an answer") if asked else None

    def answer(self, wish: Wished, end_s: float) -> Message:
        """Have a wish granted, and wait for that until `end_s` (monotonic)."""
        answer = self.ask(wish)
        if answer:
            return answer
        try:
            while (received := self.child.channel.receive(deadline_s=max(0.0, end_s - time.monotonic()))) is not None:
                host.close_all(received[1])
                if isinstance(received[0], Granted | Failed):
                    return self.take(received[0]) or received[0]
        except (ProtocolError, TimeoutExpiredError):
            self.child.end()
        return self.gone() or _failed("device model: it was not asked")

    def close(self) -> None:
        """End it; its files go. Works twice."""
        self.child.end()
        if self.state >= 0:
            os.close(self.state)
            self.state = -1


def _failed(message: str) -> Failed:
    return Failed(0, Fault(int(ExitCode.FAILED), message, ""), NO_DOMAIN)
