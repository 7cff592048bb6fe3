# SPDX-License-Identifier: GPL-2.0-or-later
"""The process of a simulated host: `_start.py simulator DIRECTORY`, started by `xenvm --simulator FILE`.

Descriptor 3 is closed when it serves. It ends by itself when it has had neither a domain nor a connection for a while,
and at SIGTERM, as if the host's power were cut. It is never root.

1. take the lock of DIRECTORY, make the sockets;
2. give up all capabilities, new programs and new processes;
3. serve.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys

from xenvm.boundary.confine import confine
from xenvm.boundary.place import LOOKS, MARK
from xenvm.boundary.privileges import TABLE, Role
from xenvm.simulator.loop import Loop
from xenvm.simulator.machine import Machine

READY = 3
LINGER_S = 5.0
TURN_S = 1.0


def main() -> int:
    """Run one simulated host; return its exit status."""
    directory = sys.argv[2]
    os.umask(0o077)
    lock = _take_lock(f"{directory}/{MARK}")
    if lock < 0:
        return 0  # another one was faster
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
    for name in ("sys", "xenstored"):  # of one that was killed
        shutil.rmtree(f"{directory}/{name}", ignore_errors=True)
    for name in ("log", "console", "xenstored"):
        os.makedirs(f"{directory}/{name}", exist_ok=True)  # noqa: PTH103
    looks = os.open(f"{directory}/{LOOKS}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.close(looks)
    loop = Loop()
    machine = Machine(loop, directory)
    wakeup = _signals()
    ours = frozenset(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    confine(TABLE[Role.SIMULATOR], uid=None, gid=None, keep=ours)

    def stop(_events: int) -> None:
        loop.running = False

    idle_s = 0.0

    def turn() -> None:
        nonlocal idle_s
        idle_s = idle_s + TURN_S if machine.idle else 0.0
        loop.running = loop.running and idle_s < LINGER_S
        loop.after(TURN_S, turn)

    loop.watch(wakeup, stop)
    loop.after(TURN_S, turn)
    os.close(READY)
    loop.run()
    machine.close()
    for name in ("sys", "xenstored"):
        shutil.rmtree(f"{directory}/{name}", ignore_errors=True)
    for name in (LOOKS, MARK):  # the mark last, while the lock is held
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")  # noqa: PTH108
    return 0


def _take_lock(path: str) -> int:
    """Return the open lock, -1 when another process has it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return -1
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # of one that has ended since: the next to come would take another file of this name


def _signals() -> int:
    readable, writable = socket.socketpair()
    readable.setblocking(False)
    writable.setblocking(False)
    signal.set_wakeup_fd(writable.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return readable.detach()
