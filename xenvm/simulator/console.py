# SPDX-License-Identifier: GPL-2.0-or-later
"""The consoles of simulated guests: what xenconsoled does, a pseudo terminal and a log for each."""

from __future__ import annotations

import contextlib
import os
import select
import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from xenvm.simulator.loop import Loop

PENDING_LIMIT_BYTES: Final = 1 << 20  # what a domain's `limit` node says
LOG_LIMIT_BYTES: Final = 16 << 20


class Console:
    """One guest's console."""

    def __init__(self, loop: Loop, log: str) -> None:
        """Open the log; the terminal comes with `open`."""
        self._loop = loop
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._master = self._slave = -1
        self._pending = bytearray()
        self.typed: Callable[[bytes], None] = lambda _data: None

    def open(self) -> str:
        """Make the terminal and return its name."""
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)  # our own slave end stays open, else the master hangs up with each client
        os.set_blocking(self._master, False)
        self._loop.watch(self._master, self._ready)
        return os.ttyname(self._slave)

    def say(self, line: str) -> None:
        """Print a line."""
        self.write(line.encode("ascii", "replace") + b"\r\n")

    def write(self, data: bytes) -> None:
        """Print to the log and the terminal; what nobody reads is dropped beyond a limit."""
        if os.fstat(self._log).st_size < LOG_LIMIT_BYTES:
            os.write(self._log, data)
        if self._master >= 0:
            self._pending += data
            del self._pending[:-PENDING_LIMIT_BYTES]
            self._flush()

    def close(self) -> None:
        """Close both. Works twice."""
        if self._master >= 0:
            self._loop.forget(self._master)
            os.close(self._master)
            os.close(self._slave)
        if self._log >= 0:
            os.close(self._log)
        self._master = self._slave = self._log = -1

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if events & select.EPOLLIN:
            with contextlib.suppress(OSError):
                self.typed(os.read(self._master, 4096))

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._pending:
                del self._pending[: os.write(self._master, self._pending)]
        self._loop.watch(self._master, self._ready, select.EPOLLIN | (select.EPOLLOUT if self._pending else 0))
