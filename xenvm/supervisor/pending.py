# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor remembers of commands that are not answered yet."""

from __future__ import annotations

import time

from xenvm.boundary.messages import Ask, Op
from xenvm.errors import BusyError, ExitCode, XenvmError
from xenvm.record import Record
from xenvm.supervisor.states import ALIVE, ENDED, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from xenvm.boundary.messages import Fault, Unplug
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
PIECE_S: Final = 10  # for which a guest is asked for a device at a time
LOOK_FIRST_S: Final = 1.0  # a look that is due so soon goes before the next one


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


class Errand:
    """A command beside that one, while the broker is at it: about devices, the console, the config file.

    `changes` is of those that change devices. A device is taken away (`unplug`) piece by piece, so that the guest can
    be looked at in between. `client` is None once it has gone.
    """

    __slots__ = ("changes", "client", "identifier", "last", "name", "pieces", "since_s", "unplug")

    def __init__(self, name: str, client: Client, identifier: object, *, changes: bool = False) -> None:
        self.name, self.identifier, self.changes = name, identifier, changes
        self.client: Client | None = client
        self.since_s = time.monotonic()
        self.unplug: Unplug | None = None
        self.pieces, self.last = 0, True

    def request(self, sequence: int) -> tuple[Op, Ask | Unplug]:
        """Return what to ask next: for the device, for as long as is left but not too long; by force at last.

        When it has gone, how the others are.
        """
        if self.unplug is None:
            return Op.DEVICES, Ask(sequence, Op.DEVICES, "", 0)
        left_s = self.unplug.timeout_s - (time.monotonic() - self.since_s)
        self.pieces, self.last = self.pieces + 1, left_s < PIECE_S + 1
        patience_s = max(1, round(left_s)) if self.last else PIECE_S
        force = self.unplug.force and self.last
        return Op.UNPLUG, self.unplug.but(sequence=sequence, timeout_s=patience_s, force=force)

    def again(self, fault: Fault) -> bool:
        """Tell whether to ask once more after what went wrong."""
        if self.unplug and self.pieces > 1 and fault.code == ExitCode.WRONG_STATE:
            self.unplug, self.last = None, True  # let go between two pieces; what was left has been removed
            return True
        return not self.last and fault.code == ExitCode.TIMED_OUT

    def in_all(self, fault: Fault) -> Fault:
        """Return what went wrong with the last piece, as that of the whole."""
        if not self.unplug or self.pieces == 1 or fault.code != ExitCode.TIMED_OUT:
            return fault
        return fault.but(message=f"{fault.message} (of {self.unplug.timeout_s} s in all)")


def check_free(name: str, busy: Operation | Errand | None) -> None:
    """Raise BusyError for a command that has to wait for another one."""
    if busy:
        raise BusyError(
            f"{name}: busy with {busy.name} for {time.monotonic() - busy.since_s:.1f} s", hint="wait for it, or destroy"
        )


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
