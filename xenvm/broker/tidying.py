# SPDX-License-Identifier: GPL-2.0-or-later
"""Removing what dead helpers have left, before anybody hears of it."""

from __future__ import annotations

import time

from xenvm.boundary.messages import DomainState, Done, Failed, Job, Op, Phase
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.broker.work import ask_once
from xenvm.context import suppress
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.messages import Grants
    from xenvm.broker.actlog import ActLog
    from xenvm.broker.models import Models
    from xenvm.broker.work import Work


CLEAR_UP_S: Final = 60.0  # whoever ends the monitor waits for it: systemd ninety seconds, by default


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


def clear_up(grants: Grants, log: int, acts: ActLog, models: Models) -> None:
    """Have what is half there removed when the monitor ends over it, and nobody else would soon.

    When that fails too, the record in xenstore lets the next start of the VM do it.
    """
    why = "ended"
    with suppress(XenvmError):
        acts.append("job", op=Op.FIND.value, domid=-1)
    try:
        job = Job(Op.FIND, grants.uuid, -1, grants)
        why = type(ask_once(Child(Role.BUILDER, log, {}, grants.uuid), job, CLEAR_UP_S, models)).__name__
    except XenvmError as error:
        why = error.message[:200]
    with suppress(XenvmError):
        acts.append("result", op=Op.FIND.value, result=why)


def what_is_left(work: Work, look: Message) -> Done | None:
    """Return the answer that a failed job would have had, if the look behind it shows that all is as it wanted.

    That is a new domain, or one to be adopted, and none after a destroy. A domain that is whole is never touched; but
    the image servers of one whose builder died have ended with the job.
    """
    if not isinstance(look, Done):
        return None
    absent = look.domain.state is DomainState.ABSENT
    served = work.created and any(state.server for state in look.devices)
    as_wanted = absent if work.op is Op.DESTROY else look.domain.domid not in (-1, work.domid)
    return look.but(sequence=work.sequence) if as_wanted and not served else None
