# SPDX-License-Identifier: GPL-2.0-or-later
"""The privilege table is coherent: each promise that holds for all roles, or for all but one, is checked here."""

import pytest

from xenvm.boundary.messages import Op
from xenvm.boundary.privileges import (
    ANYBODY,
    BASE_SYSCALLS,
    DESCRIPTOR_IOCTLS,
    FCNTL_COMMANDS,
    HOST,
    KILL_LIST,
    MONITOR,
    NO_EXECUTABLE_MEMORY,
    NULL,
    ONE_REQUEST,
    PRIVCMD,
    STORAGE_IOCTLS,
    TABLE,
    TAP_IOCTLS,
    XEN_IOCTLS,
    Landlock,
    Role,
    markdown_table,
)

# simulator: no process of a monitor, and never on a host with Xen
MONITORS = [role for role in Role if role is not Role.SIMULATOR]
NOT_BROKER = [role for role in MONITORS if role is not Role.BROKER]
# image, devicemodel: a program of others inherits their row, and they must be able to start that program
FILTERED = [role for role in NOT_BROKER if role not in (Role.IMAGE, Role.DEVICEMODEL)]
# What a role may do beyond the others, each with its reason beside its row.
CAPABILITIES = {
    Role.NETWORK: {"CAP_NET_ADMIN"},
    Role.STORAGE: {"CAP_SYS_ADMIN"},
    Role.DEVICEMODEL: {"CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT"},
}
CALLS = {Role.STORAGE: {"openat", "socket"}}
FILES = {
    Role.IMAGE: Landlock.READ_SYSTEM,
    Role.STORAGE: Landlock.UNRESTRICTED,
    Role.DEVICEMODEL: Landlock.DEVICE_MODEL,
}
IOCTLS = {Role.BUILDER: XEN_IOCTLS, Role.STORAGE: STORAGE_IOCTLS, Role.NETWORK: TAP_IOCTLS}

# What no confined process may call: opening and changing paths, programs, processes, sockets, signals, identity.
_FORBIDDEN = """
    open openat openat2 creat truncate rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat mkdir
    mkdirat rmdir mknod mknodat chmod fchmodat chown lchown fchownat chdir chroot
    execve execveat fork vfork clone clone3
    socket socketpair connect bind listen
    kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal prlimit64 setpriority
    sched_setaffinity setuid setgid setresuid setresgid setgroups capset prctl seccomp
    landlock_create_ruleset landlock_restrict_self
    ptrace bpf io_uring_setup mount unshare setns keyctl
    shmget msgget semget mq_open memfd_create userfaultfd
"""
FORBIDDEN = frozenset(_FORBIDDEN.split())


def test_every_role_has_its_row():
    assert set(TABLE) == set(Role)
    assert all(row.role is role for role, row in TABLE.items())


@pytest.mark.parametrize("role", MONITORS)
def test_every_row(role):
    row = TABLE[role]
    assert row.no_new_privs
    assert row.limits["CORE"] == 0
    assert row.limits["NOFILE"] <= 256
    assert row.descriptors[0] == NULL
    assert row.descriptors[1] == row.descriptors[2] == "log"
    assert sorted(row.descriptors) == list(range(len(row.descriptors)))
    assert row.lifetime in {MONITOR, ONE_REQUEST}


@pytest.mark.parametrize("role", NOT_BROKER)
def test_every_row_but_the_brokers(role):
    row = TABLE[role]
    assert row.capabilities == CAPABILITIES.get(role, set())
    assert row.landlock is FILES.get(role, Landlock.NOTHING)
    assert row.dies_with_parent
    assert row.descriptors[3] == "socket"


@pytest.mark.parametrize("role", FILTERED)
def test_every_row_with_a_list_of_calls(role):
    row = TABLE[role]
    assert row.syscalls is not None
    assert row.syscalls & FORBIDDEN == CALLS.get(role, set())
    assert not row.syscalls & KILL_LIST
    assert not row.refused
    assert row.limits["NPROC"] == 0


def test_only_broker_and_storage_stay_root():
    assert [role for role in Role if TABLE[role].user is None] == [Role.BROKER, Role.STORAGE, Role.DEVICEMODEL]


def test_what_serves_images_has_no_privilege_and_makes_no_connection():
    row = TABLE[Role.IMAGE]
    assert row.user is not None
    assert not row.capabilities
    assert row.landlock is Landlock.READ_SYSTEM
    assert {"socket", "connect", "bind"} <= row.refused
    assert row.lifetime == ONE_REQUEST


