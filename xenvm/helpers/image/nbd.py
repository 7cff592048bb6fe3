# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's side of an NBD handshake: fixed newstyle, one export without a name, no TLS. The server is not trusted.

Numbers and layouts: doc/proto.md of the NetworkBlockDevice project, "Newstyle negotiation".
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import select
import struct
import time

from xenvm.errors import ProtocolError, TimeoutExpiredError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

GREETING: Final = struct.Struct(">8s8sH")
MAGIC, OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
FIXED_NEWSTYLE, NO_ZEROES = 1, 2  # the server's flags, and the client's

OPTION: Final = struct.Struct(">8sII")
OPT_GO: Final = 7
GO_REQUEST: Final = struct.pack(">IH", 0, 0)  # the length of the export's name, and how many more things are asked
REPLY: Final = struct.Struct(">QIII")
REPLY_MAGIC: Final = 0x3E889045565A9
REP_ACK, REP_INFO = 1, 3
REP_IS_ERROR: Final = 1 << 31
EXPORT: Final = struct.Struct(">HQH")
INFO_EXPORT: Final = 0

REPLIES_LIMIT: Final = 8  # QEMU sends one INFO and one ACK
REPLY_BYTES_LIMIT: Final = 4096
ERROR_CHARACTERS: Final = 300


def negotiate(sock: socket.socket, end: float) -> tuple[int, int]:
    """Bring the connection to its transmission phase; return the export's size in bytes and its transmission flags.

    `end` is the deadline, in seconds of time.monotonic(). Raise TimeoutExpiredError, or ProtocolError for what no
    honest server says.
    """
    magic, option_magic, flags = GREETING.unpack(_receive(sock, GREETING.size, end))
    if (magic, option_magic) != (MAGIC, OPTION_MAGIC) or not flags & FIXED_NEWSTYLE:
        raise ProtocolError("NBD: the server does not greet as fixed newstyle")
    request = struct.pack(">I", FIXED_NEWSTYLE | (flags & NO_ZEROES))
    request += OPTION.pack(OPTION_MAGIC, OPT_GO, len(GO_REQUEST)) + GO_REQUEST
    if sock.send(request, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(request):
        raise ProtocolError("NBD: the server does not read")
    export: tuple[int, int] | None = None
    for _ in range(REPLIES_LIMIT):
        kind, untrusted_data = _reply(sock, end)
        if kind == REP_INFO:
            export = _export(untrusted_data) or export
        elif kind == REP_ACK and export is not None and not untrusted_data:
            return export
        elif kind & REP_IS_ERROR:
            raise ProtocolError(f"NBD: the server refuses: {_text(untrusted_data) or hex(kind)}")
        else:
            raise ProtocolError(f"NBD: the server replies with kind {kind} out of place")
    raise ProtocolError(f"NBD: more than {REPLIES_LIMIT} replies")


def _reply(sock: socket.socket, end: float) -> tuple[int, bytes]:
    magic, option, kind, length = REPLY.unpack(_receive(sock, REPLY.size, end))
    if magic != REPLY_MAGIC or option != OPT_GO or length > REPLY_BYTES_LIMIT:
        raise ProtocolError("NBD: not a reply to what was asked")
    return kind, _receive(sock, length, end)


def _export(untrusted_data: bytes) -> tuple[int, int] | None:
    """Return size and flags from one piece of information; None from one of another kind."""
    if len(untrusted_data) < 2 or int.from_bytes(untrusted_data[:2], "big") != INFO_EXPORT:
        return None
    if len(untrusted_data) != EXPORT.size:
        raise ProtocolError("NBD: the description of the export has another length")
    _, size, flags = EXPORT.unpack(untrusted_data)
    return size, flags


def _text(untrusted_data: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in untrusted_data[:ERROR_CHARACTERS])


def _receive(sock: socket.socket, length: int, end: float) -> bytes:
    """Return exactly `length` bytes; nothing beyond them is taken, since the kernel reads on from there."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    data = b""
    while len(data) < length:
        left_ms = (end - time.monotonic()) * 1000
        if left_ms <= 0 or not poll.poll(left_ms):
            raise TimeoutExpiredError("NBD: the server did not answer in time")
        try:
            piece = sock.recv(length - len(data), socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        if not piece:
            raise ProtocolError("NBD: the server ended the connection")
        data += piece
    return data
