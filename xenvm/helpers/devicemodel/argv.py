# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line: a pure function of what is granted. No I/O.

QEMU opens no path that a config names: drives and cards come as open descriptors, and so do the sockets of QMP, of VNC
and of a serial port over TCP. Options that differ between QEMU 7.2 and 10 are in OLD and NEW.
"""

from __future__ import annotations

from xenvm.model import disk_slot
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from xenvm.boundary.machine import Drive, Launch, Machine

PROGRAM: Final = "/usr/libexec/xen-qemu-system-i386"
ROOT: Final = "/var/lib/xenvm/empty"
NEW_MAJOR: Final = 10  # the release without -chroot, -runas, -no-acpi, -no-hpet
CARDS: Final = {"cirrus": "cirrus-vga", "std": "VGA"}


class Descriptors(Record):
    """Numbers in QEMU of what it was handed; -1 without one."""

    qmp: int
    saving: int
    serial: int
    drives: tuple[tuple[int, ...], ...]
    taps: tuple[int, ...]
    incoming: int


def command(launch: Launch, descriptors: Descriptors, uid: int, major: int) -> list[str]:
    """Return the arguments that start QEMU `major` for a domain, as user `uid` in an empty root directory."""
    machine = launch.machine
    return [
        *(PROGRAM, "-xen-domid", str(launch.domid), "-xen-domid-restrict", "-no-shutdown", "-S"),
        *_monitor("qmp", descriptors.qmp),
        *_monitor("saving", descriptors.saving),
        *("-nodefaults", "-no-user-config", "-name", launch.name, "-uuid", launch.uuid),
        *("-display", "none", "-vnc", "none"),  # the socket to listen on comes later, as a descriptor
        *(("-k", machine.keymap) if machine.keymap else ()),
        *_serial(machine, descriptors.serial),
        *_screen(machine),
        *(("-boot", f"order={machine.boot}") if machine.boot else ()),
        *(("-usb", "-device", "usb-tablet") if machine.vnc_port >= 0 else ()),
        *(("-smp", f"{launch.vcpus},maxcpus={launch.vcpus}") if launch.vcpus > 1 else ()),
        *_cards(launch, descriptors),
        *_machine(machine, major),
        *("-m", str(launch.memory_mib - machine.videoram_mib)),
        *_drives(launch, descriptors),
        *(("-incoming", "defer") if launch.incoming else ()),  # it reads the state when it is told to
        *_confinement(uid, major),
        *(word for extra in machine.extra for word in (f"-{extra.key}", extra.value) if word),
    ]


def _monitor(name: str, descriptor: int) -> tuple[str, ...]:
    return "-chardev", f"socket,id={name},fd={descriptor},server=on,wait=off", "-mon", f"chardev={name},mode=control"


def _confinement(uid: int, major: int) -> tuple[str, ...]:
    if major >= NEW_MAJOR:
        return "-run-with", f"chroot={ROOT},user={uid}:{uid}"
    return "-chroot", ROOT, "-runas", f"{uid}:{uid}"


def _machine(machine: Machine, major: int) -> tuple[str, ...]:
    options = "xenfv,suppress-vmdesc=on"
    if major >= NEW_MAJOR:
        return "-machine", options + ("" if machine.acpi else ",acpi=off")
    return "-machine", options, *(() if machine.acpi else ("-no-acpi",))


def _serial(machine: Machine, descriptor: int) -> tuple[str, ...]:
    if machine.serial == "none":
        return ()
    if machine.serial == "tcp":
        return "-chardev", f"socket,id=serial0,fd={descriptor}", "-serial", "chardev:serial0"
    return "-chardev", "pty,id=serial0", "-serial", "chardev:serial0"


def _screen(machine: Machine) -> tuple[str, ...]:
    if machine.card not in CARDS:
        return ()
    return "-device", f"{CARDS[machine.card]},vgamem_mb={machine.videoram_mib}"


def _cards(launch: Launch, descriptors: Descriptors) -> Iterator[str]:
    if not launch.taps:
        yield from ("-nic", "none")
    for tap, descriptor in zip(launch.taps, descriptors.taps, strict=True):
        yield from ("-netdev", f"tap,id=net{tap.id},fd={descriptor}")
        yield from ("-device", f"{tap.model},id=nic{tap.id},netdev=net{tap.id},mac={tap.mac}")


def _drives(launch: Launch, descriptors: Descriptors) -> Iterator[str]:
    """Give the drives; each has its descriptors in a set of its own, out of which QEMU takes the one it needs.

    Locking is off: QEMU's two descriptors of one drive would conflict, and the broker has locked the image.
    """
    controller = False
    for drive, given in zip(launch.drives, descriptors.drives, strict=True):
        number = drive.device
        for descriptor in given:
            yield from ("-add-fd", f"fd={descriptor},set={number}")
        slot = disk_slot(drive.device)
        if slot is None:
            raise ValueError(f"{drive.name} is no drive of QEMU")
        name, index = f"ide-{drive.device}", slot.disk
        if drive.cdrom:
            medium = f",{_medium(drive, number)}" if given else ""
            yield from ("-drive", f"if=none,id={name},media=cdrom,readonly=on{medium}")
            yield from ("-device", f"ide-cd,id={name},drive={name},bus=ide.{index // 2},unit={index % 2}")
        elif slot.family == "hd":
            yield from ("-drive", f"if=ide,index={index},media=disk,{_medium(drive, number)}")
        else:
            if not controller:
                yield from ("-device", "lsi53c895a,id=scsi0")
                controller = True
            only_read = ",readonly=on" if len(given) == 1 else ""
            yield from ("-drive", f"if=none,id=scsi-{drive.device},{_medium(drive, number)}{only_read}")
            yield from ("-device", f"scsi-hd,drive=scsi-{drive.device},bus=scsi0.0,scsi-id={index}")


def _medium(drive: Drive, number: int) -> str:
    """Raw bytes out of a set of descriptors.

    Those of a disk pass the page cache by, since blkback reads and writes the same block device.
    """
    driver = "host_device" if drive.block else "file"
    cache = "writeback" if drive.cdrom else "none"
    return f"format=raw,cache={cache},file.driver={driver},file.filename=/dev/fdset/{number},file.locking=off"
