# SPDX-License-Identifier: GPL-2.0-or-later
"""Removing what dead helpers have left, before anybody hears of it."""

from __future__ import annotations

import os
import time

from xenvm.boundary.machine import EndModel
from xenvm.boundary.messages import DomainState, Done, Failed, Job, Op, Ready
from xenvm.broker.phases import PERMITS
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.messages import Grants
    from xenvm.broker.actlog import ActLog
    from xenvm.broker.book import Book
    from xenvm.broker.children import Child
    from xenvm.broker.models import Models
    from xenvm.broker.work import Work


def look_again(builder: Child, grants: Grants, acts: ActLog, models: Models) -> Done | Failed | None:
    """Have a fresh builder remove what is half there, and say what is left; None when it gave no answer.

    The device model of a domain that is half there ends on the way.
    """
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
    """Note what a failed build has left, which `look_again` has found.

    A domain that is whole is never touched: return the answer that the job would have had if it is a new one, or one to
    be adopted. A failure is logged, and the record in xenstore lets the next look or start retry. `before` is the
    domain that there was.
    """
    if not isinstance(answer, Done):
        return None
    book.seen(answer.devices)
    absent = answer.domain.state is DomainState.ABSENT
    if absent or work.created:
        book.domain_gone(for_good=absent)
    served = work.created and any(state.server for state in answer.devices)  # by servers that have been ended
    return None if served or answer.domain.domid in (-1, before) else answer.but(sequence=work.sequence)
