# SPDX-License-Identifier: GPL-2.0-or-later
"""The unpacker process: decompresses a kernel, sums one, or picks firmware tables. It knows nothing of Xen.

1. become user xenvm-unpack, without capabilities, files, sockets or new programs;
2. read one Unpack, Sum or Tables with its descriptors, do it, answer, exit.

Started as `_start.py unpacker UUID unpack|sum|tables`, the last word being what it will be asked for.
"""

import os
import sys

from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Sum, Summed, Tables, Unpack, Unpacked
from xenvm.errors import ProtocolError, XenvmError
from xenvm.helpers import serve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.checks import Message

PIECE_BYTES = 1 << 20


def main() -> int:
    """Run one unpacker; return its exit status."""
    channel = serve.broker_channel()
    try:
        # Each loads what only it needs; once confined, a process can load nothing more.
        if sys.argv[3:] == ["sum"]:
            import hashlib  # noqa: PLC0415
        elif sys.argv[3:] == ["tables"]:
            from xenvm.helpers.unpacker import tables  # noqa: PLC0415
        else:
            from xenvm.helpers.unpacker import formats  # noqa: PLC0415

            formats.prepare()
        channel.send(serve.drop(Role.UNPACKER, frozenset()))
        received = serve.request(channel)
        if received is None:
            return 0
        message, descriptors = received
        if isinstance(message, Unpack) and len(descriptors) == 2:
            answer: Message = Unpacked(formats.unpack(*descriptors))
        elif isinstance(message, Sum) and len(descriptors) == 1:
            os.fsync(descriptors[0])
            digest = hashlib.sha256()
            while piece := os.read(descriptors[0], PIECE_BYTES):
                digest.update(piece)
            answer = Summed(digest.hexdigest())
        elif isinstance(message, Tables) and len(descriptors) > 1:
            target, *sources = descriptors
            size_bytes = tables.pick(target, sources, smbios=message.smbios, oem_types=message.oem_types)
            answer = Unpacked(size_bytes)
        else:
            raise ProtocolError("an unpacker unpacks or sums a file, or picks tables")
        channel.send(answer)
    except XenvmError as error:
        return serve.fail(channel, error)
    return 0
