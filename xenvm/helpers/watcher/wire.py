# SPDX-License-Identifier: GPL-2.0-or-later
"""A xenstore connection that can only watch and read: no other request exists in this code.

Whoever holds a socket to xenstored has dom0's full power over it, so the process that keeps one for the life of a VM
must not have the words for more. Layout and numbers: xen/io/xs_wire.h (struct xsd_sockmsg, enum xsd_sockmsg_type).
"""

from __future__ import annotations

import struct

from xenvm.choice import IntChoice
from xenvm.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket as socket
    from collections.abc import Iterator
    from typing import Final

HEADER: Final = struct.Struct("=IIII")  # type, req_id, tx_id, len
PAYLOAD_LIMIT_BYTES: Final = 4096  # XENSTORE_PAYLOAD_MAX
NAME_LIMIT_BYTES: Final = 256


class Request(IntChoice):
    """The requests this connection can make."""

    WATCH = 4


WATCH_EVENT: Final = 15
ERROR: Final = 16


class WatchConnection:
    """Watches on one socket; `events` yields the tokens of the watches that fired."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._pending = bytearray()
        self._sent = 0

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._socket.fileno()

    def watch(self, path: bytes, token: bytes) -> None:
        """Ask for events on `path`; xenstored fires once at once. The answer is checked by `events`."""
        self._sent += 1
        payload = path + b"\0" + token + b"\0"
        self._socket.sendall(HEADER.pack(Request.WATCH, self._sent, 0, len(payload)) + payload)

    def events(self) -> Iterator[bytes]:
        """Read what has arrived and yield the token of each event.

        Raise ProtocolError when xenstored closes, refuses a watch or breaks the protocol: the connection is of no
        more use, and whoever starts the next one reads the state afresh.
        """
        received = self._socket.recv(65536)
        if not received:
            raise ProtocolError("xenstored closed the connection")
        self._pending += received
        while len(self._pending) >= HEADER.size:
            kind, _request, _transaction, length = HEADER.unpack_from(self._pending)
            if length > PAYLOAD_LIMIT_BYTES:
                raise ProtocolError("xenstored claims a payload longer than the protocol allows")
            if len(self._pending) < HEADER.size + length:
                return
            payload = bytes(self._pending[HEADER.size : HEADER.size + length])
            del self._pending[: HEADER.size + length]
            if kind == ERROR:
                raise ProtocolError(f"xenstored refused a watch: {payload[:32]!r}")
            if kind == WATCH_EVENT:
                parts = payload.split(b"\0")
                if len(parts) != 3 or len(parts[1]) > NAME_LIMIT_BYTES:
                    raise ProtocolError("xenstored sent a watch event of another form")
                yield parts[1]
            elif kind != Request.WATCH:
                raise ProtocolError(f"xenstored answered with type {kind}")
