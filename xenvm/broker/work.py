# SPDX-License-Identifier: GPL-2.0-or-later
"""One job of the broker: what was asked, who works on it, until when, and what is answered when it fails."""

from __future__ import annotations

import os
import time

from xenvm.boundary.devices import Kind
from xenvm.boundary.images import Image, Writing, Written
from xenvm.boundary.machine import EndModel, Granted, Wished
from xenvm.boundary.messages import Done, Failed, Fault, Job, Op, Ready
from xenvm.boundary.privileges import Role
from xenvm.broker import host
from xenvm.broker.children import Child
from xenvm.broker.firmware import Firmware
from xenvm.broker.images import Feed, Sink, identity, open_granted
from xenvm.broker.kernels import Kernel
from xenvm.broker.models import Launching
from xenvm.broker.phases import LEAVES_SUSPENDED, PERMITS, REBUILDING, RESTORING, SAVING
from xenvm.broker.plugging import Plugging, Wanted
from xenvm.broker.talks import Talk
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, TimeoutExpiredError, XenvmError
from xenvm.imageplace import Target
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.messages import Domain, Grants
    from xenvm.broker.actlog import ActLog
    from xenvm.broker.book import Book
    from xenvm.broker.models import Models
    from xenvm.broker.spares import Spares

ANSWERS: Final = (Image, Writing, Written, Granted, Failed)
"""What the builder hears of its partners."""
POSTPONED_LIMIT: Final = 16  # an honest supervisor asks for one thing after the other


class Change(Record):
    """What a job is about: devices to be plugged or taken away, or a save image, as an open descriptor (-1: none).

    `path` is where a new image is to be, in a directory that the host's policy opens; it is written `live`, or while
    the guest stands still. `timeout_s` is how long a guest may take. With `disc` only a disc in a CD drive is taken
    away. `unreadable` says why there is no image to start from.
    """

    wanted: Wanted = Wanted()
    gone: tuple[Kind, int] | None = None
    disc: bool = False
    force: bool = False
    timeout_s: int = 40
    image: int = -1
    path: str = ""
    live: bool = False
    unreadable: str = ""

    def job(self, op: Op, domid: int, grants: Grants, plugging: Plugging | None) -> Job:
        """Return what a builder or hotplug worker is told of it."""
        planned = plugging.planned if plugging else ()
        place = self.gone or (Kind.VBD, -1)
        return Job(
            *(op, grants.uuid, domid, grants, planned, self.wanted.vifs, *place),
            *(self.disc, self.force, self.timeout_s),
            restored=identity(self.image) if op is Op.START_RESTORED and self.image >= 0 else "",
            live=self.live,
            unreadable=self.unreadable[:200],
        )


HELPER_START_S: Final = 120.0
"""What a helper may take to come up, on a host full of booting guests; what it does then has its own time."""


def how_it_failed(work: Work) -> XenvmError:
    """Say why a job has ended without a result."""
    if work.cancelled:
        return XenvmError(f"{work.op}: cancelled")
    if time.monotonic() >= work.end and not work.builder.greeted_s:
        why = f"{work.op}: its {work.builder.role} did not come up within {HELPER_START_S + work.deadline_s:g} s"
        return XenvmError(why, hint="is this host very busy?", code=ExitCode.TIMED_OUT)
    if time.monotonic() >= work.end:
        return XenvmError(f"{work.op}: no answer within {work.deadline_s:g} s", code=ExitCode.TIMED_OUT)
    return XenvmError(f"{work.op}: its {work.builder.role} {work.builder.how()}")


