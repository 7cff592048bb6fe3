# SPDX-License-Identifier: GPL-2.0-or-later
"""The real watcher process with a small xenstored at the other end of a real socket. Needs root, and no Xen."""

import contextlib
import json
import os
import select
import socket
import struct

import psutil
import pytest

from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Hello, Watch, WatchEvent
from xenvm.boundary.privileges import Role
from xenvm.boundary.spawn import spawn
from xenvm.helpers.xenstored import SOCKET_PATHS

WAIT_S = 30
HEADER = struct.Struct("=IIII")
WATCH, EVENT = 4, 15
RELEASED = HEADER.pack(EVENT, 0, 0, 23) + b"@releaseDomain\0release\0"


def exactly(connection, size):
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


class Watcher:
    """A running watcher; this process is its broker, its supervisor and xenstored."""

    def __init__(self, listener, log):
        self.broker, broker_there = Channel.pair()
        self.supervisor, supervisor_there = Channel.pair()
        self.log = log
        with log.open("wb") as written, open("/dev/null", "rb") as null:
            numbers = {0: null.fileno(), 1: written.fileno(), 2: written.fileno()}
            self.pid = spawn(Role.WATCHER, numbers | {3: broker_there.fileno(), 4: supervisor_there.fileno()}, "uuid")
        self.pidfd = os.pidfd_open(self.pid)
        broker_there.close()
        supervisor_there.close()
        self.xenstored, _ = listener.accept()
        self.xenstored.settimeout(WAIT_S)
        self.hello, _ = self.broker.receive(deadline_s=WAIT_S)
        kind, _, _, size = HEADER.unpack(exactly(self.xenstored, HEADER.size))
        self.asked = kind, exactly(self.xenstored, size)
        self.xenstored.sendall(HEADER.pack(WATCH, 1, 0, 3) + b"OK\0" + RELEASED)

    def heard(self):
        return self.supervisor.receive(deadline_s=WAIT_S)[0]

    def exit_status(self):
        assert select.select([self.pidfd], [], [], WAIT_S)[0]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self):
        for end in (self.broker, self.supervisor, self.xenstored):
            end.close()
        if select.select([self.pidfd], [], [], WAIT_S)[0]:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
        os.close(self.pidfd)


@pytest.fixture
def watcher(users, tmp_path):
    directory = os.path.dirname(SOCKET_PATHS[0])
    assert not os.path.exists(directory), "this is a Xen host: its xenstored is not to be played with"
    os.mkdir(directory)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(SOCKET_PATHS[0])
            listener.listen()
            listener.settimeout(WAIT_S)
            made = Watcher(listener, tmp_path / "log")
            yield made
            made.close()
    finally:
        os.unlink(SOCKET_PATHS[0])
        os.rmdir(directory)


def test_it_is_confined_before_it_watches(watcher):
    assert isinstance(watcher.hello, Hello)
    proof = json.loads(watcher.hello.proof)
    assert proof["uid"] != 0
    assert set(proof["capabilities"].values()) == {"0"}
    assert watcher.asked == (WATCH, b"@releaseDomain\0release\0")


def test_events_reach_the_supervisor(watcher):
    assert watcher.heard() == Watch(WatchEvent.ARMED)
    for _ in range(3):
        watcher.xenstored.sendall(RELEASED)
        assert watcher.heard() == Watch(WatchEvent.RELEASED)


def test_a_storm_of_events_is_coalesced_and_costs_no_memory(watcher):
    """The supervisor reads nothing meanwhile, and after it there is still an event for it."""
    assert watcher.heard() == Watch(WatchEvent.ARMED)
    process = psutil.Process(watcher.pid)
    before = process.memory_info().rss
    for _ in range(400):
        watcher.xenstored.sendall(RELEASED * 400)
    assert process.memory_info().rss - before < 8 << 20
    heard = 0
    while select.select([watcher.supervisor], [], [], 0.5)[0]:
        assert watcher.heard() == Watch(WatchEvent.RELEASED)
        heard += 1
    assert 0 < heard < 160_000 // 10
    watcher.xenstored.sendall(RELEASED)
    assert watcher.heard() == Watch(WatchEvent.RELEASED)


def test_it_ends_with_xenstored(watcher):
    assert watcher.heard() == Watch(WatchEvent.ARMED)
    watcher.xenstored.close()
    assert watcher.exit_status() == 1
    assert "xenstored closed the connection" in watcher.log.read_text()


def test_it_ends_with_its_broker(watcher):
    assert watcher.heard() == Watch(WatchEvent.ARMED)
    watcher.broker.close()
    assert watcher.exit_status() == 0


@pytest.mark.parametrize(
    "packet",
    [HEADER.pack(EVENT, 0, 0, 2**31), HEADER.pack(EVENT, 0, 0, 1) + b"x", HEADER.pack(16, 0, 0, 7) + b"EACCES\0"],
)
def test_a_xenstored_that_talks_nonsense_ends_it(watcher, packet):
    assert watcher.heard() == Watch(WatchEvent.ARMED)
    watcher.xenstored.sendall(packet)
    assert watcher.exit_status() == 1
    assert watcher.log.read_text().startswith("watcher uuid: ended: xenstored ")
