# SPDX-License-Identifier: GPL-2.0-or-later
"""The builder's jobs: each does one thing to one domain and returns a fresh look at it.

Every job names the domain by uuid; a domid from an earlier look is used only while Xen still says that it carries
that uuid. A domain with our uuid but without our xenstore record was made by another tool and is never touched.
"""

from __future__ import annotations

import time

from xenvm.boundary import survey
from xenvm.boundary.devices import is_server
from xenvm.boundary.images import other_memory
from xenvm.boundary.machine import ModelState, is_tty
from xenvm.boundary.messages import NO_DOMAIN, Domain, DomainState, Done, Grants, Job, Op, Phase
from xenvm.context import suppress
from xenvm.errors import BusyError, ExitCode, ProtocolError, TimeoutExpiredError, WrongStateError, XenvmError
from xenvm.helpers import devices
from xenvm.helpers.builder import cpuid, tree
from xenvm.helpers.builder.hypervisor import SHUTDOWN_SUSPEND, Channels
from xenvm.helpers.builder.saving import Saving
from xenvm.record import MappingProxyType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Final

    from xenvm.boundary.devices import DeviceState
    from xenvm.boundary.images import Image
    from xenvm.helpers.builder.hypervisor import Hypervisor, Rings
    from xenvm.helpers.builder.saving import Tell
    from xenvm.helpers.exchange import Devices
    from xenvm.helpers.store import Store

    Load = Callable[[int, Channels], Rings]

MAXMEM_SLACK_KIB: Final = 1024  # room for the start-of-day pages above the target, as xl gives
VCPU_OVERHEAD_PAGES: Final = 256  # with the page per MiB and the 1 MiB below: what xl counts for a PV guest
GRANULE_KIB: Final = 2048
SCRUB_WAIT_S: Final = 30.0
DESTROY_WAIT_S: Final = 60.0
CONSOLE_WAIT_S: Final = 10.0
TERMINALS: Final = b"/dev/pts/"
STARTING: Final = frozenset({Op.START, Op.START_PAUSED, Op.START_RESTORED, Op.BUILD, Op.BUILD_PAUSED})
"""What takes on a domain that is there, whole and ours; without one they do as those below."""
CREATING: Final = frozenset({Op.BUILD, Op.BUILD_PAUSED, Op.REBUILD, Op.RESTORE, Op.RESTORE_PAUSED})
RESTORING: Final = frozenset({Op.RESTORE, Op.RESTORE_PAUSED, Op.START_RESTORED})
PAUSED: Final = frozenset({Op.BUILD_PAUSED, Op.START_PAUSED, Op.RESTORE_PAUSED})
TRIGGERS: Final = MappingProxyType({Op.PRESS_POWER: "power", Op.PRESS_SLEEP: "sleep", Op.NMI: "nmi"})
SLEEP_STATES: Final = MappingProxyType({Op.FALL_ASLEEP: 3, Op.WAKE: 0})  # all that Xen knows of ACPI's
LOOKING: Final = STARTING | CREATING | {Op.FIND}
SHUTDOWN_WORDS: Final = MappingProxyType({Op.ASK_POWEROFF: "poweroff", Op.ASK_REBOOT: "reboot", Op.ASK_SLEEP: "s3"})


