# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor, as far as a builder needs it: libxenctrl calls with their failures turned into errors.

The only module that imports `xenvm._xen`. A Hypervisor is opened while the process is still root; the descriptors of
/dev/xen/privcmd and /dev/xen/hypercall that it then holds are total power over the host, so nothing here parses what
a guest wrote.
"""

from __future__ import annotations

import errno
import os

from xenvm.boundary.messages import Domain, DomainState, Phase
from xenvm.errors import WrongStateError, XenvmError
from xenvm.helpers.builder import hypervisor
from xenvm.helpers.builder.hypervisor import (
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    SHUTDOWN_SUSPEND,
    Channels,
    HostMemory,
    HypervisorError,
    Rings,
    cpu_map,
    refuse_absent,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, Final

    from xenvm.boundary.machine import Machine
    from xenvm.boundary.messages import Grants
    from xenvm.boundary.processors import Affinity, CpuidRule
    from xenvm.helpers.builder.hypervisor import Hooks

try:
    from xenvm._xen import ffi as ffi  # noqa: PLC0414 - also for `pv`: where it is missing there is one error
    from xenvm._xen import lib as lib  # noqa: PLC0414
except ImportError as error:  # a machine without Xen, or libraries of another Xen release
    raise XenvmError(
        f"this xenvm was installed without support for the Xen of this host: {error}",
        hint="install libxen-dev of the running Xen release, then xenvm again (pip install --no-deps .)",
    ) from error

from xenvm.helpers.builder import hvm, pv, transfer  # noqa: E402 - they take ffi and lib from here

__all__ = ["ffi", "lib"]  # for the other modules of the builder: here a failed import is a clear error

PAGE_KIB: Final = 4
INFO_BATCH: Final = 256
MAX_EVENT_PORT: Final = 1023  # what xl gives; 0 would not mean "default" (xen/domctl.h)
HYPERVISOR_DEFAULT: Final = -1  # max_grant_frames, max_maptrack_frames below 0: the hypervisor's own default


class Hypervisor(hypervisor.Hypervisor):
    """An open connection to Xen."""

    def __init__(self) -> None:
        """Open the hypercall devices (needs root); raise HypervisorError when this is no Xen host of our release."""
        before = _open_descriptors()
        lib.xenvm_clear_error()
        self._xch = lib.xenvm_open()
        if self._xch == ffi.NULL:
            raise HypervisorError(
                f"cannot open the hypervisor interface: {os.strerror(ffi.errno)}", hint="is this machine a Xen dom0?"
            )
        running = lib.xc_version(self._xch, lib.XENVER_version, ffi.NULL)
        if running != lib.XENVM_BUILT_FOR:
            raise HypervisorError(
                f"xenvm was built for Xen {_release(lib.XENVM_BUILT_FOR)}, this host runs Xen {_release(running)}",
                hint="reboot into the installed Xen release, or install xenvm again beside its libxen-dev",
            )

        self.descriptors = _open_descriptors() - before

    @property
    def handle(self) -> Any:
        """The xc_interface pointer, for the domain builder."""
        return self._xch

    def check(self, result: int, what: str) -> int:
        """Return `result`, or raise HypervisorError naming the call when it is negative."""
        if result < 0:
            raise HypervisorError(f"{what}: {self.reason(ffi.errno)}")
        return result

    def reason(self, number: int) -> str:
        """Return the library's own error line, else the text of the errno: libxenguest often leaves errno at 0."""
        line = ffi.string(lib.xenvm_last_error()).decode("ascii", "replace")
        lib.xenvm_clear_error()
        return line or (os.strerror(number) if number else "no reason given")

    def memory(self) -> HostMemory:
        """Return what is free on the host."""
        info = self._physinfo()
        free_pages = max(0, info.free_pages - info.outstanding_pages)
        return HostMemory(free_pages * PAGE_KIB, info.scrub_pages * PAGE_KIB)

    def create_pv(self, uuid: str, vcpus: int) -> int:
        """Create an empty, paused PV domain whose handle is `uuid`; return its domid."""
        info = self._physinfo()
        if not info.capabilities & lib.XEN_SYSCTL_PHYSCAP_pv:
            raise HypervisorError("this hypervisor runs no PV guests", hint="it was built without CONFIG_PV")
        wish = ffi.new("struct xen_domctl_createdomain *")
        return self._create(wish, info, uuid, vcpus)

    def create_hvm(self, uuid: str, vcpus: int) -> int:
        """Create an empty, paused HVM domain whose handle is `uuid`; return its domid."""
        info = self._physinfo()
        if not info.capabilities & lib.XEN_SYSCTL_PHYSCAP_hvm:
            raise HypervisorError(
                "this hypervisor runs no HVM guests", hint="switch the processor's virtualisation on in the firmware"
            )
        if not info.capabilities & lib.XEN_SYSCTL_PHYSCAP_hap:
            raise HypervisorError("this processor has no hardware assisted paging, which xenvm needs for HVM guests")
        wish = ffi.new("struct xen_domctl_createdomain *")
        wish.flags = lib.XEN_DOMCTL_CDF_hvm | lib.XEN_DOMCTL_CDF_hap
        wish.arch.emulation_flags = lib.XEN_X86_EMU_ALL & ~lib.XEN_X86_EMU_VPCI
        return self._create(wish, info, uuid, vcpus)

    def _create(self, wish: Any, info: Any, uuid: str, vcpus: int) -> int:
        grant_version = 2 if info.capabilities & lib.XEN_SYSCTL_PHYSCAP_gnttab_v2 else 1
        wish.handle = list(bytes.fromhex(uuid.replace("-", "")))
        wish.max_vcpus = vcpus
        wish.max_evtchn_port = MAX_EVENT_PORT
        wish.max_grant_frames = wish.max_maptrack_frames = HYPERVISOR_DEFAULT
        wish.grant_opts = grant_version  # XEN_DOMCTL_GRANT_version
        domid = ffi.new("uint32_t *", 0)
        self.check(lib.xc_domain_create(self._xch, domid, wish), "creating the domain")
        return int(domid[0])

    def prepare_pv(self, domid: int, vcpus: int, *, memory_kib: int, map_kib: int) -> None:
        """Give a fresh domain its vcpus, memory limit and the size of its pseudo-physical memory map."""
        self.check(lib.xc_domain_max_vcpus(self._xch, domid, vcpus), f"giving the domain {vcpus} vcpus")
        self.check(lib.xc_domain_setmaxmem(self._xch, domid, memory_kib), "setting the memory limit")
        self.check(lib.xc_domain_set_memmap_limit(self._xch, domid, map_kib), "setting the memory map limit")
        self.check(lib.xc_domain_set_tsc_info(self._xch, domid, 0, 0, 0, 0), "setting the time stamp counter mode")

    def prepare_hvm(
        self, domid: int, vcpus: int, machine: Machine, *, memory_kib: int, memory_mib: int, restores: bool
    ) -> None:
        """Give a fresh domain its vcpus, memory limit, the pool for its page tables, timers and clock."""
        self.check(lib.xc_domain_max_vcpus(self._xch, domid, vcpus), f"giving the domain {vcpus} vcpus")
        self.check(lib.xc_domain_setmaxmem(self._xch, domid, memory_kib), "setting the memory limit")
        self.check(lib.xc_domain_set_tsc_info(self._xch, domid, 0, 0, 0, 0), "setting the time stamp counter mode")
        pool = hvm.paging_bytes(vcpus, memory_mib)
        self.check(lib.xc_set_paging_mempool_size(self._xch, domid, pool), "setting the page table pool")
        hvm.set_parameters(self, domid, machine, restores=restores)

    def load_hvm(
        self,
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
        """Build the guest in `domid` from the descriptors of firmware loader and BIOS."""
        size = {"memory_mib": memory_mib, "vcpus": vcpus}
        return hvm.load(self, domid, loader=loader, bios=bios, apic=apic, tables=tables, channels=channels, **size)

    def press(self, domid: int, trigger: str) -> None:
        """Press the `power` or the `sleep` button, or send the first vcpu an `nmi`."""
        hvm.press(self, domid, trigger)

    def has_drivers(self, domid: int) -> bool:
        """Tell whether the guest has said where it wants Xen's events: then it has PV drivers that hear requests."""
        return self.parameter(domid, lib.HVM_PARAM_CALLBACK_IRQ, "the guest's callback") != 0

    def sleep_state(self, domid: int) -> int:
        """Return the ACPI sleep state, 0 for awake."""
        return self.parameter(domid, lib.HVM_PARAM_ACPI_S_STATE, "the ACPI state")

    def set_sleep_state(self, domid: int, state: int) -> None:
        """Put the guest to sleep (3) or wake it (0): Xen resets its vcpus and stops them, or lets the first one run."""
        self.set_parameter(domid, lib.HVM_PARAM_ACPI_S_STATE, state, "the ACPI state")

    def set_parameter(self, domid: int, parameter: int, value: int, what: str) -> None:
        """Set one HVM parameter (xen/hvm/params.h); `what` names it in the error."""
        self.check(lib.xc_hvm_param_set(self._xch, domid, parameter, value), f"setting {what}")

    def parameter(self, domid: int, parameter: int, what: str) -> int:
        """Return one HVM parameter."""
        value = ffi.new("uint64_t *")
        self.check(lib.xc_hvm_param_get(self._xch, domid, parameter, value), f"reading {what}")
        return int(value[0])

    def set_time_offset(self, domid: int, seconds: int) -> None:
        """Move the guest's clock away from UTC."""
        self.check(lib.xc_domain_set_time_offset(self._xch, domid, seconds), "setting the time offset")

    def trigger(self, domid: int, number: int, what: str) -> None:
        """Send a trigger of xen/domctl.h to the first vcpu."""
        self.check(lib.xc_domain_send_trigger(self._xch, domid, number, 0), what)

    def apply_cpuid(self, domid: int, rules: tuple[CpuidRule, ...], *, pae: bool = True) -> None:
        """Give the domain the host's default CPU policy changed by `rules`; all rules count."""
        keep = []
        array = ffi.new("struct xc_xend_cpuid[]", len(rules) + 1)
        for index, rule in enumerate(rules):
            array[index].leaf = rule.leaf
            array[index].subleaf = lib.XEN_CPUID_INPUT_UNUSED if rule.subleaf < 0 else rule.subleaf
            for register, mask in enumerate(rule.masks):
                if mask:
                    keep.append(ffi.new("char[]", mask.encode("ascii")))
                    array[index].policy[register] = keep[-1]
        array[len(rules)].leaf = lib.XEN_CPUID_INPUT_UNUSED
        result = lib.xc_cpuid_apply_policy(
            self._xch, domid, False, ffi.NULL, 0, pae, False, False, array if rules else ffi.NULL, ffi.NULL
        )
        if result < 0:  # this one call returns -errno
            raise HypervisorError(f"setting the CPU policy: {self.reason(-result)}")

    def pin(self, domid: int, rules: tuple[Affinity, ...]) -> None:
        """Set hard affinities.

        Xen takes what is not online without a word, unless that is all, and hands back what is.
        """
        size = lib.xc_get_cpumap_size(self._xch)
        for rule in rules:
            hard, soft = ffi.new("uint8_t[]", [*cpu_map(rule.cpus, size)]), ffi.new("uint8_t[]", size)
            result = lib.xc_vcpu_setaffinity(self._xch, domid, rule.vcpu, hard, soft, lib.XEN_VCPUAFFINITY_HARD)
            if result < 0 and ffi.errno == errno.EINVAL:
                refuse_absent(rule.vcpu, rule.cpus, b"")
            self.check(result, f"pinning vcpu {rule.vcpu}")
            refuse_absent(rule.vcpu, rule.cpus, bytes(ffi.buffer(hard)))

    def event_channel(self, domid: int, remote_domid: int, what: str) -> int:
        """Allocate a port of the domain for a daemon in `remote_domid`; return it."""
        return self.check(
            lib.xc_evtchn_alloc_unbound(self._xch, domid, remote_domid), f"allocating the {what} event channel"
        )

    def load_pv(
        self,
        domid: int,
        *,
        kernel: int,
        initrd: int | None,
        cmdline: str,
        memory_mib: int,
        vcpus: int,
        channels: Channels,
    ) -> Rings:
        """Build the guest in `domid` from the descriptors `kernel` and `initrd`."""
        return pv.load(
            self,
            domid,
            kernel=kernel,
            initrd=initrd,
            cmdline=cmdline,
            memory_mib=memory_mib,
            vcpus=vcpus,
            channels=channels,
        )

    def save(self, domid: int, pipe: int, grants: Grants, hooks: Hooks, *, live: bool) -> None:
        """Write the image of a running domain, up to the state of its device model, if it has one."""
        transfer.save(self, domid, pipe, grants, hooks, live=live)

    def restore(self, domid: int, stream: int, channels: Channels) -> Rings:
        """Fill an empty domain from the stream that comes out of a pipe."""
        return transfer.restore(self, domid, stream, channels)

    def check_release(self, major: int, minor: int) -> None:
        """Refuse an image of a newer Xen than this one."""
        if (major << 16 | minor) > lib.XENVM_BUILT_FOR:
            raise WrongStateError(
                f"the image was written by Xen {major}.{minor}, this is Xen {_release(lib.XENVM_BUILT_FOR)}",
                hint="an image can be restored by the Xen that wrote it, or a newer one",
            )

    def pause(self, domid: int) -> None:
        """Stop the vcpus; Xen counts, so never twice without two unpauses."""
        self.check(lib.xc_domain_pause(self._xch, domid), "pausing the domain")

    def unpause(self, domid: int) -> None:
        """Let the vcpus run."""
        self.check(lib.xc_domain_unpause(self._xch, domid), "unpausing the domain")

    def resume(self, domid: int) -> None:
        """Wake a suspended domain in place: always the cooperative way, the other one makes a PV Linux panic."""
        self.check(lib.xc_domain_resume(self._xch, domid, 1), "resuming the domain")

    def power_off(self, domid: int) -> None:
        """Cut the power as the guest sees it; the domain object stays, with reason poweroff."""
        self.check(lib.xc_domain_shutdown(self._xch, domid, SHUTDOWN_POWEROFF), "forcing the domain off")

    def suspend(self, domid: int) -> None:
        """Stop the domain as one that has suspended."""
        self.check(lib.xc_domain_shutdown(self._xch, domid, SHUTDOWN_SUSPEND), "suspending the domain")

    def stop_tracking(self, domid: int) -> None:
        """Have Xen not note any more which memory the guest writes to; it refuses where it does not."""
        lib.xenvm_stop_tracking(self._xch, domid)

    def crash(self, domid: int) -> None:
        """Stop the domain as one that has crashed; the domain object stays."""
        self.check(lib.xc_domain_shutdown(self._xch, domid, SHUTDOWN_CRASH), "stopping the domain as crashed")

    def destroy(self, domid: int) -> None:
        """Remove the domain; may take seconds for a large guest."""
        self.check(lib.xc_domain_destroy(self._xch, domid), f"destroying domain {domid}")

    def look(self, domid: int, uuid: str) -> Domain | None:
        """Return what Xen says of `domid`, or None when there is none or when it now belongs to another uuid."""
        for domain, handle in self._domains(domid, 1):
            if domain.domid == domid and handle == uuid:
                return domain
            return None
        return None

    def vcpus(self, domid: int) -> int:
        """Return how many vcpus the domain was made with, online or not."""
        info = ffi.new("xc_domaininfo_t *")
        count = self.check(lib.xc_domain_getinfolist(self._xch, domid, 1, info), "looking at the domain")
        if not count or info.domain != domid:
            raise HypervisorError(f"domain {domid} is gone")
        return int(info.max_vcpu_id) + 1

    def exists(self, domid: int) -> bool:
        """Tell whether any domain has this id now."""
        return any(domain.domid == domid for domain, _handle in self._domains(domid, 1))

    def domains(self) -> Iterator[tuple[Domain, str]]:
        """Yield every guest of the host with its uuid; one hypercall tells of 256."""
        return self._domains(1, INFO_BATCH)

    def find(self, uuid: str) -> list[Domain]:
        """Return the domains whose handle is `uuid`; more than one only after a foreign tool made a double."""
        return [domain for domain, handle in self.domains() if handle == uuid]

    def _domains(self, first: int, batch: int) -> Iterator[tuple[Domain, str]]:
        infos = ffi.new("xc_domaininfo_t[]", batch)
        while True:
            count = self.check(lib.xc_domain_getinfolist(self._xch, first, batch, infos), "listing the domains")
            for info in infos[0:count]:
                text = bytes(info.handle).hex()
                handle = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
                yield _domain(info), handle
            if count < batch or batch == 1:
                return
            first = infos[count - 1].domain + 1

    def _physinfo(self) -> Any:
        info = ffi.new("xc_physinfo_t *")
        self.check(lib.xc_physinfo(self._xch, info), "asking for the host's resources")
        return info


def _domain(info: Any) -> Domain:
    flags = info.flags
    reason = -1
    if flags & lib.XEN_DOMINF_dying:
        state = DomainState.DYING
    elif flags & lib.XEN_DOMINF_shutdown:
        state = DomainState.SHUTDOWN
        reason = (flags >> lib.XEN_DOMINF_shutdownshift) & lib.XEN_DOMINF_shutdownmask
    elif flags & lib.XEN_DOMINF_paused:
        state = DomainState.PAUSED
    else:
        state = DomainState.RUNNING
    return Domain(
        domid=info.domain,
        state=state,
        phase=Phase.NONE,
        reason=reason,
        memory_kib=info.tot_pages * PAGE_KIB,
        vcpus=info.nr_online_vcpus,
        cpu_time_ms=info.cpu_time // 1_000_000,
    )


def _open_descriptors() -> frozenset[int]:
    """Return the open descriptors; reading the list opens one more, which is closed again when it is looked at."""
    listed = os.listdir("/proc/self/fd")  # noqa: PTH208 - pathlib costs 5 ms
    return frozenset(number for number in map(int, listed) if _is_open(number))


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _release(version: int) -> str:
    return f"{version >> 16}.{version & 0xFFFF}"
