# SPDX-License-Identifier: GPL-2.0-or-later
"""The console relay and the log, over real ptys and pipes but without a monitor."""

import contextlib
import os
import select
import threading
import tty

import pytest

from xenvm.cli import console
from xenvm.errors import ProtocolError, TimeoutExpiredError, XenvmError


class Wires:
    """The guest's side of a console, and the user's input and output as pipes."""

    def __init__(self):
        self.guest, self.passed = os.openpty()
        tty.setraw(self.passed)
        self.stdin, self.typed = os.pipe()
        self.shown, self.stdout = os.pipe()

    def close(self):
        for descriptor in vars(self).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def wires():
    made = Wires()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(console, "QUIET_S", 0.05)
    monkeypatch.setattr(console, "STALL_S", 0.1)


def relay(wires):
    descriptor = os.dup(wires.passed)
    try:
        return console.relay(descriptor, wires.stdin, wires.stdout)
    finally:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_input_then_quiet(wires):
    os.write(wires.typed, b"ls\n")
    os.close(wires.typed)
    os.write(wires.guest, b"$ \xff\x1b[0m")
    assert relay(wires) is True
    assert os.read(wires.shown, 100) == b"$ \xff\x1b[0m"
    assert os.read(wires.guest, 100) == b"ls\n"
    assert os.get_blocking(wires.passed)


def test_escape_in_piped_input(wires):
    os.write(wires.typed, b"a\x1db")
    assert relay(wires) is True
    assert os.read(wires.guest, 100) == b"a"


def test_more_input_than_the_console_holds(wires, monkeypatch):
    monkeypatch.setattr(console, "STALL_S", 20.0)
    sent = bytes(range(32, 127)) * 2000
    got = bytearray()

    def guest():
        while len(got) < len(sent) and select.select([wires.guest], [], [], 20)[0]:
            got.extend(os.read(wires.guest, 4096))

    def user():
        os.write(wires.typed, sent)
        os.close(wires.typed)

    threads = [threading.Thread(target=guest), threading.Thread(target=user)]
    for thread in threads:
        thread.start()
    assert relay(wires) is True
    for thread in threads:
        thread.join()
    assert bytes(got) == sent


@pytest.mark.parametrize("ended", [True, False])
def test_input_the_guest_does_not_take(wires, monkeypatch, ended):
    monkeypatch.setattr(console, "BACKLOG", 8192)
    wires.stdin, typed = os.pipe()
    os.write(typed, b"x" * 60000)
    if ended:
        os.close(typed)
    with pytest.raises(TimeoutExpiredError, match="did not take the last") as raised:
        relay(wires)
    assert raised.value.hint


def test_a_person_can_always_leave(wires, monkeypatch):
    monkeypatch.setattr(console, "BACKLOG", 8192)
    typed, wires.stdin = os.openpty()
    tty.setraw(wires.stdin)

    def user():
        for _ in range(100):
            os.write(typed, b"x" * 1000)
        os.write(typed, b"\x1d")

    person = threading.Thread(target=user)
    monkeypatch.setattr(console.signal, "signal", lambda *_: None)
    person.start()
    assert relay(wires) is True
    person.join()
    os.close(typed)


def test_input_that_is_a_plain_file_or_closed(wires, tmp_path):
    (tmp_path / "input").write_bytes(b"from a file")
    with (tmp_path / "input").open("rb") as given:
        assert console.relay(os.dup(wires.passed), given.fileno(), wires.stdout) is True
        closed, passed = given.fileno(), os.dup(wires.passed)
    assert os.read(wires.guest, 100) == b"from a file"
    assert console.relay(passed, closed, wires.stdout) is True


@pytest.mark.parametrize("when", ["before", "during"])
def test_console_that_ends(wires, when):
    if when == "before":
        os.close(wires.guest)
    else:
        threading.Timer(0.05, os.close, [wires.guest]).start()
    assert relay(wires) is False


def test_nobody_reads_the_output(wires):
    os.close(wires.shown)
    os.write(wires.guest, b"x")
    assert relay(wires) is True


def test_output_that_somebody_made_non_blocking(wires):
    os.set_blocking(wires.stdout, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(wires.stdout, b"-" * 4096)
    os.write(wires.guest, b"end")
    os.close(wires.typed)
    got = []

    def user():
        while not got or not got[-1].endswith(b"end"):
            got.append(os.read(wires.shown, 4096))

    reader = threading.Timer(0.05, user)
    reader.start()
    assert relay(wires) is True
    reader.join()


def test_something_that_is_no_console(wires, tmp_path):
    for descriptor in (os.open("/dev/null", os.O_RDWR), os.open(tmp_path, os.O_RDONLY)):
        with pytest.raises(ProtocolError):
            console.relay(descriptor, wires.stdin, wires.stdout)
        with pytest.raises(ProtocolError):
            console.copy_log(os.open("/dev/null", os.O_RDWR), wires.stdout)


def test_log_on_a_terminal_is_escaped(wires, tmp_path):
    (tmp_path / "log").write_bytes(b"boot\r\n\x1b]0;x\x07\xc3\xa9\xff\tend\xc3")
    console.copy_log(os.open(tmp_path / "log", os.O_RDONLY), wires.passed)
    assert os.read(wires.guest, 1000).decode() == "boot\n\\x1b]0;x\\x07é\\xff\tend\\xc3"


def test_log_in_a_pipe_is_unchanged_and_ends_quietly(wires, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"\x1b\xff\r\n")
    console.copy_log(os.open(log, os.O_RDONLY), wires.stdout)
    assert os.read(wires.shown, 100) == b"\x1b\xff\r\n"
    os.close(wires.shown)
    console.copy_log(os.open(log, os.O_RDONLY), wires.stdout)
    with open("/dev/full", "wb") as full, pytest.raises(XenvmError, match="No space"):
        console.copy_log(os.open(log, os.O_RDONLY), full.fileno())
