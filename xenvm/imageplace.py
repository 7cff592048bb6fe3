# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a save image is to be: a file without a name until it is whole, an older one of that name untouched until then.

xenvm-cmd has one, with the rights of its user; the broker, where the host's policy opens a directory to clients.
"""

from __future__ import annotations

import errno
import os
import stat

from xenvm.context import suppress
from xenvm.errors import PermissionRefusedError, UsageError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

NO_NAMELESS_FILES: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})  # open(2), O_TMPFILE
NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK})  # link(2), file systems without hard links
MODE: Final = 0o600  # it holds the guest's memory


class Target:
    """The place of a new image: an open directory, and the file that is to get its name there."""

    def __init__(self, command: str, path: str) -> None:
        """Make the file, which has no name yet if the file system can do that; raise XenvmError when it cannot be."""
        self.path = os.path.abspath(path)  # noqa: PTH100 - pathlib costs start time
        folder, self._name = os.path.split(self.path)
        if not self._name or path.endswith("/"):
            raise UsageError(f"{command}: file= names no file: {path}")
        self._beside = f".{self._name[:200]}.xenvm-{os.urandom(8).hex()}"
        self._before = f"{self._beside}.before"  # the name that an older file has until all is certain
        self._named = self._kept = False
        self._directory = self.file = -1
        try:
            self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._check()
            self.file = self._open()
        except OSError as error:
            self.close()
            kind = PermissionRefusedError if isinstance(error, PermissionError) else XenvmError
            raise kind(f"{command}: cannot write {self.path}: {error.strerror}") from error
        except XenvmError:
            self.close()
            raise

    def _check(self) -> None:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self._name, dir_fd=self._directory, follow_symlinks=False).st_mode):
                raise UsageError(f"{self.path} exists and is not a regular file", hint="name a file beside it")

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY
        try:
            return os.open(".", flags | os.O_TMPFILE, MODE, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in NO_NAMELESS_FILES:
                raise
        made = os.open(self._beside, flags | os.O_CREAT | os.O_EXCL, MODE, dir_fd=self._directory)
        self._named = True
        return made

    def take_over(self) -> None:
        """Give the file its name, in place of an older one, and have that on the disk; raise XenvmError if it fails.

        The older one is kept until `confirm` or `give_back`, where the file system has hard links.
        """
        try:
            with suppress(FileNotFoundError):
                self._keep()
            if not self._named:
                os.link(f"/proc/self/fd/{self.file}", self._beside, dst_dir_fd=self._directory, follow_symlinks=True)
                self._named = True
            os.rename(self._beside, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._named = False
        except OSError as error:
            self.confirm()  # the older file has its own name still
            raise XenvmError(f"the image cannot be named {self.path}: {error.strerror}; the guest runs on") from error
        try:
            os.fsync(self._directory)
        except OSError as error:
            what = self.give_back()
            raise XenvmError(
                f"the name {self.path} cannot be put on the disk: {error.strerror}; the guest runs on; {what}"
            ) from error

    def _keep(self) -> None:
        try:
            places = {"src_dir_fd": self._directory, "dst_dir_fd": self._directory}
            os.link(self._name, self._before, **places, follow_symlinks=False)
            self._kept = True
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise

    def confirm(self) -> None:
        """Let go of the older file: the image is to be restored from now on. Works twice."""
        if self._kept:
            with suppress(OSError):
                os.unlink(self._before, dir_fd=self._directory)
            self._kept = False

    def give_back(self) -> str:
        """Give the name back to the older file, since the guest has run on; return what has become of the files."""
        try:
            there, ours = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False), os.fstat(self.file)
            if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
                return self.which()
            if self._kept:
                os.rename(self._before, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                self._kept = False
                return f"{self.path} is the file that it was"
            os.unlink(self._name, dir_fd=self._directory)
        except OSError as error:
            return f"{error.strerror}: {self.which()}"
        return f"the image {self.path} was removed"

    def which(self) -> str:
        """Say which file is which when it is not certain whether the guest has run on."""
        older = f", the older file is {os.path.dirname(self.path)}/{self._before}" if self._kept else ""  # noqa: PTH120
        return f"the new image is {self.path}{older}; do not restore an image whose guest has run on"

    def close(self) -> None:
        """Close all; a file that did not get its name is gone. Works twice."""
        if self._named:
            with suppress(OSError):
                os.unlink(self._beside, dir_fd=self._directory)
            self._named = False
        for descriptor in (self.file, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self.file = self._directory = -1
