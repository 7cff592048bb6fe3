# SPDX-License-Identifier: GPL-2.0-or-later
"""The tour on a simulated host that `scripts/demo --simulator` gives, as whoever sees xenvm for the first time runs it."""

import re
import time
from pathlib import Path

from vms import ROOT, processes, run, until

LIMIT_S = 10.0
TRIES = 3


def test_the_tour_takes_less_than_ten_seconds():
    """The quickest of three counts: the machine has other tests to run beside it."""
    took = []
    while len(took) < TRIES and min(took, default=LIMIT_S) >= LIMIT_S:
        begin = time.monotonic()
        done = run("bash", str(ROOT / "scripts/demo"), "--simulator")
        took.append(time.monotonic() - begin)
        assert done.returncode == 0, done.stdout + done.stderr
    assert min(took) < LIMIT_S, took
    said = done.stdout
    assert "started the simulated host" in done.stderr
    steps = ("disk-list\nxvda ", "nic-list\n0 ", "disk-add", "disk-del", "suspend", "status\nsuspended\n", "restore")
    places = [said.index(f"xenvm-cmd first {step}") for step in steps]
    assert places == sorted(places)
    before, after = re.search(r"^tick (\d+), after tick (\d+) before$", said, re.MULTILINE).groups()[::-1]
    assert int(before) < int(after)
    assert "Nothing is left: no domain, no process, no socket" in said
    (where,) = set(re.findall(r"/tmp/xenvm-demo\.\w+", said))
    until(lambda: processes(f"{where}/host") == {}, "all processes have ended", 10)
    assert not Path(where).exists()
