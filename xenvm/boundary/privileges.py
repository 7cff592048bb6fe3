# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table: what each process of xenvm is, may hold and may call. Pure data, no I/O.

Processes confine themselves from it, the audit compares live processes with it, and SECURITY.md prints it.

The kinds of descriptors: "/dev/null" and other device paths stand for themselves, "log" is the monitor's log file,
"file" any regular file, "pipe" any pipe, "block" any block device, "pty" any pseudo-terminal, "socket" any socket, and
"anon_inode:..." is what the kernel shows in /proc/PID/fd.
"""

from __future__ import annotations

from xenvm.choice import StrChoice
from xenvm.record import MappingProxyType, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final


class Role(StrChoice):
    """One kind of process."""

    BROKER = "broker"
    SUPERVISOR = "supervisor"
    WATCHER = "watcher"
    PARSER = "parser"
    BUILDER = "builder"
    HOTPLUG = "hotplug"
    NETWORK = "network"
    IMAGE = "image"
    STORAGE = "storage"
    SIMULATOR = "simulator"
    UNPACKER = "unpacker"
    STREAM = "stream"
    DEVICEMODEL = "devicemodel"
    QMP = "qmp"


class Landlock(StrChoice):
    """What the Landlock ruleset of a process leaves it."""

    NOTHING = "nothing accessible"
    READ_SYSTEM = "programs and libraries, to read and run"
    DEVICE_MODEL = "the same, Xen's devices and pseudo terminals"
    UNRESTRICTED = "not restricted"


# What Python calls to make a descriptor non-blocking or (not) inheritable: FIONBIO, FIOCLEX, FIONCLEX of
# asm-generic/ioctls.h. FIOSETOWN and FIOASYNC are not among them: they would be another way to signal a process.
DESCRIPTOR_IOCTLS: Final[frozenset[int]] = frozenset({0x5421, 0x5451, 0x5450})

# What libxencall, libxenforeignmemory and libxenevtchn call after their devices are open, from xen/privcmd.h
# (HYPERCALL, MMAPBATCH, MMAPBATCH_V2, MMAP_RESOURCE; 0x50ff asks whether the kernel knows unknown requests) and
# xen/evtchn.h (BIND_INTERDOMAIN, UNBIND, NOTIFY).
XEN_IOCTLS: Final[frozenset[int]] = frozenset(
    {0x305000, 0x185003, 0x205004, 0x205007, 0x50FF, 0x84501, 0x44503, 0x44504},
)

# What asks for a device's size and encrypts it: BLKGETSIZE64 of linux/fs.h; DM_DEV_CREATE, DM_DEV_REMOVE,
# DM_DEV_SUSPEND and DM_TABLE_LOAD of linux/dm-ioctl.h.
STORAGE_IOCTLS: Final[frozenset[int]] = frozenset({0x80081272, 0xC138FD03, 0xC138FD04, 0xC138FD06, 0xC138FD09})

# What attaches an open /dev/net/tun to an interface: TUNSETIFF of linux/if_tun.h.
TAP_IOCTLS: Final[frozenset[int]] = frozenset({0x400454CA})


# What makes a pseudo terminal raw and opens both its ends: TCGETS, TCSETS, TCSETSW, TCSETSF, TIOCGWINSZ, TIOCSPTLCK,
# TIOCGPTN, TIOCGPTPEER of asm-generic/ioctls.h.
PTY_IOCTLS: Final[frozenset[int]] = frozenset(
    {0x5401, 0x5402, 0x5403, 0x5404, 0x5413, 0x40045431, 0x80045430, 0x5441},
)

ANYBODY: Final = "whoever starts it, never root"


class Row(Record):
    """Everything one role may hold or do.

    `user` None: stays root. `capabilities` is the permitted, effective and bounding set; inheritable and ambient are
    always empty. `syscalls` None: all but KILL_LIST. Those in `refused` fail with ENOSYS: calls of KILL_LIST that a
    program of others only tries, which would end it otherwise, and further ones that it does not need. `ioctls` are the
    requests with which ioctl is let through.
    `descriptors` are the fixed numbers, `extra_descriptors` the kinds that may be open besides. `limits` maps the name
    of a resource limit without its RLIMIT_ prefix to its value, soft and hard, in the unit setrlimit(2) gives it.
    `requests` are the operations the process answers.
    """

    role: Role
    user: str | None
    capabilities: frozenset[str]
    no_new_privs: bool
    syscalls: frozenset[str] | None
    landlock: Landlock
    descriptors: Mapping[int, str]
    extra_descriptors: frozenset[str]
    limits: Mapping[str, int]
    lifetime: str
    requests: tuple[str, ...]
    dies_with_parent: bool = True
    ioctls: frozenset[int] = DESCRIPTOR_IOCTLS
    refused: frozenset[str] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NULL: Final = "/dev/null"
LOG: Final = "log"
FILE: Final = "file"
BLOCK: Final = "block"
PTY: Final = "pty"
SOCKET: Final = "socket"
PIPE: Final = "pipe"
EPOLL: Final = "anon_inode:[eventpoll]"
PIDFD: Final = "anon_inode:[pidfd]"
PRIVCMD: Final = "/dev/xen/privcmd"
TUN: Final = "/dev/net/tun"
PTMX: Final = "/dev/ptmx"

MONITOR: Final = "monitor"
ONE_REQUEST: Final = "one request"
HOST: Final = "simulated host"

# A process that writes no file but its log. RLIMIT_FSIZE counts the offset in the file, so this bounds the log too:
# a process gone mad cannot fill the disk with it. In bytes.
LOG_SIZE_LIMIT: Final = 64 << 20

# No role makes these calls, and no child of the broker inherits a way to make them. Each gives access to another
# process, loads code into the kernel, changes mounts or namespaces, opens files past the checks on their directories
# (open_by_handle_at needs only the broker's DAC_READ_SEARCH) or is known for a wide attack surface.
KILL_LIST: Final[frozenset[str]] = _names(
    """
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    kexec_load kexec_file_load init_module finit_module delete_module create_module query_module get_kernel_syms
    mount umount2 move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr pivot_root
    unshare setns name_to_handle_at open_by_handle_at fanotify_init fanotify_mark
    add_key request_key keyctl
    swapon swapoff reboot acct quotactl quotactl_fd syslog nfsservctl lookup_dcookie vhangup sethostname setdomainname
    settimeofday clock_settime clock_adjtime adjtimex
    iopl ioperm modify_ldt personality uselib ustat sysfs _sysctl
    move_pages migrate_pages vmsplice
    """,
)

# What CPython 3.11 to 3.13 and glibc 2.36 to 2.41 need once all imports are done, and what a loop over passed
# descriptors needs. Left out on purpose: kill, tgkill and tkill (processes of one uid could signal each other; abort
# ends in a trap instruction without them), prlimit64 (takes another process of the same uid), clone, and everything
# that opens or changes a path or makes a socket. A traceback then lacks its source lines, and a late import
# ends in PermissionError or ModuleNotFoundError.
# newfstatat, which glibc 2.36 makes fstat of, can still ask for the size and owner of a path.
BASE_SYSCALLS: Final[frozenset[str]] = _names(
    """
    read readv pread64 write writev lseek close close_range fstat newfstatat dup dup3 fcntl ioctl
    mmap munmap mremap mprotect madvise brk
    futex set_robust_list rseq rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time setitimer getitimer
    getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid getrandom sched_yield
    poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    recvfrom recvmsg sendto sendmsg getsockopt setsockopt shutdown
    exit exit_group
    """,
)

# Four of the calls above are cut by their arguments. ioctl: see Row.ioctls. fcntl: F_SETOWN and F_SETSIG would be
# another way to signal a process of the same uid. The numbers of fcntl.h are F_DUPFD, F_GETFD, F_SETFD, F_GETFL,
# F_SETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS.
FCNTL_COMMANDS: Final[frozenset[int]] = frozenset({0, 1, 2, 3, 4, 1030, 1033, 1034})
# mmap and mprotect: all code is loaded by then, so no memory becomes executable. PROT_EXEC of sys/mman.h.
NO_EXECUTABLE_MEMORY: Final[frozenset[str]] = frozenset({"mmap", "mprotect"})
PROT_EXEC: Final = 4

_SUPERVISOR_SYSCALLS: Final = BASE_SYSCALLS | {"accept4", "getsockname", "getpeername"}

# The parser reads one descriptor and answers on another.
_PARSER_SYSCALLS: Final = BASE_SYSCALLS - _names(
    """
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 setsockopt dup dup3 setitimer getitimer
    """,
)

# libxenctrl and libxenguest: hypercalls are ioctls, guest memory is mapped and locked, images come and go by pipes.
_BUILDER_SYSCALLS: Final = BASE_SYSCALLS | _names(
    """
    mlock munlock uname sysinfo
    """,
)

# The names of boundary.messages.Op, which a test compares with these.
_BUILDER_REQUESTS: Final = (
    "find",
    "build",
    "build-paused",
    "rebuild",
    "query",
    "survey",
    "pause",
    "unpause",
    "resume",
    "crash",
    "press-power",
    "press-sleep",
    "nmi",
    "s-state",
    "fall-asleep",
    "wake",
    "ask-sleep",
    "ask-poweroff",
    "ask-reboot",
    "withdraw",
    "force-poweroff",
    "destroy",
    "save",
    "checkpoint",
    "restore",
    "restore-paused",
    "console",
)
_HOTPLUG_REQUESTS: Final = ("devices", "plug", "unplug", "rebridge", "settle")
_BROKER_REQUESTS: Final = (
    *_BUILDER_REQUESTS,
    *_HOTPLUG_REQUESTS,
    "start",
    "start-paused",
    "start-restored",
    "cancel",
    "console-log",
    "read-config",
    "started",
    "quit",
)


def _frozen(pairs: dict[int, str]) -> Mapping[int, str]:
    return MappingProxyType({0: NULL, 1: LOG, 2: LOG, **pairs})


def _limits(**values: int) -> Mapping[str, int]:
    """No process leaves a core file: its memory holds what the guest and the administrator said."""
    return MappingProxyType({"CORE": 0, **values})


_ROWS: Final = (
    Row(
        role=Role.BROKER,
        user=None,
        # SETUID, SETGID, SETPCAP: the children give up root with them. KILL: to end a child, also by its parent-death
        # signal, which the kernel checks against the dying parent.
        # DAC_READ_SEARCH: a kernel image may belong to anybody. Directories and /dev/xen belong to root.
        # NET_ADMIN, SYS_ADMIN: passed on to the network and the storage worker, each of which keeps one of them;
        # SYS_CHROOT to the device model, which gives it up with root.
        capabilities=frozenset(
            {
                *("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_KILL", "CAP_DAC_READ_SEARCH"),
                *("CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT"),
            },
        ),
        no_new_privs=True,
        syscalls=None,
        landlock=Landlock.UNRESTRICTED,
        descriptors=_frozen({}),
        extra_descriptors=frozenset({SOCKET, FILE, BLOCK, PTY, PIPE, EPOLL, PIDFD, TUN}),
        # Children inherit the limits and cannot raise them, so only what suits all of them is here.
        limits=_limits(NOFILE=256),
        lifetime=MONITOR,
        requests=_BROKER_REQUESTS,
        dies_with_parent=False,
        # The filter is inherited, and the stricter one counts: QEMU only tries these, and goes on without.
        refused=_names("io_uring_setup userfaultfd bpf"),
    ),
    Row(
        role=Role.SUPERVISOR,
        user="xenvm",
        capabilities=frozenset(),
        no_new_privs=True,
        syscalls=_SUPERVISOR_SYSCALLS,
        landlock=Landlock.NOTHING,
        # 3 the broker, 4 the listener for commands, 5 the watcher
        descriptors=_frozen({3: SOCKET, 4: SOCKET, 5: SOCKET}),
        extra_descriptors=frozenset({SOCKET, EPOLL, FILE, BLOCK, PTY}),
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=256),
        lifetime=MONITOR,
        requests=(),
    ),
    Row(
        role=Role.WATCHER,
        user="xenvm-watch",
        capabilities=frozenset(),
        no_new_privs=True,
        syscalls=BASE_SYSCALLS,
        landlock=Landlock.NOTHING,
        # 3 the broker, 4 the supervisor; xenstore comes on the next free number
        descriptors=_frozen({3: SOCKET, 4: SOCKET}),
        extra_descriptors=frozenset({SOCKET, EPOLL}),
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=32),
        lifetime=MONITOR,
        requests=(),
    ),
    Row(
        role=Role.PARSER,
        user="xenvm-parse",
        capabilities=frozenset(),
        no_new_privs=True,
        syscalls=_PARSER_SYSCALLS,
        landlock=Landlock.NOTHING,
        # 3 the broker, 4 the config file, 5 the host's policy file (an empty one in memory when there is none)
        descriptors=_frozen({3: SOCKET, 4: FILE, 5: FILE}),
        extra_descriptors=frozenset(),
        # A config file that needs more than this is an attack: 256 MiB of addresses, 30 seconds of processor.
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=32, AS=256 << 20, CPU=30),
        lifetime=ONE_REQUEST,
        requests=("parse",),
    ),
    Row(
        role=Role.BUILDER,
        user="xenvm-build",
        capabilities=frozenset(),
        no_new_privs=True,
        syscalls=_BUILDER_SYSCALLS,
        landlock=Landlock.NOTHING,
        # 3 the broker; devices and xenstore are opened before the drop
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset(
            {
                SOCKET,
                FILE,
                BLOCK,
                PIPE,
                NULL,
                PRIVCMD,
                "/dev/xen/hypercall",
                "/dev/xen/evtchn",
            },
        ),
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=64),
        lifetime=ONE_REQUEST,
        requests=_BUILDER_REQUESTS,
        ioctls=DESCRIPTOR_IOCTLS | XEN_IOCTLS,
    ),
    Row(
        role=Role.HOTPLUG,
        user="xenvm-hotplug",
        capabilities=frozenset(),
        no_new_privs=True,
        syscalls=BASE_SYSCALLS,
        landlock=Landlock.NOTHING,
        # 3 the broker; xenstore is opened before the drop
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({SOCKET}),
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=32),
        lifetime=ONE_REQUEST,
        requests=_HOTPLUG_REQUESTS,
    ),
    Row(
        role=Role.NETWORK,
        user="xenvm-network",
        capabilities=frozenset({"CAP_NET_ADMIN"}),
        no_new_privs=True,
        syscalls=BASE_SYSCALLS,
        landlock=Landlock.NOTHING,
        # 3 the broker; the socket to the kernel's network configuration is opened before the drop
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({SOCKET, TUN}),
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=32),
        lifetime=ONE_REQUEST,
        requests=("join",),
        ioctls=DESCRIPTOR_IOCTLS | TAP_IOCTLS,
    ),
    Row(
        role=Role.IMAGE,
        user="xenvm-image",
        capabilities=frozenset(),
        no_new_privs=True,
        # qemu-storage-daemon inherits this row: a program whose calls differ from release to release.
        syscalls=None,
        landlock=Landlock.READ_SYSTEM,
        # 3 the broker; the image and the two sockets come with the request
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({SOCKET, FILE, BLOCK, PIDFD, "anon_inode:seccomp notify"}),
        # No FSIZE: an image may be as large as it likes. No NPROC: the daemon has threads.
        limits=_limits(NOFILE=64),
        lifetime=ONE_REQUEST,
        requests=("serve",),
        # QEMU tries io_uring and goes on without; what it serves comes in open sockets, so it needs to make none.
        refused=_names("io_uring_setup socket connect bind"),
    ),
    Row(
        role=Role.STORAGE,
        user=None,
        # SYS_ADMIN is what nbd and the device mapper ask for; their devices belong to root.
        capabilities=frozenset({"CAP_SYS_ADMIN"}),
        no_new_privs=True,
        # openat for the device that was just made, socket for netlink; no program is run.
        syscalls=BASE_SYSCALLS | {"openat", "socket"},
        landlock=Landlock.UNRESTRICTED,
        # 3 the broker; the socket of the image, or the device and the key file, come with the request
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({SOCKET, FILE, BLOCK, "/dev/mapper/control"}),
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=32),
        lifetime=ONE_REQUEST,
        requests=("connect", "decrypt", "release"),
        ioctls=DESCRIPTOR_IOCTLS | STORAGE_IOCTLS,
    ),
    Row(
        # No process of a monitor: what plays Xen, xenstored, the kernel and the guests with `xenvm --simulator`.
        role=Role.SIMULATOR,
        user=ANYBODY,
        capabilities=frozenset(),
        no_new_privs=True,
        # It accepts connections, and makes and removes what shows in its own directory; it runs no program.
        syscalls=BASE_SYSCALLS | _names("accept4 openat mkdir rmdir unlink unlinkat getdents64 fchmod"),
        landlock=Landlock.UNRESTRICTED,
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({SOCKET, FILE, PTY, EPOLL, "/dev/ptmx"}),
        limits=_limits(NPROC=0, NOFILE=8192),
        lifetime=HOST,
        requests=(),
        dies_with_parent=False,
        ioctls=DESCRIPTOR_IOCTLS | PTY_IOCTLS,
    ),
    Row(
        role=Role.UNPACKER,
        user="xenvm-unpack",
        capabilities=frozenset(),
        no_new_privs=True,
        # ftruncate to make the room for what is unpacked, fsync to have it on the disk.
        syscalls=BASE_SYSCALLS | {"ftruncate", "fsync"},
        landlock=Landlock.NOTHING,
        # 3 the broker; the image and the file for what is in it come with the request
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({SOCKET, FILE}),
        # FSIZE is the largest kernel, compressed or not; the addresses are for both at once and a dictionary.
        limits=_limits(NPROC=0, FSIZE=1 << 30, NOFILE=32, AS=3 << 30, CPU=300),
        lifetime=ONE_REQUEST,
        requests=("unpack", "sum", "tables"),
    ),
    Row(
        role=Role.STREAM,
        user="xenvm-stream",
        capabilities=frozenset(),
        no_new_privs=True,
        # splice moves the pages of a checked record from the image to the builder. The rest is for an image that it
        # writes: is there room, pages and the seal at their places, the length behind a last hole, is it on the disk.
        syscalls=_PARSER_SYSCALLS | {"preadv2", "splice", "fstatfs", "pwrite64", "ftruncate", "fsync"},
        landlock=Landlock.NOTHING,
        # 3 the broker; the image and the pipe to the builder come with the request
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({FILE, PIPE}),
        # An image that needs more than this to be understood is an attack: 256 MiB of addresses.
        limits=_limits(NPROC=0, NOFILE=32, AS=256 << 20),
        lifetime=ONE_REQUEST,
        requests=("inspect", "write"),
    ),
    Row(
        role=Role.DEVICEMODEL,
        user=None,
        # QEMU inherits this row. It opens Xen's devices and xenstore as root, then makes an empty directory its root
        # and becomes a user of its own, which takes these three from it.
        capabilities=frozenset({"CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT"}),
        no_new_privs=True,
        syscalls=None,
        landlock=Landlock.DEVICE_MODEL,
        # 3 the broker; everything that QEMU gets comes with the request
        descriptors=_frozen({3: SOCKET}),
        # The last two lines are QEMU's own; its privcmd is cut down to its domain by -xen-domid-restrict, and its pipes
        # are those of libxenstore, from itself to itself.
        extra_descriptors=frozenset(
            {
                *(SOCKET, FILE, BLOCK, PIDFD, TUN, NULL),
                *(PRIVCMD, "/dev/xen/evtchn", PTMX, EPOLL, PIPE),
                *("anon_inode:[eventfd]", "anon_inode:[signalfd]"),
            },
        ),
        # FSIZE bounds the log; QEMU 10 keeps its screen in a file in memory, which must fit. NPROC counts threads.
        limits=_limits(FSIZE=LOG_SIZE_LIMIT, NOFILE=256, NPROC=256, MEMLOCK=0),
        lifetime=ONE_REQUEST,
        requests=("launch",),
        refused=_names("io_uring_setup userfaultfd bpf"),
    ),
    Row(
        role=Role.QMP,
        user="xenvm-qmp",
        capabilities=frozenset(),
        no_new_privs=True,
        syscalls=_PARSER_SYSCALLS | {"getsockname"},  # which Python asks of a socket it is given
        landlock=Landlock.NOTHING,
        # 3 the broker; the connection to the device model and the file for its state come with the request
        descriptors=_frozen({3: SOCKET}),
        extra_descriptors=frozenset({SOCKET, FILE}),
        # What a device model says is bounded; if it needs more than this to be understood, it is an attack.
        limits=_limits(NPROC=0, FSIZE=LOG_SIZE_LIMIT, NOFILE=32, AS=256 << 20),
        lifetime=ONE_REQUEST,
        requests=("attach", "wished"),
    ),
)

QEMU_USER: Final = "xenvm-qemu"
"""The user whose number plus the domid is that of the device model of a domain."""

TABLE: Final[Mapping[Role, Row]] = MappingProxyType({row.role: row for row in _ROWS})


def markdown_table() -> str:
    """Give the table as Markdown, one line per role, ending in a newline."""
    heads = ("process", "user", "capabilities", "system calls", "files", "descriptors", "limits", "lives", "answers")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in TABLE.values():
        fixed = ", ".join(f"{number} {kind}" for number, kind in sorted(row.descriptors.items()))
        extra = ", ".join(sorted(row.extra_descriptors))
        cells = (
            row.role.value,
            row.user or "root",
            ", ".join(name.removeprefix("CAP_") for name in sorted(row.capabilities)) or "none",
            "all but the kill list" if row.syscalls is None else f"{len(row.syscalls)} allowed",
            row.landlock.value,
            f"{fixed}; also {extra}" if extra else fixed,
            ", ".join(f"{name} {value}" for name, value in row.limits.items()),
            row.lifetime,
            ", ".join(row.requests) or "nothing",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
