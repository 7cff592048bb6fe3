# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine of an HVM guest in messages: what the config grants, and how its device model is started. No I/O."""

from __future__ import annotations

from xenvm import forms
from xenvm.boundary.checks import INT32_MAX, NAME, Checked, Message, array, choice, flag, number, string
from xenvm.boundary.devices import DEVICE_MAX, DISKS_LIMIT, NICS_LIMIT, is_mac, is_server
from xenvm.choice import StrChoice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Final

WORD: Final = forms.of(forms.LETTERS | forms.DIGITS | frozenset("_.-"), 1, 64)
IPV4: Final = forms.of(forms.DIGITS | frozenset("."), 0, 15)
BOOT: Final = forms.of(frozenset("acdn"), 0, 4)
KEYMAP: Final = forms.of(forms.LETTERS | forms.DIGITS | frozenset("_-"), 0, 32)
TERMINALS: Final = "/dev/pts/"
CIRRUS_MIB: Final = (8, 16)
"""What the older one of the two emulated graphics cards can have."""
EMULATED_NICS: Final = 8
"""Of the cards of one guest; PCI slots are few."""
LAUNCH_DESCRIPTORS: Final = 64
OEM_TYPES: Final = array(number(128, 255), 128)
"""Types of SMBIOS structures that are the vendor's own."""
STATE_LIMIT_BYTES: Final = 64 << 20
"""The most that a device model may say of its state; some hundred kilobytes are usual."""


def is_tty(text: str) -> bool:
    """Tell whether this is the name of a pseudo terminal, or "" for none."""
    number_of = text.removeprefix(TERMINALS)
    return not text or (text.startswith(TERMINALS) and 0 < len(number_of) <= 6 and forms.DIGITS.issuperset(number_of))


class Setting(Checked):
    """A name with a text: a platform node, a BIOS string, an argument of QEMU (then "" is no value)."""

    key: str
    value: str
    CHECKS: ClassVar = {"key": string(64, WORD), "value": string(1024)}


class NicModel(Checked):
    """Which card QEMU emulates beside a vif."""

    id: int
    model: str
    CHECKS: ClassVar = {"id": number(0, NICS_LIMIT - 1), "model": string(32, WORD)}


class Machine(Checked):
    """What an HVM guest finds beyond memory and devices. -1 stands for "as Xen does it".

    `vnc_port` is a TCP port at `vnc_host`, 0 the first unused one, -1 no display. `serial` is pty, none or tcp. With
    `smbios` it sees tables of the host's SMBIOS, of the vendor's own types those in `oem_types` or all; with `slic` the
    licence tables of its ACPI. The last three, when not 0, are for a device
    model that knows them, which stock QEMU does not.
    """

    pae: bool
    acpi: bool
    apic: bool
    nx: bool
    viridian: bool
    hpet: int
    vpt_align: int
    timer_mode: int
    timeoffset_s: int
    videoram_mib: int
    boot: str
    serial: str
    serial_host: str
    serial_port: int
    vnc_port: int
    vnc_host: str
    keymap: str
    nic_models: tuple[NicModel, ...]
    platform: tuple[Setting, ...]
    bios_strings: tuple[Setting, ...]
    extra: tuple[Setting, ...]
    smbios: bool
    oem_types: tuple[int, ...]
    slic: bool
    power_management: int = 0
    oem_features: int = 0
    inject_sci: int = 0
    CHECKS: ClassVar = {
        **dict.fromkeys(("pae", "acpi", "apic", "nx", "viridian"), flag),
        "hpet": number(-1, 1),
        "vpt_align": number(-1, 1),
        "timer_mode": number(-1, 3),
        "timeoffset_s": number(-INT32_MAX, INT32_MAX),
        "videoram_mib": number(0, 512),
        "boot": string(4, BOOT),
        "serial": string(8, forms.one_of("pty", "none", "tcp")),
        "serial_host": string(15, IPV4),
        "serial_port": number(0, 65535),
        "vnc_port": number(-1, 65535),
        "vnc_host": string(15, IPV4),
        "keymap": string(32, KEYMAP),
        "nic_models": array(NicModel.from_body, NICS_LIMIT),
        "platform": array(Setting.from_body, 256),
        "bios_strings": array(Setting.from_body, 256),
        "extra": array(Setting.from_body, 64),
        "smbios": flag,
        "oem_types": OEM_TYPES,
        "slic": flag,
        "power_management": number(0, 2),
        **dict.fromkeys(("oem_features", "inject_sci"), number(0, INT32_MAX)),
    }

    @property
    def card(self) -> str:
        """The graphics card, as libxl names it: cirrus, std, or none without a display."""
        if self.vnc_port < 0:
            return "none"
        return "cirrus" if self.videoram_mib in CIRRUS_MIB else "std"


