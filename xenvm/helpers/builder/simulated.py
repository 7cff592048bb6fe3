# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor of a simulated host, as far as a builder needs it. A kernel is not run: its command line is."""

from __future__ import annotations

import os

from xenvm.boundary.messages import Domain, DomainState, Phase
from xenvm.boundary.place import HERE
from xenvm.errors import WrongStateError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.builder import hypervisor, pages
from xenvm.helpers.builder.hypervisor import (
    SHUTDOWN_POWEROFF,
    Channels,
    HostMemory,
    HypervisorError,
    Rings,
    cpu_map,
    refuse_absent,
)
from xenvm.simulator.client import Machine, MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Final, NoReturn

    from xenvm.boundary.messages import Grants
    from xenvm.boundary.processors import Affinity, CpuidRule
    from xenvm.helpers.builder.hypervisor import Hooks

    Told = dict[str, Any]


INFO_BATCH: Final = 256


class Hypervisor(hypervisor.Hypervisor):
    """An open connection to the simulated machine."""

    def __init__(self) -> None:
        """Connect; raise MachineError when no host is simulated in the directory that the command line names."""
        self._machine = Machine(HERE.machine)
        self.descriptors = frozenset({self._machine.fileno()})

    def _call(self, op: str, **arguments: object) -> Any:
        try:
            return self._machine.call(op, **arguments)
        except MachineError as error:
            raise HypervisorError(error.message, hint=error.hint) from error

    def memory(self) -> HostMemory:
        """Return what is free on the host."""
        info = self._call("info")
        return HostMemory(info["free_kib"], info["scrubbing_kib"])

    def create_pv(self, uuid: str, vcpus: int) -> int:
        """Create an empty, paused domain whose handle is `uuid`; return its domid."""
        return int(self._call("create", uuid=uuid, vcpus=vcpus))

    def prepare_pv(self, domid: int, vcpus: int, *, memory_kib: int, map_kib: int) -> None:  # noqa: ARG002
        """Set the memory limit."""
        self._call("prepare", domid=domid, memory_kib=memory_kib)

    def apply_cpuid(self, domid: int, rules: tuple[CpuidRule, ...], *, pae: bool = True) -> None:
        """Do nothing: nothing looks at the processor."""

    def pin(self, domid: int, rules: tuple[Affinity, ...]) -> None:
        """Check that the processors exist."""
        for rule in rules:
            there = self._call("pin", domid=domid)
            refuse_absent(rule.vcpu, rule.cpus, cpu_map(range(there), (there + 7) // 8))

    def event_channel(self, domid: int, remote_domid: int, what: str) -> int:  # noqa: ARG002
        """Return a new port."""
        return int(self._call("channel", domid=domid))

    def load_pv(
        self,
        domid: int,
        *,
        kernel: int,
        initrd: int | None,
        cmdline: str,
        memory_mib: int,
        vcpus: int,  # noqa: ARG002
        channels: Channels,  # noqa: ARG002
    ) -> Rings:
        """Give the domain its memory and its command line; kernel and initrd must fit, and are not read."""
        size = sum(os.fstat(image).st_size for image in (kernel, initrd) if image is not None)
        frames = self._call("load", domid=domid, cmdline=cmdline, memory_mib=memory_mib, image_bytes=size)
        return Rings(**frames)

    def save(self, domid: int, pipe: int, grants: Grants, hooks: Hooks, *, live: bool) -> None:  # noqa: ARG002
        """Write the whole image of a running domain: its state, in the form that real ones have."""
        imagefile.write(pipe, saved.head(grants))
        hooks.suspend()
        told = self._call("memory", domid=domid)
        total = (told["memory_kib"] << 10) // pages.PAGE_BYTES
        done = 0
        for part in pages.stream(told["state"], told["memory_kib"]):
            imagefile.write(pipe, part)
            done = min(total, done + len(part) // pages.PAGE_BYTES)
            hooks.frames(done, total)

    def restore(self, domid: int, stream: int, channels: Channels) -> Rings:  # noqa: ARG002
        """Give the domain the state that the stream tells of."""
        return Rings(**self._call("restore", domid=domid, state=pages.state_in(stream)))

    def check_release(self, major: int, minor: int) -> None:
        """Refuse the image of a real guest; a real Xen refuses those of simulated ones."""
        if (major, minor) != pages.RELEASE:
            raise WrongStateError(
                f"the image was written by Xen {major}.{minor}, this host is a simulated one",
                hint="a real guest can be restored on a real Xen host only",
            )

    def pause(self, domid: int) -> None:
        """Stop the guest; it is counted."""
        self._call("pause", domid=domid)

    def unpause(self, domid: int) -> None:
        """Let the guest run."""
        self._call("unpause", domid=domid)

    def resume(self, domid: int) -> None:
        """Wake a suspended domain."""
        self._call("resume", domid=domid)

    def power_off(self, domid: int) -> None:
        """Cut the power as the guest sees it."""
        self._call("shutdown", domid=domid, reason=SHUTDOWN_POWEROFF)

    def destroy(self, domid: int) -> None:
        """Remove the domain."""
        self._call("destroy", domid=domid)

    def look(self, domid: int, uuid: str) -> Domain | None:
        """Return the domain, None when it is another uuid's or nobody's."""
        told = self._call("look", domid=domid)
        return _domain(told) if told and told["uuid"] == uuid else None

    def vcpus(self, domid: int) -> int:
        """Return how many vcpus the domain was made with."""
        told = self._call("look", domid=domid)
        if not told:
            raise HypervisorError(f"domain {domid} is gone")
        return int(told["vcpus"])

    def exists(self, domid: int) -> bool:
        """Tell whether any domain has this id now."""
        return self._call("look", domid=domid) is not None

    def domains(self) -> Iterator[tuple[Domain, str]]:
        """Yield every guest of the host with its uuid, batch by batch as Xen does."""
        first = 1
        while batch := self._call("list", first=first, limit=INFO_BATCH):
            yield from ((_domain(told), told["uuid"]) for told in batch)
            first = batch[-1]["domid"] + 1

    def find(self, uuid: str) -> list[Domain]:
        """Return the domains whose handle is `uuid`."""
        return [_domain(told) for told in self._call("find", uuid=uuid)]

    def _no_hvm(self, *_: object, **__: object) -> NoReturn:
        """Refuse: there is no firmware to run, and no device model to talk to."""
        raise HypervisorError("a simulated host runs no HVM guests")

    create_hvm = prepare_hvm = load_hvm = suspend = stop_tracking = crash = press = _no_hvm
    has_drivers = sleep_state = set_sleep_state = _no_hvm


def _domain(told: Told) -> Domain:
    state = DomainState.RUNNING
    if told["reason"] >= 0:
        state = DomainState.SHUTDOWN
    elif told["paused"]:
        state = DomainState.PAUSED
    return Domain(
        domid=told["domid"],
        state=state,
        phase=Phase.NONE,
        reason=told["reason"],
        memory_kib=told["memory_kib"],
        vcpus=told["vcpus"],
        cpu_time_ms=told["cpu_time_ms"],
    )
