# SPDX-License-Identifier: GPL-2.0-or-later
"""What the broker opens on the host: lock, command socket, logs, and the files that the config grants."""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import errno
import fcntl
import grp
import os
import select
import stat

from xenvm.boundary.messages import ConfigIssue, FileNeed, Grants, HostPolicy, Init, Parsed, Policy
from xenvm.boundary.place import HERE, MARK
from xenvm.errors import BusyError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

LOG_DIRECTORY: Final = HERE.logs
CONSOLE_LOG_DIRECTORY: Final = HERE.console_logs
LOG_LIMIT_BYTES: Final = 16 << 20
ALL_GROUP: Final = "xenvm"
READ_GROUP: Final = "xenvm-read"
BACKLOG: Final = 64
END_WAIT_MS: Final = 5000
BIOS: Final = "/usr/share/seabios/bios-256k.bin"


def group_id(name: str) -> int:
    """Return the gid of a group, -1 when the host has none of that name (then nobody is in it)."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return -1


def introduction(
    grants: Grants,
    policy: Policy,
    host_policy: HostPolicy,
    fields: dict[str, str],
    config_file: str,
    *,
    first: bool,
) -> Init:
    """Return what a supervisor is told: whom it serves, and which groups of this host may command."""
    return Init(
        uuid=grants.uuid,
        name=grants.name,
        config_file=config_file,
        memory_mib=grants.memory_mib,
        vcpus=grants.vcpus,
        debug=grants.debug,
        first=first,
        monitor_pid=os.getpid(),
        all_gid=group_id(ALL_GROUP),
        read_gid=group_id(READ_GROUP),
        policy=policy,
        directories=host_policy.directories,
        fields=fields,
        image_directories=host_policy.image_directories,
    )


def check_directory(path: str) -> None:
    """Refuse a socket directory that others could change (on a real host: anybody but root), or of another host."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise XenvmError(f"{path} does not exist", hint="run scripts/install-host as root") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise XenvmError(f"{path} is not a directory that only root can change", hint="chown root, chmod 0755")
    simulated = os.path.exists(f"{path}/{MARK}")  # noqa: PTH110
    if simulated and not HERE.simulator:
        raise XenvmError(f"{path} belongs to a simulated host", hint="set XENVM_SOCKET_DIR to another directory")
    if HERE.simulator and not simulated:
        raise XenvmError(f"no simulated host runs in {path}")


def take_lock(directory: str, uuid: str) -> int:
    """Take the lock of `uuid` for as long as the returned descriptor is open; raise BusyError naming its holder."""
    path = f"{directory}/lock-{uuid}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise XenvmError(f"cannot open the lock {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 16, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise BusyError(
            f"another monitor (process {holder or 'unknown'}) serves {uuid}", hint=f"see xenvm-cmd {uuid} status"
        ) from None
    if os.fstat(descriptor).st_nlink == 0:  # it was opened just before its last holder removed it: nobody else's lock
        os.close(descriptor)
        return take_lock(directory, uuid)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor


def release_lock(directory: str, uuid: str, descriptor: int) -> None:
    """Remove the lock file while still holding the lock, so that no file of a stopped monitor stays."""
    os.unlink(f"{directory}/lock-{uuid}")  # noqa: PTH108
    os.close(descriptor)


def listen(directory: str, uuid: str) -> socket.socket:
    """Make the command socket. Whoever connects is judged by its peer credentials, not by the mode of the file."""
    path = socket_path(directory, uuid)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    remove(path)
    listener.bind(path)
    os.chmod(path, 0o666)  # noqa: PTH101, S103
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def socket_path(directory: str, uuid: str) -> str:
    """Return the path of the command socket of `uuid`."""
    return f"{directory}/vm-{uuid}"


def remove(path: str) -> None:
    """Remove a file; one that is not there is fine."""
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        return


def kill(pidfd: int) -> None:
    """Kill a process, and wait a while for its end; raise ProcessLookupError when it is gone already."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(END_WAIT_MS)


def open_log(uuid: str, output: str) -> int:
    """Open the monitor's log for appending: `output` of the config file, else one named by the uuid.

    One that has grown over 16 MiB becomes PATH.1: who writes it may do so up to 64 MiB only.
    """
    path = output or f"{LOG_DIRECTORY}/{uuid}.log"
    directory, _, name = path.rpartition("/")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        place = os.open(directory or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            descriptor = os.open(name, flags, 0o640, dir_fd=place)
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size > LOG_LIMIT_BYTES:
                os.close(descriptor)
                os.rename(name, f"{name}.1", src_dir_fd=place, dst_dir_fd=place)
                descriptor = os.open(name, flags, 0o640, dir_fd=place)
        finally:
            os.close(place)
    except OSError as error:
        raise XenvmError(f"cannot open the log {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise XenvmError(f"output: {path} is not a regular file")
    return descriptor


def open_image(path: str) -> int:
    """Open a granted kernel or initrd for reading; symbolic links are the administrator's to make."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file")
    return descriptor


def open_in(directory: str, name: str, *, read_only: bool) -> int:
    """Open a file that lies in a directory of the host's policy; raise XenvmError when it is a link, or not there."""
    access = os.O_RDONLY if read_only else os.O_RDWR
    try:
        place = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
            return os.open(name, flags, dir_fd=place)
        finally:
            os.close(place)
    except OSError as error:
        raise XenvmError(f"{directory}/{name}: cannot open it: {error.strerror}") from error


def open_images(grants: Grants) -> list[int]:
    """Open kernel and, if granted, initrd, or firmware loader and BIOS; raise XenvmError naming the key."""
    opened: list[int] = []
    wanted = [("kernel", grants.kernel), ("initrd", grants.initrd)]
    if grants.machine:
        wanted = [("kernel", grants.kernel or hvmloader()), ("the BIOS of HVM guests", BIOS)]
    for key, path in wanted:
        if not path:
            continue
        try:
            opened.append(open_image(path))
        except OSError as error:
            for descriptor in opened:
                os.close(descriptor)
            hint = "apt install seabios qemu-system-xen" if path == BIOS else ""
            raise XenvmError(f"{key}: cannot open {path}: {error.strerror}", hint=hint) from error
    return opened


def close_all(descriptors: Iterable[int]) -> None:
    """Close each of the descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def hvmloader() -> str:
    """Return the firmware loader that belongs to the running Xen, by Debian's rule for its directory."""
    if HERE.simulator:
        raise XenvmError("hvm: a simulated host runs PV guests only", hint="on a Xen host the same file starts")
    return f"/usr/lib/xen-{_version('major')}.{_version('minor')}/boot/hvmloader"


def _version(part: str) -> str:
    path = f"/sys/hypervisor/version/{part}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise XenvmError(f"{path}: {error.strerror}", hint="is this machine a Xen dom0?") from error
    try:
        return os.read(descriptor, 16).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)


