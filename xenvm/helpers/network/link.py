# SPDX-License-Identifier: GPL-2.0-or-later
"""Network interfaces through rtnetlink(7): looked up by name, and one changed in a single request.

Numbers: linux/netlink.h, linux/rtnetlink.h, linux/if_link.h.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import errno
import fcntl
import os
import struct

from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
INTERFACE: Final = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
ATTRIBUTE: Final = struct.Struct("=HH")  # struct rtattr: length, type
NLMSG_ERROR: Final = 2
RTM_NEWLINK, RTM_GETLINK, RTM_SETLINK = 16, 18, 19
NLM_F_REQUEST, NLM_F_ACK = 1, 4
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_INFO_KIND = 1, 3, 4, 10, 18, 1
NESTED: Final = 0x3FFF  # NLA_TYPE_MASK
IFF_UP: Final = 1
# linux/if_tun.h, linux/if.h: struct ifreq is a name and here its flags
TUNSETIFF: Final = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
INTERFACE_REQUEST: Final = struct.Struct("=16sH22x")
REPLY_LIMIT_BYTES: Final = 65536


Route = socket.socket


class Link(Record):
    """One interface: `mtu` in bytes, `kind` the word of `ip -d link` ("bridge", "vif", "" for hardware)."""

    index: int
    up: bool
    mtu: int
    kind: str


def connect(wait_s: float) -> Route:
    """Return a socket for requests, each answered within `wait_s` seconds."""
    route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    route.settimeout(wait_s)
    return route


def attach(tap: int, name: str) -> None:
    """Make the interface `name` of an open /dev/net/tun; it goes with the last descriptor. Raise OSError."""
    fcntl.ioctl(tap, TUNSETIFF, bytearray(INTERFACE_REQUEST.pack(name.encode(), IFF_TAP | IFF_NO_PI)))


def find(route: Route, name: str) -> Link | None:
    """Return the interface of this name, None when there is none; raise OSError for every other refusal."""
    body = INTERFACE.pack(0, 0, 0, 0, 0) + _attribute(IFLA_IFNAME, name.encode() + b"\0")
    try:
        kind, reply = _exchange(route, RTM_GETLINK, NLM_F_REQUEST, body)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    if kind != RTM_NEWLINK:
        raise OSError(errno.EPROTO, "rtnetlink answered another question")
    _family, _type, index, flags, _change = INTERFACE.unpack_from(reply)
    found = attributes(reply[INTERFACE.size :])
    inside = attributes(found.get(IFLA_LINKINFO, b""))
    mtu = struct.unpack("=I", found[IFLA_MTU])[0] if len(found.get(IFLA_MTU, b"")) == 4 else 1500
    return Link(
        index, bool(flags & IFF_UP), mtu, inside.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode("ascii", "replace")
    )


def join(route: Route, port: Link, bridge: Link, address: bytes) -> None:
    """Make `port` a port of `bridge` alone, with its MTU; one that is down gets an address and is switched on.

    The kernel refuses an address for an interface that is up.
    """
    settings = _attribute(IFLA_MTU, struct.pack("=I", bridge.mtu)) + _attribute(
        IFLA_MASTER, struct.pack("=I", bridge.index)
    )
    if not port.up:
        settings += _attribute(IFLA_ADDRESS, address)
    body = INTERFACE.pack(0, 0, port.index, IFF_UP, IFF_UP) + settings
    _exchange(route, RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK, body)


def attributes(data: bytes) -> dict[int, bytes]:
    """Take a run of attributes apart; what follows a malformed one is ignored."""
    found: dict[int, bytes] = {}
    while len(data) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data)
        if not ATTRIBUTE.size <= length <= len(data):
            break
        found[kind & NESTED] = data[ATTRIBUTE.size : length]
        data = data[length + 3 & ~3 :]
    return found


def _attribute(kind: int, value: bytes) -> bytes:
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value.ljust(len(value) + 3 & ~3, b"\0")


def _exchange(route: Route, kind: int, flags: int, body: bytes) -> tuple[int, bytes]:
    """Send one request and return type and body of its answer; a refusal is the OSError that the kernel names."""
    route.send(HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body)
    reply = route.recv(REPLY_LIMIT_BYTES)
    length, answer, _flags, _sequence, _port = HEADER.unpack_from(reply)
    payload = reply[HEADER.size : length]
    if answer == NLMSG_ERROR:
        number = -struct.unpack_from("=i", payload)[0]
        if number:
            raise OSError(number, os.strerror(number))
    return answer, payload
