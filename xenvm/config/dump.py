# SPDX-License-Identifier: GPL-2.0-or-later
"""From a Config back to text: the canonical file, and the canonical value of each key."""

from __future__ import annotations

from xenvm.config.key import REQUIRED, Key
from xenvm.config.keys import KEYS
from xenvm.model import (
    AffinitySpec,
    BiosString,
    CpuidSpec,
    DiskSpec,
    DisplaySpec,
    ExtraArgument,
    NicSpec,
    PciSpec,
    PlatformSpec,
    SerialKind,
    SerialSpec,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Final

    from xenvm.config.schema import Config


_ALWAYS: Final = ("hvm",)  # a reader should not have to know which guest type is the default


def dump(config: Config) -> str:
    """Return the canonical file: keys in the table's order, defaults left out; parsing it gives an equal config."""
    lines: list[str] = []
    for key in KEYS:
        value = _get(config, key)
        default = key.default_for(hvm=config.hvm)
        if value == default and default is not REQUIRED and key.name not in _ALWAYS:
            continue
        lines += [f"{key.name} = {text}".rstrip(" ") for text in _texts(key, value)]
    return "\n".join(lines) + "\n"


def fields(config: Config) -> dict[str, str]:
    """Return the canonical value of every key by its name; "" where nothing is set, a line for each value of a list."""
    return {key.name: "\n".join(_texts(key, _get(config, key))) for key in KEYS}


def _get(config: Config, key: Key) -> object:
    value: object = getattr(config, key.field)
    return (value, getattr(config, key.second_field)) if key.second_field else value


def _texts(key: Key, value: object) -> list[str]:
    if key.repeatable and isinstance(value, tuple):
        return [value_text(item) for item in value]
    return [value_text(value)]


_WRITERS: Final[dict[type, Callable[[Any], str]]] = {}


def _writes(*kinds: type) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Make a function the writer of these types (functools.singledispatch would load five modules at each start)."""

    def register(writer: Callable[[Any], str]) -> Callable[[Any], str]:
        _WRITERS.update(dict.fromkeys(kinds, writer))
        return writer

    return register


def value_text(value: object) -> str:
    """Return a value as a config file has it."""
    for kind in type(value).__mro__:
        if kind in _WRITERS:
            return _WRITERS[kind](value)
    raise TypeError(f"no text for a {type(value).__name__}")


@_writes(type(None))
def _(_value: None) -> str:
    return ""


@_writes(bool)
def _(value: bool) -> str:
    return "true" if value else "false"


@_writes(int, str)
def _(value: int | str) -> str:
    return str(value)


@_writes(tuple)
def _(value: tuple[object, ...]) -> str:
    # numbers are a comma list; a startup word and its file are parted by a blank
    mark = " " if value and isinstance(value[0], str) else ","
    return mark.join(str(item) for item in value if item is not None)


def _options(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Return KEY=VALUE for those that are set."""
    return [f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in pairs if value is not None]


@_writes(DiskSpec)
def _(disk: DiskSpec) -> str:
    parts = [disk.path, disk.type, disk.virtpath, "r" if disk.read_only else "w", "cdrom" if disk.cdrom else "disk"]
    if disk.crypt:
        crypt = disk.crypt
        parts += _options(
            [("cipher", crypt.cipher), ("key-size", crypt.key_size_bits), ("key-file", crypt.key_file)],
        )
    parts += ["share=true"] if disk.share else []
    return ":".join(parts)


@_writes(NicSpec)
def _(nic: NicSpec) -> str:
    return ",".join(_options([("id", nic.id), ("bridge", nic.bridge), ("mac", nic.mac), ("model", nic.model)]))


@_writes(PciSpec)
def _(pci: PciSpec) -> str:
    options = _options(
        [
            ("msitranslate", pci.msitranslate),
            ("power_mgmt", pci.power_mgmt),
            ("guest_slot", pci.guest_slot),
            ("vdevfn", pci.vdevfn),
        ]
    )
    return ",".join([str(pci.group), *(["bind"] if pci.bind else []), str(pci.address), *options])


@_writes(SerialSpec)
def _(serial: SerialSpec) -> str:
    if serial.kind is SerialKind.DEVICE:
        return serial.path or ""
    if serial.kind is SerialKind.TCP:
        return f"tcp:{serial.host}:{serial.port}"
    return serial.kind


@_writes(DisplaySpec)
def _(display: DisplaySpec) -> str:
    options = _options(
        [
            *(("port", display.vnc_port), ("keymap", display.keymap)),
            *(("listen", display.listen), ("password-file", display.password_file)),
        ]
    )
    return display.kind + (":" + ",".join(options) if options else "")


@_writes(CpuidSpec)
def _(cpuid: CpuidSpec) -> str:
    leaf = f"{cpuid.leaf:#x}" + (f"+{cpuid.subleaf:#x}" if cpuid.subleaf is not None else "")
    masks = _options([("eax", cpuid.eax), ("ebx", cpuid.ebx), ("ecx", cpuid.ecx), ("edx", cpuid.edx)])
    return f"{leaf}:{','.join(masks)}"


@_writes(AffinitySpec)
def _(affinity: AffinitySpec) -> str:
    return f"{affinity.vcpu}:{','.join(str(cpu) for cpu in affinity.cpus)}"


@_writes(PlatformSpec, BiosString)
def _(pair: PlatformSpec | BiosString) -> str:
    return f"{pair.key}={pair.value}"


@_writes(ExtraArgument)
def _(argument: ExtraArgument) -> str:
    return argument.key if argument.value is None else f"{argument.key}={argument.value}"