class Builder:
    """The open connections of one builder process, and its jobs."""

    def __init__(self, xen: Hypervisor, store: Store, plugging: Devices, progress: Tell) -> None:
        self._xen = xen
        self._store = store
        self._plugging = plugging
        self._progress = progress
        self.left = NO_DOMAIN
        """What a build that failed has left, as far as that is known: a phase, when it could not be removed."""
        self._seen: tuple[DeviceState, ...] = ()  # devices of which processes may be left that only the broker can end

    def run(self, job: Job, images: list[int]) -> Done:
        """Do the job; return the domain as it is then, what some ops say besides, and the devices it came upon."""
        if job.op is Op.CONSOLE:
            return Done(0, self._ours(job), self._console(job))
        if job.op is Op.S_STATE:
            return Done(0, self._ours(job), self._sleep_state(job))
        domain, text = self._act(job, images)
        present = domain.state not in (DomainState.ABSENT, DomainState.DYING)
        models = self._models(job.uuid) if job.op in LOOKING and present else ()
        return Done(0, domain, text, self._seen, models)

    def _act(self, job: Job, images: list[int]) -> tuple[Domain, str]:
        text = ""
        if job.op is Op.FIND or job.op in STARTING:
            found = self._find(job.uuid)
            if found.domid > 0:
                return found, tree.read_restored(self._store, job.uuid)
            return (found, text) if job.op is Op.FIND else self._create(job, images)
        if job.op in CREATING:
            return self._create(job, images)
        if job.op is Op.DESTROY:
            self._destroy(job.uuid)
            return NO_DOMAIN, text
        if job.op in (Op.SAVE, Op.CHECKPOINT):
            saving = Saving(self._xen, self._store, job, self._progress, self._plugging)
            text = saving.run(images, self._ours(job), go_on=job.op is Op.CHECKPOINT)
        elif job.op is Op.SURVEY:
            begun_ns = time.monotonic_ns()
            text = survey.text(begun_ns, self._xen.domains())
        elif job.op is not Op.QUERY:
            self._ACTIONS[job.op](self, self._ours(job), job)
        return self._look(job), text

    def _create(self, job: Job, images: list[int]) -> tuple[Domain, str]:
        """Build the domain, or bring it back from an image; the text tells of which."""
        if job.op in RESTORING:
            return self._restore(job, images), job.restored
        return self._build(job, lambda domid, channels: self._boot(job.grants, images, domid, channels)), ""

    # Looking

    def _look(self, job: Job) -> Domain:
        domain = self._xen.look(job.domid, job.uuid) if job.domid > 0 else None
        return domain.but(phase=Phase.BUILT) if domain else NO_DOMAIN

    def _ours(self, job: Job) -> Domain:
        domain = self._look(job)
        if domain.state in (DomainState.ABSENT, DomainState.DYING):
            raise WrongStateError(f"domain {job.domid} is gone")
        return domain

    def _find(self, uuid: str) -> Domain:
        """Return the VM's domain, or NO_DOMAIN; what an interrupted build or destroy left behind is removed first."""
        recorded, phase = tree.read_record(self._store, uuid)
        domains = self._xen.find(uuid)
        if not domains and phase is Phase.NONE:
            return NO_DOMAIN
        if domains and (phase is Phase.NONE or (phase is Phase.BUILT and domains[0].domid != recorded)):
            raise BusyError(
                f"domain {domains[0].domid} has the uuid {uuid} but was not built by xenvm: left alone",
                hint="end it with the tool that made it, or give this VM another uuid",
            )
        if len(domains) == 1 and phase is Phase.BUILT and domains[0].state is not DomainState.DYING:
            if self._store.read(f"{tree.domain_path(recorded)}/control/shutdown") == b"suspend":
                tree.withdraw(self._store, recorded)  # of a monitor that died over a save: nobody waits for it now
            if domains[0].state is not DomainState.SHUTDOWN:
                with suppress(XenvmError):  # of a monitor that died when the guest ran again, but for xenstored not yet
                    self._store.resume(recorded)
            devices.settle(self._store, uuid, recorded)
            self._seen = devices.look(self._store, uuid, recorded)
            return self._awake(uuid, domains[0]).but(phase=phase)
        self._progress("removing what an earlier monitor left", 0, 0)
        self._destroy(uuid)
        return NO_DOMAIN

    def _awake(self, uuid: str, domain: Domain) -> Domain:
        """Let a whole domain run whose builder died before it could; return it as it is then."""
        if not tree.wakes(self._store, uuid):
            return domain
        if domain.state is DomainState.PAUSED:
            self._xen.unpause(domain.domid)
        tree.woken(self._store, uuid)
        return self._xen.look(domain.domid, uuid) or domain

    # Building

    def _build(self, job: Job, load: Load) -> Domain:
        grants = job.grants
        if job.op is Op.REBUILD:
            self._progress("destroying the old domain", 0, 0)
            self._destroy(job.uuid)
        elif self._find(job.uuid).domid > 0:  # what a failed build could not remove itself is removed now
            raise WrongStateError(f"a domain with uuid {job.uuid} exists already", hint="destroy it first")
        if grants.check_memory:
            self._progress("checking memory", 0, 0)
            self._check_memory(grants)
        tree.write_record(self._store, job.uuid, -1, Phase.BUILDING)
        try:
            domid = self._assemble(job, load)
            wakes = job.op not in PAUSED
            tree.write_record(self._store, job.uuid, domid, Phase.BUILT, job.restored, wakes=wakes)
            if wakes:
                self._xen.unpause(domid)
                tree.woken(self._store, job.uuid)
        except BaseException as cause:
            self.left = NO_DOMAIN.but(phase=Phase.BUILDING)
            try:
                self._destroy(job.uuid)
                self.left = NO_DOMAIN
            except XenvmError as error:
                if isinstance(cause, XenvmError):  # that stays the reason
                    more = f"what it has left could not be removed: {error.message}"
                    cause.hint = f"{cause.hint}; {more}" if cause.hint else more
            raise
        self._seen = devices.look(self._store, job.uuid, domid)
        domain = self._xen.look(domid, job.uuid)
        return domain.but(phase=Phase.BUILT) if domain else NO_DOMAIN

    def _assemble(self, job: Job, load: Load) -> int:
        grants, xen, store = job.grants, self._xen, self._store
        memory_kib, max_kib = grants.memory_mib * 1024, grants.memory_max_mib * 1024
        self._progress("creating the domain", 0, 0)
        machine = grants.machine[0] if grants.machine else None
        domid = (xen.create_hvm if machine else xen.create_pv)(job.uuid, grants.vcpus)
        tree.write_record(store, job.uuid, domid, Phase.BUILDING)
        tree.write_skeleton(store, domid, job.uuid, grants.name, hvm=machine is not None)
        self._plugging.begin(domid, self._seen)
        video_mib = machine.videoram_mib if machine else 0
        if machine:
            tree.write_machine(store, domid, job.uuid, machine)
            limit_kib = memory_kib + MAXMEM_SLACK_KIB * (1 + len(grants.nics))  # the cards' ROMs are the guest's memory
            size = {"memory_kib": limit_kib, "memory_mib": grants.memory_mib}
            xen.prepare_hvm(domid, grants.vcpus, machine, **size, restores=job.op in RESTORING)
        else:
            # the limit is known to a Linux from its boot on: it could not grow beyond one that is raised later
            xen.prepare_pv(domid, grants.vcpus, memory_kib=max_kib + MAXMEM_SLACK_KIB, map_kib=max_kib)
        xen.pin(domid, grants.affinity)
        store_domid, console_domid = self._daemon("xenstored"), self._daemon("xenconsoled")
        channels = Channels(
            store_port=xen.event_channel(domid, store_domid, "xenstore"),
            store_domid=store_domid,
            console_port=xen.event_channel(domid, console_domid, "console"),
            console_domid=console_domid,
        )
        rings = load(domid, channels)
        self._progress("publishing the domain", 0, 0)
        tree.write_built(
            store,
            domid,
            memory_kib=memory_kib,
            max_kib=max_kib,
            video_kib=video_mib * 1024,
            vcpus=grants.vcpus,
            rings=rings,
            channels=channels,
        )
        store.introduce(domid, rings.store_frame, channels.store_port)
        if job.vbds or job.vifs or machine:
            self._progress("starting the device model" if machine else "connecting the devices", 0, 0)
            model = self._plugging.finish(domid)
            if machine and model:
                tree.write_model(store, job.uuid, domid, model, machine.vnc_host)
        return domid

    def _boot(self, grants: Grants, images: list[int], domid: int, channels: Channels) -> Rings:
        """Load kernel and initrd into the new domain, or firmware loader and BIOS."""
        if grants.machine:
            machine = grants.machine[0]
            self._xen.apply_cpuid(domid, cpuid.rules(machine, grants.cpuid), pae=machine.pae)
            self._progress("loading the firmware", 0, 0)
            names = [name for name, wanted in (("smbios", machine.smbios), ("acpi", machine.slic)) if wanted]
            return self._xen.load_hvm(
                domid,
                loader=images[0],
                bios=images[1],
                memory_mib=grants.memory_mib - machine.videoram_mib,
                vcpus=grants.vcpus,
                apic=machine.apic,
                tables=dict(zip(names, images[2:], strict=True)),
                channels=channels,
            )
        self._xen.apply_cpuid(domid, grants.cpuid)
        self._progress("loading the kernel", 0, 0)
        return self._xen.load_pv(
            domid,
            kernel=images[0],
            initrd=images[1] if len(images) > 1 else None,
            cmdline=grants.cmdline,
            memory_mib=grants.memory_mib,
            vcpus=grants.vcpus,
            channels=channels,
        )

    def _restore(self, job: Job, streams: list[int]) -> Domain:
        """Build the domain from a stream, once another process has checked all of the image that it comes from.

        What a guest may see of the processor is part of the stream.
        """
        if not streams:
            raise XenvmError(
                f"startup: {job.grants.image[:2000]}: {job.unreadable or 'there is no image'}",
                hint="`startup = started` builds the guest without an image",
                code=ExitCode.CONFIG_REFUSED,
            )
        self._progress("checking the image", 0, 0)
        self._check_image(self._plugging.image(), job)

        def load(domid: int, channels: Channels) -> Rings:
            self._progress("reading the image", 0, 0)
            return self._xen.restore(domid, streams[0], channels)

        return self._build(job, load)

    def _check_image(self, told: Image, job: Job) -> None:
        """Compare what the image was made of with what this VM is."""
        grants = job.grants
        if told.uuid not in ("", job.uuid) and not job.force:
            raise WrongStateError(
                f"the image is of the VM {told.uuid}, this one is {job.uuid}",
                hint="what that guest remembers of its disks would ruin other ones; if this VM has those very disks, "
                "xenvm-cmd restore FILE foreign=true",
            )
        wanted_kib = grants.memory_max_mib * 1024
        if told.memory_max_kib != wanted_kib:
            raise other_memory(told.memory_max_kib, wanted_kib)
        if told.vcpus != grants.vcpus:
            raise WrongStateError(
                f"the image is of a guest with {told.vcpus} vcpus, this VM has {grants.vcpus}",
                hint="vcpus of the config file must be what it was when the image was written",
            )
        self._xen.check_release(told.xen_major, told.xen_minor)

    def _check_memory(self, grants: Grants) -> None:
        max_kib = grants.memory_max_mib * 1024
        overhead_kib = 4 * (VCPU_OVERHEAD_PAGES * grants.vcpus + max_kib // 1024) + MAXMEM_SLACK_KIB
        need_kib = -(-(grants.memory_mib * 1024 + overhead_kib) // GRANULE_KIB) * GRANULE_KIB
        end = time.monotonic() + SCRUB_WAIT_S
        while True:
            host = self._xen.memory()
            if host.free_kib >= need_kib:
                return
            if not host.scrubbing_kib or time.monotonic() >= end:
                raise XenvmError(
                    f"memory: the guest needs {need_kib // 1024} MiB ({grants.memory_mib} MiB and the hypervisor's "
                    f"share), {host.free_kib // 1024} MiB are free",
                    hint="stop another guest, lower `memory`, or give dom0 less (dom0_mem)",
                )
            time.sleep(0.2)

    def _daemon(self, name: str) -> int:
        """Return the domain a daemon runs in: dom0 unless the host has a stub domain for it."""
        value = self._store.read(f"/tool/{name}/domid")
        return int(value) if value is not None and value.isdigit() else 0

    # Ending

    def _destroy(self, uuid: str) -> None:
        """Remove the domain of `uuid` and all its nodes; right at any moment, and twice."""
        recorded, phase = tree.read_record(self._store, uuid)
        domains = self._xen.find(uuid)
        if domains and phase is Phase.NONE:
            raise WrongStateError(
                f"domain {domains[0].domid} has this uuid but was not built by xenvm: left alone",
                hint="destroy it with the tool that made it",
            )
        self._seen = self._seen or devices.look(self._store, uuid, recorded)
        if phase is not Phase.NONE:  # from here on it is no whole domain, should this process die
            tree.write_record(self._store, uuid, recorded, Phase.BUILDING)
        for domain in domains:
            if domain.state is DomainState.RUNNING:
                self._xen.pause(domain.domid)
        server = tree.read_model(self._store, uuid)[0]
        if recorded > 0 and (server or tree.has_model(self._store, recorded)):
            self._plugging.release(recorded, server if is_server(server) else "")
        for domain in domains:
            devices.remove_every(self._store, uuid, domain.domid)  # while it exists: else a backend may never let go
            tree.remove_domain(self._store, domain.domid)
            self._xen.destroy(domain.domid)
            self._await_end(domain.domid, uuid)
        if recorded > 0 and recorded not in [domain.domid for domain in domains] and not self._xen.exists(recorded):
            devices.remove_every(self._store, uuid, recorded)
            tree.remove_domain(self._store, recorded)
        tree.remove_vm(self._store, uuid)

    def _await_end(self, domid: int, uuid: str) -> None:
        end = time.monotonic() + DESTROY_WAIT_S
        while self._xen.look(domid, uuid) is not None:
            if time.monotonic() >= end:
                raise TimeoutExpiredError(
                    f"domain {domid} is still dying after {DESTROY_WAIT_S:g} s",
                    hint="a process still maps its memory (a backend or a device model); `xl list` shows it as dying",
                )
            time.sleep(0.02)

    # The rest

    def _pause(self, domain: Domain, _job: Job) -> None:
        if domain.state is not DomainState.PAUSED:  # Xen counts pauses
            self._xen.pause(domain.domid)

    def _unpause(self, domain: Domain, _job: Job) -> None:
        if domain.state is DomainState.PAUSED:
            self._xen.unpause(domain.domid)

    def _resume(self, domain: Domain, _job: Job) -> None:
        self._withdraw(domain, _job)
        Saving(self._xen, self._store, _job, self._progress, self._plugging).settle()

    def _crash(self, domain: Domain, _job: Job) -> None:
        """Stop the domain as crashed; one that is suspended is so for its monitor, and would wait for being woken."""
        if domain.state is DomainState.SHUTDOWN and domain.reason == SHUTDOWN_SUSPEND:
            self._xen.pause(domain.domid)  # it must not run for a moment: its device model is gone
            self._xen.resume(domain.domid)
            with suppress(XenvmError):  # xenstored then tells nobody of the crash; the monitor knows of it
                self._store.resume(domain.domid)
            self._xen.crash(domain.domid)
            self._xen.unpause(domain.domid)
        elif domain.state is not DomainState.SHUTDOWN:
            self._xen.crash(domain.domid)

    def _press(self, domain: Domain, job: Job) -> None:
        self._need_machine(job)
        self._xen.press(domain.domid, TRIGGERS[job.op])

    def _sleep_state(self, job: Job) -> str:
        self._need_machine(job)
        return str(self._xen.sleep_state(job.domid))

    def _set_sleep_state(self, domain: Domain, job: Job) -> None:
        """Do to the domain what its device model has told: confined, that may not do so itself."""
        self._need_machine(job)
        if self._xen.sleep_state(domain.domid) != SLEEP_STATES[job.op]:
            self._xen.set_sleep_state(domain.domid, SLEEP_STATES[job.op])

    def _ask_sleep(self, domain: Domain, job: Job) -> None:
        """Ask the guest to sleep, if it can hear that and is awake."""
        self._need_machine(job)
        if not self._xen.has_drivers(domain.domid):
            raise WrongStateError(
                "the guest has no PV drivers running, which hear the request to sleep",
                hint="`trigger sleep` presses its sleep button",
            )
        if self._xen.sleep_state(domain.domid):
            raise WrongStateError("the guest sleeps already", hint="s3resume wakes it")
        self._store.write(f"{tree.domain_path(domain.domid)}/control/shutdown", SHUTDOWN_WORDS[job.op])

    def _need_machine(self, job: Job) -> None:
        if not job.grants.machine:
            raise WrongStateError(f"{job.op}: a PV guest has no buttons and no ACPI")

    def _models(self, uuid: str) -> tuple[ModelState, ...]:
        server, tty, port = tree.read_model(self._store, uuid)
        try:
            return (ModelState.from_body({"server": server, "tty": tty, "vnc_port": int(port)}),) if server else ()
        except (ValueError, ProtocolError):
            return ()

    def _ask(self, domain: Domain, job: Job) -> None:
        """Ask the guest; one without PV drivers has its power button pressed, since it hears nothing else."""
        if job.grants.machine and not self._xen.has_drivers(domain.domid):
            self._xen.press(domain.domid, "power")
            return
        self._store.write(f"{tree.domain_path(domain.domid)}/control/shutdown", SHUTDOWN_WORDS[job.op])

    def _withdraw(self, domain: Domain, _job: Job) -> None:
        tree.withdraw(self._store, domain.domid)

    def _power_off(self, domain: Domain, _job: Job) -> None:
        if domain.state is not DomainState.SHUTDOWN:
            self._xen.power_off(domain.domid)

    def _console(self, job: Job) -> str:
        """Return the terminal of the serial port, or the one that xenconsoled serves the guest's console on."""
        tty = tree.read_model(self._store, job.uuid)[1]
        if tty and is_tty(tty):
            return tty
        path = f"{tree.domain_path(job.domid)}/console/tty"
        end = time.monotonic() + CONSOLE_WAIT_S
        while not (untrusted_tty := self._store.read(path)):
            if time.monotonic() >= end:
                raise TimeoutExpiredError(
                    f"console: xenconsoled did not offer a terminal within {CONSOLE_WAIT_S:g} s (node {path})",
                    hint="is xenconsoled running?",
                )
            time.sleep(0.05)
        number = untrusted_tty.removeprefix(TERMINALS)
        if not untrusted_tty.startswith(TERMINALS) or not number.isdigit() or len(number) > 6:
            raise XenvmError("console: the node tty is not a terminal", code=ExitCode.FAILED)
        return untrusted_tty.decode("ascii")

    _ACTIONS: Final[Mapping[Op, Callable[[Builder, Domain, Job], None]]] = MappingProxyType(
        {
            Op.PAUSE: _pause,
            Op.UNPAUSE: _unpause,
            Op.RESUME: _resume,
            Op.CRASH: _crash,
            Op.PRESS_POWER: _press,
            Op.PRESS_SLEEP: _press,
            Op.NMI: _press,
            Op.FALL_ASLEEP: _set_sleep_state,
            Op.WAKE: _set_sleep_state,
            Op.ASK_SLEEP: _ask_sleep,
            Op.ASK_POWEROFF: _ask,
            Op.ASK_REBOOT: _ask,
            Op.WITHDRAW: _withdraw,
            Op.FORCE_POWEROFF: _power_off,
        }
    )
