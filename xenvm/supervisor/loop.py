# SPDX-License-Identifier: GPL-2.0-or-later
"""The supervisor's loop: clients, broker and watcher in; the state machine decides; requests and replies out.

It holds no privilege, no path and no domid that means anything to the broker. Between events it makes no system call.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import os
import select
import time

from xenvm.boundary import machine
from xenvm.boundary.images import Progress
from xenvm.boundary.messages import (
    Ask,
    Domain,
    DomainState,
    Done,
    Failed,
    Fault,
    Init,
    Op,
    Phase,
    Plug,
    Unplug,
    Watch,
    WatchEvent,
)
from xenvm.errors import BusyError, ExitCode, UsageError, WrongStateError, XenvmError
from xenvm.supervisor import answers, buttons, commands, devices, discs, images, sleeping
from xenvm.supervisor.control import Request
from xenvm.supervisor.looking import Looking
from xenvm.supervisor.machine import QUICK_DEATH_HVM_S, QUICK_DEATH_S, SUSPEND_REASON, Happening, Vm, seen, step
from xenvm.supervisor.pending import GOALS, LOOK_FIRST_S, Errand, Operation, Waiter, check_free, error_of
from xenvm.supervisor.saving import Saving
from xenvm.supervisor.states import ALIVE, ENDED, STABLE, Event, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket as socket
    from collections.abc import Callable
    from typing import Final

    from xenvm.boundary.frames import Channel
    from xenvm.supervisor.control import Client

WAIT_DEFAULT_S: Final = 60.0
TURN_CPU_S: Final = 20.0
"""What a turn may take of a processor: SIGPROF ends a supervisor that loops for ever, and the broker starts another."""
BUILDS: Final = frozenset(
    {
        *(Op.START, Op.START_PAUSED, Op.START_RESTORED, Op.FIND, Op.BUILD, Op.BUILD_PAUSED, Op.REBUILD),
        *(Op.RESTORE, Op.RESTORE_PAUSED),
    }
)
REQUESTS: Final = frozenset(
    {Op.ASK_POWEROFF, Op.ASK_REBOOT, Op.ASK_SLEEP, Op.FORCE_POWEROFF}
)  # a guest that runs on is no news


class Supervisor(Saving):
    """All state of one VM's unprivileged side."""

    def __init__(self, broker: Channel, listener: socket.socket, watcher: Channel, init: Init) -> None:
        """Begin in the middle of what the broker does at startup; its outcome comes with sequence 0."""
        super().__init__(listener, init)
        self._broker, self._watcher = broker, watcher
        restoring = init.first and init.policy.startup.startswith("restore")
        quick_s = QUICK_DEATH_HVM_S if answers.is_hvm(init) else QUICK_DEATH_S
        self._vm = Vm(State.RESTORING if restoring else State.CREATING, quick_death_s=quick_s)
        self._operation = Operation("start", None, None, time.monotonic())
        self._starting = init.first
        first_op = {"started": Op.START, "paused": Op.START_PAUSED, "shutdown": Op.FIND}.get(
            init.policy.startup, Op.START_RESTORED
        )
        self._asked: tuple[int, Op] | None = (0, first_op if init.first else Op.FIND)
        self._queue: list[Op] = []
        self._later: list[tuple[Client, Request]] = []
        self._sequence = 0
        self._looking = Looking()
        self._errands: dict[int, Errand] = {}
        self._between: Errand | None = None  # what takes a device away, between two pieces of that
        self._nics: frozenset[int] = frozenset()
        self._revive = False

    def run(self) -> int:
        """Serve until the broker ends; return the exit status."""
        self._epoll.register(self._broker.fileno(), select.EPOLLIN)
        self._epoll.register(self._watcher.fileno(), select.EPOLLIN)
        if self._init.first:
            self._serve_clients()
        while True:
            signal.setitimer(signal.ITIMER_PROF, TURN_CPU_S)
            for descriptor, events in self._epoll.poll(self._timeout_s()):
                if descriptor == self._broker.fileno():
                    if not self._from_broker():
                        return 0
                elif descriptor == self._watcher.fileno():
                    self._from_watcher()
                elif descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == self._model.fileno():
                    self._model.read()
                elif descriptor in self._clients:
                    self._from_client(self._clients[descriptor], events)
            self._timers(time.monotonic())

    # Time

    def _timeout_s(self) -> float:
        """Return how long to sleep: -1, for ever, when nothing is due."""
        due = self._client_deadlines()
        due += self._operation.due_s if self._operation else []
        if self._looking.due_s and self._may_look:
            due.append(self._looking.due_s)
        due += [at for at in (self._model.due, self._follows_s) if at]
        return max(0.0, min(due) - time.monotonic()) if due else -1

    @property
    def _may_look(self) -> bool:
        """Tell whether the broker is free for a look; of a guest that waits for its end all is known."""
        return not self._asked and not (self._operation and self._operation.commit_due_s)

    def _timers(self, now_s: float) -> None:
        self._model.expire(now_s)
        if self._looking.due_s and now_s >= self._looking.due_s and self._may_look:
            age_ms = self._looking.begin(now_s)
            if self._vm.state not in ENDED:
                self._ask(Op.QUERY, age_ms)
        operation = self._operation
        if operation and operation.deadline_s and now_s >= operation.deadline_s:
            operation.deadline_s = 0.0
            event = Event.IGNORED_FORCE if operation.force else Event.IGNORED
            fault = answers.ignored(operation, now_s)
            if operation.name == sleeping.SUSPEND:
                self._oversleep(fault)
            else:
                self._happen(Happening(event, now_s, fault=None if operation.force else fault))
        if operation and operation.commit_due_s and now_s >= operation.commit_due_s:
            self._abandon("the image was not taken over in time")
        self._follow(now_s)
        self._expire(now_s, self._vm.state)

    # Broker and watcher

    def _ask(self, op: Op, age_ms: int = -1) -> None:
        """Send a request, or keep it until the broker is free; a destroy overtakes and cancels everything else.

        What waits, and the time limit of a command, end with the domain that they are about.
        """
        if op in (Op.DESTROY, Op.REBUILD):
            self._queue.clear()
            if self._operation:
                self._operation.deadline_s = 0.0
        elif op in (Op.WITHDRAW, Op.FORCE_POWEROFF):
            self._queue = [other for other in self._queue if other not in REQUESTS]
        if self._asked and op is not Op.DESTROY:
            self._queue.append(op)
            return
        self._sequence += 1
        self._asked = (self._sequence, op)
        self._debug(f"asked {op}")
        self._broker.send(Ask(self._sequence, op, "", 0, age_ms))

    def _from_broker(self) -> bool:
        """Take one message of the broker; return False when it has ended."""
        received = self._broker.receive_now()
        if received is None:
            return False
        message, descriptors = received
        if isinstance(message, Init):
            self._init = message
            self._publish("config", {})
        elif isinstance(message, machine.Model):
            if self._model.adopt(descriptors.pop() if descriptors else -1, message.vnc_port):
                self._epoll.register(self._model.fileno(), select.EPOLLIN)
        elif isinstance(message, Progress):
            self._step = message.told()
            self._publish("progress", self._step)
        elif isinstance(message, Done | Failed) and message.sequence in self._errands:
            if self._asked and self._asked[0] == message.sequence:
                self._asked = None
            self._hand_over(self._errands.pop(message.sequence), message, descriptors)
            self._go_on()
        elif isinstance(message, Done | Failed) and self._asked and message.sequence == self._asked[0]:
            op, self._asked, self._step = self._asked[1], None, {}
            self._outcome(op, message)
            self._serve_clients()
            self._go_on()
        for descriptor in descriptors:  # whoever asked for it has gone
            os.close(descriptor)
        return True

    def _go_on(self) -> None:
        """Take what has waited until the broker was free: requests of our own first, then commands."""
        if self._queue and not self._asked:
            self._ask(self._queue.pop(0))
        self._go_on_taking_away(time.monotonic())
        while self._later and not self._asked and not self._between:
            client, request = self._later.pop(0)
            if client.fileno() >= 0:
                self._try(client, request)
                self._serve(client)

    def _outcome(self, op: Op, message: Done | Failed) -> None:
        now_s = time.monotonic()
        if self._looking.put_off(op, message, now_s):
            return
        if op is Op.CHECKPOINT and self._operation and isinstance(message, Done):
            self._operation.told = images.size(message.text)
        if isinstance(message, Failed):
            self._debug(f"{op} failed: {message.fault.message}")
            self._failed(op, message)
        elif op is Op.DESTROY:
            self._happen(Happening(Event.DESTROYED, now_s))
        elif op is Op.WITHDRAW and message.domain.state is not DomainState.SHUTDOWN:
            self._happen(Happening(Event.WITHDRAWN, now_s))
            self._looking.soon(now_s, alone=True)
        elif op is Op.SAVE:
            self._saved(message)
        elif op in BUILDS:
            self._nics = devices.cards(message)
            self._found(op, message.domain, now_s)
        elif op not in REQUESTS or message.domain.state not in (DomainState.RUNNING, DomainState.PAUSED):
            self._happen(seen(self._vm, self._init.policy, message.domain, now_s))
        if op in (Op.PAUSE, Op.UNPAUSE) and self._operation and not self._asked and self._vm.state in STABLE:
            self._finish(self._operation)  # done, and yet the domain is not as it should be
        self._of_sleep(op, message)

    def _found(self, op: Op, domain: Domain, now_s: float) -> None:
        """Take on a domain that was built or found, whatever it does just now."""
        if domain.state is DomainState.RUNNING:
            self._happen(Happening(Event.BUILT, now_s, domain.domid))
        elif domain.state is DomainState.PAUSED:
            event = Event.SEEN_PAUSED if domain.cpu_time_ms else Event.BUILT_PAUSED  # one that has run was paused since
            self._happen(Happening(event, now_s, domain.domid))
        elif domain.state is DomainState.SHUTDOWN and op in (Op.BUILD, Op.BUILD_PAUSED, Op.REBUILD):
            self._happen(Happening(Event.BUILT, now_s, domain.domid))  # and it ended before anybody could look
            self._happen(seen(self._vm, self._init.policy, domain, now_s))
        elif domain.state is DomainState.SHUTDOWN:
            self._vm = self._vm.but(domid=domain.domid)
            starts = self._init.policy.startup in ("started", "paused") and domain.reason != SUSPEND_REASON
            self._revive = self._starting and starts
            self._happen(seen(self._vm, self._init.policy, domain, now_s))
        elif self._vm.state in (State.CREATING, State.RESTORING):
            self._happen(Happening(Event.ABSENT, now_s))
        else:
            self._happen(seen(self._vm, self._init.policy, domain, now_s))

    def _failed(self, op: Op, message: Failed) -> None:
        now_s = time.monotonic()
        if op is Op.QUERY and message.domain.phase is Phase.BUILT:
            self._looking.failed(now_s)
            return
        if message.domain.phase is not Phase.BUILT and op is not Op.DESTROY:
            event = Event.FAILED_OFF
        elif op is Op.DESTROY or (op is Op.REBUILD and self._vm.reason):  # the guest has ended, its domain stays
            event = Event.DESTROY_FAILED
        else:
            event = Event.FAILED_UP
        self._happen(Happening(event, now_s, message.domain.domid, fault=message.fault))
        if event is Event.FAILED_UP:  # what the guest did meanwhile was not looked at
            self._looking.soon(now_s, alone=True)

    def _from_watcher(self) -> None:
        """Something ended on this host: look soon, however many such events there are."""
        received = self._watcher.receive_now()
        if received and isinstance(received[0], Watch) and self._vm.state not in ENDED:
            self._looking.soon(time.monotonic(), alone=received[0].event is WatchEvent.ARMED)

    # The machine

    def _happen(self, happening: Happening) -> None:
        """Take one step and do what it asks; finish the running command when a lasting state is reached."""
        before = self._vm
        after, op = step(before, happening)
        self._move(after, happening.event, op)
        settled = op is None and self._vm.state in STABLE
        moved = self._vm.state is not before.state or self._vm.fault is not before.fault
        if self._operation and settled and (moved or self._operation.name == "destroy"):
            self._finish(self._operation)

    def _move(self, after: Vm, event: Event, op: Op | None = None) -> None:
        """Take on what a step has led to: ask what it asks for, then tell of a new state."""
        before, self._vm = self._vm, after
        if op:
            self._ask(op)
        if (after.state, after.domid) != (before.state, before.domid):
            reason = f" {after.reason}" if after.reason != before.reason else ""
            self._log(f"state={after.state} domid={after.domid} event={event!s}{reason}")
            self._publish("state", answers.why(after))
            self._wake(after.state)

    def _finish(self, operation: Operation) -> None:
        fault = self._vm.fault
        revive, self._revive = self._revive, False
        if revive and fault is None and self._vm.state is State.SHUTDOWN and self._vm.domid <= 0:
            # the domain found at the start had ended while nobody watched: its policy is done, now the start begins
            event = Event.START_PAUSED if self._init.policy.startup == "paused" else Event.START
            after, op = step(self._vm, Happening(event, time.monotonic()))
            self._move(after, event, op)
            return
        self._operation = None
        self._take_back(operation)
        if fault is None and self._vm.state not in GOALS[operation.name] and operation.client:
            fault = Fault(int(ExitCode.FAILED), answers.missed(operation, self._vm), "")
        if self._starting:
            self._starting = False
            self._report_start(fault)
        self._answer(operation, error_of(fault) if fault else None)

    def _report_start(self, fault: Fault | None) -> None:
        """Tell whoever started the monitor; from now on clients are served. A failed start ends the monitor."""
        self._tell_start(*answers.outcome(self._init, self._vm, fault))

    def _tell_start(self, text: str, code: int) -> None:
        self._sequence += 1
        self._broker.send(Ask(self._sequence, Op.STARTED, text, code))

    # Clients

    def _drop(self, client: Client) -> None:
        """Forget a client; a command it has begun goes on."""
        for errand in (*self._errands.values(), *([self._between] if self._between else [])):
            if errand.client is client:
                errand.client = None
        super()._drop(client)

    def _command(self, client: Client, request: Request) -> None:
        name, command = commands.find(request.method)
        commands.check_rights(name, command, client.rights, client.uid)
        commands.check_arguments(name, command, request.params)
        self._debug(f"command {name} from user {client.uid}")
        if command.event is not None:
            self._change(client, request, name, command.event)
        else:
            self._HANDLERS[name](self, client, request)

    def _change(self, client: Client, request: Request, name: str, event: Event) -> None:
        """Begin a command that changes the VM; there is one at a time, and destroy alone overtakes it."""
        params = request.params
        now_s = time.monotonic()
        operation = Operation(name, client, request.identifier, now_s)
        operation.force = commands.boolean(params, "force", "forced")
        if event is Event.START and commands.boolean(params, "paused"):
            event = Event.START_PAUSED
        if event in (Event.SHUTDOWN, Event.RESTART):
            limit_s = commands.seconds(params, "timeout", float(self._init.policy.shutdown_timeout_s))
            if operation.force and "timeout" not in params:
                event = Event.FORCE_OFF if event is Event.SHUTDOWN else Event.FORCE_RESTART
            else:
                operation.deadline_s = now_s + limit_s
        running = self._operation
        if event is not Event.DESTROY:
            check_free(name, self._busy)
        if not running and self._vm.state not in STABLE and event is not Event.DESTROY:
            raise BusyError(f"{name}: the VM is {self._vm.state}", hint="wait for it, or destroy")
        after, op = step(self._vm, Happening(event, now_s))  # raises before anything has changed
        if running and self._starting:
            self._starting = self._revive = False
            self._tell_start(answers.DESTROYED, 0)
        self._operation = operation
        self._move(after, event, op)
        if running:
            self._answer(
                running, XenvmError(f"{running.name}: ended by destroy"), XenvmError("cancel: ended by destroy")
            )

    def _do_status(self, client: Client, request: Request) -> None:
        text = answers.summary(self._vm) if client.modern else str(self._vm.state)
        client.reply(request.identifier, text, self._status())

    def _do_domid(self, client: Client, request: Request) -> None:
        client.reply(request.identifier, str(self._vm.domid), self._vm.domid)

    def _do_help(self, client: Client, request: Request) -> None:
        client.reply(request.identifier, commands.help_text(), sorted(commands.COMMANDS))

    def _do_get(self, client: Client, request: Request) -> None:
        value = answers.field(self._init, request.params.get("field", ""))
        client.reply(request.identifier, value, value)

    def _do_events(self, client: Client, request: Request) -> None:
        if not client.modern:
            raise UsageError('events: only for clients that send "xenvm": 1')
        client.subscribed = True
        client.reply(request.identifier, "", self._status())

    def _do_wait(self, client: Client, request: Request) -> None:
        word = request.params.get("state", "")
        if word not in list(State):
            raise UsageError(f"wait: no state {word[:64]!a}", hint=f"one of {', '.join(State)}")
        timeout_s = commands.seconds(request.params, "timeout", WAIT_DEFAULT_S)
        if self._vm.state == word:
            client.reply(request.identifier, "", {"state": word})
            return
        end = time.monotonic() + timeout_s
        self._waiters.append(Waiter(client, request.identifier, State(word), timeout_s, end))

    def _do_read_config(self, client: Client, request: Request) -> None:
        if "path" in request.params:
            raise answers.other_file(self._init)
        self._ask_beside(Op.READ_CONFIG, client, request)

    def _do_console(self, client: Client, request: Request) -> None:
        if self._vm.state in ENDED or self._vm.domid < 0:
            raise WrongStateError(f"console: the VM is {self._vm.state}")
        check_free("console", self._operation)
        if not self._wait_for_broker(client, request):
            self._ask_beside(Op.CONSOLE, client, request)

    @property
    def _busy(self) -> Operation | Errand | None:
        """The command that changes the VM or its devices just now."""
        changing = [errand for errand in self._errands.values() if errand.changes]
        return self._operation or self._between or (changing[0] if changing else None)

    def _wait_for_broker(self, client: Client, request: Request) -> bool:
        """Put a command off while the broker is at something."""
        waits = self._asked is not None or self._between is not None
        if waits:
            self._later.append((client, request))
        return waits

    def _do_device(self, client: Client, request: Request) -> None:
        """Ask for a look at the devices or a change of them; whatever else is to be asked waits for the answer."""
        name, params = commands.ALIASES.get(request.method, request.method), request.params
        alive = self._vm.state in ALIVE
        if not alive and not (name == "doctor" and self._vm.state in ENDED):
            raise WrongStateError(f"{name}: the VM is {self._vm.state}")
        if name in discs.COMMANDS and answers.is_hvm(self._init):
            self._change_disc(name, client, request)
            return
        check_free(name, self._operation)
        if self._wait_for_broker(client, request):
            return
        self._sequence += 1
        op, message = devices.request(name, self._sequence, params, self._init, self._nics, alive=alive)
        errand = Errand(name, client, request.identifier, changes=op in devices.CHANGING)
        if isinstance(message, Unplug):
            errand.unplug = message
            op, message = errand.request(self._sequence)
        handed = client.take_handed() if isinstance(message, Plug) and message.disks else []
        if isinstance(message, Plug) and len(handed) != len(message.disks):
            message = devices.by_policy(name, message, params.get("path", ""), self._init.directories)
        try:
            self._broker.send(message, handed)
        finally:
            for descriptor in handed:
                os.close(descriptor)
        self._asked = (self._sequence, op)
        self._errands[self._sequence] = errand

    def _go_on_taking_away(self, now_s: float) -> None:
        """Ask once more for a device that its guest holds on to, unless that has ended, or is to be looked at first."""
        errand = self._between
        if errand is None:
            return
        if self._vm.state not in ALIVE:
            self._between = None
            why = WrongStateError(f"{errand.name}: the VM is {self._vm.state}")
            self._answer_one(errand.client, errand.identifier, why, {})
        elif not self._asked and not 0 < self._looking.due_s < now_s + LOOK_FIRST_S:
            self._between = None
            self._sequence += 1
            op, message = errand.request(self._sequence)
            self._broker.send(message)
            self._asked = (self._sequence, op)
            self._errands[self._sequence] = errand

    def _change_disc(self, name: str, client: Client, request: Request) -> None:
        """Have the device model take a disc or let it go: what an HVM guest has is a real drive."""

        def finish(error: XenvmError | None) -> None:
            if error:
                client.refuse(request.identifier, error)
            else:
                client.reply(request.identifier, "", None)
                self._publish("device", {"command": name, "devices": None})
            if client.fileno() >= 0:
                self._serve(client)

        self._model.begin(name, discs.steps(name, request.params, client.take_handed()), finish)

    def _do_trigger(self, client: Client, request: Request) -> None:
        word = request.params.get("params")
        if word == buttons.RESUME:
            self.do_sleep(client, request)
        elif word == buttons.RESET and answers.is_hvm(self._init):
            self._change(client, Request(request.identifier, "restart", {"force": "true"}), "restart", Event.RESTART)
        else:
            self._do_device(client, request)

    def _do_vnc(self, client: Client, request: Request) -> None:
        text = answers.vnc_port(self._init, self._vm, self._model.vnc_port)
        client.reply(request.identifier, text, int(text))

    def _do_stubdomid(self, client: Client, request: Request) -> None:
        client.reply(request.identifier, "-1" if not client.modern else "none: the device model runs in dom0", -1)

    def _do_console_log(self, client: Client, request: Request) -> None:
        self._ask_beside(Op.CONSOLE_LOG, client, request)

    def _do_quit(self, client: Client, request: Request) -> None:
        check_free("quit", self._busy)
        if self._vm.state not in STABLE:
            raise BusyError(f"quit: the VM is {self._vm.state}", hint="wait for it, or destroy")
        client.reply(request.identifier, "", None)
        client.flush()
        self._sequence += 1
        self._broker.send(Ask(self._sequence, Op.QUIT, "", 0))

    def _ask_beside(self, op: Op, client: Client, request: Request) -> None:
        """Ask for something that changes nothing and whose answer goes to one client."""
        if not client.modern and op is not Op.READ_CONFIG:
            raise UsageError(f'{op}: only for clients that send "xenvm": 1')
        self._sequence += 1
        self._errands[self._sequence] = Errand(request.method, client, request.identifier)
        if op is Op.CONSOLE:  # a builder does that, as all that the broker does one after the other
            self._asked = (self._sequence, op)
        self._broker.send(Ask(self._sequence, op, "", 0))

    def _hand_over(self, errand: Errand, message: Done | Failed, descriptors: list[int]) -> None:
        """Answer whoever asked for something beside, if it is still there; what is handed on is taken over."""
        name, text, data = errand.name, "", None
        if isinstance(message, Failed):
            if errand.again(message.fault):
                self._between = errand
            else:
                self._answer_one(errand.client, errand.identifier, error_of(errand.in_all(message.fault)), {})
            return
        if name in devices.COMMANDS:
            text, data = devices.answer(name, message)
            if name not in buttons.COMMANDS:
                self._nics = devices.cards(message)
            if not name.endswith("list") and name not in buttons.COMMANDS:
                self._publish("device", {"command": name, "devices": data})
        if errand.client:
            errand.client.reply(errand.identifier, text, data, descriptors.pop(0) if descriptors else -1)
            self._serve(errand.client)

    _HANDLERS: Final[dict[str, Callable[[Supervisor, Client, Request], None]]] = {
        "status": _do_status,
        "domid": _do_domid,
        "help": _do_help,
        "get": _do_get,
        "events": _do_events,
        "wait": _do_wait,
        "read-config": _do_read_config,
        "console": _do_console,
        "console-log": _do_console_log,
        **dict.fromkeys(devices.COMMANDS, _do_device),
        **dict.fromkeys(images.COMMANDS, Saving.do_image),
        **dict.fromkeys(sleeping.COMMANDS, Saving.do_sleep),
        "commit": Saving.do_commit,
        "cancel": Saving.do_cancel,
        "trigger": _do_trigger,
        "get-vnc": _do_vnc,
        "get-stubdomid": _do_stubdomid,
        "quit": _do_quit,
    }

    # What others hear

    def _publish(self, kind: str, details: dict[str, object]) -> None:
        self._tell(answers.event(self._init, self._vm, kind, details))
