# SPDX-License-Identifier: GPL-2.0-or-later
"""The real hotplug worker with a xenstored that has no nodes. Needs root, and no Xen."""

import contextlib
import json
import os
import pwd
import socket
import struct
import threading

import pytest

from xenvm.boundary.devices import Kind
from xenvm.boundary.messages import NO_DOMAIN, Done, Failed, Grants, Hello, Job, Op
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.errors import ExitCode
from xenvm.helpers.xenstored import SOCKET_PATHS

WAIT_S = 60
HEADER = struct.Struct("=IIII")  # type, request, transaction, length: xen/io/xs_wire.h
DIRECTORY, READ, START, ERROR = 1, 2, 6, 16
UUID = "11111111-2222-4333-8444-555555555555"
GRANTS = Grants(*(UUID, "web", "/k", "", "", 64, 64, 1, True, (), (), False, "", (), (), 40))


class Xenstored:
    """Says of every node that it is not there, and to everything else yes; `asked` is what it was asked."""

    def __init__(self):
        self.asked = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(SOCKET_PATHS[0])
        self.listener.listen()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, contextlib.suppress(OSError):
                    while header := connection.recv(HEADER.size, socket.MSG_WAITALL):
                        kind, request, transaction, size = HEADER.unpack(header)
                        payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
                        self.asked.append((kind, payload.partition(b"\0")[0].decode()))
                        missing = kind in (READ, DIRECTORY)
                        body = b"ENOENT\0" if missing else b"1\0" if kind == START else b"OK\0"
                        head = HEADER.pack(ERROR if missing else kind, request, transaction, len(body))
                        connection.sendall(head + body)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture
def xenstored():
    directory = os.path.dirname(SOCKET_PATHS[0])
    assert not os.path.exists(directory), "this is a Xen host: its xenstored is not to be played with"
    os.mkdir(directory)
    made = Xenstored()
    yield made
    made.close()
    os.unlink(SOCKET_PATHS[0])
    os.rmdir(directory)


@pytest.fixture
def ask(users, tmp_path):
    """Give a worker a request; return its greeting, what was open, its answer and how it ended."""

    def run(message):
        log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        child = Child(Role.HOTPLUG, log, {}, "-")
        os.close(log)
        hello, _ = child.channel.receive(deadline_s=WAIT_S)
        held = []
        if isinstance(hello, Hello):
            held = [os.readlink(f"/proc/{child.pid}/fd/{name}") for name in os.listdir(f"/proc/{child.pid}/fd")]
            child.channel.send(message)
            answer, _ = child.channel.receive(deadline_s=WAIT_S)
        else:
            answer = hello
        child.end(grace_ms=WAIT_S * 1000)
        assert (tmp_path / "log").read_text() == ""
        return hello, held, answer, child.how()

    return run


def test_it_holds_xenstore_and_nothing_else(ask, xenstored):
    hello, held, answer, how = ask(Job(Op.DEVICES, UUID, 7, GRANTS))
    proof = json.loads(hello.proof)
    assert (proof["uid"], proof["seccomp"], proof["no_new_privs"]) == (pwd.getpwnam("xenvm-hotplug").pw_uid, 2, True)
    assert set(proof["capabilities"].values()) == {"0"}
    assert sum(target.startswith("socket:") for target in held) == 2  # the broker and xenstored
    assert len(held) == 5
    assert answer == Done(0, NO_DOMAIN, "", ())
    assert how == "ended with status 0"
    assert xenstored.asked == [(DIRECTORY, f"/xenvm/{UUID}/vbd"), (DIRECTORY, f"/xenvm/{UUID}/vif")]


def test_a_device_that_is_not_recorded_is_not_touched(ask, xenstored):
    _, _, answer, how = ask(Job(Op.UNPLUG, UUID, 7, GRANTS, (), (), Kind.VBD, 51712))
    assert isinstance(answer, Failed)
    assert (answer.fault.code, answer.fault.message) == (ExitCode.WRONG_STATE, "the guest has no disk 51712")
    assert how == "ended with status 1"
    assert {kind for kind, _ in xenstored.asked} == {DIRECTORY}


@pytest.mark.parametrize("message", [Done(0, NO_DOMAIN, ""), Job(Op.BUILD, UUID, 7, GRANTS)], ids=["no job", "not its"])
def test_it_does_nothing_else(ask, xenstored, message):
    _, _, answer, _ = ask(message)
    assert isinstance(answer, Failed)
    assert "hotplug worker" in answer.fault.message
    assert xenstored.asked == []


def test_without_xenstored_it_says_so(ask):
    assert not os.path.exists(SOCKET_PATHS[0])
    _, _, answer, how = ask(None)
    assert isinstance(answer, Failed)
    assert "cannot connect to xenstored" in answer.fault.message
    assert how == "ended with status 1"
