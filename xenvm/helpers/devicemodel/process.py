# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU from its start until it has taken up its domain; then it is on its own, or has ended.

It inherits what confines this process except the parent-death signal, which it must outlive, and may make no further
process. It gives up root itself, once Xen's devices and xenstore are open: nobody else can open them for it.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import fcntl
import os
import select
import time

from xenvm.boundary.confine import forbid_children_and_networks
from xenvm.boundary.machine import is_tty
from xenvm.boundary.qmp import Conversation, QmpError
from xenvm.boundary.spawn import signal_name
from xenvm.errors import TimeoutExpiredError, XenvmError
from xenvm.helpers.devicemodel import argv

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.machine import Launch

START_WAIT_S: Final = 60.0  # what xl gives it
VERSION_WAIT_S: Final = 30.0
LAST_WORDS_BYTES: Final = 2048
POLL_S: Final = 0.02
VERSION: Final = b"QEMU emulator version "
PTY: Final = "pty:"
_ABOVE_TARGETS: Final = 128
_FIRST_TARGET: Final = 3
_STOP: Final = 70


def major_version() -> int:
    """Return the major number of the installed QEMU; raise XenvmError when there is none for Xen."""
    readable, writable = os.pipe2(os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, writable, 1)]
        pid = os.posix_spawn(argv.PROGRAM, [argv.PROGRAM, "--version"], {}, file_actions=actions)
    except OSError as error:
        os.close(readable)
        raise XenvmError(
            f"cannot run {argv.PROGRAM}: {error.strerror}", hint="apt install qemu-system-xen seabios"
        ) from error
    finally:
        os.close(writable)
    poll = select.poll()
    poll.register(readable, select.POLLIN)
    said = os.read(readable, 4096) if poll.poll(VERSION_WAIT_S * 1000) else b""
    os.close(readable)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    major = said.partition(VERSION)[2].partition(b".")[0]
    if not major.isdigit():
        raise XenvmError(f"{argv.PROGRAM} does not tell its version")
    return int(major)


class Qemu:
    """One QEMU."""

    def __init__(self, launch: Launch, handed: list[int], uid: int, major: int) -> None:
        """Start it; raise XenvmError when the program cannot be run. `handed` are the message's, and taken over."""
        log, listener, saving, client, *rest = handed
        self._log = log
        self._client = socket.socket(fileno=os.dup(client))
        self._vnc = rest.pop(0) if launch.machine.vnc_port >= 0 else -1
        self._launch = launch
        sources = [listener, saving, *rest]
        targets = range(_FIRST_TARGET, _FIRST_TARGET + len(sources))
        numbers = self._numbers(targets)
        self._incoming = numbers.incoming
        command = argv.command(launch, numbers, uid, major)
        self._end = time.monotonic() + START_WAIT_S
        self.pid = os.fork()
        if self.pid == 0:
            _become(command, log, dict(zip(targets, sources, strict=True)))
        self._pidfd = os.pidfd_open(self.pid)
        for descriptor in (client, *sources):  # while somebody else can accept, QEMU's end is not the connection's
            os.close(descriptor)

    def _numbers(self, targets: range) -> argv.Descriptors:
        numbers = iter(targets)
        qmp, saving = next(numbers), next(numbers)
        serial = next(numbers) if self._launch.machine.serial == "tcp" else -1
        drives = tuple(tuple(next(numbers) for _ in range(drive.descriptors)) for drive in self._launch.drives)
        taps = tuple(next(numbers) for _ in self._launch.taps)
        return argv.Descriptors(qmp, saving, serial, drives, taps, next(numbers) if self._launch.incoming else -1)

    def take_up(self) -> str:
        """Wait until it runs, and give it its screen's socket; return the terminal of its serial port, "" without one.

        Raise XenvmError with how it ended, TimeoutExpiredError when it does not come so far.
        """
        conversation = Conversation(self._client, self._end)
        try:
            conversation.greet()
            if self._vnc >= 0:
                conversation.ask("getfd", {"fdname": "vnc"}, (self._vnc,))
                conversation.ask("display-update", {"type": "vnc", "addresses": [{"type": "fd", "str": "vnc"}]})
            tty = _terminal(conversation.ask("query-chardev")) if self._launch.machine.serial == "pty" else ""
            if self._incoming >= 0:  # not before: whoever made the image could answer for it from now on
                conversation.ask("migrate-incoming", {"uri": f"fd:{self._incoming}"})
            while self._incoming >= 0 and _status(conversation.ask("query-status")) == "inmigrate":
                time.sleep(POLL_S)  # it reads its state; a state that it cannot read ends it
            conversation.ask("cont")
        except TimeoutError:
            raise TimeoutExpiredError(
                f"device model: QEMU did not come up within {START_WAIT_S:g} s{self._last_words()}",
                hint="is this host very busy?",
            ) from None
        except QmpError as error:
            raise XenvmError(f"device model: {error.message}{self._how()}{self._last_words()}") from None
        return tty

    def _how(self) -> str:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(1000):
            return ""
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None or ended.si_code != os.CLD_EXITED:
            return f"; it died of {signal_name(ended.si_status)}" if ended else ""
        return f"; it ended with status {ended.si_status}"

    def _last_words(self) -> str:
        """Return the last line of its log, made fit to show."""
        try:
            size = os.lseek(self._log, 0, os.SEEK_END)
            said = os.pread(self._log, LAST_WORDS_BYTES, max(0, size - LAST_WORDS_BYTES))
        except OSError:
            return ""
        lines = [line for line in said.splitlines() if line.strip()]
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else " " for byte in lines[-1]).strip() if lines else ""
        return f": {text[-400:]}" if text else ""


def _become(command: list[str], log: int, sources: dict[int, int]) -> None:
    """Become QEMU, in the child after a fork: exactly its descriptors, no parent to die with, no children."""
    try:
        os.setsid()
        copies = {there: fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, _ABOVE_TARGETS) for there, here in sources.items()}
        os.dup2(log, 1)
        os.dup2(log, 2)
        for there, copy in copies.items():
            os.dup2(copy, there)
        forbid_children_and_networks()
        os.execve(command[0], command, {"XEN_DOMAIN_ID": command[2]})  # noqa: S606 - no shell is wanted
    except BaseException as error:  # noqa: BLE001 - there is nobody to raise it to; the log has it
        os.write(2, f"cannot become QEMU: {error}\n".encode("ascii", "replace"))
    os._exit(_STOP)


def _status(untrusted: object) -> str:
    """Pick what QEMU is doing out of the answer to query-status."""
    return str(untrusted.get("status")) if isinstance(untrusted, dict) else ""


def _terminal(untrusted_devices: object) -> str:
    """Pick the serial port's terminal out of the answer to query-chardev. No guest has run, no state was read yet."""
    for untrusted in untrusted_devices if isinstance(untrusted_devices, list) else ():
        if isinstance(untrusted, dict) and untrusted.get("label") == "serial0":
            tty = str(untrusted.get("filename")).removeprefix(PTY)
            if tty and is_tty(tty):
                return tty
    raise QmpError("the device model does not say where its serial port is")
