# SPDX-License-Identifier: GPL-2.0-or-later
"""The one-shot helpers' xenstore client against a small xenstored that can also misbehave."""

import contextlib
import socket
import struct
import threading
import time

import psutil
import pytest

from xenvm.errors import TimeoutExpiredError
from xenvm.helpers import store as module
from xenvm.helpers import xenstored as connecting
from xenvm.helpers.store import (
    PAYLOAD_LIMIT_BYTES,
    TRANSACTION_TRIES,
    UNREAD_LIMIT,
    Router,
    Store,
    StoreError,
    remove_all,
)

HEADER = struct.Struct("=IIII")  # type, request, transaction, length: xen/io/xs_wire.h
DIRECTORY, READ, START, END, INTRODUCE, WRITE, MKDIR, RM, SET_PERMS, ERROR, RESUME = (
    1,
    2,
    6,
    7,
    8,
    11,
    12,
    13,
    14,
    16,
    18,
)


class Xenstored:
    """Answers on one socket in a thread, from a dictionary; `answer` may be replaced to answer otherwise."""

    def __init__(self, connection):
        self.nodes, self.requests, self.conflicts = {}, [], 0
        self._socket, self._transactions = connection, 0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()
        assert not self._thread.is_alive()

    def _exactly(self, size):
        data = b""
        while len(data) < size and (more := self._socket.recv(size - len(data))):
            data += more
        return data

    def _serve(self):
        with contextlib.suppress(OSError):
            while len(header := self._exactly(HEADER.size)) == HEADER.size:
                kind, request, transaction, size = HEADER.unpack(header)
                payload = self._exactly(size)
                self.requests.append((kind, transaction, payload))
                self._socket.sendall(self.answer(kind, request, transaction, payload))

    def answer(self, kind, request, transaction, payload):
        answered, body = self.carry_out(kind, payload)
        return HEADER.pack(answered, request, transaction, len(body)) + body

    def carry_out(self, kind, payload):
        path, _, rest = payload.partition(b"\0")
        if kind == START:
            self._transactions += 1
            return kind, b"%d\0" % self._transactions
        if kind == END:
            if path == b"T" and self.conflicts:
                self.conflicts -= 1
                return ERROR, b"EAGAIN\0"
            return kind, b"OK\0"
        if kind == WRITE:
            self.nodes[path] = rest
        elif kind in (READ, RM) and path not in self.nodes:
            return ERROR, b"ENOENT\0"
        elif kind == READ:
            return kind, self.nodes[path]
        elif kind == RM:
            del self.nodes[path]
        elif kind == DIRECTORY:
            if path not in self.nodes:
                return ERROR, b"ENOENT\0"
            return kind, b"".join(node[len(path) + 1 :] + b"\0" for node in self.nodes if node.startswith(path + b"/"))
        return kind, b"OK\0"


@pytest.fixture
def peers():
    """A store with a short deadline, and its xenstored."""
    ours, theirs = socket.socketpair()
    with ours, Xenstored(theirs) as xenstored:
        store = Store(ours)
        store._router._deadline_s = 10.0
        yield store, xenstored


PART = 22  # XS_DIRECTORY_PART


class Crowded(Xenstored):
    """One whose lists are longer than an answer; `changes` is how often a list changes between two parts."""

    changes = 0

    def carry_out(self, kind, payload):
        if kind == DIRECTORY:
            return ERROR, b"E2BIG\0"
        if kind != PART:
            return super().carry_out(kind, payload)
        offset = int(payload.split(b"\0")[1])
        if offset and self.changes:
            self.changes -= 1
            self.nodes[b"new%d" % self.changes] = b""
        whole = b"".join(node + b"\0" for node in self.nodes) + b"\0"
        return kind, b"%d\0" % len(self.nodes) + whole[offset : offset + 1000]


@pytest.mark.parametrize("count", [0, 1, 37, 400])
@pytest.mark.parametrize("changes", [0, 3])
def test_a_list_longer_than_an_answer_comes_in_parts(count, changes):
    ours, theirs = socket.socketpair()
    with ours, Crowded(theirs) as xenstored:
        xenstored.nodes, xenstored.changes = {b"node-%05d" % number: b"" for number in range(count)}, changes
        assert Store(ours).names("/local") == [name.decode() for name in xenstored.nodes]
        assert all(payload.startswith(b"/local\0") for _, _, payload in xenstored.requests)


