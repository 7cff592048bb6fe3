# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor remembers of commands that are not answered yet."""

from __future__ import annotations

from xenvm.errors import ExitCode, XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.messages import Fault
    from xenvm.supervisor.control import Client
    from xenvm.supervisor.states import State


class Operation:
    """The one command that is changing the VM. `deadline_s` is when the guest has ignored a request; 0: never."""

    __slots__ = ("client", "deadline_s", "force", "identifier", "name", "since_s")

    def __init__(self, name: str, client: Client | None, identifier: object, since_s: float) -> None:
        self.name, self.client, self.identifier, self.since_s = name, client, identifier, since_s
        self.deadline_s = 0.0
        self.force = False


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
