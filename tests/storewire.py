# SPDX-License-Identifier: GPL-2.0-or-later
"""xenstore's wire, request by request, for tests: what is sent and what comes back, nothing hidden (xen/io/xs_wire.h)."""

import socket
import struct

HEADER = struct.Struct("=IIII")  # type, req_id, tx_id, len
DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH, TRANSACTION_START, TRANSACTION_END, INTRODUCE, RELEASE = range(1, 10)
GET_DOMAIN_PATH, WRITE, MKDIR, RM, SET_PERMS, WATCH_EVENT, ERROR, IS_DOMAIN_INTRODUCED, RESUME = range(10, 19)
RESET_WATCHES, DIRECTORY_PART = 21, 22


class Wire:
    """One connection to a xenstored."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.events = []
        self._number = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self, kind, *words, tail=None, transaction=0):
        """Send words that end with NUL each, then `tail` as it is; return the answer, an error as its name."""
        payload = b"".join(word.encode("ascii") + b"\0" for word in words) + (tail or b"")
        return self.raw(kind, payload, transaction)

    def raw(self, kind, payload, transaction=0):
        self._number += 1
        self.socket.sendall(HEADER.pack(kind, self._number, transaction, len(payload)) + payload)
        while True:
            answered, number, _transaction, body = self._packet()
            if answered == WATCH_EVENT:
                self.events.append(tuple(body.split(b"\0")[:2]))
                continue
            assert number == self._number
            if answered == ERROR:
                return body.rstrip(b"\0").decode("ascii")
            assert answered == kind
            return body

    def take_events(self):
        """Return the watch events so far; a request and its answer come after all that were fired before."""
        self.ask(READ, "/")
        found, self.events = self.events, []
        return found

    def value(self, path):
        """Return a value, None when the node is not there."""
        answer = self.ask(READ, path)
        return None if isinstance(answer, str) else answer

    def names(self, path):
        """Return the names below a node, however many."""
        answer = self.ask(DIRECTORY, path)
        if answer == "E2BIG":
            names = b""
            while not names.endswith(b"\0\0"):
                answer = self.ask(DIRECTORY_PART, path, str(len(names)))
                names += answer.partition(b"\0")[2]
            answer = names[:-1]
        return [] if isinstance(answer, str) else [name.decode() for name in answer.split(b"\0") if name]

    def paths(self, path="/"):
        """Return every path there is."""
        found = []
        for name in self.names(path):
            below = f"{path.rstrip('/')}/{name}"
            found += [below, *self.paths(below)]
        return sorted(found)

    def _packet(self):
        kind, number, transaction, length = HEADER.unpack(self._read(HEADER.size))
        return kind, number, transaction, self._read(length)

    def _read(self, size):
        got = b""
        while len(got) < size:
            piece = self.socket.recv(size - len(got))
            assert piece, "xenstored hung up"
            got += piece
        return got
