# SPDX-License-Identifier: GPL-2.0-or-later
"""The real supervisor process and its commands about save images; the broker is played by the test. Needs root."""

import os

import pytest
from supervisor_bench import FAULT, PAUSED, POLICY, RUNNING, Monitor, ended

from xenvm.boundary.images import Progress, Restore, Save
from xenvm.boundary.messages import Op
from xenvm.errors import ExitCode

SUSPENDED = ended(2)


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log")
    yield made
    made.close()


@pytest.fixture
def file(tmp_path):
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def asked(monitor, kind, file):
    """Return the next request, which has brought this file."""
    message, descriptors = monitor.asked_change(kind)
    (descriptor,) = descriptors
    assert os.path.sameopenfile(descriptor, file)
    os.close(descriptor)
    return message


def suspend(monitor, file, **params):
    client = monitor.client()
    client.hand([file], "suspend", file="/there", **params)
    return client, asked(monitor, Save, file)


def saved(monitor, file):
    """A suspend whose image is whole."""
    monitor.running()
    client, request = suspend(monitor, file)
    monitor.done(request, SUSPENDED, "image_bytes=4096")
    assert client.reply()["result"]["data"] == {"image_bytes": 4096}
    assert monitor.state()["state"] == "suspending"
    assert monitor.nothing_asked()
    return client


def test_suspend_ends_the_domain_once_the_client_has_named_the_image(monitor, file):
    client = saved(monitor, file)
    client.send("commit")
    monitor.done(monitor.asked(Op.DESTROY))
    data = client.reply()["result"]["data"]
    assert (data["state"], data["running"], data["domid"], data["image_bytes"]) == ("suspended", False, None, 4096)
    assert client.call("status")["text"] == "suspended"
    assert client.refused("suspend", file="/there")[0] is ExitCode.WRONG_STATE


def test_status_answers_while_an_image_is_written(monitor, file):
    monitor.running()
    client, request = suspend(monitor, file, timeout="7")
    assert (request.go_on, request.timeout_s) == (False, 7)
    watching = monitor.client()
    watching.call("events")
    monitor.broker.send(Progress(request.sequence, "writing the image", 2048, 4096))
    params = watching.message()["params"]
    assert (params["step"], params["done_kib"], params["total_kib"]) == ("writing the image", 2048, 4096)
    state = monitor.state()
    assert (state["state"], state["step"], state["busy"]["command"]) == ("suspending", "writing the image", "suspend")
    assert state["progress"] == {"step": "writing the image", "done_kib": 2048, "total_kib": 4096}
    monitor.failed(request, domain=RUNNING)
    assert client.refusal()[:2] == (ExitCode.FAILED, FAULT.message)
    assert monitor.state()["state"] == "running"
    monitor.done(monitor.asked(Op.QUERY), RUNNING)


def test_who_waits_for_an_image_hears_every_ten_seconds_that_it_is_worked_on(monitor, file):
    """Its wait for the reply begins anew with each: synchronising a large image says nothing for minutes."""
    monitor.running()
    watcher = monitor.client()
    watcher.call("events")
    client, request = suspend(monitor, file)
    monitor.broker.send(Progress(request.sequence, "finishing the image", 0, 0))
    steps = []
    while steps.count("finishing the image") < 2:
        event = watcher.message()["params"]
        steps += [event["step"]] if event["event"] == "progress" else []
    monitor.done(request, SUSPENDED, "image_bytes=4096")
    client.reply()


def test_who_waits_for_a_state_hears_of_what_an_image_leads_to(monitor, file):
    monitor.running()
    waiting = monitor.client()
    for command, state, message in (("suspend", "suspending", Save), ("restore", "restoring", Restore)):
        waiting.send("wait", state=state)
        assert waiting.silent()
        client = monitor.client()
        client.hand([file], command, file="/there")
        request = asked(monitor, message, file)
        assert waiting.reply()["result"]["data"] == {"state": state}
        if command == "suspend":
            monitor.done(request, SUSPENDED, "image_bytes=4096")
            client.reply()
            client.send("commit")
            monitor.done(monitor.asked(Op.DESTROY))
            client.reply()


def test_a_second_save_is_told_who_is_busy(monitor, file):
    monitor.running()
    suspend(monitor, file)
    for command in ("suspend", "checkpoint", "restore", "pause"):
        params = {} if command == "pause" else {"file": "/there"}
        code, text, _ = monitor.client().refused(command, **params)
        assert code is ExitCode.BUSY
        assert "suspend" in text


