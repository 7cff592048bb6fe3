# SPDX-License-Identifier: GPL-2.0-or-later
"""From the text of one value to a device: disk, nic, pci, serial, display. Each raises ValueRefusedError."""

from __future__ import annotations

import re

from xenvm.config.issue import ValueRefusedError, quoted, suggestion
from xenvm.config.scalars import boolean, in_range, keymap, path, to_int
from xenvm.model import (
    CryptSpec,
    DiskSpec,
    DiskType,
    DisplayKind,
    DisplaySpec,
    NicSpec,
    PciAddress,
    PciSpec,
    SerialKind,
    SerialSpec,
    virtual_device_number,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Final


UNNUMBERED: Final = -1
"""The id of a card that gets its number once the whole file is read; no Config holds it."""

MAX_NIC_ID: Final = 31
MAX_DISKS: Final = 64
NIC_MODELS: Final = ("rtl8139", "e1000", "e1000e", "ne2k_pci", "pcnet", "virtio-net-pci", "vmxnet3")

_DISK_FORM: Final = "the form is PHYSPATH:PHYSTYPE:VIRTPATH:MODE:DEVTYPE[:KEY=VALUE...]"
_DISK_OPTIONS: Final = ("cipher", "key-size", "key-file", "share", "backend-domid")
_SNAPSHOTS: Final = (
    "temporary",
    "temporary-encrypted",
    "coalesce",
    "scripted",
    "scripted-author",
    "scripted-no-snapshot",
)
_CRYPT_TYPES: Final = (DiskType.PHY, DiskType.FILE, DiskType.AIO)
_CIPHER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_()-]{0,63}")

_INTERFACE: Final = re.compile(r"[!-.0-9;-~]{1,15}")
_NIC_OPTIONS: Final = ("id", "bridge", "mac", "model", "backend-domid")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)

_PCI_FORM: Final = "the form is ID[,bind],DOMAIN:BUS:SLOT.FUNCTION[,KEY=VALUE...], the address in hexadecimal"
_PCI_OPTIONS: Final = ("msitranslate", "power_mgmt", "guest_slot", "vdevfn")
_PCI_ADDRESS: Final = re.compile(r"([0-9a-f]{1,4}):([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-9a-f])", re.IGNORECASE)
_PCI_SLOTS: Final = 32  # linux/pci.h: five bits of slot, three of function
_PCI_FUNCTIONS: Final = 8

_IPV4: Final = re.compile(r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?!$)|$)){4}")
_VNC_OPTIONS: Final = ("use-port-unused", "port", "keymap", "listen", "password-file")
_VNC_BASE: Final = 5900  # RFC 6143: display N listens on TCP port 5900 + N
_VNC_DISPLAYS: Final = 100


