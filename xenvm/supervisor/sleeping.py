# SPDX-License-Identifier: GPL-2.0-or-later
"""The sleep of an HVM guest (ACPI S3): asking for it, ending it, and telling Xen what its device model has told.

A guest goes to sleep through the device model, and one with Xen's whole power would tell Xen itself. Ours has none:
it says so over QMP, and the builder does it. The same when it wakes the guest, be it for a key pressed on its screen.
"""

from __future__ import annotations

import time
from abc import abstractmethod

from xenvm.boundary.messages import Done, Fault, Op
from xenvm.errors import ExitCode, WrongStateError
from xenvm.supervisor import answers, commands
from xenvm.supervisor.desk import Desk
from xenvm.supervisor.model import Model, Step
from xenvm.supervisor.pending import Operation, check_free
from xenvm.supervisor.states import ALIVE, ENDED, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket as socket
    from typing import Final

    from xenvm.boundary.messages import Failed, Init
    from xenvm.errors import XenvmError
    from xenvm.supervisor.control import Client, Request
    from xenvm.supervisor.machine import Vm
    from xenvm.supervisor.pending import Errand

SUSPEND, RESUME = "s3suspend", "s3resume"
COMMANDS: Final = (SUSPEND, RESUME)
ASLEEP: Final = "3"
SLEEP_WAIT_S: Final = 30.0
PAUSE_S: Final = 1.0  # between two things done since a device model, which may be hostile, has told something
WAKING: Final = (Step("system_wakeup", {}, may_fail=True), Step("query-status", {}))
"""It refuses the first when it does not know that the guest sleeps; when it answers the second, the first is done."""


class Sleeping(Desk):
    """What a supervisor does about sleep: between its clients and all else."""

    _vm: Vm
    _asked: tuple[int, Op] | None

    def __init__(self, listener: socket.socket, init: Init) -> None:
        super().__init__(listener, init)
        self._model = Model()
        self._followed_s = 0.0  # when Xen was last asked to do as the device model has told

    @abstractmethod
    def _ask(self, op: Op, age_ms: int = -1) -> None:
        """Send a request, or keep it until the broker is free."""

    @abstractmethod
    def _finish(self, operation: Operation) -> None:
        """Answer the command that has run, with the fault of the VM if there is one."""

    @abstractmethod
    def _wait_for_broker(self, client: Client, request: Request) -> bool:
        """Put a command off while the broker is at something."""

    @property
    @abstractmethod
    def _busy(self) -> Operation | Errand | None:
        """The command that changes the VM or its devices just now."""

    def _status(self) -> dict[str, object]:
        return answers.status(self._init, self._vm, self._busy, self._step)

    def _answer(self, operation: Operation, error: XenvmError | None, overtaken: XenvmError | None = None) -> None:
        """Tell its client how a command has ended, and those who cancelled it that it has, or what came before that."""
        for client, identifier in operation.cancelled_by:
            self._answer_one(client, identifier, overtaken, {})
        self._answer_one(operation.client, operation.identifier, error, operation.told)

    def _answer_one(
        self, client: Client | None, identifier: object, error: XenvmError | None, told: dict[str, object]
    ) -> None:
        if client is None or client.fileno() < 0:
            return
        if error:
            client.refuse(identifier, error)
        else:
            client.reply(identifier, "", self._status() | told)
        self._serve(client)

    def do_sleep(self, client: Client, request: Request) -> None:
        """Begin s3suspend or s3resume."""
        name = RESUME if request.method == "trigger" else request.method
        if not answers.is_hvm(self._init):
            raise WrongStateError(f"{name}: a PV guest has no ACPI")
        limit_s = commands.seconds(request.params, "timeout", SLEEP_WAIT_S)
        if self._vm.state is not State.RUNNING:
            raise WrongStateError(f"{name}: the VM is {self._vm.state}")
        check_free(name, self._busy)
        if self._wait_for_broker(client, request):
            return
        now_s = time.monotonic()
        self._operation = Operation(name, client, request.identifier, now_s)
        self._vm = self._vm.but(fault=None)
        if name == SUSPEND:
            self._operation.deadline_s = now_s + limit_s
        self._ask(Op.ASK_SLEEP if name == SUSPEND else Op.S_STATE)

    def _oversleep(self, fault: Fault) -> None:
        """Take the request to sleep back, whose time is over; the answer follows that."""
        if self._vm.state is State.RUNNING:  # else the guest has ended instead, and that ends the command
            self._vm = self._vm.but(fault=fault)
            self._ask(Op.WITHDRAW)

    def _take_back(self, operation: Operation) -> None:
        """Take a request to sleep back that has failed otherwise and may be there: the guest would obey it later."""
        refused = self._vm.fault and self._vm.fault.code == ExitCode.WRONG_STATE
        if operation.name == SUSPEND and operation.deadline_s and self._vm.state in ALIVE and not refused:
            self._ask(Op.WITHDRAW)

    def _of_sleep(self, op: Op, message: Done | Failed) -> None:
        """Go on with a command about sleep, or end it; one whose request has failed has ended with that."""
        operation = self._operation
        if operation is None or not isinstance(message, Done) or self._vm.state not in ALIVE:
            return
        step = (operation.name, op)
        if step in ((SUSPEND, Op.FALL_ASLEEP), (RESUME, Op.WAKE)):
            self._operation = None
            self._answer(operation, None)
        elif step == (SUSPEND, Op.WITHDRAW):
            self._finish(operation)
        elif step == (RESUME, Op.S_STATE) and message.text == ASLEEP:
            self._wake_model(operation)
        elif step == (RESUME, Op.S_STATE):
            self._fail(operation, WrongStateError(f"{RESUME}: the guest does not sleep"))

    def _wake_model(self, operation: Operation) -> None:
        """Have the device model wake the guest: it resets its devices, and only then the guest may run."""

        def finish(error: XenvmError | None) -> None:
            if self._operation is not operation:  # the guest is awake already, or its domain gone
                return
            if error:
                self._fail(operation, error)
                return
            self._model.sleeps = None
            if self._asked is None or self._asked[1] is not Op.WAKE:  # for what it has told before it answered
                self._ask(Op.WAKE)

        try:
            self._model.begin(RESUME, [*WAKING], finish)
        except WrongStateError as error:
            self._fail(operation, error)

    def _fail(self, operation: Operation, error: XenvmError) -> None:
        self._vm = self._vm.but(fault=Fault(int(error.code), error.message, error.hint))
        self._finish(operation)

    @property
    def _follows_s(self) -> float:
        """When Xen is to be asked to do as the device model has told, 0 for never."""
        due = self._model.sleeps is not None and self._asked is None
        return max(self._followed_s + PAUSE_S, 1.0) if due else 0.0

    def _follow(self, now_s: float) -> None:
        """Have the domain sleep, or wake, as its device model has told; of many such words the last one counts."""
        if not self._follows_s or now_s < self._follows_s:
            return
        asleep, self._model.sleeps, self._followed_s = self._model.sleeps, None, now_s
        if self._vm.state not in ENDED:
            self._ask(Op.FALL_ASLEEP if asleep else Op.WAKE)