def test_a_list_that_changes_all_the_time_is_given_up():
    ours, theirs = socket.socketpair()
    with ours, Crowded(theirs) as xenstored:
        xenstored.nodes, xenstored.changes = {b"node-%05d" % number: b"" for number in range(400)}, 1 << 20
        with pytest.raises(StoreError, match="changes all the time"):
            Store(ours).names("/local")


def test_a_xenstored_that_knows_no_parts_is_named(peers):
    store, xenstored = peers
    xenstored.carry_out = lambda kind, _payload: (ERROR, b"E2BIG\0" if kind == DIRECTORY else b"ENOSYS\0")
    with pytest.raises(StoreError, match="ENOSYS; the list is too long for one answer"):
        store.names("/local")


def kinds(xenstored):
    return [kind for kind, _, _ in xenstored.requests]


def raw(xenstored, answer):
    """Let every request be answered with these bytes, the request's number filled in."""
    xenstored.answer = lambda _kind, request, transaction, _payload: answer(request, transaction)


def test_writing_and_reading(peers):
    store, xenstored = peers
    store.write("/a/b", "value")
    assert xenstored.requests == [(WRITE, 0, b"/a/b\0value")]
    assert store.read("/a/b") == b"value"


def test_the_empty_value_can_be_written(peers):
    store, xenstored = peers
    store.write("/a", "")
    assert xenstored.nodes == {b"/a": b""}
    assert store.read("/a") == b""


def test_a_node_that_is_not_there_has_no_value(peers):
    store, _ = peers
    assert store.read("/a") is None
    store.remove("/a")


def test_the_names_of_a_nodes_children(peers):
    store, xenstored = peers
    xenstored.nodes = {b"/a": b"", b"/a/51712": b"", b"/a/\xff": b"", b"/b": b""}
    assert store.names("/a") == ["51712", "\ufffd"]
    assert store.names("/b") == []
    assert store.names("/none") == []


@pytest.mark.parametrize("name", ["EACCES", "E2BIG", "EINVAL"])
def test_children_that_cannot_be_listed_are_an_error(peers, name):
    """Not none at all: what was not listed would never be removed."""
    store, xenstored = peers
    body = name.encode() + b"\0"
    raw(xenstored, lambda request, transaction: HEADER.pack(ERROR, request, transaction, len(body)) + body)
    with pytest.raises(StoreError, match="list /a"):
        store.names("/a")


def test_every_other_request(peers):
    store, xenstored = peers
    store.make("/a")
    store.permissions("/a", "n0", "r7")
    store.introduce(7, 1234, 5)
    store.resume(7)
    assert xenstored.requests == [
        (MKDIR, 0, b"/a\0"),
        (SET_PERMS, 0, b"/a\0n0\0r7\0"),
        (INTRODUCE, 0, b"7\x001234\x005\0"),
        (RESUME, 0, b"7\0"),
    ]


@pytest.mark.parametrize("what", ["read", "write", "make", "remove", "permissions"])
def test_a_refusal_names_the_request_and_the_node(peers, what):
    store, xenstored = peers
    raw(xenstored, lambda request, transaction: HEADER.pack(ERROR, request, transaction, 7) + b"EACCES\0")
    with pytest.raises(StoreError, match=r"/a.*(EACCES|Permission denied)"):
        getattr(store, what)("/a", *(["x"] if what in ("write", "permissions") else []))


def test_an_error_of_a_name_nobody_knows(peers):
    store, xenstored = peers
    raw(xenstored, lambda request, transaction: HEADER.pack(ERROR, request, transaction, 5) + b"\xff\xfe!\0\0")
    for ask in (store.read, store.make):
        with pytest.raises(StoreError, match="/a"):
            ask("/a")


# Transactions


def test_a_transaction_carries_its_number(peers):
    store, xenstored = peers
    store.transaction(lambda: store.write("/a", "1"))
    store.write("/b", "2")
    assert xenstored.requests == [(START, 0, b"\0"), (WRITE, 1, b"/a\x001"), (END, 1, b"T\0"), (WRITE, 0, b"/b\x002")]


def test_a_lost_transaction_is_tried_again_from_its_start(peers):
    store, xenstored = peers
    xenstored.conflicts, runs = 3, []
    store.transaction(lambda: runs.append(store.write("/a", "1")))
    assert len(runs) == 4
    assert kinds(xenstored) == [START, WRITE, END] * 4
    assert [transaction for kind, transaction, _ in xenstored.requests if kind == WRITE] == [1, 2, 3, 4]


