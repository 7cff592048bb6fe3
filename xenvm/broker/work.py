# SPDX-License-Identifier: GPL-2.0-or-later
"""One job of the broker: what was asked, who works on it, until when, and what is answered when it fails."""

from __future__ import annotations

import os
import time

from xenvm.boundary.messages import Done, Failed, Fault
from xenvm.broker.plugging import Wanted
from xenvm.errors import XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.devices import Kind
    from xenvm.boundary.messages import Domain, Op
    from xenvm.broker.children import Child
    from xenvm.broker.plugging import Plugging

POSTPONED_LIMIT: Final = 16  # an honest supervisor asks for one thing after the other


class Change(Record):
    """A change of devices: what is to be plugged, or taken away; `timeout_s` is how long a guest may take.

    With `disc` only a disc in a CD drive is taken away.
    """

    wanted: Wanted = Wanted()
    gone: tuple[Kind, int] | None = None
    disc: bool = False
    force: bool = False
    timeout_s: int = 40


class Work:
    """The one running job: what was asked, who does it, until when."""

    def __init__(
        self, sequence: int, op: Op, builder: Child, deadline_s: float, change: Change, plugging: Plugging | None
    ) -> None:
        self.sequence = sequence
        self.op = op
        self.builder = builder
        self.deadline_s = deadline_s
        self.end = time.monotonic() + deadline_s
        self.result: Message | None = None
        self.change = change
        self.plugging = plugging
        self.created = False
        self.answer: Message | None = None
        """What to tell at the end instead of how it went: this only tidies up behind something that failed."""
        self.held: list[int] = []
        """Descriptors that came with the request; closed with the work."""

    def stop(self) -> None:
        """End everything that works on it; what it has opened is closed."""
        self.builder.end()
        if self.plugging:
            self.plugging.close(succeeded=isinstance(self.result, Done))
            self.plugging = None

    def close(self) -> None:
        """Close what came with the request."""
        for descriptor in self.held:
            os.close(descriptor)
        self.held.clear()


def ask_once(child: Child, message: Message, deadline_s: float) -> Done | Failed:
    """Ask a fresh helper for one thing, wait for the answer, end it; raise XenvmError when there is none in time."""
    try:
        child.channel.send(message)
        while (received := child.channel.receive(deadline_s=deadline_s)) is not None:
            for descriptor in received[1]:
                os.close(descriptor)
            if isinstance(received[0], Done | Failed):
                return received[0]
        child.end(grace_ms=1000)
        raise XenvmError(f"the {child.role} worker {child.how()} without an answer")
    finally:
        child.end(grace_ms=2000)


def failed(sequence: int, error: XenvmError, domain: Domain) -> Failed:
    """Return the answer to a request that ended in `error`; `domain` is what is known of it."""
    return Failed(sequence, Fault(int(error.code) or 1, error.message[:4000], error.hint[:1000]), domain)


def forget(postponed: list[tuple[Message, list[int]]]) -> None:
    """Drop requests whose supervisor is gone: to the next one their numbers mean something else."""
    while postponed:
        for descriptor in postponed.pop(0)[1]:
            os.close(descriptor)


def allow(times: list[float], per_minute: int) -> bool:
    """Tell whether the last minute had fewer than `per_minute` events, and count one more then."""
    now = time.monotonic()
    while times and times[0] < now - 60:
        times.pop(0)
    if len(times) >= per_minute:
        return False
    times.append(now)
    return True
