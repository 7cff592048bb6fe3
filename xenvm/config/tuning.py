# SPDX-License-Identifier: GPL-2.0-or-later
"""From the text of one value to a setting of the machine: cpuid, affinity, platform, bios strings, arguments."""

from __future__ import annotations

import re

from xenvm.config.issue import ValueRefusedError, quoted, suggestion
from xenvm.config.scalars import in_range, to_int
from xenvm.model import AffinitySpec, BiosString, CpuidSpec, ExtraArgument, PlatformSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


MAX_VCPUS: Final = 512
"""Our bound for any guest; a PV guest may have more in Xen, no host has the processors for it."""

MAX_HVM_VCPUS: Final = 128  # HVM_MAX_VCPUS of xen/hvm/hvm_info_table.h
_MAX_CPU: Final = 4095  # our bound, above the processors of any host
_MAX_TEXT_BYTES: Final = 1024  # far below the 4096 that xen/io/xs_wire.h allows a message

_CPUID_FORM: Final = "the form is LEAF[+SUBLEAF]:REGISTER=MASK[,REGISTER=MASK...]"
_MASK: Final = re.compile(r"[01xsk]{32}")
_REGISTERS: Final = ("eax", "ebx", "ecx", "edx")
_NODE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_ARGUMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# Platform nodes that follow from a key of their own, or from what the builder decides
_OWN_KEYS: Final = ("acpi", "apic", "hap", "hpet", "nx", "pae", "timer-mode", "viridian", "vpt-align")
_BUILDER_NODES: Final = ("device-model", "vcpu_current", "vcpu_number")

# Names of xen/hvm/hvm_xs_strings.h
BIOS_STRINGS: Final = (
    "bios-vendor",
    "bios-version",
    "system-manufacturer",
    "system-product-name",
    "system-version",
    "system-serial-number",
    "baseboard-manufacturer",
    "baseboard-product-name",
    "baseboard-version",
    "baseboard-serial-number",
    "baseboard-asset-tag",
    "baseboard-location-in-chassis",
    "enclosure-manufacturer",
    "enclosure-serial-number",
    "enclosure-asset-tag",
    "battery-manufacturer",
    "battery-device-name",
)
_OEM_STRING: Final = re.compile(r"oem-[1-9][0-9]?")


def cpuid(text: str) -> CpuidSpec:
    """Return a change to a CPUID leaf, LEAF[+SUBLEAF]:REGISTER=MASK[,REGISTER=MASK...]."""
    where, colon, rest = text.partition(":")
    if not colon:
        raise ValueRefusedError("a cpuid setting has a leaf and masks", _CPUID_FORM)
    leaf, plus, subleaf = (part.strip(" ") for part in where.partition("+"))
    masks: dict[str, str] = {}
    for item in rest.split(","):
        register, equals, mask = (part.strip(" ") for part in item.partition("="))
        if not equals or register not in _REGISTERS:
            raise ValueRefusedError(f"{quoted(item)} is not REGISTER=MASK", f"registers are {', '.join(_REGISTERS)}")
        if register in masks:
            raise ValueRefusedError(f"register `{register}` is given twice")
        if not _MASK.fullmatch(mask):
            raise ValueRefusedError(
                f"{quoted(mask)} is no mask", "give 32 characters, bit 31 first: 0 clear, 1 set, x default, s or k host"
            )
        masks[register] = mask
    # XEN_CPUID_INPUT_UNUSED of xen/arch-x86/cpuid.h takes the last number
    return CpuidSpec(
        leaf=in_range(to_int(leaf), 0, 0xFFFFFFFE),
        subleaf=in_range(to_int(subleaf), 0, 0xFFFFFFFE) if plus else None,
        eax=masks.get("eax"),
        ebx=masks.get("ebx"),
        ecx=masks.get("ecx"),
        edx=masks.get("edx"),
    )


def affinity(text: str) -> AffinitySpec:
    """Return the host CPUs of one virtual CPU, VCPU:CPU[,CPU...]."""
    vcpu, colon, rest = text.partition(":")
    if not colon:
        raise ValueRefusedError("an affinity names a virtual CPU and host CPUs", "the form is VCPU:CPU[,CPU...]")
    cpus = [in_range(to_int(item.strip(" ")), 0, _MAX_CPU) for item in rest.split(",")]
    if len(set(cpus)) < len(cpus):
        raise ValueRefusedError("a host CPU is named twice")
    return AffinitySpec(vcpu=in_range(to_int(vcpu.strip(" ")), 0, MAX_VCPUS - 1), cpus=tuple(sorted(cpus)))


def platform(text: str) -> PlatformSpec:
    """Return a platform node, KEY=VALUE or KEY for an empty one."""
    key, _, value = (part.strip(" ") for part in text.partition("="))
    if not _NODE.fullmatch(key):
        raise ValueRefusedError(f"{quoted(key)} is no name of a platform node", "letters, digits and `._-`, no slash")
    if key in _OWN_KEYS:
        raise ValueRefusedError(f"platform node `{key}` follows from the key of that name", f"write `{key} = {value}`")
    if key in _BUILDER_NODES:
        raise ValueRefusedError(f"platform node `{key}` is written by xenvm itself")
    return PlatformSpec(key=key, value=_short(value))


def bios_string(text: str) -> BiosString:
    """Return an SMBIOS text, KEY=VALUE."""
    key, equals, value = (part.strip(" ") for part in text.partition("="))
    if not equals or not value:
        raise ValueRefusedError("a bios string has a name and a text", "the form is KEY=TEXT")
    if key not in BIOS_STRINGS and not _OEM_STRING.fullmatch(key):
        hint = suggestion(key, BIOS_STRINGS) or f"known are {', '.join(BIOS_STRINGS)}, oem-1 to oem-99"
        raise ValueRefusedError(f"{quoted(key)} is no bios string", hint)
    return BiosString(key=key, value=_short(value))


def _short(value: str) -> str:
    if len(value.encode()) > _MAX_TEXT_BYTES:
        raise ValueRefusedError(f"the text is longer than {_MAX_TEXT_BYTES} bytes")
    return value


def extra_argument(text: str) -> ExtraArgument:
    """Return one argument of the device model, KEY=VALUE or KEY."""
    key, equals, value = text.partition("=")
    key = key.strip(" ")
    if key.startswith("-"):
        raise ValueRefusedError(f"{quoted(key)} starts with a dash", f"xenvm adds it: write `{key.lstrip('-')}`")
    if not _ARGUMENT.fullmatch(key):
        raise ValueRefusedError(f"{quoted(key)} is no option name", "the form is KEY=VALUE or KEY, one on each line")
    return ExtraArgument(key=key, value=value.strip(" ") if equals else None)
