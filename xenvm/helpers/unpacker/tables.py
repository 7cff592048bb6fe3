# SPDX-License-Identifier: GPL-2.0-or-later
"""Picking out of the host's firmware tables what a guest may see. Pure, but for reading and writing open files.

What the tables look like: DSP0134 (SMBIOS 3), section 6.1.2, and the ACPI specification, section 5.2.6. What hvmloader
takes of SMBIOS: for each structure its length in four bytes, little endian, then the structure with its strings
(tools/firmware/hvmloader/smbios.c of Xen); the types are those that it looks for. ACPI's tables follow each other.
"""

from __future__ import annotations

import os
import struct

from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

LIMIT_BYTES: Final = 1 << 20  # of a table
HEADER: Final = struct.Struct("<BBH")  # type, length of the formatted part, handle
LENGTH: Final = struct.Struct("<I")
ONCE: Final = frozenset({0, 1, 2, 3, 11, 22, 39})
"""Firmware, system, board, case, vendor's strings, battery, power supply."""
VENDORS_OWN: Final = 128
LAST: Final = 127
ACPI_HEADER: Final = struct.Struct("<4sI")  # signature, length; the header has 36 bytes
ACPI_HEADER_BYTES: Final = 36
LICENCES: Final = (b"SLIC", b"MSDM")


def pick(target: int, sources: list[int], *, smbios: bool, oem_types: tuple[int, ...]) -> int:
    """Write what may be seen of the tables into `target`, and return how much that is.

    Raise XenvmError when a table is not what it should be, or when nothing is left of it.
    """
    contents = [_read(source) for source in sources]
    picked = smbios_of(contents[0], oem_types) if smbios else acpi_of(contents)
    left = picked
    while left:
        left = left[os.write(target, left) :]
    return len(picked)


def _read(source: int) -> bytes:
    content = bytearray()
    try:
        while piece := os.read(source, LIMIT_BYTES):
            content += piece
            if len(content) > LIMIT_BYTES:
                raise XenvmError(f"a table has more than {LIMIT_BYTES} bytes")
    except OSError as error:
        raise XenvmError(f"the table cannot be read: {error.strerror or error}") from error
    return bytes(content)


def smbios_of(content: bytes, oem_types: tuple[int, ...]) -> bytes:
    """Return the first structure of each type in ONCE, and the vendor's own: those of `oem_types`, or all."""
    picked, seen = bytearray(), set()
    for kind, structure in _structures(content):
        own = kind >= VENDORS_OWN and (not oem_types or kind in oem_types)
        if own or (kind in ONCE and kind not in seen):
            picked += LENGTH.pack(len(structure)) + structure
        seen.add(kind)
    if not picked:
        raise XenvmError("the host's SMBIOS tables have nothing that a guest could see")
    return bytes(picked)


def _structures(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and bytes of each structure, its strings and the two zeros after them included."""
    at = 0
    while at + HEADER.size <= len(content):
        kind, length, _handle = HEADER.unpack_from(content, at)
        end = content.find(b"\0\0", at + length)
        if length < HEADER.size or end < 0:
            raise XenvmError(f"the host's SMBIOS tables make no sense at byte {at}")
        end += 2
        yield kind, content[at:end]
        if kind == LAST:
            return
        at = end


def acpi_of(contents: list[bytes]) -> bytes:
    """Return the tables, each one whole and a licence."""
    for content in contents:
        if len(content) < ACPI_HEADER_BYTES:
            raise XenvmError(f"a table of the host's ACPI has {len(content)} bytes only")
        signature, length = ACPI_HEADER.unpack_from(content)
        name = signature.decode("ascii", "replace")
        if signature not in LICENCES:
            raise XenvmError(f"the table {name!a} of the host's ACPI is no licence")
        if length != len(content) or sum(content) % 256:
            raise XenvmError(f"the table {name} of the host's ACPI is damaged: its length or its checksum is another")
    return b"".join(contents)
