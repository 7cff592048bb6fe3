# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks and network cards in messages: what the config grants, what is plugged, what is seen. No I/O."""

from __future__ import annotations

import re
from enum import StrEnum

from xenvm.boundary.checks import Checked, array, choice, flag, number, string

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Final

DISKS_LIMIT: Final = 64
NICS_LIMIT: Final = 32
DEVICE_MAX: Final = 2**29 - 1  # the extended form of xen/io/blkif.h: bit 28, 20 bits of disk, 8 of partition
MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
BRIDGE: Final = re.compile(r"[!-.0-9;-~]{0,15}", re.ASCII)  # IFNAMSIZ is 16 with its NUL; "" is the host's default
SERVER: Final = re.compile(r"([1-9][0-9]{0,9} [0-9]{1,20})?", re.ASCII)
PRINTABLE: Final = re.compile(r"[\x20-\x7e]*", re.ASCII)
CIPHER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_()-]{0,63})?", re.ASCII)


class Kind(StrEnum):
    """The two classes of devices, by their names in xenstore."""

    VBD = "vbd"
    VIF = "vif"


class DiskGrant(Checked):
    """A disk the VM may have. `device` is the vbd number, `name` the one in the guest; `cipher` "" is no encryption.

    `path` of a disk that a client hands over as a descriptor is only shown, never opened.
    """

    device: int
    name: str
    type: str
    path: str
    read_only: bool
    cdrom: bool
    share: bool
    cipher: str
    key_size_bits: int
    key_file: str
    CHECKS: ClassVar = {
        "device": number(1, DEVICE_MAX),
        "name": string(32, PRINTABLE),
        "type": string(8, re.compile("phy|file|aio|qcow|vhd")),
        "path": string(4095),
        "read_only": flag,
        "cdrom": flag,
        "share": flag,
        "cipher": string(64, CIPHER),
        "key_size_bits": number(0, 4096),
        "key_file": string(4095),
    }


class NicGrant(Checked):
    """A network card the VM may have; `bridge` "" is the host's default one."""

    id: int
    bridge: str
    mac: str
    CHECKS: ClassVar = {"id": number(0, NICS_LIMIT - 1), "bridge": string(15, BRIDGE), "mac": string(17, MAC)}


class Vbd(Checked):
    """A disk to plug: `major` and `minor` are of the opened block device, -1 while it is not open yet.

    `source` is for people. `server` is pid and start time (clock ticks since boot, proc(5)) of the process that serves
    the image, "" without one.
    """

    device: int
    name: str
    read_only: bool
    cdrom: bool
    share: bool
    source: str
    major: int
    minor: int
    server: str
    CHECKS: ClassVar = {
        "device": number(1, DEVICE_MAX),
        "name": string(32, PRINTABLE),
        "read_only": flag,
        "cdrom": flag,
        "share": flag,
        "source": string(1024, PRINTABLE),
        "major": number(-1, 4095),
        "minor": number(-1, 2**20 - 1),
        "server": string(31, SERVER),
    }


class Vif(Checked):
    """A network card to plug into a bridge that exists."""

    id: int
    bridge: str
    mac: str
    CHECKS: ClassVar = {"id": number(0, NICS_LIMIT - 1), "bridge": string(15, BRIDGE), "mac": string(17, MAC)}


class DeviceState(Checked):
    """One device as found: states are those of xen/io/xenbus.h, -1 when missing or no number.

    `detail` is the source of a disk, the MAC address of a card; `bridge` and `server` as in Vif and Vbd.
    """

    kind: Kind
    device: int
    name: str
    backend: int
    frontend: int
    read_only: bool
    detail: str
    bridge: str
    server: str
    CHECKS: ClassVar = {
        "kind": choice(Kind),
        "device": number(0, DEVICE_MAX),
        "name": string(32, PRINTABLE),
        "backend": number(-1, 8),
        "frontend": number(-1, 8),
        "read_only": flag,
        "detail": string(1024, PRINTABLE),
        "bridge": string(15, BRIDGE),
        "server": string(31, SERVER),
    }


def label(uuid: str, device: int) -> str:
    """Return the name that everything bears which is made on this host for one disk of a VM."""
    return f"xenvm-{uuid}-{device}"


VBDS: Final = array(Vbd.from_body, DISKS_LIMIT)
VIFS: Final = array(Vif.from_body, NICS_LIMIT)
DISK_GRANTS: Final = array(DiskGrant.from_body, DISKS_LIMIT)
NIC_GRANTS: Final = array(NicGrant.from_body, NICS_LIMIT)
STATES: Final = array(DeviceState.from_body, DISKS_LIMIT + NICS_LIMIT)
