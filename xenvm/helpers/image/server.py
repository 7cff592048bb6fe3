# SPDX-License-Identifier: GPL-2.0-or-later
"""A qemu-storage-daemon that serves one image: started, given its image, ended when that fails.

It takes an image by name only, not as a descriptor, and runs as a user who may open none. So the name it gets means
nothing: it opens it with O_DIRECT, a filter hands such an open to this process (direct_open_listener), and this
process answers with the image. When this process has ended, a further such open fails.

It inherits everything that confines this process except the parent-death signal: it must outlive it.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import fcntl
import os
import select
import stat
import struct
import time

from xenvm.boundary.confine import direct_open_listener
from xenvm.boundary.spawn import signal_name
from xenvm.errors import TimeoutExpiredError, XenvmError
from xenvm.helpers.image import nbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

PROGRAM: Final = "/usr/bin/qemu-storage-daemon"
START_WAIT_S: Final = 30.0
END_WAIT_MS: Final = 5000
SAID_BYTES: Final = 4096

# linux/seccomp.h. struct seccomp_notif is id, pid, flags, struct seccomp_data (64 bytes); struct seccomp_notif_addfd
# is id, flags, descriptor here, number there, its flags. With SEND the number there becomes the result of the call.
NOTICE: Final = struct.Struct("=QII64x")
NOTICE_RECEIVE: Final = 0xC0502100
ANSWER: Final = struct.Struct("=QIIII")
ANSWER_ADD_DESCRIPTOR: Final = 0x40182103
ANSWER_SEND: Final = 1 << 1

LISTENING_THERE: Final = 3  # there lies the broker's channel here, which must not stay open
_ABOVE_TARGETS: Final = 16

Command = list[str]


def command(driver: str, label: str, *, device: bool, read_only: bool) -> Command:
    """Return the argument list; `device` is true for an image that lies on a block device.

    Without a backing file, whatever the header says. no-flush is off: a guest's flush reaches the disk. `label` names
    the export: it tells in the process list, and to the broker, whose disk this is.
    """
    reading = "true" if read_only else "false"
    below = "host_device" if device else "file"
    backing = "" if driver == "vpc" else ',"backing":null'
    return [
        PROGRAM,
        "--blockdev",
        f'{{"driver":"{below}","node-name":"file","filename":"/image","read-only":{reading},"auto-read-only":false,'
        '"discard":"unmap","cache":{"direct":true,"no-flush":false}}',
        "--blockdev",
        f'{{"driver":"{driver}","node-name":"image","file":"file","read-only":{reading},"discard":"unmap"{backing}}}',
        "--nbd-server",
        f"addr.type=fd,addr.str={LISTENING_THERE},max-connections=1",
        "--export",
        f'{{"type":"nbd","id":"{label}","node-name":"image","name":"","writable":{"false" if read_only else "true"}}}',
    ]


class Server:
    """One daemon from its start to the end of the NBD handshake; then it is on its own, or has ended."""

    def __init__(self, image: int, driver: str, label: str, listening: int, *, read_only: bool) -> None:
        """Start it; raise XenvmError when the program cannot be run."""
        self._image = image
        self._end = time.monotonic() + START_WAIT_S
        _prefer_direct(image)
        device = stat.S_ISBLK(os.fstat(image).st_mode)
        self._opens = direct_open_listener()
        self._said, theirs = socket.socketpair()
        sources = {1: 0, 2: theirs.fileno(), LISTENING_THERE: listening}  # 0 is /dev/null, and stays
        copies = {there: fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, _ABOVE_TARGETS) for there, here in sources.items()}
        argv = command(driver, label, device=device, read_only=read_only)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, copy, there) for there, copy in copies.items()]
            self.pid = os.posix_spawn(PROGRAM, argv, {}, file_actions=actions, setsid=True)
        except OSError as error:
            raise XenvmError(
                f"cannot run {PROGRAM}: {error.strerror}",
                hint="apt install qemu-utils qemu-system-common: one of them brings it, by the release of Debian",
            ) from error
        finally:
            theirs.close()
            for copy in copies.values():
                os.close(copy)
        self._pidfd = os.pidfd_open(self.pid)

    def negotiate(self, client: socket.socket) -> tuple[int, int]:
        """Wait until it serves, and shake hands; return the size in bytes and the transmission flags."""
        poll = select.poll()
        for source in (self._opens, self._pidfd, client.fileno()):
            poll.register(source, select.POLLIN)
        while True:
            left_ms = (self._end - time.monotonic()) * 1000
            ready = [number for number, _ in poll.poll(left_ms)] if left_ms > 0 else []
            if not ready:
                raise TimeoutExpiredError(
                    f"qemu-storage-daemon did not serve the image within {START_WAIT_S:g} s{self._last_words()}",
                    hint="is the disk under the image very busy?",
                )
            if self._pidfd in ready:
                raise XenvmError(
                    f"qemu-storage-daemon does not serve the image, it {self._how()}{self._last_words()}",
                    hint="qemu-img check says whether the image is sound; another process may have it locked",
                )
            if self._opens in ready:
                self._lend()
            if client.fileno() in ready:
                return nbd.negotiate(client, self._end)

    def end(self) -> None:
        """Kill and reap it, with whatever it may have started."""
        os.killpg(self.pid, signal.SIGKILL)  # its number is its own until it is reaped here
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(END_WAIT_MS):
            os.waitpid(self.pid, os.WNOHANG)

    def _lend(self) -> None:
        """Answer one open with the image. The one who asked may be gone by now."""
        notice = bytearray(NOTICE.size)
        try:
            fcntl.ioctl(self._opens, NOTICE_RECEIVE, notice)
            untrusted_id = NOTICE.unpack(notice)[0]
            fcntl.ioctl(
                self._opens,
                ANSWER_ADD_DESCRIPTOR,
                ANSWER.pack(untrusted_id, ANSWER_SEND, self._image, 0, os.O_CLOEXEC),
            )
        except OSError as error:
            if self._gone():
                return
            raise XenvmError(
                f"cannot hand the image to qemu-storage-daemon: {error.strerror}", hint="Linux 5.14 or later can"
            ) from error

    def _gone(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(100))

    def _how(self) -> str:
        """Say how it ended; its number stays its own, so that end() cannot meet another process."""
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            return "is about to end"
        if ended.si_code == os.CLD_EXITED:
            return f"ended with status {ended.si_status}"
        return f"died of {signal_name(ended.si_status)}"

    def _last_words(self) -> str:
        """Return what it wrote to its standard error, made fit to show: the part behind the echoed option."""
        try:
            untrusted_words = self._said.recv(SAID_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return ""
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else " " for byte in untrusted_words).strip()
        return f": {text.rpartition('}: ')[2][:400]}" if text else ""


def _prefer_direct(image: int) -> None:
    """Let reads and writes of the image pass the page cache by, where its file system can; QEMU works with either."""
    try:
        fcntl.fcntl(image, fcntl.F_SETFL, fcntl.fcntl(image, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:  # EINVAL, open(2)
        return
