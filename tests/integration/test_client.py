# SPDX-License-Identifier: GPL-2.0-or-later
"""xenvm-cmd and the Python API against a monitor played by this file, over real sockets, ptys and processes."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
from pathlib import Path

import pytest

from xenvm.cli import client, cmd
from xenvm.cli.client import Monitor, NoMonitorError
from xenvm.errors import (
    ExitCode,
    PermissionRefusedError,
    ProtocolError,
    TimeoutExpiredError,
    UsageError,
    XenvmError,
)

ROOT = Path(client.__file__).resolve().parents[2]
A = "aaaaaaaa-0000-4000-8000-000000000001"
A2 = "aaaaaaaa-0000-4000-8000-000000000002"
B = "bbbbbbbb-0000-4000-8000-000000000003"
STATUS = {"name": "web", "state": "running", "running": True, "domid": 7, "memory_mib": 512, "vcpus": 2}


def frame(message):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def ok(request, text="", data=None):
    return frame(
        {"jsonrpc": "2.0", "id": request["id"], "result": {"text": text, "data": {} if data is None else data}}
    )


def event(**params):
    return frame({"jsonrpc": "2.0", "method": "event", "params": params})


def failure(request, message="no", **data):
    return frame({"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32602, "message": message, "data": data}})


def exactly(connection, size):
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            return None
        data += more
    return data


class FakeMonitor:
    """Listens as the monitor of one VM; `answer(connection, request)` returns bytes to send, or None after its own."""

    def __init__(self, directory, uuid, answer):
        self.path, self.answer, self.requests, self.connections = f"{directory}/vm-{uuid}", answer, [], []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(10)
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            while header := exactly(connection, 4):
                request = json.loads(exactly(connection, struct.unpack(">I", header)[0]))
                self.requests.append(request)
                reply = self.answer(connection, request)
                if reply is not None:
                    connection.sendall(reply)

    def close(self):
        for open_socket in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()


@pytest.fixture
def directory(monkeypatch):
    path = tempfile.mkdtemp(prefix="xenvm-")  # not tmp_path: a socket's path has at most 107 characters
    monkeypatch.setenv("XENVM_SOCKET_DIR", path)
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def serve(directory):
    with contextlib.ExitStack() as stack:

        def start(answer, uuid=A):
            monitor = FakeMonitor(directory, uuid, answer)
            stack.callback(monitor.close)
            return monitor

        yield start


def raw(data, *, hang_up=True):
    """An answer of these bytes, whatever was asked."""

    def answer(connection, request):
        connection.sendall(data)
        if hang_up:
            connection.shutdown(socket.SHUT_RDWR)

    return answer


def status(**changed):
    return lambda _connection, request: ok(request, "running\n", STATUS | changed)


def silence(_connection, _request):
    return None


def passing(*descriptors):
    """An answer whose first bytes carry these descriptors."""

    def answer(connection, request):
        socket.send_fds(connection, [ok(request)], list(descriptors))

    return answer


@contextlib.contextmanager
def as_nobody():
    """Without root's right to connect to everything."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if uid == 0:
            os.seteuid(0)


