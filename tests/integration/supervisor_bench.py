# SPDX-License-Identifier: GPL-2.0-or-later
"""The real supervisor process on a test bench: its broker, its watcher and its clients are played by the test."""

import contextlib
import json
import os
import select
import socket
import struct

from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Ask,
    Domain,
    DomainState,
    Done,
    Failed,
    Fault,
    Init,
    Op,
    Phase,
    Policy,
    Watch,
    WatchEvent,
)
from xenvm.boundary.privileges import Role
from xenvm.boundary.spawn import spawn
from xenvm.errors import ExitCode

WAIT_S = 30
UUID = "11111111-2222-4333-8444-555555555555"
POLICY = Policy("started", "destroy", "reboot", "destroy", 60, 40)
FAULT = Fault(1, "it went wrong", "look into the log")
RUNNING = Domain(7, DomainState.RUNNING, Phase.BUILT, -1, 65536, 1, 5)
PAUSED = RUNNING.but(state=DomainState.PAUSED)
UNTOUCHED = PAUSED.but(cpu_time_ms=0)


def ended(reason, domid=7):
    return RUNNING.but(domid=domid, state=DomainState.SHUTDOWN, reason=reason)


class Client:
    """One connection to the command socket; `modern` ones get frames and go on."""

    def __init__(self, connection, *, modern=True):
        self.socket, self.modern, self.last = connection, modern, 0
        connection.settimeout(WAIT_S)

    def send(self, method, /, **params):
        self.last += 1
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": self.last}
        self.raw(json.dumps(request | ({"xenvm": 1} if self.modern else {})).encode())

    def raw(self, body, descriptors=()):
        frame = struct.pack(">I", len(body)) + body
        if descriptors:
            assert socket.send_fds(self.socket, [frame], list(descriptors)) == len(frame)
        else:
            self.socket.sendall(frame)

    def hand(self, descriptors, method, /, **params):
        """Send a request with descriptors."""
        self.last += 1
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": self.last, "xenvm": 1}
        self.raw(json.dumps(request).encode(), descriptors)

    def exactly(self, size):
        data = b""
        while len(data) < size and (more := self.socket.recv(size - len(data))):
            data += more
        return data

    def message(self):
        """Return the next framed message, None at the end of the connection."""
        header = self.exactly(4)
        return json.loads(self.exactly(struct.unpack(">I", header)[0])) if len(header) == 4 else None

    def reply(self):
        message = self.message()
        assert message["id"] == self.last
        return message

    def call(self, method, /, **params):
        """Return the result of a command."""
        self.send(method, **params)
        return self.reply()["result"]

    def refusal(self):
        error = self.reply()["error"]
        return ExitCode[error["data"]["name"]], error["message"], error["data"]["hint"]

    def refused(self, method, /, **params):
        self.send(method, **params)
        return self.refusal()

    def silent(self):
        return not select.select([self.socket], [], [], 0.05)[0]

    def bare(self):
        """Return what an old client reads: everything up to the end of the connection."""
        data = b""
        while more := self.socket.recv(65536):
            data += more
        return json.loads(data)


class Monitor:
    """A running supervisor; this process is its broker and its watcher."""

    def __init__(self, groups, log):
        self.broker, theirs = Channel.pair()
        self.watcher, watched = Channel.pair()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("")  # an abstract name of the kernel's choice, which every user can reach
        self.listener.listen(64)
        self.log = open(log, "w+b")  # noqa: SIM115
        null = os.open("/dev/null", os.O_RDWR)
        descriptors = {0: null, 1: self.log.fileno(), 2: self.log.fileno(), 3: theirs.fileno()}
        descriptors |= {4: self.listener.fileno(), 5: watched.fileno()}
        self.pid = spawn(Role.SUPERVISOR, descriptors, UUID)
        for end in (theirs, watched):
            end.close()
        os.close(null)
        self.groups, self.clients = groups, []
        self.hello, _ = self.broker.receive(deadline_s=WAIT_S)

    def init(self, **changes):
        init = Init(
            *(UUID, "web", "/etc/a.cfg", 64, 1, False, True, os.getpid(), self.groups["xenvm"]),
            *(self.groups["xenvm-read"], POLICY, (), {"name": "web", "memory": "64"}),
        )
        self.broker.send(init.but(**changes))
        return self

    def running(self, domain=RUNNING, **changes):
        """Have the guest found running, as after a start."""
        self.init(**changes)
        self.done(0, domain)
        assert self.asked(Op.STARTED).code == 0
        return self

    def asked(self, op):
        message, _ = self.broker.receive(deadline_s=WAIT_S)
        assert isinstance(message, Ask)
        assert message.op is op
        return message

    def asked_change(self, kind):
        """Return the next request, which is one about devices, and the descriptors that came along."""
        message, descriptors = self.broker.receive(deadline_s=WAIT_S)
        assert isinstance(message, kind)
        return message, descriptors

    def nothing_asked(self):
        return not select.select([self.broker], [], [], 0.05)[0]

    def done(self, ask, domain=NO_DOMAIN, text="", descriptors=(), devices=()):
        self.broker.send(Done(getattr(ask, "sequence", ask), domain, text, devices), descriptors)

    def failed(self, ask, fault=FAULT, domain=NO_DOMAIN):
        self.broker.send(Failed(getattr(ask, "sequence", ask), fault, domain))

    def watch(self):
        self.watcher.send(Watch(WatchEvent.RELEASED))

    def client(self, *, modern=True, **identity):
        if identity:
            connection = connect_as(self.listener.getsockname(), **identity)
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self.listener.getsockname())
        self.clients.append(connection)
        return Client(connection, modern=modern)

    def state(self):
        return self.client().call("status")["data"]

    def exit_status(self):
        """Return how the process ended, which it must."""
        pidfd = os.pidfd_open(self.pid)
        assert select.select([pidfd], [], [], WAIT_S)[0]
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status

    def close(self):
        for end in (self.broker, self.watcher, self.listener, self.log, *self.clients):
            end.close()
        if self.pid:
            assert self.exit_status() == 0


def connect_as(address, uid, gid, groups=()):
    """Return a connection that a process of another user has made."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(address)
            socket.send_fds(theirs, [b"x"], [connection.fileno()])
        os._exit(0)
    theirs.close()
    _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(child, 0)
    ours.close()
    return socket.socket(fileno=descriptor)
