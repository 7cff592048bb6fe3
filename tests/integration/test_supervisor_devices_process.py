# SPDX-License-Identifier: GPL-2.0-or-later
"""The real supervisor process and its commands about devices; the broker is played by the test. Needs root."""

import os
import socket
import stat
import time

import pytest
from supervisor_bench import FAULT, PAUSED, RUNNING, WAIT_S, Monitor, ended

from xenvm.boundary.devices import DeviceState, Kind
from xenvm.boundary.messages import NO_DOMAIN, Op, Plug, Rebridge, Unplug
from xenvm.errors import ExitCode

DISK = DeviceState(Kind.VBD, 51712, "xvda", 4, 4, False, "phy:/dev/vg/a", "", "")
CARD = DeviceState(Kind.VIF, 0, "0", 4, 4, False, "00:16:3e:00:00:01", "br0", "")
CHANGING = {
    "disk-add": {"device": "xvdb"},
    "disk-del": {"device": "xvda"},
    "cd-insert": {"device": "xvdb"},
    "cd-eject": {"device": "xvdb"},
    "nic-add": {},
    "nic-del": {"id": "0"},
    "nic-network-switch": {"id": "0", "bridge": "br1"},
}


@pytest.fixture
def monitor(users, tmp_path):
    made = Monitor(users, tmp_path / "log")
    made.probe = None
    yield made
    made.close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"the very file")
    return path


@pytest.fixture
def disk(image):
    descriptor = os.open(image, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def held(monitor, expected=None):
    """How many descriptors the supervisor has; with an expected number, once it has dealt with all that was sent.

    It reads one message of each client a turn, so that it may still be reading what came before.
    """
    monitor.probe = monitor.probe or monitor.client()
    end = time.monotonic() + WAIT_S
    while True:
        for _ in range(2):
            monitor.probe.call("domid")
        count = len(os.listdir(f"/proc/{monitor.pid}/fd"))
        if expected in (None, count) or time.monotonic() > end:
            return count


def same(descriptor, path):
    """Tell whether this is the open file; it is closed."""
    found, wanted = os.fstat(descriptor), os.stat(path)
    os.close(descriptor)
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


# Looking


def test_lists(monitor):
    monitor.running()
    client = monitor.client()
    for command, name in (("disk-list", "xvda"), ("nic-list", "0")):
        client.send(command)
        monitor.done(monitor.asked(Op.DEVICES), RUNNING, devices=(DISK, CARD))
        result = client.reply()["result"]
        assert result["text"].startswith(f"{name} ")
        assert [row["name"] for row in result["data"]] == [name]


def test_an_old_client_gets_the_text(monitor):
    monitor.running()
    client = monitor.client(modern=False)
    client.send("nic-list")
    monitor.done(monitor.asked(Op.DEVICES), RUNNING, devices=(CARD,))
    assert client.bare()["result"].startswith("0 ")


@pytest.mark.parametrize("command", ["disk-list", "nic-list", *CHANGING])
def test_a_vm_that_is_off_has_no_devices_to_ask_about(monitor, command):
    monitor.running()
    client = monitor.client()
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    assert client.reply()["result"]["data"]["state"] == "shutdown"
    code, text, _ = client.refused(command, **CHANGING.get(command, {}))
    assert (code, text) == (ExitCode.WRONG_STATE, f"{command}: the VM is shutdown")
    assert monitor.nothing_asked()


@pytest.mark.parametrize(("params", "op"), [({}, Op.DEVICES), ({"clean": "true"}, Op.FIND)], ids=["list", "clean"])
def test_a_vm_that_is_off_has_what_an_earlier_failure_left(monitor, params, op):
    monitor.running()
    client = monitor.client()
    client.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    client.reply()
    client.send("doctor", **params)
    monitor.done(monitor.asked(op), NO_DOMAIN, "image server 4711: no disk uses it", devices=(DISK,))
    left = ["vbd xvda: left of an earlier domain; doctor clean=true removes it", "image server 4711: no disk uses it"]
    assert client.reply()["result"]["data"] == left
    assert monitor.state()["state"] == "shutdown"
    client.send("start")
    monitor.asked(Op.BUILD)


def test_a_paused_guest_has_its_devices(monitor):
    monitor.running(PAUSED)
    client = monitor.client()
    client.send("disk-list")
    monitor.done(monitor.asked(Op.DEVICES), RUNNING, devices=(DISK,))
    assert client.reply()["result"]["data"][0]["name"] == "xvda"
    assert monitor.state()["state"] == "paused"


# Changing


def test_a_disk_is_passed_on_with_its_descriptor(monitor, disk, image):
    monitor.running()
    client = monitor.client()
    before = held(monitor)
    client.hand([disk], "disk-add", device="xvdb", path=str(image), mode="r")
    plug, (descriptor,) = monitor.asked_change(Plug)
    assert same(descriptor, image)
    (grant,) = plug.disks
    assert (grant.device, grant.type, grant.path, grant.read_only, grant.cipher) == (
        51728,
        "file",
        str(image),
        True,
        "",
    )
    monitor.done(plug, RUNNING, "connected", devices=(DISK, CARD))
    result = client.reply()["result"]
    assert (result["text"], [row["name"] for row in result["data"]]) == ("connected", ["xvda"])
    assert held(monitor, before) == before


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("disk-del", Unplug),
        ("cd-eject", Unplug),
        ("nic-add", Plug),
        ("nic-del", Unplug),
        ("nic-network-switch", Rebridge),
    ],
)
def test_what_needs_no_descriptor(monitor, command, kind):
    monitor.running()
    client = monitor.client()
    client.send(command, **CHANGING[command])
    message, descriptors = monitor.asked_change(kind)
    assert descriptors == []
    monitor.done(message, RUNNING, "", devices=(DISK,))
    assert "result" in client.reply()


