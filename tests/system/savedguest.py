# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of save images share: guests that are saved, held in the middle of it, and looked at afterwards."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from conftest import json_of, kill, processes, run, until

VERIFY = ("bin/verify-stream-v2", "-f", "xl", "-i")


def verify(file):
    """Let Xen's own checker read an image."""
    base = next(path for path in sorted(Path("/usr/lib").glob("xen-4.*")) if (path / VERIFY[0]).exists())
    done = subprocess.run(
        ["python3", f"{base}/{VERIFY[0]}", *VERIFY[1:], str(file)],
        env={"PYTHONPATH": f"{base}/lib/python", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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


def only(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def folder():
    """A place for save images on a file system of a disk, which is empty again afterwards."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        yield Path(made)


def suspend(guest, file, *words):
    """Suspend; return what was told of it."""
    done = run("xenvm-cmd", "--json", guest.uuid, "suspend", str(file), *words)
    assert done.returncode == 0, done.stdout
    return json_of(done)


def acts(guest):
    return Path(f"/var/log/xenvm/{guest.uuid}.acts").read_text()


def helper(role):
    return next((pid for pid, words in processes().items() if role in words), 0)


def cap(guest, percent):
    """Limit how much of a processor the guest gets, in percent, 0 for no limit: one that has little is slow to suspend."""
    limit = ("-d", guest.name, "-c", str(percent))
    assert not run("xl", "sched-credit2", *limit).returncode or not run("xl", "sched-credit", *limit).returncode


def step(guest):
    """What the monitor is at, "" when nothing."""
    return guest.status()["step"]


def held(guest, file, *as_user):
    """Begin a suspend and stop its builder while it writes the image: the guest is suspended then.

    Return the client and the builder's pid. One that was too fast is undone, and it is tried again.
    """
    for _ in range(5):
        saving = subprocess.Popen(
            [*as_user, "xenvm-cmd", guest.uuid, "suspend", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until(lambda one=saving: step(guest) == "writing the image" or one.poll() is not None, "the image is written")
        pid = helper("builder")
        if pid:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)  # for what it has said before
            if step(guest) == "writing the image" and helper("builder") == pid:
                return saving, pid
            kill(pid, signal.SIGCONT)
        assert saving.wait(300) == 0
        guest.cmd("restore", str(file))
    raise AssertionError("the builder was always too fast")


def runs_on(guest, stops):
    """The guest runs and ticks on from here."""
    guest.until("running")
    goes_on(guest, len(guest.ticks()), stops)


@contextlib.contextmanager
def small_disk(place, size_bytes):
    """A file system of such a size. Give what lets it grow."""
    place.mkdir(exist_ok=True)

    def sized(size_bytes, *words):
        done = run(
            "mount", *words, "-t", "tmpfs", "-o", f"{'remount,' * bool(words)}size={size_bytes}", "none", str(place)
        )
        assert done.returncode == 0, done.stderr

    sized(size_bytes)
    try:
        yield lambda size_bytes: sized(size_bytes, "-o", "remount")
    finally:
        run("umount", str(place))


def asked(guest, saving):
    """Wait until the builder waits for the guest to suspend, and stop it there; return its pid."""
    until(lambda: step(guest) == "waiting for the guest to suspend", "the guest is asked to suspend")
    pid = helper("builder")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)  # for what it has said before
    assert step(guest) == "waiting for the guest to suspend"
    assert saving.poll() is None
    return pid


def unpacked(file):
    """What the program zstd makes of an image, beside it."""
    plain = file.with_suffix(".plain")
    done = run("zstd", "-d", "-q", "-f", str(file), "-o", str(plain))
    assert done.returncode == 0, done.stderr
    return plain
