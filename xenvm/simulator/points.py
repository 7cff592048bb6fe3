# SPDX-License-Identifier: GPL-2.0-or-later
"""The points of an operation at which a fault can strike: the instants before each effect on the simulated host.

What a process does between two effects nobody else can see, and so whatever ends it there leaves the same behind. An
effect is a call of the machine that changes something, or a change of xenstore that others can see: outside of a
transaction, or its end. They are numbered as they come; tests have one of them wait, and meanwhile do their worst.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NAMES_LIMIT = 4096


class Points:
    """Counts effects, and holds one of them."""

    def __init__(self) -> None:
        self._hold, self._exempt = -1, 0
        self.names: list[str] = []
        """The effects since the last `arm`, in their order."""
        self.pid = 0
        """Whose effect is held; 0: none is."""
        self._held: Callable[[], None] | None = None

    def arm(self, number: int, exempt: int) -> None:
        """Count anew, and hold the effect of this number, from 1; 0 holds none. `exempt` is a pid that does not count.

        With -1 nothing is counted. What was held goes on.
        """
        self.let_go()
        self._hold, self._exempt = number, exempt
        self.names.clear()

    def pass_by(self, name: str, pid: int, act: Callable[[], None]) -> None:
        """Let `act` happen, which has an effect: at once, or when it is let go."""
        if self._hold >= 0 and pid != self._exempt and len(self.names) < NAMES_LIMIT:
            self.names.append(name)
            if len(self.names) == self._hold:
                self._held, self.pid = act, pid
                return
        act()

    def let_go(self) -> None:
        """Let happen what is held, unless whoever wanted it is gone."""
        act, self._held, self.pid = self._held, None, 0
        if act:
            act()
