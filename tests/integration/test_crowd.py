# SPDX-License-Identifier: GPL-2.0-or-later
"""Several VMs on one simulated host: the end of one costs a look or two, and whoever looks may die over it."""

import fcntl
import os
import signal
import time

import pytest
from vms import SimulatedHost, kill, nothing_is_left, until, vm  # noqa: F401

from xenvm.broker.actlog import read

MANY = 8
REBOOT, POWEROFF = 1, 0


@pytest.fixture(scope="module")
def host():
    made = SimulatedHost()
    yield made
    made.close()


@pytest.fixture
def many(host, vm):  # noqa: F811
    """VMs that run and of which no process has anything to do; the last one's domain stays when its guest has ended."""
    guests = [vm(tick_ms=600_000) for _ in range(MANY)]
    guests[-1].write(on_halt="preserve")
    for guest in guests:
        guest.start()
    until(lambda: all(guest.boots() == 1 for guest in guests), "all guests are up")
    time.sleep(2)  # each watcher has had its first look
    return guests


def looks(guests):
    """The looks at a domain or all of them in the logs of acts: op, and whether one has not ended yet, of each VM."""
    found = []
    for guest in guests:
        records = [record for record in read(str(guest.acts)) if record.get("op") in ("survey", "query")]
        begun = [record["op"] for record in records if record["act"] == "job"]
        under_way = bool(records) and records[-1]["act"] == "job"
        found.append((begun, under_way))
    return found


def end(guest, reason):
    guest.host.machine.call("shutdown", domid=guest.host.domains()[guest.uuid], reason=reason)


def looking(guests):
    """The VM whose monitor looks at all domains just now, holding the lock."""
    return next((guest for guest, (begun, under_way) in zip(guests, looks(guests), strict=True) if under_way), None)


def is_locked(host):
    with open(host.sockets / "looks") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_end_of_one_domain_costs_a_look_or_two_and_not_one_each(host, many):
    before = [len(begun) for begun, _ in looks(many)]
    host.slow(300, ["list"])  # all monitors have asked by the end of the first look
    end(many[-1], POWEROFF)
    many[-1].until("shutdown")
    until(lambda: not any(under_way for _, under_way in looks(many)), "all have looked")
    time.sleep(2.5)  # longer than anybody waits for another's look
    begun = [ops[number:] for number, (ops, _) in zip(before, looks(many), strict=True)]
    assert sum(map(len, begun)) <= 4, begun
    assert begun[-1], begun
    assert all(guest.state == "running" for guest in many[:-1])
    assert not is_locked(host)


def test_alone_a_reboot_is_seen_at_once_by_the_one_look(host, vm):  # noqa: F811
    guest = vm(tick_ms=600_000)
    guest.start()
    guest.up()
    time.sleep(2)
    before = len(looks([guest])[0][0])
    end(guest, REBOOT)
    until(lambda: guest.boots() == 2, "it has rebooted")
    assert looks([guest])[0][0][before] == "survey"
    records = [record for record in read(str(guest.acts)) if record["act"] == "job"]
    assert [record["op"] for record in records if record["op"] != "query"][-2:] in (
        ["survey", "rebuild"],
        ["rebuild", "survey"],  # the end of the old domain is an event too
    )


def test_of_domains_that_end_at_the_same_moment_none_is_missed(host, many):
    for boots in (2, 3):  # a third end so soon after its start would be one too many
        for guest in many[:-1]:
            end(guest, REBOOT)
        until(lambda boots=boots: all(guest.boots() == boots for guest in many[:-1]), f"boot {boots} of all")
        until(lambda: all(guest.state == "running" for guest in many), "all run")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_whoever_looks_may_die_or_stand_still_over_it(host, many, how):
    """The lock of one that has died is free; on one that stands still nobody waits longer than a second or two."""
    host.slow(9000, ["list"])
    end(many[-1], POWEROFF)
    first = until(lambda: looking(many), "one looks at all domains", 20)
    broker = first.broker()
    assert is_locked(host)
    kill(broker, {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
    host.slow(0)
    others = [guest for guest in many[:-1] if guest is not first]
    end(others[0], REBOOT)
    until(lambda: others[0].boots() == 2, "the one whose guest has rebooted is not missed", 15)
    if how == "stopped":
        assert is_locked(host)  # it was not waited for
        os.kill(broker, signal.SIGCONT)
    # others may look just now, at what the reboot has changed; what nobody would ever free stays locked
    until(lambda: not is_locked(host), "no look is under way for ever")
    assert all(guest.state == "running" for guest in others)
    end(others[1], REBOOT)
    until(lambda: others[1].boots() == 2, "and all goes on")
