# SPDX-License-Identifier: GPL-2.0-or-later
"""Children of the broker that are played by a test."""

import os
from typing import ClassVar

from xenvm.boundary.frames import Channel


class FakeChild:
    """In place of a child process: `there` is its end of the channel; `die` lets it end."""

    made: ClassVar[list] = []
    greeted_s = 1.0

    def __init__(self, role, _log, _extra, *_arguments):
        self.role, self.pid, self.status = role, 1000 + len(self.made), None
        self.channel, self.there = Channel.pair()
        self.pidfd, self._alive = os.pipe()
        self.killed = False
        self.made.append(self)

    def greets(self, hello):
        return hello.pid == self.pid

    def die(self):
        if self.status is None:
            self.status = 0
            self.there.close()
            os.close(self._alive)

    def ended(self):
        return self.status is not None

    def lost(self):
        return self.pidfd < 0

    def how(self):
        return "ended with status 0"

    def end(self, grace_ms=0):
        self.killed = True
        if self.pidfd >= 0:
            self.die()
            self.channel.close()
            os.close(self.pidfd)
            self.pidfd = -1
