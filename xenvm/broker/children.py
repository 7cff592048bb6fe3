# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes of the broker: started, watched by pidfd, ended, reaped."""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import os
import select
import time

from xenvm.boundary.place import HERE
from xenvm.boundary.spawn import signal_name, spawn
from xenvm.context import suppress
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from xenvm.boundary.frames import Channel
    from xenvm.boundary.messages import Hello
    from xenvm.boundary.privileges import Role

END_WAIT_MS: Final = 5000
CHANNEL_THERE: Final = 3


class Child:
    """One running child; its channel is its descriptor 3."""

    def __init__(self, role: Role, log: int, extra: Mapping[int, int], *arguments: str) -> None:
        """Start a child of `role` whose output goes to the descriptor `log`; raise XenvmError when that cannot be."""
        self.role = role
        self.pid = self.pidfd = -1
        self._channel: Channel | None = None
        null = -1
        ends: tuple[socket.socket, ...] = ()
        try:
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            descriptors = {0: null, 1: log, 2: log, CHANNEL_THERE: ends[1].fileno(), **extra}
            self.pid = spawn(role, descriptors, *arguments, *HERE.words)
            self.pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            if self.pid > 0:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            for end in ends[:1]:
                end.close()
            raise XenvmError(
                f"cannot start the {role}: {error.strerror or error}",
                hint="has the host run out of memory, processes or descriptors?",
            ) from error
        finally:
            for end in ends[1:]:
                end.close()
            if null >= 0:
                os.close(null)
        self._socket = ends[0]
        self.status: int | None = None
        self.greeted_s = 0.0
        """When it has said that it is confined, and can begin (monotonic); 0: not yet."""

    @property
    def channel(self) -> Channel:
        """The channel to the child, made when first used: a child can start before all is imported here."""
        if self._channel is None:
            from xenvm.boundary.frames import Channel  # noqa: PLC0415

            self._channel = Channel(self._socket)
        return self._channel

    def greets(self, hello: Hello) -> bool:
        """Tell whether this is the one greeting of this very child."""
        honest = hello.pid == self.pid and hello.role == self.role.value and not self.greeted_s
        self.greeted_s = time.monotonic()
        return honest

    def ended(self) -> bool:
        """Tell whether the child has ended, and reap it then."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is not None

    def lost(self) -> bool:
        """Tell whether the child was ended, or stands still: somebody has stopped it, and then it is ended here.

        This is for children that live as long as the monitor; one with a job has a deadline.
        """
        if self.pidfd >= 0 and self.status is None:
            with suppress(ChildProcessError):  # it has ended by itself, which its pidfd tells
                if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG):
                    self.end()
        return self.pidfd < 0

    def how(self) -> str:
        """Say how it ended."""
        if self.status is None:
            return "is running"
        if os.WIFSIGNALED(self.status):
            return f"died of {signal_name(os.WTERMSIG(self.status))}"
        return f"ended with status {os.waitstatus_to_exitcode(self.status)}"

    def end(self, grace_ms: int = 0) -> None:
        """Wait `grace_ms` milliseconds for the child to end, then kill it; reap it, close what is ours. Works twice."""
        if self.pidfd < 0:
            return
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if not self.ended() and not (grace_ms and poll.poll(grace_ms)):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            poll.poll(END_WAIT_MS)
        self.ended()
        self._socket.close()
        os.close(self.pidfd)
        self.pidfd = -1