def test_a_card_without_an_id_gets_the_first_that_the_guest_has_not(monitor):
    """From what was built on: nobody has listed the cards yet."""
    monitor.init()
    monitor.done(0, RUNNING, devices=(DISK, CARD, CARD.but(device=1)))
    assert monitor.asked(Op.STARTED).code == 0
    client = monitor.client()
    client.send("nic-add")
    plug, _ = monitor.asked_change(Plug)
    assert plug.nics[0].id == 2
    monitor.done(plug, RUNNING, "", devices=(CARD, CARD.but(device=2)))
    client.reply()
    client.send("nic-add")
    plug, _ = monitor.asked_change(Plug)
    assert plug.nics[0].id == 1
    monitor.failed(plug)
    client.refusal()


def test_a_refusal_of_the_broker_reaches_the_client(monitor, disk):
    monitor.running()
    client = monitor.client()
    client.hand([disk], "disk-add", device="xvdb")
    plug, descriptors = monitor.asked_change(Plug)
    os.close(descriptors[0])
    monitor.failed(plug, FAULT.but(code=9, message="disk xvdb: in use", hint="share=true"), RUNNING)
    assert client.refusal() == (ExitCode.BUSY, "disk xvdb: in use", "share=true")
    assert monitor.state()["state"] == "running"


def test_others_hear_of_a_change_and_not_of_a_look(monitor):
    monitor.running()
    listener, client = monitor.client(), monitor.client()
    listener.call("events")
    client.send("disk-list")
    monitor.done(monitor.asked(Op.DEVICES), RUNNING, devices=(DISK,))
    client.reply()
    client.send("nic-del", id="0")
    unplug, _ = monitor.asked_change(Unplug)
    monitor.done(unplug, RUNNING, devices=(DISK,))
    client.reply()
    heard = listener.message()["params"]
    assert (heard["event"], heard["command"], heard["devices"]) == ("device", "nic-del", [])


# One after the other


