# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows of the table of keys: disks, network cards, PCI functions, serial port, display."""

from __future__ import annotations

from xenvm.config import devices
from xenvm.config.key import SWITCH, Group, Guests, Key
from xenvm.config.scalars import boolean
from xenvm.model import DisplayKind, DisplaySpec, SerialKind, SerialSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


DEVICE_KEYS: Final = (
    Key(
        name="disk",
        group=Group.DEVICES,
        field="disks",
        parse=devices.disk,
        value="PHYSPATH:PHYSTYPE:VIRTPATH:MODE:DEVTYPE[:KEY=VALUE...]",
        default=(),
        repeatable=True,
        published=True,
        help="A virtual disk. PHYSPATH is the device or image (empty for a CD drive without a disc), PHYSTYPE phy, "
        "file, qcow, aio or vhd; VIRTPATH hda to hdd, sda to sdp, xvda and up, with a partition number if need be; "
        "MODE r or w; DEVTYPE disk or cdrom. Options encrypt phy, file and aio disks: `key-file` (path of the raw "
        "key), `cipher` (aes-xts-plain), `key-size` (256 bits); `share=true` lets others use the "
        "same disk at the same time (a shared file system, or a disk that nobody writes); `backend-domid` can only be "
        "0. The letters of hd, sd and xvd are the same disk to a Linux guest: use each letter once.",
        applied="a vbd; with hvm a drive of QEMU too",
    ),
    Key(
        name="diskinfo-pt",
        group=Group.DEVICES,
        field="diskinfo_pt",
        parse=boolean,
        value=SWITCH,
        default=False,
        guests=Guests.HVM,
        published=True,
        help="Show the guest the SCSI identity of the disks below its phy disks. This version refuses it.",
        applied="`sm-data/scsi` of the vbd's backend in xenstore",
    ),
    Key(
        name="nic",
        group=Group.DEVICES,
        field="nics",
        parse=devices.nic,
        value="[KEY=VALUE[,KEY=VALUE...]], may be empty",
        default=(),
        synonyms=("vif",),
        repeatable=True,
        published=True,
        help="A virtual network card. `id` is 0 to 31, by default the lowest free number, in the order of the lines; "
        "`bridge` the host's bridge, by default the only one or that of the host's policy; `mac` the address, by "
        "default derived from the uuid; "
        f"`model` (hvm) one of {', '.join(devices.NIC_MODELS)}; `backend-domid` can only be 0.",
        applied="a vif; with hvm an emulated card of QEMU too",
    ),
    Key(
        name="pci",
        group=Group.DEVICES,
        field="pci",
        parse=devices.pci,
        value="ID[,bind],DOMAIN:BUS:SLOT.FUNCTION[,KEY=VALUE...]",
        default=(),
        repeatable=True,
        published=True,
        help="Hands a PCI function of the host to the guest. Functions with one ID form one device; `bind` takes the "
        "function from its driver. Options: `msitranslate`, `power_mgmt` (0 or 1), `guest_slot` (0 to 31) or "
        "`vdevfn` (0 to 255).",
        applied="nothing yet: this version refuses the key",
    ),
    Key(
        name="pci-msitranslate",
        group=Group.DEVICES,
        field="pci_msitranslate",
        parse=boolean,
        value="1 or 0",
        default=True,
        guests=Guests.HVM,
        published=True,
        help="Default of the option `msitranslate` of every `pci` line. QEMU as Xen and Debian ship it knows no "
        "such option, and `xenvm` warns of 0.",
        applied="`opts-N` of the pci backend in xenstore",
    ),
    Key(
        name="pci-power-management",
        group=Group.DEVICES,
        field="pci_power_management",
        parse=boolean,
        value="1 or 0",
        default=True,
        guests=Guests.HVM,
        published=True,
        help="Default of the option `power_mgmt` of every `pci` line. QEMU as Xen and Debian ship it knows no "
        "such option, and `xenvm` warns of 0.",
        applied="`opts-N` of the pci backend in xenstore",
    ),
    Key(
        name="serial",
        group=Group.DEVICES,
        field="serial",
        parse=devices.serial,
        value="pty, none, /dev/NAME or tcp:IP:PORT",
        default=SerialSpec(kind=SerialKind.PTY),
        blank_is_default=True,
        published=True,
        help="Where the serial port leads. A PV guest has a console instead, always on a pty: it takes `pty` only. "
        "An HVM guest takes no device in this version.",
        applied="`-serial` of QEMU",
    ),
    Key(
        name="display",
        group=Group.DEVICES,
        field="display",
        parse=devices.display,
        value="none, vnc[:OPTION[,OPTION...]], sdl or intel",
        default=DisplaySpec(kind=DisplayKind.NONE),
        hvm_default=DisplaySpec(kind=DisplayKind.VNC),
        published=True,
        help="The guest's screen. Options of vnc: `use-port-unused` (so by default) or `port=N`, a display 0 to 99 or "
        "a TCP port from 5900 on; `keymap=NAME`; `listen=ADDRESS` of the host, by default 127.0.0.1; "
        "`password-file=PATH`, which is refused, since Debian's QEMU for Xen is built without what a password takes. "
        "This version knows vnc and none, and for PV guests none.",
        applied="a listening socket of QEMU; with PV a vfb and a vkbd",
    ),
)
