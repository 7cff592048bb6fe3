# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table of commands a monitor answers: who may, with which arguments, under which other names."""

from __future__ import annotations

from xenvm import forms
from xenvm.errors import ExitCode, UsageError, XenvmError
from xenvm.record import MappingProxyType, Record
from xenvm.supervisor.states import Event

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

TIMEOUT_MAX_S: Final = 86400.0


class Command(Record):
    """One command. `event` is what it does to the state machine; `reading` ones are open to the read-only group."""

    event: Event | None = None
    reading: bool = False
    arguments: frozenset[str] = frozenset()


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "help": Command(reading=True),
        "status": Command(reading=True),
        "domid": Command(reading=True),
        "get": Command(reading=True, arguments=frozenset({"field"})),
        "events": Command(reading=True),
        "wait": Command(reading=True, arguments=frozenset({"state", "timeout"})),
        "start": Command(Event.START, arguments=frozenset({"paused"})),
        "pause": Command(Event.PAUSE),
        "unpause": Command(Event.UNPAUSE),
        "shutdown": Command(Event.SHUTDOWN, arguments=frozenset({"timeout", "force", "forced"})),
        "restart": Command(Event.RESTART, arguments=frozenset({"timeout", "force", "forced"})),
        "destroy": Command(Event.DESTROY),
        "suspend": Command(arguments=frozenset({"file", "live", "timeout"})),
        "checkpoint": Command(arguments=frozenset({"file", "live", "timeout"})),
        "restore": Command(arguments=frozenset({"file", "paused", "delete", "foreign"})),
        "commit": Command(),
        "cancel": Command(),
        "disk-list": Command(reading=True),
        "disk-add": Command(arguments=frozenset({"device", "type", "path", "mode", "devtype", "share"})),
        "disk-del": Command(arguments=frozenset({"device", "force", "timeout"})),
        "cd-insert": Command(arguments=frozenset({"device", "type", "path"})),
        "cd-eject": Command(arguments=frozenset({"device", "force", "timeout"})),
        "nic-list": Command(reading=True),
        "nic-add": Command(arguments=frozenset({"id", "bridge", "mac"})),
        "nic-del": Command(arguments=frozenset({"id", "force", "timeout"})),
        "nic-network-switch": Command(arguments=frozenset({"id", "bridge"})),
        "doctor": Command(arguments=frozenset({"clean"})),
        "get-vnc": Command(reading=True),
        "get-stubdomid": Command(reading=True),
        "get-acpi-state": Command(reading=True),
        "trigger": Command(arguments=frozenset({"params"})),
        "s3suspend": Command(arguments=frozenset({"timeout"})),
        "s3resume": Command(),
        "read-config": Command(arguments=frozenset({"path"})),
        "console": Command(),
        "console-log": Command(),
        "quit": Command(),
    }
)

ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "halt": "shutdown",
        "reboot": "restart",
        "get-status": "status",
        "get-domid": "domid",
        "vnc": "get-vnc",
    }
)
"""Names of the original that still serve."""

NOT_HERE: Final[Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(
        (*("device", "set-nic-backend-dom", "pci-add", "pci-del", "pci-list"),),
        "passes no PCI devices through, and all backends run in dom0",
    )
    | dict.fromkeys(
        (*("s4suspend", "cd-insert-file", "cd-insert-real"),),
        "does not have this one: hibernation is the guest's own, and cd-insert takes every disc",
    )
    | dict.fromkeys(("set", "set-mem-target"), "changes a running guest by no such command; edit the config file")
)
"""Commands of the original that this version refuses, with the reason."""


def find(name: str) -> tuple[str, Command]:
    """Return the command of this name with its own name, or raise UsageError saying what is wrong with it."""
    name = ALIASES.get(name, name)
    command = COMMANDS.get(name)
    if command is None:
        if name in NOT_HERE:
            raise UsageError(f"{name}: this version of xenvm {NOT_HERE[name]}")
        raise UsageError(f"{_shown(name)}: no such command", hint="xenvm-cmd help lists them")
    return name, command


def check_rights(name: str, command: Command, rights: str, uid: int) -> None:
    """Refuse a command to whom it is not open."""
    if rights != "all" and not (rights == "read" and command.reading):
        raise XenvmError(
            f"{name}: user {uid} may not do this",
            hint="root and the group xenvm may do everything, the group xenvm-read may look",
            code=ExitCode.PERMISSION_REFUSED,
        )


def check_arguments(name: str, command: Command, params: Mapping[str, str]) -> None:
    """Refuse an argument that the command does not take: none is ignored."""
    for key in params:
        if key not in command.arguments:
            known = ", ".join(sorted(command.arguments)) or "none"
            raise UsageError(f"{name}: no argument {_shown(key)}", hint=f"its arguments: {known}")


def boolean(params: Mapping[str, str], *keys: str) -> bool:
    """Return a switch given under any of `keys`; absent means false."""
    for key in keys:
        if key in params:
            value = params[key].lower()
            if value not in forms.TRUE | forms.FALSE:
                raise UsageError(f"{key}: {_shown(params[key])} is neither true nor false")
            return value in forms.TRUE
    return False


def seconds(params: Mapping[str, str], key: str, default_s: float) -> float:
    """Return a time limit in seconds."""
    if key not in params:
        return default_s
    try:
        value = float(params[key])
    except ValueError:
        value = -1.0
    if not 0 < value <= TIMEOUT_MAX_S:
        raise UsageError(f"{key}: {_shown(params[key])} is not a time from 0 to {TIMEOUT_MAX_S:g} seconds")
    return value


def help_text() -> str:
    """Return the names and arguments, one command a line."""
    rows = [
        f"{name} {' '.join(f'[{key}=...]' for key in sorted(command.arguments))}".rstrip()
        for name, command in COMMANDS.items()
    ]
    return "\n".join(rows)


def _shown(text: str) -> str:
    return ascii(text[:64])