class Work:
    """The one running job: what was asked, who does it, until when."""

    def __init__(self, sequence: int, op: Op, builder: Child, deadline_s: float, change: Change) -> None:
        self.sequence = sequence
        self.op = op
        self.builder = builder
        self.deadline_s = deadline_s
        self._begun_s = time.monotonic()
        self.latest = self._begun_s + deadline_s + (0.0 if builder.greeted_s else HELPER_START_S)
        self.result: Message | None = None
        self.change = change
        self.plugging: Plugging | None = None
        self.feed: Feed | Sink | None = None
        self.talk: Talk | None = None
        """With the device model of a guest that is saved, or woken after that."""
        self.created = self.cancelled = self.repeats = False
        self.answer: Message | None = None
        """What to tell at the end instead of how it went: this only tidies up behind something that failed."""
        self.domid = -1
        """The domain that there was when it was begun."""
        self.behind: tuple[Work, Failed] | None = None
        """The job that failed, and how: this looks what it has left, and removes what is half there."""
        self.held: list[int] = []
        """Descriptors that came with the request; closed with the work."""
        self.job: Job | None = None
        """What the builder has not been told yet: it waits for the kernel."""
        self.kernel: Kernel | Firmware | None = None
        self.initrd = -1
        self.place: Target | None = None
        """Where the broker itself is to give a new image its name."""
        self.late = ""
        """What its devices waited for when it ended."""

    def begin(self, domid: int, grants: Grants, log: int, spares: Spares, models: Models, acts: ActLog) -> None:
        """Open the images that the job needs, kernel first, and give the helper its job when they are ready.

        Raise XenvmError when that cannot be begun; nothing of it is left then.
        """
        self.domid, wanted = domid, self.change.wanted
        launching: Launching | None = None
        try:
            images = host.open_images(grants) if self.op in REBUILDING - RESTORING else []
            if self.op is Op.START_RESTORED:
                self.change = self.change.but(**open_granted(grants.image, acts))
                self.held += [self.change.image] if self.change.image >= 0 else []  # all others come with a request
            if self.change.path:
                self.place = Target(self.op, self.change.path)
                self.change = self.change.but(image=self.place.file)
            if images and grants.machine:
                self.kernel = Firmware(images, grants.machine[0], grants.uuid, log)
            elif images:
                self.initrd = images[1] if len(images) > 1 else -1
                self.kernel = Kernel(images[0], grants.uuid, log)
            restores = self.op in RESTORING and self.change.image >= 0
            machine = bool(grants.machine)
            launching = Launching(grants, log, incoming=restores) if machine and (images or restores) else None
            if wanted.disks or wanted.vifs or launching:
                network = spares.take(Role.NETWORK) if wanted.vifs else None
                self.plugging = Plugging(grants.uuid, log, wanted, self.change.timeout_s, network, launching)
            if restores:
                state = launching.incoming if launching else -1
                self.feed = Feed(grants.uuid, log, self.change.image, grants.memory_max_mib << 10, state)
            if models.state and self.op in LEAVES_SUSPENDED:
                self.talk = Talk(grants.uuid, log, models, saves=self.op in SAVING)
            if self.op in SAVING:
                self.feed = Sink(grants.uuid, log, self.change.image, grants)
            self.job = self.change.job(self.op, domid, grants, self.plugging)
            self.hand_over()
        except (XenvmError, OSError) as error:
            if launching and not self.plugging:
                launching.close(succeeded=False)
            self.stop()
            self.close()
            raise worded(error, f"{self.op}: cannot be begun") from error

    @property
    def children(self) -> list[Child]:
        """The processes that work on it; one that has ended and is forgotten is not among them."""
        more = [*(self.plugging.children if self.plugging else [])]
        more += self.kernel.children if self.kernel else []
        more += [partner.child for partner in (self.feed, self.talk) if partner]
        return [child for child in (self.builder, *more) if child.pidfd >= 0]

    @property
    def end(self) -> float:
        """When it has taken too long (monotonic): the helper's time for the job runs from when it can begin."""
        greeted_s = self.builder.greeted_s
        return min(self.latest, greeted_s + self.deadline_s) if greeted_s > self._begun_s else self.latest

    @property
    def meant(self) -> Op:
        """What was asked for: the job that failed, while it is looked what that has left."""
        return self.behind[0].op if self.behind else self.op

    def orphan(self) -> None:
        """Forget whom the answer was for, who has ended."""
        self.sequence, self.answer = 0, None
        if self.behind:
            self.behind[0].orphan()

    def partner(self, child: Child) -> Feed | Sink | Talk | None:
        """Return what the builder hears the answers of, if this child is one of those."""
        return next((one for one in (self.feed, self.talk) if one and one.child is child), None)

    def hand_over(self) -> None:
        """Give the builder its job as soon as the kernel is there, if it needs one."""
        job = self.job
        if job is None or (self.kernel and not self.kernel.ready):
            return
        self.job = None
        images = [*self.kernel.ready] if self.kernel else []
        images += [self.initrd] if self.initrd >= 0 else []
        if self.feed:
            images = [self.feed.pipe]
            images += [self.talk.state] if self.talk and self.op in SAVING else []
        with suppress(ProtocolError):  # it has ended already: what it said of that comes next
            self.builder.channel.send(job, images)
        if self.feed:
            self.feed.close_pipe()

    def tell(self, answer: Message | None) -> None:
        """Answer its helper in the middle of the work."""
        if answer:
            with suppress(ProtocolError, TimeoutExpiredError):  # its end, or that of its time, is dealt with as such
                self.builder.channel.send(answer)

    @property
    def waits_for_kernel(self) -> bool:
        """Tell whether the builder has not been told anything yet."""
        return self.job is not None

    def stop(self) -> None:
        """End everything that works on it; what it has opened is closed."""
        self.builder.end()
        for partner in (self.feed, self.talk):
            if partner:
                partner.close()
        if self.plugging:
            self.late = self.plugging.late
            self.plugging.close(succeeded=isinstance(self.result, Done))
            self.plugging = None
        if self.initrd >= 0:
            os.close(self.initrd)
            self.initrd = -1

    def outcome(self, known: Domain) -> Message:
        """Return what its helper has answered, or that it did not, and why; an image that is whole gets its name."""
        if self.place and isinstance(self.result, Done):
            try:
                self.place.take_over()
            except XenvmError as error:
                self.result = None
                return failed(self.sequence, error, known)
        answer = self.result or failed(self.sequence, how_it_failed(self), known)
        if (
            isinstance(answer, Failed) and answer.fault.code == ExitCode.TIMED_OUT and self.late
        ):  # its helper cannot know
            fault = answer.fault
            return answer.but(fault=fault.but(message=f"{self.late}; {fault.message}"[:4000]))
        return answer

    def abandon(self) -> None:
        """End it amid its work, and all that it holds."""
        self.stop()
        self.close()

    def close(self) -> None:
        """Close what came with the request, the place of an image, and the kernel."""
        if self.place:
            self.place.close()
            self.place = None
        if self.kernel:
            self.kernel.close()
            self.kernel = None
        for descriptor in self.held:
            os.close(descriptor)
        self.held.clear()