def test_it_is_not_tried_for_ever(peers, monkeypatch):
    store, xenstored = peers
    xenstored.conflicts, slept = 1000, []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    with pytest.raises(StoreError, match=f"lost {TRANSACTION_TRIES} times"):
        store.transaction(lambda: None)
    assert kinds(xenstored) == [START, END] * TRANSACTION_TRIES
    assert TRANSACTION_TRIES == 32
    assert sum(slept) < 10
    store.write("/a", "outside")
    assert xenstored.requests[-1][1] == 0


def test_a_step_that_fails_rolls_back(peers):
    store, xenstored = peers

    def steps():
        store.write("/a", "1")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.transaction(steps)
    assert xenstored.requests[-1] == (END, 1, b"F\0")
    store.write("/b", "2")
    assert xenstored.requests[-1][1] == 0


def test_a_transaction_whose_end_is_not_answered_is_over_all_the_same(peers):
    """Whoever gives up tidies up over the same connection; what is said in a dead transaction has no effect."""
    store, xenstored = peers
    store._router._deadline_s = 0.3
    answer, silent = xenstored.answer, {WRITE, END}
    xenstored.answer = lambda kind, *rest: b"" if kind in silent else answer(kind, *rest)
    xenstored.nodes[b"/a"] = b"old"
    with pytest.raises(TimeoutExpiredError):
        store.transaction(lambda: store.write("/a", "1"))
    assert kinds(xenstored) == [START, WRITE, END]
    silent.clear()
    assert store.read("/a") == b"old"
    store.transaction(lambda: store.remove("/a"))
    assert [(kind, transaction) for kind, transaction, _ in xenstored.requests[3:]] == [
        (READ, 0),
        (START, 0),
        (RM, 2),
        (END, 2),
    ]


def test_a_rollback_that_is_refused_does_not_hide_why_it_came_to_that(peers):
    store, xenstored = peers
    carry_out = xenstored.carry_out
    xenstored.carry_out = lambda kind, body: (ERROR, b"EIO\0") if body == b"F\0" else carry_out(kind, body)

    def steps():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.transaction(steps)
    store.write("/b", "2")
    assert xenstored.requests[-1][1] == 0


def test_what_a_transaction_changes_is_asked_for_at_once_and_not_one_by_one(peers):
    """This xenstored answers no change before it has seen three of them."""
    store, xenstored = peers
    kept, answer = [], xenstored.answer

    def in_threes(kind, request, transaction, payload):
        made = answer(kind, request, transaction, payload)
        if kind != WRITE:
            return made
        kept.append(made)
        whole = b"".join(kept) if len(kept) == 3 else b""
        if whole:
            kept.clear()
        return whole

    xenstored.answer = in_threes

    def steps():
        for name in "abc":
            store.write(f"/{name}", name)
        assert store.read("/c") == b"c"
        for name in "def":
            store.write(f"/{name}", name)

    store.transaction(steps)
    assert b"".join(xenstored.nodes[f"/{name}".encode()] for name in "abcdef") == b"abcdef"
    assert xenstored.requests[-1][0] == END


@pytest.mark.parametrize("asks", [False, True])
def test_a_change_that_is_refused_undoes_its_transaction_and_is_the_one_named(peers, asks):
    store, xenstored = peers
    carry_out = xenstored.carry_out
    xenstored.carry_out = lambda kind, body: (
        (ERROR, b"EACCES\0") if kind == WRITE and body.startswith((b"/b", b"/c")) else carry_out(kind, body)
    )
    xenstored.nodes[b"/a"] = b""

    def steps():
        for name in "abc":
            store.write(f"/{name}", name)
        if asks:
            store.read("/a")

    with pytest.raises(StoreError, match="write /b: .*EACCES"):
        store.transaction(steps)
    assert xenstored.requests[-1][::2] == (END, b"F\0")
    assert (READ in [kind for kind, *_ in xenstored.requests]) is False
    store.write("/d", "d")
    assert xenstored.requests[-1][1] == 0


def test_of_many_changes_only_so_many_are_not_waited_for(peers):
    store, xenstored = peers
    ahead, most, write = [0], [0], Router.send
    count = store._router.answer_to

    def answer_to(sent):
        ahead[0] -= sent.op == WRITE
        return count(sent)

    def send(packet):
        ahead[0] += packet.op == WRITE
        most[0] = max(most[0], ahead[0])
        return write(store._router, packet)

    store._router.answer_to, store._router.send = answer_to, send
    store.transaction(lambda: [store.write(f"/{number}", "x" * 4000) for number in range(300)])
    assert most[0] == UNREAD_LIMIT
    assert len(xenstored.nodes) == 300


