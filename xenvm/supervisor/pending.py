# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor remembers of commands that are not answered yet."""

from __future__ import annotations

from xenvm.errors import ExitCode, XenvmError
from xenvm.record import Record
from xenvm.supervisor.states import ALIVE, ENDED, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from xenvm.boundary.messages import Fault
    from xenvm.supervisor.control import Client

GOALS: Final[Mapping[str, frozenset[State]]] = {
    "start": ALIVE,
    "pause": frozenset({State.PAUSED}),
    "unpause": frozenset({State.RUNNING}),
    "shutdown": ENDED | ALIVE,  # on_halt = reboot brings it back
    "restart": ALIVE,
    "destroy": frozenset({State.SHUTDOWN}),
    "suspend": frozenset({State.SUSPENDED}),
    "checkpoint": ALIVE,
    "restore": ALIVE,
    "s3suspend": frozenset(),  # neither of these two: what they are for is no state of the VM
    "s3resume": frozenset(),
}
"""The states in which a command has done what it was given for."""


class Operation:
    """The one command that is changing the VM. `deadline_s` is when the guest has ignored a request; 0: never.

    A suspend whose image is whole waits until `commit_due_s` (0: it does not) for its `owner` to confirm. `told` is
    what the reply says beside the status; `cancelled_by` are those who want to hear when it has ended.
    """

    __slots__ = (
        *("cancelled_by", "client", "commit_due_s", "deadline_s", "force", "identifier", "name", "owner", "since_s"),
        "told",
    )

    def __init__(self, name: str, client: Client | None, identifier: object, since_s: float) -> None:
        self.name, self.client, self.identifier, self.since_s = name, client, identifier, since_s
        self.deadline_s = 0.0
        self.force = False
        self.commit_due_s = 0.0
        self.owner: Client | None = None
        self.told: dict[str, object] = {}
        self.cancelled_by: list[tuple[Client, object]] = []

    @property
    def due_s(self) -> list[float]:
        """When something has to be done about it."""
        return [at for at in (self.deadline_s, self.commit_due_s) if at]


class Waiter(Record):
    """A client that waits for a state."""

    client: Client
    identifier: object
    state: State
    timeout_s: float
    end: float


def error_of(fault: Fault) -> XenvmError:
    """Return what a client is told of a fault."""
    return XenvmError(fault.message, hint=fault.hint, code=ExitCode(fault.code))
