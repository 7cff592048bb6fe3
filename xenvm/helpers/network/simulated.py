# SPDX-License-Identifier: GPL-2.0-or-later
"""The interfaces of a simulated host, in the terms of link.py."""

from __future__ import annotations

import errno

from xenvm.boundary.place import HERE
from xenvm.record import Record
from xenvm.simulator.client import Machine

Route = Machine


class Link(Record):
    """One interface: `kind` is "bridge" or "vif"."""

    name: str
    kind: str


def connect(wait_s: float) -> Route:  # noqa: ARG001 - the client has a limit of its own
    """Connect to the simulated machine."""
    return Machine(HERE.machine)


def attach(_tap: int, name: str) -> None:
    """Refuse: a simulated host has PV guests only."""
    raise OSError(errno.EOPNOTSUPP, f"no taps on a simulated host: {name}")


def find(route: Route, name: str) -> Link | None:
    """Return the interface of this name, None when there is none."""
    kind = route.call("interface", name=name)
    return Link(name, kind) if kind else None


def join(route: Route, port: Link, bridge: Link, address: bytes) -> None:  # noqa: ARG001
    """Put the interface `port` into the bridge."""
    route.call("join", interface=port.name, bridge=bridge.name)
