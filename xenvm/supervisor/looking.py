# SPDX-License-Identifier: GPL-2.0-or-later
"""When to look at the domain, and from when on the look of another monitor at the whole host serves as well."""

from __future__ import annotations

from xenvm.boundary.messages import AGE_LIMIT_MS, Failed, Op
from xenvm.errors import ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.messages import Done

PAUSE_S: Final = 1.0  # between two looks at the domain, however many others end on this host
RETRY_S: Final = 0.05  # what a builder needs at least; twice as long each time
RETRY_MOST_S: Final = 0.2
AGAIN_S: Final = 1.0  # after a look that has failed; twice as long each time
AGAIN_MOST_S: Final = 30.0
SHARE_S: Final = 2.0  # after this no other monitor is waited for


class Looking:
    """The next look. Times are monotonic; 0 stands for never."""

    def __init__(self) -> None:
        self.due_s = 0.0
        self._looked_s = 0.0
        self._since_s = 0.0  # an older look says nothing: of the newest event, or of what was last done to the domain
        self._alone = False
        self._retry_s = RETRY_S
        self._again_s = AGAIN_S
        self._end_s = 0.0  # when waiting for another monitor ends

    def soon(self, now_s: float, *, alone: bool) -> None:
        """Look soon, at most once a second however often this is said; `alone`, no other monitor's look will do."""
        self._since_s = now_s
        self._alone |= alone
        self._at(max(now_s, self._looked_s + PAUSE_S))

    def _at(self, when_s: float) -> None:
        self.due_s = min(self.due_s, when_s) if self.due_s else when_s

    def begin(self, now_s: float) -> int:
        """Return how old another monitor's look may be, in ms; -1 when this one is to look itself."""
        self.due_s, self._looked_s = 0.0, now_s
        alone = self._alone or (self._end_s and now_s >= self._end_s)
        if alone:
            self._alone, self._end_s = False, 0.0
            return -1
        return min(AGE_LIMIT_MS, int((now_s - self._since_s) * 1000))

    def failed(self, now_s: float) -> None:
        """Look again, later each time, and not by another monitor: a look that has failed says nothing of the guest."""
        self._alone = True
        self._at(now_s + self._again_s)
        self._again_s = min(2 * self._again_s, AGAIN_MOST_S)

    def put_off(self, op: Op, message: Done | Failed, now_s: float) -> bool:
        """Note an answer of the broker; tell whether it is that another monitor looks just now, and try again then."""
        if op is not Op.QUERY:
            self._since_s = now_s
            return False
        if not isinstance(message, Failed) or message.fault.code != ExitCode.BUSY:
            self._end_s = 0.0
            self._again_s = self._again_s if isinstance(message, Failed) else AGAIN_S
            return False
        if not self._end_s:
            self._retry_s, self._end_s = RETRY_S, now_s + SHARE_S
        self.due_s = max(now_s, min(now_s + self._retry_s, self._end_s))
        self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)
        return True
