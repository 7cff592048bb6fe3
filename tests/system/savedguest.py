# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of save images share that need a real Xen host; tests/saving.py has the rest."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from conftest import MIB, processes, run, until
from saving import step

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


def helper(role):
    return next((pid for pid, words in processes().items() if role in words), 0)


def cap(guest, percent):
    """Limit how much of a processor the guest gets, in percent, 0 for no limit: one that has little is slow to suspend."""
    limit = ("-d", guest.name, "-c", str(percent))
    assert not run("xl", "sched-credit2", *limit).returncode or not run("xl", "sched-credit", *limit).returncode


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


class Flaky:
    """A file system on a device that can be told to fail every read and write from now on, or to stand still."""

    NAME = "xenvm-test-flaky"

    def __init__(self, folder):
        self.place = folder / "mounted"
        self.place.mkdir()
        self._file = folder / "flaky.disk"
        with self._file.open("wb") as file:
            file.truncate(320 * MIB)
        self._ran("mke2fs", "-q", "-O", "^has_journal", str(self._file))
        self._loop = self._ran("losetup", "-f", "--show", str(self._file)).strip()
        self._sectors = 320 * MIB // 512
        self._ran("dmsetup", "create", self.NAME, "--table", f"0 {self._sectors} linear {self._loop} 0")
        self.mount()

    @staticmethod
    def _ran(*words):
        done = run(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def mount(self):
        self._ran("mount", f"/dev/mapper/{self.NAME}", str(self.place))

    def unmount(self):
        self._ran("umount", str(self.place))

    def fails(self, *, now):
        """From now on everything fails, or works again."""
        table = f"0 {self._sectors} error" if now else f"0 {self._sectors} linear {self._loop} 0"
        self._ran("dmsetup", "suspend", "--noflush", "--nolockfs", self.NAME)
        self._ran("dmsetup", "load", self.NAME, "--table", table)
        self._ran("dmsetup", "resume", self.NAME)

    def stands_still(self):
        """From now on nothing of it ends; what is written stays in memory, and who synchronises waits."""
        self._ran("dmsetup", "suspend", "--noflush", "--nolockfs", self.NAME)

    def goes_on(self):
        self._ran("dmsetup", "resume", self.NAME)

    def mend(self):
        """Let it work again, and look at what was really written."""
        self.unmount()
        self.fails(now=False)
        assert run("e2fsck", "-fy", f"/dev/mapper/{self.NAME}").returncode in (0, 1)
        self.mount()

    def close(self):
        run("dmsetup", "resume", self.NAME)
        run("umount", str(self.place))
        run("dmsetup", "remove", "--retry", self.NAME)
        run("losetup", "-d", self._loop)
        self._file.unlink()


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
