# SPDX-License-Identifier: GPL-2.0-or-later
"""What the broker says to the workers for disks, cards and kernels, and they to it. No I/O."""

from __future__ import annotations

from xenvm import forms
from xenvm.boundary.checks import INT32_MAX, NAME, Message, array, flag, number, string
from xenvm.boundary.devices import VIFS, Vif, is_cipher
from xenvm.boundary.machine import OEM_TYPES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

_NAME_TEXT = string(64, NAME)
_SECONDS = number(1, 86400)
is_digest = forms.of(forms.HEX_DIGITS, 64, 64)


class Join(Message):
    """Broker to network: put each card's interface into its bridge, when the kernel has made it, within `timeout_s`.

    The descriptors are fresh taps for the first cards, to be attached beside them.
    """

    domid: int
    vifs: tuple[Vif, ...]
    timeout_s: int
    KIND: ClassVar = 16
    DESCRIPTORS: ClassVar = 8
    CHECKS: ClassVar = {"domid": number(1, 0x7FEF), "vifs": VIFS, "timeout_s": _SECONDS}


class Serve(Message):
    """Broker to image: serve this image. Descriptors: the image, a listening socket, a socket connected to it.

    `label` is how the process that serves it is known, and how the kernel's device of it is.
    """

    format: str
    read_only: bool
    label: str
    KIND: ClassVar = 17
    DESCRIPTORS: ClassVar = 3
    CHECKS: ClassVar = {"format": string(8, forms.one_of("qcow", "vhd")), "read_only": flag, "label": _NAME_TEXT}


class Served(Message):
    """Image to broker: the connected socket is now an NBD connection (nbd.h) to process `pid`."""

    size_bytes: int
    flags: int
    pid: int
    KIND: ClassVar = 18
    CHECKS: ClassVar = {"size_bytes": number(512, 2**62), "flags": number(0, 0xFFFF), "pid": number(1, INT32_MAX)}


class Connect(Message):
    """Broker to storage: make a kernel block device of an NBD connection, which comes along; Done brings it open."""

    size_bytes: int
    flags: int
    read_only: bool
    label: str
    KIND: ClassVar = 19
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {
        "size_bytes": number(512, 2**62),
        "flags": number(0, 0xFFFF),
        "read_only": flag,
        "label": _NAME_TEXT,
    }


class Decrypt(Message):
    """Broker to storage: put dm-crypt over a block device. Descriptors: that, and the key file; Done brings it open."""

    name: str
    cipher: str
    key_size_bits: int
    read_only: bool
    KIND: ClassVar = 20
    DESCRIPTORS: ClassVar = 2
    CHECKS: ClassVar = {
        "name": _NAME_TEXT,
        "cipher": string(64, is_cipher),
        "key_size_bits": number(64, 4096),
        "read_only": flag,
    }


class Release(Message):
    """Broker to storage: remove what dead workers left: mappings by name, nbd devices by their number in /dev."""

    mappings: tuple[str, ...]
    nbds: tuple[int, ...]
    KIND: ClassVar = 21
    CHECKS: ClassVar = {"mappings": array(_NAME_TEXT, 64), "nbds": array(number(0, 2**20), 64)}


class Unpack(Message):
    """Broker to unpacker: decompress a kernel. Descriptors: the image, and the empty file for what is in it."""

    KIND: ClassVar = 40
    DESCRIPTORS: ClassVar = 2
    CHECKS: ClassVar = {}


class Unpacked(Message):
    """Unpacker to broker: so much was written; 0, the image is not compressed in a way that is known."""

    size_bytes: int
    KIND: ClassVar = 41
    CHECKS: ClassVar = {"size_bytes": number(0, 2**40)}


class Sum(Message):
    """Broker to unpacker: see to it that a file is on the disk, and sum it. It comes along, open for reading."""

    KIND: ClassVar = 42
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {}


class Tables(Message):
    """Broker to unpacker: pick out of the host's firmware tables what a guest may see; Unpacked tells how much that is.

    Descriptors: an empty file for it, then those of the tables: SMBIOS's one, or some of ACPI's. Of the vendor's types
    of SMBIOS only `oem_types` are picked, if there are any.
    """

    smbios: bool
    oem_types: tuple[int, ...]
    KIND: ClassVar = 44
    DESCRIPTORS: ClassVar = 4
    CHECKS: ClassVar = {"smbios": flag, "oem_types": OEM_TYPES}


class Summed(Message):
    """Unpacker to broker: the SHA-256 of the file."""

    digest: str
    KIND: ClassVar = 43
    CHECKS: ClassVar = {"digest": string(64, is_digest)}
