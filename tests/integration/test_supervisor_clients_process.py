# SPDX-License-Identifier: GPL-2.0-or-later
"""The command socket of the real supervisor process: old clients, rights, and clients that misbehave. Needs root."""

import contextlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import threading
import time

import pytest
from soak import memory_kib
from supervisor_bench import PAUSED, RUNNING, WAIT_S, Monitor

from xenvm.boundary.images import Progress
from xenvm.boundary.messages import Op
from xenvm.errors import ExitCode
from xenvm.supervisor.control import (
    CLIENTS_LIMIT,
    CLIENTS_PER_USER,
    GROUPS_LIMIT,
    KEPT_FOR_ROOT,
    OUTPUT_LIMIT_BYTES,
    REQUEST_WAIT_S,
)

NOBODY = 64123
INVALID_PARAMS, PARSE_ERROR = -32602, -32700
LAZY, EVENTS = 20, 6000


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log").running()
    yield made
    made.close()


# Clients of the original wire format: one bare JSON reply, then the end of the connection


@pytest.mark.parametrize("method", ["status", "get-status"])
def test_an_old_client_reads_a_bare_reply(monitor, method):
    client = monitor.client(modern=False)
    client.send(method)
    assert client.bare() == {"jsonrpc": "2.0", "result": "running", "id": 1}


def test_an_old_client_of_a_command_without_a_result(monitor):
    client = monitor.client(modern=False)
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.bare() == {"jsonrpc": "2.0", "result": None, "id": 1}


@pytest.mark.parametrize(
    ("method", "params", "text"),
    [
        ("sing", {}, "'sing': no such command"),
        ("suspend", {}, "the file comes as an open descriptor"),
        ("unpause", {}, "the VM is running"),
        ("status", {"x": "1"}, "no argument 'x'"),
        ("shutdown", {"timeout": "soon"}, "is not a time"),
        ("events", {}, 'only for clients that send "xenvm": 1'),
        ("console", {}, 'only for clients that send "xenvm": 1'),
    ],
)
def test_an_old_client_reads_a_bare_error(monitor, method, params, text):
    client = monitor.client(modern=False)
    client.send(method, **params)
    answer = client.bare()
    assert (answer["error"]["code"], answer["id"]) == (INVALID_PARAMS, 1)
    assert text in answer["error"]["message"]
    assert set(answer["error"]) == {"code", "message"}


def test_the_id_is_given_back_as_it_came(monitor):
    for identifier in (0, -5, "a", None, 2**60):
        client = monitor.client(modern=False)
        client.raw(json.dumps({"jsonrpc": "2.0", "method": "domid", "id": identifier}).encode())
        assert client.bare() == {"jsonrpc": "2.0", "result": "7", "id": identifier}


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"not JSON",
        b"[" * 60000,
        b'{"jsonrpc": "2.0", "method": "shutdown", "params": {"timeout": 5}}',
        b'{"jsonrpc": "2.0", "method": "shutdown", "params": {"force": true}, "xenvm": 1}',
    ],
    ids=lambda body: repr(body[:70]),
)
def test_a_request_that_is_none_is_refused_and_the_connection_ends(monitor, body):
    client = monitor.client(modern=False)
    client.raw(body)
    answer = client.bare()
    assert answer["error"]["code"] in (INVALID_PARAMS, PARSE_ERROR)
    assert monitor.nothing_asked()


@pytest.mark.parametrize("length", [0, 65537, 2**32 - 1])
def test_a_length_that_is_none_ends_the_connection(monitor, length):
    client = monitor.client(modern=False)
    client.socket.sendall(struct.pack(">I", length))
    assert f"not {length}" in client.bare()["error"]["message"]


def test_new_clients_may_send_the_next_request_before_the_reply(monitor):
    client = monitor.client()
    for method in ("domid", "pause", "status", "sing", "help"):
        client.send(method)
    assert client.message()["result"]["data"] == 7
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    answers = [client.message() for _ in range(4)]
    assert [answer["id"] for answer in answers] == [2, 3, 4, 5]
    assert answers[1]["result"]["data"]["state"] == "paused"
    assert answers[2]["error"]["data"] == {"name": "USAGE", "exit": 2, "hint": "xenvm-cmd help lists them"}
    assert "status" in answers[3]["result"]["data"]


# Rights, by the credentials that the kernel vouches for


def test_a_stranger_is_refused(monitor):
    for method in ("status", "pause", "help", "destroy", "quit", "events"):
        code, text, hint = monitor.client(uid=NOBODY, gid=NOBODY).refused(method)
        assert code is ExitCode.PERMISSION_REFUSED
        assert text == f"{method}: user {NOBODY} may not do this"
        assert "group xenvm" in hint
    assert monitor.nothing_asked()


