# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames and channels: what is refused, who owns descriptors, and that every wait ends."""

import os
import socket
import time

import psutil
import pytest

from xenvm.boundary.frames import BODY_LIMIT_BYTES, DESCRIPTOR_LIMIT, HEADER, MAGIC, VERSION, Channel, decode, encode
from xenvm.boundary.images import Progress
from xenvm.boundary.messages import NO_DOMAIN, Ask, Done, Op, Outcome
from xenvm.errors import ProtocolError, TimeoutExpiredError

PROGRESS = Progress(7, "loading the kernel")
DONE = Done(1, NO_DOMAIN, "")


def framed(body, *, kind=Progress.KIND, magic=MAGIC, version=VERSION, descriptors=0, length=None):
    return HEADER.pack(magic, version, kind, descriptors, len(body) if length is None else length) + body


def descriptors_open():
    return psutil.Process().num_fds()


@pytest.fixture
def raw_pair():
    """A plain socket and the channel at its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(theirs)
    with ours:
        yield ours, channel
    channel.close()


@pytest.fixture
def pair():
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def pipe():
    readable, writable = os.pipe()
    yield readable, writable
    for descriptor in (readable, writable):
        os.close(descriptor)


GOOD = (
    b'{"sequence":7,"step":"x","done_kib":0,"total_kib":0,"round":0,"dirty_pages":-1,"rate_kib_s":0,"dirty_pages_s":-1}'
)


def test_the_frame_these_tests_vary_is_good():
    assert decode(framed(GOOD)) == Progress(7, "x")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        framed(GOOD)[: HEADER.size - 1],
        framed(GOOD, magic=b"XVMG"),
        framed(GOOD, version=VERSION + 1),
        framed(GOOD, kind=0),
        framed(GOOD, kind=200),
        framed(GOOD, descriptors=1),
        framed(GOOD, length=len(GOOD) - 1),
        framed(GOOD, length=len(GOOD) + 1),
        framed(GOOD) + b"\n",
        framed(b""),
        framed(b"null"),
        framed(b"[]"),
        framed(GOOD.replace(b"7", b"7.0")),
        framed(GOOD.replace(b"7", b"NaN")),
        framed(GOOD.replace(b"7", b"Infinity")),
        framed(GOOD.replace(b"7", b"true")),
        framed(GOOD.replace(b"7", b'"7"')),
        framed(GOOD.replace(b"7", b"-1")),
        framed(GOOD.replace(b"7", b"2147483648")),
        framed(GOOD.replace(b"7", b"9" * 5000)),
        framed(GOOD.replace(b'"x"', b'"' + b"x" * 65 + b'"')),
        framed(GOOD.replace(b'"x"', b'"\\u0000"')),
        framed(GOOD.replace(b'"x"', b'"\\ud800"')),
        framed(GOOD.replace(b'"x"', '"\u00e4"'.encode())),
        framed(GOOD.replace(b'"x"', b'"\xff"')),
        framed(b'{"sequence":7,"sequence":7,"step":"x"}'),
        framed(b'{"sequence":7}'),
        framed(b'{"sequence":7,"step":"x","more":1}'),
        framed(b"[" * 60000),
        framed(GOOD + b" " * BODY_LIMIT_BYTES),
    ],
    ids=lambda frame: repr(frame[:60]),
)
def test_what_no_honest_peer_sends_is_refused(frame):
    with pytest.raises(ProtocolError):
        decode(frame)


def test_descriptors_must_be_announced_and_allowed():
    frame = encode(DONE, 1)
    assert decode(frame, 1) == DONE
    with pytest.raises(ProtocolError):
        decode(frame, 0)
    with pytest.raises(ProtocolError):
        decode(encode(DONE, 2), 2)
    with pytest.raises(ProtocolError):
        decode(encode(PROGRESS, 1), 1)


def test_a_message_that_a_peer_would_refuse_is_not_made():
    assert decode(encode(Outcome(0, "", "x" * 60000))).text == "x" * 60000
    with pytest.raises(ProtocolError, match="65"):
        encode(Outcome(0, "", "\u00e4" * 11000))


def test_messages_and_descriptors_arrive_in_order(pair, pipe):
    ours, theirs = pair
    readable, writable = pipe
    ours.send(PROGRESS)
    ours.send(DONE, [writable])
    assert theirs.receive(deadline_s=5) == (PROGRESS, [])
    message, (arrived,) = theirs.receive(deadline_s=5)
    assert message == DONE
    assert not os.get_inheritable(arrived)
    assert os.write(writable, b"still ours") == 10
    assert os.write(arrived, b"!") == 1
    os.close(arrived)
    assert os.read(readable, 64) == b"still ours!"


def test_the_end_of_the_peer_is_seen_after_its_last_message(pair):
    ours, theirs = pair
    ours.send(PROGRESS)
    ours.close()
    ours.close()
    assert theirs.receive(deadline_s=5) == (PROGRESS, [])
    assert theirs.receive(deadline_s=5) is None
    with pytest.raises(ProtocolError, match="gone"):
        theirs.send(PROGRESS)


def test_the_last_words_of_a_peer_that_left_ours_unread_arrive(pair):
    """A helper that fails at its start has said why, and ends without reading its request."""
    ours, theirs = pair
    theirs.send(PROGRESS)
    theirs.send(DONE)
    ours.send(PROGRESS)
    ours.close()
    assert theirs.receive(deadline_s=5) == (PROGRESS, [])
    assert theirs.receive(deadline_s=5) is None


def test_receiving_has_a_deadline(pair):
    before = time.monotonic()
    with pytest.raises(TimeoutExpiredError, match=r"0\.2 s"):
        pair[0].receive(deadline_s=0.2)
    assert 0.15 < time.monotonic() - before < 10
    with pytest.raises(BlockingIOError):
        pair[0].receive_now()


def test_sending_to_a_peer_that_does_not_read_has_a_deadline(pair):
    ours, theirs = pair
    big, sent = Ask(1, Op.STARTED, "x" * 4096, 0), 0
    with pytest.raises(TimeoutExpiredError):
        while sent < 100_000:
            ours.send(big, deadline_s=0.1)
            sent += 1
    for _ in range(sent):
        assert theirs.receive(deadline_s=5) == (big, [])


@pytest.mark.parametrize("count", [1, 3, DESCRIPTOR_LIMIT, DESCRIPTOR_LIMIT + 1, 200])
def test_descriptors_of_a_refused_frame_are_closed(raw_pair, pipe, count):
    raw, channel = raw_pair
    before = descriptors_open()
    socket.send_fds(raw, [encode(PROGRESS, min(count, 60000))], [pipe[0]] * count)
    with pytest.raises(ProtocolError):
        channel.receive(deadline_s=5)
    assert descriptors_open() == before


def test_descriptors_without_a_frame_are_closed(raw_pair, pipe):
    raw, channel = raw_pair
    before = descriptors_open()
    socket.send_fds(raw, [b"x"], [pipe[0]])
    with pytest.raises(ProtocolError):
        channel.receive(deadline_s=5)
    assert descriptors_open() == before


def test_a_frame_longer_than_any_may_be_is_refused_whole(raw_pair, pipe):
    raw, channel = raw_pair
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    before = descriptors_open()
    socket.send_fds(raw, [framed(GOOD + b" " * (BODY_LIMIT_BYTES + 1))], [pipe[0]])
    raw.send(encode(PROGRESS))
    with pytest.raises(ProtocolError):
        channel.receive(deadline_s=5)
    assert channel.receive(deadline_s=5) == (PROGRESS, [])
    assert descriptors_open() == before
