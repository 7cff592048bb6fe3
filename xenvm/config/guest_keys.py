# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows of the table of keys: identity and life cycle, kernel, memory and processors."""

from __future__ import annotations

from xenvm.config import scalars, tuning
from xenvm.config.key import PATH, REQUIRED, SWITCH, Group, Guests, Key
from xenvm.config.scalars import boolean, integer
from xenvm.model import Action, Compression, StartupKind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


_ACTION: Final = "destroy, preserve or reboot (also: restart)"
_MAX_MEMORY_MIB: Final = 16 * 1024 * 1024  # 16 TiB, the limit Xen's SUPPORT.md states for one guest on x86

LIFE_KEYS: Final = (
    Key(
        name="uuid",
        group=Group.LIFE,
        field="uuid",
        parse=scalars.uuid,
        value="8-4-4-4-12 hexadecimal digits",
        blank_is_default=True,
        published=True,
        help="The identity of the VM, stable over reboot, suspend and restore. Without it one is made at every start.",
        applied="handle of the domain, `/vm/UUID` in xenstore, name of the command socket",
    ),
    Key(
        name="name",
        group=Group.LIFE,
        field="name",
        parse=scalars.name,
        value="1 to 64 characters out of A-Z a-z 0-9 . _ + -",
        blank_is_default=True,
        help="The name of the VM; commands take it in place of the uuid.",
        applied="`name` in the domain's xenstore directory",
    ),
    Key(
        name="startup",
        group=Group.LIFE,
        field="startup",
        second_field="startup_file",
        parse=scalars.startup,
        value="started (also: start), paused, shutdown (also: poweroff), restore FILE or restore-del FILE",
        default=(StartupKind.STARTED, None),
        published=True,
        help="What to do with the VM when the monitor starts. `restore-del` removes the file once the guest runs.",
        applied="the monitor's first command",
    ),
    Key(
        name="on_halt",
        group=Group.LIFE,
        field="on_halt",
        parse=scalars.action,
        value=_ACTION,
        default=Action.DESTROY,
        published=True,
        help="What to do after the guest powered itself off.",
        applied="the monitor, when Xen reports the shutdown reason poweroff",
    ),
    Key(
        name="on_reboot",
        group=Group.LIFE,
        field="on_reboot",
        parse=scalars.action,
        value=_ACTION,
        default=Action.REBOOT,
        synonyms=("on_restart",),
        published=True,
        help="What to do after the guest asked for a reboot.",
        applied="the monitor, when Xen reports the shutdown reason reboot",
    ),
    Key(
        name="on_crash",
        group=Group.LIFE,
        field="on_crash",
        parse=scalars.action,
        value=_ACTION,
        default=Action.DESTROY,
        published=True,
        help="What to do after the guest crashed.",
        applied="the monitor, when Xen reports the shutdown reason crash",
    ),
    Key(
        name="shutdown-timeout",
        group=Group.LIFE,
        field="shutdown_timeout_s",
        parse=integer(1, 86400, "seconds"),
        value="seconds, 1 to 86400",
        default=60,
        help="How long a guest may take to shut down or reboot when asked to.",
        applied="the deadline of the commands `shutdown` and `restart`",
    ),
    Key(
        name="device-timeout",
        group=Group.LIFE,
        field="device_timeout_s",
        parse=integer(1, 86400, "seconds"),
        value="seconds, 1 to 86400",
        default=40,
        help="How long disks and network cards may take to be opened and bridged when they are plugged, and a guest to "
        "let go of one that is taken away. 40 seconds are what Xen's own tools give their hotplug scripts. Other waits "
        "do not depend on it: 10 seconds for a backend driver to take a new device, and 10 for it to open a disk; "
        "1.5 seconds, after `force=true`, for it to close a device whose frontend has gone; 40 seconds for it to let "
        "go of one whose nodes are removed. `disk-add` and `nic-add` wait 5 seconds for the guest to connect, which is "
        "no failure if it does not. Whatever runs out is told with the device, the node waited for, and how long.",
        applied="the deadlines of a start and of `disk-add`, `disk-del`, `nic-add` and `nic-del`",
    ),
    Key(
        name="image-compression",
        group=Group.LIFE,
        field="image_compression",
        parse=scalars.compression,
        value="none or zstd",
        default=Compression.NONE,
        help="Whether save images are compressed: `zstd` makes them a fifth to a third as large, and takes longer. "
        "`xl restore` cannot read such a one before `zstd -d` has unpacked it; xenvm restores both kinds, whatever "
        "this says.",
        applied="the commands `suspend` and `checkpoint`, by a process beside the builder",
    ),
    Key(
        name="debug",
        group=Group.LIFE,
        field="debug",
        parse=boolean,
        value=SWITCH,
        default=False,
        published=True,
        help="Log every operation, not changes of state alone.",
        applied="the monitor's log; never a file in /tmp",
    ),
    Key(
        name="output",
        group=Group.LIFE,
        field="output",
        parse=scalars.path,
        value=PATH,
        blank_is_default=True,
        help="The file that takes the monitor's log, in place of `/var/log/xenvm/UUID.log`.",
        applied="the monitor's log; with `debug` each step is in it",
    ),
    Key(
        name="no_mem_check",
        group=Group.LIFE,
        field="no_mem_check",
        parse=boolean,
        value=SWITCH,
        default=False,
        help="Start even when the host seems to have too little free memory.",
        applied="the check before the domain is built",
    ),
)

