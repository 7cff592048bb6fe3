# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor as a builder sees it: the one seam between its jobs and what runs domains.

Two things are behind it: Xen (xen.py), and the machine of a simulated host (simulated.py). Which one it is says the
command line of the process, see boundary/place.py; neither stands in for the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from xenvm.errors import XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Final

    from xenvm.boundary.machine import Machine
    from xenvm.boundary.messages import Domain, Grants
    from xenvm.boundary.processors import Affinity, CpuidRule

NOT_KNOWN: Final = -1
SHUTDOWN_POWEROFF: Final = 0  # xen/sched.h
SHUTDOWN_SUSPEND: Final = 2
SHUTDOWN_CRASH: Final = 3


class HypervisorError(XenvmError):
    """The hypervisor or one of its libraries refused a call."""


def cpu_map(cpus: Iterable[int], size_bytes: int) -> bytes:
    """Return a set of processors as Xen takes it, a bit for each; those beyond its size are left out."""
    bits = bytearray(size_bytes)
    for cpu in cpus:
        if cpu < size_bytes * 8:
            bits[cpu // 8] |= 1 << (cpu % 8)
    return bytes(bits)


def refuse_absent(vcpu: int, cpus: Iterable[int], there: bytes) -> None:
    """Raise HypervisorError for processors that are not in the map of those that Xen has given a vcpu."""
    absent = [cpu for cpu in sorted(cpus) if cpu >= len(there) * 8 or not there[cpu // 8] >> (cpu % 8) & 1]
    if absent:
        names = ", ".join(map(str, absent[:16])) + (", ..." if len(absent) > 16 else "")
        raise HypervisorError(
            f"cpus-affinity: virtual CPU {vcpu}: this host has no CPU {names} online",
            hint="`xl info` tells how many CPUs there are; they count from 0, and are those of the guest's CPU pool",
        )


class HostMemory(Record):
    """What the hypervisor could still give out, in KiB."""

    free_kib: int
    scrubbing_kib: int


class Rings(Record):
    """Machine frames of the two start-of-day rings."""

    store_frame: int
    console_frame: int
    modules: tuple[tuple[str, int, int], ...] = ()
    """What hvmloader finds by nodes beside them: name, address in the guest, length."""


class Channels(Record):
    """Event channel ports of the guest, and the domains whose daemons they are for."""

    store_port: int
    store_domid: int
    console_port: int
    console_domid: int


class Hooks(Record):
    """What the writer of an image calls while it writes.

    `suspend` has the guest suspended, and raises when it does not. `frames` hears of page frames done, and of how many
    there are. `track` has an HVM guest's device model note what it writes to, or not any more. `go_on` is asked before
    each round over the memory of a guest that still runs: it is told the round, the pages written, and those that the
    guest has written to since (NOT_KNOWN: not known yet); False: suspend it now.
    """

    suspend: Callable[[], None]
    frames: Callable[[int, int], None]
    track: Callable[[bool], None]
    go_on: Callable[[int, int, int], bool]


class Hypervisor(ABC):
    """An open connection. Every method raises HypervisorError with the reason when it is refused."""

    descriptors: frozenset[int]
    """What must stay open for it."""

    @abstractmethod
    def memory(self) -> HostMemory:
        """Return what is free on the host."""

    @abstractmethod
    def create_pv(self, uuid: str, vcpus: int) -> int:
        """Create an empty, paused PV domain whose handle is `uuid`; return its domid."""

    @abstractmethod
    def prepare_pv(self, domid: int, vcpus: int, *, memory_kib: int, map_kib: int) -> None:
        """Give a fresh domain its vcpus, memory limit and the size of its pseudo-physical memory map."""

    @abstractmethod
    def apply_cpuid(self, domid: int, rules: tuple[CpuidRule, ...], *, pae: bool = True) -> None:
        """Give the domain the host's default CPU policy changed by `rules`; all rules count."""

    @abstractmethod
    def pin(self, domid: int, rules: tuple[Affinity, ...]) -> None:
        """Set hard affinities."""

    @abstractmethod
    def event_channel(self, domid: int, remote_domid: int, what: str) -> int:
        """Allocate a port of the domain for a daemon in `remote_domid`; return it."""

    @abstractmethod
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

    @abstractmethod
    def save(self, domid: int, pipe: int, grants: Grants, hooks: Hooks, *, live: bool) -> None:
        """Write into a pipe the image of a running domain, up to the state of its device model, if it has one.

        The domain is left as it is then, suspended or not: resuming is the caller's.
        """

    @abstractmethod
    def restore(self, domid: int, stream: int, channels: Channels) -> Rings:
        """Fill an empty domain from the stream that comes out of a pipe."""

    @abstractmethod
    def check_release(self, major: int, minor: int) -> None:
        """Raise WrongStateError for an image of a newer hypervisor than this one."""

    @abstractmethod
    def pause(self, domid: int) -> None:
        """Stop the vcpus; it is counted, so never twice without two unpauses."""

    @abstractmethod
    def unpause(self, domid: int) -> None:
        """Let the vcpus run."""

    @abstractmethod
    def resume(self, domid: int) -> None:
        """Wake a suspended domain in place."""

    @abstractmethod
    def power_off(self, domid: int) -> None:
        """Cut the power as the guest sees it; the domain object stays, with reason poweroff."""

    @abstractmethod
    def destroy(self, domid: int) -> None:
        """Remove the domain; may take seconds for a large guest."""

    @abstractmethod
    def look(self, domid: int, uuid: str) -> Domain | None:
        """Return what is to be said of `domid`, or None when there is none or when it now belongs to another uuid."""

    @abstractmethod
    def vcpus(self, domid: int) -> int:
        """Return how many vcpus the domain was made with, online or not."""

    @abstractmethod
    def exists(self, domid: int) -> bool:
        """Tell whether any domain has this id now."""

    @abstractmethod
    def domains(self) -> Iterable[tuple[Domain, str]]:
        """Yield every guest of the host with its uuid."""

    @abstractmethod
    def find(self, uuid: str) -> list[Domain]:
        """Return the domains whose handle is `uuid`; more than one only after a foreign tool made a double."""

    # What HVM guests need besides.

    @abstractmethod
    def create_hvm(self, uuid: str, vcpus: int) -> int:
        """Create an empty, paused HVM domain whose handle is `uuid`; return its domid."""

    @abstractmethod
    def prepare_hvm(
        self, domid: int, vcpus: int, machine: Machine, *, memory_kib: int, memory_mib: int, restores: bool
    ) -> None:
        """Give a fresh domain its vcpus, memory limit, the pool for its page tables, timers and clock.

        What an image tells of, a domain that it `restores` gets from there.
        """

    @abstractmethod
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
        """Build the guest in `domid` from the descriptors of firmware loader and BIOS.

        `tables` are those of the host that it may see: smbios, acpi.
        """

    @abstractmethod
    def suspend(self, domid: int) -> None:
        """Stop the domain as one that has suspended, which knows nothing of it: an HVM guest without PV drivers."""

    @abstractmethod
    def stop_tracking(self, domid: int) -> None:
        """Have the hypervisor not note any more which memory the guest writes to; right at any moment."""

    @abstractmethod
    def crash(self, domid: int) -> None:
        """Stop the domain as one that has crashed; the domain object stays."""

    @abstractmethod
    def press(self, domid: int, trigger: str) -> None:
        """Press the `power` or the `sleep` button, or send the first vcpu an `nmi`."""

    @abstractmethod
    def has_drivers(self, domid: int) -> bool:
        """Tell whether an HVM guest has PV drivers, which hear requests."""

    @abstractmethod
    def sleep_state(self, domid: int) -> int:
        """Return the ACPI sleep state of an HVM guest, 0 for awake."""

    @abstractmethod
    def set_sleep_state(self, domid: int, state: int) -> None:
        """Put an HVM guest to sleep in memory (3), its vcpus reset and stopped; or let it go on at its firmware (0)."""
