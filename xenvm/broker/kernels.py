# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel of a job on its way to the builder: unpacked by a process without privilege, once, and kept for later.

What is not packed is handed over as it is; the builder takes ELF files only.

A cache entry is a file of root in DIRECTORY, named by three words: which compressed file it was made of (device, inode,
size and both times of it, hashed), the SHA-256 of what is in it, and the boot of the host in which that was last
compared. Two kernels are the same when these numbers are the same: changing a file changes its ctime, which nobody can
set on a file system of this host. So only kernels are kept that belong to root, that nobody else may write, and that
lie on the file systems of the host itself (HOST_PATHS). The numbers of any other mean nothing, a tenant may have made
them with the whole file system: it is unpacked into memory at every start. To hash eight megabytes of compressed
kernel instead would take longer than all the rest.

What makes an entry trustworthy: the file has no name before it is whole, on the disk, and summed by a second process
that never saw the compressed image; whoever could write to it has ended before anybody reads it. After a boot, when the
power may have failed in between, it is summed again before its first use.

Without the directory, or without room in it, kernels are unpacked into memory, at every start.
"""

from __future__ import annotations

import os
import stat
import time

from xenvm.boundary.messages import Failed
from xenvm.boundary.workers import Sum, Summed, Unpack, Unpacked
from xenvm.broker.actlog import hexdigest
from xenvm.broker.making import Making
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Final

    from xenvm.boundary.checks import Message
    from xenvm.broker.making import Steps

DIRECTORY: Final = "/var/cache/xenvm"
KEEP_WAIT_S: Final = 600.0
ENTRIES_LIMIT: Final = 8  # an unpacked kernel of Debian has 60 MiB
SIZE_LIMIT_BYTES: Final = 2 << 30
ELF: Final = b"\x7fELF"
HOST_PATHS: Final = ("/", "/boot", "/usr")  # their file systems are the host's own
FREE_BYTES: Final = 2 << 30  # as much stays free on the disk of the cache: others need it, the act logs among them
SETTLED_NS: Final = 2_000_000_000  # a file this young may still change without a change of its times


class Cache:
    """The kept kernels; all its failures are like finding nothing."""

    def __init__(self, path: str = DIRECTORY) -> None:
        self._directory = -1
        with suppress(OSError):
            self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            status = os.fstat(self._directory)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:  # others could put something else here
                self.close()

    def close(self) -> None:
        """Close the directory; twice is harmless."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def find(self, key: str) -> tuple[str, int]:
        """Return name and open descriptor of the entry for `key`; "" and -1 without one."""
        for name in self._names():
            if name.startswith(f"{key}-"):
                with suppress(OSError):
                    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
                    if _is_entry(os.fstat(descriptor)):
                        return name, descriptor
                    os.close(descriptor)
                self.drop(name)
        return "", -1

    def new_file(self) -> int:
        """Return a file without a name, to be written; -1 where there can be none."""
        if self._directory < 0:
            return -1
        try:
            room = os.fstatvfs(self._directory)
            if room.f_bavail * room.f_frsize < FREE_BYTES:
                return -1
            return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o400, dir_fd=self._directory)
        except OSError:
            return -1

    def keep(self, descriptor: int, name: str) -> None:
        """Give a file of new_file() its name, and drop the oldest entries when there are too many."""
        with suppress(OSError):
            source = f"/proc/self/fd/{descriptor}"
            os.link(source, name, dst_dir_fd=self._directory, follow_symlinks=True)
        entries = []
        for other in self._names():
            with suppress(OSError):
                status = os.stat(other, dir_fd=self._directory, follow_symlinks=False)
                entries.append((status.st_mtime_ns, other, status.st_size))
        entries.sort(reverse=True)
        total = 0
        for place, (_, other, size) in enumerate(entries):
            total += size
            if other != name and (place >= ENTRIES_LIMIT or total > SIZE_LIMIT_BYTES):
                self.drop(other)

    def rename(self, name: str, new: str) -> None:
        """Note in the name that the entry was compared."""
        with suppress(OSError):
            os.rename(name, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def drop(self, name: str) -> None:
        """Remove an entry; one that is gone is fine."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self._directory)

    def _names(self) -> list[str]:
        if self._directory < 0:
            return []
        with suppress(OSError):
            return os.listdir(self._directory)  # noqa: PTH208 - pathlib costs 5 ms
        return []


class Kernel(Making):
    """One kernel being made ready for the builder."""

    WHAT: ClassVar = "kernel"

    def __init__(self, image: int, uuid: str, log: int) -> None:
        """Take over `image`, the open file that the config names. Raise XenvmError when it cannot be used."""
        self._image = image
        self._cache = Cache()
        self._fresh = self._unpacked = -1
        self._key, self._in_memory = "", False
        super().__init__(uuid, log)

    def keep(self) -> bool:
        """After the start: begin to put the unpacked kernel into the cache; tell whether there is anything to do.

        It has to be done by `end_s` (monotonic); who calls this closes it then.
        """
        if self._fresh < 0:
            return False
        self.end_s = time.monotonic() + KEEP_WAIT_S
        self._steps = self._settle()
        with suppress(XenvmError):
            self._go_on(None)
        return self.child is not None

    def _forget(self) -> None:
        self._forget_fresh()
        for descriptor in (self._image, self._unpacked):
            if descriptor >= 0:
                os.close(descriptor)
        self._image = self._unpacked = -1
        self._cache.close()

    def _forget_fresh(self) -> None:
        if self._fresh >= 0:
            os.close(self._fresh)
            self._fresh = -1

    def _prepare(self) -> Steps:
        """Find or make the unpacked kernel; each worker that works on it is yielded."""
        if os.pread(self._image, len(ELF), 0) == ELF:
            return [self._image]
        before = os.fstat(self._image)
        self._key = key_of(before)
        if not is_hosts_own(before):
            self._cache.close()
        name, self._unpacked = self._cache.find(self._key)
        if name:
            digest, _, boot = name[len(self._key) + 1 :].partition("-")
            if boot == boot_id():
                return [self._unpacked]
            summed = yield self._ask(Sum(), self._unpacked)
            if isinstance(summed, Summed) and summed.digest == digest:
                os.lseek(self._unpacked, 0, os.SEEK_SET)
                self._cache.rename(name, f"{self._key}-{digest}-{boot_id()}")
                return [self._unpacked]
            self._cache.drop(name)
            os.close(self._unpacked)
            self._unpacked = -1
        self._fresh = self._cache.new_file()
        answer: Message | None = None
        if self._fresh >= 0:
            answer = yield self._ask(Unpack(), self._image, self._fresh)
        if answer is None or isinstance(answer, Failed):  # no cache, or its disk may be full
            self._forget_fresh()
            self._fresh = os.memfd_create("kernel", os.MFD_CLOEXEC)
            self._in_memory = True
            answer = yield self._ask(Unpack(), self._image, self._fresh)
        if isinstance(answer, Failed):
            fault = answer.fault
            raise XenvmError(f"kernel: {fault.message}", hint=fault.hint, code=ExitCode(fault.code))
        if not isinstance(answer, Unpacked):
            raise ProtocolError("an unpacker answered with something else")
        if not answer.size_bytes:
            self._forget_fresh()
            return [self._image]
        # Opened anew, for reading: whoever could write to it has ended.
        self._unpacked = os.open(f"/proc/self/fd/{self._fresh}", os.O_RDONLY | os.O_CLOEXEC)
        after = os.fstat(self._image)
        changed = key_of(after) != self._key or time.time_ns() - after.st_ctime_ns < SETTLED_NS
        if self._in_memory or changed:
            self._forget_fresh()
        return [self._unpacked]

    def _settle(self) -> Steps:
        """Have what was unpacked summed by somebody who never saw the compressed image, and keep it then."""
        summed = yield self._ask(Sum(), self._unpacked)
        if isinstance(summed, Summed):
            self._cache.keep(self._fresh, f"{self._key}-{summed.digest}-{boot_id()}")
        return []


def key_of(status: os.stat_result) -> str:
    """Return the word for the very state of a file."""
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return hexdigest(repr(parts).encode("ascii"))[:32]


def is_hosts_own(status: os.stat_result) -> bool:
    """Tell whether a file is the administrator's, on a file system whose times can be believed."""
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        return False
    for path in HOST_PATHS:
        with suppress(OSError):
            if os.stat(path).st_dev == status.st_dev:  # noqa: PTH116 - pathlib costs 5 ms
                return True
    return False


def boot_id() -> str:
    """Return what the kernel names this boot of the host, in hexadecimal digits."""
    descriptor = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 64).decode("ascii").strip().replace("-", "")
    finally:
        os.close(descriptor)


def _is_entry(status: os.stat_result) -> bool:
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and stat.S_IMODE(status.st_mode) == 0o400
        and status.st_nlink == 1
        and status.st_size > 0
    )
