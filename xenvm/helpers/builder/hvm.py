# SPDX-License-Identifier: GPL-2.0-or-later
"""The libxenguest part of an HVM build: firmware loader and BIOS from descriptors into an empty domain."""

from __future__ import annotations

from xenvm.helpers.builder import files
from xenvm.helpers.builder.hypervisor import HypervisorError, Rings
from xenvm.helpers.builder.pv import allocate
from xenvm.helpers.builder.xen import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Final

    from xenvm.boundary.machine import Machine
    from xenvm.helpers.builder.hypervisor import Channels
    from xenvm.helpers.builder.xen import Hypervisor

MMIO_BYTES: Final = 0x10000000  # HVM_BELOW_4G_MMIO_LENGTH of xen/hvm/e820.h
VGA_HOLE_PAGES: Final = 0x20  # 0xA0000 to 0xBFFFF
GIB_4: Final = 1 << 32
VCPU_POOL_PAGES: Final = 256
# What Xen's own tools switch on for Windows: xen/hvm/params.h, base_freq, time_ref_count, apic_assist, crash_ctl,
# no_vp_limit, cpu_hotplug
VIRIDIAN_FEATURES: Final = 0x1865
LOADER_HINT: Final = (
    "`kernel` of an HVM guest is a firmware loader in hvmloader's place; leave it out to boot from disk"
)


def paging_bytes(vcpus: int, memory_mib: int) -> int:
    """Return the size of the pool for page tables: pages per vcpu, and one per MiB for the guest's memory map."""
    return 4096 * (VCPU_POOL_PAGES * vcpus + memory_mib)


def set_parameters(xen: Hypervisor, domid: int, machine: Machine, *, restores: bool) -> None:
    """Set the parameters that shape timers and enlightenments; what is not said is left as xl leaves it.

    The enlightenments are in an image, and Xen takes them once.
    """
    for parameter, value, what in (
        (lib.HVM_PARAM_HPET_ENABLED, 1 if machine.hpet < 0 else machine.hpet, "hpet"),
        (lib.HVM_PARAM_VPT_ALIGN, 1 if machine.vpt_align < 0 else machine.vpt_align, "vpt-align"),
        (lib.HVM_PARAM_TIMER_MODE, 1 if machine.timer_mode < 0 else machine.timer_mode, "timer-mode"),
    ):
        xen.set_parameter(domid, parameter, value, what)
    if machine.viridian and not restores:  # off is not to be said: Xen refuses a 0
        xen.set_parameter(domid, lib.HVM_PARAM_VIRIDIAN, VIRIDIAN_FEATURES, "viridian")
    if machine.timeoffset_s:
        xen.set_time_offset(domid, machine.timeoffset_s)


def load(
    xen: Hypervisor,
    domid: int,
    *,
    loader: int,
    bios: int,
    memory_mib: int,
    vcpus: int,
    apic: bool,
    tables: Mapping[str, int],
    channels: Channels,
) -> Rings:
    """Build the guest in `domid` from the descriptors of hvmloader and BIOS; raise HypervisorError with the reason.

    `memory_mib` is what the builder allocates: the guest's memory without that of the graphics card. `tables` are those
    of the host that the guest may see: smbios, acpi.
    """
    firmware = files.mapped(loader, "firmware loader")
    files.check_elf(firmware, "firmware loader", LOADER_HINT)
    images = [ffi.from_buffer(firmware), ffi.from_buffer(files.mapped(bios, "BIOS"))]
    seen = {name: ffi.from_buffer(files.mapped(table, f"tables of {name}")) for name, table in tables.items()}
    lib.xenvm_clear_error()
    dom = lib.xc_dom_allocate(xen.handle, ffi.NULL, ffi.NULL)
    if dom == ffi.NULL:
        raise HypervisorError(f"starting the domain builder: {xen.reason(ffi.errno)}")
    try:
        _lay_out(dom, memory_mib << 20)
        dom.max_vcpus = vcpus
        dom.console_evtchn, dom.console_domid = channels.console_port, channels.console_domid
        dom.xenstore_evtchn, dom.xenstore_domid = channels.store_port, channels.store_domid
        modules = {"smbios": dom.smbios_module, "acpi": dom.acpi_modules[0]}
        for name, table in seen.items():
            modules[name].data, modules[name].length = ffi.cast("uint8_t *", table), len(table)
        rings = _build(xen, dom, domid, images, memory_mib, vcpus, apic=apic)
        return rings.but(modules=tuple((name, modules[name].guest_addr_out, modules[name].length) for name in seen))
    finally:
        lib.xc_dom_release(dom)


def _lay_out(dom: Any, size: int) -> None:
    dom.container_type = lib.XC_DOM_HVM_CONTAINER
    dom.target_pages = size >> 12
    dom.mmio_size = MMIO_BYTES
    dom.mmio_start = GIB_4 - MMIO_BYTES
    dom.lowmem_end = min(size, dom.mmio_start)
    dom.highmem_end = GIB_4 + size - dom.mmio_start if size > dom.mmio_start else 0
    dom.vga_hole_size = VGA_HOLE_PAGES
    dom.device_model = True


def _build(
    xen: Hypervisor, dom: Any, domid: int, images: list[Any], memory_mib: int, vcpus: int, *, apic: bool
) -> Rings:
    loader, bios = images
    step = xen.check
    step(lib.xc_dom_kernel_mem(dom, loader, len(loader)), "reading the firmware loader")
    dom.system_firmware_module.data = ffi.cast("uint8_t *", bios)
    dom.system_firmware_module.length = len(bios)
    step(lib.xc_dom_boot_xen_init(dom, xen.handle, domid), "reading the hypervisor's abilities")
    if lib.xc_dom_parse_image(dom) < 0:
        raise HypervisorError(f"reading the firmware loader: {xen.reason(ffi.errno)}", hint=LOADER_HINT)
    step(lib.xc_dom_mem_init(dom, memory_mib), "laying out the memory")
    allocate(xen, dom, memory_mib)
    step(lib.xenvm_hvm_memory_map(xen.handle, domid, dom), "setting the memory map")
    step(lib.xc_dom_build_image(dom), "loading the firmware")
    step(lib.xc_dom_boot_image(dom), "preparing the first vcpu")
    step(lib.xc_dom_gnttab_init(dom), "preparing the grant table")
    step(lib.xenvm_hvm_info(xen.handle, domid, vcpus, apic), "describing the machine to hvmloader")
    return Rings(store_frame=dom.xenstore_pfn, console_frame=dom.console_pfn)


def press(xen: Hypervisor, domid: int, trigger: str) -> None:
    """Press the power or the sleep button, or send the first vcpu an NMI."""
    number = {
        "power": lib.XEN_DOMCTL_SENDTRIGGER_POWER,
        "sleep": lib.XEN_DOMCTL_SENDTRIGGER_SLEEP,
        "nmi": lib.XEN_DOMCTL_SENDTRIGGER_NMI,
    }[trigger]
    xen.trigger(domid, number, "sending an NMI" if trigger == "nmi" else f"pressing the {trigger} button")
