# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of commands: names, aliases, arguments, and what this version refuses and why."""

import re

import pytest

from xenvm.cli.verbs import VERBS
from xenvm.errors import ExitCode, UsageError
from xenvm.supervisor import commands
from xenvm.supervisor.commands import ALIASES, COMMANDS, NOT_HERE, TIMEOUT_MAX_S
from xenvm.supervisor.loop import Supervisor
from xenvm.supervisor.pending import GOALS
from xenvm.supervisor.states import Event


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_found_by_its_name(name):
    assert commands.find(name) == (name, COMMANDS[name])


@pytest.mark.parametrize(
    ("alias", "name"), [("halt", "shutdown"), ("reboot", "restart"), ("get-status", "status"), ("get-domid", "domid")]
)
def test_names_of_old_serve_still(alias, name):
    assert commands.find(alias) == (name, COMMANDS[name])
    assert ALIASES[alias] == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pci-add", "PCI"),
        ("s4suspend", "the guest's own"),
        ("set-mem-target", "config"),
        ("cd-insert-real", "cd-insert takes every disc"),
        ("device", "backends run in dom0"),
    ],
)
def test_what_is_not_here_says_why(name, reason):
    with pytest.raises(UsageError, match=reason):
        commands.find(name)


def test_the_three_lists_of_names_are_disjoint():
    assert not COMMANDS.keys() & ALIASES.keys()
    assert not NOT_HERE.keys() & (COMMANDS.keys() | ALIASES.keys())


def test_an_unknown_name_is_shown_in_ascii_and_cut():
    with pytest.raises(UsageError) as caught:
        commands.find("\x1b[2J\u00e4" + "x" * 500)
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 120
    assert caught.value.code is ExitCode.USAGE


HVM_READING = {"get-vnc", "get-stubdomid", "get-acpi-state"}


def test_only_commands_that_change_nothing_are_open_to_readers():
    reading = {name for name, command in COMMANDS.items() if command.reading}
    assert reading == {"help", "status", "domid", "get", "events", "wait", "disk-list", "nic-list", *HVM_READING}
    assert all(COMMANDS[name].event is None for name in reading)


def test_every_command_is_carried_out_somewhere():
    changing = {name for name, command in COMMANDS.items() if command.event is not None}
    assert changing | {"suspend", "checkpoint", "restore", "s3suspend", "s3resume"} == set(GOALS)
    assert set(COMMANDS) - changing == set(Supervisor._HANDLERS)
    assert [COMMANDS[name].event for name in ("start", "destroy")] == [Event.START, Event.DESTROY]


def test_the_command_line_knows_the_same_commands():
    assert {verb.name for verb in VERBS} - {"list"} | {"console-log", "commit"} == set(COMMANDS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb.name != "list"], ids=lambda verb: verb.name)
def test_the_help_of_a_command_has_every_argument_that_its_monitor_takes(verb):
    old = {"read-config": {"path"}}.get(verb.name, {"forced"})  # words that old clients send
    taken = COMMANDS[verb.name].arguments - old
    if verb.name == "disk-add":
        told = set(re.findall(r"([a-z]+)=", verb.arguments + verb.summary))
    else:
        told = set(re.findall(r"([a-z]+)=", verb.arguments)) | {verb.bare, verb.switch} - {""}
    assert taken == told


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_that_is_not_taken_is_refused(name):
    command = COMMANDS[name]
    commands.check_arguments(name, command, dict.fromkeys(command.arguments, "1"))
    with pytest.raises(UsageError, match=f"{name}: no argument 'colour'"):
        commands.check_arguments(name, command, {"colour": "red"})


@pytest.mark.parametrize("word", ["true", "TRUE", "yes", "y", "1"])
def test_true(word):
    assert commands.boolean({"forced": word}, "force", "forced") is True


@pytest.mark.parametrize("word", ["false", "No", "n", "0"])
def test_false(word):
    assert commands.boolean({"force": word}, "force", "forced") is False


def test_an_absent_switch_is_off_and_a_strange_one_refused():
    assert commands.boolean({}, "force") is False
    for word in ("", "2", "maybe", "true "):
        with pytest.raises(UsageError, match="neither true nor false"):
            commands.boolean({"force": word}, "force")


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("0.5", 0.5), ("1e3", 1000.0), ("86400", TIMEOUT_MAX_S)])
def test_seconds(text, value):
    assert commands.seconds({"timeout": text}, "timeout", 60.0) == value


@pytest.mark.parametrize("text", ["0", "-1", "86401", "nan", "inf", "-inf", "1e999", "", "soon", "1s"])
def test_seconds_out_of_range(text):
    with pytest.raises(UsageError, match="is not a time"):
        commands.seconds({"timeout": text}, "timeout", 60.0)


def test_seconds_have_a_default():
    assert commands.seconds({}, "timeout", 60.0) == 60.0


def test_help_has_a_line_for_each_command():
    lines = commands.help_text().splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert "shutdown [force=...] [forced=...] [timeout=...]" in lines
