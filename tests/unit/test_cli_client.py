# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a monitor sends, the client returns a checked reply or raises an XenvmError."""

import contextlib
import json
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenvm.cli.client import Monitor, Reply
from xenvm.errors import XenvmError

UUID = "6f1d0a3e-52c7-4b0e-9a55-0d3c1b7e8f21"
GOOD = b'{"jsonrpc":"2.0","id":1,"result":{"text":"running","data":{"running":true}}}'

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
members = {
    "jsonrpc": st.just("2.0") | values,
    "id": st.just(1) | values,
    "method": st.just("event") | values,
    "params": values,
    "result": st.fixed_dictionaries({}, optional={"text": st.text() | values, "data": values}) | values,
    "error": st.fixed_dictionaries({"message": st.text() | values}, optional={"data": values}) | values,
}


def call(untrusted):
    """Send a request to a monitor that sends these bytes and hangs up."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(untrusted)
        theirs.shutdown(socket.SHUT_WR)
        with Monitor(UUID, ours, 5.0) as monitor:
            return monitor.call("status")


def checked(untrusted):
    with contextlib.suppress(XenvmError):
        reply = call(untrusted)
        assert isinstance(reply, Reply)
        assert isinstance(reply.text, str)
        assert reply.descriptor is None
        json.dumps(reply.data)


def test_good_reply():
    reply = call(struct.pack(">I", len(GOOD)) + GOOD)
    assert (reply.text, reply.data) == ("running", {"running": True})
    with pytest.raises(XenvmError, match="no descriptor"):
        reply.take_descriptor()


@given(st.binary(max_size=200))
def test_any_bytes(untrusted):
    checked(untrusted)


@given(st.binary(max_size=200))
def test_any_body(untrusted):
    checked(struct.pack(">I", len(untrusted)) + untrusted)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_one_changed_byte(place, byte):
    body = GOOD[:place] + bytes([byte]) + GOOD[place + 1 :]
    checked(struct.pack(">I", len(body)) + body)


@given(st.fixed_dictionaries({}, optional=members) | values)
def test_any_message(message):
    body = json.dumps(message).encode()
    checked(struct.pack(">I", len(body)) + body)
