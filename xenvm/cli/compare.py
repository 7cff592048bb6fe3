# SPDX-License-Identifier: GPL-2.0-or-later
"""A live process beside its row of the privilege table, property by property. Pure: no I/O but the paths' own links.

Landlock shows nowhere in /proc, so what is known of it is what the process proved when it confined itself.
"""

from __future__ import annotations

import os

import prctl

from xenvm.boundary.privileges import FILE, LOG, PIPE, PRIVCMD, SOCKET, Landlock, Role
from xenvm.boundary.proof import CAPABILITY_SETS, SECCOMP_FILTERED
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from xenvm.boundary.privileges import Row
    from xenvm.boundary.proof import Proof
    from xenvm.cli.live import Descriptor, Live

HYPERVISOR: Final = frozenset({PRIVCMD, "/dev/xen/hypercall"})
"""Total power over the host, whatever the table says: for a builder only."""
STORE_ROLES: Final = frozenset({Role.WATCHER, Role.BUILDER, Role.HOTPLUG})
NETLINK_ROLES: Final = frozenset({Role.NETWORK, Role.STORAGE})
"""Interfaces are changed, and network block devices made, through netlink(7)."""
IMAGE_ROLES: Final = frozenset({Role.BROKER, Role.IMAGE, Role.STORAGE})
"""Who has the connection to what serves an image, on its way to the kernel."""
MACHINE_ROLES: Final = frozenset({Role.BROKER, Role.NETWORK})
"""Who asks the kernel for something, which on a simulated host goes through a socket."""
MODEL_PROGRAM: Final = "/usr/libexec/xen-qemu-system-i386"
MODEL_ROOT: Final = "/var/lib/xenvm/empty"
_BOTH_ENDS: Final = 2
"""A pipe of the device model leads from itself to itself."""
LANDLOCK_PROBE: Final = "open / under Landlock"  # what boundary.confine calls it


class Line(Record):
    """One property of a process: what the table says, what the process has, and whether that is a difference."""

    name: str
    table: str
    process: str
    differs: bool = False


class Expected(Record):
    """What a row means on this host, for one process.

    `command` is how it is started, `tails` what may follow that (None: anything). `filters` is how many seccomp
    filters it has at least, its ancestors' among them. `landlock` is the version that its proof must name. `logs` are
    the paths of the monitor's log, `acts` that of its act log. `images` begins the names of the sockets that images
    of the VM are served on, `model` is the QMP socket of its device model, which has another for saving. `simulator`
    is the directory of a simulated host, "" on a real one: there nobody has a capability, and the bounding set stays
    as it was.
    """

    uid: int
    gid: int
    command: tuple[str, ...]
    tails: frozenset[tuple[str, ...]] | None
    filters: int
    landlock: int
    logs: frozenset[str]
    acts: str
    images: str
    simulator: str = ""
    model: str = ""


def lines(row: Row, process: Live, proof: Proof | None, expected: Expected) -> list[Line]:
    """Return every property of a process beside what its row says."""
    return [
        _program(process, expected),
        *_identity(row, process, expected),
        *_capabilities(row, process, expected),
        *_seccomp(row, process, expected),
        *_limits(row, process),
        *_descriptors(row, process, expected),
        *_sockets(row, process, expected),
        *_proof(row, process, proof, expected),
    ]


def server_lines(row: Row, process: Live, expected: Expected) -> list[Line]:
    """Return the properties that a program which an image worker has started inherits from its row."""
    identity = [line for line in _identity(row, process, expected) if line.name != "threads"]
    return [
        *identity,
        *_capabilities(row, process, expected),
        *_seccomp(row, process, expected),
        *_limits(row, process),
    ]


def model_lines(row: Row, process: Live, expected: Expected, root: str) -> list[Line]:
    """Return the properties of a device model: what a devicemodel worker has left it, and what it gave up itself.

    `root` is the directory that it has as its root.
    """
    empty = os.path.realpath(root) == MODEL_ROOT
    identity = [line for line in _identity(row, process, expected) if line.name not in ("threads", "groups")]
    groups = process.status.groups
    capabilities = list(_capabilities(row, process, expected))
    mine = [line if line.name == "CapBnd" else _none(line) for line in capabilities]
    targets = [d.target for d in process.descriptors]
    wrong = [
        descriptor
        for descriptor in process.descriptors
        if _kind(row, descriptor, expected) not in row.extra_descriptors | {LOG}
        or (descriptor.kind == PIPE and targets.count(descriptor.target) != _BOTH_ENDS)
    ]
    kinds = [_kind(row, descriptor, expected) for descriptor in process.descriptors]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    shown = ", ".join(_shown(process, d.number, d.kind) for d in wrong) or counts
    return [
        Line("program", MODEL_PROGRAM, process.program, process.program != MODEL_PROGRAM),
        *identity,
        Line("groups", str(expected.gid), " ".join(map(str, groups)), set(groups) - {expected.gid} != set()),
        *mine,
        *_seccomp(row, process, expected),
        *_limits(row, process),
        Line("root directory", f"{MODEL_ROOT}, empty", root, not empty),
        Line("descriptors", ", ".join(sorted(row.extra_descriptors)), shown, bool(wrong)),
    ]


