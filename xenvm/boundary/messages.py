# SPDX-License-Identifier: GPL-2.0-or-later
"""Every message that crosses between two processes of a monitor, with its one checked decoder. No I/O.

A message is a record; CHECKS says for each field what is acceptable. An unknown or missing field, a wrong
type or a value out of range is a ProtocolError: the receiver ends the connection. No message from the supervisor has
a field that could name a file, a domain or a device.
"""

from __future__ import annotations

import re
from enum import StrEnum

from xenvm.errors import ExitCode, ProtocolError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, ClassVar, Final, Self

    Check = Callable[[object], Any]

INT32_MAX: Final = 2**31 - 1
UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")
NAME: Final = re.compile(r"[A-Za-z0-9._+-]{1,64}", re.ASCII)


def number(low: int, high: int) -> Check:
    """Accept an integer from `low` to `high`; a boolean is not an integer."""

    def check(untrusted: object) -> int:
        if type(untrusted) is not int or not low <= untrusted <= high:
            raise ProtocolError(f"not a number from {low} to {high}")
        return untrusted

    return check


def string(limit: int, pattern: re.Pattern[str] | None = None) -> Check:
    """Accept a string of at most `limit` characters that matches `pattern` as a whole.

    NUL, and halves of surrogate pairs, which cannot be encoded, are not among them.
    """

    def check(untrusted: object) -> str:
        if not isinstance(untrusted, str) or len(untrusted) > limit or _NO_TEXT.search(untrusted):
            raise ProtocolError(f"not a text of at most {limit} characters")
        if pattern is not None and not pattern.fullmatch(untrusted):
            raise ProtocolError("text has another form")
        return untrusted

    return check


def flag(untrusted: object) -> bool:
    """Accept true or false."""
    if not isinstance(untrusted, bool):
        raise ProtocolError("not a boolean")
    return untrusted


def choice(kind: type[StrEnum]) -> Check:
    """Accept a member of a string enumeration by value."""

    def check(untrusted: object) -> StrEnum:
        if not isinstance(untrusted, str):
            raise ProtocolError("not a choice")
        try:
            return kind(untrusted)
        except ValueError as error:
            raise ProtocolError(f"not a {kind.__name__}") from error

    return check


def array(item: Check, limit: int) -> Check:
    """Accept a list of at most `limit` items and return it as a tuple."""

    def check(untrusted: object) -> tuple[Any, ...]:
        if not isinstance(untrusted, list | tuple) or len(untrusted) > limit:
            raise ProtocolError(f"not a list of at most {limit}")
        return tuple(item(untrusted_item) for untrusted_item in untrusted)

    return check


def table(key: Check, value: Check, limit: int) -> Check:
    """Accept an object of at most `limit` members."""

    def check(untrusted: object) -> dict[str, Any]:
        if not isinstance(untrusted, dict) or len(untrusted) > limit:
            raise ProtocolError(f"not an object of at most {limit} members")
        return {key(untrusted_key): value(untrusted_value) for untrusted_key, untrusted_value in untrusted.items()}

    return check


class Checked(Record):
    """A record whose every field has a check; nested ones appear as objects in a body."""

    CHECKS: ClassVar[Mapping[str, Check]]

    @classmethod
    def from_body(cls, untrusted_body: object) -> Self:
        """Return the record in `untrusted_body`, or raise ProtocolError naming the first field that is wrong."""
        if not isinstance(untrusted_body, dict) or untrusted_body.keys() != cls.CHECKS.keys():
            raise ProtocolError(f"{cls.__name__}: fields are not {', '.join(cls.CHECKS)}")
        checked: dict[str, Any] = {}
        for name, check in cls.CHECKS.items():
            try:
                checked[name] = check(untrusted_body[name])
            except ProtocolError as error:
                raise ProtocolError(f"{cls.__name__}.{name}: {error.message}") from error
        return cls(**checked)

    def as_body(self) -> dict[str, object]:
        """Return the JSON form."""
        return {name: _plain(getattr(self, name)) for name in self.FIELDS}


def _plain(value: object) -> object:
    if isinstance(value, Checked):
        return value.as_body()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class Message(Checked):
    """A record that travels in a frame of its own; DESCRIPTORS is how many may come with it."""

    KIND: ClassVar[int]
    DESCRIPTORS: ClassVar[int] = 0


class Op(StrEnum):
    """What a supervisor may ask of the broker. None has an argument: the broker knows the VM and its grants."""

    FIND = "find"
    START = "start"
    START_PAUSED = "start-paused"
    BUILD = "build"
    BUILD_PAUSED = "build-paused"
    REBUILD = "rebuild"
    QUERY = "query"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    RESUME = "resume"
    ASK_POWEROFF = "ask-poweroff"
    ASK_REBOOT = "ask-reboot"
    WITHDRAW = "withdraw"
    FORCE_POWEROFF = "force-poweroff"
    DESTROY = "destroy"
    CONSOLE = "console"
    CONSOLE_LOG = "console-log"
    READ_CONFIG = "read-config"
    STARTED = "started"
    QUIT = "quit"


class DomainState(StrEnum):
    """What Xen says of a domain."""

    ABSENT = "absent"
    DYING = "dying"
    SHUTDOWN = "shutdown"
    PAUSED = "paused"
    RUNNING = "running"


