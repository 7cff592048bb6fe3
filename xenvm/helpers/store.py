# SPDX-License-Identifier: GPL-2.0-or-later
"""xenstore for the one-shot helpers: the pyxs client on a socket opened before the drop, with deadlines and bounds.

pyxs by itself starts a thread, waits for ever when xenstored is silent, and allocates whatever length a header claims.
Its Client takes the object that carries packets as an argument; the Router here is that object: one request, one
answer, in the calling thread, within a deadline.
"""

from __future__ import annotations

import errno
import time

from pyxs import Client, PyXSError
from pyxs._internal import NUL, Op, Packet, next_rq_id

from xenvm.context import suppress
from xenvm.errors import TimeoutExpiredError, XenvmError
from xenvm.helpers.xenstored import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket as socket
    from collections.abc import Callable, Iterable
    from typing import Any, Final

PAYLOAD_LIMIT_BYTES: Final = 4096  # XENSTORE_PAYLOAD_MAX, xen/io/xs_wire.h
ANSWER_WAIT_S: Final = 40.0  # xenstored shares dom0's processor with helpers that start, and that with booting guests
TRANSACTION_TRIES: Final = 32
UNREAD_LIMIT: Final = 64  # requests of a transaction whose answers wait to be read: they fit into the socket's buffer
DIRECTORY_PART: Final = 22  # XS_DIRECTORY_PART, xen/io/xs_wire.h: a list that does not fit into one answer
LIST_LIMIT_BYTES: Final = 1 << 20
LIST_TRIES: Final = 8
_PYXS_ERRORS: Final = (PyXSError, ValueError)  # ValueError: an error name or a number that is none


class _Answer:
    """What Client waits for: the answer to one packet."""

    def __init__(self, router: Router, sent: Packet) -> None:
        self._router = router
        self._sent = sent

    def get(self) -> Packet:
        return self._router.answer_to(self._sent)

    def give_up(self) -> None:
        self._router.give_up(self._sent)


class Router:
    """Carries pyxs packets over one socket, without a thread, each answer within `deadline_s` seconds.

    An answer that comes later is passed over when it does: whoever gives up tidies up over the same connection.
    """

    is_connected = True

    def __init__(self, connection: socket.socket, deadline_s: float = ANSWER_WAIT_S) -> None:
        self._socket = connection
        self._deadline_s = deadline_s
        self._got = bytearray()  # of the answer that arrives
        self._given_up: set[int] = set()

    def start(self) -> None:
        """Do nothing: the socket is connected already."""

    def terminate(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, packet: Packet) -> _Answer:
        """Send one packet and return what its answer can be fetched from."""
        self._send(packet.op, packet.rq_id, packet.tx_id, packet.payload)
        return _Answer(self, packet)

    def answer_to(self, sent: Packet) -> Packet:
        """Return the answer to `sent`; anything else that arrives on this connection is a StoreError."""
        op, transaction, payload = self._receive(sent.rq_id)
        try:
            return Packet(op, payload, sent.rq_id, transaction)
        except PyXSError as error:
            raise StoreError(f"xenstored answered with the unknown kind {op}") from error

    def give_up(self, sent: Packet) -> None:
        """Have the answer to `sent` passed over when it comes."""
        self._given_up.add(sent.rq_id)

    def exchange(self, op: int, payload: bytes, transaction: int) -> tuple[int, bytes]:
        """Send a request of a kind that pyxs does not know; return kind and payload of the answer."""
        request = next_rq_id()
        self._send(op, request, transaction, payload)
        kind, _, answer = self._receive(request)
        return kind, answer

    def _send(self, op: int, request: int, transaction: int, payload: bytes) -> None:
        header = Packet._struct.pack(op, request, transaction, len(payload))  # noqa: SLF001
        self._socket.settimeout(self._deadline_s)
        try:
            self._socket.sendall(header + payload)
        except TimeoutError as error:
            raise TimeoutExpiredError(f"xenstored took no request within {self._deadline_s:g} s") from error
        except OSError as error:
            raise StoreError(f"xenstored is gone: {error}") from error

    def _receive(self, wanted: int) -> tuple[int, int, bytes]:
        """Return kind, transaction and payload of the answer to the request `wanted`."""
        end = time.monotonic() + self._deadline_s
        layout = Packet._struct  # noqa: SLF001
        try:
            while True:
                self._read(layout.size, end)
                op, request, transaction, size = layout.unpack_from(self._got)
                if size > PAYLOAD_LIMIT_BYTES:
                    raise StoreError(f"xenstored claims {size} bytes, the protocol allows {PAYLOAD_LIMIT_BYTES}")
                self._read(layout.size + size, end)
                payload = bytes(self._got[layout.size :])
                self._got.clear()
                if request == wanted:
                    return op, transaction, payload
                if request not in self._given_up:
                    raise StoreError("xenstored answered another request")
                self._given_up.discard(request)
        except TimeoutExpiredError:
            self._given_up.add(wanted)
            raise

    def _read(self, size: int, end: float) -> None:
        """Have so many bytes of the answer, and not one more."""
        while len(self._got) < size:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise TimeoutExpiredError(f"xenstored did not answer within {self._deadline_s:g} s")
            self._socket.settimeout(left_s)
            try:
                piece = self._socket.recv(size - len(self._got))
            except TimeoutError:
                continue
            except OSError as error:
                raise StoreError(f"xenstored is gone: {error}") from error
            if not piece:
                raise StoreError("xenstored closed the connection")
            self._got += piece


