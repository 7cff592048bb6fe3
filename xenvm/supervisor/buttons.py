# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands for the buttons and the sleep of an HVM guest: from their parameters to requests, and to words. Pure."""

from __future__ import annotations

from xenvm.boundary.messages import Op
from xenvm.errors import UsageError, WrongStateError
from xenvm.record import MappingProxyType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from xenvm.boundary.messages import Done

TRIGGERS: Final[Mapping[str, Op]] = MappingProxyType({"power": Op.PRESS_POWER, "nmi": Op.NMI})
ASLEEP: Final = frozenset({"sleep", "s3resume", "s3suspend"})
RESET: Final = "reset"
"""Xen has no such trigger on x86: it is a restart that does not ask."""
COMMANDS: Final = ("trigger", "s3suspend", "s3resume", "get-acpi-state")


def request(name: str, params: Mapping[str, str]) -> Op:
    """Return what to ask of the broker; raise UsageError for an unknown trigger, WrongStateError for sleep."""
    if name == "trigger":
        word = params.get("params", "")
        if word in ASLEEP:
            raise _unable(f"trigger: {word}")
        if word not in TRIGGERS:
            raise UsageError(f"trigger: {word[:16]!a} is none of {', '.join((*TRIGGERS, RESET))}")
        return TRIGGERS[word]
    if name in ASLEEP:
        raise _unable(name)
    return Op.S_STATE


def _unable(what: str) -> WrongStateError:
    return WrongStateError(f"{what}: this version does not put guests to sleep", hint="the command pause stops a guest")


def answer(name: str, done: Done) -> tuple[str, object]:
    """Return what a command says when it is done: the sleep state, or nothing."""
    if name == "get-acpi-state" and done.text.isdecimal():
        return done.text, int(done.text)
    return "", None
