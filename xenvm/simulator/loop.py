# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop of a simulated host: descriptors and timers, one thread."""

from __future__ import annotations

import heapq
import itertools
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Timer:
    """Something that happens once at a time of the monotonic clock, unless it is cancelled."""

    __slots__ = ("act", "due_s")

    def __init__(self, due_s: float, act: Callable[[], None]) -> None:
        self.due_s = due_s
        self.act: Callable[[], None] | None = act

    def cancel(self) -> None:
        """Let it not happen."""
        self.act = None


class Loop:
    """Waits, and calls whoever is concerned."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._soon: list[Callable[[], None]] = []
        self.running = True

    def watch(self, descriptor: int, act: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call `act` with the events whenever the descriptor has some; again: with another choice of events."""
        if descriptor in self._readers:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._readers[descriptor] = act

    def forget(self, descriptor: int) -> None:
        """Stop watching a descriptor, before it is closed."""
        if self._readers.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def now(self) -> float:
        """Return the time that timers go by, in seconds."""
        return time.monotonic()

    def after(self, seconds: float, act: Callable[[], None]) -> Timer:
        """Call `act` in so many seconds."""
        timer = Timer(time.monotonic() + seconds, act)
        heapq.heappush(self._timers, (timer.due_s, next(self._numbers), timer))
        return timer

    def soon(self, act: Callable[[], None]) -> None:
        """Call `act` when the present call has returned."""
        self._soon.append(act)

    def run(self) -> None:
        """Serve until `running` is False."""
        while self.running:
            for descriptor, events in self._epoll.poll(self._timeout_s()):
                act = self._readers.get(descriptor)
                if act:
                    act(events)
                self._drain()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                timer = heapq.heappop(self._timers)[2]
                if timer.act:
                    timer.act()
                self._drain()

    def _drain(self) -> None:
        while self._soon:
            self._soon.pop(0)()

    def _timeout_s(self) -> float:
        while self._timers and self._timers[0][2].act is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1
