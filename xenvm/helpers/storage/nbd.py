# SPDX-License-Identifier: GPL-2.0-or-later
"""An NBD connection handed to the kernel over generic netlink: no process has to stay, as NBD_DO_IT would need one.

Messages and attributes: linux/netlink.h, linux/genetlink.h, linux/nbd-netlink.h; flags: linux/nbd.h. Netlink is of the
machine's own byte order.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import fcntl
import os
import struct
import time

from xenvm.errors import TimeoutExpiredError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from xenvm.boundary.workers import Connect

HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
GENERIC: Final = struct.Struct("=BBxx")  # struct genlmsghdr: command, version
ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr: length with this header, type
ERROR: Final = struct.Struct("=i")  # struct nlmsgerr begins with -errno; 0 is an acknowledgement
NETLINK_GENERIC: Final = 16
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLMSG_ERROR: Final = 2
NLA_F_NESTED: Final = 1 << 15
NLA_TYPE_MASK: Final = 0x3FFF

GENL_ID_CTRL: Final = 16
CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 3, 1, 2
NBD_CMD_CONNECT, NBD_CMD_DISCONNECT, NBD_CMD_RECONFIGURE = 1, 2, 3
NBD_ATTR_INDEX, NBD_ATTR_SIZE_BYTES, NBD_ATTR_BLOCK_SIZE_BYTES, NBD_ATTR_TIMEOUT = 1, 2, 3, 4
NBD_ATTR_SERVER_FLAGS, NBD_ATTR_CLIENT_FLAGS, NBD_ATTR_SOCKETS = 5, 6, 7
NBD_ATTR_BACKEND_IDENTIFIER: Final = 10  # shown as /sys/block/nbdN/backend
NBD_SOCK_ITEM, NBD_SOCK_FD = 1, 1
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_CFLAG_DISCONNECT_ON_CLOSE: Final = 1 << 1
VERSION: Final = 1  # of both families

BLOCK_BYTES: Final = 512  # what blkfront counts in, so that a guest sees the sectors that every other disk has
BLKGETSIZE64: Final = 0x80081272  # linux/fs.h
# What a server may take for one request. Without it the kernel waits for ever for one that a dead server had begun, and
# whoever has the device open with it; SCSI disks have 30 seconds.
TIMEOUT_S: Final = 30
REPLY_BYTES: Final = 65536
REPLIES_LIMIT: Final = 8
WAIT_S: Final = 10.0
POLL_S: Final = 0.01

MODULE: Final = "/sys/module/nbd"
MODULE_HINT: Final = "modprobe nbd max_part=0 (and a line `options nbd max_part=0` in /etc/modprobe.d)"

Attributes = dict[int, bytes]


def attribute(kind: int, data: bytes) -> bytes:
    """Return one attribute, padded to the four bytes that the next one begins at."""
    whole = ATTRIBUTE.pack(ATTRIBUTE.size + len(data), kind) + data
    return whole + bytes(-len(whole) % 4)


def request(family: int, command: int, sequence: int, attributes: bytes) -> bytes:
    """Return a request that the kernel acknowledges."""
    body = GENERIC.pack(command, VERSION) + attributes
    return HEADER.pack(HEADER.size + len(body), family, NLM_F_REQUEST | NLM_F_ACK, sequence, 0) + body


def connect_attributes(size_bytes: int, flags: int, descriptor: int, label: str) -> bytes:
    """Return what NBD_CMD_CONNECT needs; without an index the kernel takes a free device, or makes one."""
    one = attribute(NBD_SOCK_ITEM | NLA_F_NESTED, attribute(NBD_SOCK_FD, struct.pack("=I", descriptor)))
    return b"".join(
        (
            attribute(NBD_ATTR_SIZE_BYTES, struct.pack("=Q", size_bytes)),
            attribute(NBD_ATTR_BLOCK_SIZE_BYTES, struct.pack("=Q", BLOCK_BYTES)),
            attribute(NBD_ATTR_TIMEOUT, struct.pack("=Q", TIMEOUT_S)),
            attribute(NBD_ATTR_SERVER_FLAGS, struct.pack("=Q", flags)),
            _identifier(label),
            attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, one),
        )
    )


def _identifier(label: str) -> bytes:
    return attribute(NBD_ATTR_BACKEND_IDENTIFIER, label.encode("ascii") + b"\0")


def parse_attributes(data: bytes) -> Attributes:
    """Return the attributes by their number; raise ValueError where lengths do not fit."""
    found: Attributes = {}
    place = 0
    while place + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, place)
        if length < ATTRIBUTE.size or place + length > len(data):
            raise ValueError("an attribute is longer than its message")
        found[kind & NLA_TYPE_MASK] = data[place + ATTRIBUTE.size : place + length]
        place += length + -length % 4
    return found


def parse_messages(data: bytes, sequence: int) -> Iterator[Attributes | int]:
    """Give, of one datagram, the answers to a request: attributes, or the number of an error (0 is the end).

    Raise ValueError where lengths do not fit.
    """
    place = 0
    while place + HEADER.size <= len(data):
        length, kind, _, answered, _ = HEADER.unpack_from(data, place)
        if length < HEADER.size or place + length > len(data):
            raise ValueError("a message is longer than its datagram")
        body = data[place + HEADER.size : place + length]
        if answered == sequence:
            if kind == NLMSG_ERROR:
                if len(body) < ERROR.size:
                    raise ValueError("an acknowledgement is too short")
                yield -int(ERROR.unpack_from(body)[0])
            elif kind >= GENL_ID_CTRL:
                yield parse_attributes(body[GENERIC.size :])
        place += length + -length % 4


class Kernel:
    """The kernel's end of NBD, in its generic netlink."""

    def __init__(self) -> None:
        """Find the family; raise XenvmError when the module is not loaded, or would look at a guest's partitions."""
        self._check_module()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self._socket.settimeout(WAIT_S)
        self._sequence = 0
        try:
            answer = self._ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0"))
            (self._family,) = struct.unpack("=H", answer[CTRL_ATTR_FAMILY_ID])
        except (OSError, KeyError, struct.error) as error:
            raise XenvmError("the kernel does not answer for network block devices", hint=MODULE_HINT) from error

    def connect(self, sock: int, message: Connect) -> tuple[int, str]:
        """Make a block device of the connection; return it open, and its path.

        It goes by itself when its last opener closes it. That is asked for only once it is open here: udev opens and
        closes each new device, and could be the last one before.
        """
        flags = message.flags | (NBD_FLAG_READ_ONLY if message.read_only else 0)
        wanted = connect_attributes(message.size_bytes, flags, sock, message.label)
        try:
            answer = self._ask(self._family, NBD_CMD_CONNECT, wanted)
            (index,) = struct.unpack("=I", answer[NBD_ATTR_INDEX])
        except (OSError, KeyError, struct.error) as error:
            raise XenvmError(f"the kernel makes no block device of the image: {_why(error)}") from error
        path = f"/dev/nbd{index}"
        own = attribute(NBD_ATTR_INDEX, struct.pack("=I", index)) + _identifier(message.label)
        device = -1
        try:
            device = _open(path, message.size_bytes, os.O_RDONLY if message.read_only else os.O_RDWR)
            close = struct.pack("=Q", NBD_CFLAG_DISCONNECT_ON_CLOSE)
            self._ask(self._family, NBD_CMD_RECONFIGURE, own + attribute(NBD_ATTR_CLIENT_FLAGS, close))
        except (OSError, XenvmError) as error:
            if device >= 0:
                os.close(device)
            self.disconnect(index)
            if isinstance(error, XenvmError):
                raise
            raise XenvmError(f"{path}: cannot be used: {_why(error)}") from error
        return device, path

    def disconnect(self, index: int) -> None:
        """Take the connection away from a device; one that has none is fine."""
        try:
            self._ask(self._family, NBD_CMD_DISCONNECT, attribute(NBD_ATTR_INDEX, struct.pack("=I", index)))
        except OSError:  # it is gone already, or ends with its server
            return

    def _ask(self, family: int, command: int, attributes: bytes) -> Attributes:
        """Return the attributes of the kernel's answer; raise OSError with its error, or TimeoutError."""
        self._sequence += 1
        self._socket.sendto(request(family, command, self._sequence, attributes), (0, 0))
        found: Attributes = {}
        for _ in range(REPLIES_LIMIT):
            data, sender = self._socket.recvfrom(REPLY_BYTES)
            if sender[0] != 0:  # another process; the kernel is port 0
                continue
            try:
                for answer in parse_messages(data, self._sequence):
                    if not isinstance(answer, int):
                        found |= answer
                    elif answer:
                        raise OSError(answer, os.strerror(answer))
                    else:
                        return found
            except ValueError as error:
                raise OSError(str(error)) from error
        raise OSError("no acknowledgement among many messages")

    @staticmethod
    def _check_module() -> None:
        try:
            parameter = os.open(f"{MODULE}/parameters/max_part", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise XenvmError("an image needs the kernel's module nbd, which is not loaded", hint=MODULE_HINT) from error
        try:
            partitions = os.read(parameter, 16).strip()
        finally:
            os.close(parameter)
        if partitions != b"0":
            raise XenvmError(
                "the module nbd is loaded so that dom0 would read the partition tables guests write "
                f"(max_part={partitions.decode('ascii', 'replace')})",
                hint=f"modprobe -r nbd; {MODULE_HINT}",
            )


def _open(path: str, size_bytes: int, access: int) -> int:
    """Open the device once its node is there, and wait until it has its size."""
    end = time.monotonic() + WAIT_S
    device = -1
    found = 0
    while True:
        try:
            device = os.open(path, access | os.O_CLOEXEC)
        except FileNotFoundError:
            device = -1
        if device >= 0:
            found = size_of(device)
            if found == size_bytes:
                return device
            os.close(device)
        if time.monotonic() >= end:
            state = f"has {found} bytes, not {size_bytes}," if device >= 0 else "is not there"
            raise TimeoutExpiredError(f"{path} {state} after {WAIT_S:g} s", hint="the kernel log (dmesg) says more")
        time.sleep(POLL_S)


def size_of(device: int) -> int:
    """Return the size of a block device in bytes."""
    size = bytearray(8)
    fcntl.ioctl(device, BLKGETSIZE64, size)
    return int.from_bytes(size, "little")


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {WAIT_S:g} s"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "its answer lacks the number of the device"
