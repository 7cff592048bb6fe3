# SPDX-License-Identifier: GPL-2.0-or-later
"""From the config of an HVM guest to its machine, what of it is refused, and of what to warn. No I/O."""

from __future__ import annotations

from xenvm.boundary.machine import EMULATED_NICS, Machine, NicModel, Setting
from xenvm.model import DiskType, DisplayKind, SerialKind, disk_slot
from xenvm.parser.issues import issue_at, line_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from xenvm.boundary.messages import ConfigIssue
    from xenvm.config.schema import Config
    from xenvm.model import DiskSpec
    from xenvm.parser.issues import Lines

DEFAULT_VIDEO_MIB: Final = 8  # of the cirrus card, which xl gives by default too
VIDEO_MIB: Final = (8, 16, 32, 64, 128, 256, 512)
LOOPBACK: Final = "127.0.0.1"
SCSI_IDS: Final = 7
EXTRA_LIMIT: Final = 64
TEXT_LIMIT: Final = 1024


def machine(config: Config) -> Machine:
    """Return the machine that the config describes."""
    display = config.display.kind is DisplayKind.VNC
    serial = config.serial
    return Machine(
        pae=config.pae,
        acpi=config.acpi,
        apic=config.apic,
        nx=config.nx,
        viridian=config.viridian,
        hpet=_choice(config.hpet),
        vpt_align=_choice(config.vpt_align),
        timer_mode=_choice(config.timer_mode),
        timeoffset_s=config.timeoffset_s,
        videoram_mib=(config.videoram_mib or DEFAULT_VIDEO_MIB) if display else 0,
        boot=config.boot,
        serial=serial.kind.value,
        serial_host=serial.host or "",
        serial_port=serial.port or 0,
        vnc_port=(config.display.vnc_port or 0) if display else -1,
        vnc_host=config.display.listen or LOOPBACK,
        keymap=config.display.keymap or "",
        nic_models=tuple(NicModel(nic.id, nic.model) for nic in config.nics if nic.model),
        platform=tuple(Setting(one.key, one.value) for one in config.platform),
        bios_strings=tuple(Setting(one.key, one.value) for one in config.bios_strings),
        extra=tuple(Setting(one.key, one.value or "") for one in config.extra_hvm),
        smbios=config.smbios_pt,
        oem_types=config.smbios_oem_types,
        slic=config.acpi_pt,
        power_management=config.power_management,
        oem_features=config.oem_features,
        inject_sci=config.inject_sci,
    )


def _choice(value: int | None) -> int:
    return -1 if value is None else int(value)


def refused(config: Config, lines: Lines) -> Iterator[ConfigIssue]:
    """Name every key of an HVM guest that this version cannot act on."""
    given = {
        "diskinfo_pt": config.diskinfo_pt,
        "hap": not config.hap,
        "memory_max_mib": config.memory_max_mib not in (None, config.memory_mib),
        "serial": config.serial.kind is SerialKind.DEVICE,
        "display": config.display.kind in (DisplayKind.SDL, DisplayKind.INTEL),
        "password_file": config.display.password_file is not None,
        "videoram_mib": config.videoram_mib not in (None, *VIDEO_MIB),
        "extra_hvm": len(config.extra_hvm) > EXTRA_LIMIT,
    }
    for field, wrong in given.items():
        if wrong:
            line = line_of(lines, "display" if field == "password_file" else field, FIRST_TOO_MANY.get(field, 0))
            yield issue_at(line, f"this version of xenvm {UNABLE[field]}", HINTS[field])
    for index, disk in enumerate(config.disks):
        why, hint = _disk(disk)
        if why:
            yield issue_at(line_of(lines, "disks", index), f"disk {disk.virtpath}: {why}", hint)
    if len(config.nics) > EMULATED_NICS:
        line = line_of(lines, "nics", EMULATED_NICS)
        yield issue_at(line, f"an HVM guest has at most {EMULATED_NICS} network cards", "nic-add adds more")


