# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules for CPUID that follow from the keys of an HVM guest. No I/O."""

from __future__ import annotations

from xenvm.boundary.processors import CpuidRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.machine import Machine

NX_LEAF: Final = 0x80000001
NX_POSITION: Final = 31 - 20  # edx bit 20; masks begin with bit 31


def rules(machine: Machine, given: tuple[CpuidRule, ...]) -> tuple[CpuidRule, ...]:
    """Return the rules for CPUID with `nx` in them; the config's own word on that bit counts more."""
    if machine.nx:
        return given
    masks = ["x" * 32] * 4
    rest = []
    for rule in given:
        if rule.leaf == NX_LEAF and rule.subleaf < 0:
            masks = [mask or "x" * 32 for mask in rule.masks]
        else:
            rest.append(rule)
    edx = masks[3]
    if edx[NX_POSITION] == "x":
        masks[3] = edx[:NX_POSITION] + "0" + edx[NX_POSITION + 1 :]
    return (*rest, CpuidRule(NX_LEAF, -1, tuple(masks)))
