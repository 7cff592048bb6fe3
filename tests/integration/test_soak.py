# SPDX-License-Identifier: GPL-2.0-or-later
"""Half a minute of what `scripts/soak` does for ten: nothing grows, whatever happens to several VMs."""

import os
import signal
import subprocess
import sys

import pytest
import soak as soak_module
from soak import Soak, soak

from xenvm.cli.client import Monitor
from xenvm.errors import XenvmError


def test_nothing_grows(capsys):
    if os.geteuid():
        pytest.fail("the descriptors of processes that are not dumpable are shown to root only: run the tests as root")
    lines = soak(3, 12, seed=7)
    assert " 9 processes" in lines[-1]
    assert capsys.readouterr().out


class Leaks:
    """What a test lets leak between the two counts of a soak of one VM; it is there at the second one."""

    def __init__(self, monkeypatch):
        self.levels, self.made = 0, []
        monkeypatch.setattr(Soak, "level", self.leaking(Soak.level))

    def leaking(self, level):
        def counted(one):
            self.levels += 1
            if self.levels == 2:
                self.leak(one)
            return level(one)

        return counted

    def seen(self, match):
        try:
            with pytest.raises(AssertionError, match=match):
                soak(1, 1, seed=1)
            assert self.levels == 2
        finally:
            for one in self.made:
                one.__exit__(None, None, None)


def test_a_descriptor_that_leaks_would_be_seen(monkeypatch):
    """One of a supervisor: a client that stays."""

    class Descriptor(Leaks):
        def leak(self, one):
            self.made.append(one.vms[0].connect())
            self.made[-1].call("status")

    Descriptor(monkeypatch).seen("more or fewer descriptors$")


def test_a_process_that_leaks_would_be_seen(monkeypatch):
    """Another watcher, for what its command line says."""

    class Process(Leaks):
        def leak(self, one):
            words = ["-c", "import time; time.sleep(60)", "", "/xenvm/_start.py", "watcher", str(one.host.sockets)]
            self.made.append(subprocess.Popen([sys.executable, *words]))

    leaks = Process(monkeypatch)
    leaks.seen("more or fewer processes")
    assert leaks.made[0].returncode == -signal.SIGKILL  # as everything that is left of a soak that failed


def test_memory_that_grows_would_be_seen(monkeypatch):
    """A process of the host cannot be made to grow from outside, so what was counted is."""
    level, counted = Soak.level, []

    def more(one):
        counted.append(level(one))
        counted[-1].private_kib *= len(counted)
        return counted[-1]

    monkeypatch.setattr(Soak, "level", more)
    with pytest.raises(AssertionError, match="memory of the monitors has grown"):
        soak(1, 1, seed=1)


def test_a_command_that_fails_without_words_would_be_seen(monkeypatch):
    call = Monitor.call

    def wordless(self, method, /, **params):
        if method == "domid":
            raise XenvmError("")
        return call(self, method, **params)

    monkeypatch.setattr(Monitor, "call", wordless)
    monkeypatch.setattr(soak_module, "COMMANDS", (("domid", {}),))
    with pytest.raises(AssertionError, match=r"without words: \['domid: '"):
        soak(1, 1, seed=1)
