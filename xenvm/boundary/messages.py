# SPDX-License-Identifier: GPL-2.0-or-later
"""Every message that crosses between two processes of a monitor, with its one checked decoder. No I/O.

What does not pass the checks is a ProtocolError: the receiver ends the connection. No message from the supervisor has
a field that names a file or a domain; a disk it adds comes as an open descriptor.
"""

from __future__ import annotations

from xenvm import forms
from xenvm.boundary.checks import (
    DIRECTORIES_LIMIT,
    INT32_MAX,
    NAME,
    Checked,
    Message,
    array,
    choice,
    flag,
    is_directory,
    is_file_name,
    number,
    string,
    table,
)
from xenvm.boundary.devices import (
    DEVICE_MAX,
    DISK_GRANTS,
    NIC_GRANTS,
    NICS_LIMIT,
    STATES,
    VBDS,
    VIFS,
    DeviceState,
    DiskGrant,
    Kind,
    NicGrant,
    Vbd,
    Vif,
    is_bridge,
)
from xenvm.boundary.images import Image, Inspect, Progress, Restore, Room, Save, Sync, Write, Writing, Written
from xenvm.boundary.machine import MACHINE_MESSAGES, MACHINES, MODELS, Machine, ModelState
from xenvm.boundary.processors import Affinity, CpuidRule
from xenvm.boundary.workers import (
    Connect,
    Decrypt,
    Join,
    Release,
    Serve,
    Served,
    Sum,
    Summed,
    Tables,
    Unpack,
    Unpacked,
)
from xenvm.choice import StrChoice
from xenvm.errors import ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import ClassVar, Final

    from xenvm.boundary.checks import Check


class Op(StrChoice):
    """What is asked of the broker and of its helpers. In an Ask none has an argument: the broker knows VM and grants.

    What needs more comes to the broker as a message of its own.
    """

    FIND = "find"
    START = "start"
    START_PAUSED = "start-paused"
    START_RESTORED = "start-restored"
    BUILD = "build"
    BUILD_PAUSED = "build-paused"
    REBUILD = "rebuild"
    QUERY = "query"
    SURVEY = "survey"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    RESUME = "resume"
    CRASH = "crash"
    PRESS_POWER = "press-power"
    PRESS_SLEEP = "press-sleep"
    NMI = "nmi"
    S_STATE = "s-state"
    FALL_ASLEEP = "fall-asleep"
    WAKE = "wake"
    ASK_SLEEP = "ask-sleep"
    ASK_POWEROFF = "ask-poweroff"
    ASK_REBOOT = "ask-reboot"
    WITHDRAW = "withdraw"
    FORCE_POWEROFF = "force-poweroff"
    DESTROY = "destroy"
    SAVE = "save"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    RESTORE_PAUSED = "restore-paused"
    CANCEL = "cancel"
    DEVICES = "devices"
    PLUG = "plug"
    UNPLUG = "unplug"
    REBRIDGE = "rebridge"
    SETTLE = "settle"
    CONSOLE = "console"
    CONSOLE_LOG = "console-log"
    READ_CONFIG = "read-config"
    STARTED = "started"
    QUIT = "quit"


class DomainState(StrChoice):
    """What Xen says of a domain."""

    ABSENT = "absent"
    DYING = "dying"
    SHUTDOWN = "shutdown"
    PAUSED = "paused"
    RUNNING = "running"


class Phase(StrChoice):
    """What our own dom0-only xenstore record says of the domain with this uuid."""

    NONE = "none"
    BUILDING = "building"
    BUILT = "built"


class WatchEvent(StrChoice):
    """What the watcher tells: only that something may have changed, never a value a guest wrote."""

    ARMED = "armed"
    RELEASED = "released"


_UUID_TEXT = string(36, forms.uuid)
_NAME_TEXT = string(64, NAME)
_PATH_TEXT = string(4095)
_LINE_TEXT = string(1024)
_SEQUENCE = number(0, INT32_MAX)
_SECONDS = number(1, 86400)
AGE_LIMIT_MS: Final = 60_000
_DOMID = number(-1, 0x7FEF)  # DOMID_FIRST_RESERVED is 0x7FF0 (xen.h); -1 means none


class Domain(Checked):
    """One look at a domain. `reason` is the shutdown code of xen/sched.h, -1 while the guest has not shut down."""

    domid: int
    state: DomainState
    phase: Phase
    reason: int
    memory_kib: int
    vcpus: int
    cpu_time_ms: int
    CHECKS: ClassVar = {
        "domid": _DOMID,
        "state": choice(DomainState),
        "phase": choice(Phase),
        "reason": number(-1, 255),
        "memory_kib": number(0, 2**52),
        "vcpus": number(0, 65536),
        "cpu_time_ms": number(0, 2**62),
    }