class ModelState(Checked):
    """The device model of a domain: `server` is pid and start time, `tty` its serial port's terminal, "" without one.

    `vnc_port` is the TCP port that it serves, 0 without a display.
    """

    server: str
    tty: str
    vnc_port: int
    CHECKS: ClassVar = {"server": string(31, is_server), "tty": string(24, is_tty), "vnc_port": number(0, 65535)}


class Drive(Checked):
    """A drive for QEMU. `descriptors` of the message are its own: none for an empty CD drive, then 1 to read or 2.

    `block` tells that they are of a block device and not of a file.
    """

    device: int
    name: str
    cdrom: bool
    block: bool
    descriptors: int
    CHECKS: ClassVar = {
        "device": number(1, DEVICE_MAX),
        "name": string(32, forms.printable),
        "cdrom": flag,
        "block": flag,
        "descriptors": number(0, 2),
    }


class Tap(Checked):
    """An emulated network card for QEMU; its open tap is a descriptor of the message."""

    id: int
    mac: str
    model: str
    CHECKS: ClassVar = {"id": number(0, NICS_LIMIT - 1), "mac": string(17, is_mac), "model": string(32, WORD)}


class Launch(Message):
    """Broker to devicemodel: start QEMU for `domid`.

    Descriptors: the log, QMP's two listening sockets, one connected to the first; then as they are wanted VNC's
    listening socket, the connected serial socket; then those of the drives and the taps, in their order; at the end, if
    it is `incoming`, the file with the state that it begins with.
    """

    domid: int
    name: str
    uuid: str
    vcpus: int
    memory_mib: int
    machine: Machine
    drives: tuple[Drive, ...]
    taps: tuple[Tap, ...]
    incoming: bool
    KIND: ClassVar = 50
    DESCRIPTORS: ClassVar = LAUNCH_DESCRIPTORS
    CHECKS: ClassVar = {
        "domid": number(1, 0x7FEF),
        "name": string(64, NAME),
        "uuid": string(36, forms.uuid),
        "vcpus": number(1, 8192),
        "memory_mib": number(1, 2**32),
        "machine": Machine.from_body,
        "drives": array(Drive.from_body, DISKS_LIMIT),
        "taps": array(Tap.from_body, EMULATED_NICS),
        "incoming": flag,
    }


class Launched(Message):
    """Devicemodel to broker: QEMU is process `pid`; a second one says that it is up. `tty` as in ModelState."""

    pid: int
    up: bool
    tty: str
    KIND: ClassVar = 51
    CHECKS: ClassVar = {"pid": number(1, INT32_MAX), "up": flag, "tty": string(24, is_tty)}


class Loaded(Message):
    """Builder to broker: the domain is whole but for its device model, which may start now."""

    domid: int
    KIND: ClassVar = 52
    CHECKS: ClassVar = {"domid": number(1, 0x7FEF)}


class EndModel(Message):
    """Builder to broker: end this device model (the form of ModelState.server), whose domain is about to go.

    An empty `server` is not known: the broker looks for the one of this VM and domain.
    """

    domid: int
    server: str
    KIND: ClassVar = 53
    CHECKS: ClassVar = {"domid": number(1, 0x7FEF), "server": string(31, is_server)}


class Model(Message):
    """Broker to supervisor: the VM has a device model, and here is a connection to its QMP socket; or it has none.

    `vnc_port` as in ModelState.
    """

    running: bool
    vnc_port: int
    KIND: ClassVar = 54
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {"running": flag, "vnc_port": number(0, 65535)}


class Wish(StrChoice):
    """What is asked of a device model over a save or a resume."""

    TRACK = "track"  # note which memory it writes to, for the library that copies it
    UNTRACK = "untrack"
    SAVE = "save"  # stand still, and say its state
    RUN = "run"  # and note nothing any more: right at any moment, and twice


class Attach(Message):
    """Broker to qmp: here is a connection to the QMP socket; with a second descriptor, a file for its state."""

    KIND: ClassVar = 55
    DESCRIPTORS: ClassVar = 2
    CHECKS: ClassVar = {}


class Wished(Message):
    """Builder to broker, and on to qmp: ask this of the device model, and answer Granted or Failed."""

    wish: Wish
    KIND: ClassVar = 56
    CHECKS: ClassVar = {"wish": choice(Wish)}


class Granted(Message):
    """Qmp to broker, and on to the builder: the device model has done it."""

    KIND: ClassVar = 57
    CHECKS: ClassVar = {}


MACHINES: Final = array(Machine.from_body, 1)
MODELS: Final = array(ModelState.from_body, 1)
MACHINE_MESSAGES: Final = (Launch, Launched, Loaded, EndModel, Model, Attach, Wished, Granted)