def test_what_only_tries_a_killed_call_lives_below_the_broker_too():
    # Of two filters the stricter one counts, and the broker's is inherited.
    assert TABLE[Role.IMAGE].refused & KILL_LIST <= TABLE[Role.BROKER].refused


def test_a_simulated_host_has_no_privilege_and_runs_nothing():
    row = TABLE[Role.SIMULATOR]
    assert row.user == ANYBODY
    assert not row.capabilities
    assert row.no_new_privs
    paths = {"openat", "mkdir", "rmdir", "unlink", "unlinkat"}
    assert row.syscalls & FORBIDDEN == paths
    assert row.limits["NPROC"] == 0
    assert row.lifetime == HOST
    assert not {kind for kind in row.extra_descriptors if kind.startswith("/dev/xen")}


def test_no_two_roles_share_a_user():
    users = [row.user for row in TABLE.values() if row.user is not None]
    assert len(set(users)) == len(users)


def test_the_broker_stays_root_with_few_capabilities():
    row = TABLE[Role.BROKER]
    assert row.user is None
    assert row.capabilities == {
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_KILL",
        "CAP_DAC_READ_SEARCH",
        *CAPABILITIES[Role.NETWORK],  # a child can keep only what the broker has
        *CAPABILITIES[Role.STORAGE],
        *CAPABILITIES[Role.DEVICEMODEL],
    }
    assert not row.dies_with_parent
    assert row.syscalls is None


def test_only_the_builder_holds_the_hypervisor():
    holders = {
        role
        for role, row in TABLE.items()
        for kind in {*row.descriptors.values(), *row.extra_descriptors}
        if kind.startswith("/dev/xen/")
    }
    assert holders == {Role.BUILDER, Role.DEVICEMODEL}  # the latter's are cut down to its own domain
    assert PRIVCMD in TABLE[Role.BUILDER].extra_descriptors
    assert TABLE[Role.BUILDER].lifetime == ONE_REQUEST


def test_only_the_builder_may_ask_the_hypervisor():
    assert {role for role in Role if TABLE[role].ioctls & XEN_IOCTLS} == {Role.BUILDER}
    assert all(TABLE[role].ioctls == DESCRIPTOR_IOCTLS | IOCTLS.get(role, set()) for role in MONITORS)


def test_xen_requests_are_those_of_its_two_devices():
    # bits 8 to 15 of a request are the letter of its device: P for privcmd, E for evtchn
    assert {chr(request >> 8 & 0xFF) for request in XEN_IOCTLS} == {"P", "E"}


def test_only_the_supervisor_accepts_connections():
    assert {role for role in FILTERED if "accept4" in TABLE[role].syscalls} == {Role.SUPERVISOR}


def test_the_parser_is_bounded_in_memory_and_time():
    assert TABLE[Role.PARSER].limits["AS"] <= 1 << 30
    assert TABLE[Role.PARSER].limits["CPU"] <= 30


def test_the_kill_list_leaves_what_confinement_itself_needs():
    needed = {"prctl", "seccomp", "capset", "setresuid", "setresgid", "setgroups", "close_range", "execve", "clone"}
    assert not KILL_LIST & (needed | BASE_SYSCALLS)
    assert {"ptrace", "bpf", "io_uring_setup", "open_by_handle_at", "init_module", "unshare"} <= KILL_LIST


def test_what_is_cut_by_arguments_is_allowed_at_all():
    for role in FILTERED:
        assert {"fcntl", "ioctl", *NO_EXECUTABLE_MEMORY} <= TABLE[role].syscalls
    assert not FCNTL_COMMANDS & {8, 10, 15}  # F_SETOWN, F_SETSIG, F_SETOWN_EX


def test_requests_are_those_of_the_protocol():
    known = {op.value for op in Op}
    assert set(TABLE[Role.BROKER].requests) == known
    assert set(TABLE[Role.BUILDER].requests) < known
    assert TABLE[Role.SUPERVISOR].requests == TABLE[Role.WATCHER].requests == ()


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        TABLE[Role.WATCHER] = TABLE[Role.BUILDER]
    with pytest.raises(TypeError):
        TABLE[Role.WATCHER].descriptors[5] = PRIVCMD
    with pytest.raises(AttributeError):
        TABLE[Role.WATCHER].user = None


def test_markdown_names_every_role_in_even_columns():
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(Role)
    assert len({line.count("|") for line in lines}) == 1
    for role, line in zip(TABLE, lines[2:], strict=True):
        assert line.startswith(f"| {role.value} | {TABLE[role].user or 'root'} |")
