# SPDX-License-Identifier: GPL-2.0-or-later
"""The nouns every part of xenvm shares: frozen values, no input or output, nothing but the standard library.

Text is turned into these values by the config package; numbers are derived from them (device numbers, MAC addresses)
by the pure functions at the end.
"""

from __future__ import annotations

from xenvm import forms
from xenvm.choice import StrChoice
from xenvm.record import Record

# Loaded early, since the parser can open no file later; and this module of CPython without the 5 ms of OpenSSL.
try:
    from _md5 import md5  # type: ignore[import-not-found]
except ImportError:
    from hashlib import md5

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NewType

    Uuid = NewType("Uuid", str)
    """A VM's identity, canonical and lower-cased; it stays the same over reboot, suspend and restore."""

    Domid = NewType("Domid", int)
    """Xen's number of a domain; it changes with every incarnation of the VM."""
else:  # `typing` costs as much as the start of the interpreter
    Uuid, Domid = str, int


class Action(StrChoice):
    """What to do with the domain after the guest ended by itself."""

    DESTROY = "destroy"
    PRESERVE = "preserve"
    REBOOT = "reboot"


class StartupKind(StrChoice):
    """What the monitor does with the VM when it starts; the restore kinds need a file."""

    STARTED = "started"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    RESTORE = "restore"
    RESTORE_DELETE = "restore-del"


class Compression(StrChoice):
    """How the bytes of a save image are stored."""

    NONE = "none"
    ZSTD = "zstd"


class DiskType(StrChoice):
    """How the bytes of a virtual disk are stored."""

    PHY = "phy"
    FILE = "file"
    QCOW = "qcow"
    AIO = "aio"
    VHD = "vhd"


class SerialKind(StrChoice):
    """Where the first serial port leads."""

    PTY = "pty"
    NONE = "none"
    DEVICE = "device"
    TCP = "tcp"


class DisplayKind(StrChoice):
    """How the guest's screen is shown."""

    NONE = "none"
    VNC = "vnc"
    SDL = "sdl"
    INTEL = "intel"


class CryptSpec(Record, kw_only=True):
    """Encryption of a virtual disk (plain dm-crypt, cryptsetup(8)); the key is the raw content of `key_file`."""

    key_file: str
    cipher: str = "aes-xts-plain"
    key_size_bits: int = 256


class DiskSpec(Record, kw_only=True):
    """One virtual disk; an empty `path` is a CD drive without a disc."""

    path: str
    type: DiskType
    virtpath: str
    read_only: bool
    cdrom: bool
    crypt: CryptSpec | None = None
    share: bool = False

    @property
    def device_number(self) -> int:
        """The vbd number, `virtual-device` in xenstore."""
        return virtual_device_number(self.virtpath)


class NicSpec(Record, kw_only=True):
    """One virtual network card; `id` is its device id, unset parts are chosen when it is plugged."""

    id: int
    bridge: str | None = None
    mac: str | None = None
    model: str | None = None

    def mac_for(self, uuid: Uuid) -> str:
        """Return the configured address, or the one derived from the VM's uuid."""
        return self.mac or derived_mac(self.id, self.model, uuid)


class PciAddress(Record):
    """The address of one PCI function on the host."""

    domain: int
    bus: int
    slot: int
    function: int

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}.{self.function:x}"


class PciSpec(Record, kw_only=True):
    """One PCI function handed to the guest; functions of one `group` form one device of the guest."""

    group: int
    address: PciAddress
    bind: bool = False
    msitranslate: bool | None = None
    power_mgmt: bool | None = None
    guest_slot: int | None = None
    vdevfn: int | None = None


class SerialSpec(Record, kw_only=True):
    """Where the serial port leads: `path` belongs to DEVICE, `host` (IPv4) and `port` to TCP."""

    kind: SerialKind
    path: str | None = None
    host: str | None = None
    port: int | None = None


class DisplaySpec(Record, kw_only=True):
    """The guest's screen; `vnc_port` is a TCP port, None takes the first unused one, on the host's address `listen`."""

    kind: DisplayKind
    vnc_port: int | None = None
    keymap: str | None = None
    listen: str | None = None
    password_file: str | None = None


class CpuidSpec(Record, kw_only=True):
    """A change to one CPUID leaf: 32 characters for each register, bit 31 first (see `cpuid` in xenvm.cfg(5))."""

    leaf: int
    subleaf: int | None = None
    eax: str | None = None
    ebx: str | None = None
    ecx: str | None = None
    edx: str | None = None


class AffinitySpec(Record, kw_only=True):
    """The host CPUs that one virtual CPU may run on, ascending."""

    vcpu: int
    cpus: tuple[int, ...]


class PlatformSpec(Record, kw_only=True):
    """A node below `platform` in the domain's xenstore directory, read by hvmloader."""

    key: str
    value: str


class BiosString(Record, kw_only=True):
    """An SMBIOS text that the guest sees, by its name in xen/hvm/hvm_xs_strings.h."""

    key: str
    value: str


class ExtraArgument(Record, kw_only=True):
    """One more argument of the device model: `-key value`, or `-key` alone when `value` is None."""

    key: str
    value: str | None = None


def parse_uuid(text: str) -> Uuid:
    """Return the uuid that `text` spells as 8-4-4-4-12 hexadecimal digits, lower-cased; raise ValueError otherwise."""
    lowered = text.lower()
    # isascii first: lower() maps the Kelvin sign and others to ASCII letters
    if not text.isascii() or not forms.uuid(lowered):
        raise ValueError("a uuid has the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx (hexadecimal digits)")
    return Uuid(lowered)