def _none(line: Line) -> Line:
    return line.but(table="none", differs=line.process != "none")


def _program(process: Live, expected: Expected) -> Line:
    length = len(expected.command)
    words, tail = process.arguments[:length], process.arguments[length:]
    fits = (
        process.program == os.path.realpath(expected.command[0])
        and bool(words)
        and os.path.realpath(words[0]) == process.program
        and words[1:] == expected.command[1:]
        and (expected.tails is None or tail in expected.tails)
    )
    table = " ".join(expected.command[1:]) + (
        "" if expected.tails is None else f" {' or '.join(' '.join(tail) for tail in sorted(expected.tails))}"
    )
    shown = " ".join(process.arguments[1:])
    if not fits:
        table, shown = f"{expected.command[0]} {table}", f"{process.program}: {' '.join(process.arguments)}"
    return Line("program", table, shown, not fits)


def _identity(row: Row, process: Live, expected: Expected) -> Iterator[Line]:
    status = process.status
    for name, wanted, held in (("uid", expected.uid, status.uids), ("gid", expected.gid, status.gids)):
        shown = str(held[0]) if len(set(held)) == 1 else " ".join(map(str, held))
        yield Line(name, f"{wanted} ({row.user or 'root'})", shown, set(held) != {wanted})
    yield Line("groups", "none", " ".join(map(str, status.groups)) or "none", bool(status.groups))
    yield Line("threads", "1", str(status.threads), status.threads != 1)


def _capabilities(row: Row, process: Live, expected: Expected) -> Iterator[Line]:
    wanted = 0
    for name in () if expected.simulator else row.capabilities:
        wanted |= 1 << getattr(prctl, name)
    for name, held in zip(CAPABILITY_SETS, process.status.capabilities, strict=True):
        if expected.simulator and name == "CapBnd":
            continue
        mask = 0 if name in ("CapInh", "CapAmb") else wanted
        yield Line(name, _names_of(mask), _names_of(held), held != mask)


_NOT_CAPABILITIES: Final = frozenset({"CAP_EFFECTIVE", "CAP_INHERITABLE", "CAP_PERMITTED", "CAP_LAST_CAP"})
_CAPABILITIES: Final = {
    getattr(prctl, name): name.removeprefix("CAP_")
    for name in dir(prctl)
    if name.startswith("CAP_") and name not in _NOT_CAPABILITIES
}


def _names_of(mask: int) -> str:
    held = [_CAPABILITIES.get(bit, f"CAP_{bit}") for bit in range(64) if mask >> bit & 1]
    return " ".join(sorted(held)) or "none"


def _seccomp(row: Row, process: Live, expected: Expected) -> Iterator[Line]:
    status = process.status
    yield Line(
        "no_new_privs", _yes(row.no_new_privs), _yes(status.no_new_privs), status.no_new_privs != row.no_new_privs
    )
    modes = {0: "no", 1: "strict", SECCOMP_FILTERED: "filtered"}
    mode = modes.get(status.seccomp, str(status.seccomp))
    yield Line("seccomp", modes[SECCOMP_FILTERED], mode, status.seccomp != SECCOMP_FILTERED)
    if process.filters is not None:
        few = process.filters < expected.filters
        yield Line("filters", f"{expected.filters} or more", str(process.filters), few)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _limits(row: Row, process: Live) -> Iterator[Line]:
    for name, most in row.limits.items():
        hard = process.limits[name]
        shown = "unlimited" if hard < 0 else str(hard)
        yield Line(f"limit {name}", f"at most {most}", shown, not 0 <= hard <= most)


def _descriptors(row: Row, process: Live, expected: Expected) -> Iterator[Line]:
    kinds = {descriptor.number: _kind(row, descriptor, expected) for descriptor in process.descriptors}
    for number, wanted in sorted(row.descriptors.items()):
        kind = kinds.get(number, "closed")
        fits = kind == wanted or (kind, wanted) == (LOG, FILE)
        yield Line(f"descriptor {number}", wanted, kind if fits else _shown(process, number, kind), not fits)
    allowed = row.extra_descriptors | ({LOG} if FILE in row.extra_descriptors else frozenset())
    extra = {number: kind for number, kind in kinds.items() if number not in row.descriptors and kind not in HYPERVISOR}
    wrong = {number: kind for number, kind in extra.items() if kind not in allowed}
    counts = {kind: list(extra.values()).count(kind) for kind in sorted(set(extra.values()))}
    yield Line(
        "other descriptors",
        ", ".join(sorted(row.extra_descriptors - HYPERVISOR)) or "none",
        ", ".join(_shown(process, number, kind) for number, kind in wrong.items())
        or ", ".join(f"{count} {kind}" for kind, count in counts.items())
        or "none",
        bool(wrong),
    )
    held = [f"{number} {kind}" for number, kind in kinds.items() if kind in HYPERVISOR]
    may = row.role is Role.BUILDER
    yield Line("hypervisor", "may be held" if may else "none", ", ".join(held) or "none", bool(held) and not may)