class Fault(Checked):
    """Why something failed, for the user: `code` is the exit status."""

    code: int
    message: str
    hint: str
    CHECKS: ClassVar = {"code": number(1, max(ExitCode)), "message": string(4096), "hint": string(1024)}


class Grants(Checked):
    """What the administrator's config entitles a VM to. Sealed in the broker, `machine` for HVM guests."""

    uuid: str
    name: str
    kernel: str
    initrd: str
    cmdline: str
    memory_mib: int
    memory_max_mib: int
    vcpus: int
    check_memory: bool
    cpuid: tuple[CpuidRule, ...]
    affinity: tuple[Affinity, ...]
    debug: bool
    output: str
    disks: tuple[DiskGrant, ...]
    nics: tuple[NicGrant, ...]
    device_timeout_s: int
    image: str = ""
    image_compression: str = "none"
    machine: tuple[Machine, ...] = ()
    CHECKS: ClassVar = {
        "uuid": _UUID_TEXT,
        "name": _NAME_TEXT,
        "kernel": _PATH_TEXT,
        "initrd": _PATH_TEXT,
        "cmdline": string(1023),  # MAX_GUEST_CMDLINE of xen.h is 1024 with its NUL
        "memory_mib": number(1, 2**32),
        "memory_max_mib": number(1, 2**32),
        "vcpus": number(1, 8192),
        "check_memory": flag,
        "cpuid": array(CpuidRule.from_body, 256),
        "affinity": array(Affinity.from_body, 8192),
        "debug": flag,
        "output": _PATH_TEXT,
        "disks": DISK_GRANTS,
        "nics": NIC_GRANTS,
        "device_timeout_s": _SECONDS,
        "image": _PATH_TEXT,
        "image_compression": string(8, forms.one_of("none", "zstd")),
        "machine": MACHINES,
    }


class Policy(Checked):
    """What the supervisor decides by, from the same config. Values are those of the config file."""

    startup: str
    on_halt: str
    on_reboot: str
    on_crash: str
    shutdown_timeout_s: int
    device_timeout_s: int
    _ACTION: ClassVar[Check] = string(16, forms.one_of("destroy", "reboot", "preserve"))
    CHECKS: ClassVar = {
        "startup": string(16, forms.one_of("started", "paused", "shutdown", "restore", "restore-del")),
        "on_halt": _ACTION,
        "on_reboot": _ACTION,
        "on_crash": _ACTION,
        "shutdown_timeout_s": _SECONDS,
        "device_timeout_s": _SECONDS,
    }


class FileNeed(Checked):
    """A file that the config names: `kind` is what it must be; `key`, `line` and `text` say where it is named."""

    key: str
    line: int
    path: str
    kind: str
    text: str = ""
    CHECKS: ClassVar = {
        "key": string(64),
        "line": number(0, INT32_MAX),
        "path": _PATH_TEXT,
        "kind": string(8, forms.one_of("file", "block", "either", "image")),
        "text": _LINE_TEXT,
    }


class HostPolicy(Checked):
    """What /etc/xenvm/policy.toml says for all VMs of the host; "" and () without it.

    `directories` are those whose files clients may add as disks, whoever may open them; `image_directories` those in
    which a VM may have its save images.
    """

    default_bridge: str
    bridges: tuple[str, ...]
    directories: tuple[str, ...] = ()
    image_directories: tuple[str, ...] = ()
    CHECKS: ClassVar = {
        "default_bridge": string(15, is_bridge),
        "bridges": array(string(15, is_bridge), 256),
        "directories": array(string(1024, is_directory), DIRECTORIES_LIMIT),
        "image_directories": array(string(1024, is_directory), DIRECTORIES_LIMIT),
    }


class ConfigIssue(Checked):
    """One thing wrong in the config file. `line` is 0 for the file as a whole."""

    line: int
    text: str
    message: str
    hint: str
    CHECKS: ClassVar = {"line": number(0, INT32_MAX), "text": _LINE_TEXT, "message": _LINE_TEXT, "hint": _LINE_TEXT}

    def show(self, filename: str) -> str:
        """Return the issue as the user sees it: where and what, the text of the line, what to try."""
        lines = [f"{filename}:{self.line}: {self.message}" if self.line else f"{filename}: {self.message}"]
        lines += [f"    {self.text}"] if self.text else []
        lines += [f"    hint: {self.hint}"] if self.hint else []
        return "\n".join(lines)


