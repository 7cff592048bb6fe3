# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images: opened, named and removed here, with the rights of whoever runs xenvm-cmd; the monitor gets descriptors.

An image is written into a file without a name. Only when it is whole and on the disk it gets the name, in one step;
only after that the domain is ended. Whatever goes wrong before leaves the guest running and an older file as it was:
that one is kept beside until it is certain that the guest has not run on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time

from xenvm.cli import render
from xenvm.cli.client import Monitor
from xenvm.errors import UsageError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Final

    from xenvm.cli.client import Reply

BAR_WIDTH: Final = 40
LOOK_S: Final = 30.0  # for a monitor to say what has become of the guest
LOOK_PAUSE_S: Final = 0.2
NO_NAMELESS_FILES: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})  # open(2), O_TMPFILE
NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK})  # link(2), file systems without hard links
MODE: Final = 0o600  # it holds the guest's memory


class Target:
    """The place of a new image: an open directory, and the file that is to get its name there."""

    def __init__(self, command: str, path: str) -> None:
        """Make the file, which has no name yet if the file system can do that; raise XenvmError when it cannot be."""
        self.path = os.path.abspath(path)  # noqa: PTH100 - pathlib costs start time
        folder, self._name = os.path.split(self.path)
        if not self._name or path.endswith("/"):
            raise UsageError(f"{command}: file= names no file: {path}")
        self._beside = f".{self._name[:200]}.xenvm-{os.urandom(8).hex()}"
        self._before = f"{self._beside}.before"  # the name that an older file has until all is certain
        self._named = self._kept = False
        self._directory = self.file = -1
        try:
            self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._check()
            self.file = self._open()
        except OSError as error:
            self.close()
            raise XenvmError(f"{command}: cannot write {self.path}: {error.strerror}") from error
        except XenvmError:
            self.close()
            raise

    def _check(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self._name, dir_fd=self._directory, follow_symlinks=False).st_mode):
                raise UsageError(f"{self.path} exists and is not a regular file", hint="name a file beside it")

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY
        try:
            return os.open(".", flags | os.O_TMPFILE, MODE, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in NO_NAMELESS_FILES:
                raise
        made = os.open(self._beside, flags | os.O_CREAT | os.O_EXCL, MODE, dir_fd=self._directory)
        self._named = True
        return made

    def take_over(self) -> None:
        """Give the file its name, in place of an older one, and have that on the disk; raise XenvmError if it fails.

        The older one is kept until `confirm` or `give_back`, where the file system has hard links.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                self._keep()
            if not self._named:
                os.link(f"/proc/self/fd/{self.file}", self._beside, dst_dir_fd=self._directory, follow_symlinks=True)
                self._named = True
            os.rename(self._beside, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._named = False
        except OSError as error:
            self.confirm()  # the older file has its own name still
            raise XenvmError(f"the image cannot be named {self.path}: {error.strerror}; the guest runs on") from error
        try:
            os.fsync(self._directory)
        except OSError as error:
            what = self.give_back()
            raise XenvmError(
                f"the name {self.path} cannot be put on the disk: {error.strerror}; the guest runs on; {what}"
            ) from error

    def _keep(self) -> None:
        try:
            places = {"src_dir_fd": self._directory, "dst_dir_fd": self._directory}
            os.link(self._name, self._before, **places, follow_symlinks=False)
            self._kept = True
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise

    def confirm(self) -> None:
        """Let go of the older file: the image is to be restored from now on. Works twice."""
        if self._kept:
            with contextlib.suppress(OSError):
                os.unlink(self._before, dir_fd=self._directory)
            self._kept = False

    def give_back(self) -> str:
        """Give the name back to the older file, since the guest has run on; return what has become of the files."""
        try:
            there, ours = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False), os.fstat(self.file)
            if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
                return self.which()
            if self._kept:
                os.rename(self._before, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                self._kept = False
                return f"{self.path} is the file that it was"
            os.unlink(self._name, dir_fd=self._directory)
        except OSError as error:
            return f"{error.strerror}: {self.which()}"
        return f"the image {self.path} was removed"

    def which(self) -> str:
        """Say which file is which when it is not certain whether the guest has run on."""
        older = f", the older file is {os.path.dirname(self.path)}/{self._before}" if self._kept else ""  # noqa: PTH120
        return f"the new image is {self.path}{older}; do not restore an image whose guest has run on"

    def close(self) -> None:
        """Close all; a file that did not get its name is gone. Works twice."""
        if self._named:
            with contextlib.suppress(OSError):
                os.unlink(self._beside, dir_fd=self._directory)
            self._named = False
        for descriptor in (self.file, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self.file = self._directory = -1


@contextlib.contextmanager
def target(command: str, params: Mapping[str, str]) -> Iterator[Target]:
    """Give the place of a new image; what is left of it afterwards is closed and removed."""
    made = Target(command, _file(command, params))
    try:
        yield made
    finally:
        made.close()


def save(monitor: Monitor, command: str, given: Mapping[str, str]) -> Reply:
    """Suspend or checkpoint the guest into `file`; return the last reply."""
    with target(command, given) as place:
        monitor.handed = os.dup(place.file)
        reply = _watched(monitor, command, {**given, "file": place.path})
        try:
            place.take_over()
        except XenvmError:
            if command == "suspend":
                with contextlib.suppress(XenvmError):
                    monitor.call("cancel")
            raise
        if command == "suspend":
            reply = _commit(monitor, place)
        place.confirm()
        return reply


def _commit(monitor: Monitor, place: Target) -> Reply:
    """Have the domain ended; when that fails, look whether the guest has run on, and then take the image back."""
    try:
        return monitor.call("commit")
    except XenvmError as error:
        running = _runs(monitor)
        if running is False:
            place.confirm()
            what = f"the guest does not run, and the image {place.path} is whole"
        else:
            what = place.give_back() if running else place.which()
        raise type(error)(f"{error.message}; {what}", hint=error.hint, code=error.code) from error
    except BaseException:
        render.note(f"suspend: {place.which()}")
        raise


def _runs(monitor: Monitor) -> bool | None:
    """Tell whether the guest runs; None when nobody says so. A supervisor that has died has a successor soon."""
    end = time.monotonic() + LOOK_S
    asked = monitor
    try:
        while time.monotonic() < end:
            try:
                status = asked.call("status").data
                if isinstance(status, dict) and not status.get("busy"):
                    running = status.get("running")
                    return running if isinstance(running, bool) else None
            except XenvmError:  # that connection is of no more use
                if asked is not monitor:
                    asked.close()
                asked = Monitor.connect(monitor.uuid, reply_timeout_s=LOOK_S)
            time.sleep(LOOK_PAUSE_S)
    except XenvmError:  # nobody listens: the monitor has ended
        pass
    finally:
        if asked is not monitor:
            asked.close()
    return None


def restore(monitor: Monitor, given: Mapping[str, str]) -> Reply:
    """Bring the guest back from `file`, and remove that with `delete=true` once it has come back."""
    path = os.path.abspath(_file("restore", given))  # noqa: PTH100
    try:
        image = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise XenvmError(f"restore: cannot open {path}: {error.strerror}") from error
    try:
        monitor.handed = os.dup(image)
        reply = _watched(monitor, "restore", {**given, "file": path})
        if given.get("delete", "").lower() in ("true", "yes", "y", "1"):
            _remove(path, image)
        return reply
    finally:
        os.close(image)


def _remove(path: str, image: int) -> None:
    try:
        there, was = os.stat(path, follow_symlinks=False), os.fstat(image)  # noqa: PTH116
        if (there.st_dev, there.st_ino) != (was.st_dev, was.st_ino):
            raise XenvmError(f"the guest is restored; {path} is another file by now and stays")
        os.unlink(path)  # noqa: PTH108
    except OSError as error:
        raise XenvmError(f"the guest is restored, but {path} cannot be removed: {error.strerror}") from error


def _file(command: str, params: Mapping[str, str]) -> str:
    if not params.get("file"):
        raise UsageError(f"{command}: file= is missing")
    return params["file"]


def _watched(monitor: Monitor, command: str, params: Mapping[str, str]) -> Reply:
    """Give a command and draw, on a terminal, how far it is."""
    drawn = False

    def show(event: dict[str, object]) -> None:
        nonlocal drawn
        done, total = event.get("done_kib"), event.get("total_kib")
        if event.get("event") == "progress" and type(done) is int and type(total) is int and 0 < done <= total:
            drawn = True
            sys.stderr.write(f"\r{bar(done, total)}")
            sys.stderr.flush()

    try:
        return monitor.watch(command, show if _is_terminal() else lambda _event: None, **params)
    finally:
        if drawn:
            render.note("")


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def bar(done_kib: int, total_kib: int) -> str:
    """Return a bar that shows how much is done."""
    full = BAR_WIDTH * done_kib // total_kib
    mib = f"{done_kib >> 10} of {total_kib >> 10} MiB"
    return f"[{'#' * full}{' ' * (BAR_WIDTH - full)}] {100 * done_kib // total_kib:3} %, {mib}"