@pytest.mark.parametrize("command", ["disk-list", "disk-del", "disk-add"])
def test_a_command_waits_for_what_the_broker_is_at(monitor, disk, image, command):
    """A look at the domain is under way because something ended on this host: short, and no reason to refuse."""
    monitor.running()
    client = monitor.client()
    monitor.watch()
    query = monitor.asked(Op.QUERY)
    client.hand([disk] * (command == "disk-add"), command, **CHANGING.get(command, {}))
    assert client.silent()
    assert monitor.nothing_asked()
    assert monitor.client().call("status")["data"]["state"] == "running"
    monitor.done(query, RUNNING)
    message, descriptors = monitor.broker.receive(deadline_s=WAIT_S)
    assert all(same(descriptor, image) for descriptor in descriptors)
    assert len(descriptors) == (command == "disk-add")
    monitor.done(message, RUNNING, "done", devices=(DISK,))
    assert "result" in client.reply()


def test_commands_wait_for_each_other_in_their_order(monitor):
    monitor.running()
    clients = [monitor.client() for _ in range(5)]
    for number, client in enumerate(clients):
        client.send("nic-del", id=str(number))
        client.silent()
    for number, client in enumerate(clients):
        unplug, _ = monitor.asked_change(Unplug)
        assert unplug.device == number
        assert monitor.nothing_asked()
        monitor.done(unplug, RUNNING)
        assert "result" in client.reply()


def test_a_command_that_changes_the_vm_goes_before_those_that_wait(monitor):
    monitor.running()
    first, second, third = (monitor.client() for _ in range(3))
    first.send("disk-list")
    look = monitor.asked(Op.DEVICES)
    second.send("disk-list")
    second.silent()
    third.send("pause")
    third.silent()
    monitor.done(look, RUNNING)
    first.reply()
    pause = monitor.asked(Op.PAUSE)
    assert monitor.nothing_asked()
    monitor.done(pause, PAUSED)
    assert third.reply()["result"]["data"]["state"] == "paused"
    monitor.done(monitor.asked(Op.DEVICES), RUNNING)
    assert "result" in second.reply()


def test_a_command_is_refused_while_the_vm_changes(monitor):
    monitor.running()
    client, other = monitor.client(), monitor.client()
    client.send("shutdown")
    poweroff = monitor.asked(Op.ASK_POWEROFF)
    code, text, _ = other.refused("disk-del", device="xvda")
    assert (code, text) == (ExitCode.WRONG_STATE, "disk-del: the VM is shutdowning")
    monitor.done(poweroff, RUNNING)


def test_a_wrong_command_that_waited_is_answered(monitor):
    """Its parameters are looked at when its turn has come; it still gets its answer, and the next one its turn."""
    monitor.running()
    wrong, right = monitor.client(), monitor.client()
    monitor.watch()
    query = monitor.asked(Op.QUERY)
    wrong.send("disk-del", device="vda")
    wrong.silent()
    right.send("disk-list")
    right.silent()
    monitor.done(query, RUNNING)
    assert wrong.refusal()[0] is ExitCode.USAGE
    monitor.done(monitor.asked(Op.DEVICES), RUNNING)
    assert "result" in right.reply()


def test_destroy_overtakes(monitor):
    monitor.running()
    client, waiting, other = (monitor.client() for _ in range(3))
    client.send("disk-del", device="xvda")
    unplug, _ = monitor.asked_change(Unplug)
    waiting.send("disk-list")
    waiting.silent()
    other.send("destroy")
    destroy = monitor.asked(Op.DESTROY)
    monitor.failed(unplug, FAULT.but(message="unplug: ended by destroy"), RUNNING)
    assert client.refusal()[1] == "unplug: ended by destroy"
    monitor.done(destroy)
    assert other.reply()["result"]["data"]["state"] == "shutdown"
    assert waiting.refusal()[:2] == (ExitCode.WRONG_STATE, "disk-list: the VM is shutdown")


def test_a_guest_that_ends_meanwhile_is_seen_afterwards(monitor):
    monitor.running()
    client = monitor.client()
    client.send("disk-del", device="xvda")
    unplug, _ = monitor.asked_change(Unplug)
    monitor.watch()
    assert monitor.nothing_asked()
    monitor.done(unplug, RUNNING)
    client.reply()
    query = monitor.asked(Op.QUERY)
    monitor.done(query, ended(0))
    monitor.done(monitor.asked(Op.DESTROY))
    assert monitor.state()["state"] == "shutdown"


