# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys that earlier xenvm knew and this one refuses, each with the reason and, where there is one, the way out."""

from __future__ import annotations

from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class RefusedKey(Record):
    """A key known by name only."""

    name: str
    reason: str
    instead: str = ""


_STUBDOM: Final = "device models in a stub domain need XenClient's stub domain image"
_VTPM: Final = "virtual TPMs need the vtpm manager domain, which a stock Xen host does not run"
_XCI: Final = "it needs the patched hypervisor of XenClient"
_DEVICE_MODEL: Final = "xenvm starts the QEMU of the host itself, for guests that need one"

REFUSED: Final = (
    RefusedKey("notify", "notifications go to clients of the command socket", "listen with `xenvm-cmd UUID events`"),
    RefusedKey(
        "extra-local-watch", "the watcher of a VM watches for the end of domains alone", "use xenstore-watch(1)"
    ),
    RefusedKey("extra-vm-watch", "the watcher of a VM watches for the end of domains alone", "use xenstore-watch(1)"),
    RefusedKey("extra-maxmem", "it never had an effect", "use `memory-max`"),
    RefusedKey("nested", "nested virtualisation is experimental in Xen, by its SUPPORT.md"),
    RefusedKey("xci-cpuid-signature", _XCI, "use `cpuid` to change CPUID leaves"),
    RefusedKey("xci-service", _XCI),
    RefusedKey("flask-label", "it needs a hypervisor with a FLASK policy, which a stock Xen host does not have"),
    RefusedKey("disable-migrate", "xenvm does not migrate, and saves only when told to", "do not call `suspend`"),
    RefusedKey("qemu-dm-path", _DEVICE_MODEL),
    RefusedKey("qemu-dm-timeout", "the device model tells over QMP when it is ready"),
    RefusedKey("qemu-pv", "no device of a PV guest here needs a device model", "see `disk`"),
    RefusedKey("sound", "the option `-soundhw` it stood for is gone from QEMU", "use `extra-hvm = device=...`"),
    RefusedKey("vsnd", "it needs the audio helper of XenClient"),
    RefusedKey("usb", "it never had an effect", "give USB devices with `extra-hvm`"),
    RefusedKey("cdrom-pt", "raw CD pass-through was a patch of XenClient's QEMU", "give the drive as a `disk`"),
    RefusedKey("pci-script", "it never had an effect"),
    RefusedKey("passthrough-io", "ports belong to a PCI device, and `pci` is not acted on yet"),
    RefusedKey("passthrough-mmio", "memory ranges belong to a PCI device, and `pci` is not acted on yet"),
    RefusedKey(
        "vkbd",
        "xenvm gives a PV guest neither keyboard nor screen",
        "use its console, or an HVM guest with `display = vnc`",
    ),
    RefusedKey(
        "vfb",
        "xenvm gives a PV guest neither keyboard nor screen",
        "use its console, or an HVM guest with `display = vnc`",
    ),
    RefusedKey("v4v", "v4v was a patch of XenClient's hypervisor"),
    RefusedKey("vtpm-instance", _VTPM),
    RefusedKey("vtpm-backend", _VTPM),
    RefusedKey("stubdom", _STUBDOM),
    RefusedKey("stubdom-memory", _STUBDOM),
    RefusedKey("stubdom-kernel", _STUBDOM),
    RefusedKey("stubdom-initrd", _STUBDOM),
    RefusedKey("stubdom-cmdline", _STUBDOM),
)
