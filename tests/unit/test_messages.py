# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages between processes: each check refuses what it should, and no message says more than it may."""

import pytest

from xenvm import forms
from xenvm.boundary import devices, machine, messages
from xenvm.boundary.checks import Checked, Message, array, choice, flag, number, string, table
from xenvm.boundary.devices import DeviceState, DiskGrant, Kind, NicGrant, Vbd, Vif
from xenvm.boundary.images import Progress, Restore, Save
from xenvm.boundary.messages import (
    KINDS,
    NO_DOMAIN,
    Ask,
    ConfigIssue,
    Domain,
    Fault,
    Hello,
    Op,
    Plug,
    Policy,
    Rebridge,
    Unplug,
    Watch,
)
from xenvm.choice import StrChoice
from xenvm.errors import ProtocolError

NAMES = {**vars(devices), **vars(machine), **vars(messages)}
RECORDS = [kind for kind in NAMES.values() if isinstance(kind, type) and issubclass(kind, Checked)]
RECORDS = [kind for kind in RECORDS if kind not in (Checked, Message)]
DISK = DiskGrant(51712, "xvda", "phy", "/dev/vg/a", False, False, False, "", 0, "")
NIC = NicGrant(0, "br0", "00:16:3e:00:00:01")
VBD = Vbd(51712, "xvda", False, False, False, "phy:/dev/vg/a", 7, 5, "")
STATE = DeviceState(Kind.VBD, 51712, "xvda", 4, 4, False, "phy:/dev/vg/a", "", "")


class Colour(StrChoice):
    RED = "red"


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (number(-1, 3), [-1, 0, 3], [-2, 4, True, 1.0, "1", None, []]),
        (string(3), ["", "abc", "\u00e4\U0001f600x"], ["abcd", "a\0b", "\ud800", b"abc", 1, None, ["a"]]),
        (string(9, forms.one_of("ab", "a")), ["a", "ab"], ["", "abb", "a\n", "xa"]),
        (flag, [True, False], [0, 1, "true", None]),
        (choice(Colour), ["red"], ["RED", "", None, 1, ["red"]]),
        (array(number(0, 1), 2), [[], [0, 1], (1,)], [[0, 1, 0], [2], "01", {"0": 1}, None]),
        (table(string(1), number(0, 1), 1), [{}, {"a": 1}], [{"ab": 1}, {"a": 2}, {"a": 1, "b": 1}, [], None]),
    ],
)
def test_checks(check, good, bad):
    for value in good:
        result = check(value)
        assert result == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        with pytest.raises(ProtocolError):
            check(value)


def test_a_choice_becomes_its_member():
    assert choice(Colour)("red") is Colour.RED


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_check(kind):
    assert tuple(kind.CHECKS) == kind.FIELDS


def test_kinds_are_distinct_and_complete():
    assert set(KINDS.values()) == {kind for kind in RECORDS if issubclass(kind, Message)}
    assert all(number == kind.KIND for number, kind in KINDS.items())
    assert len({kind.KIND for kind in KINDS.values()}) == len(KINDS)


def test_which_messages_pass_descriptors():
    """From the supervisor what a client has opened: a disk, a save image."""
    assert {kind.__name__: kind.DESCRIPTORS for kind in KINDS.values() if kind.DESCRIPTORS} == {
        "Done": 1,
        "Job": 4,
        "Plug": 1,
        "Serve": 3,
        "Connect": 1,
        "Decrypt": 2,
        "Unpack": 2,
        "Sum": 1,
        "Tables": 4,
        "Save": 1,
        "Restore": 1,
        "Inspect": 3,
        "Write": 2,
        "Join": 8,
        "Launch": 64,
        "Model": 1,
        "Attach": 2,
    }


def test_a_supervisor_names_nothing():
    """A request is an operation out of a list; its text is only shown to whoever started the monitor.

    A disk has a path and a key file for show: what the broker does with them is tested with the broker.
    """
    assert Ask.FIELDS == ("sequence", "op", "text", "code", "age_ms")
    assert Watch.FIELDS == ("event",)
    assert Plug.FIELDS == ("sequence", "disks", "nics", "directory", "file")  # the file by its bare name
    assert Unplug.FIELDS == ("sequence", "kind", "device", "disc", "force", "timeout_s")
    assert Save.FIELDS == ("sequence", "go_on", "timeout_s", "directory", "file", "live")
    assert Restore.FIELDS == ("sequence", "paused", "foreign", "directory", "file")
    assert Rebridge.FIELDS == ("sequence", "device", "bridge")