BUILD_KEYS: Final = (
    Key(
        name="hvm",
        group=Group.BUILD,
        field="hvm",
        parse=boolean,
        value=SWITCH,
        default=False,
        published=True,
        help="The guest type: true for a fully virtualised machine with firmware, false for a paravirtual kernel.",
        applied="flag of the domain at its creation; chooses the builder",
    ),
    Key(
        name="kernel",
        group=Group.BUILD,
        field="kernel",
        parse=scalars.path,
        value=PATH,
        blank_is_default=True,
        published=True,
        help="The kernel of a PV guest, which must be given; for HVM the firmware loader, by default the host's "
        "hvmloader.",
        applied="the image the builder loads",
    ),
    Key(
        name="initrd",
        group=Group.BUILD,
        field="initrd",
        parse=scalars.path,
        value=PATH,
        blank_is_default=True,
        guests=Guests.PV,
        published=True,
        help="The initial RAM disk; leave empty for none.",
        applied="module 0 of the PV builder",
    ),
    Key(
        name="cmdline",
        group=Group.BUILD,
        field="cmdline",
        parse=scalars.cmdline,
        value=f"text, at most {scalars.MAX_CMDLINE_BYTES} bytes",
        default="",
        guests=Guests.PV,
        published=True,
        help="The command line of the kernel.",
        applied="the start info page of the PV guest",
    ),
    Key(
        name="memory",
        group=Group.BUILD,
        field="memory_mib",
        parse=integer(1, _MAX_MEMORY_MIB, "MiB"),
        value=f"MiB, 1 to {_MAX_MEMORY_MIB}",
        default=REQUIRED,
        published=True,
        help="The memory of the guest. A PV kernel is loaded unpacked: Debian's, of 58 MiB and from 16 MiB on, does "
        "not fit into 64 MiB with any tool, and runs in 128.",
        applied="`memory/target` in xenstore; the allocation of the builder",
    ),
    Key(
        name="memory-max",
        group=Group.BUILD,
        field="memory_max_mib",
        parse=integer(1, _MAX_MEMORY_MIB, "MiB"),
        value=f"MiB, `memory` to {_MAX_MEMORY_MIB}",
        blank_is_default=True,
        help="The memory that a PV guest may grow to, by default the value of `memory`; that is what it starts with. "
        "No command makes it grow: its own balloon driver does, when somebody in the guest tells it to, or dom0 writes "
        "`memory/target` of the domain. Nobody sets aside what it may take beyond `memory`. This version refuses it "
        "for HVM guests, unless it is the value of `memory`.",
        applied="the memory limit of the domain; `memory/static-max` in xenstore",
    ),
    Key(
        name="videoram",
        group=Group.BUILD,
        field="videoram_mib",
        parse=integer(1, 512, "MiB"),
        value="MiB: 8, 16, 32, 64, 128, 256 or 512, less than `memory`",
        blank_is_default=True,
        guests=Guests.HVM,
        help="The part of the memory that the graphics card takes; by default what the card needs.",
        applied="`memory/videoram` in xenstore; the graphics device of QEMU",
    ),
    Key(
        name="vcpus",
        group=Group.BUILD,
        field="vcpus",
        parse=integer(1, tuning.MAX_VCPUS),
        value=f"1 to {tuning.MAX_VCPUS}, with hvm to {tuning.MAX_HVM_VCPUS}",
        default=1,
        published=True,
        help="The number of virtual CPUs.",
        applied="limit of the domain, `cpu/N/availability` in xenstore, `-smp` of QEMU",
    ),
    Key(
        name="cores-per-socket",
        group=Group.BUILD,
        field="cores_per_socket",
        parse=integer(1, tuning.MAX_VCPUS),
        value="a divisor of `vcpus`",
        blank_is_default=True,
        help="How many virtual CPUs share a socket, for licences counted by sockets.",
        applied="nothing yet: this version refuses the key",
    ),
    Key(
        name="cpus-affinity",
        group=Group.BUILD,
        field="cpus_affinity",
        parse=tuning.affinity,
        value="VCPU:CPU[,CPU...]",
        default=(),
        repeatable=True,
        help="The host CPUs that one virtual CPU may run on. A CPU that is not online ends the start with an error.",
        applied="hard affinity of the virtual CPU, after the build",
    ),
    Key(
        name="cpuid",
        group=Group.BUILD,
        field="cpuid",
        parse=tuning.cpuid,
        value="LEAF[+SUBLEAF]:REGISTER=MASK[,REGISTER=MASK...]",
        default=(),
        repeatable=True,
        help="Changes one CPUID leaf. REGISTER is eax, ebx, ecx or edx, MASK has 32 characters, bit 31 first: "
        "`0` clear, `1` set, `x` default, `s` and `k` the host's bit.",
        applied="the CPUID policy of the domain, after the default one",
    ),
)
