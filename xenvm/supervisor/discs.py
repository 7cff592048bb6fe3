# SPDX-License-Identifier: GPL-2.0-or-later
"""Discs of the CD drives of an HVM guest: from the parameters of a command to what the device model is asked."""

from __future__ import annotations

import os
import stat

from xenvm.errors import UsageError
from xenvm.model import disk_slot
from xenvm.supervisor.devices import device_number
from xenvm.supervisor.model import Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

COMMANDS: Final = ("cd-insert", "cd-eject")
RAW_TYPES: Final = ("file", "phy", "aio")


def steps(name: str, params: Mapping[str, str], handed: list[int]) -> list[Step]:
    """Return the steps of a command; `handed` is the disc, which is closed here when the command is refused."""
    try:
        device = _drive(name, params)
        if name == "cd-eject":
            if handed:
                raise UsageError("cd-eject: takes no descriptor")
            return ejection(device)
        if params.get("type", "file") not in RAW_TYPES:
            raise UsageError("type: a disc for an HVM guest is one of file, phy, aio: raw bytes")
        if len(handed) != 1:
            raise UsageError("cd-insert: the disc comes as an open descriptor", hint="xenvm-cmd opens it and sends it")
        mode = os.fstat(handed[0]).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError("cd-insert: the disc is neither a regular file nor a block device")
        return insertion(device, handed.pop(), block=stat.S_ISBLK(mode))
    finally:
        for descriptor in handed:
            os.close(descriptor)


def _drive(name: str, params: Mapping[str, str]) -> int:
    if not params.get("device"):
        raise UsageError(f"{name}: device= is missing")
    device = device_number(params["device"])
    slot = disk_slot(device)
    if slot is None or slot.family != "hd" or slot.partition:
        raise UsageError(f"{name}: the CD drives of an HVM guest are hda to hdd")
    return device


def insertion(device: int, descriptor: int, *, block: bool) -> list[Step]:
    """Return the steps that put a disc, an open descriptor, into a CD drive; what was in it is let go."""
    path = f"/dev/fdset/{device}"
    return [
        *ejection(device),
        Step("add-fd", {"fdset-id": device}, descriptor),
        Step(
            "blockdev-change-medium",
            {
                "id": f"ide-{device}",
                "filename": f"host_device:{path}" if block else path,
                "format": "raw",
                "read-only-mode": "retain",
            },
        ),
    ]


def ejection(device: int) -> list[Step]:
    """Return the steps that take the disc out of a CD drive, whether or not the guest has locked it."""
    return [
        Step("eject", {"id": f"ide-{device}", "force": True}),
        Step("remove-fd", {"fdset-id": device}, may_fail=True),
    ]
