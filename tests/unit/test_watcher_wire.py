# SPDX-License-Identifier: GPL-2.0-or-later
"""The watcher's wire against a socket that plays xenstored: split, merged, oversized and refused."""

import inspect
import socket
import struct

import pytest

from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Hello, Watch, WatchEvent
from xenvm.errors import ProtocolError
from xenvm.helpers import serve
from xenvm.helpers.watcher import main as watcher
from xenvm.helpers.watcher import wire
from xenvm.helpers.watcher.wire import NAME_LIMIT_BYTES, PAYLOAD_LIMIT_BYTES, Request, WatchConnection

WATCH, EVENT, ERROR = 4, 15, 16


def packet(kind, payload, request=1):
    return struct.pack("=IIII", kind, request, 0, len(payload)) + payload


def event(token, path=b"@releaseDomain"):
    return packet(EVENT, path + b"\0" + token + b"\0", 0)


@pytest.fixture
def peers():
    """A connection and the socket at xenstored's end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with ours, theirs:
        yield WatchConnection(ours), theirs


def test_a_watch_is_asked_for(peers):
    connection, xenstored = peers
    connection.watch(b"@releaseDomain", b"release")
    connection.watch(b"/a", b"b")
    payload = b"@releaseDomain\0release\0"
    assert xenstored.recv(4096) == struct.pack("=IIII", WATCH, 1, 0, len(payload)) + payload + (
        struct.pack("=IIII", WATCH, 2, 0, 5) + b"/a\0b\0"
    )


def test_it_can_ask_for_nothing_else():
    assert list(Request) == [Request.WATCH]
    public = {name for name, _ in inspect.getmembers(WatchConnection, inspect.isfunction) if not name.startswith("_")}
    assert public == {"fileno", "watch", "events"}
    assert inspect.getsource(wire).count("sendall") == 1


def test_the_answer_to_a_watch_is_no_event(peers):
    connection, xenstored = peers
    xenstored.sendall(packet(WATCH, b"OK\0"))
    assert list(connection.events()) == []
    xenstored.sendall(packet(WATCH, b"OK\0") + event(b"release"))
    assert list(connection.events()) == [b"release"]


def test_events_in_one_read_and_events_over_many(peers):
    connection, xenstored = peers
    xenstored.sendall(event(b"one") + event(b"two") + event(b"three"))
    assert list(connection.events()) == [b"one", b"two", b"three"]
    stream, found = event(b"four") + event(b"five"), []
    for byte in stream:
        xenstored.sendall(bytes([byte]))
        found.append(list(connection.events()))
    assert [tokens for tokens in found if tokens] == [[b"four"], [b"five"]]
    assert found[len(stream) // 2 :][-1] == [b"five"]


def test_a_refused_watch_ends_it(peers):
    connection, xenstored = peers
    xenstored.sendall(packet(ERROR, b"EACCES\0"))
    with pytest.raises(ProtocolError, match="refused a watch.*EACCES"):
        list(connection.events())


def test_the_end_of_xenstored_ends_it(peers):
    connection, xenstored = peers
    xenstored.sendall(event(b"one")[:20])
    assert list(connection.events()) == []
    xenstored.close()
    with pytest.raises(ProtocolError, match="closed"):
        list(connection.events())


@pytest.mark.parametrize("length", [PAYLOAD_LIMIT_BYTES + 1, 2**31, 2**32 - 1])
def test_a_length_beyond_the_protocol_is_refused_before_it_arrives(peers, length):
    connection, xenstored = peers
    xenstored.sendall(struct.pack("=IIII", EVENT, 0, 0, length))
    with pytest.raises(ProtocolError, match="longer than the protocol allows"):
        list(connection.events())


def test_the_longest_payload_is_accepted(peers):
    connection, xenstored = peers
    path = b"/" + b"x" * (PAYLOAD_LIMIT_BYTES - len(b"/\0token\0"))
    xenstored.sendall(event(b"token", path))
    assert list(connection.events()) == [b"token"]


@pytest.mark.parametrize(
    "payload",
    [b"", b"\0", b"path\0", b"path\0token", b"path\0token\0more\0", b"path\0" + b"t" * (NAME_LIMIT_BYTES + 1) + b"\0"],
)
def test_an_event_of_another_form_is_refused(peers, payload):
    connection, xenstored = peers
    xenstored.sendall(packet(EVENT, payload, 0))
    with pytest.raises(ProtocolError, match="another form"):
        list(connection.events())


@pytest.mark.parametrize("kind", [0, 2, 11, 17, 128, 2**32 - 1])
def test_an_answer_nobody_asked_for_is_refused(peers, kind):
    connection, xenstored = peers
    xenstored.sendall(packet(kind, b"OK\0"))
    with pytest.raises(ProtocolError, match=f"type {kind}"):
        list(connection.events())


@pytest.fixture
def process(monkeypatch):
    """The watcher's main with all its peers here: the broker, the supervisor and xenstored."""
    broker, broker_end = Channel.pair()
    supervisor, supervisor_end = Channel.pair()
    xenstored, xenstored_end = socket.socketpair()
    monkeypatch.setattr(serve, "broker_channel", lambda: broker_end)
    monkeypatch.setattr(serve, "drop", lambda role, keep: Hello(role.value, 1, f"{keep == {xenstored_end.fileno()}}"))
    monkeypatch.setattr(watcher.xenstored, "connect", lambda: xenstored_end)
    monkeypatch.setattr(watcher.Channel, "from_descriptor", lambda _number: supervisor_end)
    yield broker, supervisor, xenstored
    for end in (broker, broker_end, supervisor, supervisor_end, xenstored, xenstored_end):
        end.close()


