# SPDX-License-Identifier: GPL-2.0-or-later
"""The image process: has one image served over NBD, by a program that inherits its confinement.

1. become user xenvm-image, without capabilities and with no file but programs and libraries;
2. read one Serve, check the image's header, start the server, shake hands on the connected socket;
3. answer Served and exit; the server stays. On a failure it is killed first.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import fcntl
import os
import stat

from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Serve, Served
from xenvm.errors import ProtocolError, XenvmError
from xenvm.helpers import serve
from xenvm.helpers.image import header
from xenvm.helpers.image.server import Server

SIZE_LIMIT_BYTES = 2**62  # as Served has it


def main() -> int:
    """Run one image worker; return its exit status."""
    channel = serve.broker_channel()
    try:
        channel.send(serve.drop(Role.IMAGE, frozenset()))
        received = serve.request(channel)
        if received is None:
            return 0
        message, descriptors = received
        if not isinstance(message, Serve) or len(descriptors) != Serve.DESCRIPTORS:
            raise ProtocolError("an image worker serves one image, with three descriptors")
        channel.send(_serve(message, *descriptors))
    except XenvmError as error:
        return serve.fail(channel, error)
    return 0


def _serve(message: Serve, image: int, listening: int, connected: int) -> Served:
    driver = _driver(message, image)
    client = socket.socket(fileno=connected)
    server = Server(image, driver, message.label, listening, read_only=message.read_only)
    try:
        size_bytes, flags = server.negotiate(client)
        _check_size(size_bytes)
        return Served(size_bytes, flags, server.pid)
    except OSError as error:
        server.end()
        raise XenvmError(f"the image cannot be served: {error.strerror or error}") from error
    except BaseException:
        server.end()
        raise


def _check_size(untrusted_size: int) -> None:
    if not 0 < untrusted_size <= SIZE_LIMIT_BYTES or untrusted_size % header.SECTOR_BYTES:
        raise XenvmError(f"the image holds {untrusted_size} bytes, which is no whole number of 512-byte sectors")


def _driver(message: Serve, image: int) -> str:
    """Return QEMU's name of the format, once the header and the descriptor agree with the message."""
    status = os.fstat(image)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise XenvmError("the image is neither a regular file nor a block device")
    access = fcntl.fcntl(image, fcntl.F_GETFL) & os.O_ACCMODE
    if access != (os.O_RDONLY if message.read_only else os.O_RDWR):
        wanted = "for reading only" if message.read_only else "for reading and writing"
        raise XenvmError(f"the image is not open {wanted}", hint="open it as the mode of the disk says")
    try:
        length = os.lseek(image, 0, os.SEEK_END)
        head = os.pread(image, header.SECTOR_BYTES, 0)
        tail = os.pread(image, header.SECTOR_BYTES, max(0, length - header.SECTOR_BYTES))
    except OSError as error:
        raise XenvmError(f"the image cannot be read: {error.strerror}") from error
    return header.driver(message.format, head, tail)