def _kind(row: Row, descriptor: Descriptor, expected: Expected) -> str:
    """Return the kind by which the table knows a descriptor; the act log is nothing but the broker's."""
    if descriptor.kind != FILE:
        return descriptor.kind
    path = descriptor.target.removesuffix(" (deleted)")
    if any(path == log or path.startswith(log + ".") for log in expected.logs):
        return LOG
    if path.startswith(expected.acts) and row.role is not Role.BROKER:
        return "act log"
    return FILE


def _shown(process: Live, number: int, kind: str) -> str:
    target = next((descriptor.target for descriptor in process.descriptors if descriptor.number == number), kind)
    return f"{number} {kind}" if target.startswith(kind) else f"{number} {kind} {target}"


def _sockets(row: Row, process: Live, expected: Expected) -> Iterator[Line]:
    """Look whom a process talks to besides its family and its clients: the kernel or xenstored, as its role says."""
    families = {"UNIX", "NETLINK"} if row.role in NETLINK_ROLES else {"UNIX"}
    foreign, clients, store = [], [], []
    machine = f"{expected.simulator}/xenstored/machine"
    for descriptor in process.descriptors:
        if descriptor.kind != SOCKET:
            continue
        if descriptor.protocol.partition("-")[0] not in families:
            foreign.append(f"{descriptor.number} {descriptor.protocol}")
        elif _of_this_vm(row, descriptor, expected):
            continue
        elif is_store(descriptor.peer) or (expected.simulator and descriptor.peer == machine):
            store.append(f"{descriptor.number} {descriptor.peer}")
        elif descriptor.peer and not descriptor.name:
            clients.append(f"{descriptor.number} to {descriptor.peer}")
    table = ", ".join(sorted(families, reverse=True)).lower()
    yield Line("socket families", table, ", ".join(foreign) or table, bool(foreign))
    may = row.role in STORE_ROLES or (bool(expected.simulator) and row.role in MACHINE_ROLES)
    yield Line("xenstored", "may be connected" if may else "none", ", ".join(store) or "none", bool(store) and not may)
    yield Line("other servers", "none", ", ".join(clients) or "none", bool(clients))


def _of_this_vm(row: Row, descriptor: Descriptor, expected: Expected) -> bool:
    """Tell whether a socket leads to an image server or to the device model, for whom that is meant."""
    if row.role in IMAGE_ROLES and descriptor.peer.startswith(expected.images):
        return True
    models = {Role.SUPERVISOR: expected.model, Role.QMP: f"{expected.model}.save"}
    return expected.model != "" and descriptor.peer == models.get(row.role)


def is_store(name: str) -> bool:
    """Tell whether a socket of this name is xenstored's."""
    return name.endswith(("xenstored/socket", "xenstored/socket_ro"))


def _proof(row: Row, process: Live, proof: Proof | None, expected: Expected) -> Iterator[Line]:
    if proof is None:
        yield Line("proof", "in the act log", "none", differs=True)
        return
    status = process.status
    claims = (
        ("role", proof.role, row.role.value),
        ("pid", proof.pid, process.pid),
        ("uid", proof.uid, status.uids[0]),
        ("gid", proof.gid, status.gids[0]),
        ("groups", proof.groups, status.groups),
        ("capabilities", proof.capabilities, status.capabilities),
        ("no_new_privs", proof.no_new_privs, status.no_new_privs),
        ("seccomp", proof.seccomp, status.seccomp),
    )
    wrong = [name for name, claimed, is_so in claims if claimed != is_so]
    yield Line("proof", "agrees with the kernel", "differs in " + ", ".join(wrong) if wrong else "agrees", bool(wrong))
    abi = expected.landlock if row.landlock is not Landlock.UNRESTRICTED else 0
    unproved = proof.landlock_abi > 0 and LANDLOCK_PROBE not in dict(proof.probes)
    shown = f"version {proof.landlock_abi}" + (", without its probe" if unproved else "")
    yield Line("Landlock", f"{row.landlock.value}: version {abi}", shown, unproved or proof.landlock_abi != abi)
