# SPDX-License-Identifier: GPL-2.0-or-later
"""The real supervisor process: startup, every command, and the end of its broker. Needs root."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import time

import pytest
from supervisor_bench import FAULT, PAUSED, POLICY, RUNNING, UNTOUCHED, UUID, WAIT_S, Monitor, ended

from xenvm.boundary.images import Progress
from xenvm.boundary.messages import NO_DOMAIN, Fault, Hello, Op, Watch, WatchEvent
from xenvm.errors import ExitCode


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log")
    yield made
    made.close()


# Startup


def test_it_greets_with_what_it_proved(monitor):
    assert isinstance(monitor.hello, Hello)
    assert (monitor.hello.role, monitor.hello.pid) == ("supervisor", monitor.pid)
    proof = json.loads(monitor.hello.proof)
    assert proof["uid"] != 0
    assert set(proof["capabilities"].values()) == {"0"}


def test_a_start_is_reported_and_seen(monitor):
    monitor.init()
    client = monitor.client()
    assert client.call("status")["data"]["state"] == "creating-domain"
    monitor.broker.send(Progress(0, "loading the kernel"))
    while (status := client.call("status")["data"])["step"] != "loading the kernel":
        pass
    assert status["busy"]["command"] == "start"
    monitor.done(0, RUNNING)
    started = monitor.asked(Op.STARTED)
    assert (started.code, started.text) == (0, "")
    status = client.call("status")["data"]
    assert (status["state"], status["running"], status["domid"], status["busy"]) == ("running", True, 7, None)
    assert (status["uuid"], status["name"], status["monitor_pid"]) == (UUID, "web", os.getpid())


def test_a_failed_start_says_why(monitor):
    monitor.init()
    monitor.failed(0, Fault(7, "no answer within 720 s", "look into the log"))
    started = monitor.asked(Op.STARTED)
    assert (started.code, started.text) == (7, "no answer within 720 s\nhint: look into the log")


@pytest.mark.parametrize(("startup", "domain", "state"), [
    ("started", RUNNING, "running"),
    ("started", PAUSED, "paused"),
    ("started", UNTOUCHED, "created"),
    ("paused", UNTOUCHED, "created"),
    ("paused", RUNNING, "running"),
    ("shutdown", RUNNING, "running"),
    ("shutdown", NO_DOMAIN, "shutdown"),
])  # fmt: skip
def test_what_is_found_is_adopted(monitor, startup, domain, state):
    monitor.init(policy=POLICY.but(startup=startup))
    monitor.done(0, domain)
    assert monitor.asked(Op.STARTED).code == 0
    status = monitor.state()
    assert (status["state"], status["domid"]) == (state, domain.domid if domain.domid > 0 else None)


def test_a_suspended_guest_that_is_found_is_resumed(monitor):
    monitor.init()
    monitor.done(0, ended(2))
    monitor.done(monitor.asked(Op.RESUME), RUNNING)
    assert monitor.asked(Op.STARTED).code == 0
    assert monitor.state()["state"] == "running"


def test_a_replaced_supervisor_reports_no_start(monitor):
    monitor.init(first=False)
    monitor.done(0, RUNNING)
    assert monitor.state()["state"] == "running"
    assert monitor.nothing_asked()


def test_a_replaced_supervisor_whose_look_fails_does_not_call_the_guest_off(monitor):
    monitor.init(first=False)
    monitor.failed(0, FAULT, RUNNING)
    status = monitor.state()
    assert (status["state"], status["domid"]) == ("running", 7)


# Commands


def test_pause_and_unpause(monitor):
    client = monitor.running().client()
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()["result"]["data"]["state"] == "paused"
    assert client.refused("pause")[0] is ExitCode.WRONG_STATE
    client.send("unpause")
    monitor.done(monitor.asked(Op.UNPAUSE), RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"


def test_a_pause_that_did_not_pause_is_a_failure_and_not_for_ever(monitor):
    client = monitor.running().client()
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), RUNNING)
    code, text, _ = client.refusal()
    assert (code, text) == (ExitCode.FAILED, "pause: the VM is running")
    assert client.call("status")["data"]["busy"] is None


def test_a_failed_pause_leaves_the_guest_running(monitor):
    client = monitor.running().client()
    client.send("pause")
    monitor.failed(monitor.asked(Op.PAUSE), FAULT, RUNNING)
    assert client.refusal() == (ExitCode.FAILED, FAULT.message, FAULT.hint)
    assert client.call("status")["data"]["state"] == "running"
    monitor.failed(monitor.asked(Op.QUERY), FAULT, RUNNING)  # what the guest did meanwhile is not known yet
    monitor.done(monitor.asked(Op.QUERY), PAUSED)
    assert monitor.state()["state"] == "paused"


def test_shutdown(monitor):
    client = monitor.running().client()
    client.send("shutdown")
    monitor.done(monitor.asked(Op.ASK_POWEROFF), RUNNING)
    assert monitor.state()["state"] == "shutdowning"
    monitor.watch()
    monitor.done(monitor.asked(Op.QUERY), ended(0))
    monitor.done(monitor.asked(Op.DESTROY))
    data = client.reply()["result"]["data"]
    assert (data["state"], data["running"], data["domid"]) == ("shutdown", False, None)
    client.send("start")
    monitor.done(monitor.asked(Op.BUILD), RUNNING.but(domid=8))
    assert client.reply()["result"]["data"]["domid"] == 8


def test_a_guest_that_ignores_shutdown(monitor):
    client = monitor.running().client()
    client.send("shutdown", timeout="0.3")
    monitor.done(monitor.asked(Op.ASK_POWEROFF), RUNNING)
    monitor.done(monitor.asked(Op.WITHDRAW), RUNNING)
    code, text, hint = client.refusal()
    assert code is ExitCode.TIMED_OUT
    assert re.search(r"the guest did not shut down within \d s and runs on", text)
    assert "shutdown force=true" in hint
    monitor.done(monitor.asked(Op.QUERY), RUNNING)
    assert client.call("status")["data"]["state"] == "running"


def test_a_guest_that_ignores_shutdown_is_forced_in_the_end(monitor):
    client = monitor.running().client()
    client.send("shutdown", timeout="0.3", force="true")
    monitor.done(monitor.asked(Op.ASK_POWEROFF), RUNNING)
    monitor.done(monitor.asked(Op.FORCE_POWEROFF), ended(0))
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"


@pytest.mark.parametrize("reason", [0, 1])
def test_restart_never_looks_like_being_off(monitor, reason):
    client, watching = monitor.running().client(), monitor.client()
    watching.call("events")
    client.send("restart")
    monitor.done(monitor.asked(Op.ASK_REBOOT), RUNNING)
    monitor.watch()
    monitor.done(monitor.asked(Op.QUERY), ended(reason))
    rebuild = monitor.asked(Op.REBUILD)
    status = monitor.state()
    assert (status["state"], status["running"]) == ("rebooting", True)
    monitor.done(rebuild, RUNNING.but(domid=8))
    assert client.reply()["result"]["data"]["domid"] == 8
    states = []
    while "running" not in states:
        states.append(watching.message()["params"]["state"])
    assert set(states) == {"rebooting", "running"}


def test_a_forced_restart_that_cannot_begin_leaves_the_guest_running(monitor):
    client = monitor.running().client()
    client.send("restart", force="true")
    monitor.failed(monitor.asked(Op.REBUILD), FAULT, RUNNING)
    assert client.refusal()[:2] == (ExitCode.FAILED, FAULT.message)
    status = client.call("status")["data"]
    assert (status["state"], status["domid"]) == ("running", 7)


def test_a_guest_that_ended_and_cannot_be_replaced_is_held(monitor):
    monitor.running()
    monitor.watch()
    monitor.done(monitor.asked(Op.QUERY), ended(1))
    monitor.failed(monitor.asked(Op.REBUILD), FAULT, RUNNING)
    status = monitor.state()
    assert (status["state"], status["domid"], status["reason"]) == ("crashed", 7, FAULT.message)
    client = monitor.client()
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"


def test_a_failed_rebuild_is_an_off_guest_with_a_reason(monitor):
    client = monitor.running().client()
    client.send("restart", force="true")
    monitor.failed(monitor.asked(Op.REBUILD), FAULT, NO_DOMAIN)
    assert client.refusal()[:2] == (ExitCode.FAILED, FAULT.message)
    status = client.call("status")["data"]
    assert (status["state"], status["domid"], status["reason"]) == ("shutdown", None, FAULT.message)


def test_guests_that_die_at_once_are_left_off(monitor):
    """Also those that the builder already finds ended when it looks."""
    monitor.running(policy=POLICY.but(on_crash="reboot"))
    monitor.watch()
    monitor.done(monitor.asked(Op.QUERY), ended(3))
    monitor.done(monitor.asked(Op.REBUILD), ended(3, domid=8))
    monitor.done(monitor.asked(Op.REBUILD), ended(3, domid=9))
    monitor.done(monitor.asked(Op.DESTROY))
    status = monitor.state()
    assert status["state"] == "shutdown"
    assert "3 times in a row within 10 s" in status["reason"]


def test_one_change_at_a_time_while_reading_goes_on(monitor):
    monitor.init(policy=POLICY.but(startup="shutdown"))
    monitor.done(0, NO_DOMAIN)
    monitor.asked(Op.STARTED)
    building, other = monitor.client(), monitor.client()
    building.send("start")
    build = monitor.asked(Op.BUILD)
    for command in ("start", "pause", "shutdown", "restart", "unpause", "quit"):
        code, text, _ = other.refused(command)
        assert code is ExitCode.BUSY
        assert f"{command}: busy with start" in text
        assert command == "quit" or text.endswith(" s")
    status = other.call("status")["data"]
    assert (status["state"], status["busy"]["command"]) == ("creating-domain", "start")
    assert status["busy"]["for_s"] >= 0
    assert other.call("domid")["data"] == -1
    assert other.call("get", field="name")["text"] == "web"
    assert building.silent()
    monitor.done(build, RUNNING)
    assert building.reply()["result"]["data"]["state"] == "running"


def test_destroy_overtakes_a_build(monitor):
    monitor.init(policy=POLICY.but(startup="shutdown"))
    monitor.done(0, NO_DOMAIN)
    monitor.asked(Op.STARTED)
    building, other = monitor.client(), monitor.client()
    building.send("start")
    build = monitor.asked(Op.BUILD)
    other.send("destroy")
    destroy = monitor.asked(Op.DESTROY)
    assert building.refusal()[1] == "start: ended by destroy"
    monitor.failed(build, FAULT)
    assert other.silent()
    monitor.done(destroy)
    assert other.reply()["result"]["data"]["state"] == "shutdown"


def test_a_client_whose_command_was_overtaken_may_go_on_at_once(monitor):
    first, second = monitor.running().client(), monitor.client()
    first.send("shutdown")
    monitor.asked(Op.ASK_POWEROFF)
    first.send("destroy")
    second.send("destroy")
    earlier = monitor.asked(Op.DESTROY)
    later = monitor.asked(Op.DESTROY)
    assert later.sequence > earlier.sequence
    assert first.message()["error"]["message"] == "shutdown: ended by destroy"
    assert second.refusal()[1] == "destroy: ended by destroy"
    monitor.done(later)
    assert first.reply()["result"]["data"]["state"] == "shutdown"


def test_a_destroy_that_fails_says_so(monitor):
    client = monitor.running().client()
    client.send("destroy")
    monitor.failed(monitor.asked(Op.DESTROY), FAULT, RUNNING)
    assert client.refusal()[:2] == (ExitCode.FAILED, FAULT.message)
    assert client.call("status")["data"]["state"] == "crashed"


def test_a_command_goes_on_without_its_client(monitor):
    client = monitor.running().client()
    client.send("pause")
    pause = monitor.asked(Op.PAUSE)
    client.socket.close()
    monitor.done(pause, PAUSED)
    other = monitor.client()
    while (status := other.call("status")["data"])["busy"]:
        pass
    assert status["state"] == "paused"


def test_other_domains_ending_costs_one_look_a_second(monitor):
    monitor.running()
    begun = time.monotonic()
    for _ in range(3):
        for _ in range(20):
            monitor.watch()
        monitor.done(monitor.asked(Op.QUERY), RUNNING)
    assert time.monotonic() - begun > 1.8


def test_while_another_monitor_looks_a_command_is_not_held_up_and_the_look_comes_again(monitor):
    client = monitor.running().client()
    monitor.watch()
    look = monitor.asked(Op.QUERY)
    assert 0 <= look.age_ms < 10_000
    client.send("pause")
    monitor.failed(look, Fault(int(ExitCode.BUSY), "another monitor looks at the host", ""), RUNNING)
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()["result"]["data"]["state"] == "paused"
    begun = time.monotonic()
    while (look := monitor.asked(Op.QUERY)).age_ms >= 0:
        monitor.failed(look, Fault(int(ExitCode.BUSY), "another monitor looks at the host", ""), RUNNING)
    assert time.monotonic() - begun < 10  # then it is a look of its own
    monitor.done(look, ended(0))
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.call("status")["data"]["state"] == "shutdown"


def test_a_fresh_watcher_means_a_look_of_ones_own(monitor):
    monitor.running()
    monitor.watcher.send(Watch(WatchEvent.ARMED))
    assert monitor.asked(Op.QUERY).age_ms == -1


def test_waiting_for_a_state(monitor):
    monitor.running()
    waiting, late, acting = (monitor.client() for _ in range(3))
    assert waiting.call("wait", state="running")["data"] == {"state": "running"}
    waiting.send("wait", state="paused")
    code, text, _ = late.refused("wait", state="shutdown", timeout="0.2")
    assert code is ExitCode.TIMED_OUT
    assert text == "wait: the VM was not shutdown within 0.2 s; it is running"
    assert waiting.silent()
    acting.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert waiting.reply()["result"]["data"] == {"state": "paused"}
    waiting.send("wait", state="shutdowning")
    assert waiting.silent()
    acting.reply()
    acting.send("destroy")
    destroy = monitor.asked(Op.DESTROY)
    assert waiting.reply()["result"]["data"] == {"state": "shutdowning"}  # a state to which a command leads at once
    monitor.done(destroy)
    assert late.refused("wait", state="asleep")[0] is ExitCode.USAGE


def test_events(monitor):
    client = monitor.running().client()
    assert client.call("events")["data"]["state"] == "running"
    client.send("pause")
    pause = monitor.asked(Op.PAUSE)
    monitor.broker.send(Progress(pause.sequence, "a step"))
    monitor.done(pause, PAUSED)
    progress, state, reply = client.message(), client.message(), client.message()
    assert (progress["method"], progress["params"]["event"], progress["params"]["step"]) == (
        "event",
        "progress",
        "a step",
    )
    assert (state["params"]["event"], state["params"]["state"], state["params"]["domid"]) == ("state", "paused", 7)
    assert state["params"]["uuid"] == UUID
    assert reply["id"] == client.last


def test_who_waits_for_a_command_hears_every_ten_seconds_that_it_is_at_work(monitor):
    """Its wait for the reply begins anew with each: to load a kernel may take longer than it would wait."""
    monitor.init(policy=POLICY.but(startup="shutdown"))
    monitor.done(0, NO_DOMAIN)
    monitor.asked(Op.STARTED)
    client = monitor.client()
    client.call("events")
    select.select([client.socket], [], [], 11)  # what was told last is long ago
    client.send("start")
    build = monitor.asked(Op.BUILD)
    monitor.broker.send(Progress(build.sequence, "loading the kernel"))
    begun_s, steps = time.monotonic(), []
    while steps.count("loading the kernel") < 2:
        event = client.message()["params"]
        steps += [event["step"]] if event["event"] == "progress" else []
    assert steps == ["loading the kernel"] * 2
    assert 8 < time.monotonic() - begun_s < 20
    monitor.done(build, RUNNING)


def test_reading_the_config_again(monitor):
    client, watching = monitor.running().client(), monitor.client()
    watching.call("events")
    assert client.refused("read-config", path="/etc/passwd")[0] is ExitCode.USAGE
    client.send("read-config")
    ask = monitor.asked(Op.READ_CONFIG)
    monitor.init(fields={"name": "new"}, first=False)
    monitor.done(ask, RUNNING)
    assert client.reply()["result"]["text"] == ""
    assert watching.message()["params"]["event"] == "config"
    assert client.call("get", field="name")["text"] == "new"
    code, text, hint = client.refused("get", field="memory")
    assert (code, text, hint) == (ExitCode.USAGE, "get: no field 'memory'", "one of name")


def test_the_console_travels_as_a_descriptor(monitor):
    client = monitor.running().client()
    readable, writable = os.pipe()
    client.send("console")
    monitor.done(monitor.asked(Op.CONSOLE), RUNNING, descriptors=[writable])
    _, (descriptor,), _, _ = socket.recv_fds(client.socket, 4096, 1)
    os.write(descriptor, b"login:")
    assert os.read(readable, 64) == b"login:"
    for number in (readable, writable, descriptor):
        os.close(number)


def test_who_comes_while_a_console_is_opened_waits_for_that(monitor):
    """The broker does both with a builder, and would refuse the second."""
    monitor.running()
    first, second, third = (monitor.client() for _ in range(3))
    first.send("console")
    console = monitor.asked(Op.CONSOLE)
    second.send("disk-list")
    assert second.silent()
    third.send("pause")
    assert third.silent()
    assert monitor.nothing_asked()
    monitor.failed(console, FAULT, RUNNING)
    assert first.refusal()[1] == FAULT.message
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert third.reply()["result"]["data"]["state"] == "paused"
    monitor.done(monitor.asked(Op.DEVICES), RUNNING)
    assert "result" in second.reply()


def test_a_console_whose_client_has_gone_tells_nothing_of_the_guest(monitor):
    monitor.running(PAUSED)
    client = monitor.client()
    client.send("console")
    console = monitor.asked(Op.CONSOLE)
    client.socket.close()
    monitor.client().call("domid")
    null = os.open("/dev/null", os.O_RDWR)
    monitor.done(console, RUNNING, descriptors=[null])
    os.close(null)
    assert monitor.state()["state"] == "paused"
    assert not [name for name in os.listdir(f"/proc/{monitor.pid}/fd") if is_null(monitor, name)]


def is_null(monitor, name):
    return int(name) > 2 and os.readlink(f"/proc/{monitor.pid}/fd/{name}") == "/dev/null"


def test_a_console_nobody_waits_for_any_more_is_closed(monitor):
    monitor.running()
    other = monitor.client()
    other.call("status")
    before = len(os.listdir(f"/proc/{monitor.pid}/fd"))
    readable, writable = os.pipe()
    for _ in range(10):
        client = monitor.client()
        client.send("console-log")
        ask = monitor.asked(Op.CONSOLE_LOG)
        client.socket.close()
        other.call("status")
        monitor.done(ask, RUNNING, descriptors=[writable])
    os.close(writable)
    os.set_blocking(readable, True)
    assert select.select([readable], [], [], WAIT_S)[0]
    assert os.read(readable, 1) == b""
    os.close(readable)
    assert len(os.listdir(f"/proc/{monitor.pid}/fd")) <= before


def test_a_log_that_takes_no_more_ends_nothing(monitor):
    client = monitor.running(debug=True).client()
    monitor.log.seek(64 << 20)  # what its limit counts is the place in the file
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()["result"]["data"]["state"] == "paused"
    monitor.log.seek(0, os.SEEK_END)
    assert monitor.log.tell() < 64 << 20


def test_quit_is_answered_before_the_broker_ends_it(monitor):
    client = monitor.running().client()
    assert client.call("quit")["text"] == ""
    monitor.asked(Op.QUIT)
    monitor.broker.close()
    assert monitor.exit_status() == 0
    assert client.message() is None


# The end of the broker


def test_it_ends_with_its_broker(monitor):
    monitor.running()
    monitor.broker.close()
    assert monitor.exit_status() == 0


@pytest.mark.parametrize("frame", [b"garbage", b"\0" * 12, b"x" * 4000])
def test_a_broker_that_talks_nonsense_ends_it(monitor, frame):
    monitor.running()
    monitor.broker._socket.send(frame)
    assert monitor.exit_status() == 1
    monitor.log.seek(0)
    said = monitor.log.read()
    assert b": ended: " in said
    assert b"frame" in said


def test_it_must_be_told_first_whom_it_serves(monitor):
    monitor.done(0, RUNNING)
    assert monitor.exit_status() == 1


def test_it_dies_with_a_broker_that_is_killed(users, tmp_path):
    readable, writable = os.pipe()
    broker = os.fork()
    if broker == 0:
        with contextlib.suppress(BaseException):
            monitor = Monitor(users, tmp_path / "log").running()
            os.write(writable, str(monitor.pid).encode())
            signal.pause()
        os._exit(1)
    os.close(writable)
    pidfd = os.pidfd_open(int(os.read(readable, 64)))
    os.close(readable)
    assert not select.select([pidfd], [], [], 0)[0]
    os.kill(broker, signal.SIGKILL)
    os.waitpid(broker, 0)
    assert select.select([pidfd], [], [], WAIT_S)[0]
    os.close(pidfd)
