# SPDX-License-Identifier: GPL-2.0-or-later
"""Some of the fault matrix in each run of the tests; `scripts/faults` does the whole. And that it would see a fault."""

import re
import time
from contextlib import suppress

import pytest
from faultcases import PAIRS, Numbered, copied, count, hurried
from operations import OPERATIONS
from vms import SimulatedHost, Vm, kill, until

from xenvm.errors import XenvmError

RUNS = [
    ("build", 0.5, "worker", "kill"),
    ("build", 0.3, "supervisor", "kill"),
    ("build", 1.0, "worker", "kill"),
    ("adopt", 1.0, "broker", "kill"),
    ("pause", 0.0, "broker", "memory"),
    ("pause", 1.0, "broker", "descriptors"),
    ("attach", 0.5, "watcher", "stop"),
    ("detach", 0.4, "supervisor", "stop"),
    ("checkpoint", 0.7, "worker", "kill"),
    ("save", 0.1, "supervisor", "kill"),
    ("save", 0.5, "worker", "space"),
    ("save", 0.3, "client", "kill"),
    ("save", 0.6, "broker", "kill"),
    ("restore", 0.5, "worker", "descriptors"),
    ("destroy", 0.5, "worker", "kill"),
    ("restart", 0.4, "broker", "kill"),
    ("reboot", 0.2, "worker", "kill"),
    ("pause", 0.0, "broker", "space"),
    ("pause", 0.0, "xenstored", "restart"),
    ("attach", 0.5, "xenstored", "gone"),
]


@pytest.fixture(scope="module")
def host():
    made = SimulatedHost()
    yield made
    made.close()


def effects(host, name):
    if name not in Numbered.effects:
        Numbered.effects[name] = len(count(host, name))
    return Numbered.effects[name]


@pytest.mark.parametrize(("name", "part", "victim", "how"), RUNS)
def test_nothing_is_lost_and_nothing_left(host, name, part, victim, how):
    """Part 0 is before the first effect, 1 is when all is done and nobody knows it yet."""
    point = 1 + round(effects(host, name) * part)
    letter, seconds = Numbered(host, name, point, victim, how).run()
    assert letter in ("o", "x")
    assert seconds < 60


def test_a_helper_that_stands_still_has_a_deadline(tmp_path_factory):
    directory = tmp_path_factory.mktemp("programs")
    for path in (directory, *list(directory.parents)[:2]):
        path.chmod(0o755)
    host = SimulatedHost(hurried(directory))
    try:
        Numbered.effects.setdefault("pause", 1)
        assert Numbered(host, "pause", 1, "worker", "stop").run()[0] == "x"
    finally:
        host.close()


def test_a_supervisor_that_loops_for_ever_is_replaced(tmp_path_factory):
    """By its use of the processor within one turn, which costs an idle one no system call."""
    directory = tmp_path_factory.mktemp("programs")
    for path in (directory, *list(directory.parents)[:2]):
        path.chmod(0o755)
    changed = copied(directory)
    loop = changed / "xenvm/supervisor/loop.py"
    text, limits = re.subn(r"(TURN_CPU_S: Final = ).*", r"\g<1>0.5", loop.read_text())
    turn = "            self._timers(time.monotonic())\n"
    stuck = f"{turn}            while self._init.first and self._vm.state is State.PAUSED:\n                pass\n"
    assert (limits, text.count(turn)) == (1, 1)
    loop.write_text(text.replace(turn, stuck))
    host = SimulatedHost(changed)
    try:
        guest = Vm(host, host.directory())
        guest.start()
        guest.up()
        first = guest.pids()["supervisor"]
        with suppress(XenvmError):  # it loops before or after it has answered
            guest.ask("pause")
        until(lambda: guest.pids().get("supervisor") not in (None, first), "another supervisor")
        guest.until("paused")
        assert '"how":"died of SIGPROF"' in guest.acts.read_text().replace(": ", ":")
        guest.cmd("unpause")
        guest.end()
        assert guest.left() == []
    finally:
        host.close()


def test_every_operation_has_points_and_every_victim_a_fault(host):
    assert len(PAIRS) == len(set(PAIRS)) >= 18
    assert effects(host, "build") > 10
    assert effects(host, "destroy") > 5
    assert set(OPERATIONS) >= {"build", "attach", "save", "restore", "destroy", "restart", "adopt"}


def test_a_fault_would_be_seen(host):
    """A guest that is killed behind the monitor's back is what the matrix exists to notice."""

    class Lost(Numbered):
        def strike(self):
            kill(self.pid())
            for domid in self.host.domains().values():
                self.host.destroy(domid)
            self.go_on()
            return []

    effects(host, "pause")
    case = Lost(host, "pause", 1, "watcher", "kill")
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="the guest was lost"):
        case.run()
    assert time.monotonic() - begin < 60
    case.vm.end()
    until(lambda: case.vm.left() == [], "nothing is left", 20)
