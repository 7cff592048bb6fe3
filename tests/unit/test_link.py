# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests to rtnetlink and its answers, without a kernel."""

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm.helpers.network import link
from xenvm.helpers.network.link import Link, attributes
from xenvm.helpers.network.main import BACKEND_MAC

ADDRESS = bytes.fromhex("feffffffffff")
PORT, BRIDGE = Link(12, False, 1500, "vif"), Link(5, True, 9000, "bridge")


class Route:
    """In place of a netlink socket: keeps what is sent, answers what it is told to."""

    def __init__(self, *answers):
        self.sent, self.answers = [], list(answers)

    def send(self, data):
        self.sent.append(data)

    def recv(self, _size):
        return self.answers.pop(0)


def attribute(kind, value):
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind, body):
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 99) + body


def found(index, *parts, flags=0x1003):
    return message(16, struct.pack("=BxHiII", 0, 1, index, flags, 0) + b"".join(parts))


def refusal(number):
    return message(2, struct.pack("=i", -number) + bytes(16))


def test_an_interface_is_asked_for_by_name():
    route = Route(found(12, attribute(3, b"vif7.0\0"), attribute(4, struct.pack("=I", 1400))))
    assert link.find(route, "vif7.0") == Link(12, True, 1400, "")
    assert route.sent == [
        struct.pack("=IHHII", 44, 18, 1, 1, 0) + bytes(16) + struct.pack("=HH", 11, 3) + b"vif7.0\0" + b"\0"
    ]


def test_a_bridge_says_that_it_is_one():
    inside = attribute(18 | 0x8000, attribute(1, b"bridge\0") + attribute(2, b"\1\2\3"))
    route = Route(found(5, attribute(4, struct.pack("=I", 9000)), inside))
    assert link.find(route, "br0") == BRIDGE


@pytest.mark.parametrize("name", ["xenbr0", "b", "vif32751.31", "a" * 15])
def test_names_of_every_length_are_padded(name):
    route = Route(found(1))
    link.find(route, name)
    (sent,) = route.sent
    assert len(sent) % 4 == 0
    assert struct.unpack_from("=I", sent)[0] == len(sent)
    assert attributes(sent[32:]) == {3: name.encode() + b"\0"}


def test_whether_an_interface_is_up():
    assert [link.find(Route(found(1, flags=flags)), "a").up for flags in (0, 1, 0x1002, 0x1043)] == [
        *(False, True, False, True),
    ]


def test_one_that_is_not_there():
    assert link.find(Route(refusal(errno.ENODEV)), "vif7.0") is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOBUFS, errno.EINVAL])
def test_another_refusal_is_the_kernels_own_error(number):
    with pytest.raises(OSError) as caught:
        link.find(Route(refusal(number)), "vif7.0")
    assert caught.value.errno == number


def test_an_answer_of_another_kind_is_an_error():
    with pytest.raises(OSError) as caught:
        link.find(Route(message(20, bytes(32))), "vif7.0")
    assert caught.value.errno == errno.EPROTO


def test_joining_is_one_request_with_everything_in_it():
    """Address, MTU of the bridge, the bridge, and up."""
    route = Route(refusal(0))
    link.join(route, PORT, BRIDGE, ADDRESS)
    (sent,) = route.sent
    assert struct.unpack_from("=IHHII", sent) == (len(sent), 19, 5, 1, 0)
    assert struct.unpack_from("=BxHiII", sent, 16) == (0, 0, 12, 1, 1)
    assert attributes(sent[32:]) == {1: ADDRESS, 4: struct.pack("=I", 9000), 10: struct.pack("=I", 5)}


def test_one_that_is_up_keeps_its_address():
    """The kernel refuses another one; it has had the right one since it was switched on."""
    route = Route(refusal(0))
    link.join(route, PORT.but(up=True), BRIDGE, ADDRESS)
    assert attributes(route.sent[0][32:]) == {4: struct.pack("=I", 9000), 10: struct.pack("=I", 5)}


def test_a_refused_join_is_an_error():
    with pytest.raises(OSError) as caught:
        link.join(Route(refusal(errno.EBUSY)), PORT, BRIDGE, ADDRESS)
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0\0", b"\3\0\1\0", b"\xff\xff\1\0abc"])
def test_attributes_that_are_none(data):
    assert attributes(data) == {}


def test_what_follows_a_malformed_attribute_is_ignored():
    assert attributes(attribute(1, b"abc") + b"\2\0\3\0" + attribute(2, b"d")) == {1: b"abc"}


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40), max_size=8))
def test_attributes_come_back(values):
    assert attributes(b"".join(link._attribute(kind, value) for kind, value in values.items())) == values


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_have_attributes_or_none(data):
    for value in attributes(data).values():
        assert len(value) <= len(data)


def test_the_highest_address_keeps_a_bridge_from_taking_it():
    assert BACKEND_MAC == ADDRESS