@pytest.mark.parametrize("how", ["cancel", "leave", "another's commit"])
def test_an_image_that_nobody_takes_over_lets_the_guest_run_on(monitor, file, how):
    client = saved(monitor, file)
    if how == "another's commit":
        assert monitor.client().refused("commit")[0] is ExitCode.WRONG_STATE
        assert monitor.nothing_asked()
    if how == "cancel":
        client.send("cancel")
    else:
        client.socket.close()
    monitor.done(monitor.asked(Op.RESUME), RUNNING)
    if how == "cancel":
        assert client.reply()["result"]["data"]["state"] == "running"
        assert client.refused("commit")[0] is ExitCode.WRONG_STATE
    assert monitor.state()["state"] == "running"


def test_no_look_is_taken_of_a_guest_that_waits_for_its_end(monitor, file):
    """That it is suspended is known; and the builder that waits ready is for its end."""
    client = saved(monitor, file)
    monitor.watch()
    assert monitor.nothing_asked()
    assert monitor.state()["state"] == "suspending"
    client.send("commit")
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "suspended"
    assert monitor.nothing_asked()


def test_a_look_that_was_due_is_taken_when_the_guest_has_run_on(monitor, file):
    client = saved(monitor, file)
    monitor.watch()
    assert monitor.nothing_asked()
    client.send("cancel")
    monitor.done(monitor.asked(Op.RESUME), RUNNING)
    assert client.reply()["result"]["data"]["state"] == "running"
    monitor.done(monitor.asked(Op.QUERY))
    assert monitor.asked(Op.DESTROY)


def test_a_client_that_goes_away_has_its_save_cancelled(monitor, file):
    monitor.running()
    client, request = suspend(monitor, file)
    client.socket.close()
    monitor.asked(Op.CANCEL)
    monitor.failed(request, domain=RUNNING)
    monitor.done(monitor.asked(Op.QUERY), RUNNING)
    assert monitor.state()["state"] == "running"


def test_cancel_answers_when_all_is_over(monitor, file):
    monitor.running()
    client, request = suspend(monitor, file)
    other = monitor.client()
    other.send("cancel")
    monitor.done(monitor.asked(Op.CANCEL), RUNNING)
    assert other.silent()
    monitor.failed(request, domain=RUNNING)
    assert client.refusal()[1] == FAULT.message
    assert other.reply()["result"]["data"]["state"] == "running"
    assert other.refused("cancel")[:2] == (ExitCode.WRONG_STATE, "cancel: no suspend, checkpoint or restore runs")


def test_destroy_overtakes_a_save_and_who_would_cancel_it(monitor, file):
    monitor.running()
    client, _ = suspend(monitor, file)
    cancelling, other = monitor.client(), monitor.client()
    cancelling.send("cancel")
    monitor.asked(Op.CANCEL)
    other.send("destroy")
    ask = monitor.asked(Op.DESTROY)
    assert "ended by destroy" in client.refusal()[1]
    assert cancelling.refusal()[:2] == (ExitCode.FAILED, "cancel: ended by destroy")
    monitor.done(ask)
    assert other.reply()["result"]["data"]["state"] == "shutdown"


def test_destroy_overtakes_a_suspend_that_waits_for_its_client(monitor, file):
    client = saved(monitor, file)
    other = monitor.client()
    other.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    assert other.reply()["result"]["data"]["state"] == "shutdown"
    assert client.refused("commit")[0] is ExitCode.WRONG_STATE
    client.socket.close()
    assert monitor.state()["state"] == "shutdown"


@pytest.mark.parametrize("command", ["suspend", "checkpoint"])
def test_live_is_refused_before_anything_is_touched(monitor, file, command):
    monitor.running()
    client = monitor.client()
    client.hand([file], command, file="/there", live="true")
    code, text, hint = client.refusal()
    assert code is ExitCode.WRONG_STATE
    assert "shadow paging" in text
    assert "without live=true" in hint
    assert monitor.nothing_asked()


@pytest.mark.parametrize("command", ["suspend", "checkpoint", "restore"])
def test_without_a_descriptor_there_is_no_image(monitor, command):
    monitor.running()
    client = monitor.client()
    if command == "restore":
        client.send("destroy")
        monitor.done(monitor.asked(Op.DESTROY))
        client.reply()
    code, text, hint = client.refused(command, file="/there")
    assert code is ExitCode.PERMISSION_REFUSED
    assert text.startswith(f"{command}: '/there' was not handed over")
    assert "image-directories" in hint
    assert monitor.nothing_asked()


