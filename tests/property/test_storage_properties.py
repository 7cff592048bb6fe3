# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever an image, a server or a datagram says, the parsers of image and storage give a value or an error of theirs."""

import contextlib
import socket
import time

from hypothesis import given
from hypothesis import strategies as st

from xenvm.errors import XenvmError
from xenvm.helpers.image import header, nbd
from xenvm.helpers.storage import nbd as netlink

STARTS = (b"", b"QFI\xfb\0\0\0\1", b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"conectix", b"vhdxfile")
SECTORS = st.builds(lambda start, rest: (start + rest)[:512], st.sampled_from(STARTS), st.binary(max_size=600))
GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
REPLY = b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x07\x00\x00\x00"


@given(kind=st.sampled_from(["qcow", "vhd"]), head=SECTORS, tail=SECTORS)
def test_headers(kind, head, tail):
    try:
        assert header.driver(kind, head, tail) in {"qcow": {"qcow", "qcow2"}, "vhd": {"vpc"}}[kind]
    except XenvmError as error:
        assert error.message.isprintable()
        assert len(error.message) < 300


@given(
    start=st.sampled_from([b"", GREETING, GREETING + REPLY, GREETING + REPLY + b"\x03\0\0\0\x0c"]),
    rest=st.binary(max_size=300),
)
def test_the_handshake(start, rest):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(start + rest)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(XenvmError):
            size, flags = nbd.negotiate(ours, time.monotonic() + 5)
            assert 0 <= size < 2**64
            assert 0 <= flags < 2**16


@given(st.binary(max_size=200))
def test_datagrams(data):
    with contextlib.suppress(ValueError):
        for answer in netlink.parse_messages(data, 1):
            assert isinstance(answer, int | dict)


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40), max_size=8))
def test_attributes(values):
    data = b"".join(netlink.attribute(kind, value) for kind, value in values.items())
    assert netlink.parse_attributes(data) == values
