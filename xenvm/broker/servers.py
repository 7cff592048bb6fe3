# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that serve images to a domain and outlive the monitor: known by pid and start time, ended with the disk."""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import os
import pwd
import select

from xenvm.boundary.privileges import TABLE, Role

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

END_WAIT_MS: Final = 3000


def server_uid() -> int:
    """Return the user that image servers run as; -1 when the host has none such."""
    try:
        return pwd.getpwnam(TABLE[Role.IMAGE].user or "").pw_uid
    except KeyError:
        return -1


def server_text(pid: int, uid: int | None = None) -> str:
    """Return pid and start time of a process (the form of Vbd.server), "" when there is none such.

    It must be one of the user `uid`, without which it is what server_uid says; who asks for many processes passes it.
    """
    try:
        descriptor = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        # Not the owner of the directory: that is root for a process that has changed its user.
        status = _read("status", descriptor)
        if int(status.partition(b"\nUid:")[2].split(None, 1)[0]) != (server_uid() if uid is None else uid):
            return ""
        fields = _read("stat", descriptor).rpartition(b")")[2].split()
        return f"{pid} {int(fields[19])}"  # starttime, the 22nd field of proc(5)
    except (OSError, IndexError, ValueError):
        return ""
    finally:
        os.close(descriptor)


def _read(name: str, directory: int) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def find_models(uuid: str, domid: int, uid: int) -> list[tuple[str, int]]:
    """Return text and user of each QEMU that was started for this domain of a VM.

    Its user is `uid`, or still root. What a process of anybody else says of itself is not looked at.
    """
    marks = (b"\0-xen-domid\0%d\0" % domid, b"\0-uuid\0%s\0" % uuid.encode("ascii"))
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib costs 5 ms at each start
        said = command_line(int(name)) if name.isdigit() else b""
        if all(mark in said for mark in marks):
            found += [(text, owner) for owner in (uid, 0) if (text := server_text(int(name), owner))]
    return found


def command_line(pid: int) -> bytes:
    """Return the beginning of a process's command line, b"" when there is none such."""
    try:
        directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return _read("cmdline", directory)
    except OSError:
        return b""
    finally:
        os.close(directory)


def open_server(text: str, uid: int) -> int:
    """Return a pidfd of the server of this text, -1 when it is no longer that process."""
    if not text:
        return -1
    pid = int(text.split()[0])
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return -1
    if server_text(pid, uid) == text:
        return pidfd
    os.close(pidfd)
    return -1


def end_server(text: str, uid: int | None = None) -> None:
    """End the server of this text if it still is that process: it flushes at the first request. Works twice."""
    if not text:
        return
    pid = int(text.split()[0])
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if server_text(pid, uid) != text:  # looked at after the pidfd is there: it cannot change any more
            return
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(pidfd, number)
            if poll.poll(END_WAIT_MS):
                return
    except (ProcessLookupError, PermissionError):  # it has ended, or is none of ours
        return
    finally:
        os.close(pidfd)
