# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a client sends to the command socket is a checked request or refused, and costs nothing."""

import contextlib
import json
import random
import socket
import struct
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm.errors import ProtocolError, UsageError
from xenvm.supervisor import commands
from xenvm.supervisor.control import PARAMS_LIMIT, REQUEST_LIMIT_BYTES, Client, Request, decode

MUTATED_BODIES = 40_000
MUTATED_STREAMS = 10_000
GROWTH_LIMIT_BYTES = 8 << 20
SHORT = st.text(max_size=64)
REQUESTS = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0"), "method": SHORT},
    optional={
        "params": st.dictionaries(SHORT, SHORT, max_size=PARAMS_LIMIT),
        "id": st.one_of(st.none(), st.integers(-(10**60), 10**60), SHORT),
        "xenvm": st.just(1),
    },
)
EXAMPLES = [
    {"jsonrpc": "2.0", "method": name, "params": dict.fromkeys(command.arguments, word), "id": 1, **modern}
    for name, command in commands.COMMANDS.items()
    for word in ("1", "true", "running", "")
    for modern in ({}, {"xenvm": 1})
]
HOSTILE = [
    *(None, True, False, 0, -1, 1, 2**64, 10**4000, 1.5, 1e400, float("nan"), "", "\0", "\ud800", "x" * 70000, "nan"),
    *([], {}, [["a"]], {"a": {}}, {"a": 1}, {"a": None}, {str(number): "" for number in range(17)}, "2.0", "1e400"),
]


def carry_on(request):
    """Do with a request what the supervisor does before it acts; only UsageError may come of it."""
    assert isinstance(request, Request)
    assert isinstance(request.method, str)
    assert len(request.method) <= 64
    assert len(request.params) <= PARAMS_LIMIT
    assert all(isinstance(text, str) for pair in request.params.items() for text in pair)
    json.dumps({"id": request.identifier}).encode("ascii")
    try:
        name, command = commands.find(request.method)
        commands.check_arguments(name, command, request.params)
        commands.boolean(request.params, "force", "forced")
        assert 0 < commands.seconds(request.params, "timeout", 60.0) <= commands.TIMEOUT_MAX_S
    except UsageError as error:
        assert error.message.isascii()
        assert len(error.message) < 500


@settings(max_examples=200, deadline=None)
@given(REQUESTS)
def test_a_good_request_is_understood(message):
    request, modern = decode(json.dumps(message).encode())
    assert (request.method, dict(request.params)) == (message["method"], message.get("params", {}))
    assert request.identifier == message.get("id", 0)
    assert modern == ("xenvm" in message)
    carry_on(request)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(max_size=300), st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(json.dumps))
)
def test_arbitrary_bodies_are_refused(body):
    with pytest.raises(ProtocolError):
        decode(body if isinstance(body, bytes) else body.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 60000,
        b'{"a":' * 10000,
        b"1" * 10000,
        b'{"jsonrpc": "2.0"}',
        b'{"jsonrpc": "2.0", "method": "status", "more": 1}',
        b'{"jsonrpc": "1.0", "method": "status"}',
        b'{"method": "status"}',
        b'{"jsonrpc": "2.0", "method": 1}',
        b'{"jsonrpc": "2.0", "method": "' + b"x" * 65 + b'"}',
        b'{"jsonrpc": "2.0", "method": "status", "id": true}',
        b'{"jsonrpc": "2.0", "method": "status", "id": 1.5}',
        b'{"jsonrpc": "2.0", "method": "status", "id": NaN}',
        b'{"jsonrpc": "2.0", "method": "status", "id": [1]}',
        b'{"jsonrpc": "2.0", "method": "status", "id": "' + b"x" * 65 + b'"}',
        b'{"jsonrpc": "2.0", "method": "status", "id": ' + b"9" * 65 + b"}",
        b'{"jsonrpc": "2.0", "method": "shutdown", "params": {"timeout": 5}}',
        b'{"jsonrpc": "2.0", "method": "shutdown", "params": {"force": true}}',
        b'{"jsonrpc": "2.0", "method": "get", "params": {"field": null}}',
        b'{"jsonrpc": "2.0", "method": "get", "params": "name"}',
        json.dumps({"jsonrpc": "2.0", "method": "get", "params": dict.fromkeys("abcdefghijklmnopq", "")}).encode(),
        b'\xff{"jsonrpc": "2.0", "method": "status"}',
    ],
    ids=lambda body: repr(body[:70]),
)
def test_what_no_client_sends_is_refused(body):
    with pytest.raises(ProtocolError):
        decode(body)


