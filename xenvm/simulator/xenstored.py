# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated xenstored: the real wire protocol on a unix socket. Whoever connects is dom0, as with the real one.

Layout and numbers: xen/io/xs_wire.h (struct xsd_sockmsg, enum xsd_sockmsg_type). Guests and the simulated kernel do not
come over the wire but call the same requests in their own name.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from types import MappingProxyType

from xenvm.simulator.points import Points
from xenvm.simulator.tree import CONTROL_DOMID, Change, Refused, Tree, View, absolute, parent_of, permission

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Final

    from xenvm.simulator.loop import Loop

HEADER: Final = struct.Struct("=IIII")  # type, req_id, tx_id, len
PAYLOAD_LIMIT_BYTES: Final = 4096
OUTPUT_LIMIT_BYTES: Final = 4 << 20  # of a client that does not read its watch events
BACKLOG: Final = 512
WATCHES_QUOTA: Final = 128  # of a guest
SPECIAL: Final = frozenset({"@introduceDomain", "@releaseDomain"})
DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH, TRANSACTION_START, TRANSACTION_END, INTRODUCE, RELEASE = range(1, 10)
GET_DOMAIN_PATH, WRITE, MKDIR, RM, SET_PERMS, WATCH_EVENT, ERROR, IS_DOMAIN_INTRODUCED, RESUME = range(10, 19)
RESET_WATCHES, DIRECTORY_PART = 21, 22
OK: Final = b"OK\0"
CREDENTIALS: Final = struct.Struct("@iII")  # pid, uid, gid
EFFECTS: Final = {
    WRITE: "write",
    MKDIR: "mkdir",
    RM: "rm",
    SET_PERMS: "permissions",
    INTRODUCE: "introduce",
    RELEASE: "release",
    RESUME: "resume",
}
"""The requests that change something at once."""


class Watcher:
    """One watch: whom to tell, and by which words."""

    def __init__(self, path: str, domid: int, tell: Callable[[str], None]) -> None:
        self.path = path
        self.domid = domid
        self.tell = tell


