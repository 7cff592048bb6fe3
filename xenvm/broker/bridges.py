# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's bridges, and which one a network card without a `bridge` gets."""

from __future__ import annotations

import os

from xenvm.boundary.devices import Vif
from xenvm.boundary.place import HERE
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from xenvm.boundary.devices import NicGrant


INTERFACES: Final = f"{HERE.sysfs}/class/net"


def bridges() -> list[str]:
    """Return the names of the host's bridges."""
    names = sorted(os.listdir(INTERFACES))  # noqa: PTH208 - pathlib costs 5 ms
    return [name for name in names if os.path.isdir(f"{INTERFACES}/{name}/bridge")]  # noqa: PTH112


def choose(nics: Iterable[NicGrant], default: str) -> tuple[Vif, ...]:
    """Return what to plug for each card; raise XenvmError naming the card whose bridge is not there."""
    there = bridges()
    return tuple(Vif(nic.id, _bridge(nic, default, there), nic.mac) for nic in nics)


def _bridge(nic: NicGrant, default: str, there: list[str]) -> str:
    wanted = nic.bridge or default
    if wanted:
        if wanted not in there:
            listed = f"this host has {', '.join(there)}" if there else "this host has no bridge at all"
            raise XenvmError(
                f"network card {nic.id}: there is no bridge {wanted}; {listed}",
                hint=f"ip link add {wanted} type bridge makes one",
            )
        return wanted
    if len(there) == 1:
        return there[0]
    if not there:
        raise XenvmError(
            f"network card {nic.id}: this host has no bridge", hint="ip link add br0 type bridge makes one"
        )
    raise XenvmError(
        f"network card {nic.id}: this host has several bridges, {', '.join(there)}",
        hint="name one with bridge=NAME, or the default in /etc/xenvm/policy.toml",
    )