class Phase(StrEnum):
    """What our own dom0-only xenstore record says of the domain with this uuid."""

    NONE = "none"
    BUILDING = "building"
    BUILT = "built"


class WatchEvent(StrEnum):
    """What the watcher tells: only that something may have changed, never a value a guest wrote."""

    ARMED = "armed"
    RELEASED = "released"


_UUID_TEXT = string(36, UUID)
_NAME_TEXT = string(64, NAME)
_PATH_TEXT = string(4095)
_LINE_TEXT = string(1024)
_SEQUENCE = number(0, INT32_MAX)
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


class CpuidRule(Checked):
    """One `cpuid` line: leaf, subleaf (-1 none) and four masks of 32 characters or "", eax to edx (xenctrl.h)."""

    leaf: int
    subleaf: int
    masks: tuple[str, ...]
    CHECKS: ClassVar = {
        "leaf": number(0, 2**32 - 1),
        "subleaf": number(-1, 2**32 - 1),
        "masks": array(string(32, re.compile(r"([01xks]{32})?")), 4),
    }


class Affinity(Checked):
    """One `cpus-affinity` line: the physical CPUs that a virtual CPU may run on."""

    vcpu: int
    cpus: tuple[int, ...]
    CHECKS: ClassVar = {"vcpu": number(0, 8191), "cpus": array(number(0, 8191), 8192)}


class Grants(Checked):
    """What the administrator's config entitles a VM to. Sealed in the broker; nothing later can widen it."""

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
    }


class Policy(Checked):
    """What the supervisor decides by, from the same config. Values are those of the config file."""

    startup: str
    on_halt: str
    on_reboot: str
    on_crash: str
    shutdown_timeout_s: int
    _ACTION: ClassVar[Check] = string(16, re.compile("destroy|reboot|preserve"))
    CHECKS: ClassVar = {
        "startup": string(16, re.compile("started|paused|shutdown")),
        "on_halt": _ACTION,
        "on_reboot": _ACTION,
        "on_crash": _ACTION,
        "shutdown_timeout_s": number(1, 86400),
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
    fields: dict[str, str]
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
        "fields": table(string(64), string(32768), 256),
    }


class Ask(Message):
    """Supervisor to broker: do this. `text` is for STARTED alone: the outcome to show whoever started the monitor."""

    sequence: int
    op: Op
    text: str
    code: int
    KIND: ClassVar = 3
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "op": choice(Op), "text": string(4096), "code": number(0, max(ExitCode))}


class Done(Message):
    """The asked-for thing happened; `domain` is the newest look at it. CONSOLE sends a descriptor along."""

    sequence: int
    domain: Domain
    text: str
    KIND: ClassVar = 4
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "domain": Domain.from_body, "text": string(32768)}


class Failed(Message):
    """It did not happen; nothing of it is left unless the fault says so."""

    sequence: int
    fault: Fault
    domain: Domain
    KIND: ClassVar = 5
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "fault": Fault.from_body, "domain": Domain.from_body}


class Progress(Message):
    """A step of a long request has begun."""

    sequence: int
    step: str
    KIND: ClassVar = 6
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "step": string(64)}


class Job(Message):
    """Broker to builder: its one request. BUILD brings the kernel and, if granted, the initrd as descriptors."""

    op: Op
    uuid: str
    domid: int
    grants: Grants
    KIND: ClassVar = 7
    DESCRIPTORS: ClassVar = 2
    CHECKS: ClassVar = {"op": choice(Op), "uuid": _UUID_TEXT, "domid": _DOMID, "grants": Grants.from_body}


class Watch(Message):
    """Watcher to supervisor."""

    event: WatchEvent
    KIND: ClassVar = 8
    CHECKS: ClassVar = {"event": choice(WatchEvent)}


class Parsed(Message):
    """Parser to whoever gave it the file: issues, or the grants and the policy (then `issues` is empty).

    `lines` gives the line of `kernel` and `initrd`, so that a missing file is reported like any other error.
    """

    issues: tuple[ConfigIssue, ...]
    grants: tuple[Grants, ...]
    policy: tuple[Policy, ...]
    fields: dict[str, str]
    kernel: str
    initrd: str
    lines: dict[str, int]
    uuid_given: bool
    KIND: ClassVar = 9
    CHECKS: ClassVar = {
        "issues": array(ConfigIssue.from_body, 256),
        "grants": array(Grants.from_body, 1),
        "policy": array(Policy.from_body, 1),
        "fields": table(string(64), string(32768), 256),
        "kernel": _PATH_TEXT,
        "initrd": _PATH_TEXT,
        "lines": table(string(64), number(0, INT32_MAX), 256),
        "uuid_given": flag,
    }


class Outcome(Message):
    """Broker to whoever started the monitor: it has reached its startup state (code 0), or why not."""

    code: int
    uuid: str
    text: str
    KIND: ClassVar = 10
    CHECKS: ClassVar = {"code": number(0, max(ExitCode)), "uuid": string(36), "text": string(60000)}


KINDS: Final[Mapping[int, type[Message]]] = {
    message.KIND: message for message in (Hello, Init, Ask, Done, Failed, Progress, Job, Watch, Parsed, Outcome)
}

NO_DOMAIN: Final = Domain(-1, DomainState.ABSENT, Phase.NONE, -1, 0, 0, 0)
