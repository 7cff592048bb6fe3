# SPDX-License-Identifier: GPL-2.0-or-later
"""The checked configuration of one VM: a field for each key of xenvm.cfg(5), typed, units in the names.

A Config is made by `xenvm.config.parse` alone, so whoever holds one may rely on every rule having been checked.
"""

from xenvm.model import (
    Action,
    AffinitySpec,
    BiosString,
    Compression,
    CpuidSpec,
    DiskSpec,
    DisplaySpec,
    ExtraArgument,
    NicSpec,
    PciSpec,
    PlatformSpec,
    SerialSpec,
    StartupKind,
    Uuid,
)
from xenvm.record import Record


class Config(Record, kw_only=True):
    """What the administrator wants of one VM; None stands for "not set" and leaves the choice to xenvm or the host."""

    # identity and life cycle
    uuid: Uuid | None
    name: str | None
    startup: StartupKind
    startup_file: str | None  # set with, and only with, the restore kinds
    on_halt: Action
    on_reboot: Action
    on_crash: Action
    shutdown_timeout_s: int
    device_timeout_s: int
    image_compression: Compression
    debug: bool
    output: str | None
    no_mem_check: bool

    # kernel, memory, processors
    hvm: bool
    kernel: str | None  # always set for PV; None with hvm: the host's hvmloader
    initrd: str | None
    cmdline: str
    memory_mib: int
    memory_max_mib: int | None
    videoram_mib: int | None
    vcpus: int
    cores_per_socket: int | None
    cpus_affinity: tuple[AffinitySpec, ...]
    cpuid: tuple[CpuidSpec, ...]

    # devices
    disks: tuple[DiskSpec, ...]
    diskinfo_pt: bool
    nics: tuple[NicSpec, ...]
    pci: tuple[PciSpec, ...]
    pci_msitranslate: bool
    pci_power_management: bool
    serial: SerialSpec
    display: DisplaySpec

    # the virtual machine of an HVM guest
    boot: str
    pae: bool
    acpi: bool
    apic: bool
    nx: bool
    hap: bool
    viridian: bool
    hpet: bool | None
    vpt_align: bool | None
    timer_mode: int | None
    timeoffset_s: int
    smbios_pt: bool
    smbios_oem_types: tuple[int, ...]
    acpi_pt: bool
    power_management: int
    oem_features: int
    inject_sci: int
    platform: tuple[PlatformSpec, ...]
    bios_strings: tuple[BiosString, ...]
    extra_hvm: tuple[ExtraArgument, ...]