def test_an_array_of_parameters_counts_as_none():
    assert decode(b'{"jsonrpc": "2.0", "method": "status", "params": ["a"]}')[0].params == {}


def mutate(message, chance):
    """Return the body of a request with one fault."""
    if chance.random() < 0.5:
        changed = dict(message)
        key = chance.choice([*changed, "more"])
        action = chance.randrange(3)
        if action == 0:
            changed.pop(key, None)
        elif action == 1 or key != "params" or not changed["params"]:
            changed[key] = chance.choice(HOSTILE)
        else:
            changed["params"] = changed["params"] | {chance.choice(["force", "timeout", "x"]): chance.choice(HOSTILE)}
        return json.dumps(changed).encode("ascii")
    body = bytearray(json.dumps(message).encode())
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(body) + 1)
        body[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return bytes(body)


def resources():
    process = psutil.Process()
    return process.num_fds(), process.memory_info().rss


def assert_nothing_stays(before, after):
    assert after[0] == before[0], "descriptors leaked"
    assert after[1] - before[1] < GROWTH_LIMIT_BYTES, f"{(after[1] - before[1]) >> 20} MiB more"


def test_mutated_bodies_are_refused_or_good_requests():
    chance = random.Random(3)

    def one():
        try:
            request, _modern = decode(mutate(chance.choice(EXAMPLES), chance))
        except ProtocolError:
            return 0
        carry_on(request)
        return 1

    for _ in range(2000):
        one()
    before, begun = resources(), time.monotonic()
    understood = sum(one() for _ in range(MUTATED_BODIES))
    print(f"\n{MUTATED_BODIES} bodies, {MUTATED_BODIES - understood} refused, {time.monotonic() - begun:.1f} s")
    assert MUTATED_BODIES // 10 < understood < MUTATED_BODIES // 2
    assert_nothing_stays(before, resources())


def stream(chance):
    """Return what one connection sends: requests whole, mutated, cut, or with a false length."""
    sent = b""
    for _ in range(chance.randrange(1, 5)):
        message = chance.choice(EXAMPLES)
        body = mutate(message, chance) if chance.random() < 0.5 else json.dumps(message).encode()
        length = chance.choice([len(body)] * 8 + [0, len(body) + 1, len(body) - 1, REQUEST_LIMIT_BYTES + 1, 2**32 - 1])
        sent += struct.pack(">I", length) + body
    return sent[: chance.randrange(len(sent) + 1)] if chance.random() < 0.3 else sent


def serve(sent, chance):
    """Let a real Client read `sent` from a real socket, in pieces; return how many requests it made of it."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    client, served, place = Client(ours, 0, "all"), 0, 0
    with theirs:
        while place < len(sent):
            piece = sent[place : place + chance.choice([1, 3, 100, 70000, 70000])]
            place += theirs.send(piece)
            assert client.read() or len(sent) > 2 * REQUEST_LIMIT_BYTES
            try:
                while (request := client.next_request()) is not None:
                    carry_on(request)
                    client.waiting = True
                    client.refuse(request.identifier, UsageError("no"))
                    served += 1
            except ProtocolError as error:
                client.refuse(0, UsageError(error.message))
                break
            with contextlib.suppress(BlockingIOError):
                theirs.recv(1 << 20)
            if client.closing:
                break
    client.close()
    return served


def test_mutated_streams_are_read_without_harm():
    chance = random.Random(4)

    def one():
        return serve(stream(chance), chance)

    for _ in range(300):
        one()
    before, begun = resources(), time.monotonic()
    served = sum(one() for _ in range(MUTATED_STREAMS))
    print(f"\n{MUTATED_STREAMS} connections, {served} requests served, {time.monotonic() - begun:.1f} s")
    assert served > MUTATED_STREAMS // 4
    assert_nothing_stays(before, resources())
