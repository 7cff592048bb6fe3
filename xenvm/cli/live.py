# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel shows of a monitor and of its processes. Judges nothing; needs root.

Identity, capabilities, limits and descriptors come from /proc, who is at the other end of a unix socket from
sock_diag(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import time

import psutil

from xenvm import forms
from xenvm.boundary.privileges import PTY, SOCKET, TABLE, Role
from xenvm.boundary.proof import parse_status
from xenvm.cli.client import NoMonitorError, only_one, uuids_of
from xenvm.errors import PermissionRefusedError, XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Final

    from xenvm.boundary.proof import Status

PID_WAIT_S: Final = 2.0
"""How long a monitor that has its lock may take to write its process number into it."""
UNKNOWN_PEER: Final = "?"
"""The other end of a socket that the kernel does not list here, because it is in another network name space."""
LIMIT_TITLES: Final = {
    "AS": "Max address space",
    "CORE": "Max core file size",
    "CPU": "Max cpu time",
    "FSIZE": "Max file size",
    "MEMLOCK": "Max locked memory",
    "NOFILE": "Max open files",
    "NPROC": "Max processes",
}
"""The titles of /proc/PID/limits, proc(5), for the limits that the table names."""
_LIMITS_COLUMN: Final = 26  # where the soft limit begins, fs/proc/base.c; the hard limit and the unit follow
DEVICES: Final = frozenset(
    kind
    for row in TABLE.values()
    for kind in (*row.descriptors.values(), *row.extra_descriptors)
    if kind.startswith("/dev/")
)
_PTY_MAJORS: Final = range(136, 144)  # UNIX98_PTY_SLAVE_MAJOR, linux/major.h
_REFERENCE_KINDS: Final = {stat.S_IFREG: "file", stat.S_IFBLK: "block", stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe"}

# linux/netlink.h, linux/sock_diag.h and linux/unix_diag.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x01, 0x300, 0x10
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_NAME, _UDIAG_SHOW_PEER, _UDIAG_SHOW_ICONS = 1, 4, 8
_UNIX_DIAG_NAME, _UNIX_DIAG_PEER, _UNIX_DIAG_ICONS = 0, 2, 3
_ANY: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_REQUEST: Final = struct.Struct("=BBHIIIII")  # struct unix_diag_req
_ANSWER: Final = struct.Struct("=BBBBIII")  # struct unix_diag_msg
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr
_DUMP_BYTES: Final = 1 << 18  # the kernel sends at most 32 KiB at a time
_DUMP_TRIES: Final = 5
_DUMP_WAIT_S: Final = 10.0


class GoneError(XenvmError):
    """The process has ended."""


class Descriptor(Record):
    """One open descriptor.

    `kind` is one of those the privilege table knows, or what the kernel calls it. `target` is the text of the link in
    /proc/PID/fd. Of a socket, `protocol` is the kernel's name (UNIX, UNIX-STREAM, TCP, ...), `name` what it is bound
    to and `peer` what its other end is bound to, both empty for nothing, abstract names with a leading @.
    """

    number: int
    kind: str
    target: str
    protocol: str = ""
    name: str = ""
    peer: str = ""


class Live(Record):
    """One running process.

    `started` is in seconds since 1970. `filters` is the number of seccomp filters, None before Linux 5.9, which does
    not tell. `limits` are the hard limits, -1 for none, by their names without RLIMIT_.
    """

    pid: int
    started: float
    program: str
    arguments: tuple[str, ...]
    status: Status
    filters: int | None
    limits: Mapping[str, int]
    descriptors: tuple[Descriptor, ...]


# -- the monitor ----------------------------------------------------------------------------------------------------


def find_uuid(directory: str, word: str) -> str:
    """Return the uuid that `word` is or uniquely begins, among the locks in `directory`.

    UsageError lists the candidates when there are several; NoMonitorError when there is none.
    """
    lowered = word.lower()
    if forms.uuid(lowered):
        return lowered
    try:
        names = os.listdir(directory)  # noqa: PTH208
    except OSError as error:
        raise NoMonitorError(f"{directory}: {error.strerror}", hint="no monitor was started there yet") from None
    return only_one(word, (uuid for uuid in uuids_of(names, "lock-") if uuid.startswith(lowered)))


def find_broker(directory: str, uuid: str) -> int:
    """Return the process number of the broker that holds the lock of `uuid`; NoMonitorError when nobody holds it.

    A lock that nobody holds is ours for an instant. A monitor that starts in that very instant says it is busy.
    """
    path = f"{directory}/lock-{uuid}"
    nobody = NoMonitorError(f"no monitor runs for {uuid}", hint="`xenvm-cmd list` shows those running")
    deadline = time.monotonic() + PID_WAIT_S
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise nobody from None
    except PermissionError:
        raise PermissionRefusedError(f"{path}: permission refused", hint="xenvm-audit needs root") from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = os.pread(descriptor, 16, 0)
            else:
                raise nobody
            if text.endswith(b"\n") and text[:-1].isdigit():
                return int(text)
            if time.monotonic() > deadline:
                raise XenvmError(f"{path} is held but names no process")
            time.sleep(0.05)
    finally:
        os.close(descriptor)


def processes(broker: int) -> list[int]:
    """Return the broker and all that descend from it; GoneError when it has ended."""
    try:
        root = psutil.Process(broker)
        return [broker, *sorted(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        raise GoneError(f"process {broker} has ended") from None


def servers(program: str, uid: int, mark: str) -> list[int]:
    """Return the processes of user `uid` that run `program` with `mark` in an argument, whoever their parent is."""
    found = []
    for process in psutil.process_iter():
        try:
            fits = process.uids().real == uid and process.exe() == program and mark in " ".join(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        if fits:
            found.append(process.pid)
    return sorted(found)


def role_of(arguments: Iterable[str]) -> Role | None:
    """Return the role that follows `_start.py` in an argument list; None when there is none."""
    words = iter(arguments)
    for word in words:
        if word.rpartition("/")[2] == "_start.py":
            name = next(words, "")
            return Role(name) if name in set(Role) else None
    return None


# -- one process ----------------------------------------------------------------------------------------------------


def look(pid: int) -> Live:
    """Return what the kernel shows of a process; GoneError when it has ended or ends meanwhile."""
    try:
        process = psutil.Process(pid)
        fields = _status_fields(pid)
        filters = fields.get("Seccomp_filters")
        live = Live(
            pid=pid,
            started=process.create_time(),
            program=os.readlink(f"/proc/{pid}/exe"),  # noqa: PTH115
            arguments=tuple(process.cmdline()),
            status=parse_status(fields),
            filters=None if filters is None else int(filters),
            limits=_limits(pid),
            descriptors=_descriptors(pid),
        )
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return live
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        pass
    except (PermissionError, psutil.AccessDenied):
        raise PermissionRefusedError(f"process {pid} may not be looked at", hint="xenvm-audit needs root") from None
    raise GoneError(f"process {pid} has ended")


def _status_fields(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
        return {name: value.strip() for name, _, value in (line.partition(":") for line in status)}


def _limits(pid: int) -> dict[str, int]:
    """Return the hard limits; prlimit(2) would need CAP_SYS_RESOURCE besides."""
    limits = {}
    with open(f"/proc/{pid}/limits", encoding="ascii") as lines:  # noqa: PTH123
        for line in lines:
            for name, title in LIMIT_TITLES.items():
                if line[:_LIMITS_COLUMN].rstrip() == title:
                    hard = line[_LIMITS_COLUMN:].split()[1]
                    limits[name] = -1 if hard == "unlimited" else int(hard)
    return limits


def _descriptors(pid: int) -> tuple[Descriptor, ...]:
    directory = f"/proc/{pid}/fd"
    devices = _known_devices()
    found = []
    for number in sorted(map(int, os.listdir(directory))):  # noqa: PTH208
        path = f"{directory}/{number}"
        try:
            target = os.readlink(path)  # noqa: PTH115
            if target.startswith("socket:["):
                protocol = os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode("ascii", "replace")
                found.append(Descriptor(number, SOCKET, target, protocol))
            else:
                found.append(Descriptor(number, _kind(path, target, devices), target))
        except FileNotFoundError:  # closed meanwhile
            continue
    if not any(_is_unix(descriptor) for descriptor in found):
        return tuple(found)
    sockets = unix_sockets()  # after the descriptors, so that it has all that are still open
    named = (
        _with_names(descriptor, sockets, directory) if _is_unix(descriptor) else descriptor for descriptor in found
    )
    return tuple(descriptor for descriptor in named if descriptor)


def _is_unix(descriptor: Descriptor) -> bool:
    return descriptor.protocol.startswith("UNIX")


def _with_names(descriptor: Descriptor, sockets: Mapping[int, tuple[str, str]], directory: str) -> Descriptor | None:
    inode = int(descriptor.target.removeprefix("socket:[").removesuffix("]"))
    if inode in sockets:
        name, peer = sockets[inode]
        return descriptor.but(name=name, peer=peer)
    try:
        still_open = os.readlink(f"{directory}/{descriptor.number}") == descriptor.target  # noqa: PTH115
    except FileNotFoundError:
        still_open = False
    return descriptor.but(peer=UNKNOWN_PEER) if still_open else None


def _known_devices() -> dict[int, str]:
    """Return the table's devices by their numbers, so that no other node of the same device goes unseen."""
    known = {}
    for path in DEVICES:
        try:
            known[os.stat(path).st_rdev] = path  # noqa: PTH116
        except OSError:
            continue
    return known


def _kind(path: str, target: str, devices: Mapping[int, str]) -> str:
    if target.startswith("anon_inode:"):
        return target
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISCHR(status.st_mode):
        return _REFERENCE_KINDS.get(stat.S_IFMT(status.st_mode), target)
    if os.major(status.st_rdev) in _PTY_MAJORS:
        return PTY
    return devices.get(status.st_rdev, f"device {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")


# -- unix sockets ---------------------------------------------------------------------------------------------------


def unix_sockets() -> dict[int, tuple[str, str]]:
    """Return, for each unix socket of this network name space by inode, its own name and that of its other end.

    XenvmError when the kernel does not tell.
    """
    for _ in range(_DUMP_TRIES):
        names: dict[int, str] = {}
        peers: dict[int, int] = {}
        waiting: dict[int, str] = {}  # clients in the queue of a listener, whose own end has no inode yet
        try:
            complete = _dump(names, peers, waiting)
        except OSError as error:
            raise XenvmError(
                f"the kernel does not list unix sockets: {error.strerror or error}", hint="modprobe unix_diag"
            ) from error
        if complete:
            return {
                inode: (name, names.get(peers.get(inode, 0), waiting.get(inode, ""))) for inode, name in names.items()
            }
    raise XenvmError("the list of unix sockets changes faster than it can be read", hint="try again")


def _dump(names: dict[int, str], peers: dict[int, int], waiting: dict[int, str]) -> bool:
    """Fill in all sockets; tell whether the kernel could keep the list still meanwhile."""
    show = _UDIAG_SHOW_NAME | _UDIAG_SHOW_PEER | _UDIAG_SHOW_ICONS
    body = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ANY, 0, show, _ANY, _ANY)
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    complete = True
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_DUMP_WAIT_S)
        kernel.sendall(header + body)
        while True:
            answer = kernel.recv(_DUMP_BYTES)
            at = 0
            while at + _HEADER.size <= len(answer):
                length, kind, flags, _, _ = _HEADER.unpack_from(answer, at)
                message = answer[at + _HEADER.size : at + length]
                complete = complete and not flags & _NLM_F_DUMP_INTR
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    code: int = struct.unpack_from("=i", message)[0]
                    if code < 0:
                        raise OSError(-code, os.strerror(-code))
                    return complete
                inode: int = _ANSWER.unpack_from(message)[4]
                found = dict(_attributes(message[_ANSWER.size :]))
                if inode:  # else it is the end of a client whom nobody has accepted yet
                    names[inode] = _name(found.get(_UNIX_DIAG_NAME, b""))
                    peers[inode] = int.from_bytes(found.get(_UNIX_DIAG_PEER, b""), sys.byteorder)
                    queue = found.get(_UNIX_DIAG_ICONS, b"")
                    waiting |= dict.fromkeys(struct.unpack(f"={len(queue) // 4}I", queue), names[inode])
                at += _aligned(length)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _name(value: bytes) -> str:
    if value.startswith(b"\0"):
        return "@" + os.fsdecode(value[1:])
    return os.fsdecode(value.rstrip(b"\0"))