# Majors of the block devices a guest knows, from Linux include/uapi/linux/major.h
_MAJOR_IDE0: Final = 3
_MAJOR_IDE1: Final = 22
_MAJOR_SCSI0: Final = 8
_MAJOR_XVD: Final = 202

# xen/io/blkif.h and Linux drivers/block/xen-blkfront.c: bit 28 marks the extended form, higher bits are not defined
_EXTENDED: Final = 1 << 28
_EXTENDED_DISKS: Final = 1 << 20
_EXTENDED_PARTITIONS: Final = 256

_FAMILIES: Final = ("hd", "sd", "xvd")
_letters: Final = forms.of(forms.LOWER, 1, 5)
_partition: Final = forms.number(4, zero=False)
_disk_index: Final = forms.number(7)
_partition_index: Final = forms.number(4)
_decimal: Final = forms.number(10, zero=False)
_hexadecimal: Final = forms.of(forms.HEX_DIGITS, 1, 8)


def virtual_device_number(name: str) -> int:
    """Return the device number of `hda`, `sdb1`, `xvdc`, `d3p0` or a plain number, as Xen's vbd-interface(7) has it.

    Raises ValueError for a name of another form, or a disk or partition out of the range of its kind.
    """
    for family in _FAMILIES:  # hda, sdb1, xvdc
        rest = name.removeprefix(family)
        letters = rest.rstrip("0123456789")
        digits = rest[len(letters) :]
        if rest != name and _letters(letters) and (not digits or _partition(digits)):
            disk = 0
            for letter in letters:
                disk = disk * 26 + ord(letter) - ord("a") + 1
            return _device_number(name, family, disk - 1, int(digits or 0))
    index, p, partition = name.removeprefix("d").partition("p")
    if name.startswith("d") and p and _disk_index(index) and _partition_index(partition):  # d3p0
        return _device_number(name, "xvd", int(index), int(partition))
    if _decimal(name) or (name.startswith("0x") and _hexadecimal(name[2:])):
        number = int(name, 0)
        if not 0 < number < 2 * _EXTENDED:
            raise ValueError(f"device number {name} is out of range (1..{2 * _EXTENDED - 1})")
        return number
    raise ValueError(f"`{name}` is no virtual disk name; give one like hda, sda or xvda")


def _device_number(name: str, kind: str, disk: int, partition: int) -> int:
    if kind == "hd":
        if disk > 3 or partition > 63:
            raise ValueError(f"`{name}` is out of range: hda to hdd, partitions 1 to 63")
        major = _MAJOR_IDE0 if disk < 2 else _MAJOR_IDE1
        return major << 8 | (disk & 1) << 6 | partition
    if kind == "sd":
        if disk > 15 or partition > 15:
            raise ValueError(f"`{name}` is out of range: sda to sdp, partitions 1 to 15")
        return _MAJOR_SCSI0 << 8 | disk << 4 | partition
    if disk < 16 and partition < 16:
        return _MAJOR_XVD << 8 | disk << 4 | partition
    if disk >= _EXTENDED_DISKS or partition >= _EXTENDED_PARTITIONS:
        raise ValueError(f"`{name}` is out of range: at most {_EXTENDED_DISKS} disks, partitions 1 to 255")
    return _EXTENDED | disk << 8 | partition


class DiskSlot(Record):
    """A device number taken apart: the family of names, the disk within it (0 is `a`), the partition (0 is none)."""

    family: str
    disk: int
    partition: int


def disk_slot(number: int) -> DiskSlot | None:
    """Return which disk a device number of `virtual_device_number` means; None for a major that is none of ours."""
    if number & _EXTENDED:
        return DiskSlot("xvd", (number ^ _EXTENDED) >> 8, number & 0xFF)
    major, minor = number >> 8, number & 0xFF
    if major in (_MAJOR_IDE0, _MAJOR_IDE1):
        first = 0 if major == _MAJOR_IDE0 else 2
        # IDE majors carry two disks of 64 minors; a plain number may name a minor beyond them
        return DiskSlot("hd", first + (minor >> 6), minor & 0x3F) if minor < 128 else None
    if major in (_MAJOR_SCSI0, _MAJOR_XVD):
        return DiskSlot("sd" if major == _MAJOR_SCSI0 else "xvd", minor >> 4, minor & 0xF)
    return None


def same_disk(number: int, other: int) -> bool:
    """Tell whether two device numbers are one disk for a Linux guest, or one of them a partition of the other."""
    slot, second = disk_slot(number), disk_slot(other)
    if slot is None or second is None or slot.disk != second.disk:
        return number == other
    # xen_translate_vdev() in Linux drivers/block/xen-blkfront.c maps hdX, sdX and xvdX to one minor
    return slot.family != second.family or slot.partition == second.partition or 0 in (slot.partition, second.partition)


def derived_mac(nic_id: int, model: str | None, uuid: Uuid) -> str:
    """Return the MAC address of a card without one: a function of its id, its model and the VM's uuid.

    The rule is that of earlier xenvm, so a guest keeps its addresses: MD5 of the words joined by blanks, hexadecimal
    digits i and i+12 make an octet, for i = 0, 2, 1, 7, 6, 4; the first octet is made unicast and locally administered.
    """
    words = [str(nic_id), *([model] if model else []), uuid]
    digits = md5(" ".join(words).encode(), usedforsecurity=False).hexdigest()
    octets = [int(digits[i] + digits[i + 12], 16) for i in (0, 2, 1, 7, 6, 4)]
    octets[0] = octets[0] & 0xFE | 0x02
    return ":".join(f"{octet:02x}" for octet in octets)