class Store:
    """Text values by path. `None` from read means that the node does not exist.

    In a transaction what is changed is not waited for one by one: the answers are read before the next question, and
    before the end. A refusal is raised then; nothing of the transaction counts.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._router = Router(connection)
        self._client = Client(router=self._router)
        self._unread: list[tuple[_Answer, int, str, str, bool]] = []

    def read(self, path: str) -> bytes | None:
        """Return the value, which a guest may have written: at most 4096 bytes of anything."""
        self._settle()
        try:
            value: bytes = self._client.read(path.encode("ascii"))
        except _PYXS_ERRORS as error:
            if error.args and error.args[0] == errno.ENOENT:
                return None
            raise _refused("read", path, error) from error
        return value

    def write(self, path: str, value: str) -> None:
        """Write a value; parents come into being."""
        # Not Client.write: pyxs 0.4.1 refuses the empty value, which many nodes must have.
        self._ack("write", path, Op.WRITE, path.encode("ascii") + NUL + value.encode("ascii"))

    def make(self, path: str) -> None:
        """Make an empty node unless it is there."""
        self._ack("mkdir", path, Op.MKDIR, path.encode("ascii") + NUL)

    def remove(self, path: str) -> None:
        """Remove a node with everything below it; one that is not there is fine."""
        self._ack("rm", path, Op.RM, path.encode("ascii") + NUL, absent_ok=True)

    def names(self, path: str) -> list[str]:
        """Return the names of a node's children, of any number; none when it does not exist."""
        self._settle()
        try:
            children = self._client.list(path.encode("ascii"))
        except _PYXS_ERRORS as error:
            if error.args and error.args[0] == errno.ENOENT:
                return []
            if not error.args or error.args[0] != errno.E2BIG:
                raise _refused("list", path, error) from error
            children = self._names_in_parts(path)
        return [name.decode("ascii", "replace") for name in children if name]

    def _names_in_parts(self, path: str) -> list[bytes]:
        """Fetch a list that does not fit into one answer, again from the start when it changes meanwhile."""
        for _ in range(LIST_TRIES):
            found, first = b"", b""
            while len(found) < LIST_LIMIT_BYTES:
                payload = path.encode("ascii") + NUL + str(len(found)).encode("ascii") + NUL
                op, part = self._router.exchange(DIRECTORY_PART, payload, self._client.tx_id)
                if op != DIRECTORY_PART:
                    why = part.rstrip(NUL).decode("ascii", "replace")
                    raise StoreError(f"xenstore list {path}: {why}; the list is too long for one answer")
                generation, _, names = part.partition(NUL)
                if generation != (first or generation):
                    break
                first, found = generation, found + names
                if not names or found.endswith(NUL + NUL):  # an empty name is the end
                    return found.rstrip(NUL).split(NUL)
        raise StoreError(f"xenstore list {path}: it changes all the time, or has more than {LIST_LIMIT_BYTES} bytes")

    def remove_if_empty(self, path: str) -> None:
        """Remove a node that has no children; safe against others who add one just now, or remove it too.

        One look comes before the transaction, which is four requests: who removes the last child looks after that.

        C xenstored takes each node into a transaction when it is first read: should the parent come after the node, and
        somebody have removed that in between, it finds no such child, takes that for damage and answers EIO.
        """

        def steps() -> None:
            with suppress(*_PYXS_ERRORS):  # nothing is unread yet
                self._client.read((path.rpartition("/")[0] or "/").encode("ascii"))
            if self._is_empty(path):
                self.remove(path)

        if self._is_empty(path):
            self.transaction(steps)

    def _is_empty(self, path: str) -> bool:
        """Tell whether a node is there and has no children."""
        self._settle()
        try:
            return not self._client.list(path.encode("ascii"))
        except _PYXS_ERRORS:  # gone already, or so full that its list does not fit into one answer
            return False

    def permissions(self, path: str, *entries: str) -> None:
        """Set owner and readers, as in xs_set_permissions: `n0`, `r7`, `b7`; the first entry is the owner."""
        self._ack(
            "set permissions", path, Op.SET_PERMS, b"".join(part.encode("ascii") + NUL for part in (path, *entries))
        )

    def introduce(self, domid: int, frame: int, port: int) -> None:
        """Tell xenstored of a domain's ring frame and event channel; once per domain."""
        parts = (str(domid), str(frame), str(port))
        self._ack("introduce", str(domid), Op.INTRODUCE, b"".join(part.encode("ascii") + NUL for part in parts))

    def resume(self, domid: int) -> None:
        """Make xenstored forget that the domain had shut down, so that the next time fires @releaseDomain again."""
        self._ack("resume", str(domid), Op.RESUME, str(domid).encode("ascii") + NUL)

    def transaction(self, steps: Callable[[], None]) -> None:
        """Run `steps` in a transaction, again from the start while another writer was faster (bounded)."""
        for attempt in range(TRANSACTION_TRIES):
            _translated(self._client.transaction)
            try:
                steps()
                self._settle()
            except BaseException:
                with suppress(XenvmError):  # the first failure is the one that counts
                    self._settle()
                with suppress(XenvmError):
                    _translated(self._client.rollback)
                self._client.tx_id = 0  # not answered, it is over too: else all that follows would be said in it
                raise
            committed = _translated(self._client.commit)
            self._client.tx_id = 0  # pyxs 0.4.1 keeps the number of a lost transaction
            if committed:
                return
            time.sleep(0.01 * attempt)
        raise StoreError(f"xenstore transaction lost {TRANSACTION_TRIES} times to other writers")

    def _ack(self, what: str, path: str, op: int, payload: bytes, *, absent_ok: bool = False) -> None:
        """Ask for a change; outside a transaction, wait until it is made."""
        answer = self._router.send(Packet(op, payload, next_rq_id(), self._client.tx_id))
        self._unread.append((answer, op, what, path, absent_ok))
        if not self._client.tx_id or len(self._unread) >= UNREAD_LIMIT:
            self._settle()

    def _settle(self) -> None:
        """Read all answers that are due; raise the first refusal."""
        unread, self._unread = self._unread, []
        failure: StoreError | None = None
        for number, (answer, op, what, path, absent_ok) in enumerate(unread):
            try:
                packet = answer.get()
            except BaseException:
                for later, *_ in unread[number + 1 :]:
                    later.give_up()
                raise
            failure = failure or _failure(packet, op, what, path, absent_ok=absent_ok)
        if failure:
            raise failure


def _failure(packet: Packet, op: int, what: str, path: str, *, absent_ok: bool) -> StoreError | None:
    """Return what is wrong with the answer to a change, if anything."""
    if packet.op == Op.ERROR:
        name = packet.payload.rstrip(NUL).decode("ascii", "replace")
        number = getattr(errno, name, errno.EIO)
        absent = absent_ok and number == errno.ENOENT
        return None if absent else _refused(what, path, PyXSError(number, name))
    return None if packet.op == op else StoreError(f"xenstore {what} {path}: answer of another kind")


def _translated(step: Callable[[], object]) -> object:
    """Take one step of a transaction; what pyxs raises becomes a StoreError."""
    try:
        return step()
    except _PYXS_ERRORS as error:
        raise _refused("transaction", step.__name__, error) from error


def _refused(what: str, path: str, error: Exception) -> StoreError:
    refused = StoreError(f"xenstore {what} {path}: {error}")
    refused.__cause__ = error
    return refused


def remove_all(store: Store, paths: Iterable[str]) -> None:
    """Remove each path; a failure of one does not keep the others."""
    failures: list[Any] = []
    for path in paths:
        try:
            store.remove(path)
        except StoreError as error:
            failures.append(error)
    if failures:
        raise failures[0]