# While a device is taken away, which may take as long as its guest likes

HELD = FAULT.but(code=7, message="vbd 51712: the guest did not let go within 10 s", hint="unmount it")


def taking_away(monitor, **params):
    client = monitor.client()
    client.send("disk-del", device="xvda", **params)
    unplug, _ = monitor.asked_change(Unplug)
    return client, unplug


@pytest.mark.parametrize("command", ["disk-del", "disk-add", "nic-network-switch", "doctor"])
def test_nothing_else_is_changed_while_a_device_is(monitor, disk, command):
    """It would wait unseen, and be done when nobody counts on it any more."""
    monitor.running()
    client, other = monitor.client(), monitor.client()
    params = {"clean": "true"} if command == "doctor" else CHANGING[command]
    client.hand([disk] * (command == "disk-add"), command, **params)
    message, descriptors = monitor.broker.receive(deadline_s=WAIT_S)
    for descriptor in descriptors:
        os.close(descriptor)
    for refused in ("shutdown", "restart", "pause", "quit", "suspend", "checkpoint"):
        code, text, hint = other.refused(refused)
        assert (code, hint) == (ExitCode.BUSY, "wait for it, or destroy")
        assert text.startswith(f"{refused}: busy with {command} for ")
    assert monitor.state()["busy"]["command"] == command
    assert monitor.nothing_asked()
    monitor.done(message, RUNNING, devices=(DISK,))
    assert "result" in client.reply()
    assert monitor.state()["busy"] is None
    other.send("pause")
    monitor.done(monitor.asked(Op.PAUSE), PAUSED)
    assert other.reply()["result"]["data"]["state"] == "paused"


def test_a_guest_is_asked_for_a_device_piece_by_piece_and_forced_at_last(monitor):
    monitor.running()
    client, unplug = taking_away(monitor, timeout="12", force="true")
    assert (unplug.timeout_s, unplug.force) == (10, False)
    time.sleep(1.1)
    monitor.failed(unplug, HELD, RUNNING)
    unplug, _ = monitor.asked_change(Unplug)
    assert (unplug.device, unplug.timeout_s, unplug.force) == (51712, 11, True)
    monitor.failed(unplug, HELD, RUNNING)
    code, text, hint = client.refusal()
    assert (code, text, hint) == (ExitCode.TIMED_OUT, f"{HELD.message} (of 12 s in all)", "unmount it")
    assert monitor.nothing_asked()


def test_a_short_time_is_one_piece(monitor):
    monitor.running()
    client, unplug = taking_away(monitor, timeout="2", force="true")
    assert (unplug.timeout_s, unplug.force) == (2, True)
    monitor.failed(unplug, HELD, RUNNING)
    assert client.refusal() == (ExitCode.TIMED_OUT, HELD.message, HELD.hint)


def test_a_guest_that_reboots_meanwhile_is_not_waited_for(monitor):
    monitor.running()
    client, unplug = taking_away(monitor, timeout="86400")
    monitor.watch()
    assert monitor.nothing_asked()  # the broker does one thing after the other
    monitor.failed(unplug, HELD, RUNNING)
    monitor.done(monitor.asked(Op.QUERY), ended(1))
    rebuild = monitor.asked(Op.REBUILD)
    assert client.refusal()[:2] == (ExitCode.WRONG_STATE, "disk-del: the VM is rebooting")
    monitor.done(rebuild, RUNNING.but(domid=8))
    status = monitor.state()
    assert (status["state"], status["domid"], status["busy"]) == ("running", 8, None)
    assert monitor.nothing_asked()


