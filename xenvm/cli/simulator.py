# SPDX-License-Identifier: GPL-2.0-or-later
"""`xenvm --simulator FILE`: find or start the simulated host that its monitor is to serve, and say what that means."""

from __future__ import annotations

import os
import select
import socket
import stat
import sys
import time

from xenvm.boundary.place import MARK, OPTION, Place
from xenvm.boundary.spawn import spawn
from xenvm.errors import ExitCode, XenvmError
from xenvm.simulator.client import Machine, MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

START_WAIT_S: Final = 30.0
RETRY_S: Final = 0.05
PATH_LIMIT_BYTES: Final = 60  # the name of a command socket is added, and a socket's path ends at 107, unix(7)
XENS_DIRECTORY: Final = "/run/xenvm"
_kept: Final[list[Machine]] = []


KEPT = frozenset({"log", "console", "simulator.log", "policy.toml"})
"""What stays of a simulated host that has ended."""


def prepare() -> Place:
    """Return the simulated host of whoever runs this, started if need be; raise XenvmError when there can be none."""
    if os.geteuid() == 0:
        raise XenvmError(
            f"{OPTION} is not for root: a simulated host needs no privilege, and takes none",
            hint="run it as an ordinary user; setpriv --reuid=65534 --regid=65534 --clear-groups makes one of root",
            code=ExitCode.PERMISSION_REFUSED,
        )
    directory = _directory()
    running = _start(directory)
    sys.stderr.write(
        f"{'using' if running else 'started'} the simulated host in {directory}: no Xen, no guest code is run\n"
        "not in force: users of their own and capabilities (all processes run as you)\n"
    )
    if os.environ.get("XENVM_SOCKET_DIR") != directory:
        sys.stderr.write(f"for xenvm-cmd: export XENVM_SOCKET_DIR={directory}\n")
    sys.stderr.flush()
    return Place(directory)


def _directory() -> str:
    """Return the directory of the simulated host: $XENVM_SOCKET_DIR, else one below $XDG_RUNTIME_DIR."""
    given = os.environ.get("XENVM_SOCKET_DIR", "")
    above = os.environ.get("XDG_RUNTIME_DIR", "")
    if not given and not above:
        raise XenvmError(
            "where is the simulated host to be? Neither XENVM_SOCKET_DIR nor XDG_RUNTIME_DIR is set",
            hint="export XENVM_SOCKET_DIR=$(mktemp -d)",
        )
    directory = os.path.abspath(given or f"{above}/xenvm")  # noqa: PTH100 - pathlib costs 5 ms
    if os.path.realpath(directory) == XENS_DIRECTORY:
        raise XenvmError(f"{directory} is for the monitors of Xen's guests", hint="choose another XENVM_SOCKET_DIR")
    if len(os.fsencode(directory)) > PATH_LIMIT_BYTES:
        raise XenvmError(f"{directory} is too long for the names of sockets", hint="choose a shorter XENVM_SOCKET_DIR")
    try:
        os.mkdir(directory, 0o700)  # noqa: PTH102
    except FileExistsError:
        _check(directory)
    except OSError as error:
        raise XenvmError(f"cannot make {directory}: {error.strerror}") from error
    return directory


def _check(directory: str) -> None:
    """Refuse a directory that is somebody else's, or holds something else: a simulated host makes and removes in it."""
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise XenvmError(
            f"{directory} is not a directory that only you can change", hint="export XENVM_SOCKET_DIR=$(mktemp -d)"
        )
    names = set(os.listdir(directory))  # noqa: PTH208
    if MARK not in names and names - KEPT:
        raise XenvmError(
            f"{directory} has something else in it, and was never a simulated host's",
            hint="give XENVM_SOCKET_DIR an empty directory of its own",
        )


def _start(directory: str) -> bool:
    """Start the host's process unless it runs; tell whether it did.

    Of several that are started at once, one serves; one that is just ending is waited for.
    """
    if _runs(directory):
        return True
    end = time.monotonic() + START_WAIT_S
    while time.monotonic() < end:
        _spawn(directory, end)
        if _runs(directory):
            return False
        time.sleep(RETRY_S)
    raise XenvmError(
        f"the simulated host in {directory} did not start within {START_WAIT_S:g} s",
        hint=f"see {directory}/simulator.log",
    )


def _spawn(directory: str, end: float) -> None:
    """Start a process for the host, and wait until it serves or has ended, which it does when there is one already."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            log = os.open(f"{directory}/simulator.log", flags, 0o600)
            spawn("simulator", {0: null, 1: log, 2: log, 3: theirs.fileno()}, directory, new_session=True)
            os.close(null)
            os.close(log)
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        poll.poll(max(0.0, end - time.monotonic()) * 1000)  # it closes its end when it serves


def _runs(directory: str) -> bool:
    """Tell whether a host serves there; if so it does not end for want of guests as long as this process lives.

    Asked is the host itself. Trying its lock would, for an instant, keep another one from taking it.
    """
    try:
        machine = Machine(Place(directory).machine)
        machine.call("info")
    except MachineError:
        return False
    _kept.append(machine)
    return True
