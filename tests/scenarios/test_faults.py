# SPDX-License-Identifier: GPL-2.0-or-later
"""What dies, and what must not die with it."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import kill, until


def steady(guest, seconds=3.0):
    """Assert that the guest ticks on without a gap: no tick missing, and about as many as the time allows."""
    before = len(guest.ticks())
    guest.host.rest(seconds)
    ticks = guest.ticks()
    assert ticks == list(range(1, len(ticks) + 1))
    assert len(ticks) > before


def test_quit_leaves_the_guest_and_the_next_start_adopts_it(host, vm):
    guest = vm()
    guest.start()
    guest.up()
    domid = guest.domid
    guest.cmd("quit")
    until(lambda: not guest.socket.exists(), "the monitor has ended")
    assert host.domains() == {guest.uuid: domid}
    guest.cmd("status", code=4)
    steady(guest)
    guest.start()
    assert guest.domid == domid
    assert guest.boots() == 1
    guest.cmd("pause")
    guest.cmd("quit")
    guest.start()
    assert guest.state == "paused"
    guest.cmd("unpause")
    steady(guest)


@pytest.mark.parametrize(
    "victims",
    [
        ["supervisor"],
        pytest.param(["watcher"], marks=pytest.mark.long),
        pytest.param(["broker"], marks=pytest.mark.long),
        ["supervisor", "watcher", "broker"],
    ],
)
def test_kill_9_of_the_monitor(vm, victims):
    guest = vm()
    guest.start()
    guest.up()
    domid, pids = guest.domid, guest.pids()
    assert set(pids) >= {"broker", "supervisor", "watcher"}
    for role in victims:
        kill(pids[role])
    if "broker" in victims:
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "the rest has ended too")
        guest.cmd("status", code=4)
        steady(guest)
        guest.start()
    else:
        until(lambda: guest.pids().get(victims[0]) not in (None, pids[victims[0]]), "it was replaced")
    assert guest.domid == domid
    assert guest.boots() == 1
    steady(guest)
    guest.cmd("restart")  # death is still noticed
    guest.up(boots=2)


@pytest.mark.long
def test_a_guest_that_ended_while_nobody_watched(host, vm):
    guest = vm(mode="poweroff")
    guest.start()
    guest.up()
    domid = guest.domid
    kill(guest.broker())
    until(lambda: host.has_shut_down(domid), "the host shows that the guest has shut down")
    guest.start()
    until(lambda: guest.boots() == 2, "the policy was done and the guest started anew")


@pytest.mark.long
def test_destroy_at_any_moment_of_a_start(host, vm):
    """From the first moment the socket answers to the end of the start, in ten steps."""
    guest = vm()
    host.slow()
    begin = time.monotonic()
    guest.start()
    whole_s = time.monotonic() - begin
    guest.end()
    hits = 0
    for step in range(10):
        starting = guest.begin()
        until(lambda one=starting: guest.socket.exists() or one.poll() is not None, "socket")
        time.sleep(whole_s * step / 12)
        destroyed = host.run("xenvm-cmd", guest.uuid, "destroy")
        text = starting.communicate(timeout=120)[0]
        assert destroyed.returncode == 0, f"step {step}: {destroyed.stderr} {text}"
        hits += "destroyed while" in text
        assert guest.state == "shutdown"
        assert guest.uuid not in host.domains()
        assert [path for path in guest.left() if path.startswith("/") and not path.startswith(str(host.sockets))] == []
        guest.cmd("destroy")  # twice is harmless
        guest.cmd("quit")
        until(lambda: guest.left() == [], f"step {step}: nothing left")
    assert hits >= 3


@pytest.mark.long
def test_kill_9_of_the_builder_during_a_start(host, vm):
    guest = vm()
    host.slow()
    killed = 0
    acts = guest.acts
    for delay_s in (0.0, 0.2, 0.6, 1.2):
        before = _jobs(acts)
        starting = guest.begin()
        until(
            lambda one=starting, seen=before: one.poll() is not None or _jobs(acts) > seen,
            "a builder with a job (one killed before it has one is replaced)",
        )
        time.sleep(delay_s)
        pid = _builder(host)
        if pid:
            kill(pid)
        text = starting.communicate(timeout=120)[0]
        if starting.returncode:
            killed += 1
            assert "builder died of SIGKILL" in text
            until(lambda: guest.left() == [], "nothing left")
        else:
            guest.end()
    assert killed >= 2
    guest.start()


@pytest.mark.long
def test_kill_9_of_broker_and_builder_during_a_start(host, vm):
    """Both at once, so that neither sees the other's end: half a domain stays, and the next start removes it."""
    guest = vm()
    host.slow()
    starting = guest.begin()
    until(lambda: guest.uuid in host.domains() or starting.poll() is not None, "half a domain")
    broker = guest.broker()
    os.kill(broker, signal.SIGSTOP)
    builder = guest.pids().get("builder", 0)
    for pid in filter(None, (builder, broker)):
        kill(pid)
    text = starting.communicate(timeout=60)[0]
    assert builder, f"it was not in time: {text}"
    assert starting.returncode, f"it was not in time: {text}"
    until(lambda: not host.processes(), "all of the monitor has ended", 20)
    half = host.domains()[guest.uuid]
    guest.start()
    guest.up()
    assert guest.boots() == 1
    assert host.domains()[guest.uuid] != half


