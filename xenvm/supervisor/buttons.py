# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands for buttons and sleep state of an HVM guest: from their parameters to requests, and to words. Pure."""

from __future__ import annotations

from xenvm.boundary.messages import Op
from xenvm.errors import UsageError
from xenvm.record import MappingProxyType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from xenvm.boundary.messages import Done

TRIGGERS: Final[Mapping[str, Op]] = MappingProxyType({"power": Op.PRESS_POWER, "sleep": Op.PRESS_SLEEP, "nmi": Op.NMI})
RESET: Final = "reset"
"""Xen has no such trigger on x86: it is a restart that does not ask."""
RESUME: Final = "s3resume"
"""Nor is this one of Xen's: it is the command of that name."""
COMMANDS: Final = ("trigger", "get-acpi-state")


def request(name: str, params: Mapping[str, str]) -> Op:
    """Return what to ask of the broker; raise UsageError for an unknown trigger."""
    if name == "trigger":
        word = params.get("params", "")
        if word not in TRIGGERS:
            raise UsageError(f"trigger: {word[:16]!a} is none of {', '.join((*TRIGGERS, RESET, RESUME))}")
        return TRIGGERS[word]
    return Op.S_STATE


def answer(name: str, done: Done) -> tuple[str, object]:
    """Return what a command says when it is done: the sleep state, or nothing."""
    if name == "get-acpi-state" and done.text.isdecimal():
        return done.text, int(done.text)
    return "", None
