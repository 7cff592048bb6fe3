# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker of one VM: decides on each request of the supervisor, opens what is granted, starts a helper, logs it.

It never touches Xen, a guest, or text from outside. The domid is its own knowledge, from its builders; a request
that is not legal in the present phase is refused, and nothing a supervisor sends can name a file or a domain.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import os
import select
import time

from xenvm.boundary.images import Progress, Room, Sync
from xenvm.boundary.machine import EndModel, Loaded, Wished
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Ask,
    Created,
    Domain,
    DomainState,
    Done,
    Failed,
    Grants,
    Hello,
    Op,
    Phase,
    Policy,
    Ready,
)
from xenvm.boundary.privileges import Role
from xenvm.broker import host, looks, strays, uevents
from xenvm.broker.asked import Asked, Refusals, allow
from xenvm.broker.book import Book
from xenvm.broker.children import Child
from xenvm.broker.images import Sink
from xenvm.broker.models import Models
from xenvm.broker.phases import (
    FOLLOWED_AT_ONCE,
    LEAVES_HALF,
    LEAVES_SUSPENDED,
    ON_DEVICES,
    PERMITS,
    REBUILDING,
    RESTORING,
    SAVING,
    START_DEADLINE_S,
    STARTUP_OPS,
    VmPhase,
    extra_s,
)
from xenvm.broker.requests import REQUESTS, change_of, must_wait, op_of, succeeded, told, undone
from xenvm.broker.spares import Spares
from xenvm.broker.tidying import AGAIN, clear_up, in_vain, left_nothing, once_more, what_is_left
from xenvm.broker.uevents import Uevents
from xenvm.broker.work import ANSWERS, Change, Work, failed, forget, let_run, log_job, worded
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.messages import HostPolicy
    from xenvm.broker.actlog import ActLog
    from xenvm.broker.making import Making
    from xenvm.broker.plugging import Plugging
    from xenvm.broker.requests import Request

    Reload = Callable[[], tuple[Grants, Policy, dict[str, str], HostPolicy]]

RESTARTS_PER_MINUTE: Final = 5
WATCHER_PAUSE_S: Final = 1.0  # before it is started again, and twice as long each time: xenstored may be starting too
MESSAGES_A_TURN: Final = 16
LISTENER_THERE, WATCHER_THERE, SUPERVISOR_THERE = 4, 5, 4


