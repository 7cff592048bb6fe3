# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors a user can meet, each with its exit code. Imports next to nothing."""

from xenvm.choice import IntChoice


class ExitCode(IntChoice):
    """Exit status of every xenvm program; the names are the stable error names on the socket."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    NO_MONITOR = 4
    WRONG_STATE = 5
    CONFIG_REFUSED = 6
    TIMED_OUT = 7
    PERMISSION_REFUSED = 8
    BUSY = 9


class XenvmError(Exception):
    """What failed, in one sentence; `hint` says what to try; `code` is the exit status."""

    code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "", code: ExitCode | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code


class UsageError(XenvmError):
    """The command line or a command's arguments are off."""

    code = ExitCode.USAGE


class WrongStateError(XenvmError):
    """The command cannot happen in the present state."""

    code = ExitCode.WRONG_STATE


class ConfigError(XenvmError):
    """The config file is refused; nothing was started."""

    code = ExitCode.CONFIG_REFUSED


class TimeoutExpiredError(XenvmError):
    """A wait reached its deadline."""

    code = ExitCode.TIMED_OUT


class PermissionRefusedError(XenvmError):
    """The peer may not do this."""

    code = ExitCode.PERMISSION_REFUSED


class BusyError(XenvmError):
    """Another operation or another monitor is at work; the message says which."""

    code = ExitCode.BUSY


class ProtocolError(XenvmError):
    """A frame or message that no honest peer sends; the connection ends."""
