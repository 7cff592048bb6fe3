# SPDX-License-Identifier: GPL-2.0-or-later
"""The file in which the brokers of one host tell each other what a look at all domains has shown.

The end of a domain names no domain, so that every monitor of the host has to learn whether it was its own. Whoever gets
the lock of the file has a builder look at all domains (SURVEY) and writes which run; the others find theirs there. Only
brokers can open the file, and a supervisor hears of it only how its own domain is. Whatever is odd about the file, or
about what is in it, ends in a look of one's own.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

from xenvm.boundary import survey
from xenvm.boundary.messages import DomainState, Done
from xenvm.boundary.place import HERE, LOOKS
from xenvm.boundary.privileges import Role
from xenvm.broker.actlog import hexdigest
from xenvm.broker.work import failed
from xenvm.context import suppress
from xenvm.errors import BusyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.messages import Ask, Domain
    from xenvm.broker.spares import Spares
    from xenvm.broker.work import Work

SIZE_LIMIT_BYTES: Final = 64 << 10
FEW_BYTES: Final = 512  # what is written of some ten domains


def consult(directory: str, ask: Ask, known: Domain, uuid: str) -> tuple[Message | None, int]:
    """Return the answer to a request for a look; or None, and the lock for a look at all domains.

    An answer is how another monitor's look, begun within the time that the request allows, has shown the domain: it
    runs, or is paused. So is BUSY, while another monitor looks. Without answer and lock (-1) the domain is to be looked
    at by itself.
    """
    since_ns = time.monotonic_ns() - ask.age_ms * 1_000_000
    lock = _open(directory)
    if lock < 0:
        return None, -1
    state, mine = None, False
    try:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        state = survey.told(_read(lock), known.domid, uuid, since_ns, time.monotonic_ns())
    except OSError:
        state = DomainState.ABSENT
    if mine and state is None:
        return None, lock
    os.close(lock)
    if state is None:
        return failed(ask.sequence, BusyError("another monitor looks at the host"), known), -1
    return None if state is DomainState.ABSENT else Done(ask.sequence, known.but(state=state), ""), -1


def keep(lock: int, work: Work | None, spares: Spares) -> None:
    """Hold the lock as long as the look lasts, or let it go where none has begun; -1 is none.

    On a host with few domains the one that has ended may well be one's own, and needs the next builder at once.
    """
    if lock >= 0 and work is None:
        os.close(lock)
    elif lock >= 0 and work:
        work.held.append(lock)
        if os.fstat(lock).st_size < FEW_BYTES:
            spares.make_ready(Role.BUILDER)


def publish(held: list[int], text: str) -> None:
    """Write what a look has shown, while holding the lock; what cannot be written only saves the others nothing."""
    with suppress(OSError):
        os.ftruncate(held[0], 0)
        os.pwrite(held[0], f"{text}\n{hexdigest(text.encode())}\n".encode(), 0)


def _open(directory: str) -> int:
    """Open the file; -1 when that cannot be, or when anybody else could have written it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    flags |= 0 if HERE.simulator else os.O_CREAT  # a simulated host makes and removes what is in its directory
    try:
        descriptor = os.open(f"{directory}/{LOOKS}", flags, 0o600)
    except OSError:
        return -1
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
        return descriptor
    os.close(descriptor)
    return -1


def _read(descriptor: int) -> str:
    """Return the line in the file; "" unless it is whole: another broker may be writing it just now."""
    untrusted = os.pread(descriptor, SIZE_LIMIT_BYTES + 1, 0)
    line, _, seal = untrusted.partition(b"\n")
    if len(untrusted) > SIZE_LIMIT_BYTES or not line.isascii() or seal != f"{hexdigest(line)}\n".encode():
        return ""
    return line.decode("ascii")
