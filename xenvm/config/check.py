# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that need more than one line: guest type, what is missing, what is given twice, what contradicts itself."""

from __future__ import annotations

from xenvm.config.devices import MAX_DISKS, MAX_NIC_ID, UNNUMBERED
from xenvm.config.issue import Issue
from xenvm.config.key import REQUIRED, Key
from xenvm.config.keys import KEYS
from xenvm.config.tuning import MAX_HVM_VCPUS
from xenvm.model import (
    AffinitySpec,
    BiosString,
    CpuidSpec,
    DiskSlot,
    DiskSpec,
    NicSpec,
    PciSpec,
    PlatformSpec,
    SerialKind,
    SerialSpec,
    Uuid,
    disk_slot,
)
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator
    from typing import Final


class Entry(Record):
    """One line with a known key; `sound` tells whether `value` was understood."""

    line: int
    key: Key
    text: str
    value: object
    sound: bool = True

    def issue(self, message: str, hint: str = "") -> Issue:
        """Return an issue with this line."""
        return Issue(self.line, self.key.name, self.text, f"`{self.key.name}`: {message}", hint)


class Draft:
    """The lines of a file by the field of Config they set; `hvm` is None while its own line is in error."""

    def __init__(self) -> None:
        self.entries: dict[str, list[Entry]] = {}

    def given(self, name: str) -> list[Entry]:
        """Return all lines of a field, sound or not."""
        return self.entries.get(name, [])

    def sound(self, name: str) -> list[Entry]:
        """Return the lines of a field that were understood."""
        return [entry for entry in self.given(name) if entry.sound]

    @property
    def hvm(self) -> bool | None:
        """The guest type; None when the line that says it was not understood."""
        lines = self.given("hvm")
        if not lines:
            return False
        return lines[0].value is True if lines[0].sound else None

    def number(self, name: str) -> int | None:
        """Return the number a line gives to a field, None when there is no sound one."""
        for entry in self.sound(name):
            if isinstance(entry.value, int):
                return entry.value
        return None


def check(draft: Draft) -> list[Issue]:
    """Return what the file as a whole does wrong; give un-numbered network cards their ids in the draft."""
    number_nics(draft)
    return [issue for rule in _RULES for issue in rule(draft)]


def number_nics(draft: Draft) -> None:
    """Give each network card without an id the lowest free one, in the order of the lines."""
    entries = draft.given("nics")
    taken = {entry.value.id for entry in entries if isinstance(entry.value, NicSpec)}
    free = (number for number in range(MAX_NIC_ID + 1) if number not in taken)
    for index, entry in enumerate(entries):
        if isinstance(entry.value, NicSpec) and entry.value.id == UNNUMBERED:
            entries[index] = entry.but(value=entry.value.but(id=next(free, UNNUMBERED)))


def _guest_type(draft: Draft) -> Iterator[Issue]:
    hvm = draft.hvm
    if hvm is None:
        return
    ours, other = ("HVM", "PV") if hvm else ("PV", "HVM")
    hint = "remove the line" + (", or write `hvm = true`" if not hvm else "")
    for entries in draft.entries.values():
        for entry in entries:
            if not entry.key.guests.fit(hvm=hvm):
                yield entry.issue(f"this key is for {other} guests, and this one is {ours}", hint)
    if hvm:
        return
    for entry in draft.sound("serial"):
        if isinstance(entry.value, SerialSpec) and entry.value.kind is not SerialKind.PTY:
            yield entry.issue("a PV guest has no serial port, only a console on a pty", "remove the line")
    for entry in draft.sound("nics"):
        if isinstance(entry.value, NicSpec) and entry.value.model:
            yield entry.issue("a PV guest has no emulated network card", "remove `model`")


def _missing(draft: Draft) -> Iterator[Issue]:
    for key in KEYS:
        if key.default is REQUIRED and not draft.given(key.field):
            yield Issue(0, key.name, "", f"`{key.name}` is missing", f"write `{key.name} = ...`: {key.value}")
    if draft.hvm is not False:
        return
    kernel = draft.given("kernel")
    hint = "a PV guest needs a kernel; an HVM guest says `hvm = true`"
    if not kernel:
        yield Issue(0, "kernel", "", "`kernel` is missing", hint)
    elif kernel[0].sound and kernel[0].value is None:
        yield kernel[0].issue("the value is empty", hint)


def _memory(draft: Draft) -> Iterator[Issue]:
    memory = draft.number("memory_mib")
    for entry in draft.sound("memory_max_mib"):
        if memory is not None and isinstance(entry.value, int) and entry.value < memory:
            yield entry.issue(f"{entry.value} MiB are less than `memory`, {memory} MiB")
    for entry in draft.sound("videoram_mib"):
        if memory is not None and isinstance(entry.value, int) and entry.value >= memory:
            yield entry.issue(f"{entry.value} MiB leave nothing of `memory`, {memory} MiB")


