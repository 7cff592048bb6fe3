# SPDX-License-Identifier: GPL-2.0-or-later
"""The real supervisor process and the sleep of an HVM guest: broker and device model are this test. Needs root."""

import json
import socket
import time

import pytest
from supervisor_bench import FAULT, PAUSED, RUNNING, WAIT_S, Monitor, ended

from xenvm.boundary.machine import Model
from xenvm.boundary.messages import NO_DOMAIN, Fault, Op
from xenvm.errors import ExitCode

HVM = {"name": "web", "hvm": "true"}


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log")
    yield made
    made.close()


class Emulator:
    """The device model, as the supervisor is connected with it."""

    def __init__(self, monitor, status="running"):
        self.socket, theirs = socket.socketpair()
        monitor.broker.send(Model(True, 5900), (theirs.fileno(),))
        theirs.close()
        self.socket.settimeout(WAIT_S)
        self.reader = self.socket.makefile("rb")
        self.send({"QMP": {"version": {}, "capabilities": []}})
        self.agree("qmp_capabilities")
        self.agree("query-status", {"status": status, "running": status == "running"})

    def send(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def tell(self, event):
        self.send({"event": event, "timestamp": {"seconds": 1, "microseconds": 2}})

    def hear(self, command):
        asked = json.loads(self.reader.readline())
        assert asked["execute"] == command
        return asked["id"]

    def agree(self, command, value=None):
        self.send({"return": value or {}, "id": self.hear(command)})

    def refuse(self, command, why):
        self.send({"error": {"class": "GenericError", "desc": why}, "id": self.hear(command)})


@pytest.fixture
def emulator(monitor):
    monitor.running(fields=HVM)
    made = Emulator(monitor)
    yield made
    made.reader.close()
    made.socket.close()


# Falling asleep


def test_a_guest_that_is_asked_falls_asleep(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend")
    monitor.done(monitor.asked(Op.ASK_SLEEP), RUNNING)
    assert client.silent()
    assert monitor.state()["busy"]["command"] == "s3suspend"
    emulator.tell("SUSPEND")
    asked = monitor.asked(Op.FALL_ASLEEP)  # Xen hears of it from us
    assert client.silent()
    monitor.done(asked, RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"
    assert monitor.state()["busy"] is None
    assert monitor.nothing_asked()


def test_a_guest_that_falls_asleep_of_its_own_accord_is_let_sleep_and_woken(monitor, emulator):
    emulator.tell("SUSPEND")
    monitor.done(monitor.asked(Op.FALL_ASLEEP), RUNNING)
    emulator.tell("WAKEUP")  # somebody has pressed a key
    monitor.done(monitor.asked(Op.WAKE), RUNNING)
    assert monitor.state()["state"] == "running"


def test_of_many_words_of_a_device_model_the_last_one_counts_and_one_a_second_at_most(monitor, emulator):
    emulator.tell("SUSPEND")
    began, first = time.monotonic(), monitor.asked(Op.FALL_ASLEEP)
    for event in ("WAKEUP", "SUSPEND", "NONE", "WAKEUP") * 20:
        emulator.tell(event)
    monitor.done(first, RUNNING)
    monitor.done(monitor.asked(Op.WAKE), RUNNING)
    assert time.monotonic() - began > 0.9
    assert monitor.nothing_asked()


def test_a_supervisor_that_comes_later_learns_that_the_guest_sleeps(monitor):
    monitor.running(fields=HVM)
    made = Emulator(monitor, "suspended")
    monitor.done(monitor.asked(Op.FALL_ASLEEP), RUNNING)
    assert monitor.nothing_asked()
    made.reader.close()
    made.socket.close()


def test_a_guest_that_has_no_drivers_is_not_asked(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend")
    monitor.failed(monitor.asked(Op.ASK_SLEEP), Fault(5, "no PV drivers", "trigger sleep"), RUNNING)
    assert client.refusal() == (ExitCode.WRONG_STATE, "no PV drivers", "trigger sleep")
    monitor.done(monitor.asked(Op.QUERY), RUNNING)  # the look after any failure; nothing is there to be withdrawn
    assert monitor.state()["busy"] is None
    assert monitor.nothing_asked()


def test_a_request_whose_builder_died_is_taken_back(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend")
    monitor.failed(monitor.asked(Op.ASK_SLEEP), FAULT, RUNNING)
    assert client.refusal() == (ExitCode.FAILED, "it went wrong", "look into the log")
    monitor.done(monitor.asked(Op.WITHDRAW), RUNNING)
    monitor.done(monitor.asked(Op.QUERY), RUNNING)
    assert monitor.state()["state"] == "running"


def test_a_guest_that_does_not_know_the_word_is_not_asked_for_ever(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend", timeout="0.3")
    monitor.done(monitor.asked(Op.ASK_SLEEP), RUNNING)
    asked = monitor.asked(Op.WITHDRAW)
    assert client.silent()
    monitor.done(asked, RUNNING)
    code, message, hint = client.refusal()
    assert (code, message) == (ExitCode.TIMED_OUT, "s3suspend: the guest did not fall asleep within 0 s and runs on")
    assert "Linux does not" in hint
    monitor.done(monitor.asked(Op.QUERY), RUNNING)
    assert monitor.state()["busy"] is None
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()["result"]["data"]["state"] == "paused"


def test_a_guest_that_falls_asleep_in_the_last_moment_has_done_so(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend", timeout="0.3")
    monitor.done(monitor.asked(Op.ASK_SLEEP), RUNNING)
    emulator.tell("SUSPEND")
    asked = monitor.asked(Op.FALL_ASLEEP)
    time.sleep(0.4)
    monitor.done(asked, RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"
    monitor.done(monitor.asked(Op.WITHDRAW), RUNNING)
    monitor.done(monitor.asked(Op.QUERY), RUNNING)
    assert monitor.state()["busy"] is None


def test_a_guest_that_ends_instead_ends_the_command(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend", timeout="1")
    monitor.done(monitor.asked(Op.ASK_SLEEP), RUNNING)
    monitor.watch()
    monitor.done(monitor.asked(Op.QUERY), ended(0))
    asked = monitor.asked(Op.DESTROY)
    time.sleep(1.1)  # its time is over meanwhile, which means nothing any more
    monitor.done(asked)
    code, message, _ = client.refusal()
    assert code is ExitCode.FAILED
    assert message == "s3suspend: the guest went another way; the VM is shutdown: the guest ended: poweroff"
    assert monitor.nothing_asked()


def test_a_guest_that_reboots_instead_does_not_sleep_later(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend")
    monitor.done(monitor.asked(Op.ASK_SLEEP), ended(1))
    monitor.done(monitor.asked(Op.REBUILD), RUNNING.but(domid=8))
    assert client.refusal()[:2] == (ExitCode.FAILED, "s3suspend: the guest went another way; the VM is running")
    assert monitor.nothing_asked()  # the request has gone with the domain
    assert monitor.state()["busy"] is None


def test_destroy_overtakes_it(monitor, emulator):
    client, other = monitor.client(), monitor.client()
    client.send("s3suspend")
    monitor.asked(Op.ASK_SLEEP)
    other.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY), NO_DOMAIN)
    assert client.refusal()[:2] == (ExitCode.FAILED, "s3suspend: ended by destroy")
    assert other.reply()["result"]["data"]["state"] == "shutdown"
    assert monitor.nothing_asked()


def test_it_goes_on_without_its_client(monitor, emulator):
    client = monitor.client()
    client.send("s3suspend")
    monitor.done(monitor.asked(Op.ASK_SLEEP), RUNNING)
    client.socket.close()
    emulator.tell("SUSPEND")
    monitor.done(monitor.asked(Op.FALL_ASLEEP), RUNNING)
    assert monitor.state()["busy"] is None


# Waking


@pytest.mark.parametrize("words", [("s3resume", {}), ("trigger", {"params": "s3resume"})])
def test_a_sleeping_guest_is_woken_its_device_model_first(monitor, emulator, words):
    client = monitor.client()
    client.send(words[0], **words[1])
    monitor.done(monitor.asked(Op.S_STATE), RUNNING, "3")
    emulator.agree("system_wakeup")
    assert monitor.nothing_asked()
    emulator.agree("query-status")
    monitor.done(monitor.asked(Op.WAKE), RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"
    assert monitor.nothing_asked()


def test_one_whose_device_model_tells_first_is_woken_once(monitor, emulator):
    client = monitor.client()
    client.send("s3resume")
    monitor.done(monitor.asked(Op.S_STATE), RUNNING, "3")
    emulator.tell("WAKEUP")  # so QEMU 7.2 does
    emulator.agree("system_wakeup")
    asked = monitor.asked(Op.WAKE)
    emulator.agree("query-status")
    assert monitor.state()["busy"]["command"] == "s3resume"
    monitor.done(asked, RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"
    assert monitor.nothing_asked()
    time.sleep(1.1)  # nor later
    assert monitor.nothing_asked()


def test_one_that_is_awake_before_its_device_model_has_answered_all(monitor, emulator):
    client = monitor.client()
    client.send("s3resume")
    monitor.done(monitor.asked(Op.S_STATE), RUNNING, "3")
    emulator.tell("WAKEUP")
    emulator.agree("system_wakeup")
    monitor.done(monitor.asked(Op.WAKE), RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"
    emulator.agree("query-status")
    assert monitor.state()["busy"] is None
    assert monitor.nothing_asked()


def test_one_whose_device_model_knows_of_no_sleep_is_woken(monitor, emulator):
    client = monitor.client()
    client.send("s3resume")
    monitor.done(monitor.asked(Op.S_STATE), RUNNING, "3")
    emulator.refuse("system_wakeup", "guest is not in suspended state")
    emulator.agree("query-status")
    monitor.done(monitor.asked(Op.WAKE), RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"


def test_a_guest_that_is_awake_is_not_woken(monitor, emulator):
    client = monitor.client()
    client.send("s3resume")
    monitor.done(monitor.asked(Op.S_STATE), RUNNING, "0")
    assert client.refusal()[:2] == (ExitCode.WRONG_STATE, "s3resume: the guest does not sleep")
    assert monitor.state()["busy"] is None
    assert monitor.nothing_asked()


def test_a_device_model_that_is_not_there_wakes_nobody(monitor):
    client = monitor.running(fields=HVM).client()
    client.send("s3resume")
    monitor.done(monitor.asked(Op.S_STATE), RUNNING, "3")
    code, message, _ = client.refusal()
    assert code is ExitCode.WRONG_STATE
    assert message.startswith("s3resume: no answer from the device model")
    assert monitor.state()["busy"] is None


def test_a_device_model_that_ends_over_it(monitor, emulator):
    client = monitor.client()
    client.send("s3resume")
    monitor.done(monitor.asked(Op.S_STATE), RUNNING, "3")
    emulator.hear("system_wakeup")
    emulator.reader.close()
    emulator.socket.close()
    code, message, _ = client.refusal()
    assert (code, "the device model does not answer" in message) == (ExitCode.WRONG_STATE, True)
    assert monitor.state()["busy"] is None


# What is refused at once


@pytest.mark.parametrize("words", [("s3suspend", {}), ("s3resume", {}), ("trigger", {"params": "s3resume"})])
def test_a_pv_guest_does_not_sleep(monitor, words):
    code, message, _ = monitor.running().client().refused(words[0], **words[1])
    assert (code, message.endswith(": a PV guest has no ACPI")) == (ExitCode.WRONG_STATE, True)
    assert monitor.nothing_asked()


@pytest.mark.parametrize("name", ["s3suspend", "s3resume"])
def test_only_a_running_vm_is_asked_and_only_for_a_while(monitor, emulator, name):
    client = monitor.client()
    assert client.refused("s3suspend", timeout="0")[0] is ExitCode.USAGE
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()
    assert client.refused(name)[:2] == (ExitCode.WRONG_STATE, f"{name}: the VM is paused")
    assert monitor.nothing_asked()


def test_one_command_at_a_time(monitor, emulator):
    client, other = monitor.client(), monitor.client()
    client.send("s3suspend")
    monitor.done(monitor.asked(Op.ASK_SLEEP), RUNNING)
    for name in ("s3suspend", "s3resume", "pause", "quit"):
        assert other.refused(name)[0] is ExitCode.BUSY
    emulator.tell("SUSPEND")
    monitor.done(monitor.asked(Op.FALL_ASLEEP), RUNNING)
    assert client.reply()["result"]["text"] == ""
