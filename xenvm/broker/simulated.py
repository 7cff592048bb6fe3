# SPDX-License-Identifier: GPL-2.0-or-later
"""Loop devices of a simulated host: a connection to its machine stands for the open device."""

from __future__ import annotations

import os
import stat

from xenvm.boundary.place import HERE
from xenvm.errors import XenvmError
from xenvm.simulator.client import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.devices import DiskGrant

LOOP_MAJOR: Final = 7
_numbers: Final[dict[int, int]] = {}


def refuse(grant: DiskGrant) -> None:
    """Raise XenvmError for a disk that needs what a simulated host has not."""
    if grant.cipher or grant.type in ("qcow", "vhd"):
        raise XenvmError(
            f"disk {grant.name}: {grant.path}: a simulated host has neither nbd nor dm-crypt",
            hint="there, disks are of the types file, aio and phy, without a cipher",
        )


def loop(image: int) -> int:
    """Return what stands for an open loop device over the image, which is closed here."""
    try:
        machine = Machine(HERE.machine)
        number = machine.call("loop", image)
    finally:
        os.close(image)
    descriptor = machine.detach()
    _numbers[descriptor] = os.makedev(LOOP_MAJOR, number)
    return descriptor


def number(descriptor: int) -> int:
    """Return the device number of an open disk."""
    status = os.fstat(descriptor)
    return _numbers[descriptor] if stat.S_ISSOCK(status.st_mode) else status.st_rdev
