# SPDX-License-Identifier: GPL-2.0-or-later
"""xenvm-hotplug: one event to the monitor of its domain, and nothing else, whatever the environment says."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import xenvm
from xenvm.broker.uevents import Uevents
from xenvm.cli import hotplug

ROOT = Path(xenvm.__file__).parent.parent
RULES = (ROOT / "udev/60-xenvm.rules").read_text()
EVENT = re.compile(rb"(online|offline|remove) backend/(?:vbd|vif)/([1-9][0-9]{0,4})/[0-9]{1,9} [0-9]{1,20}")
GOOD = {"ACTION": "remove", "XENBUS_PATH": "backend/vbd/7/51712", "SEQNUM": "4711"}


@pytest.fixture
def run(monkeypatch):
    """Run it in a directory with the socket of domain 7; return its status and what the socket got."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(hotplug, "DIRECTORY", directory)
        monitor = Uevents(directory)
        monitor.follow(7)

        def made(**environment):
            before = len(os.listdir("/proc/self/fd"))
            for name in ("ACTION", "XENBUS_PATH", "SEQNUM"):
                monkeypatch.delenv(name, raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            status, got = hotplug.main(), []
            try:
                while True:
                    got.append(monitor._socket.recv(1000))
            except BlockingIOError:
                assert len(os.listdir("/proc/self/fd")) == before
                return status, got

        made.directory = directory
        yield made
        monitor.follow(-1)


@pytest.mark.parametrize("action", ["online", "offline", "remove"])
@pytest.mark.parametrize("path", ["backend/vbd/7/51712", "backend/vif/7/0"])
def test_an_event_reaches_the_monitor_in_its_form(run, action, path):
    status, (event,) = run(ACTION=action, XENBUS_PATH=path, SEQNUM="4711")
    assert (status, event) == (0, f"{action} {path} 4711".encode())
    assert EVENT.fullmatch(event)


def test_an_event_without_a_number(run):
    assert run(ACTION="remove", XENBUS_PATH="backend/vif/7/0") == (0, [b"remove backend/vif/7/0 0"])


def test_a_number_of_any_length(run):
    status, (event,) = run(**GOOD | {"SEQNUM": "9" * 500})
    assert status == 0
    assert EVENT.fullmatch(event)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACTION": "remove"},
        {"XENBUS_PATH": "backend/vbd/7/51712"},
        GOOD | {"ACTION": "add"},
        GOOD | {"ACTION": "remove\n"},
        GOOD | {"ACTION": ""},
        GOOD | {"XENBUS_PATH": "backend/vbd/7/51712\n"},
        GOOD | {"XENBUS_PATH": "backend/vbd/7/../../etc/x"},
        GOOD | {"XENBUS_PATH": "/backend/vbd/7/51712"},
        GOOD | {"XENBUS_PATH": "backend/vbd/../7"},
        GOOD | {"XENBUS_PATH": "backend/vbd/7/"},
        GOOD | {"XENBUS_PATH": "backend/vbd/0/1"},
        GOOD | {"XENBUS_PATH": "backend/qdisk/7/51712"},
        GOOD | {"XENBUS_PATH": "backend/console/7/0"},
        GOOD | {"XENBUS_PATH": "backend/vbd/\u0667/51712"},
        GOOD | {"XENBUS_PATH": "backend/vbd/7/51712" * 1000},
        GOOD | {"SEQNUM": "-1"},
        GOOD | {"SEQNUM": "1 remove backend/vbd/8/1 1"},
        GOOD | {"SEQNUM": "\udcff"},
    ],
    ids=lambda environment: repr(environment)[:60],
)
def test_what_is_no_event_is_not_sent(run, environment, capsys):
    assert run(**environment) == (2, [])
    assert "run by udev rules" in capsys.readouterr().err


@pytest.mark.parametrize("seqnum", ["\u00b2", "\u0664"])
def test_a_number_that_only_looks_like_one(run, seqnum):
    assert run(**GOOD | {"SEQNUM": seqnum}) == (2, [])


def test_nobody_serves_the_domain(run):
    assert run(**GOOD | {"XENBUS_PATH": "backend/vbd/8/51712"}) == (0, [])


def test_a_monitor_that_has_events_enough(run):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                sender.sendto(b"x", f"{run.directory}/domid-7")
        status, got = run(**GOOD)
    assert (status, set(got)) == (0, {b"x"})


def test_what_lies_there_instead_of_a_socket(run):
    Path(run.directory, "domid-9").write_text("")
    assert run(**GOOD | {"XENBUS_PATH": "backend/vbd/9/1"}) == (0, [])
    assert Path(run.directory, "domid-9").read_text() == ""


# What udev runs


def script(tmp_path, **environment):
    """Run the script of the rules with a program of this name that says that it was run."""
    (tmp_path / "xenvm-hotplug").write_text('#!/bin/sh\necho "ran $ACTION $XENBUS_PATH"\n')
    (tmp_path / "xenvm-hotplug").chmod(0o755)
    text = (ROOT / "scripts/xenvm.hotplug").read_text()
    assert "/run/xenvm/domid-" in text
    (tmp_path / "hotplug").write_text(
        text.replace("/run/xenvm", str(tmp_path)).replace("PATH=/usr/local/bin", f"PATH={tmp_path}:/usr/local/bin")
    )
    done = subprocess.run(
        ["/bin/sh", tmp_path / "hotplug"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("path", "ran"),
    [
        ("backend/vbd/7/51712", True),
        ("backend/vif/7/0", True),
        ("backend/vbd/8/51712", False),
        ("backend/console/7/0", True),  # the rules name vbd and vif; the program refuses what else comes
        ("", False),
        ("backend/vbd/$(touch x)/1", False),
        ("backend/vbd/../7/1", False),
    ],
)
def test_no_python_for_a_domain_that_no_monitor_serves(path, ran):
    with tempfile.TemporaryDirectory() as directory:
        monitor = Uevents(directory)
        monitor.follow(7)
        status, said = script(Path(directory), ACTION="remove", XENBUS_PATH=path)
        monitor.follow(-1)
        assert (status, said) == (0, f"ran remove {path}\n" if ran else "")
        assert sorted(os.listdir(directory)) == ["hotplug", "xenvm-hotplug"]


def test_the_rules_run_it_for_vbd_and_vif_alone():
    lines = [line for line in RULES.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith('SUBSYSTEM=="xen-backend", ENV{XENBUS_TYPE}=="v')
        assert line.endswith('RUN+="/usr/libexec/xenvm/hotplug"')
    assert 'ACTION=="remove"' in lines[1]
    assert 'ENV{script}=="/usr/libexec/xenvm/hotplug"' in lines[0]  # a card of somebody else costs nothing


def test_it_starts_without_what_costs_time():
    code = "import sys; import xenvm.cli.hotplug; print(sorted({'socket', 'pathlib', 'subprocess'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"
