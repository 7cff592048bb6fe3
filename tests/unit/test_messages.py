# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages between processes: each check refuses what it should, and no message says more than it may."""

import re
from enum import StrEnum

import pytest

from xenvm.boundary import messages
from xenvm.boundary.messages import (
    KINDS,
    NO_DOMAIN,
    Ask,
    Checked,
    ConfigIssue,
    Domain,
    Fault,
    Hello,
    Message,
    Op,
    Policy,
    Progress,
    Watch,
    array,
    choice,
    flag,
    number,
    string,
    table,
)
from xenvm.errors import ProtocolError

RECORDS = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Checked)]
RECORDS = [kind for kind in RECORDS if kind not in (Checked, Message)]


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (number(-1, 3), [-1, 0, 3], [-2, 4, True, 1.0, "1", None, []]),
        (string(3), ["", "abc", "\u00e4\U0001f600x"], ["abcd", "a\0b", "\ud800", b"abc", 1, None, ["a"]]),
        (string(9, re.compile("ab|a")), ["a", "ab"], ["", "abb", "a\n", "xa"]),
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


def test_only_the_broker_and_the_builder_pass_descriptors():
    assert {kind.__name__: kind.DESCRIPTORS for kind in KINDS.values() if kind.DESCRIPTORS} == {"Done": 1, "Job": 2}


def test_a_supervisor_names_nothing():
    """A request is an operation out of a list; its text is only shown to whoever started the monitor."""
    assert Ask.FIELDS == ("sequence", "op", "text", "code")
    assert Watch.FIELDS == ("event",)


def test_an_error_names_record_and_field():
    body = Policy("started", "destroy", "reboot", "destroy", 60).as_body()
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
    assert Ask.from_body({"sequence": 1, "op": "destroy", "text": "", "code": 0}).op is Op.DESTROY
    with pytest.raises(ProtocolError):
        Ask.from_body({"sequence": 1, "op": "Destroy", "text": "", "code": 0})
    with pytest.raises(ProtocolError):
        Hello.from_body({"role": "supervisor", "pid": 0, "proof": ""})


def test_an_issue_is_shown_with_its_line_and_its_hint():
    issue = ConfigIssue(3, "memory = x", "memory: not a number", "give MiB")
    assert issue.show("/etc/a.cfg") == "/etc/a.cfg:3: memory: not a number\n    memory = x\n    hint: give MiB"
    assert ConfigIssue(0, "", "empty", "").show("a") == "a: empty"
