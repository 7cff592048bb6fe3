# SPDX-License-Identifier: GPL-2.0-or-later
"""The libxenguest part of a PV build: kernel and initrd from descriptors into an empty domain."""

from __future__ import annotations

from xenvm.helpers.builder import files
from xenvm.helpers.builder.hypervisor import HypervisorError, Rings
from xenvm.helpers.builder.xen import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from xenvm.helpers.builder.hypervisor import Channels
    from xenvm.helpers.builder.xen import Hypervisor

RAW_INITRDS: Final = 4 << 16 | 20
"""Xen's release since which libxenguest unpacks no initrd (as XENVM_BUILT_FOR says it)."""


def load(
    xen: Hypervisor,
    domid: int,
    *,
    kernel: int,
    initrd: int | None,
    cmdline: str,
    memory_mib: int,
    vcpus: int,
    channels: Channels,
) -> Rings:
    """Build the guest in `domid` from the descriptors `kernel` and `initrd`; raise HypervisorError with the reason."""
    mapped = [files.mapped(kernel, "kernel")]
    files.check_elf(mapped[0], "kernel", "it must be a Linux kernel, packed or not, or another one that Xen can start")
    if initrd is not None:
        mapped.append(files.mapped(initrd, "initrd"))
        if lib.XENVM_BUILT_FOR < RAW_INITRDS:
            files.check_initrd(mapped[1])
    images = [ffi.from_buffer(one) for one in mapped]
    lib.xenvm_clear_error()
    dom = lib.xc_dom_allocate(xen.handle, cmdline.encode("utf-8"), ffi.NULL)
    if dom == ffi.NULL:
        raise HypervisorError(f"starting the domain builder: {xen.reason(ffi.errno)}")
    try:
        return _build(xen, dom, domid, images, memory_mib, vcpus, channels)
    finally:
        lib.xc_dom_release(dom)


def _build(
    xen: Hypervisor, dom: Any, domid: int, images: list[Any], memory_mib: int, vcpus: int, channels: Channels
) -> Rings:
    def step(result: int, what: str) -> None:
        xen.check(result, what)

    dom.container_type = lib.XC_DOM_PV_CONTAINER
    step(lib.xc_dom_kernel_mem(dom, images[0], len(images[0])), "reading the kernel")
    for image in images[1:]:  # no larger than it is: so it stays packed, and the guest unpacks it
        step(lib.xc_dom_module_max_size(dom, len(image)), "limiting the initrd size")
        step(lib.xc_dom_module_mem(dom, image, len(image), ffi.NULL), "reading the initrd")
    dom.flags = 0
    dom.console_evtchn = channels.console_port
    dom.console_domid = channels.console_domid
    dom.xenstore_evtchn = channels.store_port
    dom.xenstore_domid = channels.store_domid
    dom.max_vcpus = vcpus
    step(lib.xc_dom_boot_xen_init(dom, xen.handle, domid), "reading the hypervisor's abilities")
    step(lib.xc_dom_parse_image(dom), "reading the kernel image")
    guest_type = ffi.string(dom.guest_type).decode("ascii", "replace")
    if guest_type != "xen-3.0-x86_64":
        raise HypervisorError(
            f"the kernel is a {guest_type} image", hint="a PV guest here needs a 64-bit kernel with CONFIG_XEN_PV"
        )
    step(lib.xc_dom_mem_init(dom, memory_mib), "laying out the memory")
    allocate(xen, dom, memory_mib)
    if lib.xc_dom_build_image(dom) < 0:
        why = xen.reason(ffi.errno)
        hint = "raise `memory`: the unpacked kernel and the initrd must fit" if "too large" in why else ""
        raise HypervisorError(f"loading the kernel: {why}", hint=hint)
    step(lib.xc_dom_boot_image(dom), "preparing the first vcpu")
    step(lib.xc_dom_gnttab_init(dom), "preparing the grant table")
    return Rings(store_frame=lib.xc_dom_p2m(dom, dom.xenstore_pfn), console_frame=lib.xc_dom_p2m(dom, dom.console_pfn))


def allocate(xen: Hypervisor, dom: Any, memory_mib: int) -> None:
    """Give the domain its memory, all of which is claimed in Xen first: of two starts that do not fit only one fails.

    libxenguest gives up what of a claim is left in the end (meminit_pv and meminit_hvm, xg_dom_x86.c); when it fails
    before that, Xen does, with the domain.
    """
    dom.claim_enabled = 1
    if lib.xc_dom_boot_mem_init(dom) < 0:
        raise HypervisorError(
            f"allocating {memory_mib} MiB of memory: {xen.reason(ffi.errno)}",
            hint="the host has less free, perhaps since another guest was started just now: "
            "stop one, lower `memory`, or give dom0 less (dom0_mem)",
        )