def test_answers_to_changes_that_come_too_late_are_passed_over(peers):
    store, xenstored = peers
    store._router._deadline_s = 0.3
    late, answer = threading.Event(), xenstored.answer

    def slow(kind, *rest):
        if kind == WRITE:
            late.wait(10)
        return answer(kind, *rest)

    xenstored.answer = slow
    with pytest.raises(TimeoutExpiredError):
        store.transaction(lambda: [store.write(f"/{name}", name) for name in "abc"])
    late.set()
    xenstored.nodes[b"/z"] = b"z"
    store._router._deadline_s = 10
    assert store.read("/z") == b"z"


def test_a_parent_is_removed_only_while_it_is_empty(peers):
    store, xenstored = peers
    xenstored.nodes = {b"/": b"", b"/a": b"", b"/a/b": b""}
    look = (DIRECTORY, b"/a\0")
    store.remove_if_empty("/a")
    assert b"/a" in xenstored.nodes
    store.remove("/a/b")
    before = len(xenstored.requests)
    store.remove_if_empty("/a")
    assert xenstored.nodes == {b"/": b""}
    # the parent first: else C xenstored could find that it has no such child
    steps = [(kind, body) for kind, _, body in xenstored.requests[before:]]
    assert [steps[0], *steps[2:5]] == [look, (READ, b"/\0"), look, (RM, b"/a\0")]
    store.remove_if_empty("/a")
    assert [(kind, body) for kind, _, body in xenstored.requests[before + len(steps) :]] == [look]


def test_one_path_that_cannot_be_removed_does_not_keep_the_others(peers):
    store, xenstored = peers
    xenstored.nodes = {b"/b": b"", b"/c": b""}
    carry_out = xenstored.carry_out
    xenstored.carry_out = lambda kind, body: (ERROR, b"EACCES\0") if body == b"/a\0" else carry_out(kind, body)
    with pytest.raises(StoreError, match="/a"):
        remove_all(store, ("/a", "/b", "/c"))
    assert xenstored.nodes == {}


# A xenstored that misbehaves


def test_a_silent_xenstored_is_waited_for_only_so_long(peers):
    store, xenstored = peers
    store._router._deadline_s = 0.3
    raw(xenstored, lambda _request, _transaction: b"")
    before = time.monotonic()
    with pytest.raises(TimeoutExpiredError, match=r"within 0\.3 s"):
        store.read("/a")
    assert 0.25 < time.monotonic() - before < 10


def test_one_that_answers_byte_by_byte_has_the_same_deadline():
    ours, theirs = socket.socketpair()
    ended = threading.Event()

    def dribble():
        with contextlib.suppress(OSError):
            while not ended.wait(0.05):
                theirs.send(b"\0")

    feeder = threading.Thread(target=dribble, daemon=True)
    feeder.start()
    store, before = Store(ours), time.monotonic()
    store._router._deadline_s = 0.4
    with pytest.raises(TimeoutExpiredError):
        store.read("/a")
    assert time.monotonic() - before < 10
    ended.set()
    feeder.join(10)
    ours.close()
    theirs.close()


def test_one_that_does_not_read_has_a_deadline_too():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        router = Router(ours, deadline_s=0.2)
        store = Store(ours)
        store._router = router
        with contextlib.suppress(BlockingIOError):
            ours.setblocking(False)
            while True:
                ours.send(b"x" * 65536)
        with pytest.raises(TimeoutExpiredError, match=r"within 0\.2 s"):
            store.write("/a", "x" * 4000)


@pytest.mark.parametrize("size", [PAYLOAD_LIMIT_BYTES + 1, 2**31, 2**32 - 1])
def test_a_length_beyond_the_protocol_is_refused_and_not_allocated(peers, size):
    store, xenstored = peers
    raw(xenstored, lambda request, transaction: HEADER.pack(READ, request, transaction, size))
    before = psutil.Process().memory_info().rss
    with pytest.raises(StoreError, match=f"claims {size} bytes"):
        store.read("/a")
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_the_longest_value_is_read(peers):
    store, xenstored = peers
    xenstored.nodes[b"/a"] = b"x" * PAYLOAD_LIMIT_BYTES
    assert store.read("/a") == b"x" * PAYLOAD_LIMIT_BYTES


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda request, transaction: HEADER.pack(WRITE, request + 1, transaction, 3) + b"OK\0", "another request"),
        (lambda request, transaction: HEADER.pack(MKDIR, request, transaction, 3) + b"OK\0", "another kind"),
        (lambda request, transaction: HEADER.pack(15, request, transaction, 4) + b"a\0b\0", "another kind"),
        (lambda request, transaction: HEADER.pack(99, request, transaction, 3) + b"OK\0", "kind"),
    ],
)
def test_an_answer_to_something_else_is_refused(peers, answer, match):
    store, xenstored = peers
    raw(xenstored, answer)
    with pytest.raises(StoreError, match=match):
        store.write("/a", "1")
    with pytest.raises(StoreError):
        store.read("/a")
    with pytest.raises(StoreError):
        store.transaction(lambda: None)