@pytest.mark.parametrize("others", [None, 0, 1, GROUPS_LIMIT - 1])
def test_a_reader_reads(monitor, others):
    """The group counts whether it is the first of the user or one of many."""
    read = monitor.groups["xenvm-read"]
    identity = {"gid": read} if others is None else {"gid": NOBODY, "groups": [*range(70000, 70000 + others), read]}
    client = monitor.client(uid=NOBODY, **identity)
    assert client.call("status")["data"]["state"] == "running"
    assert client.call("domid")["data"] == 7
    assert client.call("wait", state="running")
    assert client.call("events")
    for method in ("pause", "destroy", "console", "console-log", "read-config", "quit", "start"):
        assert client.refused(method)[0] is ExitCode.PERMISSION_REFUSED
    assert monitor.nothing_asked()


def test_a_member_of_the_group_xenvm_may_do_everything(monitor):
    client = monitor.client(uid=NOBODY, gid=NOBODY, groups=[monitor.groups["xenvm"]])
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()["result"]["data"]["state"] == "paused"


def test_without_the_groups_nobody_but_root_has_rights(users, tmp_path):
    made = Monitor(users, tmp_path / "log").running(all_gid=-1, read_gid=-1)
    client = made.client(uid=NOBODY, gid=users["xenvm"], groups=[users["xenvm-read"]])
    assert client.refused("status")[0] is ExitCode.PERMISSION_REFUSED
    assert made.client().call("status")["data"]["state"] == "running"
    made.close()


def test_a_user_of_more_groups_than_can_be_asked_for_has_fewer_rights_and_not_more(monitor):
    groups = [*range(70000, 70000 + GROUPS_LIMIT), monitor.groups["xenvm"]]
    client = monitor.client(uid=NOBODY, gid=NOBODY, groups=groups)
    assert client.refused("pause")[0] is ExitCode.PERMISSION_REFUSED


# Clients that misbehave


def test_a_client_that_does_not_read_is_dropped_and_hurts_nobody(monitor):
    slow, other = monitor.client(), monitor.client()
    slow.socket.settimeout(0.2)
    sent = 0
    with pytest.raises(OSError):
        while sent < 100 * OUTPUT_LIMIT_BYTES:
            slow.send("help")
            sent += 100
            assert sent % 5000 or other.call("status")["data"]["state"] == "running"
    assert other.call("status")["data"]["state"] == "running"
    slow.socket.settimeout(WAIT_S)
    read = 0
    try:
        while more := slow.socket.recv(1 << 20):
            read += len(more)
    except ConnectionResetError:
        pass
    assert read < 4 * OUTPUT_LIMIT_BYTES


def test_readers_of_events_that_do_not_read(monitor):
    """They lose their connection once a MiB waits for each, not the monitor its memory; the others get every event."""
    good, asking, lazy = monitor.client(), monitor.client(), [monitor.client() for _ in range(LAZY)]
    for one in (good, *lazy):
        one.call("events")
    heard = []

    def listen():
        while len(heard) < EVENTS and (message := good.message()):
            heard.append(message["params"]["done_kib"])

    reading = threading.Thread(target=listen)
    reading.start()
    before, descriptors = memory_kib(monitor.pid)[1], len(os.listdir(f"/proc/{monitor.pid}/fd"))
    most_kib = slowest_s = 0
    try:
        for number in range(1, EVENTS + 1):
            monitor.broker.send(Progress(0, "\u00e4" * 64, number, EVENTS))  # as long as the words of one can be
            if not number % 200:
                begin = time.monotonic()
                assert asking.call("status")["data"]["progress"]
                slowest_s = max(slowest_s, time.monotonic() - begin)
                most_kib = max(most_kib, memory_kib(monitor.pid)[1])
    finally:
        reading.join(WAIT_S)
    assert heard == list(range(1, EVENTS + 1))
    assert slowest_s < 1.0
    assert len(os.listdir(f"/proc/{monitor.pid}/fd")) == descriptors - LAZY
    for one in lazy:
        told = 0
        with contextlib.suppress(ConnectionResetError):
            while more := one.socket.recv(1 << 20):
                told += len(more)
        assert told < 2 * OUTPUT_LIMIT_BYTES < EVENTS * 400
    assert most_kib - before < LAZY * 1.25 * (OUTPUT_LIMIT_BYTES >> 10)
    assert memory_kib(monitor.pid)[1] - before < 4096


