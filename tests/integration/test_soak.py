# SPDX-License-Identifier: GPL-2.0-or-later
"""Half a minute of what `scripts/soak` does for ten: nothing grows, whatever happens to several VMs."""

import os

import pytest
from soak import Soak, soak

from xenvm.errors import XenvmError


def test_nothing_grows(capsys):
    if os.geteuid():
        pytest.fail("the descriptors of processes that are not dumpable are shown to root only: run the tests as root")
    lines = soak(3, 12, seed=7)
    assert " 9 processes" in lines[-1]
    assert capsys.readouterr().out


def test_it_would_be_seen(monkeypatch):
    """A monitor that is gone, and a command that fails without words."""
    level = Soak.level

    def less(self):
        found = level(self)
        self.vms[0].ask("quit")
        found.processes -= 3
        return found

    monkeypatch.setattr(Soak, "level", less)
    with pytest.raises((AssertionError, XenvmError)):
        soak(1, 1, seed=1)
