# SPDX-License-Identifier: GPL-2.0-or-later
"""Start a process of xenvm: a fresh interpreter, an empty environment, exactly the listed descriptors."""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import fcntl
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final


_START: Final = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "_start.py")  # noqa: PTH100, PTH118, PTH120 - pathlib costs 5 ms at each start
_ABOVE_TARGETS: Final = 64  # sources are copied above every fixed number first, so that no copy overwrites another


def command(role: str, *arguments: str) -> list[str]:
    """Return the argument list that starts `role`, a value of privileges.Role (or the member, which is a str too)."""
    return [sys.executable, "-I", "-S", "-B", _START, role, *arguments]


def spawn(role: str, descriptors: Mapping[int, int], *arguments: str, new_session: bool = False) -> int:
    """Start a process of `role` with `descriptors` (number there to number here); return its pid.

    All other descriptors stay behind: Python opens each close-on-exec.
    """
    copies: dict[int, int] = {}
    try:
        for there, here in descriptors.items():
            copies[there] = fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, _ABOVE_TARGETS)
        actions = [(os.POSIX_SPAWN_DUP2, copy, there) for there, copy in copies.items()]
        argv = command(role, *arguments)
        return os.posix_spawn(argv[0], argv, {}, file_actions=actions, setsid=new_session)
    finally:
        for copy in copies.values():
            os.close(copy)


def signal_name(number: int) -> str:
    """Return the name of a signal."""
    names: dict[int, str] = {
        value: name for name, value in vars(signal).items() if name.startswith("SIG") and name[3].isalpha()
    }
    return names.get(number, f"signal {number}")