def test_an_image_in_a_directory_that_is_open_to_clients_is_asked_for_by_name(monitor):
    monitor.running(image_directories=("/srv/a", "/srv/images"))
    client = monitor.client()
    for path in ("/srv/images/sub/a", "/srv/images", "/srv/images/", "/srv/a/..", "/etc/shadow", "a.img"):
        assert client.refused("suspend", file=path)[0] in (ExitCode.PERMISSION_REFUSED, ExitCode.USAGE)
    assert monitor.nothing_asked()
    client.send("checkpoint", file="/srv/images/a.img")
    request, descriptors = monitor.asked_change(Save)
    assert (request.directory, request.file, request.go_on, descriptors) == (1, "a.img", True, [])
    monitor.done(request, RUNNING, "image_bytes=4096 image_compression=zstd")
    data = client.reply()["result"]["data"]
    assert (data["image_bytes"], data["image_compression"]) == (4096, "zstd")
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    client.reply()
    assert "delete=true" in client.refused("restore", file="/srv/images/a.img", delete="true")[1]
    client.send("restore", file="/srv/images/a.img", foreign="true")
    request, descriptors = monitor.asked_change(Restore)
    assert (request.directory, request.file, request.foreign, descriptors) == (1, "a.img", True, [])


def test_a_paused_guest_cannot_suspend(monitor, file):
    monitor.running(PAUSED)
    client = monitor.client()
    client.hand([file], "suspend", file="/there")
    assert client.refusal()[:2] == (ExitCode.WRONG_STATE, "suspend is not possible: the VM is paused")


@pytest.mark.parametrize("command", ["suspend", "checkpoint"])
def test_why_a_save_has_failed_is_told_until_the_next_command(monitor, file, command):
    """To whoever asks later, and whoever listens: the guest runs on, and its state alone says nothing of it."""
    client, watching = monitor.running().client(), monitor.client()
    watching.call("events")
    client.hand([file], command, file="/there")
    monitor.failed(asked(monitor, Save, file), FAULT, RUNNING)
    assert client.refusal()[1] == FAULT.message
    status = monitor.client().call("status")
    assert (status["text"], status["data"]["state"]) == (f"running (last failure: {FAULT.message})", "running")
    assert (status["data"]["reason"], status["data"]["last_fault"]) == ("", FAULT.message)
    events = [watching.message()["params"] for _ in range(2)]
    assert [(event["state"], event["last_fault"]) for event in events] == [
        *(("suspending", ""), ("running", FAULT.message)),
    ]
    monitor.done(monitor.asked(Op.QUERY), RUNNING)  # what the guest did meanwhile
    assert monitor.state()["last_fault"] == FAULT.message
    client.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert client.reply()["result"]["data"]["last_fault"] == ""


def test_checkpoint(monitor, file):
    monitor.running()
    client = monitor.client()
    client.hand([file], "checkpoint", file="/there")
    request = asked(monitor, Save, file)
    assert request.go_on
    monitor.done(request, RUNNING, "image_bytes=8192")
    data = client.reply()["result"]["data"]
    assert (data["state"], data["image_bytes"]) == ("running", 8192)


@pytest.mark.parametrize(("paused", "state"), [("false", "running"), ("true", "paused")])
def test_restore(monitor, file, paused, state):
    monitor.running()
    client = monitor.client()
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    client.reply()
    client.hand([file], "restore", file="/there", paused=paused)
    request = asked(monitor, Restore, file)
    assert request.paused is (paused == "true")
    assert monitor.state()["state"] == "restoring"
    monitor.done(request, PAUSED if request.paused else RUNNING)
    assert client.reply()["result"]["data"]["state"] == state


def test_a_restore_that_fails(monitor, file):
    monitor.running()
    client = monitor.client()
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    client.reply()
    client.hand([file], "restore", file="/there")
    monitor.failed(asked(monitor, Restore, file))
    assert client.refusal()[1] == FAULT.message
    state = monitor.state()
    assert (state["state"], state["reason"]) == ("shutdown", FAULT.message)


def test_a_start_from_an_image(monitor):
    monitor.init(policy=POLICY.but(startup="restore"))
    assert monitor.state()["state"] == "restoring"
    monitor.done(0, RUNNING)
    assert monitor.asked(Op.STARTED).code == 0
    assert monitor.state()["state"] == "running"


def test_a_guest_found_suspended_at_the_start_is_resumed_and_never_started_anew(monitor):
    monitor.init()
    monitor.done(0, SUSPENDED)
    monitor.done(monitor.asked(Op.RESUME), RUNNING)
    assert monitor.asked(Op.STARTED).code == 0
    client = monitor.client()
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"
    assert monitor.nothing_asked()
