# SPDX-License-Identifier: GPL-2.0-or-later
"""What the first and the last sector of an image say it is. Pure, on hostile bytes: the guest or a user wrote them.

The config says which type a disk has; the format is never guessed, or a guest could write a header into a raw image
and have other files of the host opened. Nor may an image name another file.

Sources: docs/interop/qcow2.txt and block/qcow.c of QEMU; "Virtual Hard Disk Image Format Specification" of 2006.
"""

from __future__ import annotations

import struct

from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

SECTOR_BYTES: Final = 512

QCOW_MAGIC: Final = b"QFI\xfb"
QCOW_START: Final = struct.Struct(">4sIQ")  # magic, version, offset of the backing file's name
QCOW1_CRYPT: Final = (36, struct.Struct(">I"))
QCOW2_CRYPT: Final = (32, struct.Struct(">I"))
QCOW2_INCOMPATIBLE: Final = (72, struct.Struct(">Q"))  # version 3 only
EXTERNAL_DATA_FILE: Final = 1 << 2

VHD_COOKIE: Final = b"conectix"
VHD_TYPE: Final = (60, struct.Struct(">I"))
VHD_FIXED, VHD_DYNAMIC, VHD_DIFFERENCING = 2, 3, 4

# What an error may name besides: none of these is served.
_OTHERS: Final = ((b"KDMV", "a VMDK image"), (b"QED\0", "a QED image"), (b"vhdxfile", "a VHDX image"))


def driver(kind: str, head: bytes, tail: bytes) -> str:
    """Return the name of QEMU's driver for an image of type `kind`, qcow or vhd.

    `head` and `tail` are its first and last 512 bytes. Raise XenvmError where they say something else than `kind`, or
    that the image is not complete in itself.
    """
    if min(len(head), len(tail)) < SECTOR_BYTES:
        raise XenvmError(f"the image is shorter than {SECTOR_BYTES} bytes: no {kind} image")
    if kind == "qcow" and head.startswith(QCOW_MAGIC):
        return _qcow(head)
    if kind == "vhd" and (tail.startswith(VHD_COOKIE) or head.startswith(VHD_COOKIE)):
        return _vhd(head, tail)
    raise XenvmError(
        f"the disk is of type {kind}, but its image is {_found(head, tail)}",
        hint="correct the type of the disk, or convert the image with qemu-img convert",
    )


def _qcow(head: bytes) -> str:
    _, version, backing = QCOW_START.unpack_from(head)
    if version not in (1, 2, 3):
        raise XenvmError(f"the image is of version {version} of qcow; known are 1, 2 and 3")
    if backing:
        raise XenvmError(
            "the image is only the difference to another file (it has a backing file)",
            hint="make it whole, for example with qemu-img convert -O qcow2",
        )
    if _at(head, QCOW1_CRYPT if version == 1 else QCOW2_CRYPT):
        raise XenvmError("the image is encrypted in itself", hint="qemu-img convert makes a plain one")
    if version == 3 and _at(head, QCOW2_INCOMPATIBLE) & EXTERNAL_DATA_FILE:
        raise XenvmError("the image keeps its data in another file", hint="qemu-img convert -O qcow2 makes it whole")
    return "qcow" if version == 1 else "qcow2"


def _vhd(head: bytes, tail: bytes) -> str:
    """Let the end alone decide on a fixed image, which begins with the guest's own bytes; a header there too is odd."""
    fixed = tail.startswith(VHD_COOKIE) and _at(tail, VHD_TYPE) == VHD_FIXED
    if fixed and head.startswith(VHD_COOKIE):
        raise XenvmError(
            "the image is a fixed VHD whose first sector is that of a dynamic one",
            hint="what the guest wrote there cannot be told from a header; qemu-img convert -O vpc with "
            "subformat=dynamic makes an image that is unambiguous",
        )
    if fixed:
        return "vpc"
    if not head.startswith(VHD_COOKIE):
        raise XenvmError(f"the image is a VHD of type {_at(tail, VHD_TYPE)} without a header at its beginning")
    disk_type = _at(head, VHD_TYPE)
    if disk_type == VHD_DIFFERENCING:
        raise XenvmError(
            "the image is only the difference to another file (a differencing VHD)",
            hint="make it whole with the program that made it",
        )
    if disk_type != VHD_DYNAMIC:
        raise XenvmError(f"the image is a VHD of type {disk_type}; known are 2 (fixed) and 3 (dynamic)")
    return "vpc"


def _at(data: bytes, field: tuple[int, struct.Struct]) -> int:
    offset, form = field
    value: int = form.unpack_from(data, offset)[0]
    return value


def _found(head: bytes, tail: bytes) -> str:
    if head.startswith(QCOW_MAGIC):
        return f"a qcow image of version {QCOW_START.unpack_from(head)[1]}"
    if head.startswith(VHD_COOKIE) or tail.startswith(VHD_COOKIE):
        return "a VHD image"
    for magic, name in _OTHERS:
        if head.startswith(magic):
            return name
    return f"of no format known here (it begins with {head[:8].hex(' ')})"
