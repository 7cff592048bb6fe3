# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks and network cards in messages: what the config grants, what is plugged, what is seen. No I/O."""

from __future__ import annotations

from xenvm import forms
from xenvm.boundary.checks import Checked, array, choice, flag, number, string
from xenvm.choice import StrChoice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Final

DISKS_LIMIT: Final = 64
NICS_LIMIT: Final = 32
DEVICE_MAX: Final = 2**29 - 1  # the extended form of xen/io/blkif.h: bit 28, 20 bits of disk, 8 of partition
_WORD: Final = forms.LETTERS | forms.DIGITS

is_mac: Final = forms.grouped(":", forms.HEX_DIGITS, 2, 2, 2, 2, 2, 2)
# The kernel's names of interfaces: visible ASCII but / and :, IFNAMSIZ is 16 with its NUL; "" is the host's default.
is_bridge: Final = forms.of(frozenset(map(chr, range(0x21, 0x7F))) - frozenset("/:"), 0, 15)
_pid: Final = forms.number(10, zero=False)
_ticks: Final = forms.of(forms.DIGITS, 1, 20)
_cipher: Final = forms.of(_WORD | frozenset("_()-"), 0, 64)


def is_server(text: str) -> bool:
    """Tell whether a text is a process number and a start time, or empty."""
    pid, _, ticks = text.partition(" ")
    return not text or (_pid(pid) and _ticks(ticks))


def is_cipher(text: str) -> bool:
    """Tell whether a text may be the name of a cipher, or is empty."""
    return not text or (_cipher(text) and text[0] in _WORD)


class Kind(StrChoice):
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
        "name": string(32, forms.printable),
        "type": string(8, forms.one_of("phy", "file", "aio", "qcow", "vhd")),
        "path": string(4095),
        "read_only": flag,
        "cdrom": flag,
        "share": flag,
        "cipher": string(64, is_cipher),
        "key_size_bits": number(0, 4096),
        "key_file": string(4095),
    }


class NicGrant(Checked):
    """A network card the VM may have; `bridge` "" is the host's default one."""

    id: int
    bridge: str
    mac: str
    CHECKS: ClassVar = {"id": number(0, NICS_LIMIT - 1), "bridge": string(15, is_bridge), "mac": string(17, is_mac)}


class Vbd(Checked):
    """A disk to plug: `major` and `minor` are of the opened block device, -1 while it is not open yet.

    `source` is for people. `server` is pid and start time (clock ticks since boot, proc(5)) of the process that serves
    the image, "" without one. `names` are other paths by which another toolstack may know the disk.
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
    names: tuple[str, ...] = ()
    CHECKS: ClassVar = {
        "device": number(1, DEVICE_MAX),
        "name": string(32, forms.printable),
        "read_only": flag,
        "cdrom": flag,
        "share": flag,
        "source": string(1024, forms.printable),
        "major": number(-1, 4095),
        "minor": number(-1, 2**20 - 1),
        "server": string(31, is_server),
        "names": array(string(1024), 8),
    }


class Vif(Checked):
    """A network card to plug into a bridge that exists."""

    id: int
    bridge: str
    mac: str
    CHECKS: ClassVar = {"id": number(0, NICS_LIMIT - 1), "bridge": string(15, is_bridge), "mac": string(17, is_mac)}


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
        "name": string(32, forms.printable),
        "backend": number(-1, 8),
        "frontend": number(-1, 8),
        "read_only": flag,
        "detail": string(1024, forms.printable),
        "bridge": string(15, is_bridge),
        "server": string(31, is_server),
    }


def label(uuid: str, device: int) -> str:
    """Return the name that everything bears which is made on this host for one disk of a VM."""
    return f"xenvm-{uuid}-{device}"


VBDS: Final = array(Vbd.from_body, DISKS_LIMIT)
VIFS: Final = array(Vif.from_body, NICS_LIMIT)
DISK_GRANTS: Final = array(DiskGrant.from_body, DISKS_LIMIT)
NIC_GRANTS: Final = array(NicGrant.from_body, NICS_LIMIT)
STATES: Final = array(DeviceState.from_body, DISKS_LIMIT + NICS_LIMIT)