def check_files(parsed: Parsed, *, adopts: bool) -> list[ConfigIssue]:
    """Report the files of the config that cannot be opened, like every other error in it.

    Who `adopts` a domain that runs does so without the image that it came from, which may be gone by then.
    """
    return [
        ConfigIssue(need.line, need.text, f"{need.key}: {need.path[:800]}: {wrong[0]}", wrong[1])
        for need in parsed.files
        if not (adopts and need.kind == "image") and (wrong := _missing(need))
    ]


def _missing(need: FileNeed) -> tuple[str, str] | None:
    """Say what is wrong with a file that the config names, and what to do about it; None when nothing is."""
    try:
        if need.kind in ("file", "image"):
            os.close(open_image(need.path))
            return None
        mode = os.stat(need.path).st_mode  # noqa: PTH116 - pathlib costs 5 ms at each start
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid():
            return why, "a start, by root, may open it: check the file as root"
        return why, ABSENT[need.key] if error.errno == errno.ENOENT else "is the path right?"
    if need.kind == "block" and not stat.S_ISBLK(mode):
        return "not a block device", "the type of a file is file or aio; phy takes a device, as lsblk lists them"
    if stat.S_ISBLK(mode) or stat.S_ISREG(mode):
        return None
    return "neither a block device nor a regular file", "name the file with the disk's content, or a block device"


ABSENT: Final = {
    "kernel": "the kernels of this host are in /boot; a guest's own may be copied out of its disk",
    "initrd": "the kernel's initrd usually is beside it; a kernel that needs none goes without the line",
    "disk": "is the path right? `truncate -s 10G FILE` makes an empty disk of type file, `lsblk` lists block devices",
    "key-file": "is the path right? Without the very key that the disk was written with, it cannot be read",
    "startup": "suspend and checkpoint write images; restore-del removes its own once the guest is up",
}
"""What to say of a file that is not there."""


def open_console(path: str) -> int:
    """Open the terminal of a guest's console, which a helper has named; nothing but a pseudo terminal is accepted."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise XenvmError(f"console: cannot open {path}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISCHR(status.st_mode) or not 136 <= os.major(status.st_rdev) <= 143:  # UNIX98_PTY_SLAVE_MAJOR
        os.close(descriptor)
        raise XenvmError(f"console: {path} is not a pseudo terminal")
    return descriptor


def open_console_log(name: str) -> int:
    """Open what xenconsoled has logged of the guest `name`; raise XenvmError when it keeps no such log."""
    path = f"{CONSOLE_LOG_DIRECTORY}/guest-{name}.log"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise XenvmError(
            f"console: cannot open {path}: {error.strerror}",
            hint="xenconsoled keeps guest logs only with --log=guest or --log=all",
        ) from error
    return descriptor
