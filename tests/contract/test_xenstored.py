# SPDX-License-Identifier: GPL-2.0-or-later
"""One xenstored is like the other: the same requests and the same answers, of a simulated, the C and the OCaml one.

Here the simulated one answers; in dom0 of the lab (XENVM_TEST_HOST=xen) the real one that runs there.
"""

import os
from pathlib import Path

import pytest
from storewire import (
    DIRECTORY,
    DIRECTORY_PART,
    GET_DOMAIN_PATH,
    GET_PERMS,
    IS_DOMAIN_INTRODUCED,
    MKDIR,
    READ,
    RELEASE,
    RESUME,
    RM,
    SET_PERMS,
    TRANSACTION_END,
    TRANSACTION_START,
    UNWATCH,
    WATCH,
    WRITE,
    Wire,
)

from xenvm.simulator.loop import Loop
from xenvm.simulator.tree import PATH_QUOTA
from xenvm.simulator.xenstored import Xenstored

REAL = os.environ.get("XENVM_TEST_HOST") == "xen"
OK = b"OK\0"
TOP = "/xenvm-contract"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The path of the socket, its daemon behind it."""
    if REAL:
        yield "/run/xenstored/socket"
        return
    path = str(tmp_path_factory.mktemp("store") / "socket")
    child = os.fork()  # a thread would do too, but the daemon is a process
    if not child:
        try:
            loop = Loop()
            Xenstored(loop, path)
            loop.run()
        finally:
            os._exit(1)
    while not os.path.exists(path):
        os.sched_yield()
    yield path
    os.kill(child, 9)
    os.waitpid(child, 0)


@pytest.fixture
def wire(store):
    with Wire(store) as made:
        made.ask(RM, TOP)
        made.ask(MKDIR, TOP)
        yield made
        made.ask(RM, TOP)


def oxenstored():
    """The real one is the OCaml one: its answers differ where a test says so."""
    return REAL and "oxenstored" in open("/run/xenstored.pid").read() + os.readlink(
        f"/proc/{int(open('/run/xenstored.pid').read())}/exe"
    )


def test_values_and_their_absence(wire):
    assert wire.ask(WRITE, f"{TOP}/a", tail=b"value") == OK
    assert wire.ask(READ, f"{TOP}/a") == b"value"
    assert wire.ask(WRITE, f"{TOP}/a", tail=b"") == OK
    assert wire.ask(READ, f"{TOP}/a") == b""
    assert wire.ask(WRITE, f"{TOP}/bytes", tail=bytes(range(1, 256))) == OK
    assert wire.ask(READ, f"{TOP}/bytes") == bytes(range(1, 256))
    assert wire.ask(READ, f"{TOP}/none") == "ENOENT"
    assert wire.ask(READ, f"{TOP}/none/below") == "ENOENT"
    assert wire.ask(DIRECTORY, f"{TOP}/none") == "ENOENT"
    assert wire.ask(GET_PERMS, f"{TOP}/none") == "ENOENT"


def test_parents_come_into_being(wire):
    assert wire.ask(WRITE, f"{TOP}/one/two/three", tail=b"x") == OK
    assert wire.ask(DIRECTORY, f"{TOP}/one") == b"two\0"
    assert wire.ask(READ, f"{TOP}/one/two") == b""
    assert wire.ask(MKDIR, f"{TOP}/four/five") == OK
    assert wire.ask(MKDIR, f"{TOP}/four/five") == OK
    assert wire.ask(WRITE, f"{TOP}/four/five", tail=b"kept") == OK
    assert wire.ask(MKDIR, f"{TOP}/four/five") == OK
    assert wire.ask(READ, f"{TOP}/four/five") == b"kept"
    assert sorted(wire.names(TOP)) == ["four", "one"]


def test_removing(wire):
    wire.ask(WRITE, f"{TOP}/one/two/three", tail=b"x")
    assert wire.ask(RM, f"{TOP}/one") == OK
    assert wire.ask(READ, f"{TOP}/one/two/three") == "ENOENT"
    assert wire.names(TOP) == []
    assert wire.ask(RM, f"{TOP}/one") == OK  # its parent is there
    assert wire.ask(RM, "/") == "EINVAL"


@pytest.mark.parametrize("path", ["", "/with space", "/a//b", "/a/", "/dot.ted", "/a:b", "/ä"])
def test_paths_that_are_none(wire, path):
    assert wire.raw(READ, path.encode("latin-1") + b"\0") == "EINVAL"


def test_a_long_path_of_dom0(wire):
    """So long it may be everywhere. Beyond that Xen 4.18 has freed dom0 of the limit for guests; oxenstored has not."""
    assert wire.ask(READ, "/" + "x" * (PATH_QUOTA - 1)) == "ENOENT"
    limited = REAL and (oxenstored() or int(Path("/sys/hypervisor/version/minor").read_text()) < 18)
    assert wire.ask(READ, "/" + "x" * PATH_QUOTA) == ("EINVAL" if limited else "ENOENT")


def test_relative_paths_are_those_of_dom0(wire):
    wire.ask(WRITE, "/local/domain/0/xenvm-contract", tail=b"mine")
    assert wire.ask(READ, "xenvm-contract") == b"mine"
    assert wire.ask(RM, "xenvm-contract") == OK
    assert wire.ask(READ, "/local/domain/0/xenvm-contract") == "ENOENT"


def test_permissions_are_inherited_and_set(wire):
    wire.ask(MKDIR, f"{TOP}/d")
    assert wire.ask(GET_PERMS, f"{TOP}/d") == b"n0\0"
    assert wire.ask(SET_PERMS, f"{TOP}/d", "n0", "r7") == OK
    assert wire.ask(GET_PERMS, f"{TOP}/d") == b"n0\0r7\0"
    wire.ask(WRITE, f"{TOP}/d/below", tail=b"")
    assert wire.ask(GET_PERMS, f"{TOP}/d/below") == b"n0\0r7\0"
    assert wire.ask(SET_PERMS, f"{TOP}/d", "b0") == OK
    assert wire.ask(GET_PERMS, f"{TOP}/d/below") == b"n0\0r7\0"
    assert wire.ask(SET_PERMS, f"{TOP}/none", "n0") == "ENOENT"
    assert wire.ask(SET_PERMS, f"{TOP}/d", "x0") == "EINVAL"


def test_a_transaction_shows_outside_when_it_ends(wire, store):
    number = int(wire.ask(TRANSACTION_START, "")[:-1])
    assert number > 0
    assert wire.ask(WRITE, f"{TOP}/t", tail=b"new", transaction=number) == OK
    assert wire.ask(READ, f"{TOP}/t", transaction=number) == b"new"
    assert wire.ask(READ, f"{TOP}/t") == "ENOENT"
    with Wire(store) as other:
        assert other.ask(READ, f"{TOP}/t") == "ENOENT"
    assert wire.ask(TRANSACTION_END, "T", transaction=number) == OK
    assert wire.ask(READ, f"{TOP}/t") == b"new"
    number = int(wire.ask(TRANSACTION_START, "")[:-1])
    wire.ask(RM, f"{TOP}/t", transaction=number)
    assert wire.ask(TRANSACTION_END, "F", transaction=number) == OK
    assert wire.ask(READ, f"{TOP}/t") == b"new"
    assert wire.ask(READ, f"{TOP}/t", transaction=number) == "ENOENT"
    assert wire.ask(TRANSACTION_END, "T", transaction=99999) == "ENOENT"


def test_the_slower_of_two_writers_begins_again(wire, store):
    wire.ask(WRITE, f"{TOP}/t", tail=b"0")
    number = int(wire.ask(TRANSACTION_START, "")[:-1])
    assert wire.ask(READ, f"{TOP}/t", transaction=number) == b"0"
    wire.ask(WRITE, f"{TOP}/t", tail=b"1", transaction=number)
    with Wire(store) as other:
        assert other.ask(WRITE, f"{TOP}/t", tail=b"2") == OK
    assert wire.ask(TRANSACTION_END, "T", transaction=number) == "EAGAIN"
    assert wire.ask(READ, f"{TOP}/t") == b"2"


def test_a_transaction_that_is_not_disturbed_goes_through(wire, store):
    number = int(wire.ask(TRANSACTION_START, "")[:-1])
    wire.ask(WRITE, f"{TOP}/mine/deep", tail=b"1", transaction=number)
    wire.ask(SET_PERMS, f"{TOP}/mine", "n0", "r3", transaction=number)
    with Wire(store) as other:
        other.ask(WRITE, "/local/domain/0/xenvm-contract", tail=b"elsewhere")
        other.ask(RM, "/local/domain/0/xenvm-contract")
    assert wire.ask(TRANSACTION_END, "T", transaction=number) == OK
    assert wire.ask(GET_PERMS, f"{TOP}/mine") == b"n0\0r3\0"


def test_watches_fire_at_once_and_for_what_happens_below(wire, store):
    assert wire.ask(WATCH, f"{TOP}/w", "token") == OK
    assert wire.take_events() == [(f"{TOP}/w".encode(), b"token")]
    with Wire(store) as other:
        other.ask(WRITE, f"{TOP}/w", tail=b"1")
        other.ask(WRITE, f"{TOP}/w/below", tail=b"1")
        other.ask(WRITE, f"{TOP}/other", tail=b"1")
        other.ask(SET_PERMS, f"{TOP}/w/below", "n0", "r1")
    assert [path for path, _ in wire.take_events()] == [
        f"{TOP}/w".encode(),
        f"{TOP}/w/below".encode(),
        f"{TOP}/w/below".encode(),
    ]
    with Wire(store) as other:
        other.ask(RM, TOP)
        other.ask(MKDIR, TOP)
    assert f"{TOP}/w".encode() in [path for path, _ in wire.take_events()]
    assert wire.ask(WATCH, f"{TOP}/w", "token") == "EEXIST"
    assert wire.ask(UNWATCH, f"{TOP}/w", "token") == OK
    assert wire.ask(UNWATCH, f"{TOP}/w", "token") == "ENOENT"
    with Wire(store) as other:
        other.ask(WRITE, f"{TOP}/w", tail=b"2")
    assert wire.take_events() == []


def test_a_relative_watch_speaks_in_its_own_words(wire):
    assert wire.ask(WATCH, "xenvm-contract", "t") == OK
    wire.take_events()
    wire.ask(WRITE, "/local/domain/0/xenvm-contract", tail=b"1")
    assert wire.take_events() == [(b"xenvm-contract", b"t")]
    wire.ask(RM, "xenvm-contract")


def test_events_of_a_transaction_come_with_its_end(wire, store):
    wire.ask(WATCH, f"{TOP}/w", "t")
    wire.take_events()
    with Wire(store) as other:
        number = int(other.ask(TRANSACTION_START, "")[:-1])
        other.ask(WRITE, f"{TOP}/w", tail=b"1", transaction=number)
        assert wire.take_events() == []
        other.ask(TRANSACTION_END, "T", transaction=number)
    assert wire.take_events() == [(f"{TOP}/w".encode(), b"t")]


def test_the_two_events_about_domains(wire):
    for name in ("@introduceDomain", "@releaseDomain"):
        assert wire.ask(WATCH, name, "t") == OK
        assert (name.encode(), b"t") in wire.take_events()
        assert wire.ask(UNWATCH, name, "t") == OK


def test_domains_that_there_are_not(wire):
    assert wire.ask(IS_DOMAIN_INTRODUCED, "32000") == b"F\0"
    assert wire.ask(IS_DOMAIN_INTRODUCED, "0") == b"T\0"
    assert wire.ask(GET_DOMAIN_PATH, "7") == b"/local/domain/7\0"
    assert isinstance(wire.ask(RELEASE, "32000"), str)
    assert isinstance(wire.ask(RESUME, "32000"), str)


def test_a_directory_that_does_not_fit_into_one_answer(wire):
    names = [f"child-{number:04}-{'x' * 40}" for number in range(120)]
    for name in names:
        wire.ask(MKDIR, f"{TOP}/{name}")
    whole = wire.ask(DIRECTORY, TOP)
    if whole != "E2BIG":  # oxenstored sends it nevertheless
        assert oxenstored()
        assert sorted(whole.decode().split("\0")[:-1]) == names
        return
    assert sorted(wire.names(TOP)) == names
    assert wire.ask(DIRECTORY_PART, f"{TOP}/none", "0") == "ENOENT"


def test_requests_that_are_none(wire):
    """Each is an error; which one differs: of a path without its last byte C xenstored 4.17 looks for the node."""
    assert wire.raw(READ, b"/no-nul") in ("EINVAL", "ENOENT")
    assert wire.raw(TRANSACTION_END, b"X\0") in ("EINVAL", "ENOENT")
    assert wire.raw(99, b"") in ("ENOSYS", "EINVAL")
