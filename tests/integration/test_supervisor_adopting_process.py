# SPDX-License-Identifier: GPL-2.0-or-later
"""The real supervisor process and a guest that had ended before its monitor came: its policy first, once. Needs root."""

import pytest
from supervisor_bench import POLICY, RUNNING, Monitor, ended

from xenvm.boundary.messages import Op
from xenvm.errors import ExitCode


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log")
    yield made
    made.close()


def states(client):
    """The states of which a client that listens for events has been told so far."""
    told = []
    while not client.silent():
        told.append(client.message()["params"]["state"])
    return told


def found(monitor, reason, **policy):
    """Have the start find a guest that has ended."""
    monitor.init(policy=POLICY.but(**policy))
    listening = monitor.client()
    listening.call("events")
    monitor.done(0, ended(reason))
    return listening


def test_one_that_is_destroyed_by_its_policy_is_started_anew_for_all_to_see(monitor):
    listening, waiting = found(monitor, 0), monitor.client()
    destroy = monitor.asked(Op.DESTROY)
    waiting.send("wait", state="creating-domain")
    monitor.client().call("status")
    monitor.done(destroy)
    build = monitor.asked(Op.BUILD)
    assert waiting.reply()["result"]["data"] == {"state": "creating-domain"}
    monitor.done(build, RUNNING.but(domid=8))
    assert monitor.asked(Op.STARTED).code == 0
    assert states(listening) == ["shutdowning", "shutdown", "creating-domain", "running"]
    monitor.log.seek(0)
    assert b"state=creating-domain domid=-1 event=start\n" in monitor.log.read()


@pytest.mark.parametrize("command", ["shutdown", "destroy"])
def test_one_that_had_rebooted_is_started_once_and_not_again_when_it_is_off(monitor, command):
    found(monitor, 1)
    monitor.done(monitor.asked(Op.REBUILD), RUNNING.but(domid=8))
    started = monitor.asked(Op.STARTED)
    assert (started.code, started.text) == (0, "")
    client = monitor.client()
    client.send(command)
    if command == "shutdown":
        monitor.done(monitor.asked(Op.ASK_POWEROFF), ended(0, 8))
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"
    assert monitor.nothing_asked()


@pytest.mark.parametrize(
    ("reason", "key", "state"),
    [(0, "on_halt", "shutdown"), (1, "on_reboot", "rebooted"), (3, "on_crash", "crashed")],
)
def test_one_that_is_preserved_has_its_monitor_and_is_not_called_started(monitor, reason, key, state):
    found(monitor, reason, **{key: "preserve"})
    started = monitor.asked(Op.STARTED)
    assert started.code == 0  # with any other the monitor would end, and nobody could command the domain
    assert started.text.startswith("the guest does not run: the guest ended: ")
    assert "preserved as domain 7\nhint: `xenvm-cmd 11111111-" in started.text
    client = monitor.client()
    status = client.call("status")["data"]
    assert (status["state"], status["domid"], status["running"]) == (state, 7, False)
    code, text, hint = client.refused("start")
    assert (code, hint) == (ExitCode.WRONG_STATE, "destroy it first")
    assert state in text
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"
    assert monitor.nothing_asked()
    client.send("start")
    monitor.done(monitor.asked(Op.BUILD), RUNNING.but(domid=8))
    assert client.reply()["result"]["data"]["domid"] == 8


def test_where_nothing_is_to_be_started_a_preserved_domain_is_no_failure(monitor):
    found(monitor, 3, on_crash="preserve", startup="shutdown")
    started = monitor.asked(Op.STARTED)
    assert (started.code, started.text) == (0, "")


def test_one_that_is_destroyed_by_command_before_its_start_begins_is_not_started(monitor):
    found(monitor, 0)
    monitor.asked(Op.DESTROY)
    client = monitor.client()
    client.send("destroy")
    started = monitor.asked(Op.STARTED)
    assert (started.code, started.text) == (0, "the guest does not run: destroyed while it was starting")
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"
    assert monitor.nothing_asked()