def leave_socket(path):
    """A socket file as a killed monitor leaves it."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "xenvm.cli.cmd", *arguments], cwd=ROOT, stderr=subprocess.PIPE, **options
    )


# The wire


def test_request_is_exactly_what_the_wire_says(serve):
    monitor = serve(lambda _c, request: ok(request, "t", [1]))
    with Monitor.connect(A) as connected:
        first = connected.call("read-config", path="/x")
        assert (first.text, first.data, first.descriptor) == ("t", [1], None)
        connected.call("pause")
    assert monitor.requests[0] == {
        "jsonrpc": "2.0",
        "method": "read-config",
        "params": {"path": "/x"},
        "id": 1,
        "xenvm": 1,
    }
    assert [request["id"] for request in monitor.requests] == [1, 2]
    assert len(monitor.connections) == 1


def test_a_parameter_may_have_any_name(serve):
    monitor = serve(lambda _c, request: ok(request))
    assert cmd.main([A, "x", "method=1", "self=2"]) == 0
    assert monitor.requests[0]["params"] == {"method": "1", "self": "2"}


def test_reply_in_single_bytes_between_notifications(serve):
    def answer(connection, request):
        for byte in event(progress=1) + ok(request, "whole") + event(late=1):
            connection.sendall(bytes([byte]))

    serve(answer)
    with Monitor.connect(A) as connected:
        assert connected.call("status").text == "whole"


def test_several_frames_in_one_piece(serve):
    serve(lambda _c, request: event(a=1) + event(a=2) + ok(request, "x") + event(a=3))
    with Monitor.connect(A) as connected:
        assert connected.call("a").text == "x"
        assert connected.call("b").text == "x"


def test_largest_reply_is_taken(serve):
    def answer(_connection, request):
        spare = client.REPLY_LIMIT - (len(ok(request)) - 4)
        return ok(request, "x" * spare)

    serve(answer)
    with Monitor.connect(A) as connected:
        assert len(connected.call("a").text) > client.REPLY_LIMIT - 200


RESULT = b'{"jsonrpc":"2.0","id":1,"result":'
NONSENSE = {
    "too large": struct.pack(">I", client.REPLY_LIMIT + 1),
    "enormous": b"\xff\xff\xff\xff",
    "empty": struct.pack(">I", 0),
    "not JSON": frame(b"{]"),
    "not UTF-8": frame(b'{"jsonrpc":"2.0","id":1,"result":{"text":"\xff"}}'),
    "NaN": frame(RESULT + b'{"data":NaN}}'),
    "a huge number": frame(RESULT + b'{"data":' + b"9" * 5000 + b"}}"),
    "deep": frame(RESULT + b'{"data":' + b"[" * 40 + b"]" * 40 + b"}}"),
    "very deep": frame(b"[" * 500_000),
    "an array": frame(b"[]"),
    "another version": frame(b'{"jsonrpc":"1.0","id":1,"result":{"text":""}}'),
    "another id": frame(b'{"jsonrpc":"2.0","id":2,"result":{"text":""}}'),
    "an id of another type": frame(b'{"jsonrpc":"2.0","id":true,"result":{"text":""}}'),
    "no id": frame(b'{"jsonrpc":"2.0","result":{"text":""}}'),
    "no result": frame(b'{"jsonrpc":"2.0","id":1}'),
    "result and error": frame(b'{"jsonrpc":"2.0","id":1,"result":{},"error":{"message":"x"}}'),
    "result of another type": frame(RESULT + b'"text"}'),
    "text of another type": frame(RESULT + b'{"text":1}}'),
    "error of another type": frame(b'{"jsonrpc":"2.0","id":1,"error":"x"}'),
    "error without message": frame(b'{"jsonrpc":"2.0","id":1,"error":{"code":1}}'),
    "notification without params": frame(b'{"jsonrpc":"2.0","method":"event","params":[]}'),
    "bare JSON": b'{"jsonrpc": "2.0", "id": 1, "result": null}',
}


@pytest.mark.parametrize("untrusted", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_ends_the_connection(serve, untrusted):
    serve(raw(untrusted, hang_up=False))
    with Monitor.connect(A, reply_timeout_s=10) as connected:
        with pytest.raises(ProtocolError) as raised:
            connected.call("pause")
        assert "pause: " in raised.value.message
        assert A in raised.value.message
        assert raised.value.code == ExitCode.FAILED
        with pytest.raises(XenvmError, match="closed"):
            connected.call("pause")


@pytest.mark.parametrize("cut", [0, 2, 4, 20])
def test_hang_up_in_the_middle(serve, cut):
    serve(lambda connection, request: raw(ok(request, "x" * 50)[:cut])(connection, request))
    with Monitor.connect(A) as connected, pytest.raises(XenvmError, match="hung up") as raised:
        connected.call("destroy")
    assert raised.value.code == ExitCode.FAILED
    assert raised.value.hint


def test_too_large_request_is_not_sent(serve):
    monitor = serve(silence)
    with Monitor.connect(A) as connected, pytest.raises(UsageError):
        connected.call("x", a="y" * client.REQUEST_LIMIT)
    assert monitor.requests == []


def test_uuid_must_be_canonical(directory):
    with pytest.raises(UsageError):
        Monitor.connect("../vm-" + A)


# Waiting


def test_reply_timeout(serve, capsys):
    serve(silence)
    assert cmd.main(["--reply-timeout", "0.05", A, "pause"]) == ExitCode.TIMED_OUT
    assert capsys.readouterr().err.startswith(f"error: pause: no reply from monitor {A} within 0.05 s\nhint: ")


def test_own_timeout_extends_the_wait(serve):
    def late(_connection, request):
        time.sleep(0.0 if request["method"] == "events" else 0.6)
        return ok(request)

    serve(late)
    assert cmd.main(["--reply-timeout=0.3", A, "shutdown", "timeout=5"]) == 0
    assert cmd.main(["--reply-timeout=0.3", A, "wait", "running"]) == 0
    assert cmd.main(["--reply-timeout=0.3", A, "start", "timeout=soon"]) == ExitCode.TIMED_OUT


@pytest.mark.parametrize("command", ["start", "pause", "shutdown", "restart", "destroy", "reboot"])
def test_progress_starts_the_wait_anew(serve, command):
    """A monitor tells those of it who have asked for events."""
    listening = []

    def slow(connection, request):
        if request["method"] == "events":
            listening.append(connection)
            return ok(request)
        for _ in range(8):
            if connection in listening:
                connection.sendall(event(progress=1))
            time.sleep(0.1)
        return ok(request)

    serve(slow)
    timeout = ["timeout=0.1"] if command in ("shutdown", "restart", "reboot") else []
    assert cmd.main(["--reply-timeout=0.5", A, command, *timeout]) == 0


def test_who_may_not_command_hears_it_of_the_command(serve, capsys):
    serve(lambda _c, request: failure(request, f"{request['method']}: you may not", exit=8))
    assert cmd.main([A, "start"]) == ExitCode.PERMISSION_REFUSED
    assert capsys.readouterr().err == "error: start: you may not\n"


def test_progress_cannot_hold_a_client_for_ever(serve, monkeypatch):
    monkeypatch.setattr(client, "MAX_RENEWALS", 3)
    done = threading.Event()

    def endless(connection, _request):
        while not done.wait(0.01):
            connection.sendall(event(progress=1))

    serve(endless)
    with Monitor.connect(A, reply_timeout_s=0.05) as connected, pytest.raises(TimeoutExpiredError):
        connected.call("start")
    done.set()


def test_a_frame_in_drops_does_not_renew_the_wait(serve):
    done = threading.Event()

    def dripping(connection, request):
        for byte in ok(request, "x" * 500):
            if done.wait(0.02):
                return
            connection.sendall(bytes([byte]))

    serve(dripping)
    with Monitor.connect(A, reply_timeout_s=0.1) as connected, pytest.raises(TimeoutExpiredError):
        connected.call("start")
    done.set()


def test_full_queue_of_connections(directory):
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(f"{directory}/vm-{A}")
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(f"{directory}/vm-{A}")
        with pytest.raises(TimeoutExpiredError, match="accepted no connection within"):
            Monitor.connect(A, reply_timeout_s=0.05)
        assert isinstance(cmd.ask_status([A], 0.05)[A], TimeoutExpiredError)
        freeing = threading.Timer(0.05, lambda: stack.enter_context(listener.accept()[0]))
        freeing.start()
        Monitor.connect(A, reply_timeout_s=10).close()
        freeing.join()


# Exit codes


@pytest.mark.parametrize("code", [code for code in ExitCode if code != ExitCode.DONE])
def test_exit_code_of_an_error_reply(serve, capsys, code):
    serve(lambda _c, request: failure(request, "it \x1b[2J failed", name=code.name, exit=int(code), hint="try"))
    assert cmd.main([A, "pause"]) == code
    assert capsys.readouterr() == ("", "error: it \\x1b[2J failed\nhint: try\n")
    assert cmd.main([A, "pause", "--json"]) == code
    told = capsys.readouterr()
    assert json.loads(told.out) == {
        "error": {"name": code.name, "exit": int(code), "message": "it \x1b[2J failed", "hint": "try"}
    }
    assert told.err == ""
    with Monitor.connect(A) as connected, pytest.raises(XenvmError) as raised:
        connected.call("pause")
    assert raised.value.code == code


@pytest.mark.parametrize("number", [None, 0, 10, -1, True, "5", 5.0, [5], 10**30])
def test_odd_exit_number_counts_as_failed(serve, number):
    serve(lambda _c, request: failure(request, exit=number, hint=7))
    assert cmd.main([A, "pause"]) == ExitCode.FAILED


def test_error_without_data_and_with_the_id_of_no_request(serve, capsys):
    serve(raw(frame({"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "bad"}})))
    assert cmd.main([A, "pause"]) == ExitCode.FAILED
    assert capsys.readouterr().err == "error: bad\n"


@pytest.mark.parametrize(("running", "code"), [(True, 0), (False, 3), (None, 1), (1, 1)])
@pytest.mark.parametrize("command", ["status", "get-status"])
def test_status(serve, capsys, running, code, command):
    serve(status(running=running))
    assert cmd.main([A, command]) == code
    assert capsys.readouterr().out == ("running\n" if code != 1 else "")
    assert cmd.main(["--json", A, command]) == code
    assert ("error" in json.loads(capsys.readouterr().out)) == (code == 1)


def test_no_monitor(directory, capsys):
    assert cmd.main([A.upper(), "status"]) == ExitCode.NO_MONITOR
    told = capsys.readouterr().err
    assert A in told
    assert "`xenvm FILE` starts one" in told
    leave_socket(f"{directory}/vm-{A}")
    assert cmd.main([A, "status"]) == ExitCode.NO_MONITOR
    Path(directory, "plain").touch()
    with pytest.raises(NoMonitorError):
        Monitor.connect(A, socket_dir=f"{directory}/plain")
    with pytest.raises(XenvmError, match="too long"):
        Monitor.connect(A, socket_dir="/" + "x" * 200)


def test_permission_refused(serve, directory, capsys):
    os.chmod(serve(status(), A).path, 0)
    serve(status(name="db"), B)
    os.chmod(f"{directory}/vm-{B}", 0o666)
    with as_nobody():
        assert cmd.main([A, "status"]) == ExitCode.PERMISSION_REFUSED
        assert cmd.main(["db", "status"]) == 0
        assert cmd.main(["web", "status"]) == ExitCode.PERMISSION_REFUSED
        assert cmd.main(["list"]) == 0
        assert f"{A}  -     permission refused" in capsys.readouterr().out
    os.chmod(directory, 0o700 if os.geteuid() == 0 else 0)
    with as_nobody():
        assert cmd.main(["list"]) == ExitCode.PERMISSION_REFUSED
        with pytest.raises(PermissionRefusedError):
            cmd.find("web")
    os.chmod(directory, 0o755)


# Which VM


def test_find(serve, directory, capsys):
    for uuid, name in ((A, "web"), (A2, "two words"), (B, "dup")):
        serve(status(name=name), uuid)
    serve(status(name="dup"), "cccccccc-0000-4000-8000-000000000004")
    Path(directory, "vm-odd").touch()
    Path(directory, "other").touch()
    assert cmd.find("web") == A
    assert cmd.find("two words") == A2
    assert cmd.find("b") == cmd.find("BBBBBBBB-0000") == B
    for word in ("aaaaaaaa", "aa", "dup"):
        with pytest.raises(UsageError, match="several"):
            cmd.find(word)
    with pytest.raises(NoMonitorError):
        cmd.find("nothing")
    assert cmd.main(["aaaa", "destroy"]) == ExitCode.USAGE
    assert capsys.readouterr().err == f"error: aaaa stands for several VMs\nhint: give one of: {A} {A2}\n"


def test_short_prefix_that_is_another_vms_name(serve):
    serve(status(name="web"), A)
    serve(status(name="aa"), B)
    with pytest.raises(UsageError, match="several"):
        cmd.find("aa")
    assert cmd.find("aaa") == A


def test_full_uuid_asks_nobody_else(serve):
    other = serve(status(), B)
    serve(status(), A)
    assert cmd.main([A, "status"]) == 0
    assert cmd.main([A[:8], "status"]) == 0
    assert other.requests == []


def test_list(serve, directory, capsys, monkeypatch):
    monkeypatch.setattr(cmd.ask_status, "__defaults__", (0.4,))
    monkeypatch.setattr(cmd, "ASK_AT_ONCE", 2)
    serve(status(domid=None, monitor_pid=5), A)
    serve(silence, A2)
    serve(status(name="x\n\x1b", domid=True, state="run\tning", vcpus="2"), B)
    dead, cut = "cccccccc-0000-4000-8000-000000000004", "dddddddd-0000-4000-8000-000000000005"
    leave_socket(f"{directory}/vm-{dead}")
    serve(raw(b"\0\0"), cut)
    started = time.monotonic()
    assert cmd.main(["list"]) == 0
    assert time.monotonic() - started < 2
    lines = capsys.readouterr().out.splitlines()
    assert [re.split("  +", shown) for shown in lines] == [
        ["UUID", "NAME", "STATE", "DOMID"],
        [A, "web", "running", "-"],
        [A2, "-", "no answer", "-"],
        [B, "x\\x0a\\x1b", "run\\x09ning", "-"],
        [dead, "-", "no answer", "-"],
        [cut, "-", "no answer", "-"],
    ]
    assert {shown.index(lines[0][-5:]) for shown in lines[:1]} == {shown.rindex("-") for shown in lines[1:]}
    assert cmd.main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries[0] == {
        "uuid": A,
        "name": "web",
        "state": "running",
        "domid": None,
        "memory_mib": 512,
        "vcpus": 2,
        "monitor_pid": 5,
    }
    assert entries[2]["vcpus"] is None


def test_list_of_no_monitors(directory, monkeypatch, capsys):
    assert cmd.main(["list"]) == 0
    monkeypatch.setenv("XENVM_SOCKET_DIR", f"{directory}/missing")
    assert cmd.main(["list", "--json"]) == 0
    assert capsys.readouterr().out == "UUID  NAME  STATE  DOMID\n[]\n"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("status", "web"), "status"),
        (("reboot", "nobody"), "reboot"),
        (("shutdown", "web", "timeout=5"), "shutdown"),
        (("disk-del", "web", "xvda"), "disk-del"),
    ],
)
def test_the_order_of_words_that_xl_has_is_told_from_a_vm_that_is_not_there(serve, capsys, words, command):
    serve(status(name="web"))
    assert cmd.main(words) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert told.startswith(f"error: {command} is a command: the VM comes first")
    assert told.endswith(f"hint: xenvm-cmd {words[1]} {command}\n")


def test_a_vm_may_have_the_name_of_a_command(serve, capsys):
    serve(status(name="status"))
    assert cmd.main(["status", "status"]) == 0
    assert cmd.main(["pause", "status"]) == ExitCode.USAGE
    assert cmd.main(["nobody", "status"]) == ExitCode.NO_MONITOR


# Output


def test_reply_text(serve, capsys):
    serve(lambda _c, request: ok(request, "a\tb\n\x1b]0;x\x07\u202e\x9b\udc80é", {"k": "\x1b\x7f\u202e"}))
    assert cmd.main([A, "x"]) == 0
    assert capsys.readouterr().out == "a\tb\n\\x1b]0;x\\x07\\u202e\\x9b\\udc80é\n"
    assert cmd.main([A, "x", "--json"]) == 0
    assert capsys.readouterr().out == '{"k": "\\u001b\\u007f\\u202e"}\n'


def test_silent_success(serve, capsys):
    monitor = serve(lambda _c, request: ok(request))
    assert cmd.main(["--use-socket", A, "get", "vnc"]) == 0
    assert cmd.main([A, "wait", "running", "timeout=1"]) == 0
    assert capsys.readouterr() == ("", "")
    assert [request["params"] for request in monitor.requests] == [
        {"field": "vnc"},
        {"state": "running", "timeout": "1"},
    ]


def test_output_that_cannot_be_written(serve):
    serve(status())
    with open("/dev/full", "wb") as full:
        process = start(A, "status", "--json", stdout=full)
        _, told = process.communicate(timeout=20)
    assert process.returncode == ExitCode.FAILED
    assert told.startswith(b"error: cannot write the output: No space left")
    assert b"Traceback" not in told


def test_closed_standard_descriptors(serve, terminal):
    guest, passed = terminal
    serve(passing(passed))
    serve(status(), B)
    command = f'"{sys.executable}" -m xenvm.cli.cmd'
    closed = "<&- >&- 2>&-"
    script = f"{command} {B} status {closed} && {command} {B[:8]} nothing {closed} && {command} {A} console {closed}"
    assert subprocess.run(["/bin/sh", "-c", script], cwd=ROOT, timeout=20, check=False).returncode == 0
    os.set_blocking(guest, False)
    with pytest.raises(BlockingIOError):
        os.read(guest, 100)


# Events


def three_events(_connection, request):
    return event(n=0) + ok(request) + event(n=1) + event(n=2, text="\x1b")


def test_events_until_the_monitor_ends(serve, capsys):
    serve(lambda connection, request: raw(three_events(connection, request))(connection, request))
    assert cmd.main([A, "events"]) == ExitCode.NO_MONITOR
    told = capsys.readouterr()
    assert told.out == '{"n": 0}\n{"n": 1}\n{"n": 2, "text": "\\u001b"}\n'
    assert "monitor ended" in told.err


def test_events_have_no_deadline_after_the_first_reply(serve):
    def answer(connection, request):
        connection.sendall(ok(request))
        time.sleep(0.2)
        connection.sendall(event(n=1))
        connection.close()

    serve(answer)
    with Monitor.connect(A, reply_timeout_s=0.1) as connected:
        assert list(connected.events()) == [{"n": 1}]


def test_events_refuses_a_second_reply_and_a_flood(serve, monkeypatch):
    serve(lambda _c, request: ok(request) + ok(request))
    with Monitor.connect(A) as connected, pytest.raises(ProtocolError, match="twice"):
        list(connected.events())
    monkeypatch.setattr(client, "EARLY_EVENTS_LIMIT", 2)
    serve(lambda _c, request: event(n=1) * 3 + ok(request), B)
    with Monitor.connect(B) as connected, pytest.raises(ProtocolError, match="floods"):
        list(connected.events())


def test_events_ends_well_on_interrupt(serve):
    serve(three_events)
    process = start(A, "events", stdout=subprocess.PIPE)
    assert [process.stdout.readline() for _ in range(3)][1] == b'{"n": 1}\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 0


def test_events_ends_quietly_when_nobody_reads(serve):
    done = threading.Event()

    def endless(connection, request):
        connection.sendall(ok(request))
        while not done.wait(0.01):
            connection.sendall(event(n=1))

    serve(endless)
    process = start(A, "events", stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    done.set()


# Descriptors


@pytest.fixture
def terminal():
    """A pty: (the guest's side, what the monitor passes on)."""
    guest, passed = os.openpty()
    tty.setraw(passed)
    yield guest, passed
    for descriptor in (guest, passed):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def read_until(descriptor, wanted, timeout=20):
    got = b""
    while wanted not in got:
        assert select.select([descriptor], [], [], timeout)[0], got
        got += os.read(descriptor, 4096)
    return got


def test_console_between_pipes(serve, terminal):
    guest, passed = terminal
    serve(passing(passed))
    os.write(guest, b"early \x1b[1m")
    process = start(A, "console", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert b"early \x1b[1m" in read_until(process.stdout.fileno(), b"1m")
    process.stdin.write(b"root\n")
    process.stdin.flush()
    assert read_until(guest, b"root\n") == b"root\n"
    process.stdin.close()
    os.write(guest, b"late")
    assert process.stdout.read().endswith(b"late")
    assert process.wait(20) == 0
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()


def test_console_ends_with_the_guest(serve, terminal):
    guest, passed = terminal
    serve(passing(passed))
    process = start(A, "console", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    os.write(guest, b"bye")
    read_until(process.stdout.fileno(), b"bye")
    os.close(guest)
    assert process.wait(20) == 0
    assert process.stderr.read() == b"the console ended\n"
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


@pytest.mark.parametrize("how", ["escape", "SIGTERM", "guest"])
def test_console_restores_the_users_terminal(serve, terminal, how):
    guest, passed = terminal
    serve(passing(passed))
    outer, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    process = start(A, "console", stdin=inner, stdout=inner)
    os.write(guest, b"login: ")
    read_until(outer, b"login: ")
    assert not termios.tcgetattr(inner)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    os.write(outer, b"\x03x")
    assert read_until(guest, b"x") == b"\x03x"
    if how == "escape":
        os.write(outer, b"last\x1dnever")
        assert read_until(guest, b"last") == b"last"
    elif how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        os.close(guest)
    assert process.wait(20) == (128 + signal.SIGTERM if how == "SIGTERM" else 0)
    assert termios.tcgetattr(inner) == before
    process.stderr.close()
    os.close(inner)
    os.close(outer)


def test_console_log(serve, directory):
    log = Path(directory, "log")
    log.write_bytes(b"boot\r\n\x1b[1m\xff" * 20000)

    def answer(connection, request):
        with log.open("rb") as opened:
            passing(opened.fileno())(connection, request)

    monitor = serve(answer)
    process = start(A, "console", "--log", stdout=subprocess.PIPE)
    assert process.communicate(timeout=20) == (log.read_bytes(), b"")
    assert process.returncode == 0
    assert monitor.requests[0]["method"] == "console-log"


def test_console_without_a_descriptor(serve, capsys):
    serve(lambda _c, request: ok(request))
    assert cmd.main([A, "console"]) == ExitCode.FAILED
    assert "no descriptor" in capsys.readouterr().err


def test_descriptors_are_counted_and_closed(serve, terminal):
    before = set(os.listdir("/proc/self/fd"))
    serve(passing(*terminal), A)
    serve(passing(terminal[0]), B)
    for uuid, method in ((A, "console"), (B, "status")):
        with Monitor.connect(uuid) as connected, pytest.raises(ProtocolError, match="descriptor"):
            connected.call(method)
    with Monitor.connect(B) as connected:
        descriptor = connected.call("console").take_descriptor()
    assert os.isatty(descriptor)
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)
    sockets = {name for name in set(os.listdir("/proc/self/fd")) - before if is_terminal(name)}
    assert sockets == set()


def is_terminal(name):
    with contextlib.suppress(OSError):
        return os.isatty(int(name))
    return False


# Disks handed over


class Taker:
    """A monitor that keeps the descriptors that come with requests."""

    def __init__(self, directory, uuid=A):
        self.requests, self.descriptors = [], []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{directory}/vm-{uuid}")
        self.listener.listen(5)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    data = b""
                    while len(data) < 4 or len(data) < 4 + struct.unpack(">I", data[:4])[0]:
                        more, descriptors, _, _ = socket.recv_fds(connection, 65536, 4)
                        if not more:
                            break
                        data += more
                        self.descriptors += descriptors
                    if data:
                        self.requests.append(json.loads(data[4:]))
                        connection.sendall(ok(self.requests[-1], "connected"))

    def close(self):
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture
def taker(directory):
    before = len(os.listdir("/proc/self/fd"))
    made = Taker(directory)
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("words", "params", "access"),
    [
        (("disk-add", "{}:file:xvdb:w:disk"), {"type": "file", "mode": "w", "devtype": "disk"}, os.O_RDWR),
        (("disk-add", "path={}", "device=xvdb", "mode=r"), {"mode": "r"}, os.O_RDONLY),
        (("cd-insert", "path={}", "device=xvdb"), {}, os.O_RDONLY),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_disk_goes_along_with_its_request(taker, tmp_path, capsys, words, params, access):
    """Opened here, with the rights of the caller, and as its mode says; the monitor opens nothing by this name."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"the very file")
    assert cmd.main([A, *(word.format(path) for word in words)]) == ExitCode.DONE
    assert capsys.readouterr().out == "connected\n"
    (request,), (descriptor,) = taker.requests, taker.descriptors
    assert (request["method"], request["xenvm"]) == (words[0], 1)
    assert request["params"] == {"path": str(path), "device": "xvdb"} | params
    assert os.pread(descriptor, 100, 0) == b"the very file"
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == access


def test_a_disk_that_cannot_be_opened_is_not_asked_for(taker, tmp_path, capsys):
    assert cmd.main([A, "disk-add", f"{tmp_path}/none:file:xvdb:w:disk"]) == ExitCode.FAILED
    assert "cannot open" in capsys.readouterr().err
    assert cmd.main([A, "disk-add", "device=xvdb"]) == ExitCode.USAGE
    assert cmd.main([A, "domid"]) == ExitCode.DONE
    assert [request["method"] for request in taker.requests] == ["domid"]


def test_a_disk_that_nobody_takes_is_closed(directory, tmp_path):
    """The monitor is gone, or its reader, or the request is too long to be sent."""
    before = len(os.listdir("/proc/self/fd"))
    for failing in ("closed", "too long", "unused"):
        ours, theirs = socket.socketpair()
        monitor = Monitor(A, ours, 5.0)
        monitor.handed = os.open(tmp_path, os.O_RDONLY)
        if failing == "closed":
            theirs.close()
        with monitor, contextlib.suppress(XenvmError):
            if failing != "unused":
                monitor.call("disk-add", path="x" * (100_000 if failing == "too long" else 1))
        theirs.close()
        assert monitor.handed is None
    assert len(os.listdir("/proc/self/fd")) == before


# Batches


def batch(monkeypatch, text, *options):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode())))
    return cmd.main([*options, A, "-"])


def test_a_batch_is_one_connection(serve, monkeypatch, capsys):
    monitor = serve(lambda _c, request: ok(request, f"did {request['method']}", {"running": True}))
    assert batch(monkeypatch, "status\n\n# not this\n  get field=name  \nget 'na me'\nwait running timeout=5") == 0
    assert [(request["method"], request["params"]) for request in monitor.requests] == [
        ("status", {}),
        ("get", {"field": "name"}),
        ("get", {"field": "na me"}),
        ("wait", {"state": "running", "timeout": "5"}),
    ]
    assert len(monitor.connections) == 1
    assert capsys.readouterr().out == "did status\ndid get\ndid get\ndid wait\n"


def test_an_error_ends_a_batch(serve, monkeypatch, capsys):
    monitor = serve(lambda _c, request: failure(request, exit=5) if request["method"] == "pause" else ok(request))
    assert batch(monkeypatch, "unpause\npause\ndestroy\n") == ExitCode.WRONG_STATE
    assert [request["method"] for request in monitor.requests] == ["unpause", "pause"]
    assert capsys.readouterr().err.startswith("error: line 2: ")


def test_a_status_that_is_not_0_does_not_end_a_batch_and_is_kept(serve, monkeypatch, capsys):
    monitor = serve(lambda _c, request: ok(request, "", {"running": request["method"] != "status", "x": 1}))
    assert batch(monkeypatch, "status\nget name\ndoctor\n", "--json") == ExitCode.NOT_RUNNING
    assert len(monitor.requests) == 3
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("events\n", "line 1: events: not in a batch"),
        ("\nconsole\n", "line 2: console: not in a batch"),
        ("list\n", "list: not in a batch"),
        ("-\n", "-: not in a batch"),
        ("--json status\n", "--json: not in a batch"),
        ("get 'name\n", "cannot be parted into words"),
        ("pause now\n", "not of the form key=value"),
        ("x" * 70000, "longer than 65536 bytes"),
    ],
)
def test_what_is_no_command_of_a_batch(serve, monkeypatch, capsys, text, words):
    monitor = serve(lambda _c, request: ok(request))
    assert batch(monkeypatch, text) == ExitCode.USAGE
    assert words in capsys.readouterr().err
    assert monitor.requests == []


def test_a_batch_whose_monitor_goes(serve, monkeypatch, capsys):
    serve(raw(b""))
    assert batch(monkeypatch, "pause\nunpause\n") == ExitCode.FAILED
    assert "line 1: pause: monitor" in capsys.readouterr().err


def test_a_batch_of_nothing(serve, monkeypatch):
    serve(lambda _c, request: ok(request))
    assert batch(monkeypatch, "") == 0
    monkeypatch.setattr(sys, "stdin", None)
    assert cmd.main([A, "-"]) == 0
