# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP towards a device model that keeps to it, and towards one that does not."""

import json
import os
import socket
import threading
import time

import pytest

from xenvm.boundary.qmp import EVENTS_LIMIT, LINE_LIMIT_BYTES, Conversation, Parser, QmpError, request, shown
from xenvm.errors import TimeoutExpiredError, WrongStateError
from xenvm.supervisor import model
from xenvm.supervisor.discs import ejection, insertion
from xenvm.supervisor.model import Model

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
NONSENSE = [
    b"\0" * 100 + b"\n",
    b"{\n",
    b"[]\n",
    b"7\n",
    b'"QMP"\n',
    b"\xff\xfe\n",
    b"[" * 100000 + b"\n",
    b'{"x": 1}\n',
]


def greeted():
    parser = Parser()
    parser.feed(GREETING)
    return parser


def test_a_greeting_replies_and_events_in_pieces():
    parser = Parser()
    for byte in (
        GREETING
        + b'{"return": {"a": 1}, "id": 4}\n\n{"event": "STOP", "data": {}}\n{"error": {"desc": "no"}, "id": 5}\n'
    ):
        parser.feed(bytes([byte]))
    assert parser.greeted
    assert [(reply.identifier, reply.value, reply.error) for reply in parser.replies] == [
        (4, {"a": 1}, ""),
        (5, None, "no"),
    ]
    assert list(parser.events) == ["STOP"]


@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense_ends_it_before_and_after_the_greeting(line):
    with pytest.raises(QmpError):
        Parser().feed(line)
    with pytest.raises(QmpError):
        greeted().feed(line)


@pytest.mark.parametrize("line", [b'{"return": {}}\n', b'{"return": {}, "id": "1"}\n', b'{"error": 5, "id": true}\n'])
def test_an_answer_to_nothing_ends_it(line):
    with pytest.raises(QmpError, match="was not asked"):
        greeted().feed(line)


def test_a_line_without_end_and_a_line_too_long_end_it():
    for end in (b"", b"\n"):
        parser = greeted()
        with pytest.raises(QmpError, match="a line of more than"):
            for _ in range(LINE_LIMIT_BYTES // 1024 + 2):
                parser.feed(b"x" * 1024)
            parser.feed(end)


def test_what_is_kept_is_bounded():
    parser = greeted()
    for number in range(5000):
        parser.feed(b'{"event": "E%d"}\n' % number)
    assert len(parser.events) == EVENTS_LIMIT
    with pytest.raises(QmpError):
        for number in range(5000):
            parser.feed(b'{"return": {}, "id": %d}\n' % number)
    with pytest.raises(QmpError, match="lines at once"):
        greeted().feed(b'{"event": "E"}\n' * 5000)


def test_words_of_the_peer_are_cut_and_made_printable():
    assert shown("a\x1b[2J\u00e4" + "x" * 1000) == "a?[2J?" + "x" * 58
    assert shown(7) == shown(None) == ""
    parser = greeted()
    parser.feed(json.dumps({"error": {"desc": "\x1b" * 9000}, "id": 1}).encode() + b"\n")
    assert parser.replies[0].error == "?" * 400


def test_a_request_is_one_line():
    assert request(3, "eject", {"id": "a\nb"}) == b'{"execute":"eject","id":3,"arguments":{"id":"a\\nb"}}\n'


# -- a conversation that waits ----------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def endless(peer, piece):
    def send():
        try:
            while True:
                peer.sendall(piece)
        except OSError:
            return

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("piece", [b"x" * 4096, b'{"event": "E"}\n' * 50, b"\n" * 4096, b'{"return": {}, "id": 99}\n'])
def test_a_peer_that_never_stops_does_not_hold_a_conversation(pair, piece):
    ours, theirs = pair
    theirs.sendall(GREETING)
    sender = endless(theirs, piece)
    begin = time.monotonic()
    with pytest.raises((QmpError, TimeoutError)):
        Conversation(ours, begin + 1.0).greet()
    assert time.monotonic() - begin < 5
    ours.close()
    sender.join(5)


def test_a_peer_that_is_silent_or_gone(pair):
    ours, theirs = pair
    with pytest.raises(TimeoutError):
        Conversation(ours, time.monotonic() + 0.1).greet()
    theirs.close()
    with pytest.raises(QmpError, match="has ended"):
        Conversation(ours, time.monotonic() + 5).greet()


# -- the supervisor's end ---------------------------------------------------------------------------------------------


@pytest.fixture
def connected():
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    end = Model()
    end.adopt(ours.detach(), 5901)
    yield end, theirs
    end.drop("over")
    theirs.close()


def asked(peer):
    return json.loads(peer.recv(4096).splitlines()[0])


def answer(end, peer, message):
    peer.sendall(json.dumps(message).encode() + b"\n")
    end.read()


def ready(end, peer):
    peer.sendall(GREETING)
    end.read()
    answer(end, peer, {"return": {}, "id": asked(peer)["id"]})
    look = asked(peer)
    assert look["execute"] == "query-status"  # does the guest sleep?
    answer(end, peer, {"return": {"status": "running"}, "id": look["id"]})


def test_a_disc_is_put_in_by_descriptor(connected, tmp_path):
    end, peer = connected
    ready(end, peer)
    disc = os.open(tmp_path, os.O_RDONLY)
    told = []
    end.begin("cd-insert", insertion(5696, disc, block=False), told.append)
    names = []
    while not told:
        line = asked(peer)
        names.append(line["execute"])
        refused = line["execute"] == "remove-fd"  # nothing was in the drive
        answer(
            end, peer, {"error": {"desc": "no set"}, "id": line["id"]} if refused else {"return": {}, "id": line["id"]}
        )
    assert names == ["eject", "remove-fd", "add-fd", "blockdev-change-medium"]
    assert told == [None]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(disc)


def test_a_refusal_reaches_the_client_and_the_connection_stays(connected):
    end, peer = connected
    ready(end, peer)
    told = []
    end.begin("cd-eject", ejection(5696), told.append)
    answer(end, peer, {"error": {"desc": "no such drive"}, "id": asked(peer)["id"]})
    assert "refuses eject: no such drive" in told[0].message
    assert end.fileno() >= 0


@pytest.mark.parametrize("line", [*NONSENSE, b'{"return": {}, "id": 77}\n', b""])
def test_a_hostile_device_model_loses_its_connection_and_no_more(connected, line):
    end, peer = connected
    ready(end, peer)
    told = []
    end.begin("cd-eject", ejection(5696), told.append)
    if line:
        threading.Thread(target=peer.sendall, args=(line,), daemon=True).start()
    else:
        peer.close()
    deadline = time.monotonic() + 5
    while end.fileno() >= 0 and time.monotonic() < deadline:
        end.read()
    assert end.fileno() < 0
    assert isinstance(told[0], WrongStateError)
    with pytest.raises(WrongStateError):
        end.begin("cd-eject", ejection(5696), told.append)


def test_an_answer_that_does_not_come_ends_the_wait(connected, monkeypatch):
    monkeypatch.setattr(model, "ANSWER_WAIT_S", 0.0)
    end, peer = connected
    ready(end, peer)
    told = []
    end.begin("cd-eject", ejection(5696), told.append)
    assert 0 < end.due <= time.monotonic()
    end.expire(time.monotonic())
    assert isinstance(told[0], TimeoutExpiredError)
    assert end.due == 0.0
    assert end.fileno() < 0
