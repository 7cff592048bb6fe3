# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images: opened, named and removed here, with the rights of whoever runs xenvm-cmd; the monitor gets descriptors.

An image is written into a file without a name. Only when it is whole and on the disk it gets the name, in one step;
only after that the domain is ended. Whatever goes wrong before leaves the guest running and an older file as it was:
that one is kept beside until it is certain that the guest has not run on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from xenvm import forms
from xenvm.cli import render
from xenvm.cli.client import Monitor
from xenvm.errors import PermissionRefusedError, UsageError, XenvmError
from xenvm.imageplace import Target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from xenvm.cli.client import Reply

BAR_WIDTH: Final = 40
LOOK_S: Final = 30.0  # for a monitor to say what has become of the guest
LOOK_PAUSE_S: Final = 0.2


def save(monitor: Monitor, command: str, given: Mapping[str, str]) -> Reply:
    """Suspend or checkpoint the guest into `file`; return the last reply.

    Where the caller may not write, the monitor does if the host's policy lets it.
    """
    try:
        place = Target(command, _file(command, given))
    except PermissionRefusedError:
        reply = _watched(monitor, command, {**given, "file": os.path.abspath(given["file"])})  # noqa: PTH100
        form = reply
        if command == "suspend":
            reply = monitor.call("commit")
        _tell_form(form, given["file"])
        return reply
    try:
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
        _tell_form(reply, place.path)
        return reply
    finally:
        place.close()


def _tell_form(reply: Reply, path: str) -> None:
    """Say of a compressed image who can read it."""
    form = reply.data.get("image_compression") if isinstance(reply.data, dict) else None
    if form == "zstd":
        render.note(f"{path} is compressed: xl cannot read it; `zstd -d` makes of it an image that xl can")


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
    except PermissionError:  # the host's policy may let the monitor open it
        return _watched(monitor, "restore", {**given, "file": path})
    except OSError as error:
        raise XenvmError(f"restore: cannot open {path}: {error.strerror}") from error
    try:
        monitor.handed = os.dup(image)
        reply = _watched(monitor, "restore", {**given, "file": path})
        if given.get("delete", "").lower() in forms.TRUE:
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