def test_events_that_arrive_together_become_one_message(process):
    _, supervisor, xenstored = process
    xenstored.sendall(packet(WATCH, b"OK\0") + event(b"release") * 500)
    xenstored.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="closed"):
        watcher.main()
    assert supervisor.receive(deadline_s=5) == (Watch(WatchEvent.ARMED), [])
    with pytest.raises(BlockingIOError):
        supervisor.receive_now()


def test_what_follows_an_event_in_the_same_read_is_seen_too(process):
    _, _, xenstored = process
    xenstored.sendall(event(b"release") + packet(ERROR, b"EINVAL\0"))
    xenstored.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="refused"):
        watcher.main()


def test_the_first_message_says_that_the_watch_stands(process):
    broker, _, xenstored = process
    looked = []

    def look(message, **_):
        looked.append(message.event)
        if len(looked) < 3:
            xenstored.sendall(event(b"release"))
        else:
            broker.close()

    supervisor_end = watcher.Channel.from_descriptor(4)
    supervisor_end.send = look
    xenstored.sendall(event(b"release"))
    assert watcher.main() == 0
    assert looked == [WatchEvent.ARMED, WatchEvent.RELEASED, WatchEvent.RELEASED]


def test_a_supervisor_that_does_not_read_does_not_stop_the_watcher(process):
    broker, supervisor, xenstored = process
    supervisor_end, sent = watcher.Channel.from_descriptor(4), []
    real = supervisor_end.send

    def send(message, **options):
        sent.append(message)
        if len(sent) < 2000:
            xenstored.sendall(event(b"release"))
        else:
            broker.close()
        real(message, **options)

    supervisor_end.send = send
    xenstored.sendall(event(b"release"))
    assert watcher.main() == 0
    assert len(sent) == 2000
    assert supervisor.receive(deadline_s=5) == (Watch(WatchEvent.ARMED), [])


def test_it_greets_before_it_watches_and_keeps_one_descriptor(process):
    broker, _, xenstored = process
    xenstored.close()
    with pytest.raises((ProtocolError, OSError)):
        watcher.main()
    assert broker.receive(deadline_s=5) == (Hello("watcher", 1, "True"), [])
