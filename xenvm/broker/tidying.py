# SPDX-License-Identifier: GPL-2.0-or-later
"""Removing what dead helpers have left, before anybody hears of it."""

from __future__ import annotations

import os
import time

from xenvm.boundary.machine import EndModel
from xenvm.boundary.messages import DomainState, Done, Failed, Job, Op, Phase, Ready
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.broker.phases import PERMITS
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.messages import Grants
    from xenvm.broker.actlog import ActLog
    from xenvm.broker.book import Book
    from xenvm.broker.models import Models
    from xenvm.broker.work import Work


def in_vain(work: Work) -> bool:
    """Tell whether it is of no use to look what a failed job has left.

    That is when nobody has touched the domain yet, or when the look, which removes what is half there, would only meet
    what the job has met.
    """
    if work.op is Op.DESTROY:
        return work.result is not None or time.monotonic() >= work.end
    return work.op is Op.REBUILD and work.waits_for_kernel


def left_nothing(work: Work) -> bool:
    """Tell whether a builder has said itself that it failed, after it has removed what it had made."""
    failed_in_words = isinstance(work.result, Failed) and work.result.domain.phase is not Phase.BUILDING
    return failed_in_words and (work.created or work.op is not Op.REBUILD)


AGAIN: Final = frozenset({Op.BUILD, Op.DESTROY})
"""What may be begun once more, for the same request."""


def once_more(work: Work, made: Done | None, *, absent: bool) -> Op | None:
    """Return what to do once more for a job that has failed, since nobody would ask for it again.

    A guest's own reboot that has lost its domain; the end of a domain that is still whole, because its builder died
    before it had begun.
    """
    if made or work.repeats:
        return None
    if work.op is Op.REBUILD and absent and not left_nothing(work):
        return Op.BUILD
    return Op.DESTROY if work.op is Op.DESTROY and work.result is None and time.monotonic() < work.end else None


def look_again(grants: Grants, log: int, acts: ActLog, models: Models) -> Done | Failed | None:
    """Have a fresh builder remove what is half there, and say what is left; None when it gave no answer.

    Without one the record in xenstore lets the next look or start do it. The device model of a domain that is half
    there ends on the way.
    """
    builder = Child(Role.BUILDER, log, {}, grants.uuid)
    acts.append("job", op="find", domid=-1, pid=builder.pid)
    end = time.monotonic() + PERMITS[Op.DESTROY].deadline_s
    try:
        builder.channel.send(Job(Op.FIND, grants.uuid, -1, grants))
        while (received := builder.channel.receive(deadline_s=max(0.0, end - time.monotonic()))) is not None:
            message, descriptors = received
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(message, EndModel):
                models.end(message.domid, message.server)
                builder.channel.send(Ready(()))
            elif isinstance(message, Done | Failed):
                acts.append("result", op="find", result=type(message).__name__)
                return message
    except XenvmError as error:
        acts.append("result", op="find", result=error.message[:200])
    finally:
        builder.end(grace_ms=2000)
    return None


def what_is_left(work: Work, answer: Done | Failed | None, before: int, book: Book) -> Done | None:
    """Note what a failed build or destroy has left, which `look_again` has found.

    A domain that is whole is never touched: return the answer that the job would have had if all is as it wanted: a new
    domain, one to be adopted, none after a destroy. `before` is the domain that there was.
    """
    if not isinstance(answer, Done):
        return None
    book.seen(answer.devices)
    absent = answer.domain.state is DomainState.ABSENT
    if absent or work.created:
        book.domain_gone(for_good=absent and not book.saved)
    served = work.created and any(state.server for state in answer.devices)  # by servers that have been ended
    as_wanted = absent if work.op is Op.DESTROY else answer.domain.domid not in (-1, before)
    return answer.but(sequence=work.sequence) if as_wanted and not served else None
