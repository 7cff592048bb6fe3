# SPDX-License-Identifier: GPL-2.0-or-later
"""The real supervisor process, time limits that come to their end late, and looks that fail. Needs root."""

import time

import pytest
from supervisor_bench import FAULT, PAUSED, RUNNING, Monitor, ended

from xenvm.boundary.messages import Op
from xenvm.errors import ExitCode


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log")
    yield made
    made.close()


LIMIT_S = 0.4


def expire():
    """Let a time limit that is running come to its end."""
    time.sleep(LIMIT_S + 0.2)


def asked_in_time(monitor, command, op, **params):
    """Have a guest asked for something within a time limit."""
    client = monitor.client()
    client.send(command, timeout=str(LIMIT_S), **params)
    monitor.done(monitor.asked(op), RUNNING)
    monitor.watch()
    return client


# A guest that has obeyed is not called one that has not, however long the rest takes


@pytest.mark.parametrize("params", [{}, {"force": "true"}])
def test_a_restart_whose_new_guest_takes_long_to_build(monitor, params):
    monitor.running()
    client = asked_in_time(monitor, "restart", Op.ASK_REBOOT, **params)
    monitor.done(monitor.asked(Op.QUERY), ended(1))
    rebuild = monitor.asked(Op.REBUILD)
    expire()
    assert monitor.nothing_asked()
    monitor.done(rebuild, RUNNING.but(domid=8))
    data = client.reply()["result"]["data"]
    assert (data["state"], data["domid"]) == ("running", 8)
    assert monitor.nothing_asked()


@pytest.mark.parametrize("params", [{}, {"force": "true"}])
def test_a_shutdown_whose_domain_takes_long_to_go(monitor, params):
    monitor.running()
    client = asked_in_time(monitor, "shutdown", Op.ASK_POWEROFF, **params)
    monitor.done(monitor.asked(Op.QUERY), ended(0))
    destroy = monitor.asked(Op.DESTROY)
    expire()
    assert monitor.nothing_asked()
    monitor.done(destroy)
    assert client.reply()["result"]["data"]["state"] == "shutdown"
    assert monitor.nothing_asked()


@pytest.mark.parametrize(
    ("command", "op", "reason", "then"),
    [("shutdown", Op.ASK_POWEROFF, 0, Op.DESTROY), ("restart", Op.ASK_REBOOT, 1, Op.REBUILD)],
)
@pytest.mark.parametrize("params", [{}, {"force": "true"}])
def test_a_guest_whose_end_is_being_looked_at_when_its_time_is_over(monitor, command, op, reason, then, params):
    """What was to be done because it has not obeyed is not done to the next one."""
    monitor.running()
    client = asked_in_time(monitor, command, op, **params)
    query = monitor.asked(Op.QUERY)
    expire()
    assert monitor.nothing_asked()  # the broker does one thing after the other
    monitor.done(query, ended(reason))
    monitor.done(monitor.asked(then), *([RUNNING.but(domid=8)] if then is Op.REBUILD else []))
    data = client.reply()["result"]["data"]
    assert data["state"] == ("running" if then is Op.REBUILD else "shutdown")
    assert monitor.nothing_asked()


def test_a_guest_that_obeys_while_the_request_is_taken_back_has_obeyed(monitor):
    monitor.running()
    client = asked_in_time(monitor, "shutdown", Op.ASK_POWEROFF)
    monitor.done(monitor.asked(Op.QUERY), RUNNING)
    monitor.done(monitor.asked(Op.WITHDRAW), ended(0))
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"


@pytest.mark.parametrize("params", [{}, {"force": "true"}])
def test_a_guest_is_not_asked_when_the_time_for_that_is_over(monitor, params):
    """The broker was at something else all the while; the request would be obeyed after it was called ignored."""
    monitor.running()
    monitor.watch()
    query = monitor.asked(Op.QUERY)
    client = monitor.client()
    client.send("shutdown", timeout=str(LIMIT_S), **params)
    expire()
    monitor.done(query, RUNNING)
    if params:
        monitor.done(monitor.asked(Op.FORCE_POWEROFF), ended(0))
        monitor.done(monitor.asked(Op.DESTROY))
        assert client.reply()["result"]["data"]["state"] == "shutdown"
    else:
        monitor.done(monitor.asked(Op.WITHDRAW), RUNNING)
        code, text, _ = client.refusal()
        assert (code, "runs on" in text) == (ExitCode.TIMED_OUT, True)


def test_what_was_to_be_done_to_a_domain_is_not_done_to_the_next_one(monitor):
    monitor.running()
    monitor.watch()
    query = monitor.asked(Op.QUERY)
    client = monitor.client()
    client.send("pause")
    monitor.client().call("status")
    monitor.done(query, ended(1))
    monitor.done(monitor.asked(Op.REBUILD), RUNNING.but(domid=8))
    assert client.refusal()[:2] == (ExitCode.FAILED, "pause: the VM is running")
    assert monitor.nothing_asked()


# A look that fails says nothing of the guest, and is followed by another one


def test_a_reboot_is_seen_though_a_look_fails(monitor):
    monitor.running()
    monitor.watch()
    monitor.failed(monitor.asked(Op.QUERY), FAULT, RUNNING)
    begun_s = time.monotonic()
    look = monitor.asked(Op.QUERY)
    assert 0.8 < time.monotonic() - begun_s < 10
    assert look.age_ms == -1  # no look of another monitor
    monitor.done(look, ended(1))
    monitor.done(monitor.asked(Op.REBUILD), RUNNING.but(domid=8))
    assert monitor.state()["domid"] == 8


@pytest.mark.parametrize("command", ["shutdown", "restart"])
def test_a_look_that_fails_does_not_end_a_command(monitor, command):
    monitor.running()
    client = monitor.client()
    client.send(command)
    monitor.done(monitor.asked(Op.ASK_POWEROFF if command == "shutdown" else Op.ASK_REBOOT), RUNNING)
    monitor.watch()
    monitor.failed(monitor.asked(Op.QUERY), FAULT, RUNNING)
    assert client.silent()
    assert monitor.state()["busy"]["command"] == command
    monitor.done(monitor.asked(Op.QUERY), ended(0))
    if command == "shutdown":
        monitor.done(monitor.asked(Op.DESTROY))
    else:
        monitor.done(monitor.asked(Op.REBUILD), RUNNING.but(domid=8))
    assert client.reply()["result"]["data"]["state"] == ("shutdown" if command == "shutdown" else "running")


def test_a_look_that_fails_since_there_is_no_domain_says_so(monitor):
    monitor.running()
    monitor.watch()
    monitor.failed(monitor.asked(Op.QUERY), FAULT)
    status = monitor.state()
    assert (status["state"], status["domid"]) == ("shutdown", None)
    time.sleep(1.2)
    assert monitor.nothing_asked()


def test_a_pause_is_done_between_looks_that_fail(monitor):
    client = monitor.running().client()
    monitor.watch()
    monitor.failed(monitor.asked(Op.QUERY), FAULT, RUNNING)
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()["result"]["data"]["state"] == "paused"
    monitor.done(monitor.asked(Op.QUERY), PAUSED)
    time.sleep(1.2)
    assert monitor.nothing_asked()
