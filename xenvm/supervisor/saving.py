# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands about save images: files that come open with a request, and go on to the broker.

The image of a suspend is its client's to take over: the domain is ended when that says so, and else the guest runs on.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod

from xenvm.boundary.messages import Ask, Fault, Op
from xenvm.errors import ExitCode, UsageError, WrongStateError
from xenvm.supervisor import answers, commands, images
from xenvm.supervisor.machine import Happening, step
from xenvm.supervisor.pending import Operation, check_free
from xenvm.supervisor.sleeping import Sleeping
from xenvm.supervisor.states import Event

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.frames import Channel
    from xenvm.boundary.messages import Done
    from xenvm.supervisor.control import Client, Request
    from xenvm.supervisor.machine import Vm


class Saving(Sleeping):
    """What a supervisor does about save images: between its clients and all else."""

    _broker: Channel
    _sequence: int

    @abstractmethod
    def _happen(self, happening: Happening) -> None:
        """Take one step of the state machine."""

    @abstractmethod
    def _move(self, after: Vm, event: Event, op: Op | None = None) -> None:
        """Take on what a step has led to, and tell of a new state."""

    def do_image(self, client: Client, request: Request) -> None:
        """Begin a command about a save image: the file comes open with the request, and goes on to the broker."""
        name, now_s = commands.ALIASES.get(request.method, request.method), time.monotonic()
        check_free(name, self._busy)
        if self._wait_for_broker(client, request):
            return
        self._sequence += 1
        event, op, message = images.request(name, self._sequence, request.params, hvm=answers.is_hvm(self._init))
        after, _ = step(self._vm, Happening(event, now_s))  # raises before anything has changed
        handed = client.take_handed()
        try:
            if not client.modern:
                raise UsageError(f"{name}: the file comes as an open descriptor", hint="xenvm-cmd opens and sends it")
            known = (request.params, self._init.image_directories)
            self._broker.send(images.placed(name, message, len(handed), *known), handed)
        finally:
            for descriptor in handed:
                os.close(descriptor)
        self._asked = (self._sequence, op)
        self._operation = Operation(name, client, request.identifier, now_s)
        self._move(after, event)

    def _saved(self, message: Done) -> None:
        """Tell whoever asked that the image is whole; it gets its name before the domain goes (`commit`)."""
        self._happen(Happening(Event.SAVED, time.monotonic()))
        operation = self._operation
        if operation is None or operation.client is None:
            self._abandon("whoever was to take over the image has gone")
            return
        client, operation.owner, operation.client = operation.client, operation.client, None
        operation.told = images.size(message.text)
        operation.commit_due_s = time.monotonic() + images.COMMIT_WAIT_S
        client.reply(operation.identifier, "", operation.told)
        self._serve(client)

    def _abandon(self, why: str) -> None:
        """Let the guest of a finished image run on."""
        if self._operation:
            self._operation.commit_due_s = 0.0
        fault = Fault(int(ExitCode.FAILED), f"suspend: {why}; the guest runs on", "")
        self._happen(Happening(Event.ABANDONED, time.monotonic(), fault=fault))

    def do_commit(self, client: Client, request: Request) -> None:
        """End the domain of an image that its client has taken over."""
        operation = self._operation
        if operation is None or operation.owner is not client or not operation.commit_due_s:
            raise WrongStateError(f"commit: no image of yours waits for it; the VM is {self._vm.state}")
        operation.commit_due_s, operation.client, operation.identifier = 0.0, client, request.identifier
        self._happen(Happening(Event.COMMITTED, time.monotonic()))

    def do_cancel(self, client: Client, request: Request) -> None:
        """End the command about an image that runs; the answer comes when all is over."""
        operation = self._operation
        if operation is None or operation.name not in images.CANCELLABLE:
            raise WrongStateError("cancel: no suspend, checkpoint or restore runs")
        operation.cancelled_by.append((client, request.identifier))
        if operation.commit_due_s:
            self._abandon("cancelled")
        elif self._asked and self._asked[1] is not Op.DESTROY:
            self._cancel()

    def _cancel(self) -> None:
        self._sequence += 1
        self._broker.send(Ask(self._sequence, Op.CANCEL, "", 0))

    def _drop(self, client: Client) -> None:
        """Forget a client; a command it has begun goes on, unless the image of it is the client's to take over."""
        if self._operation and self._operation.client is client:
            self._operation.client = None
            if self._asked and self._asked[1] in (Op.SAVE, Op.CHECKPOINT):  # into a file that nobody would ever see
                self._cancel()
        super()._drop(client)
        if self._operation and self._operation.owner is client and self._operation.commit_due_s:
            self._abandon("whoever was to take over the image has gone")