def test_a_request_that_never_ends_is_dropped_after_ten_seconds(monitor):
    """One byte now and then does not help; a client that waits for an answer or for events is no such one."""
    patient, watching = monitor.client(), monitor.client()
    patient.send("wait", state="paused")
    watching.call("events")
    partial, trickling = monitor.client(), monitor.client()
    begun = time.monotonic()
    partial.socket.sendall(b"\0")
    trickling.socket.sendall(struct.pack(">I", 1000))
    ends = {partial.socket: 0.0, trickling.socket: 0.0}
    while not all(ends.values()) and time.monotonic() < begun + WAIT_S:
        for connection in select.select([c for c, end in ends.items() if not end], [], [], 1.0)[0]:
            assert connection.recv(1) == b""
            ends[connection] = time.monotonic()
        if not ends[trickling.socket]:
            trickling.socket.send(b" ")
    assert all(end - begun > REQUEST_WAIT_S - 0.5 for end in ends.values())
    assert patient.silent()
    assert watching.silent()
    assert monitor.client().call("domid")["data"] == 7


def test_two_hundred_connections(monitor):
    clients = [monitor.client() for _ in range(200)]
    served = 0
    for client in clients:
        try:
            client.send("domid")
            served += client.message() is not None
        except OSError:  # closed before it could say anything
            continue
    assert served == CLIENTS_LIMIT
    for client in clients:
        client.socket.close()
    fresh = monitor.client()
    while (answer := ask_if_served(fresh)) is None:  # it has not yet seen that the others are gone
        fresh = monitor.client()
    assert answer["result"]["data"] == 7


def ask_if_served(client):
    try:
        client.send("domid")
        return client.message()
    except OSError:
        return None


def test_one_user_cannot_take_all_connections(monitor):
    clients = [monitor.client(uid=NOBODY, gid=NOBODY) for _ in range(CLIENTS_PER_USER + 5)]
    answers = [ask_if_served(client) for client in clients]
    assert sum(answer is not None for answer in answers) == CLIENTS_PER_USER
    assert monitor.client(uid=NOBODY + 1, gid=NOBODY).refused("status")[0] is ExitCode.PERMISSION_REFUSED
    assert monitor.client().call("domid")["data"] == 7


def test_all_users_together_leave_room_for_root(monitor):
    crowd = [monitor.client(uid=NOBODY + number % 5, gid=NOBODY) for number in range(5 * CLIENTS_PER_USER)]
    assert sum(ask_if_served(client) is not None for client in crowd) == CLIENTS_LIMIT - KEPT_FOR_ROOT
    assert monitor.client().call("domid")["data"] == 7


def test_descriptors_from_a_client_are_not_kept(monitor):
    other = monitor.client()
    other.call("domid")
    before = len(os.listdir(f"/proc/{monitor.pid}/fd"))
    for _ in range(20):
        client = monitor.client()
        body = json.dumps({"jsonrpc": "2.0", "method": "domid", "id": 1, "xenvm": 1}).encode()
        socket.send_fds(client.socket, [struct.pack(">I", len(body)) + body], [0, 0, 0])
        assert client.message()["result"]["data"] == 7
        client.socket.close()
    monitor.client().call("domid")
    assert len(os.listdir(f"/proc/{monitor.pid}/fd")) <= before + 2


def test_descriptors_for_a_client_that_does_not_read_are_not_kept(monitor):
    """It has asked for more than it reads; the descriptors of its consoles would be ours to hold."""
    other, slow = monitor.client(), monitor.client()
    other.call("domid")
    before = len(os.listdir(f"/proc/{monitor.pid}/fd"))
    for _ in range(300):
        slow.send("help")
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(20):
        slow.send("console-log")
    asked = 0
    while select.select([monitor.broker], [], [], 1.0)[0]:
        asked += 1
        monitor.done(monitor.asked(Op.CONSOLE_LOG), RUNNING, descriptors=[null])
    os.close(null)
    assert asked > 0
    other.call("domid")
    assert len(os.listdir(f"/proc/{monitor.pid}/fd")) <= before


def test_a_client_that_has_read_so_far_gets_its_descriptor_behind_much_else(monitor):
    client = monitor.client()
    client.call("events")
    for _ in range(20):
        assert client.call("help")["data"]
    readable, writable = os.pipe()
    client.send("console-log")
    monitor.done(monitor.asked(Op.CONSOLE_LOG), RUNNING, descriptors=[writable])
    _, (descriptor,), _, _ = socket.recv_fds(client.socket, 4096, 1)
    assert os.path.sameopenfile(descriptor, writable)
    for number in (readable, writable, descriptor):
        os.close(number)


def processor_ticks(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))


def limit_descriptors(pid, number):
    """In the name of the user that the process runs as: root may not, where it lacks a capability for that."""
    with open(f"/proc/{pid}/status") as status:
        uid, gid = (int(re.search(rf"{name}:\t(\d+)", text)[1]) for text in [status.read()] for name in ("Uid", "Gid"))
    words = ["prlimit", "--pid", str(pid), f"--nofile={number}:256"]
    subprocess.run(words, check=True, timeout=30, user=uid, group=gid, extra_groups=[])


