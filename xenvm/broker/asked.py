# SPDX-License-Identifier: GPL-2.0-or-later
"""How often a supervisor may ask for what, and what becomes of what it may not."""

from __future__ import annotations

import time

from xenvm.broker.phases import PERMITS, WITH_ARGUMENTS
from xenvm.broker.work import failed
from xenvm.errors import ExitCode, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.messages import Domain, Failed, Op
    from xenvm.broker.actlog import ActLog
    from xenvm.broker.phases import VmPhase

REFUSALS_PER_MINUTE: Final = 120


def allow(times: list[float], per_minute: int) -> bool:
    """Tell whether the last minute had fewer than `per_minute` events, and count one more then."""
    now = time.monotonic()
    while times and times[0] < now - 60:
        times.pop(0)
    if len(times) >= per_minute:
        return False
    times.append(now)
    return True


class Asked:
    """The requests of the last minute."""

    def __init__(self) -> None:
        self._times: dict[Op, list[float]] = {op: [] for op in PERMITS}

    def allow(self, op: Op) -> bool:
        """Tell whether the last minute leaves room for one more, and count it then."""
        return allow(self._times[op], PERMITS[op].per_minute)

    def permit(self, op: Op, phase: VmPhase, *, plain: bool) -> None:
        """Count a request; raise XenvmError when it is not legal now, comes too often, or lacks its arguments."""
        permit = PERMITS.get(op) if not plain or op not in WITH_ARGUMENTS else None
        if permit is None or phase not in permit.phases:
            raise XenvmError(f"{op} is not possible while the domain is {phase}", code=ExitCode.WRONG_STATE)
        if not self.allow(op):
            raise XenvmError(f"{op} was asked for more than {permit.per_minute} times a minute")


class Refusals:
    """What was refused: a supervisor that asks for nonsense all the time does not fill the log of acts with it."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._missed = 0

    def answer(self, acts: ActLog, sequence: int, op: Op, error: XenvmError, domain: Domain) -> Failed:
        """Return the answer, and log it; those above the limit are counted, and told of with the next."""
        if allow(self._times, REFUSALS_PER_MINUTE):
            more = {"missed": self._missed} if self._missed else {}
            self._missed = 0
            acts.append("refused", op=op.value, why=error.message[:200], **more)
        else:
            self._missed += 1
        return failed(sequence, error, domain)
