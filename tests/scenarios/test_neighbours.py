# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of any guest is an event for all monitors of a host: whose it was learns of it, the others are left alone."""

import fcntl
import subprocess
import sys

import pytest
from conftest import kill, until

HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def three(vm):
    guests = [vm(), vm(), vm(on_crash="preserve")]
    for guest in guests:
        guest.start()
    for guest in guests:
        guest.up()
    return guests


def test_guests_that_end_at_the_same_moment_are_all_noticed(host, three):
    gone, stays, crashed = three
    domids, boots = [guest.domid for guest in three], stays.boots()
    host.crash(domids[2])
    host.destroy(domids[0])
    assert "destroyed by something else" in gone.until("shutdown")["reason"]
    assert "crash" in crashed.until("crashed")["reason"]
    assert (stays.state, stays.domid) == ("running", domids[1])
    before = gone.boots()
    gone.cmd("start")
    gone.up(before + 1)
    assert (stays.state, stays.domid, stays.boots()) == ("running", domids[1], boots)


def test_a_look_of_another_monitor_that_never_ends_is_not_waited_for(host, three):
    """Somebody holds the lock of all looks: as a monitor would that stands still. When it dies the lock is free."""
    gone, stays, crashed = three
    looks, boots = host.sockets / "looks", stays.boots()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(looks)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        host.destroy(gone.domid)
        gone.until("shutdown")
        assert (stays.state, stays.boots()) == ("running", boots)
        kill(holder.pid)
    with open(looks) as file:
        until(lambda: not _taken(file), "the lock is free", 10)
        fcntl.flock(file, fcntl.LOCK_UN)
    host.crash(crashed.domid)
    crashed.until("crashed")
    assert (stays.state, stays.boots()) == ("running", boots)


def _taken(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
