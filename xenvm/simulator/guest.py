# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated guest: does what its kernel command line says, in its own time, as far as it gets processor time.

It sees the host as a real guest does: its console, its own part of xenstore with a guest's rights, and the ends of its
devices. The words of the command line are those of the lab's test guest and a few more:

    xenvm.mode=normal|panic|reboot|poweroff|deaf|crashloop|watchdog|hang    what it does, after three ticks
    xenvm.tick_ms=N       time between ticks (1000)
    xenvm.boot_ms=N       time until it is up (20)
    xenvm.obey_ms=N       time it takes to shut down or suspend when asked (10)
    xenvm.refuse=vbd,vif  kinds of devices for which it has no driver
    xenvm.keep=vbd,vif    kinds of devices that it does not let go
    xenvm.garbage=N       nodes of its own that it fills with garbage at each tick
    xenvm.flood=N         lines on the console, and writes to xenstore, at each tick
    mem=N[M]              below 32 MiB it crashes at once, as Linux does
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Final

    from xenvm.simulator.console import Console
    from xenvm.simulator.loop import Loop, Timer
    from xenvm.simulator.xenstored import Watcher, Xenstored

POWEROFF, REBOOT, SUSPEND, CRASH, WATCHDOG = 0, 1, 2, 3, 4  # xen/sched.h
REQUESTS: Final = {b"poweroff": POWEROFF, b"halt": POWEROFF, b"reboot": REBOOT, b"suspend": SUSPEND}
TICKS: Final = 3  # before it does what its mode says
LEAST_MIB: Final = 32
INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = 1, 2, 3, 4, 5, 6
ACTIONS: Final = {"panic": CRASH, "reboot": REBOOT, "poweroff": POWEROFF, "watchdog": WATCHDOG}
GARBAGE: Final = (b"", b"\xff" * 64, b"-1", b"4294967296", b"/local/domain/0/name", b"../../x", b"%s%n", b"6\n")
LINE_LIMIT_BYTES: Final = 4096


class Clock:
    """Time as a guest has it: it stands still while the guest is paused."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._running = False
        self._pending: list[tuple[float, Callable[[], None]]] = []
        self._timers: dict[Timer, Callable[[], None]] = {}

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after so many seconds of the guest's time."""
        if not self._running:
            self._pending.append((seconds, act))
            return

        def fire() -> None:
            del self._timers[timer]
            act()

        timer = self._loop.after(seconds, fire)
        self._timers[timer] = act

    def go(self) -> None:
        """Let time pass."""
        self._running = True
        pending, self._pending = self._pending, []
        for seconds, act in pending:
            self.after(seconds, act)

    def stop(self) -> None:
        """Let time stand still."""
        self._running = False
        now = self._loop.now()
        for timer, act in self._timers.items():
            timer.cancel()
            self._pending.append((max(0.0, timer.due_s - now), act))
        self._timers.clear()

    def end(self) -> None:
        """Let nothing happen any more."""
        self.stop()
        self._pending.clear()


