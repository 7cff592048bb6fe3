# SPDX-License-Identifier: GPL-2.0-or-later
"""The console of a guest on the user's terminal: relay both ways, or print its log.

A console is the guest's own output: on a terminal it steers that terminal, as on a serial line. The log is only read,
so its control characters are shown as escapes when it goes to a terminal, and copied unchanged when it does not.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import select
import selectors
import signal
import stat
import termios
import time
import tty

from xenvm.cli import render
from xenvm.errors import ProtocolError, TimeoutExpiredError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ESCAPE = b"\x1d"
"""Ctrl-], which ends `xl console` too."""
QUIET_S = 1.0
"""How long the console must be quiet, after input that is no terminal ended, before we leave."""
STALL_S = 10.0
"""How long the guest may leave such input untaken."""
CHUNK = 4096
BACKLOG = 64 * 1024
"""How much input waits for the guest; more is left in a pipe, and lost when typed, so that Ctrl-] is always seen."""


def relay(console: int, stdin: int = 0, stdout: int = 1) -> bool:
    """Connect the console with the user until one of them ends; True when the user left, False when the console ended.

    Takes over `console`. ProtocolError when it is no terminal; TimeoutExpiredError when the guest takes no more input,
    unless a person types it, who can leave at any time.
    """
    try:
        tty.setraw(console, termios.TCSANOW)  # not TCSAFLUSH: that would drop output nobody has read yet
    except termios.error as failure:
        os.close(console)
        if failure.args[0] == errno.EIO:
            return False
        raise ProtocolError("the monitor passed something that is no console") from None
    blocking = os.get_blocking(console)
    try:
        os.set_blocking(console, False)
        with _raw_terminal(stdin) as is_terminal, selectors.PollSelector() as ready:
            return _relay(ready, console, stdin, stdout, is_terminal)
    finally:
        os.set_blocking(console, blocking)  # others may hold the same open terminal
        os.close(console)


def _relay(ready: selectors.PollSelector, console: int, stdin: int, stdout: int, is_terminal: bool) -> bool:
    pending = bytearray()
    input_ended = leaving = False
    ends_at = 0.0
    while pending or not leaving:
        listens = not input_ended and (is_terminal or len(pending) < BACKLOG)
        _watch(ready, stdin, selectors.EVENT_READ if listens else 0)
        _watch(ready, console, selectors.EVENT_READ | (selectors.EVENT_WRITE if pending else 0))
        ends = input_ended or (pending and not is_terminal)
        chosen = ready.select(max(0.0, ends_at - time.monotonic()) if ends else None)
        if ends and time.monotonic() >= ends_at:
            break
        moved = False
        for key, events in chosen:
            try:
                if key.fd == stdin:
                    given, escape, _ = _read(stdin).partition(ESCAPE)
                    leaving, input_ended = bool(escape), bool(escape) or not given
                    moved = input_ended or not pending
                    pending += given[: BACKLOG - len(pending)] if is_terminal else given
                    if input_ended and is_terminal:
                        with contextlib.suppress(OSError):  # what it takes at once: a person does not wait to leave
                            os.write(console, pending)
                        return True
                    continue
                if events & selectors.EVENT_READ:
                    shown = os.read(console, CHUNK)
                    if not shown:
                        return False
                    if not _show(stdout, shown):
                        return True
                    moved = moved or not pending
                if events & selectors.EVENT_WRITE and pending:
                    del pending[: os.write(console, pending[:CHUNK])]
                    moved = True
            except BlockingIOError:
                continue
            except OSError:  # EIO: the other end of the console is closed
                return False
        if moved:
            ends_at = time.monotonic() + (STALL_S if pending else QUIET_S)
    if pending:
        raise TimeoutExpiredError(
            f"console: the guest did not take the last {len(pending)} bytes of input within {STALL_S:g} s",
            hint="does anything read its console? `xenvm-cmd VM status` shows whether it runs",
        )
    return True


def _watch(ready: selectors.PollSelector, descriptor: int, events: int) -> None:
    """Make `ready` watch the descriptor for exactly these events."""
    watched = ready.get_map().get(descriptor)
    if watched is not None and watched.events != events:
        ready.unregister(descriptor)
        watched = None
    if watched is None and events:
        ready.register(descriptor, events)


def _read(stdin: int) -> bytes:
    try:
        return os.read(stdin, CHUNK)
    except OSError:  # the terminal is gone, or there never was an input
        return b""


def _show(stdout: int, data: bytes) -> bool:
    """Write all of the data; False when nobody reads it any more."""
    while data:
        try:
            data = data[os.write(stdout, data) :]
        except BlockingIOError:  # somebody who shares the terminal made it so
            poll = select.poll()
            poll.register(stdout, select.POLLOUT)
            poll.poll()
        except BrokenPipeError:
            return False
        except OSError as failure:
            raise XenvmError(f"cannot write the output: {failure.strerror}") from None
    return True


@contextlib.contextmanager
def _raw_terminal(stdin: int) -> Iterator[bool]:
    """Put the user's terminal into raw mode and restore it whatever happens; yields whether there is one."""
    if not os.isatty(stdin):
        yield False
        return
    before = termios.tcgetattr(stdin)
    render.note("connected to the console; Ctrl-] leaves it")
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(stdin, termios.TCSADRAIN)
        yield True
    finally:
        with contextlib.suppress(termios.error):  # the terminal itself is gone
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def copy_log(log: int, stdout: int = 1) -> None:
    """Print what the log holds at this moment. Takes over `log`; ProtocolError when it is no regular file."""
    try:
        if not stat.S_ISREG(os.fstat(log).st_mode):
            raise ProtocolError("the monitor passed something that is no log file")
        left = os.fstat(log).st_size
        for_people = os.isatty(stdout)
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        while left > 0 and (data := os.read(log, min(left, 65536))):
            left -= len(data)
            if for_people:
                text = decoder.decode(data, final=left == 0).replace("\r", "")
                data = render.plain(text).encode("utf-8")
            if not _show(stdout, data):
                return
    except OSError as failure:
        raise XenvmError(f"cannot read the log: {failure.strerror}") from None
    finally:
        os.close(log)