@pytest.mark.parametrize("stays", [True, False])
def test_a_guest_that_lives_is_asked_on_by_whoever_asked_first(monitor, stays):
    """Also when that has gone, and before whatever has come since."""
    monitor.running()
    client, unplug = taking_away(monitor, timeout="60")
    waiting = monitor.client()
    waiting.send("disk-list")
    waiting.silent()
    monitor.watch()
    monitor.client().call("status")
    monitor.failed(unplug, HELD, RUNNING)
    query = monitor.asked(Op.QUERY)
    assert monitor.client().refused("pause")[0] is ExitCode.BUSY
    if not stays:
        client.socket.close()
    monitor.done(query, RUNNING)
    unplug, _ = monitor.asked_change(Unplug)
    monitor.done(unplug, RUNNING, devices=(CARD,))
    if stays:
        assert client.reply()["result"] == {"text": "", "data": []}
    monitor.done(monitor.asked(Op.DEVICES), RUNNING, devices=(CARD,))
    assert waiting.reply()["result"]["data"] == []


def test_a_device_that_is_let_go_between_two_pieces_has_gone(monitor):
    monitor.running()
    client, unplug = taking_away(monitor, timeout="60")
    monitor.failed(unplug, HELD, RUNNING)
    unplug, _ = monitor.asked_change(Unplug)
    monitor.failed(unplug, FAULT.but(code=5, message="the guest has no vbd 51712"), RUNNING)
    monitor.done(monitor.asked(Op.DEVICES), RUNNING, "udevd does not run", devices=(CARD,))
    assert client.reply()["result"] == {"text": "", "data": []}


def test_one_that_was_never_there_is_not_asked_for_twice(monitor):
    monitor.running()
    client, unplug = taking_away(monitor, timeout="60")
    monitor.failed(unplug, FAULT.but(code=5, message="the guest has no vbd 51712"), RUNNING)
    assert client.refusal()[:2] == (ExitCode.WRONG_STATE, "the guest has no vbd 51712")
    assert monitor.nothing_asked()


def test_destroy_between_two_pieces(monitor):
    monitor.running()
    client, unplug = taking_away(monitor, timeout="60")
    monitor.watch()
    monitor.client().call("status")
    monitor.failed(unplug, HELD, RUNNING)
    monitor.asked(Op.QUERY)
    other = monitor.client()
    other.send("destroy")
    monitor.done(monitor.asked(Op.DESTROY))
    assert other.reply()["result"]["data"]["state"] == "shutdown"
    assert client.refusal()[:2] == (ExitCode.WRONG_STATE, "disk-del: the VM is shutdown")
    assert monitor.nothing_asked()


# Clients that go


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("command", ["disk-list", "disk-del", "nic-add"])
def test_the_answer_to_a_client_that_has_gone_changes_nothing(monitor, command, fails):
    """What the broker knows of the domain beside an answer about devices is no look at it."""
    monitor.running(PAUSED)
    client = monitor.client()
    client.send(command, **CHANGING.get(command, {}))
    message, _ = monitor.broker.receive(deadline_s=WAIT_S)
    client.socket.close()
    monitor.client().call("domid")
    if fails:
        monitor.failed(message, FAULT, RUNNING)
    else:
        monitor.done(message, RUNNING, "", devices=(DISK, CARD))
    status = monitor.state()
    assert (status["state"], status["reason"]) == ("paused", "")
    other = monitor.client()
    other.send("nic-add")
    assert monitor.asked_change(Plug)[0].nics[0].id == (0 if fails else 1)


def test_a_client_that_goes_while_it_waits_is_forgotten_with_its_disk(monitor, disk):
    monitor.running()
    client = monitor.client()
    before = held(monitor)
    monitor.watch()
    query = monitor.asked(Op.QUERY)
    client.hand([disk], "disk-add", device="xvdb")
    client.silent()
    assert held(monitor, before + 1) == before + 1
    client.socket.close()
    assert held(monitor, before - 1) == before - 1
    monitor.done(query, RUNNING)
    assert monitor.nothing_asked()


# Descriptors


def test_a_disk_without_its_descriptor_is_refused(monitor):
    monitor.running(directories=("/srv/images",))
    for command in ("disk-add", "cd-insert"):
        for path in ("/etc/shadow", "/srv/images/sub/a"):
            code, text, hint = monitor.client().refused(command, device="xvdb", path=path)
            assert (code, text.partition(": ")[0]) == (ExitCode.PERMISSION_REFUSED, command)
            assert f"{path!r} was not handed over" in text
            assert "disk-directories" in hint
    assert monitor.nothing_asked()