def _pairs(items: Iterable[str], known: tuple[str, ...], reasons: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the KEY=VALUE items; refuse an unknown or repeated key, and one that `reasons` speaks against."""
    seen: set[str] = set()
    for item in items:
        key, equals, value = (part.strip(" ") for part in item.partition("="))
        if key in reasons:
            raise ValueRefusedError(f"the option `{key}` is refused: {reasons[key]}")
        if not equals:
            raise ValueRefusedError(f"{quoted(item)} is not of the form KEY=VALUE", suggestion(key, known))
        if key not in known:
            hint = suggestion(key, known) or f"known are {', '.join(known)}"
            raise ValueRefusedError(f"unknown option {quoted(key)}", hint)
        if key in seen:
            raise ValueRefusedError(f"the option `{key}` is given twice")
        seen.add(key)
        yield key, value


def _only_dom0(value: str) -> None:
    if to_int(value) != 0:
        raise ValueRefusedError("backend-domid can only be 0: every backend runs in dom0")


def _member(word: str, choices: tuple[str, ...], what: str) -> str:
    if word not in choices:
        listed = ", ".join(choices)
        raise ValueRefusedError(f"{quoted(word)} is no {what}: {listed}", suggestion(word.lower(), choices))
    return word


def disk(text: str) -> DiskSpec:
    """Return a virtual disk of the form PHYSPATH:PHYSTYPE:VIRTPATH:MODE:DEVTYPE[:KEY=VALUE...]."""
    fields = [field.strip(" ") for field in text.split(":")]
    if len(fields) < 5:
        raise ValueRefusedError(f"a disk has five fields, here are {len(fields)}", _DISK_FORM)
    physpath, phystype, virtpath, mode, devtype, *options = fields
    if phystype == "vdi":
        raise ValueRefusedError("disk type `vdi` needs a storage daemon that a stock Xen host does not have")
    kind = DiskType(_member(phystype, tuple(DiskType), "disk type"))
    cdrom = _member(devtype, ("disk", "cdrom"), "device type") == "cdrom"
    read_only = _member(mode, ("r", "w"), "mode") == "r"
    if cdrom and not read_only:
        raise ValueRefusedError("a CD drive cannot be written", "give it the mode `r`")
    if physpath or not cdrom:
        path(physpath)
    try:
        virtual_device_number(virtpath)
    except ValueError as error:
        raise ValueRefusedError(str(error)) from None
    # Earlier files have a snapshot mode in sixth place; its two words for "none" lose nothing
    if options and options[0] in ("", "none"):
        options = options[1:]
    elif options and options[0] in _SNAPSHOTS:
        raise ValueRefusedError(f"snapshot mode `{options[0]}` needs tools of XenClient", "leave the field out")
    reasons = {"key-dir": "keys inside of VHD files need the storage tools of XenClient; use `key-file`"}
    given = dict(_pairs(options, _DISK_OPTIONS, reasons))
    _only_dom0(given.pop("backend-domid", "0"))
    share = boolean(given.pop("share", "false"))
    return DiskSpec(
        path=physpath,
        type=kind,
        virtpath=virtpath,
        read_only=read_only,
        cdrom=cdrom,
        crypt=_crypt(kind, given),
        share=share,
    )


def _crypt(kind: DiskType, given: dict[str, str]) -> CryptSpec | None:
    if not given:
        return None
    if "key-file" not in given:
        raise ValueRefusedError(f"`{next(iter(given))}` has no effect without `key-file`", "add key-file=PATH")
    if kind not in _CRYPT_TYPES:
        raise ValueRefusedError(
            f"a disk of type `{kind}` cannot be encrypted", "dm-crypt works below phy, file and aio"
        )
    cipher = given.get("cipher", "aes-xts-plain")
    if not _CIPHER.fullmatch(cipher):
        raise ValueRefusedError(f"{quoted(cipher)} is no cipher", "give one like aes-xts-plain64")
    key_size = in_range(to_int(given.get("key-size", "256")), 64, 4096, "bits")
    if key_size % 8:
        raise ValueRefusedError(f"key-size {key_size} is no multiple of 8 bits")
    return CryptSpec(key_file=path(given["key-file"]), cipher=cipher, key_size_bits=key_size)


def nic(text: str) -> NicSpec:
    """Return a network card from a comma list of KEY=VALUE, which may be empty."""
    reasons = {
        "network": "it names an object of XenClient's network daemon; use `bridge`",
        "wireless": "it needs the network daemon of XenClient",
    }
    given = dict(_pairs(text.split(",") if text else [], _NIC_OPTIONS, reasons))
    _only_dom0(given.get("backend-domid", "0"))
    mac = given.get("mac")
    if mac is not None and not _MAC.fullmatch(mac):
        raise ValueRefusedError(f"{quoted(mac)} is no MAC address", "give six pairs of hexadecimal digits: 00:16:3e:..")
    model = given.get("model")
    return NicSpec(
        id=in_range(to_int(given["id"]), 0, MAX_NIC_ID) if "id" in given else UNNUMBERED,
        bridge=_bridge(given["bridge"]) if "bridge" in given else None,
        mac=mac.lower() if mac is not None else None,
        model=_member(model, NIC_MODELS, "model of a network card") if model is not None else None,
    )


def _bridge(text: str) -> str:
    # The rule of dev_valid_name() in Linux net/core/dev.c, for the texts that xenstore takes; IFNAMSIZ is 16 with NUL
    if text in ("", ".", "..") or not _INTERFACE.fullmatch(text):
        raise ValueRefusedError(
            f"{quoted(text)} is no bridge name", "an interface name has 1 to 15 ASCII characters, no `/` or `:`"
        )
    return text


def pci(text: str) -> PciSpec:
    """Return a PCI function of the form ID[,bind],DOMAIN:BUS:SLOT.FUNCTION[,KEY=VALUE...]."""
    items = [item.strip(" ") for item in text.split(",")]
    bind = len(items) > 1 and items[1] == "bind"
    if bind:
        del items[1]
    if len(items) < 2:
        raise ValueRefusedError("a PCI device has an id and an address", _PCI_FORM)
    group, address, *options = items
    match = _PCI_ADDRESS.fullmatch(address)
    if not match:
        raise ValueRefusedError(f"{quoted(address)} is no PCI address", _PCI_FORM)
    domain, bus, slot, function = (int(digits, 16) for digits in match.groups())
    if slot >= _PCI_SLOTS or function >= _PCI_FUNCTIONS:
        raise ValueRefusedError(f"{quoted(address)} is no PCI address", "slots go from 00 to 1f, functions from 0 to 7")
    given = dict(_pairs(options, _PCI_OPTIONS, {}))
    if "guest_slot" in given and "vdevfn" in given:
        raise ValueRefusedError("guest_slot and vdevfn both place the device in the guest", "give one of them")
    return PciSpec(
        group=in_range(to_int(group), 0, 255),
        address=PciAddress(domain, bus, slot, function),
        bind=bind,
        msitranslate=boolean(given["msitranslate"]) if "msitranslate" in given else None,
        power_mgmt=boolean(given["power_mgmt"]) if "power_mgmt" in given else None,
        guest_slot=in_range(to_int(given["guest_slot"]), 0, _PCI_SLOTS - 1) if "guest_slot" in given else None,
        vdevfn=in_range(to_int(given["vdevfn"]), 0, 255) if "vdevfn" in given else None,
    )


def serial(text: str) -> SerialSpec:
    """Return where the serial port leads: pty, none, /dev/NAME or tcp:IP:PORT."""
    if text in (SerialKind.PTY, SerialKind.NONE):
        return SerialSpec(kind=SerialKind(text))
    if text.startswith("/dev/"):
        return SerialSpec(kind=SerialKind.DEVICE, path=path(text))
    kind, _, address = text.partition(":")
    if kind == SerialKind.TCP:
        host, _, port = address.partition(":")
        if not _IPV4.fullmatch(host):
            raise ValueRefusedError(
                f"{quoted(host)} is no IPv4 address", "the form is tcp:IP:PORT, as tcp:127.0.0.1:4555"
            )
        return SerialSpec(kind=SerialKind.TCP, host=host, port=in_range(to_int(port), 1, 65535))
    hint = suggestion(text, ("pty", "none")) or "give pty, none, a device as /dev/ttyS0, or tcp:IP:PORT"
    raise ValueRefusedError(f"{quoted(text)} is no place for a serial port", hint)


def display(text: str) -> DisplaySpec:
    """Return how the screen is shown: none, vnc[:OPTION[,OPTION...]], sdl or intel."""
    word, colon, rest = text.partition(":")
    kind = DisplayKind(_member(word, tuple(DisplayKind), "display"))
    if not colon:
        return DisplaySpec(kind=kind)
    if kind is not DisplayKind.VNC:
        raise ValueRefusedError(f"display `{kind}` has no options", "only vnc takes some")
    items = [item.strip(" ") for item in rest.split(",")]
    unused = items.count("use-port-unused")
    given = dict(_pairs((item for item in items if item != "use-port-unused"), _VNC_OPTIONS[1:], {}))
    if unused > 1:
        raise ValueRefusedError("the option `use-port-unused` is given twice")
    if unused and "port" in given:
        raise ValueRefusedError("use-port-unused and port contradict each other", "give one of them")
    return DisplaySpec(
        kind=kind,
        vnc_port=_vnc_port(to_int(given["port"])) if "port" in given else None,
        keymap=keymap(given["keymap"]) if "keymap" in given else None,
        listen=_address(given["listen"]) if "listen" in given else None,
        password_file=path(given["password-file"]) if "password-file" in given else None,
    )


def _address(text: str) -> str:
    if not _IPV4.fullmatch(text):
        raise ValueRefusedError(f"{quoted(text)} is no IPv4 address", "0.0.0.0 listens on all addresses of the host")
    return text


def _vnc_port(number: int) -> int:
    if 0 <= number < _VNC_DISPLAYS:
        return _VNC_BASE + number
    if not _VNC_BASE <= number <= 65535:
        raise ValueRefusedError(
            f"{number} is no VNC port", f"give a display 0 to {_VNC_DISPLAYS - 1} or a TCP port from {_VNC_BASE} on"
        )
    return number
