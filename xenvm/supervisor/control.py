# SPDX-License-Identifier: GPL-2.0-or-later
"""The command socket: clients, their rights, requests in and replies out. No knowledge of what commands do.

The wire is the original's: a 4-byte big-endian length and a JSON-RPC 2.0 request of string parameters. An old client
gets a bare JSON reply and the end of the connection; one that sends `"xenvm": 1` gets framed replies and may go on.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import os
import struct
import time

from xenvm import jsontext
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

LENGTH: Final = struct.Struct(">I")
INT: Final = struct.Struct("@i")
REQUEST_LIMIT_BYTES: Final = 64 * 1024
OUTPUT_LIMIT_BYTES: Final = 1 << 20  # of a client that does not read, then it is dropped
CLIENTS_LIMIT: Final = 128
KEPT_FOR_ROOT: Final = 16  # of those, so that no crowd of users locks the administrator out
CLIENTS_PER_USER: Final = 32
REQUEST_WAIT_S: Final = 10.0  # from its first byte to its last
PARAMS_LIMIT: Final = 16
CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred, unix(7)
GROUPS_LIMIT: Final = 256  # Python asks for 1024 bytes at most; of a user in more groups only the first one counts
INVALID_PARAMS: Final = -32602  # the one error code of the original
PARSE_ERROR: Final = -32700  # JSON-RPC 2.0
SO_PEERGROUPS: Final = 59  # asm-generic/socket.h


class Rights:
    """Which users may do what: root and the group xenvm all, the group xenvm-read reading commands only."""

    def __init__(self, all_gid: int, read_gid: int) -> None:
        self._all_gid, self._read_gid = all_gid, read_gid

    def of(self, uid: int, groups: frozenset[int]) -> str:
        """Return "all", "read" or "" for a peer."""
        if uid == 0 or uid == os.getuid() or self._all_gid in groups:
            return "all"
        return "read" if self._read_gid in groups else ""


class Request:
    """One checked request."""

    __slots__ = ("identifier", "method", "params")

    def __init__(self, identifier: object, method: str, params: Mapping[str, str]) -> None:
        self.identifier = identifier
        self.method = method
        self.params = params


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket, uid: int, rights: str) -> None:
        self.socket = connection
        self.uid = uid
        self.rights = rights
        self.modern = False
        self.subscribed = False
        self.waiting = False  # a request is being worked on; the next one is read when it is answered
        self.closing = False  # to be closed once everything is sent
        self.ended = False  # it sends nothing more, but may still want to hear
        self.begun_s = 0.0
        self._in = bytearray()
        self._handed: list[int] = []
        self._out = bytearray()

    def fileno(self) -> int:
        """Return the descriptor, for epoll."""
        return self.socket.fileno()

    def read(self) -> bool:
        """Take what has arrived, or that nothing more will; return False when the connection is of no more use."""
        try:
            received, handed = self._receive()
        except BlockingIOError:
            return True
        except OSError:
            return False
        if handed:
            self._keep(handed)
        if not self._in:
            self.begun_s = time.monotonic()
        self._in += received
        self.ended = not received
        return len(self._in) <= 2 * REQUEST_LIMIT_BYTES

    def _receive(self) -> tuple[bytes, list[int]]:
        # Not socket.recv_fds: in Python 3.11 it drops its flags, and the descriptors would be inheritable.
        received, ancillary, _flags, _ = self.socket.recvmsg(
            REQUEST_LIMIT_BYTES, socket.CMSG_LEN(INT.size), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        handed = [
            number
            for level, kind, data in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for (number,) in INT.iter_unpack(data[: len(data) // INT.size * INT.size])
        ]
        return received, handed

    def _keep(self, handed: list[int]) -> None:
        """Keep a descriptor for the next request; close one that comes amid a request, or from who may do nothing."""
        if self.rights == "all" and not self.waiting:
            handed, self._handed = self._handed, handed  # the newest counts
        for descriptor in handed:
            os.close(descriptor)

    def take_handed(self) -> list[int]:
        """Return the descriptor that came with the present request, if one did; it is the caller's to close."""
        handed, self._handed = self._handed, []
        return handed

    def drop_handed(self) -> None:
        """Close a descriptor that nobody asked for."""
        for descriptor in self.take_handed():
            os.close(descriptor)

    @property
    def partial(self) -> bool:
        """Tell whether a request has begun and not ended."""
        return bool(self._in) and not self.waiting

    def next_request(self) -> Request | None:
        """Return the next whole request; raise ProtocolError when what arrived is none."""
        if len(self._in) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._in)
        if not 0 < length <= REQUEST_LIMIT_BYTES:
            raise ProtocolError(f"a request has 1 to {REQUEST_LIMIT_BYTES} bytes, not {length}")
        if len(self._in) < LENGTH.size + length:
            return None
        untrusted_body = bytes(self._in[LENGTH.size : LENGTH.size + length])
        del self._in[: LENGTH.size + length]
        self.begun_s = time.monotonic()
        request, self.modern = decode(untrusted_body)
        return request

    def reply(self, identifier: object, text: str, data: object = None, descriptor: int = -1) -> None:
        """Answer a request. `descriptor` travels with the first byte, and is closed here in any case.

        A client that leaves so much unread that it cannot travel at once is let go: else descriptors would gather here.
        """
        result: object = {"text": text, "data": data} if self.modern else (text or None)
        self._send({"jsonrpc": "2.0", "result": result, "id": identifier}, descriptor)
        self.closing = not self.modern
        self.waiting = False

    def refuse(self, identifier: object, error: XenvmError, code: int = INVALID_PARAMS) -> None:
        """Answer with an error."""
        data = {"name": ExitCode(error.code).name, "exit": int(error.code), "hint": error.hint}
        fault: dict[str, object] = {"code": code, "message": error.message}
        if self.modern:
            fault["data"] = data
        self._send({"jsonrpc": "2.0", "error": fault, "id": identifier})
        self.closing = self.closing or not self.modern or code == PARSE_ERROR
        self.waiting = False

    def notify(self, params: Mapping[str, object]) -> None:
        """Send an event; it is lost, with the connection, when the client does not read."""
        self._send({"jsonrpc": "2.0", "method": "event", "params": params})

    def _send(self, message: Mapping[str, object], descriptor: int = -1) -> None:
        body = jsontext.dumps(message).encode("ascii")
        frame = LENGTH.pack(len(body)) + body if self.modern else body
        if descriptor >= 0:
            self.flush()
            frame = self._hand_over(frame, descriptor)
        self._out += frame
        self.flush()

    def _hand_over(self, frame: bytes, descriptor: int) -> bytes:
        """Send the beginning of a reply with a descriptor; return the rest."""
        sent = 0
        if not self._out:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, INT.pack(descriptor))]
            with suppress(OSError):
                sent = self.socket.sendmsg([frame], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        os.close(descriptor)
        if not sent:
            self._out.clear()
            self.closing = True
            return b""
        return frame[sent:]

    def flush(self) -> bool:
        """Send what the peer takes; return False when the connection is of no more use."""
        while self._out:
            try:
                sent = self.socket.send(self._out, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return len(self._out) <= OUTPUT_LIMIT_BYTES
            except OSError:
                return False
            del self._out[:sent]
        return not self.closing

    @property
    def has_output(self) -> bool:
        """Tell whether something waits for the peer to read."""
        return bool(self._out)

    def close(self) -> None:
        """Close the connection."""
        self.drop_handed()
        self.socket.close()


def accept(listener: socket.socket, rights: Rights, clients: list[Client]) -> Client | None:
    """Accept one connection, with the rights its peer credentials give; None when there is none after all.

    A user with too many connections, or one more than the monitor serves, is disconnected at once. Raise OSError when
    no descriptor is left.
    """
    try:
        connection = _accepted(listener)
    except BlockingIOError:
        return None
    uid, groups = _peer(connection)
    same_user = sum(client.uid == uid for client in clients)
    full = len(clients) >= (CLIENTS_LIMIT if uid == 0 else CLIENTS_LIMIT - KEPT_FOR_ROOT)
    if full or (uid != 0 and same_user >= CLIENTS_PER_USER):
        connection.close()
        return None
    return Client(connection, uid, rights.of(uid, groups))


def _accepted(listener: socket.socket) -> socket.socket:
    """Accept a connection; the one step of socket.accept that is not in the C module is to make an object of it."""
    descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
    return socket.socket(fileno=descriptor)


def _peer(connection: socket.socket) -> tuple[int, frozenset[int]]:
    """Return uid and groups of the peer as they were when it connected (SO_PEERCRED, SO_PEERGROUPS)."""
    _pid, uid, gid = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    groups = {gid}
    with suppress(OSError):
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_LIMIT * 4)
        groups.update(struct.unpack(f"={len(packed) // 4}I", packed))
    return uid, frozenset(groups)


def decode(untrusted_body: bytes) -> tuple[Request, bool]:
    """Return the request in a body and whether its sender is a new client; raise ProtocolError for anything else."""
    try:
        untrusted = jsontext.loads(untrusted_body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ProtocolError("the request is not JSON") from None
    if not isinstance(untrusted, dict) or untrusted.get("jsonrpc") != "2.0":
        raise ProtocolError("the request is not a JSON-RPC 2.0 object")
    if untrusted.keys() - {"jsonrpc", "method", "params", "id", "xenvm"}:
        raise ProtocolError("the request has unknown members")
    method, params, identifier = untrusted.get("method"), untrusted.get("params", {}), untrusted.get("id", 0)
    if isinstance(params, list):
        params = {}  # as in the original: arrays count as no parameters
    if not isinstance(method, str) or len(method) > 64 or not isinstance(params, dict):
        raise ProtocolError("the request has no method and parameters of the right kind")
    if type(identifier) not in (int, str, type(None)) or len(str(identifier)) > 64:
        raise ProtocolError("the request's id is not a short text or number")
    if len(params) > PARAMS_LIMIT or not all(isinstance(value, str) for value in params.values()):
        raise ProtocolError("parameters are at most 16 texts")
    return Request(identifier, method, params), untrusted.get("xenvm") == 1