def test_a_disk_of_a_directory_that_is_open_to_all_is_asked_for_by_name(monitor):
    monitor.running(directories=("/srv/discs", "/srv/images"))
    monitor.client().send("disk-add", device="xvdb", path="/srv/images/a.img")
    plug, descriptors = monitor.asked_change(Plug)
    assert (plug.directory, plug.file, descriptors) == (1, "a.img", [])


@pytest.mark.parametrize(
    ("command", "params"),
    [
        ("disk-add", {"device": "vda"}),
        ("disk-add", {"device": "xvdb", "colour": "red"}),
        ("disk-add", {"device": "xvdb", "path": "a\0b"}),
        ("disk-del", {}),
        ("status", {}),
        ("nothing", {}),
        ("quit", {"x": "y"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_descriptor_that_is_not_used_is_closed(monitor, disk, command, params):
    """Also not kept for a later request: that one would get a disk that it did not ask about."""
    monitor.running()
    client = monitor.client()
    before = held(monitor)
    client.hand([disk], command, **params)
    client.reply()
    assert held(monitor, before) == before
    assert client.refused("disk-add", device="xvdb")[0] is ExitCode.PERMISSION_REFUSED


def test_several_descriptors_are_not_kept(monitor, disk, image):
    """The kernel drops those for which there is no room; the request has one."""
    monitor.running()
    client = monitor.client()
    before = held(monitor)
    client.hand([disk] * 50, "disk-add", device="xvdb")
    plug, descriptors = monitor.asked_change(Plug)
    assert [same(descriptor, image) for descriptor in descriptors] == [True]
    monitor.done(plug, RUNNING)
    client.reply()
    assert held(monitor, before) == before


def test_a_descriptor_that_comes_amid_a_request_is_not_taken_for_its_own(monitor, disk, image):
    monitor.running()
    client = monitor.client()
    monitor.watch()
    query = monitor.asked(Op.QUERY)
    client.hand([disk], "disk-add", device="xvdb")
    client.silent()
    null = os.open("/dev/null", os.O_RDWR)
    client.hand([null], "disk-add", device="xvdc")
    os.close(null)
    client.silent()
    monitor.done(query, RUNNING)
    plug, (descriptor,) = monitor.asked_change(Plug)
    assert (plug.disks[0].name, same(descriptor, image)) == ("xvdb", True)
    monitor.done(plug, RUNNING)
    assert "result" in client.message()
    assert "error" in client.message()  # xvdc came without one


def test_descriptors_without_end_are_not_kept(monitor, disk):
    monitor.running()
    clients = [monitor.client() for _ in range(20)]
    before = held(monitor)
    for client in clients:
        for _ in range(20):
            client.hand([disk], "status")
            client.reply()
    assert held(monitor, before) == before


@pytest.mark.parametrize("group", [None, "xenvm-read"])
def test_who_may_do_nothing_cannot_leave_descriptors(monitor, disk, group):
    """Each would stay until the end of the connection: bytes of a request that never ends, a descriptor with each."""
    monitor.running()
    gid = monitor.groups[group] if group else 64123
    client = monitor.client(uid=64123, gid=gid)
    before = held(monitor)
    client.socket.sendall(b"\0\0\1")
    for _ in range(10):
        socket.send_fds(client.socket, [b"\0"], [disk])
    assert held(monitor, before) == before


def test_the_supervisor_never_opens_what_it_is_told(monitor, tmp_path, disk):
    """The path is for show; what counts is the descriptor."""
    monitor.running()
    trap = tmp_path / "trap"
    os.mkfifo(trap)
    client = monitor.client()
    client.hand([disk], "disk-add", device="xvdb", path=str(trap))
    plug, (descriptor,) = monitor.asked_change(Plug)
    assert plug.disks[0].path == str(trap)
    assert stat.S_ISREG(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    monitor.failed(plug, FAULT, RUNNING)
    client.refusal()
