# SPDX-License-Identifier: GPL-2.0-or-later
"""The form of a save image: what stands before and after the stream of libxenguest. Bytes only, no input or output.

It is the file that `xl save` writes (tools/xl/xl_vmcontrol.c, docs/specs/libxl-migration-stream.pandoc): a header, the
guest's config as JSON, a stream of libxl with that of libxc inside. All words are little endian, but libxl's header.
Ours have one member more in the JSON, which xl ignores: the length of the file, and a checksum of the streams.
"""

from __future__ import annotations

import struct

from xenvm import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.devices import DiskGrant, NicGrant
    from xenvm.boundary.machine import Machine
    from xenvm.boundary.messages import Grants

MAGIC: Final = b"Xen saved domain, xl format\n \0 \r"
BYTE_ORDER: Final = 0x01020304
JSON_CONFIG, STREAM_V2 = 1, 2  # mandatory flags
HEADER: Final = struct.Struct("<IIII")  # byte order, mandatory flags, optional flags, length of the optional data
WORD: Final = struct.Struct("<I")
LIBXL: Final = struct.Struct(">QII")  # the identification "LibxlFmt", version, options
LIBXL_IDENT: Final = 0x4C6962786C466D74
LIBXL_VERSION: Final = 2
RECORD: Final = struct.Struct("<II")  # type, length of the body; followed by zero bytes up to a multiple of 8
LIBXL_END, LIBXC_CONTEXT, EMULATOR_NODES, EMULATOR_STATE = range(4)
EMULATOR: Final = struct.Struct("<II")  # which one, index; then its state
QEMU: Final = (2, 0)
TAIL: Final = RECORD.pack(LIBXL_END, 0)

SEAL: Final = b'"xenvm":{"bytes":"%016x","crc32":"%08x"}'
UNSEALED: Final = SEAL % (0, 0)
SEAL_NUMBERS: Final = ((UNSEALED.index(b"0000"), 16), (UNSEALED.rindex(b'"00000000"') + 1, 8))  # where, how long
TIMER_MODES: Final = (
    *("delay_for_missed_ticks", "no_delay_for_missed_ticks", "no_missed_ticks_pending"),
    "one_missed_tick_pending",
)
_FORMATS: Final = {"qcow": "qcow2", "vhd": "vhd"}


def head(grants: Grants) -> bytes:
    """Return all that stands before the stream of libxenguest, with an empty seal."""
    text = config(grants) + b"\0"
    before = MAGIC + HEADER.pack(BYTE_ORDER, JSON_CONFIG | STREAM_V2, 0, WORD.size + len(text)) + WORD.pack(len(text))
    return before + text + LIBXL.pack(LIBXL_IDENT, LIBXL_VERSION, 0) + RECORD.pack(LIBXC_CONTEXT, 0)


def emulator_head(state_bytes: int) -> bytes:
    """Return what stands before the state of a device model."""
    return RECORD.pack(EMULATOR_STATE, EMULATOR.size + state_bytes) + EMULATOR.pack(*QEMU)


def padding(length: int) -> bytes:
    """Return the zeros that follow a record's body of this length."""
    return bytes(-length % 8)


def seal(length: int, checksum: int) -> bytes:
    """Return what replaces the empty seal: the length of the whole file, and the CRC-32 of its streams."""
    return SEAL % (length, checksum)


def config(grants: Grants) -> bytes:
    """Return the guest's config as libxl reads it (libxl_domain_config); the seal is its last member.

    An encrypted disk is not in it: xl could not open one.
    """
    memory_kib, max_kib = grants.memory_mib * 1024, grants.memory_max_mib * 1024
    machine = grants.machine[0] if grants.machine else None
    models = {nic.id: nic.model for nic in machine.nic_models} if machine else {}
    told = {
        "c_info": {"type": "hvm" if machine else "pv", "name": grants.name, "uuid": grants.uuid},
        "b_info": {
            "max_vcpus": grants.vcpus,
            "avail_vcpus": list(range(grants.vcpus)),
            "max_memkb": max_kib,
            "target_memkb": memory_kib,
            **(_machine(machine) if machine else {"type.pv": {}}),
        },
        "disks": [_disk(disk) for disk in grants.disks if (disk.path or machine) and not disk.cipher],
        "nics": [_nic(nic, models.get(nic.id, "")) for nic in grants.nics],
    }
    text = jsontext.dumps(told).encode("ascii")
    return text[:-1] + b"," + UNSEALED + b"}"


def _machine(machine: Machine) -> dict[str, object]:
    """Return what of an HVM guest's machine its device model depends on: xl starts one that can take up the state.

    libxl refuses fields that are said twice, also in the place that they had before Xen 4.10.
    """
    screen = machine.vnc_port >= 0
    serial = machine.serial if machine.serial != "tcp" else f"tcp:{machine.serial_host}:{machine.serial_port}"
    timers = {} if machine.timer_mode < 0 else {"timer_mode": TIMER_MODES[machine.timer_mode]}
    return {
        "video_memkb": machine.videoram_mib * 1024,
        "device_model_version": "qemu_xen",
        "acpi": _word(machine.acpi),
        "apic": _word(machine.apic),
        **timers,
        "type.hvm": {
            "bios": "seabios",
            **{name: _word(getattr(machine, name)) for name in ("pae", "nx", "viridian")},
            "hpet": _word(machine.hpet != 0),
            "vpt_align": _word(machine.vpt_align != 0),
            "vga": {"kind": machine.card},
            "vnc": {"enable": _word(screen), **({"listen": machine.vnc_host} if screen and machine.vnc_host else {})},
            **({"serial": serial} if machine.serial != "none" else {}),
            **({"boot": machine.boot} if machine.boot else {}),
            **({"usb": "True", "usbdevice": "tablet"} if screen else {}),
        },
    }


def _word(value: bool) -> str:
    """Return what libxl takes for a truth value that may also be left out."""
    return str(value)


def _nic(nic: NicGrant, model: str) -> dict[str, object]:
    told: dict[str, object] = {"devid": nic.id, "mac": nic.mac}
    return told | ({"bridge": nic.bridge} if nic.bridge else {}) | ({"model": model} if model else {})


def _disk(disk: DiskGrant) -> dict[str, object]:
    form = _FORMATS.get(disk.type, "raw") if disk.path else "empty"
    told: dict[str, object] = {"pdev_path": disk.path, "vdev": disk.name, "format": form}
    if disk.cdrom:
        return told | {"removable": 1, "is_cdrom": 1}
    return told if disk.read_only else told | {"readwrite": 1}
