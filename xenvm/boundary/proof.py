# SPDX-License-Identifier: GPL-2.0-or-later
"""What a confined process can say for itself: read back from the kernel, and tried.

The kernel shows identity, capabilities, no_new_privs and the seccomp mode in /proc; it shows nothing of Landlock. So
the process tries what must not work, and a refusal that does not come is an error.
"""

from __future__ import annotations

import errno
import os

from xenvm._confine import lib
from xenvm.boundary.privileges import PROT_EXEC
from xenvm.errors import XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Final

# The five sets as /proc/PID/status names them, proc(5).
CAPABILITY_SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
SECCOMP_FILTERED: Final = 2
_REFUSALS: Final = frozenset({errno.EPERM, errno.EACCES})
# One read(2) must give the whole file; Linux 6.18 writes about 1.5 KiB.
_STATUS_BYTES: Final = 16384

# Tried after the filter stands. If it did not stand, none of these would do any harm: the paths are null, the
# descriptor is none, the flags of clone contradict each other (CLONE_THREAD without CLONE_SIGHAND), nobody becomes
# the owner, and the page stays unused.
_AF_UNIX, _AF_INET, _SOCK_STREAM = 1, 2, 1
_CLONE_THREAD: Final = 0x10000
_F_SETOWN: Final = 8
_TIOCSTI: Final = 0x5412  # types into a terminal
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20
_CALLS: Final[tuple[tuple[str, bytes, tuple[int, ...]], ...]] = (
    ("socket AF_INET", b"socket", (_AF_INET, _SOCK_STREAM, 0)),
    ("socket AF_UNIX", b"socket", (_AF_UNIX, _SOCK_STREAM, 0)),
    ("connect", b"connect", (-1, 0, 0)),
    ("execve", b"execve", (0, 0, 0)),
    ("clone", b"clone", (_CLONE_THREAD, 0, 0)),
    ("fcntl F_SETOWN", b"fcntl", (1, _F_SETOWN, 0)),
    ("ioctl TIOCSTI", b"ioctl", (-1, _TIOCSTI, 0)),
    ("mmap PROT_EXEC", b"mmap", (0, 4096, PROT_EXEC, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)),
)


class ConfineError(XenvmError):
    """The process could not be confined, or a probe showed that it is not; it must end at once."""


class Proof(Record):
    """What confine() did, as the kernel shows it afterwards.

    `identity_changed` is False where the process kept the uid it was started with. `capabilities` are the five sets
    in the order of CAPABILITY_SETS. `landlock_abi` is the version applied: 0 when the row asks for none or the kernel
    has none. `probes` are pairs of what was tried and the error it met.
    """

    role: str
    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    identity_changed: bool
    capabilities: tuple[int, int, int, int, int]
    no_new_privs: bool
    seccomp: int
    landlock_abi: int
    probes: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, object]:
        """Give the proof as plain values for JSON, at most 1 KiB; capability sets are hexadecimal."""
        return {
            "role": self.role,
            "pid": self.pid,
            "uid": self.uid,
            "gid": self.gid,
            "groups": list(self.groups[:8]),
            "identity_changed": self.identity_changed,
            "capabilities": {
                name: f"{value:x}" for name, value in zip(CAPABILITY_SETS, self.capabilities, strict=True)
            },
            "no_new_privs": self.no_new_privs,
            "seccomp": self.seccomp,
            "landlock_abi": self.landlock_abi,
            "probes": dict(self.probes),
        }


class Status(Record):
    """The lines of /proc/PID/status that bear on privilege."""

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    threads: int
    capabilities: tuple[int, int, int, int, int]
    no_new_privs: bool
    seccomp: int


def open_status() -> int:
    """Open this process's own status, to be read again when nothing can be opened any more."""
    try:
        return os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfineError(
            f"/proc/self/status: {error.strerror}",
            hint="xenvm needs /proc to prove what its processes may do",
        ) from error


def read_status(descriptor: int) -> Status:
    """Read the present state through a descriptor of open_status()."""
    lines = os.pread(descriptor, _STATUS_BYTES, 0).decode("ascii", "replace").splitlines()
    return parse_status(dict(line.partition(":")[::2] for line in lines))


def parse_status(fields: Mapping[str, str]) -> Status:
    """Pick the fields of a status file; ConfineError when one is missing."""
    try:
        inheritable, permitted, effective, bounding, ambient = (int(fields[name], 16) for name in CAPABILITY_SETS)
        return Status(
            uids=tuple(map(int, fields["Uid"].split())),
            gids=tuple(map(int, fields["Gid"].split())),
            groups=tuple(map(int, fields["Groups"].split())),
            threads=int(fields["Threads"]),
            capabilities=(inheritable, permitted, effective, bounding, ambient),
            no_new_privs=int(fields["NoNewPrivs"]) == 1,
            seccomp=int(fields["Seccomp"]),
        )
    except (KeyError, ValueError) as error:
        raise ConfineError(f"/proc/self/status: cannot be understood at {error}") from error


def probe_identity() -> Iterator[tuple[str, str]]:
    """Try to take root and capabilities back; for a process that is not root, before its filter stands."""
    try:
        os.setresuid(0, 0, 0)
    except OSError as error:
        yield _refused("setuid 0", error.errno)
    else:
        raise ConfineError("probe: setuid 0 succeeded")
    yield probe_capabilities()


def probe_capabilities() -> tuple[str, str]:
    """Try to take every capability."""
    return _refused("capset", -lib.xenvm_set_capabilities((1 << 41) - 1))


def probe_open(label: str) -> tuple[str, str]:
    """Try to open the root directory, which every process could read if nothing but its uid held it back."""
    try:
        descriptor = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return _refused(label, error.errno)
    os.close(descriptor)
    raise ConfineError(f"probe: {label} succeeded")


def probe_calls() -> Iterator[tuple[str, str]]:
    """Try, under the filter, what no process but the broker may call."""
    for label, name, arguments in _CALLS:
        a, b, c, d, e, f = (*arguments, 0, 0, 0)[:6]
        result = lib.xenvm_syscall(lib.xenvm_syscall_number(name), a, b, c, d, e, f)
        yield _refused(label, -result)


def _refused(label: str, number: int | None) -> tuple[str, str]:
    """Accept only a refusal: any other error means that the call was looked at."""
    if number not in _REFUSALS:
        outcome = errno.errorcode.get(number, str(number)) if number is not None and number > 0 else "success"
        raise ConfineError(f"probe: {label} met {outcome}, not a refusal")
    return label, errno.errorcode[number]