@pytest.mark.parametrize(
    ("record", "field", "values"),
    [
        (DISK, "device", [0, -1, 2**29, True, "51712"]),
        (DISK, "name", ["x" * 33, "xvd\n", "xvd\u00e4", 5]),
        (DISK, "type", ["", "qcow2", "phy ", "tap"]),
        (DISK, "path", ["x" * 4096, "a\0b"]),
        (DISK, "cipher", ["aes xts", "-aes", "a" * 65, "aes;0"]),
        (DISK, "key_size_bits", [-1, 4097]),
        (DISK, "read_only", [1, "r"]),
        (NIC, "id", [-1, 32]),
        (NIC, "bridge", ["a/b", "a b", "a:b", "b" * 16, "a\n", "\u00e4", "\x7f"]),
        (NIC, "mac", ["", "00:16:3E:00:00:01", "00:16:3e:00:00:1", "00:16:3e:00:00:01\n"]),
        (Vif(0, "br0", NIC.mac), "mac", ["00163e000001"]),
        (VBD, "major", [-2, 4096]),
        (VBD, "minor", [-2, 2**20]),
        (VBD, "source", ["phy:/\u00e4", "a\tb", "x" * 1025]),
        (VBD, "server", ["1", "0 5", "1 ", "1 2 3", "-1 2", "12345678901 2"]),
        (STATE, "kind", ["VBD", "tap", ""]),
        (STATE, "backend", [-2, 9, "4"]),
        (STATE, "frontend", [-2, 9]),
        (STATE, "detail", ["\x1b[2J", "x" * 1025]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_device_may_be(record, field, values):
    body = record.as_body()
    assert type(record).from_body(body) == record
    for value in values:
        with pytest.raises(ProtocolError, match=rf"{type(record).__name__}\.{field}"):
            type(record).from_body(body | {field: value})


def test_one_device_is_added_at_a_time():
    assert Plug.from_body(Plug(1, (DISK,), ()).as_body()).disks == (DISK,)
    for wrong in (Plug(1, (DISK, DISK), ()), Plug(1, (), (NIC, NIC))):
        with pytest.raises(ProtocolError, match="at most 1"):
            Plug.from_body(wrong.as_body())


def test_domain_0_and_reserved_numbers_get_no_devices():
    for domid in (-1, 0, 0x7FF0):
        with pytest.raises(ProtocolError, match=r"Created\.domid"):
            messages.Created.from_body({"domid": domid, "devices": []})
        with pytest.raises(ProtocolError, match=r"Join\.domid"):
            messages.Join.from_body({"domid": domid, "vifs": [], "timeout_s": 1})


def test_an_error_names_record_and_field():
    body = Policy("started", "destroy", "reboot", "destroy", 60, 40).as_body()
    assert Policy.from_body(body).on_reboot == "reboot"
    with pytest.raises(ProtocolError, match=r"Policy\.on_reboot"):
        Policy.from_body(body | {"on_reboot": "destroyed"})
    with pytest.raises(ProtocolError, match="fields are not startup"):
        Policy.from_body({key: value for key, value in body.items() if key != "on_halt"})


def test_nested_records_are_checked():
    fault = Fault(1, "no", "")
    body = messages.Failed(3, fault, NO_DOMAIN).as_body()
    assert messages.Failed.from_body(body).fault == fault
    body["domain"] = {**NO_DOMAIN.as_body(), "domid": 0x7FF0}
    with pytest.raises(ProtocolError, match=r"Failed\.domain: Domain\.domid"):
        messages.Failed.from_body(body)


@pytest.mark.parametrize("code", [0, 10, -1])
def test_a_fault_has_an_exit_status_of_failure(code):
    with pytest.raises(ProtocolError):
        Fault.from_body({"code": code, "message": "", "hint": ""})


def test_no_domain_is_a_legal_answer():
    assert Domain.from_body(NO_DOMAIN.as_body()) == NO_DOMAIN
    assert NO_DOMAIN.domid == -1


def test_messages_do_not_change():
    message = Progress(1, "x")
    with pytest.raises(AttributeError):
        message.step = "y"
    assert message == Progress(1, "x")
    assert message != Progress(2, "x")


def test_the_operations_are_those_of_the_table_of_commands():
    body = Ask(1, Op.DESTROY, "", 0).as_body()
    assert Ask.from_body(body).op is Op.DESTROY
    for wrong in ({"op": "Destroy"}, {"age_ms": -2}, {"age_ms": 60_001}, {"age_ms": 0.5}):
        with pytest.raises(ProtocolError):
            Ask.from_body(body | wrong)
    with pytest.raises(ProtocolError):
        Hello.from_body({"role": "supervisor", "pid": 0, "proof": ""})


def test_an_issue_is_shown_with_its_line_and_its_hint():
    issue = ConfigIssue(3, "memory = x", "memory: not a number", "give MiB")
    assert issue.show("/etc/a.cfg") == "/etc/a.cfg:3: memory: not a number\n    memory = x\n    hint: give MiB"
    assert ConfigIssue(0, "", "empty", "").show("a") == "a: empty"