def test_a_transaction_number_that_is_none_is_refused(peers):
    store, xenstored = peers
    raw(xenstored, lambda request, transaction: HEADER.pack(START, request, transaction, 4) + b"one\0")
    with pytest.raises(StoreError):
        store.transaction(lambda: None)


@pytest.mark.parametrize("whole", [0, 3, HEADER.size, HEADER.size + 2])
def test_the_end_of_the_connection_at_any_byte(whole):
    ours, theirs = socket.socketpair()
    with ours:
        store = Store(ours)
        request = module.next_rq_id() + 1
        theirs.sendall((HEADER.pack(READ, request, 0, 5) + b"value")[:whole])
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(StoreError, match="closed"):
            store.read("/a")
        theirs.close()
        with pytest.raises(StoreError, match="gone"):
            store.write("/a", "1")


def test_without_xenstored_the_error_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(connecting, "SOCKET_PATHS", (f"{tmp_path}/none", f"{tmp_path}/neither"))
    with pytest.raises(StoreError, match="no socket at .*/none") as caught:
        connecting.connect()
    assert "Xen host" in caught.value.hint
    (tmp_path / "none").touch()
    with pytest.raises(StoreError, match="cannot connect to xenstored at .*/none"):
        connecting.connect()


def test_a_xenstored_to_which_many_connect_at_once_is_waited_for(monkeypatch, tmp_path):
    """Its queue has room for one or two, and then says so to who does not wait: 16 builders at once."""
    monkeypatch.setattr(connecting, "SOCKET_PATHS", (f"{tmp_path}/here",))
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(f"{tmp_path}/here")
        listener.listen(1)
        waiting = []
        with pytest.raises(BlockingIOError):
            while True:
                waiting.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                waiting[-1].setblocking(False)
                waiting[-1].connect(f"{tmp_path}/here")
        accepting = threading.Timer(0.5, lambda: [stack.enter_context(listener.accept()[0]) for _ in waiting])
        accepting.start()
        before = time.monotonic()
        connection = connecting.connect()
        assert 0.4 < time.monotonic() - before < 10
        assert connection.getpeername() == f"{tmp_path}/here"
        accepting.join()
        connection.close()
        monkeypatch.setattr(connecting, "CONNECT_WAIT_S", 1)
        with pytest.raises(BlockingIOError):
            while True:
                more = stack.enter_context(socket.socket(socket.AF_UNIX))
                more.setblocking(False)
                more.connect(f"{tmp_path}/here")
        with pytest.raises(StoreError, match="took no connection at .*/here within 1 s"):
            connecting.connect()


def test_connecting_takes_the_first_socket_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(connecting, "SOCKET_PATHS", (f"{tmp_path}/none", f"{tmp_path}/here"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/here")
        listener.listen()
        connection = connecting.connect()
        assert connection.getpeername() == f"{tmp_path}/here"
        connection.close()


@pytest.mark.parametrize("cut", [3, HEADER.size, HEADER.size + 2])
def test_an_answer_that_comes_too_late_is_passed_over(cut):
    """And one of which a part had come already; what follows is in step."""
    ours, theirs = socket.socketpair()
    with theirs:
        store = Store(ours)
        store._router._deadline_s = 0.2

        def answer(text):
            _kind, number, transaction, size = HEADER.unpack(theirs.recv(HEADER.size))
            theirs.recv(size)
            return HEADER.pack(READ, number, transaction, len(text)) + text

        with pytest.raises(TimeoutExpiredError):
            store.read("/a")
        late = answer(b"first")
        theirs.sendall(late[:cut])
        with pytest.raises(TimeoutExpiredError):
            store.read("/b")
        theirs.sendall(late[cut:] + answer(b"second"))
        answering = threading.Thread(target=lambda: theirs.sendall(answer(b"third")))
        answering.start()
        assert store.read("/c") == b"third"
        answering.join(10)
        assert store._router._given_up == set()
