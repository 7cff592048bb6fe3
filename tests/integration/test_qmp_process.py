# SPDX-License-Identifier: GPL-2.0-or-later
"""The qmp worker as a process, with device models that keep to the protocol, and ones that do not."""

import contextlib
import json
import os
import socket
import tempfile
import threading

import pytest

from xenvm.boundary.machine import STATE_LIMIT_BYTES, Attach, Granted, Wish, Wished
from xenvm.boundary.messages import Failed, Hello
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.helpers.qmp import main as module
from xenvm.helpers.qmp.main import Talk

WAIT_S = 60
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


class Model:
    """A device model that answers what it is asked; `answers` says otherwise for some commands."""

    def __init__(self, answers=None, state=b"QEVM state"):
        self.ours, self.theirs = socket.socketpair()
        self.answers, self.state, self.heard = answers or {}, state, []
        self._given = -1
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        self.ours.sendall(GREETING)
        buffer = b""
        while True:
            piece, given, _, _ = socket.recv_fds(self.ours, 65536, 1)
            if not piece:
                return
            self._given = given[0] if given else self._given
            buffer += piece
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                self._answer(json.loads(line))

    def _answer(self, asked):
        command, arguments = asked["execute"], asked.get("arguments", {})
        self.heard.append((command, arguments))
        if command == "xen-save-devices-state":
            os.write(self._given, self.state)
        answer = self.answers.get(command, {"return": {}})
        if answer is not None:
            self.ours.sendall(json.dumps(answer | {"id": asked["id"]}).encode() + b"\n")

    def close(self):
        self.ours.shutdown(socket.SHUT_RDWR)  # it ends what waits in a read, which a close does not
        self._thread.join(10)
        self.ours.close()


@pytest.fixture
def attached(users):
    """A worker with a device model; give how to ask, the model, and the file for its state."""
    stack = contextlib.ExitStack()

    def make(**options):
        child, model = Child(Role.QMP, 2, {}, "test"), Model(**options)
        stack.callback(model.close)
        stack.callback(child.end)
        state = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        hello, _ = child.channel.receive(deadline_s=WAIT_S)
        assert isinstance(hello, Hello)
        assert hello.role == "qmp"
        child.channel.send(Attach(), (model.theirs.fileno(), state.fileno()))
        model.theirs.close()

        def ask(wish):
            child.channel.send(Wished(wish))
            return child.channel.receive(deadline_s=WAIT_S)[0]

        return ask, model, state

    with stack:
        yield make


def test_a_save_and_a_resume(attached):
    ask, model, state = attached()
    for wish in (Wish.TRACK, Wish.UNTRACK, Wish.SAVE, Wish.RUN):
        assert ask(wish) == Granted()
    place = {"fdset-id": module.STATE_SET}
    assert model.heard == [
        ("qmp_capabilities", {}),
        ("xen-set-global-dirty-log", {"enable": True}),
        ("xen-set-global-dirty-log", {"enable": True}),  # QEMU aborts when it is to end what it has not begun
        ("xen-set-global-dirty-log", {"enable": False}),
        ("stop", {}),
        ("add-fd", place),
        ("xen-save-devices-state", {"filename": f"/dev/fdset/{module.STATE_SET}", "live": False}),
        ("remove-fd", place),
        ("xen-set-global-dirty-log", {"enable": True}),
        ("xen-set-global-dirty-log", {"enable": False}),
        ("cont", {}),
    ]
    state.seek(0)
    assert state.read() == b"QEVM state"


def test_a_refusal_is_told_in_its_words_and_the_next_wish_is_heard(attached):
    ask, _, _ = attached(answers={"xen-save-devices-state": {"error": {"class": "GenericError", "desc": "no\x1broom"}}})
    answer = ask(Wish.SAVE)
    assert isinstance(answer, Failed)
    assert answer.fault.message == "device model: the device model refuses xen-save-devices-state: no?room"
    assert ask(Wish.RUN) == Granted()


def test_a_state_that_is_none_is_no_success(attached):
    ask, _, _ = attached(state=b"")
    assert ask(Wish.SAVE).fault.message == "device model: it wrote a state of 0 bytes"


def test_one_that_ends(attached):
    ask, model, _ = attached()
    assert ask(Wish.TRACK) == Granted()
    model.ours.shutdown(socket.SHUT_RDWR)
    assert "has ended" in ask(Wish.SAVE).fault.message
    assert "has ended" in ask(Wish.RUN).fault.message


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"nonsense\n", "not JSON"),
        (b"[1]\n", "no object"),
        (b"{" * 300_000, "a line of more than"),
        (b'{"return": {}, "id": 99}\n', "not asked"),
        (b'{"event": "STOP"}\n' * 300, "more than 256 lines"),
    ],
)
def test_one_that_breaks_the_protocol(attached, said, words):
    ask, model, _ = attached(answers={"stop": None})
    threading.Timer(0.3, lambda: model.ours.sendall(said)).start()
    assert words in ask(Wish.SAVE).fault.message


def test_one_that_does_not_answer_has_a_deadline(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_WAIT_S", 0.3)
    model = Model(answers={"stop": None})
    talk = Talk(model.theirs.detach(), os.open(os.devnull, os.O_WRONLY))
    with pytest.raises(module.XenvmError, match=r"no answer to save within 0\.3 s"):
        talk.grant(Wish.SAVE)
    model.close()


def test_an_answer_that_comes_too_late_is_none_to_the_next_wish(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_WAIT_S", 0.3)
    model = Model(answers={"stop": None})
    talk = Talk(model.theirs.detach(), os.open(os.devnull, os.O_WRONLY))
    with pytest.raises(module.XenvmError, match="no answer to save"):
        talk.grant(Wish.SAVE)
    model.ours.sendall(b'{"return": {}, "id": 2}\n')  # `stop`, the second command
    talk.grant(Wish.RUN)
    assert model.heard[-1] == ("cont", {})
    model.close()


def test_a_state_beyond_all_measure_is_refused(monkeypatch):
    monkeypatch.setattr(module, "STATE_LIMIT_BYTES", 8)
    assert STATE_LIMIT_BYTES > 8
    model = Model(state=b"QEVM 1234")
    with tempfile.TemporaryFile() as state:
        talk = Talk(model.theirs.detach(), state.fileno())
        with pytest.raises(module.XenvmError, match="a state of 9 bytes"):
            talk.grant(Wish.SAVE)
    model.close()
