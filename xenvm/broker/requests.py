# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests of a supervisor that have arguments: which job each means, about what, and what is learnt of its end."""

from __future__ import annotations

from xenvm.boundary.devices import NicGrant
from xenvm.boundary.images import Restore, Save
from xenvm.boundary.messages import Ask, DomainState, Done, Op, Plug, Rebridge, Unplug
from xenvm.broker import findings, host, images, looks, strays
from xenvm.broker.phases import LOOKED_UP, ON_DEVICES, PERMITS, REBUILDING, SAVING
from xenvm.broker.plugging import Wanted
from xenvm.broker.work import POSTPONED_LIMIT, Change
from xenvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.messages import Domain, Grants, Policy
    from xenvm.broker.actlog import ActLog
    from xenvm.broker.book import Book
    from xenvm.broker.work import Work

    Request = Plug | Unplug | Rebridge | Save | Restore

REQUESTS: Final = (Plug, Unplug, Rebridge, Save, Restore)
NO_ADDRESS: Final = "00:00:00:00:00:00"


def must_wait(work: Work | None, message: Message, postponed: int) -> bool:
    """Tell whether a request has to wait for a job that the broker does of its own accord, and not for long."""
    if not work or work.op not in (Op.SETTLE, Op.CRASH) or work.sequence or postponed >= POSTPONED_LIMIT:
        return False
    if isinstance(message, Ask):
        return message.op is not Op.DESTROY and message.op in PERMITS and PERMITS[message.op].deadline_s > 0
    return isinstance(message, REQUESTS)


def op_of(request: Request) -> Op:
    """Return the job that a request means."""
    if isinstance(request, Save):
        return Op.CHECKPOINT if request.go_on else Op.SAVE
    if isinstance(request, Restore):
        return Op.RESTORE_PAUSED if request.paused else Op.RESTORE
    return {Plug: Op.PLUG, Unplug: Op.UNPLUG, Rebridge: Op.REBRIDGE}[type(request)]


def change_of(request: Request, book: Book, grants: Grants, descriptors: list[int], acts: ActLog) -> Change:
    """Return what the job is about; raise XenvmError when it may not be."""
    timeout_s = grants.device_timeout_s
    if isinstance(request, Unplug):
        return Change(Wanted(), (request.kind, request.device), request.disc, request.force, request.timeout_s)
    if isinstance(request, Plug):
        change = Change(book.plug(request, grants, descriptors), timeout_s=timeout_s)
        acts.append("plug", devices=[part.as_body() for part in (*request.disks, *request.nics)])
        return change
    if isinstance(request, Rebridge):
        nic = NicGrant(request.device, request.bridge, NO_ADDRESS)
        return Change(Wanted((), (book.bridged(nic, grants),)), timeout_s=timeout_s)
    path = book.image_path(request, grants) if request.directory >= 0 and not descriptors else ""
    if path:
        acts.append("image", file=path)
        if isinstance(request, Save):
            return Change(path=path, timeout_s=request.timeout_s, live=request.live)
        descriptors.append(host.open_in(*path.rsplit("/", 1), read_only=True))
    if len(descriptors) != 1:
        raise UsageError("an image comes as an open descriptor")
    if isinstance(request, Restore):
        images.check_source(descriptors[0])
        if request.foreign:
            acts.append("restore-foreign")
        return Change(image=descriptors[0], timeout_s=timeout_s, force=request.foreign)
    images.check_target(descriptors[0])
    return Change(image=descriptors[0], timeout_s=request.timeout_s, live=request.live)


def succeeded(book: Book, work: Work, done: Done, grants: Grants, policy: Policy, log: int, acts: ActLog) -> None:
    """Learn from a job that has succeeded, for this monitor and others, and remove what is of no use any more."""
    note(book, work, done)
    if not work.created and work.op in LOOKED_UP:
        strays.tidy(grants.uuid, book, log, acts)
    if work.op is Op.SURVEY:
        looks.publish(work.held, done.text)
    images.restored(policy, grants, work.op, done, acts)


def note(book: Book, work: Work, done: Done) -> None:
    """Learn of devices from a job that has succeeded.

    What was plugged by command belongs to a guest that is in an image as to one that runs: it comes back with it.
    """
    if work.op is Op.PLUG:
        book.added(work.change.wanted)
    elif work.op is Op.UNPLUG and work.change.gone:
        book.removed(*work.change.gone)
    elif work.op is Op.REBRIDGE:
        book.moved(work.change.wanted.vifs[0], done.devices)
    if work.op in REBUILDING | ON_DEVICES | {Op.FIND} and not _of_none(work):
        book.seen(done.devices)
    if work.op in REBUILDING | {Op.SAVE, Op.CHECKPOINT, Op.RESUME}:
        book.saved = work.op is Op.SAVE
    if work.place and work.op is Op.SAVE:
        book.image, work.place = work.place, None
    elif work.place:
        work.place.confirm()
    elif work.op is Op.RESUME:
        book.runs_on()
    if done.domain.state is DomainState.ABSENT and work.op not in ON_DEVICES:
        book.does_not_run()
        book.domain_gone(for_good=not book.saved and work.meant is not Op.REBUILD)  # which is done once more


def _of_none(work: Work) -> bool:
    """Tell whether the devices that a job has seen are of no domain, but what one has left."""
    return work.op is Op.DEVICES and work.domid < 0


def told(work: Work, done: Done, known: Domain, uuid: str, book: Book) -> Done:
    """Return what a supervisor hears of a job: no more of its helper's words than it has to know."""
    text = done.text if work.op in ON_DEVICES | SAVING | {Op.S_STATE} else ""
    if work.op in (Op.DEVICES, Op.SETTLE, Op.FIND):
        left = strays.find(uuid, book.disks, book.servers)
        text = "\n".join(
            [*findings.of_host(), *([done.text] if _of_none(work) and done.text else []), *left.sentences()]
        )
    gone = work.op is Op.FIND and done.domain.state is DomainState.ABSENT  # and its devices with it, which were told of
    devices = () if gone else done.devices
    return Done(work.sequence, known if work.op in ON_DEVICES else done.domain, text, devices)


def undone(work: Work) -> Change:
    """Return the change that takes back a device whose hotplug worker died over it."""
    wanted = work.change.wanted
    return Change(gone=wanted.place, force=True, timeout_s=1)