class Hello(Message):
    """A confined process is ready; `proof` is what it proved about itself."""

    role: str
    pid: int
    proof: str
    KIND: ClassVar = 1
    CHECKS: ClassVar = {"role": string(16), "pid": number(1, INT32_MAX), "proof": string(2048)}


class Init(Message):
    """Broker to supervisor, first: whom it serves. `first` is false after the supervisor had to be replaced.

    The broker has begun the work that the startup policy asks for (START, START_PAUSED or FIND; a replaced supervisor
    gets FIND); its outcome follows with sequence 0.
    """

    uuid: str
    name: str
    config_file: str
    memory_mib: int
    vcpus: int
    debug: bool
    first: bool
    monitor_pid: int
    all_gid: int
    read_gid: int
    policy: Policy
    directories: tuple[str, ...]
    fields: dict[str, str]
    image_directories: tuple[str, ...] = ()
    KIND: ClassVar = 2
    CHECKS: ClassVar = {
        "uuid": _UUID_TEXT,
        "name": _NAME_TEXT,
        "config_file": _PATH_TEXT,
        "memory_mib": number(1, 2**32),
        "vcpus": number(1, 8192),
        "debug": flag,
        "first": flag,
        "monitor_pid": number(1, INT32_MAX),
        "all_gid": number(-1, INT32_MAX),
        "read_gid": number(-1, INT32_MAX),
        "policy": Policy.from_body,
        "directories": array(string(1024, is_directory), DIRECTORIES_LIMIT),
        "fields": table(string(64), string(32768), 256),
        "image_directories": array(string(1024, is_directory), DIRECTORIES_LIMIT),
    }


class Ask(Message):
    """Supervisor to broker: do this. `text` is for STARTED alone: the outcome to show whoever started the monitor.

    For a QUERY another monitor's look at the whole host will do that has begun within the last `age_ms`; -1: none will.
    """

    sequence: int
    op: Op
    text: str
    code: int
    age_ms: int = -1
    KIND: ClassVar = 3
    CHECKS: ClassVar = {
        "sequence": _SEQUENCE,
        "op": choice(Op),
        "text": string(4096),
        "code": number(0, max(ExitCode)),
        "age_ms": number(-1, AGE_LIMIT_MS),
    }


class Done(Message):
    """The asked-for thing happened; `domain` is the newest look at it, `devices` what FIND and DEVICES saw.

    `text` is what a job has to say besides: a SURVEY all domains that run (boundary/survey.py).

    That of CONSOLE sends a terminal along, that of a storage worker the device it has made.
    """

    sequence: int
    domain: Domain
    text: str
    devices: tuple[DeviceState, ...] = ()
    models: tuple[ModelState, ...] = ()
    KIND: ClassVar = 4
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {
        "sequence": _SEQUENCE,
        "domain": Domain.from_body,
        "text": string(60000),
        "devices": STATES,
        "models": MODELS,
    }


class Failed(Message):
    """It did not happen; nothing of it is left unless the fault says so."""

    sequence: int
    fault: Fault
    domain: Domain
    KIND: ClassVar = 5
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "fault": Fault.from_body, "domain": Domain.from_body}


class Job(Message):
    """Broker to builder or hotplug: its one request. BUILD brings kernel and, if granted, initrd as descriptors.

    `vbds` and `vifs` are the devices to plug, `kind` and `device` (-1: none) the one to unplug, which with `disc` must
    be a disc in a CD drive; `force` takes one away that the guest does not let go. With it, a restore takes the image
    of another VM. `restored` is the image it came from, noted when it is whole; `unreadable` says why there is none.
    """

    op: Op
    uuid: str
    domid: int
    grants: Grants
    vbds: tuple[Vbd, ...] = ()
    vifs: tuple[Vif, ...] = ()
    kind: Kind = Kind.VBD
    device: int = -1
    disc: bool = False
    force: bool = False
    timeout_s: int = 40
    restored: str = ""
    live: bool = False
    unreadable: str = ""
    KIND: ClassVar = 7
    DESCRIPTORS: ClassVar = 4
    CHECKS: ClassVar = {
        "op": choice(Op),
        "uuid": _UUID_TEXT,
        "domid": _DOMID,
        "grants": Grants.from_body,
        "vbds": VBDS,
        "vifs": VIFS,
        "kind": choice(Kind),
        "device": number(-1, DEVICE_MAX),
        "disc": flag,
        "force": flag,
        "timeout_s": _SECONDS,
        "restored": string(80, forms.printable),
        "live": flag,
        "unreadable": string(200),
    }