def test_without_descriptors_it_does_not_try_for_ever_to_accept_a_client(monitor):
    client = monitor.client()
    client.call("domid")
    held = len(os.listdir(f"/proc/{monitor.pid}/fd"))
    limit_descriptors(monitor.pid, held)
    late = monitor.client()
    late.send("domid")
    client.call("domid")
    before = processor_ticks(monitor.pid)
    assert not select.select([late.socket], [], [], 2.5)[0]
    assert processor_ticks(monitor.pid) - before < 10  # of a hundred a second
    assert client.call("domid")["data"] == 7
    limit_descriptors(monitor.pid, 256)
    assert late.reply()["result"]["data"] == 7


# Clients that say at once that they will say no more: socat, nc -N


@pytest.mark.parametrize("modern", [True, False])
def test_a_client_that_only_reads_any_more_gets_its_answer(monitor, modern):
    client = monitor.client(modern=modern)
    client.send("pause")
    client.socket.shutdown(socket.SHUT_WR)
    pause = monitor.asked(Op.PAUSE)
    assert client.silent()
    before = processor_ticks(monitor.pid)
    time.sleep(1.0)
    assert processor_ticks(monitor.pid) - before < 10
    monitor.done(pause, PAUSED)
    if modern:
        assert client.reply()["result"]["data"]["state"] == "paused"
        assert client.message() is None
    else:
        assert client.bare() == {"jsonrpc": "2.0", "result": None, "id": 1}


def test_all_its_requests_are_answered_before_it_is_let_go(monitor):
    client = monitor.client()
    for method in ("pause", "domid", "help"):
        client.send(method)
    client.socket.shutdown(socket.SHUT_WR)
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    answers = [client.message() for _ in range(4)]
    assert [answer and answer["id"] for answer in answers] == [1, 2, 3, None]


@pytest.mark.parametrize("sent", [b"", b"\0\0\1"])
def test_one_that_has_asked_nothing_is_let_go(monitor, sent):
    client = monitor.client()
    client.socket.sendall(sent)
    client.socket.shutdown(socket.SHUT_WR)
    assert client.message() is None


def test_one_that_listens_for_events_hears_them(monitor):
    listening, acting = monitor.client(), monitor.client()
    listening.call("events")
    listening.socket.shutdown(socket.SHUT_WR)
    acting.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert listening.message()["params"]["state"] == "paused"
    listening.socket.close()
    acting.send("unpause")
    monitor.done(monitor.asked(Op.UNPAUSE), RUNNING)
    assert acting.message()["result"]["data"]["state"] == "paused"
    assert acting.message()["result"]["data"]["state"] == "running"


def test_one_that_goes_for_good_has_gone(monitor):
    other, client = monitor.client(), monitor.client()
    client.call("domid")
    client.send("wait", state="paused", timeout="1000")
    client.socket.shutdown(socket.SHUT_WR)
    other.call("domid")
    assert client.silent()
    before = len(os.listdir(f"/proc/{monitor.pid}/fd"))
    client.socket.close()
    end = time.monotonic() + WAIT_S
    while len(os.listdir(f"/proc/{monitor.pid}/fd")) == before and time.monotonic() < end:
        other.call("domid")
    assert len(os.listdir(f"/proc/{monitor.pid}/fd")) == before - 1


def test_half_a_connection_is_no_harm(monitor):
    client = monitor.client()
    client.send("wait", state="paused")
    client.socket.shutdown(socket.SHUT_RD)
    other = monitor.client()
    other.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert other.reply()["result"]["data"]["state"] == "paused"


# Doing nothing


def work_done(pid):
    """Return how often the process was switched to and how long it ran: it grows with any system call that sleeps."""
    with open(f"/proc/{pid}/status") as status:
        switches = [int(number) for number in re.findall(r"ctxt_switches:\t(\d+)", status.read())]
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    with open(f"/proc/{pid}/wchan") as wchan:
        return sum(switches), int(fields[11]), fields[0], wchan.read()


def test_an_idle_supervisor_does_nothing(monitor):
    idle = monitor.client()
    idle.call("events")
    other = monitor.client()
    other.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    other.reply()
    other.send("unpause")
    monitor.done(monitor.asked(Op.UNPAUSE), RUNNING)
    other.reply()
    assert monitor.state()["state"] == RUNNING.state
    settled, before = 0, work_done(monitor.pid)
    while settled < 3:  # a look each tenth of a second, until it sleeps
        select.select([], [], [], 0.1)
        now = work_done(monitor.pid)
        settled, before = (settled + 1 if now == before else 0), now
    select.select([], [], [], 3.0)
    assert work_done(monitor.pid) == before
    assert before[2] == "S"