class Broker:
    """All state of one monitor's privileged side."""

    def __init__(
        self,
        *,
        grants: Grants,
        policy: Policy,
        host_policy: HostPolicy,
        fields: dict[str, str],
        config_file: str,
        directory: str,
        listener: socket.socket,
        log: int,
        acts: ActLog,
        reload_config: Reload,
        started: Callable[[int, str], None],
        spare: Child | None,
    ) -> None:
        """Seal the grants; nothing runs before `run`."""
        self._grants, self._policy, self._fields = grants, policy, fields
        self._config_file = config_file
        self._listener, self._log, self._acts = listener, log, acts
        self._reload, self._started = reload_config, started
        self._spares = Spares(log, grants.uuid)
        self._spares.update({Role.BUILDER: spare} if spare else {})
        self._book = Book(host_policy)
        self._directory, self._uevents, self._models = directory, Uevents(directory), Models(grants.uuid)
        self._postponed: list[tuple[Message, list[int]]] = []
        self._recheck = False  # udev has told of a removed device; looked at when no job runs, which may have done it
        self._phase, self._domid = VmPhase.UNKNOWN, -1
        self._work: Work | None = None
        self._keeping: Making | None = None  # what a start has unpacked, on its way into the cache
        self._refusals = Refusals()
        self._asked = Asked()
        self._restarts: dict[Role, list[float]] = {Role.SUPERVISOR: [], Role.WATCHER: []}
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        self._events_in, self._events_out = socket.socketpair(socket.AF_UNIX, kind)
        self._supervisor: Child | None = None
        self._watcher: Child | None = None
        self._watcher_due = 0.0  # when the next one is started; 0: one runs
        self._quitting, self._code, self._told = False, 0, False  # whoever waits for the start has been told of it

    def run(self, wakeup: int) -> int:
        """Serve until the supervisor asks to quit or a signal arrives on `wakeup`; return the exit status."""
        try:
            self._begin(0, STARTUP_OPS.get(self._policy.startup, Op.START_RESTORED), START_DEADLINE_S)
            self._start_supervisor(first=True)
            self._start_watcher()
            while not self._quitting:
                self._turn(wakeup)
        except XenvmError as error:
            self._started(int(error.code), error.message + (f"\nhint: {error.hint}" if error.hint else ""))
            why, code = error.message, int(error.code)
        else:
            why, code = "asked to", self._code
        finally:
            self._end_children()
        with suppress(XenvmError):  # without space for the log the guest still runs on
            self._acts.append("closed", why=why)
        return code

    def _turn(self, wakeup: int) -> None:
        for lost in (self._supervisor, self._watcher):
            if lost is not None and lost.lost():  # also one that was ended because it did not take a message
                self._gone(lost)
        poll = select.poll()
        for descriptor in {wakeup, self._uevents.fileno(), self._models.pidfd} - {-1}:
            poll.register(descriptor, select.POLLIN)
        children = [child for child in (self._supervisor, self._watcher) if child is not None]
        children += [child for part in (self._work, self._keeping) if part for child in part.children]
        children += self._spares.greeting
        for child in children:
            poll.register(child.channel.fileno(), select.POLLIN)
            poll.register(child.pidfd, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(self._timeout_ms())}
        if self._models.pidfd in ready:  # first: what follows closes descriptors, and their numbers are used again
            self._models.ended(self._acts)
        if wakeup in ready:
            self._signalled(os.read(wakeup, 64))
        for child in children:
            if child.channel.fileno() in ready:
                self._drain(child)
        for child in children:
            if child.pidfd in ready and child.ended():
                self._drain(child)
                self._gone(child)
        if self._uevents.fileno() in ready:
            self._recheck |= self._uevents.removed()
        if not self._work and self._models.take_lost():
            self._try(0, Op.CRASH, PERMITS[Op.QUERY].deadline_s)
            if not self._work:
                self._models.not_told()
        while self._postponed and not self._work and self._supervisor:
            message, descriptors = self._postponed.pop(0)
            self._take_all(self._supervisor, message, descriptors)
        if self._recheck and not self._work:  # the kernel may not have what the domain is known to have
            self._recheck = False
            if uevents.gone(self._book.known, self._domid) and self._asked.allow(Op.SETTLE):
                self._try(0, Op.SETTLE, PERMITS[Op.SETTLE].deadline_s)
        if self._work and time.monotonic() >= self._work.end:
            self._finish()
        self._spares.expire()
        if self._keeping and self._keeping.children and time.monotonic() >= self._keeping.end_s:
            self._keeping.close()
        if self._watcher_due and time.monotonic() >= self._watcher_due:
            self._start_watcher()

    def _timeout_ms(self) -> float | None:
        due = [self._work.end] if self._work else []
        due += [at for at in (self._watcher_due, self._models.due_s, *self._spares.due_s) if at]
        due += [self._keeping.end_s] if self._keeping and self._keeping.children else []
        return max(0.0, (min(due) - time.monotonic()) * 1000) if due else None

    def _signalled(self, numbers: bytes) -> None:
        """SIGHUP reads the config again, as the original did; SIGTERM and SIGINT end the monitor, not the guest."""
        if set(numbers) - {signal.SIGHUP, signal.SIGCHLD}:
            self._quitting = True
        elif signal.SIGHUP in numbers:
            try:
                self._read_config()
            except XenvmError as error:
                self._acts.append("refused", op="read-config", why=error.message[:200])

    def _end_children(self) -> None:
        """End all children; the supervisor gets a moment to flush its last replies."""
        if self._supervisor:
            self._supervisor.channel.close()
            self._supervisor.end(grace_ms=2000)
        self._spares.end()
        if self._watcher:
            self._watcher.end()
        op = self._work.meant if self._work else None
        if self._work:
            self._work.abandon()
        suspended = op in LEAVES_SUSPENDED or (self._book.saved and op is not Op.DESTROY)
        if suspended and self._phase is VmPhase.BUILT:
            let_run(self._book, self._grants, self._domid, self._log, self._acts, self._models)
        elif op in LEAVES_HALF:
            clear_up(self._grants, self._log, self._acts, self._models)
        if self._keeping:
            self._keeping.close()
        forget(self._postponed)
        self._uevents.follow(-1)

    # Children

    def _start_supervisor(self, *, first: bool) -> None:
        extra = {LISTENER_THERE: self._listener.fileno(), WATCHER_THERE: self._events_out.fileno()}
        self._supervisor = Child(Role.SUPERVISOR, self._log, extra, self._grants.uuid)
        self._acts.append("started", role="supervisor", pid=self._supervisor.pid)
        self._send_init(first=first)

    def _send_init(self, *, first: bool) -> None:
        known = (self._grants, self._policy, self._book.policy, self._fields, self._config_file)
        self._to_supervisor(host.introduction(*known, first=first))

    def _start_watcher(self) -> None:
        self._watcher_due = 0.0
        self._watcher = Child(Role.WATCHER, self._log, {SUPERVISOR_THERE: self._events_in.fileno()}, self._grants.uuid)
        self._acts.append("started", role="watcher", pid=self._watcher.pid)

    def _drain(self, child: Child) -> None:
        """Take what has arrived from a child, of one that lives so much that others have their turn.

        A child that breaks the protocol is ended.
        """
        turns = 0
        while child.pidfd >= 0 and (turns < MESSAGES_A_TURN or child.status is not None):
            turns += 1
            try:
                received = child.channel.receive_now()
            except BlockingIOError:
                return
            except ProtocolError as error:
                self._acts.append("protocol", role=child.role.value, pid=child.pid, why=error.message[:200])
                child.end()
                self._gone(child)
                return
            if received is None:  # it has ended; one that lives on without its channel is of no use
                child.end(grace_ms=1000)
                self._gone(child)
                return
            self._take_all(child, *received)

    def _take_all(self, child: Child, message: Message, descriptors: list[int]) -> None:
        try:
            self._take(child, message, descriptors)
        finally:
            for descriptor in descriptors:  # those that were taken over are no longer in the list
                os.close(descriptor)

    def _take(self, child: Child, message: Message, descriptors: list[int]) -> None:
        """Act on one message of a child; one that is out of place ends it."""
        work = self._work
        if isinstance(message, Hello) and child.greets(message):
            self._acts.append("confined", role=message.role, pid=message.pid, proof=message.proof)
        elif child is self._supervisor and must_wait(work, message, len(self._postponed)):
            self._postponed.append((message, [*descriptors]))
            descriptors.clear()
        elif child is self._supervisor and isinstance(message, Ask):
            self._answer(message)
        elif child is self._supervisor and isinstance(message, REQUESTS):
            self._change(message, descriptors)
        elif work and child is work.builder and isinstance(message, Progress):
            self._to_supervisor(message.but(sequence=work.sequence))
        elif work and child is work.builder and isinstance(message, Created) and not work.created:
            self._created(work, message)
        elif work and child is work.builder and isinstance(message, Loaded):
            self._plugged(work, lambda plugging: plugging.loaded(message.domid))
        elif work and work.talk and child is work.builder and isinstance(message, Wished):
            work.tell(work.talk.ask(message))
        elif work and child is work.builder and isinstance(work.feed, Sink) and isinstance(message, Room | Sync):
            work.tell(work.feed.ask(message))
        elif work and child is work.builder and isinstance(message, EndModel):
            self._models.end(message.domid, message.server)
            work.tell(Ready(()))
        elif work and child is work.builder and isinstance(message, Done | Failed):
            work.result = message
            child.end(grace_ms=5000)
            self._finish()
        elif work and work.kernel and child is work.kernel.child:
            self._acts.append("kernel", pid=child.pid, answer=type(message).__name__)
            self._unpacked(work, lambda kernel: kernel.take(message))
        elif self._keeping and child is self._keeping.child:
            self._keeping.kept(message)
            self._acts.append("kernel kept", pid=child.pid, answer=type(message).__name__)
        elif work and work.plugging and child in work.plugging.children:
            handed, descriptors[:] = [*descriptors], []
            self._plugged(work, lambda plugging: plugging.take(child, message, handed))
        elif work and (partner := work.partner(child)) and isinstance(message, ANSWERS):
            work.tell(partner.take(message))
        else:
            self._acts.append("protocol", role=child.role.value, pid=child.pid, why="message out of place")
            child.end()
            self._gone(child)

    def _gone(self, child: Child) -> None:
        """Replace a child that has ended by itself, or finish its job."""
        work = self._work
        if work and child is work.builder:
            self._finish()
            return
        if work and work.plugging and child in work.plugging.children:
            self._plugged(work, lambda plugging: plugging.gone(child))
            return
        if work and work.kernel and child is work.kernel.child:
            self._unpacked(work, lambda kernel: kernel.gone())
            return
        if work and (partner := work.partner(child)):
            work.tell(partner.gone())
            return
        if self._keeping and child is self._keeping.child:
            self._keeping.close()
        self._spares.drop(child)
        if child not in (self._supervisor, self._watcher):
            return
        child.end()
        self._acts.append("ended", role=child.role.value, pid=child.pid, how=child.how())
        recent = self._restarts[child.role]
        if not allow(recent, RESTARTS_PER_MINUTE):
            raise XenvmError(f"the {child.role.value} ended {RESTARTS_PER_MINUTE + 1} times in a minute; giving up")
        if child is self._watcher:
            self._watcher, pause_s = None, WATCHER_PAUSE_S * 2 ** (len(recent) - 1)
            self._watcher_due = time.monotonic() + pause_s
            return
        self._supervisor = None
        forget(self._postponed)
        if self._work and self._work.op in SAVING:  # nobody is left who would give the image its name
            self._cancel_image()
        elif self._work and self._work.op in ON_DEVICES:  # nor who waits; the next one is to know soon how things are
            self._cancel("its supervisor has ended")
        if self._work:  # its end brings the new supervisor up to date, to whom an answer to the old one means nothing
            self._work.orphan()
        else:
            self._begin(0, Op.FIND, PERMITS[Op.FIND].deadline_s)
        self._start_supervisor(first=not self._told)

    def _to_supervisor(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        if self._supervisor and self._supervisor.pidfd >= 0:
            try:
                self._supervisor.channel.send(message, descriptors, deadline_s=5.0)
            except XenvmError as error:
                self._acts.append("lost", role="supervisor", why=error.message)
                self._supervisor.end()

    # Requests

    def _answer(self, ask: Ask) -> None:
        try:
            self._permit(ask.op, plain=True)
            if ask.op is Op.STARTED:
                self._told = True
                self._started(ask.code, ask.text)
                self._quitting, self._code = ask.code != 0, ask.code
            elif ask.op is Op.QUIT:
                self._acts.append("quit")
                self._quitting = True
            elif ask.op is Op.CANCEL:
                self._cancel_image()
                self._to_supervisor(Done(ask.sequence, self._known(), ""))
            elif ask.op is Op.CONSOLE_LOG:
                self._acts.append("console-log", name=self._grants.name)
                self._hand_over(ask.sequence, host.open_console_log(self._grants.name))
            elif ask.op is Op.READ_CONFIG:
                self._read_config()
                self._to_supervisor(Done(ask.sequence, self._known(), ""))
            elif ask.age_ms >= 0 and ask.op is Op.QUERY:
                self._look(ask)
            else:
                self._begin(ask.sequence, ask.op, PERMITS[ask.op].deadline_s)
        except XenvmError as error:
            self._to_supervisor(self._refusals.answer(self._acts, ask.sequence, ask.op, error, self._known()))

    def _look(self, ask: Ask) -> None:
        """Look at all domains for every monitor of the host, unless another one does so or has done so since."""
        answer, lock = looks.consult(self._directory, ask, self._known(), self._grants.uuid)
        if answer:
            self._to_supervisor(answer)
            return
        try:
            self._begin(ask.sequence, Op.QUERY if lock < 0 else Op.SURVEY, PERMITS[Op.QUERY].deadline_s)
        finally:
            looks.keep(lock, self._work, self._spares)

    def _change(self, request: Request, descriptors: list[int]) -> None:
        """Begin what comes with arguments: a change of the running guest's devices, a save image."""
        op = op_of(request)
        try:
            self._permit(op)
            change = change_of(request, self._book, self._grants, descriptors, self._acts)
            self._begin(request.sequence, op, PERMITS[op].deadline_s + change.timeout_s, change)
            if self._work:
                self._work.held[:], descriptors[:] = descriptors, []
        except XenvmError as error:
            self._to_supervisor(self._refusals.answer(self._acts, request.sequence, op, error, self._known()))

    def _cancel_image(self) -> None:
        if not self._work or self._work.op not in SAVING | RESTORING:
            raise XenvmError("nothing runs that could be cancelled", code=ExitCode.WRONG_STATE)
        self._work.cancelled = True
        self._finish()

    def _permit(self, op: Op, *, plain: bool = False) -> None:
        self._asked.permit(op, self._phase, plain=plain)
        if self._work and PERMITS[op].deadline_s:
            if op is not Op.DESTROY:
                raise XenvmError(f"the broker is busy with {self._work.meant}", code=ExitCode.BUSY)
            self._cancel(f"ended by {op}")

    def _cancel(self, why: str) -> None:
        work = self._work
        if work is None:
            return
        work.abandon()
        self._acts.append("cancelled", op=work.op.value, pid=work.builder.pid)
        self._work = None
        self._to_supervisor(failed(work.sequence, XenvmError(f"{work.meant}: {why}"), self._known()))

    def _read_config(self) -> None:
        self._grants, self._policy, self._fields, self._book.policy = self._reload()
        self._acts.append("sealed", grants=self._grants.as_body())
        self._send_init(first=False)

    def _hand_over(self, sequence: int, descriptor: int) -> None:
        try:
            self._to_supervisor(Done(sequence, self._known(), ""), (descriptor,))
        finally:
            os.close(descriptor)

    def _known(self) -> Domain:
        """Return what the broker knows without asking: enough for an answer about something else."""
        if self._phase is not VmPhase.BUILT:
            return NO_DOMAIN
        return Domain(self._domid, DomainState.RUNNING, Phase.BUILT, -1, 0, 0, 0)

    # Jobs

    def _begin(self, sequence: int, op: Op, deadline_s: float, change: Change | None = None) -> None:
        grants, change = self._grants, change or Change()
        if op in REBUILDING:
            change = change.but(wanted=self._book.wanted(grants), timeout_s=grants.device_timeout_s)
        deadline_s += extra_s(op, grants.memory_max_mib, live=change.live)
        log_job(self._acts, "job", op, op is Op.RESUME, domid=self._domid)
        role = Role.HOTPLUG if op in ON_DEVICES else Role.BUILDER
        work = Work(sequence, op, self._spares.take(role), deadline_s, change)
        work.begin(self._domid, grants, self._log, self._spares, self._models, self._acts)
        self._work = work
        if op in FOLLOWED_AT_ONCE:
            self._spares.make_ready(role)

    def _created(self, work: Work, created: Created) -> None:
        """Open and bridge what the job needs: the nodes for it are there, the domain before it is not any more."""
        work.created = True
        if work.op in REBUILDING:
            self._book.seen(created.devices)
            self._book.domain_gone(for_good=False)
            strays.tidy(self._grants.uuid, self._book, self._log, self._acts)
        self._plugged(work, lambda plugging: plugging.begin(created.domid))

    def _plugged(self, work: Work, step: Callable[[Plugging], None]) -> None:
        """Take a step of plugging; tell the helper when all is ready, or why it never will be."""
        plugging = work.plugging
        if plugging is None:
            return
        try:
            step(plugging)
            answer: Message | None = plugging.answer
        except (XenvmError, OSError) as error:
            plugging.close(succeeded=False)
            work.plugging = None
            answer = failed(0, worded(error, "devices"), NO_DOMAIN)
        work.tell(answer)

    def _unpacked(self, work: Work, step: Callable[[Making], None]) -> None:
        """Take a step towards the kernel; without one the job ends here, before its builder has done anything."""
        if work.kernel is None:
            return
        try:
            step(work.kernel)
            work.hand_over()
        except XenvmError as error:
            work.answer = failed(work.sequence, error, self._known())
            self._finish()

    def _finish(self) -> None:
        """Learn from a helper that has answered or is gone, tidy up behind it, tell the supervisor."""
        work = self._work
        if work is None:
            return
        self._work = None
        work.stop()
        message = work.outcome(self._known())
        if isinstance(message, Failed) and work.feed and work.feed.failure:  # the builder saw the end of its pipe only
            message = work.feed.failure
        urgent, result = work.op in LEAVES_SUSPENDED, type(message).__name__
        log_job(self._acts, "result", work.op, urgent, pid=work.builder.pid, result=result)
        if isinstance(message, Done):
            succeeded(self._book, work, message, self._grants, self._policy, self._log, self._acts)
            if self._models.note(work.op, message, self._acts):
                self._models.tell(self._to_supervisor)
            if work.kernel and not (self._keeping and self._keeping.children) and work.kernel.keep():
                self._keeping, work.kernel = work.kernel, None
            if work.op not in ON_DEVICES:
                self._learn(message.domain)
        work.close()
        if work.behind:
            self._failed(*work.behind, what_is_left(work.behind[0], message))
        elif isinstance(message, Done):
            self._pass_on(work, message)
        elif isinstance(message, Failed) and not self._look_behind(work, message):
            self._failed(work, message, None)
        if not self._work:
            self._spares.follow(work, message)

    def _failed(self, work: Work, message: Failed, made: Done | None) -> None:
        """Tell of a job that has failed, or of what it has `made` all the same, when all that it left is tidied up."""
        if work.op is Op.CRASH:
            self._models.not_told()
        answer = made or work.answer or Failed(work.sequence, message.fault, self._known())
        if work.op is Op.PLUG and work.result is None:
            self._first(work, Op.UNPLUG, answer, undone(work))
        elif work.op in SAVING and work.result is None:
            self._first(work, Op.RESUME, answer)
        elif again := once_more(work, made, absent=self._phase is VmPhase.ABSENT):
            self._first(work, again, answer)
        else:
            self._to_supervisor(answer)

    def _look_behind(self, work: Work, message: Failed) -> bool:
        """Begin to look what a failed build or destroy has left, if that is of use; what is half there is removed."""
        if work.op not in LEAVES_HALF or in_vain(work):
            return False
        self._set_phase(VmPhase.ABSENT, -1)
        if left_nothing(work) or work.created:  # its image servers served a domain that is gone
            self._book.domain_gone(for_good=False)
        if not left_nothing(work):
            self._try(work.sequence, Op.FIND, PERMITS[Op.DESTROY].deadline_s)
        if self._work:
            self._work.behind = work, message
        return self._work is not None

    def _first(self, work: Work, op: Op, answer: Message, change: Change | None = None) -> None:
        """Undo what a job has left, or do the rest, by another one; only after that the answer to it is given."""
        self._try(work.sequence, op, PERMITS[op].deadline_s, change)
        if self._work:
            self._work.answer, self._work.repeats = None if op in AGAIN else answer, op in AGAIN
        else:
            self._to_supervisor(answer)

    def _try(self, sequence: int, op: Op, deadline_s: float, change: Change | None = None) -> None:
        """Begin a job that is to tidy up; without a process for it nothing has begun, and the log says so."""
        try:
            self._begin(sequence, op, deadline_s, change)
        except XenvmError as error:
            with suppress(XenvmError):
                self._acts.append("refused", op=op.value, why=error.message[:200])

    def _pass_on(self, work: Work, done: Done) -> None:
        if work.answer:
            self._to_supervisor(work.answer)
            return
        if work.op is not Op.CONSOLE:
            self._to_supervisor(told(work, done, self._known(), self._grants.uuid, self._book))
            return
        try:
            self._hand_over(work.sequence, host.open_console(done.text))
        except XenvmError as error:
            self._to_supervisor(failed(work.sequence, error, done.domain))

    def _learn(self, domain: Domain) -> None:
        if domain.state is DomainState.ABSENT:
            self._set_phase(VmPhase.ABSENT, -1)
        elif domain.phase is Phase.BUILT:
            self._set_phase(VmPhase.BUILT, domain.domid)

    def _set_phase(self, phase: VmPhase, domid: int) -> None:
        self._phase, self._domid = phase, domid
        self._uevents.follow(domid)