class Watch(Message):
    """Watcher to supervisor."""

    event: WatchEvent
    KIND: ClassVar = 8
    CHECKS: ClassVar = {"event": choice(WatchEvent)}


class Parsed(Message):
    """Parser to whoever gave it the file: issues, or grants, policies and `warnings` (then `issues` is empty).

    `files` are those that must be there, so that a missing one is reported like any other error.
    """

    issues: tuple[ConfigIssue, ...]
    grants: tuple[Grants, ...]
    policy: tuple[Policy, ...]
    host: HostPolicy
    fields: dict[str, str]
    files: tuple[FileNeed, ...]
    uuid_given: bool
    warnings: tuple[ConfigIssue, ...] = ()
    KIND: ClassVar = 9
    CHECKS: ClassVar = {
        "issues": array(ConfigIssue.from_body, 256),
        "grants": array(Grants.from_body, 1),
        "policy": array(Policy.from_body, 1),
        "host": HostPolicy.from_body,
        "fields": table(string(64), string(32768), 256),
        "files": array(FileNeed.from_body, 256),
        "uuid_given": flag,
        "warnings": array(ConfigIssue.from_body, 16),
    }


class Outcome(Message):
    """Broker to whoever started the monitor: it has reached its startup state (code 0), or why not.

    `warnings` are those of the config file, when it has.
    """

    code: int
    uuid: str
    text: str
    warnings: str = ""
    KIND: ClassVar = 10
    CHECKS: ClassVar = {
        "code": number(0, max(ExitCode)),
        "uuid": string(36),
        "text": string(60000),
        "warnings": string(60000),
    }


class Plug(Message):
    """Supervisor to broker: give the running guest one more device. A disk comes with its descriptor.

    Or it is the file `file` of the host policy's directory number `directory` (-1: none).
    """

    sequence: int
    disks: tuple[DiskGrant, ...]
    nics: tuple[NicGrant, ...]
    directory: int = -1
    file: str = ""
    KIND: ClassVar = 11
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {
        "sequence": _SEQUENCE,
        "disks": array(DiskGrant.from_body, 1),
        "nics": array(NicGrant.from_body, 1),
        "directory": number(-1, DIRECTORIES_LIMIT - 1),
        "file": string(255, is_file_name),
    }


class Unplug(Message):
    """Supervisor to broker: take a device away; after `timeout_s` give up, or with `force` remove it all the same.

    With `disc` only a disc in a CD drive is taken.
    """

    sequence: int
    kind: Kind
    device: int
    disc: bool
    force: bool
    timeout_s: int
    KIND: ClassVar = 12
    CHECKS: ClassVar = {
        "sequence": _SEQUENCE,
        "kind": choice(Kind),
        "device": number(0, DEVICE_MAX),
        "disc": flag,
        "force": flag,
        "timeout_s": _SECONDS,
    }


class Rebridge(Message):
    """Supervisor to broker: move a network card to another bridge."""

    sequence: int
    device: int
    bridge: str
    KIND: ClassVar = 13
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "device": number(0, NICS_LIMIT - 1), "bridge": string(15, is_bridge)}


class Created(Message):
    """Builder or hotplug to broker: the nodes of the devices are there; backends may be prepared for `domid`.

    `devices` are those of the VM's earlier domain, which is gone.
    """

    domid: int
    devices: tuple[DeviceState, ...]
    KIND: ClassVar = 14
    CHECKS: ClassVar = {"domid": number(1, 0x7FEF), "devices": STATES}


class Ready(Message):
    """Broker to builder or hotplug: the block devices are open (here are their numbers), the cards are bridged."""

    vbds: tuple[Vbd, ...]
    models: tuple[ModelState, ...] = ()
    KIND: ClassVar = 15
    CHECKS: ClassVar = {"vbds": VBDS, "models": MODELS}


KINDS: Final[Mapping[int, type[Message]]] = {
    message.KIND: message
    for message in (
        *(Hello, Init, Ask, Done, Failed, Progress, Job, Watch, Parsed, Outcome),
        *(Plug, Unplug, Rebridge, Created, Ready, Join, Serve, Served, Connect, Decrypt, Release),
        *(Unpack, Unpacked, Sum, Summed, Tables),
        *(Save, Restore, Inspect, Image, Write, Room, Writing, Sync, Written),
        *MACHINE_MESSAGES,
    )
}

NO_DOMAIN: Final = Domain(-1, DomainState.ABSENT, Phase.NONE, -1, 0, 0, 0)