def test_a_monitor_that_is_ended_in_a_start_leaves_nothing(host, vm):
    """SIGTERM, as of systemd: what is half built goes with it, and a guest that is whole by then runs on."""
    guest = vm()
    host.slow()
    half = 0
    for delay_s in (0.0, 0.2, 0.5, 0.9):
        before = _jobs(guest.acts)
        starting = guest.begin()
        until(
            lambda one=starting, seen=before: one.poll() is not None or _jobs(guest.acts) > seen, "the start has begun"
        )
        time.sleep(delay_s)
        kill(guest.broker(), signal.SIGTERM)
        text = starting.communicate(timeout=90)[0]
        until(lambda: not guest.lock.exists(), f"the monitor has ended: {text}")
        if guest.uuid in host.domains():
            guest.start()
            guest.end()
        else:
            half += starting.returncode != 0
        until(lambda: guest.left() == [], "nothing left")
    assert half >= 2
    guest.start()
    guest.up()


def _jobs(acts):
    return acts.read_text().count('"job"') if acts.exists() else 0


def _builder(host):
    return next((pid for pid, words in host.processes().items() if "builder" in words), 0)


@pytest.mark.long
def test_only_one_monitor_for_a_uuid(host, vm):
    guest = vm()
    both = [guest.begin(), guest.begin()]
    texts = [one.communicate(timeout=300)[0] for one in both]
    assert sorted(one.returncode for one in both) == [0, 9], texts
    assert f"serves {guest.uuid}" in "".join(texts)
    assert guest.start(code=9).returncode == 9
    assert list(host.domains()) == [guest.uuid]


@pytest.mark.long
@pytest.mark.parametrize("count", [4, 16])
def test_many_at_once(host, vm, count):
    host.favour()
    guests = [vm(memory=112) for _ in range(count)]
    starting = [guest.begin() for guest in guests]
    for one in starting:
        assert one.wait(timeout=900) == 0, one.communicate()[0]
    assert set(host.domains()) == {guest.uuid for guest in guests}
    assert len(re.findall(r" running ", host.run("xenvm-cmd", "list").stdout)) == count
    for guest in guests:
        guest.up(patience_s=600)
    stopping = [guest.begin_cmd("shutdown", "timeout=300") for guest in guests]
    for one in stopping:
        said = one.communicate(timeout=400)[0]
        assert one.returncode == 0, said
    assert host.domains() == {}
