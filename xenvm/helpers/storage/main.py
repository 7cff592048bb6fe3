# SPDX-License-Identifier: GPL-2.0-or-later
"""The storage process: makes one kernel block device, of an NBD connection or by encryption, and hands it over open.

Or it removes those that a worker which died over one of them has left.

It stays root, whom the devices belong to, with the capability SYS_ADMIN, which the kernel asks for; it starts nothing.
What it made lives exactly as long as something has it open.
"""

from __future__ import annotations

import os

from xenvm.boundary.messages import NO_DOMAIN, Done
from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Connect, Decrypt, Release
from xenvm.errors import ProtocolError, XenvmError
from xenvm.helpers import serve
from xenvm.helpers.storage import crypt, nbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.checks import Message


def main() -> int:
    """Run one storage worker; return its exit status."""
    channel = serve.broker_channel()
    try:
        channel.send(serve.drop(Role.STORAGE, frozenset()))
        received = serve.request(channel)
        if received is None:
            return 0
        if isinstance(received[0], Release):
            _release(received[0])
            channel.send(Done(0, NO_DOMAIN, ""))
            return 0
        device, path = _make(*received)
        channel.send(Done(0, NO_DOMAIN, path), [device])
    except XenvmError as error:
        return serve.fail(channel, error)
    os.close(device)
    return 0


def _make(message: Message, descriptors: list[int]) -> tuple[int, str]:
    if isinstance(message, Connect) and len(descriptors) == Connect.DESCRIPTORS:
        kernel = nbd.Kernel()
        return kernel.connect(descriptors[0], message)
    if isinstance(message, Decrypt) and len(descriptors) == Decrypt.DESCRIPTORS:
        return crypt.open_mapping(message, descriptors[0], descriptors[1])
    raise ProtocolError("a storage worker connects, decrypts or releases")


def _release(message: Release) -> None:
    if message.mappings:
        crypt.remove_mappings(message.mappings)
    if message.nbds:
        kernel = nbd.Kernel()
        for index in message.nbds:
            kernel.disconnect(index)