class Guest:
    """One guest, from its first instruction to its end."""

    def __init__(
        self,
        loop: Loop,
        store: Xenstored,
        console: Console,
        domid: int,
        state: Mapping[str, object],
        off: Callable[[int], None],
    ) -> None:
        """Prepare; nothing happens before `go`. `off` is told the reason of a shutdown.

        The `state` is a command line, or what the `state` of a guest was that had been suspended.
        """
        self._store, self._console, self._domid, self._off = store, console, domid, off
        self._clock = Clock(loop)
        self._home = f"/local/domain/{domid}"
        self._cmdline = str(state["cmdline"])
        self._words = dict(word.partition("=")[::2] for word in self._cmdline.split())
        self._mode = self._words.get("xenvm.mode", "normal")
        self._tick_s = self._milliseconds("xenvm.tick_ms", 1000)
        self._flood, self._garbage = self._number("xenvm.flood", 0), self._number("xenvm.garbage", 0)
        ticks = state.get("ticks", 0)
        self._ticks = ticks if isinstance(ticks, int) else 0
        self._watches: list[Watcher | None] = []
        self._up = False
        self._line = bytearray()
        memory = re.match(r"(\d+)M?$", self._words.get("mem", ""))
        if "ticks" in state:
            self._clock.after(0, self._wake)
        elif self._mode == "crashloop" or (memory and int(memory[1]) < LEAST_MIB):
            self._clock.after(0.01, lambda: self._end(CRASH))
        elif self._mode != "hang":
            self._clock.after(self._milliseconds("xenvm.boot_ms", 20), self._boot)

    def _number(self, word: str, default: int) -> int:
        text = self._words.get(word, "")
        return int(text) if text.isascii() and text.isdigit() else default

    def _milliseconds(self, word: str, default: int) -> float:
        return self._number(word, default) / 1000

    def _has(self, word: str, kind: str) -> bool:
        return kind in self._words.get(word, "").split(",")

    # Life

    def go(self) -> None:
        """Let the guest run."""
        self._clock.go()
        if self._up:
            for path in (f"{self._home}/control/shutdown", f"{self._home}/device"):
                self._clock.after(0, lambda path=path: self._changed(path))  # type: ignore[misc]

    def stop(self) -> None:
        """Take the processors from it."""
        self._clock.stop()

    def end(self) -> None:
        """End it, as a power cut does. Works twice."""
        self._clock.end()
        for watch in self._watches:
            if watch:
                self._store.unwatch(watch)
        self._watches.clear()
        self._up = False

    def _end(self, reason: int) -> None:
        self.end()
        self._off(reason)

    @property
    def state(self) -> dict[str, object]:
        """What a save image holds of it."""
        return {"cmdline": self._cmdline, "ticks": self._ticks}

    def _boot(self) -> None:
        self._console.say("Linux version 6.1.0 (a simulated guest)")
        self._listen()
        self._clock.after(0, self._user_space)

    def _wake(self) -> None:
        """Go on in another domain than the one that was saved: xenstore and the devices are new there."""
        self._listen()
        self._clock.after(self._tick_s, self._tick)

    def _listen(self) -> None:
        self._up = True
        for node in ("feature-poweroff", "feature-reboot", "feature-suspend"):
            self._store.write(self._domid, f"{self._home}/control/{node}", "1")
        for path in (f"{self._home}/control/shutdown", f"{self._home}/device"):
            self._watches.append(self._store.watch(self._domid, path, self._soon))
            self._changed(path)

    def _user_space(self) -> None:
        self._console.say(f"GUEST-UP {self._milliseconds('xenvm.boot_ms', 20):.2f}")
        self._tick()

    def _tick(self) -> None:
        self._ticks += 1
        self._console.say(f"tick {self._ticks}")
        for number in range(self._flood):
            self._console.say(f"flood {number} " + "x" * 64)
            self._store.write(self._domid, f"{self._home}/data/flood-{number}", b"x" * 64)
        for number in range(self._garbage):
            self._write_garbage(self._ticks + number)
        if self._ticks >= TICKS and self._mode in ACTIONS:
            self._end(ACTIONS[self._mode])
        else:
            self._clock.after(self._tick_s, self._tick)

    def _write_garbage(self, turn: int) -> None:
        value = GARBAGE[turn % len(GARBAGE)]
        for node in (
            "control/shutdown",
            "control/feature-suspend",
            "data",
            "attr",
            "error",
            "drivers",
            "control/sysrq",
        ):
            self._store.write(self._domid, f"{self._home}/{node}", value)
        for kind, device in self._devices():
            front = f"{self._home}/device/{kind}/{device}"
            for node in ("state", "backend", "backend-id"):
                self._store.write(self._domid, f"{front}/{node}", value)

    # What the host asks

    def _soon(self, path: str) -> None:
        """Look when the guest has its turn: a watch fires in the middle of somebody else's request."""
        self._clock.after(0, lambda: self._changed(path))

    def _changed(self, path: str) -> None:
        if not self._up:
            return
        if path.startswith(f"{self._home}/device"):
            self._connect_devices()
            return
        word = self._store.read(self._domid, f"{self._home}/control/shutdown")
        reason = REQUESTS.get(word or b"")
        if reason is None:
            return
        self._store.write(self._domid, f"{self._home}/control/shutdown", "")
        if self._mode != "deaf":
            act = self._off if reason == SUSPEND else self._end
            self._clock.after(self._milliseconds("xenvm.obey_ms", 10), lambda: act(reason))

    def _devices(self) -> list[tuple[str, str]]:
        return [
            (kind, device) for kind in ("vbd", "vif") for device in self._store.names(f"{self._home}/device/{kind}")
        ]

    def _connect_devices(self) -> None:
        """Do what blkfront and netfront do for each device: follow the backend's state."""
        for kind, device in self._devices():
            if self._has("xenvm.refuse", kind):
                continue
            front = f"{self._home}/device/{kind}/{device}"
            backend = f"/local/domain/0/backend/{kind}/{self._domid}/{device}"
            ours = self._store.read(self._domid, f"{front}/state")
            theirs = self._store.read(self._domid, f"{backend}/state")
            if (theirs, ours) == (b"2", b"1"):
                self._store.write(self._domid, f"{front}/state", str(INITIALISED if kind == "vbd" else CONNECTED))
            elif (theirs, ours) == (b"4", b"3"):
                self._store.write(self._domid, f"{front}/state", str(CONNECTED))
            elif theirs == b"5" and ours in (b"3", b"4") and not self._has("xenvm.keep", kind):
                self._store.write(self._domid, f"{front}/state", str(CLOSED))

    def backend_changed(self) -> None:
        """Hear that a backend of this domain has another state (a frontend watches that)."""
        if self._up:
            self._clock.after(0, self._connect_devices)

    # Console

    def typed(self, data: bytes) -> None:
        """Take what was typed: a line `echo WORDS` is answered, `poweroff`, `reboot` and `panic` are done."""
        if self._up:
            self._clock.after(0, lambda: self._typed(data))

    def _typed(self, data: bytes) -> None:
        self._console.write(data.replace(b"\r", b"\r\n"))
        self._line += data.replace(b"\r", b"\n")
        while b"\n" in self._line:
            line, _, rest = bytes(self._line).partition(b"\n")
            self._line = bytearray(rest)
            words = line.decode("ascii", "replace").split()
            if words[:1] == ["echo"]:
                self._console.say(" ".join(words[1:]))
            elif len(words) == 1 and words[0] in ACTIONS:
                reason = ACTIONS[words[0]]
                self._clock.after(0, lambda reason=reason: self._end(reason))  # type: ignore[misc]
        del self._line[:-LINE_LIMIT_BYTES]