def warned(config: Config, lines: Lines) -> Iterator[ConfigIssue]:
    """Name every key of an HVM guest that is obeyed as far as this goes on a stock host, where nothing acts on it."""
    given = {
        "power_management": config.power_management == 1,
        "oem_features": config.oem_features != 0,
        "inject_sci": config.inject_sci != 0,
        "pci_msitranslate": not config.pci_msitranslate,
        "pci_power_management": not config.pci_power_management,
    }
    for field, odd in given.items():
        if odd:
            message = f"warning: `{field.replace('_', '-')}`: {IDLE[field]}"
            yield issue_at(line_of(lines, field), message, ADVICE.get(field, ""))


def _disk(disk: DiskSpec) -> tuple[str, str]:
    """Return why a disk cannot be emulated, "" if it can, and what to write instead."""
    slot = disk_slot(disk.device_number)
    if disk.cdrom and not disk.virtpath.startswith("hd"):
        return "the CD drives of an HVM guest are hda to hdd", "use one of these, or devtype disk"
    if disk.cdrom and (disk.crypt or disk.type in (DiskType.QCOW, DiskType.VHD)):
        return "a disc in a CD drive of an HVM guest is a file or device as it is", "use phy, file or aio, no cipher"
    if not disk.virtpath.startswith(("hd", "sd")):
        return "", ""
    if slot is None or slot.partition:
        return "QEMU emulates whole disks only", "a partition can be an xvd disk"
    if slot.family == "hd" and disk.read_only and not disk.cdrom:
        return "an emulated IDE disk is always writable", "use sd or xvd, or devtype cdrom"
    if slot.family == "sd" and slot.disk >= SCSI_IDS:
        return "the emulated SCSI bus has room for sda to sdg", "use xvd for more"
    return "", ""


UNABLE: Final = {
    "diskinfo_pt": "does not pass the identity of the host's disks through",
    "hap": "starts HVM guests with hardware assisted paging only",
    "memory_max_mib": "gives an HVM guest all of its memory at once",
    "serial": "leads the serial port of an HVM guest to pty, none or tcp:IP:PORT",
    "display": "shows the screen of an HVM guest over vnc: this host's QEMU has no sdl, and intel needs pass-through",
    "password_file": "asks for no password on VNC: Debian's QEMU for Xen is built without the DES cipher that it takes",
    "videoram_mib": f"has graphics cards with {', '.join(map(str, VIDEO_MIB))} MiB",
    "extra_hvm": f"passes at most {EXTRA_LIMIT} extra arguments on",
}
_PATCHED: Final = "QEMU, as Xen and Debian ship it, does not read that; a patched one may"
_NO_OPTION: Final = "no effect: QEMU, as Xen and Debian ship it, has no such option"
IDLE: Final = {
    "power_management": f"published as `xen_extended_power_mgmt`; {_PATCHED}",
    "oem_features": f"published as `oem_features`; {_PATCHED}",
    "inject_sci": f"published as `inject-sci`; {_PATCHED}",
    "pci_msitranslate": _NO_OPTION,
    "pci_power_management": _NO_OPTION,
}
ADVICE: Final = {"inject_sci": "the command trigger presses the power and the sleep button"}
FIRST_TOO_MANY: Final = {"extra_hvm": EXTRA_LIMIT}
HINTS: Final = {
    "diskinfo_pt": "remove the line",
    "hap": "remove the line",
    "serial": "write `serial = pty`; xenvm-cmd UUID console connects to it",
    "videoram_mib": f"remove the line for {DEFAULT_VIDEO_MIB} MiB, or write one of these numbers",
    "extra_hvm": "remove lines from this one on",
    "memory_max_mib": "leave memory-max out, or give it the value of memory",
    "display": "write `display = vnc` or `display = none`",
    "password_file": "leave it out; on 127.0.0.1, a tunnel (`ssh -L`) shows the screen to those who may log in",
}