class Xenstored:
    """The daemon: the tree, its watches, its connections, and the domains it knows."""

    def __init__(self, loop: Loop, path: str, points: Points | None = None) -> None:
        self._loop = loop
        self.points = points or Points()
        self._path = path
        self.tree = Tree()
        self._live = self.tree.view()
        self._watchers: dict[str, list[Watcher]] = {}
        self._introduced: dict[int, bool] = {}  # domid: its end has been told
        self.exists: Callable[[int], bool] = lambda _domid: False
        """Whether the hypervisor has such a domain."""
        self.clients: set[_Connection] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        loop.watch(self._listener.fileno(), self._accept)
        for node in ("/local", "/local/domain", "/local/domain/0", "/tool", "/tool/xenstored"):
            self._live.make(CONTROL_DOMID, node)
        self._live.write(CONTROL_DOMID, "/local/domain/0/name", b"Domain-0")
        self._live.write(CONTROL_DOMID, "/local/domain/0/domid", b"0")
        self._live.changes.clear()

    @property
    def connections(self) -> int:
        """How many clients there are."""
        return len(self.clients)

    def disconnect(self) -> None:
        """End all connections."""
        for client in [*self.clients]:
            client.close()

    def close(self) -> None:
        """Remove the socket."""
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108

    def _accept(self, _events: int) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            _Connection(self, self._loop, connection)

    # In the name of a domain

    def read(self, domid: int, path: str) -> bytes | None:
        """Return a value, None when there is none to see."""
        try:
            return self._live.read(domid, path)
        except Refused:
            return None

    def names(self, path: str) -> list[str]:
        """Return the children of a node, none when it is not there."""
        try:
            return self._live.names(CONTROL_DOMID, path)
        except Refused:
            return []

    def write(self, domid: int, path: str, value: str | bytes) -> bool:
        """Write as a domain does; tell whether it was allowed to."""
        try:
            self._live.write(domid, path, value.encode("ascii") if isinstance(value, str) else value)
        except Refused:
            return False
        self.settle(self._live)
        return True

    def make(self, path: str) -> None:
        """Make an empty node of dom0."""
        self._live.make(CONTROL_DOMID, path)
        self.settle(self._live)

    def remove(self, domid: int, path: str) -> bool:
        """Remove a node as a domain does; tell whether it was allowed to."""
        try:
            self._live.remove(domid, path)
        except Refused:
            return False
        self.settle(self._live)
        return True

    def watch(self, domid: int, path: str, tell: Callable[[str], None]) -> Watcher | None:
        """Have `tell` called with the path of each change at or below `path`; None when the quota is used up."""
        if domid != CONTROL_DOMID:
            own = sum(one.domid == domid for several in self._watchers.values() for one in several)
            if own >= WATCHES_QUOTA:
                return None
        watcher = Watcher(path, domid, tell)
        self._watchers.setdefault(path, []).append(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """End a watch."""
        watchers = self._watchers.get(watcher.path, [])
        if watcher in watchers:
            watchers.remove(watcher)
        if not watchers:
            self._watchers.pop(watcher.path, None)

    def settle(self, view: View) -> None:
        """Tell of what a view has changed."""
        changes, view.changes = view.changes, []
        for change in changes:
            self.fire(change)

    def fire(self, change: Change) -> None:
        """Tell the watches at and above a changed node, and those on the nodes that went with it."""
        at = change.path
        while True:
            for watcher in [*self._watchers.get(at, [])]:
                watcher.tell(change.path)
            if at == "/" or at.startswith("@"):
                break
            at = parent_of(at)
        for path in change.removed:
            if path != change.path:
                for watcher in [*self._watchers.get(path, [])]:
                    watcher.tell(path)

    # Domains

    def introduce(self, domid: int) -> None:
        """Learn of a domain; Refused when there is none of this number."""
        if domid == CONTROL_DOMID or not self.exists(domid):
            raise Refused("EINVAL" if domid == CONTROL_DOMID else "ENOENT")
        if domid not in self._introduced:
            self._introduced[domid] = False
            self.fire(Change("@introduceDomain"))

    def introduced(self, domid: int) -> bool:
        """Tell whether a domain has been introduced."""
        return domid in self._introduced or domid == CONTROL_DOMID

    def resumed(self, domid: int) -> None:
        """Forget that a domain had shut down, so that the next time is told again."""
        if domid not in self._introduced:
            raise Refused("ENOENT")
        self._introduced[domid] = False

    def ended(self, domid: int, *, gone: bool) -> None:
        """Hear from the hypervisor that a domain has shut down or, `gone`, is no more."""
        known = domid in self._introduced
        if gone and known:
            del self._introduced[domid]
            self._live.forget(domid)
            self.settle(self._live)
            self.fire(Change("@releaseDomain"))
        elif known and not self._introduced[domid]:
            self._introduced[domid] = True
            self.fire(Change("@releaseDomain"))

    def release(self, domid: int) -> None:
        """Forget a domain on request."""
        if domid not in self._introduced:
            raise Refused("ENOENT")
        del self._introduced[domid]
        self.fire(Change("@releaseDomain"))


class _Connection:
    """One client, which is dom0."""

    def __init__(self, daemon: Xenstored, loop: Loop, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._daemon, self._loop, self._socket = daemon, loop, connection
        self._in, self._out = bytearray(), bytearray()
        self._live = daemon.tree.view()
        self._transactions: dict[int, View] = {}
        self._last_transaction = 0
        self._watches: dict[tuple[bytes, bytes], Watcher] = {}
        self._events: list[bytes] | None = None  # while a request is worked on: events go after its answer
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        self._pid: int = CREDENTIALS.unpack(credentials)[0]
        self._waits = False  # a request is held
        daemon.clients.add(self)
        loop.watch(connection.fileno(), self._ready)

    def close(self) -> None:
        """End the connection with its watches and transactions."""
        if self._socket.fileno() < 0:
            return
        self._loop.forget(self._socket.fileno())
        self._socket.close()
        for watcher in self._watches.values():
            self._daemon.unwatch(watcher)
        self._daemon.clients.discard(self)

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) or self._socket.fileno() < 0:
            return
        try:
            received = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self.close()
            return
        self._in += received
        self._requests()

    def _requests(self) -> None:
        """Do what has arrived, one after the other."""
        while len(self._in) >= HEADER.size and self._socket.fileno() >= 0 and not self._waits:
            kind, number, transaction, length = HEADER.unpack_from(self._in)
            if length > PAYLOAD_LIMIT_BYTES:
                self.close()
                return
            if len(self._in) < HEADER.size + length:
                return
            payload = bytes(self._in[HEADER.size : HEADER.size + length])
            del self._in[: HEADER.size + length]
            effect = self._effect(kind, transaction, payload)
            if effect:
                self._waits = True
                self._daemon.points.pass_by(
                    effect,
                    self._pid,
                    lambda: self._go_on(kind, number, transaction, payload),  # noqa: B023
                )
            else:
                self._request(kind, number, transaction, payload)

    def _effect(self, kind: int, transaction: int, payload: bytes) -> str:
        """Name what others will see of a request, "" when that is nothing."""
        if transaction:
            view = self._transactions.get(transaction)
            changes = view.changes if view and kind == TRANSACTION_END and payload == b"T\0" else []
            return f"xenstore commit {changes[0].path}" if changes else ""
        word, path = EFFECTS.get(kind), payload.partition(bytes(1))[0].decode("ascii", "replace")
        if not word or (kind == RM and self._daemon.read(CONTROL_DOMID, path) is None):
            return ""
        return f"xenstore {word} {path}"

    def _go_on(self, kind: int, number: int, transaction: int, payload: bytes) -> None:
        """Do a request that was held, and those behind it; nothing when whoever sent it has gone."""
        self._waits = False
        if self._socket.fileno() >= 0:
            self._request(kind, number, transaction, payload)
            if self._in:
                self._loop.soon(self._requests)

    def _request(self, kind: int, number: int, transaction: int, payload: bytes) -> None:
        self._events = []
        try:
            answer = self._answer(kind, transaction, payload)
        except Refused as refused:
            kind, answer = ERROR, refused.name.encode("ascii") + b"\0"
        events, self._events = self._events, None
        self._send(HEADER.pack(kind, number, transaction, len(answer)) + answer + b"".join(events))

    def _answer(self, kind: int, transaction: int, payload: bytes) -> bytes:
        view = self._live
        if transaction and kind not in (TRANSACTION_START, WATCH, UNWATCH):
            if transaction not in self._transactions:
                raise Refused("ENOENT")
            view = self._transactions[transaction]
        handler = self._HANDLERS.get(kind)
        if handler is None:
            raise Refused("ENOSYS")
        answer = handler(self, view, payload, transaction)
        if len(answer) > PAYLOAD_LIMIT_BYTES:
            raise Refused("E2BIG")
        return answer

    def _send(self, data: bytes) -> None:
        self._out += data
        self._flush()

    def _flush(self) -> None:
        if self._socket.fileno() < 0:
            return
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            if len(self._out) > OUTPUT_LIMIT_BYTES:
                self.close()
                return
        except OSError:
            self.close()
            return
        events = select.EPOLLIN | (select.EPOLLOUT if self._out else 0)
        self._loop.watch(self._socket.fileno(), self._ready, events)

    # Requests: each returns the payload of its answer

    def _settled(self, view: View) -> bytes:
        if view is self._live:
            self._daemon.settle(view)
        return OK

    def _directory(self, view: View, payload: bytes, _transaction: int) -> bytes:
        names = view.names(CONTROL_DOMID, _path(payload))
        return b"".join(name.encode("ascii") + b"\0" for name in names)

    def _directory_part(self, view: View, payload: bytes, _transaction: int) -> bytes:
        parts = payload.split(b"\0")
        if len(parts) != 3 or not parts[1].isdigit():
            raise Refused("EINVAL")
        path = absolute(parts[0], CONTROL_DOMID)
        names = b"".join(name.encode("ascii") + b"\0" for name in view.names(CONTROL_DOMID, path))
        start = b"%d\0" % view.generation(path)
        piece = names[int(parts[1]) :]
        room = PAYLOAD_LIMIT_BYTES - len(start)
        if len(piece) >= room:  # whole names only
            return start + piece[: piece.rindex(b"\0", 0, room) + 1]
        return start + piece + b"\0"

    def _read(self, view: View, payload: bytes, _transaction: int) -> bytes:
        return view.read(CONTROL_DOMID, _path(payload))

    def _write(self, view: View, payload: bytes, _transaction: int) -> bytes:
        path, separator, value = payload.partition(b"\0")
        if not separator:
            raise Refused("EINVAL")
        view.write(CONTROL_DOMID, absolute(path, CONTROL_DOMID), value)
        return self._settled(view)

    def _mkdir(self, view: View, payload: bytes, _transaction: int) -> bytes:
        view.make(CONTROL_DOMID, _path(payload))
        return self._settled(view)

    def _rm(self, view: View, payload: bytes, _transaction: int) -> bytes:
        view.remove(CONTROL_DOMID, _path(payload))
        return self._settled(view)

    def _get_perms(self, view: View, payload: bytes, _transaction: int) -> bytes:
        permissions = view.permissions(CONTROL_DOMID, _path(payload))
        return b"".join(f"{letter}{number}\0".encode("ascii") for letter, number in permissions)

    def _set_perms(self, view: View, payload: bytes, _transaction: int) -> bytes:
        path, *entries = _words(payload)
        if not entries:
            raise Refused("EINVAL")
        view.set_permissions(CONTROL_DOMID, absolute(path, CONTROL_DOMID), tuple(map(permission, entries)))
        return self._settled(view)

    def _watch(self, _view: View, payload: bytes, _transaction: int) -> bytes:
        words = _words(payload)
        if len(words) != 2:
            raise Refused("EINVAL")
        given, token = words
        path = given.decode("ascii", "replace")
        path = path if path in SPECIAL else absolute(given, CONTROL_DOMID)
        if (given, token) in self._watches:
            raise Refused("EEXIST")
        prefix = "" if given.startswith((b"/", b"@")) else f"/local/domain/{CONTROL_DOMID}/"

        def tell(changed: str) -> None:
            body = changed.removeprefix(prefix).encode("ascii") + b"\0" + token + b"\0"
            event = HEADER.pack(WATCH_EVENT, 0, 0, len(body)) + body
            if self._events is not None:
                self._events.append(event)
            else:
                self._send(event)

        watcher = self._daemon.watch(CONTROL_DOMID, path, tell)
        if watcher is None:
            raise Refused("E2BIG")
        self._watches[given, token] = watcher
        tell(path)
        return OK

    def _unwatch(self, _view: View, payload: bytes, _transaction: int) -> bytes:
        words = _words(payload)
        watcher = self._watches.pop((words[0], words[1]), None) if len(words) == 2 else None
        if watcher is None:
            raise Refused("ENOENT" if len(words) == 2 else "EINVAL")
        self._daemon.unwatch(watcher)
        return OK

    def _reset_watches(self, _view: View, _payload: bytes, _transaction: int) -> bytes:
        for watcher in self._watches.values():
            self._daemon.unwatch(watcher)
        self._watches.clear()
        self._transactions.clear()
        return OK

    def _transaction_start(self, _view: View, _payload: bytes, transaction: int) -> bytes:
        if transaction:
            raise Refused("EBUSY")
        self._last_transaction += 1
        self._transactions[self._last_transaction] = self._daemon.tree.transaction()
        return b"%d\0" % self._last_transaction

    def _transaction_end(self, view: View, payload: bytes, transaction: int) -> bytes:
        if payload not in (b"T\0", b"F\0"):
            raise Refused("EINVAL")
        if not transaction:
            raise Refused("ENOENT")
        del self._transactions[transaction]
        if payload == b"T\0":
            if not view.commit():
                raise Refused("EAGAIN")
            self._daemon.settle(view)
        return OK

    def _introduce(self, _view: View, payload: bytes, _transaction: int) -> bytes:
        numbers = _numbers(payload, 3)
        self._daemon.introduce(numbers[0])
        return OK

    def _release(self, _view: View, payload: bytes, _transaction: int) -> bytes:
        self._daemon.release(_numbers(payload, 1)[0])
        return OK

    def _resume(self, _view: View, payload: bytes, _transaction: int) -> bytes:
        self._daemon.resumed(_numbers(payload, 1)[0])
        return OK

    def _domain_path(self, _view: View, payload: bytes, _transaction: int) -> bytes:
        return b"/local/domain/%d\0" % _numbers(payload, 1)[0]

    def _is_introduced(self, _view: View, payload: bytes, _transaction: int) -> bytes:
        return b"T\0" if self._daemon.introduced(_numbers(payload, 1)[0]) else b"F\0"

    _HANDLERS: Final[Mapping[int, Callable[[_Connection, View, bytes, int], bytes]]] = MappingProxyType(
        {
            DIRECTORY: _directory,
            DIRECTORY_PART: _directory_part,
            READ: _read,
            WRITE: _write,
            MKDIR: _mkdir,
            RM: _rm,
            GET_PERMS: _get_perms,
            SET_PERMS: _set_perms,
            WATCH: _watch,
            UNWATCH: _unwatch,
            RESET_WATCHES: _reset_watches,
            TRANSACTION_START: _transaction_start,
            TRANSACTION_END: _transaction_end,
            INTRODUCE: _introduce,
            RELEASE: _release,
            RESUME: _resume,
            GET_DOMAIN_PATH: _domain_path,
            IS_DOMAIN_INTRODUCED: _is_introduced,
        }
    )


def _words(payload: bytes) -> list[bytes]:
    """Return the parts of a payload, each of which ends with NUL."""
    if not payload.endswith(b"\0"):
        raise Refused("EINVAL")
    return payload[:-1].split(b"\0")


def _path(payload: bytes) -> str:
    words = _words(payload)
    if len(words) != 1:
        raise Refused("EINVAL")
    return absolute(words[0], CONTROL_DOMID)


def _numbers(payload: bytes, count: int) -> list[int]:
    words = _words(payload)
    if len(words) < count or not all(word.isdigit() for word in words[:count]):
        raise Refused("EINVAL")
    return [int(word) for word in words[:count]]
