# SPDX-License-Identifier: GPL-2.0-or-later
"""What a builder gets to load into a domain, made ready by unpackers: the base of kernels and firmware."""

from __future__ import annotations

from abc import ABC, abstractmethod

from xenvm.boundary.messages import NO_DOMAIN, Failed, Fault
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import ClassVar

    from xenvm.boundary.checks import Message

    Step = Generator[Child, Message, int]
    Steps = Generator[Child, Message, list[int]]


class Making(ABC):
    """Something being made ready; `child` is the worker that is waited for, `ready` what is there then, open."""

    WHAT: ClassVar[str]

    def __init__(self, uuid: str, log: int) -> None:
        """Begin; raise XenvmError when it cannot be."""
        self._uuid, self._log = uuid, log
        self.end_s = 0.0
        self.child: Child | None = None
        self.ready: list[int] = []
        self._steps = self._prepare()
        try:
            self._go_on(None)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _prepare(self) -> Steps:
        """Make it; each worker that works on it is yielded, what is ready in the end is returned."""

    @abstractmethod
    def _forget(self) -> None:
        """Close everything that is open. Works twice."""

    @property
    def children(self) -> list[Child]:
        """The worker, while there is one."""
        return [self.child] if self.child and self.child.pidfd >= 0 else []

    def take(self, message: Message) -> None:
        """Go on with a worker's answer; raise XenvmError when it failed."""
        if self.child:
            self.child.end(grace_ms=1000)
            if self.child.status is None:  # it hangs in the kernel, over the disk: it may still write
                raise XenvmError(
                    f"{self.WHAT}: the unpacker does not end", hint="is the disk of /var/cache/xenvm well?"
                )
        self._go_on(message)

    def gone(self) -> None:
        """Go on without the worker's answer: where the disk is full, it may have died of that."""
        if self.child:
            self.child.end()
            fault = Fault(
                int(ExitCode.FAILED), f"the {self.child.role} worker {self.child.how()} without an answer", ""
            )
            self._go_on(Failed(0, fault, NO_DOMAIN))

    def keep(self) -> bool:
        """After the start: begin to keep it for the next one; tell whether there is anything to do."""
        return False

    def kept(self, message: Message) -> None:
        """Go on with what `keep` began; without success the next start does it all again."""
        with suppress(XenvmError):
            self.take(message)
        self.close()

    def close(self) -> None:
        """End the worker and close what is open; works twice."""
        if self.child:
            self.child.end()
            self.child = None
        self._steps.close()
        self.ready = []
        self._forget()

    def _go_on(self, answer: Message | None) -> None:
        self.child = None
        try:
            self.child = self._steps.send(answer) if answer else next(self._steps)
        except StopIteration as result:
            self.ready = result.value
        except OSError as error:
            raise XenvmError(f"{self.WHAT}: {error.strerror or error}") from error

    def _ask(self, message: Message, *descriptors: int) -> Child:
        """Start the unpacker for this; it loads what only that takes."""
        child = Child(Role.UNPACKER, self._log, {}, self._uuid, type(message).__name__.lower())
        with suppress(ProtocolError):  # it has ended already: what it said of that comes next
            child.channel.send(message, descriptors)
        return child
