# SPDX-License-Identifier: GPL-2.0-or-later
"""One job of the broker: what was asked, who works on it, until when."""

from __future__ import annotations

import os
import time

from xenvm.boundary.messages import Done
from xenvm.broker.plugging import Wanted
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.checks import Message
    from xenvm.boundary.devices import Kind
    from xenvm.boundary.messages import Op
    from xenvm.broker.children import Child
    from xenvm.broker.plugging import Plugging


class Change(Record):
    """A change of devices: what is to be plugged, or taken away; `timeout_s` is how long a guest may take."""

    wanted: Wanted = Wanted()
    gone: tuple[Kind, int] | None = None
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
