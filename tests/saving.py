# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that are saved in tests, on either host."""

import os
import signal
import time
from pathlib import Path

from vms import json_of, kill, until


def goes_on(guest, before, stops=3, patience_s=120):
    """The guest ticks on where it was: none again, and none missing but one for each of `stops` times it was suspended.

    What is in the console's ring when a guest is saved is lost by a restore, also with xl: libxenguest clears the ring.
    And what the guest's kernel says when it suspends and resumes can stand in the middle of a line.
    """
    until(lambda: len(guest.ticks()) > before + 2, "the guest ticks on", patience_s)
    ticks = guest.ticks()
    assert ticks == sorted(set(ticks))
    assert len(set(range(1, ticks[-1])) - set(ticks)) <= stops
    assert guest.boots() == 1


def runs_on(guest, stops):
    """The guest runs and ticks on from here."""
    guest.until("running")
    goes_on(guest, len(guest.ticks()), stops)


def only(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def suspend(guest, file, *words):
    """Suspend; return what was told of it."""
    done = guest.host.run("xenvm-cmd", "--json", guest.uuid, "suspend", str(file), *words)
    assert done.returncode == 0, done.stdout
    return json_of(done)


def acts(guest):
    return guest.acts.read_text()


def step(guest):
    """What the monitor is at, "" when nothing."""
    return guest.status()["step"]


def builder(guest):
    """The pid of this monitor's builder, 0 when there is none."""
    return guest.pids().get("builder", 0)


def held(guest, file, **options):
    """Begin a suspend and stop its builder while it writes the image: the guest is suspended then.

    Return the client and the builder's pid. One that was too fast is undone, and it is tried again.
    """
    guest.host.slow(3000, ["memory"])
    for _ in range(5):
        saving = guest.begin_cmd("suspend", str(file), **options)
        until(lambda one=saving: step(guest) == "writing the image" or one.poll() is not None, "the image is written")
        pid = builder(guest)
        if pid:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)  # for what it has said before
            if step(guest) == "writing the image" and builder(guest) == pid:
                guest.host.slow(0)
                return saving, pid
            kill(pid, signal.SIGCONT)
        assert saving.wait(300) == 0
        guest.cmd("restore", str(file))
    raise AssertionError("the builder was always too fast")