def _processors(draft: Draft) -> Iterator[Issue]:
    given = draft.given("vcpus")
    if given and not given[0].sound:
        return
    vcpus = draft.number("vcpus") or 1
    if draft.hvm and vcpus > MAX_HVM_VCPUS:
        yield given[0].issue(f"an HVM guest has at most {MAX_HVM_VCPUS} virtual CPUs")
    for entry in draft.sound("cores_per_socket"):
        if isinstance(entry.value, int) and vcpus % entry.value:
            yield entry.issue(f"{entry.value} cores do not divide {vcpus} virtual CPUs into whole sockets")
    for entry in draft.sound("cpus_affinity"):
        if isinstance(entry.value, AffinitySpec) and entry.value.vcpu >= vcpus:
            yield entry.issue(f"there is no virtual CPU {entry.value.vcpu}: `vcpus` is {vcpus}, they count from 0")


def _twice(name: str, what: str, identity: Callable[[object], Hashable]) -> Callable[[Draft], Iterator[Issue]]:
    """Return the rule that no two lines of a field have the same identity; None is never the same."""

    def rule(draft: Draft) -> Iterator[Issue]:
        first: dict[Hashable, int] = {}
        for entry in draft.sound(name):
            mark = identity(entry.value)
            if mark is None:
                continue
            if mark in first:
                yield entry.issue(f"{what.format(mark)} is already set in line {first[mark]}")
            first.setdefault(mark, entry.line)

    return rule


def _nic_id(value: object) -> Hashable:
    return value.id if isinstance(value, NicSpec) and value.id != UNNUMBERED else None


def _nic_mac(value: object) -> Hashable:
    return value.mac if isinstance(value, NicSpec) else None


def _pci_address(value: object) -> Hashable:
    return str(value.address) if isinstance(value, PciSpec) else None


def _leaf(value: object) -> Hashable:
    if not isinstance(value, CpuidSpec):
        return None
    return f"{value.leaf:#x}" + (f"+{value.subleaf:#x}" if value.subleaf is not None else "")


def _vcpu(value: object) -> Hashable:
    return value.vcpu if isinstance(value, AffinitySpec) else None


def _text_key(value: object) -> Hashable:
    return value.key if isinstance(value, PlatformSpec | BiosString) else None


def _nic_count(draft: Draft) -> Iterator[Issue]:
    for entry in draft.sound("nics"):
        if isinstance(entry.value, NicSpec) and entry.value.id == UNNUMBERED:
            yield entry.issue(f"no id is free: a guest has at most {MAX_NIC_ID + 1} network cards")


def _disk_count(draft: Draft) -> Iterator[Issue]:
    for entry in draft.sound("disks")[MAX_DISKS:]:
        yield entry.issue(f"a guest has at most {MAX_DISKS} disks")


def _derived_macs(draft: Draft) -> Iterator[Issue]:
    uuids = [entry.value for entry in draft.sound("uuid") if isinstance(entry.value, str)]
    nics = [(entry, entry.value) for entry in draft.sound("nics") if isinstance(entry.value, NicSpec)]
    explicit = {nic.mac: entry.line for entry, nic in nics if nic.mac}
    if not uuids or not explicit:
        return
    for entry, nic in nics:
        if nic.mac is None and (mac := nic.mac_for(Uuid(uuids[0]))) in explicit:
            yield entry.issue(f"its address {mac}, derived from the uuid, is already set in line {explicit[mac]}")


def _disk_targets(draft: Draft) -> Iterator[Issue]:
    numbers: dict[int, Entry] = {}
    slots: dict[int, list[tuple[DiskSlot, Entry]]] = {}
    for entry in draft.sound("disks"):
        if not isinstance(entry.value, DiskSpec):
            continue
        number = entry.value.device_number
        slot = disk_slot(number)
        if number in numbers:
            yield entry.issue(f"target {entry.value.virtpath} is already taken in line {numbers[number].line}")
            continue
        numbers[number] = entry
        if slot is None:
            continue
        for other, at in slots.get(slot.disk, []):
            if other.family != slot.family:
                # xen_translate_vdev() in Linux drivers/block/xen-blkfront.c maps hdX, sdX and xvdX to one minor
                yield entry.issue(
                    f"{entry.value.virtpath} is the same disk in the guest as {_virtpath(at)} in line {at.line}",
                    "use each letter once, with hd, sd or xvd",
                )
                break
            if 0 in (other.partition, slot.partition):
                yield entry.issue(f"{entry.value.virtpath} and {_virtpath(at)} in line {at.line} overlap")
                break
        slots.setdefault(slot.disk, []).append((slot, entry))


def _virtpath(entry: Entry) -> str:
    return entry.value.virtpath if isinstance(entry.value, DiskSpec) else ""


_RULES: Final = (
    _guest_type,
    _missing,
    _memory,
    _processors,
    _disk_targets,
    _disk_count,
    _nic_count,
    _derived_macs,
    _twice("nics", "network card id {}", _nic_id),
    _twice("nics", "MAC address {}", _nic_mac),
    _twice("pci", "PCI function {}", _pci_address),
    _twice("cpuid", "CPUID leaf {}", _leaf),
    _twice("cpus_affinity", "virtual CPU {}", _vcpu),
    _twice("platform", "platform node {}", _text_key),
    _twice("bios_strings", "bios string {}", _text_key),
)