def ask_once(
    child: Child, message: Message, deadline_s: float, models: Models | None = None, talk: Talk | None = None
) -> Done | Failed:
    """Ask a fresh helper for one thing, wait for the answer, end it; raise XenvmError when there is none in time.

    Meanwhile `models` end as it wishes, and `talk` asks a device model for what it wishes of that.
    """
    end = time.monotonic() + deadline_s
    try:
        child.channel.send(message)
        while (received := child.channel.receive(deadline_s=max(0.0, end - time.monotonic()))) is not None:
            for descriptor in received[1]:
                os.close(descriptor)
            if isinstance(received[0], Done | Failed):
                return received[0]
            if isinstance(received[0], Wished) and talk:
                child.channel.send(talk.answer(received[0], end))
            elif isinstance(received[0], EndModel) and models:
                models.end(received[0].domid, received[0].server)
                child.channel.send(Ready(()))
        child.end(grace_ms=1000)
        raise XenvmError(f"the {child.role} worker {child.how()} without an answer")
    finally:
        child.end(grace_ms=2000)


def log_job(acts: ActLog, act: str, op: Op, urgent: bool, **details: object) -> None:
    """Log of a job; one that is `urgent`, since it lets a suspended guest run, goes on even without space for that."""
    try:
        acts.append(act, op=op.value, **details)
    except XenvmError:
        if not urgent:
            raise


def let_run(book: Book, grants: Grants, domid: int, log: int, acts: ActLog, models: Models) -> None:
    """Have a guest that a save has left suspended run on; with its monitor ending, nobody else would.

    Without space for the act log that is done all the same.
    """
    answer, why, talk = None, "", None
    try:
        with suppress(XenvmError):
            acts.append("job", op=Op.RESUME.value, domid=domid)
        talk = Talk(grants.uuid, log, models, saves=False) if models.state else None
        builder = Child(Role.BUILDER, log, {}, grants.uuid)
        answer = ask_once(builder, Job(Op.RESUME, grants.uuid, domid, grants), PERMITS[Op.RESUME].deadline_s, talk=talk)
    except XenvmError as error:
        why = error.message[:200]
    finally:
        if talk:
            talk.close()
    if isinstance(answer, Done):
        book.runs_on()
    with suppress(XenvmError):
        acts.append("result", op=Op.RESUME.value, result=type(answer).__name__ if answer else why)


def failed(sequence: int, error: XenvmError, domain: Domain) -> Failed:
    """Return the answer to a request that ended in `error`; `domain` is what is known of it."""
    return Failed(sequence, Fault(int(error.code) or 1, error.message[:4000], error.hint[:1000]), domain)


def worded(error: Exception, what: str) -> XenvmError:
    """Return an error in words; of the kernel's, say `what` it was about."""
    if isinstance(error, XenvmError):
        return error
    return XenvmError(f"{what}: {(error.strerror if isinstance(error, OSError) else '') or error}")


def forget(postponed: list[tuple[Message, list[int]]]) -> None:
    """Drop requests whose supervisor is gone: to the next one their numbers mean something else."""
    while postponed:
        for descriptor in postponed.pop(0)[1]:
            os.close(descriptor)
