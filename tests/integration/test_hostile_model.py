# SPDX-License-Identifier: GPL-2.0-or-later
"""A device model that has turned hostile: towards the worker that starts it, and towards a real supervisor process.

Its double is a program of this test, started as QEMU is: it finds QMP's listening socket as descriptor 3. Needs root.
"""

import json
import os
import socket
import sys
import threading
import time

import pytest
from supervisor_bench import WAIT_S, Monitor

from xenvm.boundary.machine import Launch, Machine, Model
from xenvm.errors import ExitCode, TimeoutExpiredError, XenvmError
from xenvm.helpers.devicemodel import argv, process

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
UUID = "11111111-2222-4333-8444-555555555555"
MACHINE = Machine(
    **dict.fromkeys(("pae", "acpi", "apic", "nx"), True),
    **dict.fromkeys(("hpet", "vpt_align", "timer_mode", "vnc_port"), -1),
    **dict.fromkeys(("timeoffset_s", "videoram_mib", "serial_port"), 0),
    **dict.fromkeys(("platform", "bios_strings", "extra", "nic_models"), ()),
    viridian=False,
    smbios=False,
    oem_types=(),
    slic=False,
    vnc_host="",
    boot="c",
    serial="pty",
    serial_host="",
    keymap="",
)
LAUNCH = Launch(7, "web", UUID, 1, 64, MACHINE, (), (), incoming=False)
DOUBLE = """\
#!{python} -ISB
import os, signal, socket, sys, time
listener = socket.socket(fileno=3)
{before}
peer, _ = listener.accept()
peer.sendall({greeting!r})
def hear():
    line = b""
    while not line.endswith(b"\\n"):
        line += peer.recv(1) or sys.exit(9)
def agree(value=b"{{}}"):
    hear()
    global number
    number += 1
    peer.sendall(b'{{"return": ' + value + b', "id": %d}}\\n' % number)
number = 0
{act}
"""
SERIAL = b'[{"label": "serial0", "filename": "pty:/dev/pts/5"}]'
HOSTILE = {
    "endless events": ('while True: peer.sendall(b\'{"event": "E"}\\n\' * 100)', "at once|did not come up"),
    "nonsense": ("agree(); hear(); peer.sendall(b'\\xff\\x00{]\\n')", "not JSON"),
    "a huge line": ("agree(); peer.sendall(b'x' * (1 << 22)); time.sleep(60)", "a line of more than"),
    "an answer to something else": ("agree(); hear(); peer.sendall(b'{\"return\": {}, \"id\": 77}\\n')", "not asked"),
    "a terminal that is none": (
        'agree(); agree(b\'[{"label": "serial0", "filename": "pty:/etc/shadow"}]\')',
        "does not say where its serial port is",
    ),
    "an end": ("agree(); hear(); print('no more of this', file=sys.stderr); os._exit(3)", "status 3.*no more of this"),
    "a death": ("agree(); hear(); os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "silence": ("agree(); signal.pause()", "did not come up within 2 s"),
    "a refusal to run": (f"agree(); agree({SERIAL!r}); hear(); "
        "peer.sendall(b'{\"error\": {\"desc\": \"I will not\"}, \"id\": 3}\\n'); signal.pause()", "refuses cont: I will not"),
    "a process of its own": (f"agree(); agree({SERIAL!r}); os.fork()", "status 1.*Operation not permitted"),
}  # fmt: skip


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start the double as the worker does; return the QEMU and the time it began."""
    made = []
    monkeypatch.setattr(argv, "PROGRAM", str(tmp_path / "double"))
    monkeypatch.setattr(process, "START_WAIT_S", 2.0)

    def begin(act, before=""):
        program = tmp_path / "double"
        program.write_text(DOUBLE.format(python=sys.executable, greeting=GREETING, act=act, before=before))
        program.chmod(0o755)
        listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen(1)
        client.connect(listener.getsockname())
        log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        made.append(process.Qemu(LAUNCH, [log, listener.detach(), os.dup(log), client.detach()], os.getuid(), 7))
        return made[-1]

    yield begin
    for one in made:
        os.kill(one.pid, 9)
        os.waitpid(one.pid, 0)


def test_an_honest_double_comes_up(start):
    assert start(f"agree(); agree({SERIAL!r}); agree(); signal.pause()").take_up() == "/dev/pts/5"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_one_does_not_hold_its_worker(start, name):
    act, why = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises((XenvmError, TimeoutExpiredError), match=f"device model: .*({why})"):
        start(act).take_up()
    assert time.monotonic() - began < 10


def test_one_that_ends_before_it_listens_is_known_to_have_ended_at_once(start):
    began = time.monotonic()
    with pytest.raises(XenvmError, match=r"status 1.*I know no such option"):
        start("", "sys.exit('I know no such option')").take_up()
    assert time.monotonic() - began < 1.9  # of the 2 s that it has to come up


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log")
    yield made
    made.close()


def connected(monitor):
    """A supervisor with an HVM guest and a device model, whose end this is."""
    monitor.running(fields={"name": "web", "hvm": "true"})
    ours, theirs = socket.socketpair()
    monitor.broker.send(Model(True, 5900), (theirs.fileno(),))
    theirs.close()
    ours.settimeout(WAIT_S)
    return ours


def line(peer):
    said = b""
    while not said.endswith(b"\n"):
        piece = peer.recv(65536)
        assert piece
        said += piece
    return said


def agree(peer, command):
    """Hear a command and answer it as an honest one does."""
    asked = json.loads(line(peer))
    assert asked["execute"] == command
    peer.sendall(b'{"return": {}, "id": %d}\n' % asked["id"])


def greet(peer):
    peer.sendall(GREETING)
    agree(peer, "qmp_capabilities")
    agree(peer, "query-status")


ATTACKS = {
    "endless events": (b'{"event": "E", "data": {}}\n', True),
    "endless nonsense": (b"\xff\x00{]" * 4096, True),
    "an endless line": (b"x" * 65536, True),
    "answers to nothing": (b'{"return": {}, "id": 99}\n', True),
    "deep nesting": (b"[" * 100000 + b"\n", False),
    "its end": (b"", False),
}


@pytest.mark.parametrize("greeted", [True, False])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_one_does_not_hold_the_supervisor(monitor, name, greeted):
    """Others are served meanwhile, whoever waits for it hears of it in time, and the VM is what the broker says it is."""
    piece, endless = ATTACKS[name]
    peer, client = connected(monitor), monitor.client()
    if greeted:
        greet(peer)
    client.send("cd-eject", device="hdd")
    stop = threading.Event()

    def attack():
        try:
            while not stop.is_set():
                peer.sendall(piece)
                if not endless:
                    break
            peer.shutdown(socket.SHUT_RDWR) if not endless else None
        except OSError:
            return

    attacker = threading.Thread(target=attack, daemon=True)
    attacker.start()
    try:
        began = time.monotonic()
        assert monitor.state()["state"] == "running"
        assert time.monotonic() - began < 3
        code, message, _ = client.refusal()
        assert code is ExitCode.WRONG_STATE
        assert "device model" in message
        assert time.monotonic() - began < 8  # well before the time limit for its answer
        assert monitor.nothing_asked()
        assert monitor.state()["state"] == "running"
    finally:
        stop.set()
        peer.close()
        attacker.join(5)


def test_a_silent_one_is_given_up_and_the_next_is_taken(monitor):
    peer, client = connected(monitor), monitor.client()
    greet(peer)
    client.send("cd-eject", device="hdd")
    assert b"eject" in line(peer)
    code, message, _ = client.refusal()
    assert (code, "did not answer within" in message) == (ExitCode.TIMED_OUT, True)
    assert peer.recv(1) == b""
    ours, theirs = socket.socketpair()
    monitor.broker.send(Model(True, 5900), (theirs.fileno(),))
    theirs.close()
    ours.settimeout(WAIT_S)
    greet(ours)
    client.send("cd-eject", device="hdd")
    agree(ours, "eject")
    agree(ours, "remove-fd")
    assert client.reply()["result"]["text"] == ""
    ours.close()
    peer.close()
