# SPDX-License-Identifier: GPL-2.0-or-later
"""What a config says of a VM's processors, as it crosses between processes. No I/O."""

from __future__ import annotations

from xenvm.boundary.checks import Checked, array, number, string

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Final

_MASK_DIGITS: Final = frozenset("01xks")


def _mask(text: str) -> bool:
    return not text or (len(text) == 32 and _MASK_DIGITS.issuperset(text))


class CpuidRule(Checked):
    """One `cpuid` line: leaf, subleaf (-1 none) and four masks of 32 characters or "", eax to edx (xenctrl.h)."""

    leaf: int
    subleaf: int
    masks: tuple[str, ...]
    CHECKS: ClassVar = {
        "leaf": number(0, 2**32 - 1),
        "subleaf": number(-1, 2**32 - 1),
        "masks": array(string(32, _mask), 4),
    }


class Affinity(Checked):
    """One `cpus-affinity` line: the physical CPUs that a virtual CPU may run on."""

    vcpu: int
    cpus: tuple[int, ...]
    CHECKS: ClassVar = {"vcpu": number(0, 8191), "cpus": array(number(0, 8191), 8192)}
