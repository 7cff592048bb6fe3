# SPDX-License-Identifier: GPL-2.0-or-later
"""Make this process equal its row of the privilege table, and prove it.

Imported early by every process, so it takes in nothing but the kernel's interfaces: no ctypes, no cffi, no subprocess.
Capabilities, Landlock and parent-death signals belong to a thread; confine() refuses a process that has a second one.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import errno
import os
import resource

import prctl

from xenvm._confine import ffi, lib
from xenvm.boundary.privileges import FCNTL_COMMANDS, KILL_LIST, NO_EXECUTABLE_MEMORY, PROT_EXEC, Landlock, Role, Row
from xenvm.boundary.proof import (
    SECCOMP_FILTERED,
    ConfineError,
    Proof,
    Status,
    open_status,
    probe_calls,
    probe_capabilities,
    probe_identity,
    probe_open,
    read_status,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = [
    "ConfineError",
    "Proof",
    "become",
    "confine",
    "direct_open_listener",
    "filter_program",
    "forbid_children_and_networks",
]

_LAST_DESCRIPTOR: Final = 0xFFFFFFFF  # close_range(2): the largest unsigned int
_HIGHEST_CAPABILITY: Final = 63  # the sets are 64 bits wide
CLONE_THREAD: Final = 0x10000  # linux/sched.h
_PERMITTED, _EFFECTIVE = 1, 2  # places in Status.capabilities

# Landlock.READ_SYSTEM: a program of Debian, its libraries, and where the loader looks them up, to read and run. And
# /dev/null to read and write: without it QEMU does not find out that it can lock its images (util/osdep.c).
_SYSTEM: Final = (b"/usr", b"/lib", b"/lib64", b"/etc/ld.so.cache", b"/dev/null")
# Landlock.DEVICE_MODEL: what QEMU opens while it is root, before it changes its root directory.
_DEVICE_MODEL: Final = (
    *_SYSTEM,
    *(b"/dev/xen/privcmd", b"/dev/xen/hypercall", b"/dev/xen/evtchn", b"/dev/xen/gntdev", b"/dev/ptmx", b"/dev/pts"),
    *(b"/dev/urandom", b"/run/xenstored/socket"),
)
_ALLOWED: Final = {Landlock.NOTHING: (), Landlock.READ_SYSTEM: _SYSTEM, Landlock.DEVICE_MODEL: _DEVICE_MODEL}

Instruction = tuple[int, int, int, int]  # struct sock_filter: code, jump if true, jump if false, operand

_EQUAL: Final = lib.BPF_JMP | lib.BPF_JEQ | lib.BPF_K
_AT_LEAST: Final = lib.BPF_JMP | lib.BPF_JGE | lib.BPF_K
_ANY_BIT: Final = lib.BPF_JMP | lib.BPF_JSET | lib.BPF_K
_KILL: Final[Instruction] = (lib.BPF_RET | lib.BPF_K, 0, 0, lib.SECCOMP_RET_KILL_PROCESS)
_ALLOW: Final[Instruction] = (lib.BPF_RET | lib.BPF_K, 0, 0, lib.SECCOMP_RET_ALLOW)
_REFUSE: Final[Instruction] = (lib.BPF_RET | lib.BPF_K, 0, 0, lib.SECCOMP_RET_ERRNO | errno.EPERM)
_MISSING: Final[Instruction] = (lib.BPF_RET | lib.BPF_K, 0, 0, lib.SECCOMP_RET_ERRNO | errno.ENOSYS)
_TELL: Final[Instruction] = (lib.BPF_RET | lib.BPF_K, 0, 0, lib.SECCOMP_RET_USER_NOTIF)


def confine(row: Row, *, uid: int | None, gid: int | None, keep: frozenset[int] | None = None) -> Proof:
    """Take from this process everything that `row` does not name, and try that it is gone.

    Descriptors above 2 that are not in `keep` are closed (None: those the row numbers stay). `uid` and `gid` None keep
    the identity, which a row with a user of its own allows only to a process that is not root. On ConfineError the
    process is in an undefined, never a more privileged state and must end.
    """
    _check_identity(row, uid, gid)
    parent = os.getppid()
    _close_all_but(frozenset(row.descriptors) if keep is None else keep)
    status = open_status()
    try:
        before = read_status(status)
        if before.threads != 1:
            raise ConfineError(f"{row.role}: {before.threads} threads run; only a process with one can be confined")
        _set_limits(row)
        wanted = _drop_privileges(row, before, uid, gid)
        _detach_from_outside(row, parent)
        probes = [probe_capabilities()] if os.geteuid() == 0 else list(probe_identity())
        abi = _restrict_files(row)
        if abi:
            probes.append(probe_open("open / under Landlock"))
        _install_filter(row)
        if row.user is not None and row.syscalls is not None:
            if row.role is not Role.SIMULATOR:  # which opens what its user may: there is nothing to be shown
                probes.append(probe_open("open /"))
            probes.extend(probe_calls())
        after = read_status(status)
    except OSError as error:
        raise ConfineError(f"{row.role}: cannot be confined: {error.strerror or error}") from error
    finally:
        os.close(status)
    _compare(row, after, wanted, uid, gid)
    return Proof(
        role=row.role.value,
        pid=os.getpid(),
        uid=after.uids[0],
        gid=after.gids[0],
        groups=after.groups,
        identity_changed=uid is not None,
        capabilities=after.capabilities,
        no_new_privs=after.no_new_privs,
        seccomp=after.seccomp,
        landlock_abi=abi,
        probes=tuple(probes),
    )


def become(row: Row, uid: int) -> None:
    """Give up root for the user and group `uid`, in a process that is confined to `row`, whose QEMU stays root for now.

    At that the kernel forgets what ends the process with its parent and hides its memory, so both are done anew.
    """
    parent = os.getppid()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _detach_from_outside(row, parent)


def filter_program(row: Row) -> list[Instruction]:
    """Give the seccomp filter of a row as classic BPF.

    Another architecture and x32 calls end the process: their numbers mean other calls. Each name has a block of its
    own, which the comparison before it enters or jumps over; the kernel remembers verdicts without arguments.
    """
    program: list[Instruction] = [
        _load(lib.OFFSET_ARCH),
        (_EQUAL, 1, 0, lib.AUDIT_ARCH_X86_64),
        _KILL,
        _load(lib.OFFSET_NR),
        (_AT_LEAST, 0, 1, lib.X32_SYSCALL_BIT),
        _KILL,
    ]
    for name in sorted(KILL_LIST | row.refused):
        program += [(_EQUAL, 0, 1, _number(name)), _MISSING if name in row.refused else _KILL]
    if row.syscalls is None:
        return [*program, _ALLOW]
    for name in sorted(row.syscalls):
        block = _verdict(row, name)
        program += [(_EQUAL, 0, len(block), _number(name)), *block]
    return [*program, _REFUSE]


def direct_open_listener() -> int:
    """Let programs that this process starts open nothing with O_DIRECT; return the descriptor that hears of each try.

    Who holds it can answer with a descriptor of its own, seccomp_unotify(2). When nobody does any more, such an open
    fails with ENOSYS. It holds for this process too. The caller closes the descriptor.
    """
    program: list[Instruction] = [
        _load(lib.OFFSET_NR),
        (_EQUAL, 0, 3, _number("openat")),
        _load(lib.OFFSET_ARGS + 16),
        (_ANY_BIT, 0, 1, os.O_DIRECT),
        _TELL,
        _ALLOW,
    ]
    result = lib.xenvm_install_listener(ffi.new("struct sock_filter[]", program), len(program))
    return _checked("seccomp listener", result)


def forbid_children_and_networks() -> None:
    """Let this process and what it becomes make threads, but no further process, and no socket but those of files.

    What it has been handed it can use. It must hold no_new_privs, and a filter that lets no foreign numbers through.
    """
    program: list[Instruction] = [
        _load(lib.OFFSET_NR),
        (_EQUAL, 0, 1, _number("fork")),
        _REFUSE,
        (_EQUAL, 0, 1, _number("vfork")),
        _REFUSE,
        (
            _EQUAL,
            0,
            1,
            _number("clone3"),
        ),  # its flags are in memory, where no filter looks; the C library then uses clone
        _MISSING,
        (_EQUAL, 0, 3, _number("clone")),
        _load(lib.OFFSET_ARGS),
        (_ANY_BIT, 1, 0, CLONE_THREAD),
        _REFUSE,
        (_EQUAL, 0, 3, _number("socket")),
        _load(lib.OFFSET_ARGS),
        (_EQUAL, 1, 0, socket.AF_UNIX),  # that of xenstored
        _REFUSE,
        _ALLOW,
    ]
    _checked("seccomp", lib.xenvm_install_filter(ffi.new("struct sock_filter[]", program), len(program)))


def _verdict(row: Row, name: str) -> list[Instruction]:
    """Decide on an allowed call; those which the table cuts by argument look at its low half, as the kernel does."""
    if name in NO_EXECUTABLE_MEMORY:
        return [_load(lib.OFFSET_ARGS + 16), (_ANY_BIT, 0, 1, PROT_EXEC), _REFUSE, _ALLOW]
    if name not in {"fcntl", "ioctl"}:
        return [_ALLOW]
    block = [_load(lib.OFFSET_ARGS + 8)]
    for request in sorted(FCNTL_COMMANDS if name == "fcntl" else row.ioctls):
        block += [(_EQUAL, 0, 1, request), _ALLOW]
    return [*block, _REFUSE]


def _load(offset: int) -> Instruction:
    """Load one word of struct seccomp_data."""
    return (lib.BPF_LD | lib.BPF_W | lib.BPF_ABS, 0, 0, offset)


def _number(name: str) -> int:
    number = lib.xenvm_syscall_number(name.encode("ascii"))
    if number < 0:
        raise ConfineError(f"system call {name}: no number is known for it")
    return number


def _check_identity(row: Row, uid: int | None, gid: int | None) -> None:
    if (uid is None) != (gid is None):
        raise ConfineError(f"{row.role}: uid and gid go together")
    if row.user is None:
        if uid is not None:
            raise ConfineError(f"{row.role}: stays the user it is")
    elif uid == 0 or gid == 0 or (uid is None and os.geteuid() == 0):
        raise ConfineError(f"{row.role}: must not be root", hint=f"does the user {row.user} exist?")


def _close_all_but(keep: frozenset[int]) -> None:
    first = 3
    for number in sorted(number for number in keep if number >= first):
        if number > first:
            _checked("close_range", lib.xenvm_close_range(first, number - 1))
        first = number + 1
    _checked("close_range", lib.xenvm_close_range(first, _LAST_DESCRIPTOR))


def _set_limits(row: Row) -> None:
    for name, value in row.limits.items():
        which: int = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (most, most))


def _drop_privileges(row: Row, before: Status, uid: int | None, gid: int | None) -> int:
    """Change the identity and cut the capabilities; give the mask that must remain.

    The bounding set goes first, since cutting it needs SETPCAP. A process that never had it (started by a user, to
    check a config file) keeps its bounding set: without capabilities and with no_new_privs it leads nowhere.
    """
    held = before.capabilities[_PERMITTED]
    wanted = 0
    for name in row.capabilities:
        wanted |= 1 << getattr(prctl, name)
    wanted &= held
    if before.capabilities[_EFFECTIVE] & (1 << prctl.CAP_SETPCAP):
        _cut_bounding(wanted)
    if before.capabilities[_EFFECTIVE] & (1 << prctl.CAP_SETGID):
        os.setgroups([])
    prctl.set_keepcaps(1 if wanted else 0)
    if uid is not None and gid is not None:
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _checked("clear ambient capabilities", lib.xenvm_clear_ambient())
    _checked("capset", lib.xenvm_set_capabilities(wanted))
    prctl.set_keepcaps(0)
    return wanted


def _cut_bounding(wanted: int) -> None:
    for capability in range(_HIGHEST_CAPABILITY + 1):
        if wanted >> capability & 1:
            continue
        if capability <= prctl.CAP_LAST_CAP:
            prctl.capbset_drop(capability)
            continue
        # newer than the headers python-prctl was built with, which it refuses to name
        result = lib.xenvm_drop_bounding(capability)
        if result == -errno.EINVAL:
            return
        _checked("drop from the bounding set", result)


def _detach_from_outside(row: Row, parent: int) -> None:
    """No core file, no tracer, no privilege by exec; an end with the parent.

    After the drop, because the kernel clears the parent-death signal whenever the uid changes, prctl(2).
    """
    prctl.set_dumpable(0)
    if row.no_new_privs:
        prctl.set_no_new_privs(1)
    if row.dies_with_parent:
        prctl.set_pdeathsig(signal.SIGKILL)
        if os.getppid() != parent:
            raise ConfineError(f"{row.role}: the parent is gone")


def _restrict_files(row: Row) -> int:
    """Enter a Landlock domain with the rules of the row; give its version, 0 where the row or the kernel has none."""
    if row.landlock is Landlock.UNRESTRICTED:
        return 0
    abi = _checked("Landlock version", lib.xenvm_landlock_abi())
    if abi:
        ruleset = _checked("Landlock ruleset", lib.xenvm_landlock_create(abi))
        for path in _ALLOWED[row.landlock]:
            _checked(f"Landlock rule for {path.decode()}", lib.xenvm_landlock_allow(ruleset, abi, path))
        _checked("Landlock", lib.xenvm_landlock_enter(ruleset))
    return abi


def _install_filter(row: Row) -> None:
    program = filter_program(row)
    result = lib.xenvm_install_filter(ffi.new("struct sock_filter[]", program), len(program))
    if _checked("seccomp", result):
        raise ConfineError(f"{row.role}: thread {result} did not take the system call filter")


def _compare(row: Row, after: Status, wanted: int, uid: int | None, gid: int | None) -> None:
    """Compare what the kernel shows now with what was asked of it."""
    inheritable, permitted, effective, bounding, ambient = after.capabilities
    wrong = []
    if (permitted, effective, inheritable, ambient) != (wanted, wanted, 0, 0):
        wrong.append("capabilities")
    if uid is not None and (set(after.uids) != {uid} or set(after.gids) != {gid} or after.groups):
        wrong.append("identity")
    if (uid is not None or os.geteuid() == 0) and bounding != wanted:
        wrong.append("bounding set")
    if after.no_new_privs != row.no_new_privs:
        wrong.append("no_new_privs")
    if after.seccomp != SECCOMP_FILTERED:
        wrong.append("seccomp")
    if wrong:
        raise ConfineError(f"{row.role}: not as asked: {', '.join(wrong)}")


def _checked(what: str, result: int) -> int:
    """Turn -errno of a native function into an error; pass other results on."""
    if result < 0:
        raise ConfineError(f"{what}: {os.strerror(-result)}")
    return result
