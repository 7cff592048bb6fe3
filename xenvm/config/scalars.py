# SPDX-License-Identifier: GPL-2.0-or-later
"""From the text of one value to a plain value: numbers, switches, words, paths. Each raises ValueRefusedError."""

from __future__ import annotations

import re
from collections.abc import Callable

from xenvm import forms
from xenvm.config.issue import ValueRefusedError, quoted, suggestion
from xenvm.model import Action, Compression, StartupKind, Uuid, parse_uuid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.choice import StrChoice


Parser = Callable[[str], object]
"""Turns the text of a value into the value, or raises ValueRefusedError."""

_INTEGER: Final = re.compile(r"-?(?:0x[0-9a-f_]{1,32}|0o[0-7_]{1,64}|0b[01_]{1,80}|[0-9][0-9_]{0,31})", re.IGNORECASE)
_NAME: Final = re.compile(r"[A-Za-z0-9._+-]{1,64}")
_KEYMAP: Final = re.compile(r"[A-Za-z0-9_-]{1,32}")
_NIL_UUID: Final = "00000000-0000-0000-0000-000000000000"

MAX_CMDLINE_BYTES: Final = 1023  # MAX_GUEST_CMDLINE of xen/xen.h is 1024 with the final NUL
MAX_PATH_BYTES: Final = 4095  # PATH_MAX of linux/limits.h is 4096 with the final NUL
BOOT_LETTERS: Final = {"a": "floppy", "c": "first disk", "d": "CD drive", "n": "network"}
OEM_TYPES: Final = (128, 255)  # SMBIOS types left to vendors, xen/hvm/hvm_xs_strings.h

_ACTIONS: Final = {**{action.value: action for action in Action}, "restart": Action.REBOOT}
_STARTUPS: Final = {
    **{kind.value: kind for kind in StartupKind},
    "start": StartupKind.STARTED,
    "poweroff": StartupKind.SHUTDOWN,
}
_RESTORES: Final = (StartupKind.RESTORE, StartupKind.RESTORE_DELETE)


def to_int(text: str) -> int:
    """Return a number written in decimal, or with 0x, 0o or 0b; `_` may part the digits."""
    if not _INTEGER.fullmatch(text):
        raise ValueRefusedError(f"{quoted(text)} is not a whole number")
    try:
        return int(text, 0)
    except ValueError:
        # a leading zero reads as octal to some and as decimal to others
        raise ValueRefusedError(f"{quoted(text)} is not a whole number", "write it without leading zeros") from None


def in_range(number: int, low: int, high: int, unit: str = "") -> int:
    """Return `number` if it lies within the bounds, both included."""
    if not low <= number <= high:
        raise ValueRefusedError(f"{number} is out of range: {low} to {high}{unit and ' ' + unit}")
    return number


def integer(low: int, high: int, unit: str = "") -> Parser:
    """Return a parser of whole numbers between the bounds."""

    def parse(text: str) -> int:
        return in_range(to_int(text), low, high, unit)

    return parse


def boolean(text: str) -> bool:
    """Return a switch: true, yes, y, 1 or false, no, n, 0 in any case."""
    word = text.lower()
    if word in forms.TRUE:
        return True
    if word in forms.FALSE:
        return False
    raise ValueRefusedError(f"{quoted(text)} is neither true nor false", suggestion(word, ("true", "false", "yes")))


def choice(text: str, choices: dict[str, StrChoice]) -> StrChoice:
    """Return the member that `text` names."""
    if text not in choices:
        listed = ", ".join(f"`{word}`" for word in choices)
        raise ValueRefusedError(f"{quoted(text)} is not one of {listed}", suggestion(text.lower(), choices))
    return choices[text]


def action(text: str) -> Action:
    """Return what to do when the guest ends; `restart` is a synonym of `reboot`."""
    return Action(choice(text, dict(_ACTIONS)))


def compression(text: str) -> Compression:
    """Return how save images are compressed."""
    return Compression(choice(text, {kind.value: kind for kind in Compression}))


def startup(text: str) -> tuple[StartupKind, str | None]:
    """Return what to do at the start, with the file of `restore FILE` and `restore-del FILE`."""
    word, _, rest = text.replace("\t", " ").partition(" ")
    kind = StartupKind(choice(word, dict(_STARTUPS)))
    file = rest.strip(" ")
    if kind in _RESTORES:
        if not file:
            raise ValueRefusedError(f"`{kind}` needs a file", f"write `startup = {kind} FILE`")
        return kind, path(file)
    if file:
        raise ValueRefusedError(f"{quoted(file)} after `{word}` has no meaning", "only the restore words take a file")
    return kind, None


def path(text: str) -> str:
    """Return an absolute path; whether the file exists is a question for the host, not for the parser."""
    if not text.startswith("/"):
        raise ValueRefusedError(f"the path {quoted(text)} is not absolute", "write it from the root on: /...")
    if len(text.encode()) > MAX_PATH_BYTES:
        raise ValueRefusedError(f"the path is longer than {MAX_PATH_BYTES} bytes")
    return text


def uuid(text: str) -> Uuid:
    """Return the VM's uuid; the nil uuid belongs to dom0."""
    try:
        value = parse_uuid(text)
    except ValueError as error:
        raise ValueRefusedError(f"{quoted(text)} is no uuid", str(error)) from None
    if value == _NIL_UUID:
        raise ValueRefusedError("the nil uuid is that of dom0", "leave the key out to have one made")
    return value


def name(text: str) -> str:
    """Return the VM's name: up to 64 letters, digits and `._+-`."""
    if not _NAME.fullmatch(text):
        raise ValueRefusedError(f"{quoted(text)} is no VM name", "use 1 to 64 characters out of A-Z a-z 0-9 . _ + -")
    if text == "Domain-0":
        raise ValueRefusedError("the name Domain-0 is that of dom0")
    return text


def cmdline(text: str) -> str:
    """Return the kernel's command line, at most 1023 bytes."""
    length = len(text.encode())
    if length > MAX_CMDLINE_BYTES:
        raise ValueRefusedError(f"the command line has {length} bytes, a PV guest takes {MAX_CMDLINE_BYTES}")
    return text


def boot(text: str) -> str:
    """Return the boot order as letters, each at most once; empty leaves the order to the firmware."""
    for index, letter in enumerate(text):
        if letter not in BOOT_LETTERS:
            known = ", ".join(f"{key} ({what})" for key, what in BOOT_LETTERS.items())
            raise ValueRefusedError(f"{quoted(letter)} is no boot device", f"known are {known}")
        if letter in text[:index]:
            raise ValueRefusedError(f"boot device `{letter}` is named twice")
    return text


def oem_types(text: str) -> tuple[int, ...]:
    """Return SMBIOS types, a comma list without repetition."""
    numbers = [in_range(to_int(item.strip(" ")), *OEM_TYPES) for item in text.split(",")]
    for index, number in enumerate(numbers):
        if number in numbers[:index]:
            raise ValueRefusedError(f"type {number} is named twice")
    return tuple(numbers)


def keymap(text: str) -> str:
    """Return the name of a keyboard layout; the device model looks it up as a file name."""
    if not _KEYMAP.fullmatch(text):
        raise ValueRefusedError(f"{quoted(text)} is no keymap", "give a name like en-us")
    return text
