# SPDX-License-Identifier: GPL-2.0-or-later
"""Helpers that are started before they are needed: confined and waiting, each still serves one request."""

from __future__ import annotations

import time

from xenvm.boundary.messages import Failed
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.broker.phases import ON_DEVICES, REBUILDING, SELDOM_FOLLOWED
from xenvm.context import suppress
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.broker.work import Work

SPARE_S: Final = 60.0  # how long one waits for the next command: they come in bursts


class Spares(dict["Role", Child]):
    """The helpers that wait, at most one of each role."""

    def __init__(self, log: int, uuid: str) -> None:
        super().__init__()
        self._log, self._uuid = log, uuid
        self.end_s = 0.0
        """When those that are left end (monotonic); 0: not by time."""

    @property
    def greeting(self) -> list[Child]:
        """Those to listen to: after a command they greet; what the first one says is read with its job."""
        return [*self.values()] if self.end_s else []

    @property
    def due_s(self) -> list[float]:
        """Return when something has to be done, if at all."""
        return [self.end_s] if self and self.end_s else []

    def take(self, role: Role) -> Child:
        """Return the process for a job: the one that waits ready, or a fresh one."""
        child = self.pop(role, None)
        if child is not None and not child.ended():
            return child
        if child is not None:
            child.end()
        return Child(role, self._log, {}, self._uuid)

    def make_ready(self, role: Role) -> None:
        """Have one of this role wait for the next command; none where the host lacks what that takes just now."""
        if role not in self:
            with suppress(XenvmError):
                self[role] = Child(role, self._log, {}, self._uuid)
        self.end_s = time.monotonic() + SPARE_S

    def follow(self, work: Work, message: Message) -> None:
        """Have helpers wait for the command that may follow a job; `message` is how that one ended."""
        seldom = SELDOM_FOLLOWED | (REBUILDING if isinstance(message, Failed) else set())
        if work.op not in seldom:
            self.make_ready(work.builder.role)
            if work.change.wanted.vifs and work.op in ON_DEVICES:
                self.make_ready(Role.NETWORK)

    def drop(self, child: Child) -> None:
        """Forget one that has ended, if it is one of these."""
        if self.get(child.role) is child:
            del self[child.role]
            child.end()

    def expire(self) -> None:
        """End those whose time is over."""
        if self.due_s and time.monotonic() >= self.end_s:
            self.end()

    def end(self) -> None:
        """End all."""
        for child in self.values():
            child.end()
        self.clear()
