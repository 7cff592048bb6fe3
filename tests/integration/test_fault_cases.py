# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fault matrix counts: a run in which nothing was struck is none, and what is wrong in one is told."""

import os
import signal

import pytest
from faultcases import Numbered, Sampled, hit, limit
from faults import Table
from operations import OPERATIONS
from vms import SimulatedHost, kill, nothing_is_left  # noqa: F401

LONG_S = 60.0


@pytest.fixture(scope="module")
def host():
    made = SimulatedHost()
    yield made
    made.close()


@pytest.fixture
def pause(host, monkeypatch):
    """The operation, of a guest that is there and stays."""
    monkeypatch.setattr(Sampled, "lengths", {"pause": 0.0})
    operation = OPERATIONS["pause"](host, host.directory())
    operation.prepare()
    yield operation
    operation.vm.end()


@pytest.fixture
def ended():
    """A process that has ended, and is not yet waited for."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    yield child
    os.waitpid(child, 0)


def told(capsys, *cases):
    """What a table of these cases shows, its last line, and its exit status."""
    table = Table([])
    for case in cases:
        table.cell(case)
    status = table.end()
    shown = capsys.readouterr().out.splitlines()
    return shown[0].split(), shown[1].partition(";")[0], status


def test_an_operation_that_is_over_cannot_be_struck(host, pause, capsys):
    """The next sample is taken of the time that it really took."""
    Sampled.lengths["pause"] = LONG_S
    case = Sampled(host, "pause", 0.9, "broker", "kill", pause)
    broker = pause.vm.broker()
    assert told(capsys, case) == (["m"], "0 runs (1 more missed their victim), 0 faults", 0)
    assert pause.vm.broker() == broker
    assert Sampled.lengths["pause"] < LONG_S / 4
    again = Sampled(host, "pause", 0.0, "supervisor", "kill", pause)
    assert told(capsys, again)[1:] == ("1 runs, 0 faults", 0)


@pytest.mark.parametrize("how", ["kill", "stop", "memory"])
def test_a_victim_that_has_ended_is_missed(host, pause, ended, how, capsys):
    class Late(Sampled):
        def pid(self):
            return ended

    missed = (["m"], "0 runs (1 more missed their victim), 0 faults", 0)
    assert told(capsys, Late(host, "pause", 0.0, "broker", how, pause)) == missed


def test_a_victim_that_is_not_there_is_missed_on_xen_and_a_fault_at_a_point(host, pause, capsys):
    class Nobody(Sampled):
        def pid(self):
            return 0

    class NobodyThere(Numbered):
        def pid(self):
            return 0

    assert told(capsys, Nobody(host, "pause", 0.0, "watcher", "kill", pause))[0] == ["m"]
    Numbered.effects.setdefault("pause", 1)
    case = NobodyThere(host, "pause", 1, "watcher", "kill")
    with pytest.raises(AssertionError, match="there is no watcher"):
        case.run()
    case.go_on()
    case.client.communicate()
    case.vm.end()


def test_what_is_found_wrong_while_something_is_struck_is_a_fault(host, pause):
    class Wrong(Sampled):
        def stopped_broker(self, pid):
            kill(pid, signal.SIGCONT)
            raise AssertionError("no status is answered")

    with pytest.raises(AssertionError, match="no status is answered"):
        Wrong(host, "pause", 0.0, "broker", "stop", pause).run()


def test_a_command_that_fails_though_nothing_was_struck_is_a_fault(host, pause, ended):
    class Late(Sampled):
        def pid(self):
            return ended

        def finish(self):
            super().finish()
            return 1

    with pytest.raises(AssertionError, match="nobody was struck, and yet it failed"):
        Late(host, "pause", 0.0, "broker", "kill", pause).run()


def test_a_limit_that_cannot_be_set_is_told(host, monkeypatch):
    options = {"env": {"PATH": "/usr/bin:/bin"}, "user": 65534, "group": 65534, "extra_groups": []}
    monkeypatch.setattr(host, "options", lambda: options)
    with pytest.raises(AssertionError, match="prlimit"):
        limit(host, 1, "memory")  # of root's
    hit(os.getpid(), 0)
