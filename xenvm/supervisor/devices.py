# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands about disks and network cards: from their parameters to requests, and from states to words. Pure."""

from __future__ import annotations

from xenvm.boundary.devices import NICS_LIMIT, DeviceState, DiskGrant, Kind, NicGrant, is_bridge, is_mac
from xenvm.boundary.messages import Ask, DomainState, Done, Init, Op, Plug, Rebridge, Unplug
from xenvm.errors import ExitCode, ProtocolError, UsageError, WrongStateError, XenvmError
from xenvm.model import Uuid, derived_mac, virtual_device_number
from xenvm.record import MappingProxyType
from xenvm.supervisor import buttons
from xenvm.supervisor.commands import boolean, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Final

    Params = Mapping[str, str]

STATES: Final[Mapping[int, str]] = MappingProxyType(  # enum xenbus_state, xen/io/xenbus.h
    {
        -1: "none",
        0: "unknown",
        1: "initialising",
        2: "waiting for the guest",
        3: "initialised",
        4: "connected",
        5: "closing",
        6: "closed",
        7: "reconfiguring",
        8: "reconfigured",
    }
)
UNFINISHED: Final = frozenset({-1, 0, 1})  # a device that waits for its guest, or that closes, is whole
NAME_LIMIT: Final = 32
DISK_TYPES: Final = ("phy", "file", "aio", "qcow", "vhd")


COMMANDS: Final = (
    *("disk-list", "disk-add", "disk-del", "cd-insert", "cd-eject"),
    *("nic-list", "nic-add", "nic-del", "nic-network-switch"),
    "doctor",
    *buttons.COMMANDS,
)
CHANGING: Final = frozenset({Op.PLUG, Op.UNPLUG, Op.REBRIDGE, Op.SETTLE})
TAKING_AWAY: Final = ("disk-del", "cd-eject", "nic-del")


def request(
    name: str, sequence: int, params: Params, init: Init, taken: Iterable[int], *, alive: bool = True
) -> tuple[Op, Ask | Plug | Unplug | Rebridge]:
    """Return what to ask of the broker for a command; raise UsageError when its parameters are off.

    For a VM that is not `alive` doctor cleans up as a start does, which removes all that was of an earlier domain.
    """
    if name in buttons.COMMANDS:
        op = buttons.request(name, params)
        return op, Ask(sequence, op, "", 0)
    if name in ("disk-list", "nic-list"):
        return Op.DEVICES, Ask(sequence, Op.DEVICES, "", 0)
    if name == "doctor":
        clean = Op.SETTLE if alive else Op.FIND
        op = clean if boolean(params, "clean") else Op.DEVICES
        return op, Ask(sequence, op, "", 0)
    if name in ("disk-add", "cd-insert"):
        return Op.PLUG, disk_add(name, sequence, params)
    if name == "nic-add":
        return Op.PLUG, nic_add(sequence, params, init.uuid, taken)
    if name == "nic-network-switch":
        return Op.REBRIDGE, switch(sequence, params)
    return Op.UNPLUG, unplug(name, sequence, params, init.policy.device_timeout_s)


def answer(name: str, done: Done) -> tuple[str, object]:
    """Return what a command says when it is done: the devices, one word, or what is not as it should be."""
    if name in buttons.COMMANDS:
        return buttons.answer(name, done)
    if name == "doctor":
        gone = done.domain.state is DomainState.ABSENT
        found = [
            f"{state.kind} {state.name}: "
            + ("left of an earlier domain" if gone else f"its backend is {STATES[state.backend]}")
            + "; doctor clean=true removes it"
            for state in done.devices
            if gone or state.backend in UNFINISHED
        ]
        found += done.text.splitlines()
        return "\n".join(found), found
    text, data = shown(done.devices, Kind.VIF if name.startswith("nic") else Kind.VBD)
    if not name.endswith("list"):
        text = "" if name in TAKING_AWAY else done.text
    return text, data


def cards(done: Done) -> frozenset[int]:
    """Return the ids of the network cards that the guest has."""
    return frozenset(state.device for state in done.devices if state.kind is Kind.VIF)


def disk_add(command: str, sequence: int, params: Params) -> Plug:
    """Return the request for a disk that comes with a descriptor."""
    name, cdrom = _needed(command, params, "device"), command == "cd-insert"
    kind = params.get("type", "file")
    if kind not in DISK_TYPES:
        raise UsageError(f"type: {kind[:16]!a} is none of {', '.join(DISK_TYPES)}")
    mode, devtype = params.get("mode", "r" if cdrom else "w"), params.get("devtype", "cdrom" if cdrom else "disk")
    if mode not in ("r", "w") or devtype not in ("disk", "cdrom") or (devtype, mode) == ("cdrom", "w"):
        raise UsageError("mode is r or w, devtype disk or cdrom; a cdrom has mode r")
    grant = DiskGrant(
        device=device_number(name),
        name=name,
        type=kind,
        path=params.get("path", "handed over")[:1000],
        read_only=mode == "r",
        cdrom=devtype == "cdrom",
        share=boolean(params, "share"),
        cipher="",
        key_size_bits=0,
        key_file="",
    )
    return Plug(sequence, (_passable(grant),), ())


def by_policy(command: str, plug: Plug, path: str, directories: Sequence[str]) -> Plug:
    """Return the request for a disk that came without its descriptor: its file is in a directory that is open to all.

    Raise XenvmError when it is not.
    """
    directory, _, name = path.rpartition("/")
    if not name or directory not in directories:
        raise XenvmError(
            f"{command}: {path[:200]!a} was not handed over, and lies in no directory that is open to clients",
            hint="add one that you may open, or name its directory under disk-directories in /etc/xenvm/policy.toml",
            code=ExitCode.PERMISSION_REFUSED,
        )
    try:
        return Plug.from_body(plug.but(directory=[*directories].index(directory), file=name).as_body())
    except ProtocolError as error:
        raise UsageError(f"{command}: path: {error.message}") from None


def _passable(grant: DiskGrant) -> DiskGrant:
    """Return the grant if the broker will accept it: for one that it does not it ends this process."""
    try:
        return DiskGrant.from_body(grant.as_body())
    except ProtocolError as error:
        raise UsageError(f"disk: {error.message}") from None


def nic_add(sequence: int, params: Params, uuid: str, taken: Iterable[int]) -> Plug:
    """Return the request for a network card; without an id it gets the lowest one that is not `taken`."""
    free = sorted(set(range(NICS_LIMIT)).difference(taken))
    number = nic_id("nic-add", params) if "id" in params else next(iter(free), -1)
    if number < 0:
        raise WrongStateError(f"nic-add: the guest has {NICS_LIMIT} network cards already")
    mac = params.get("mac", "").lower() or derived_mac(number, None, Uuid(uuid))
    if not is_mac(mac):
        raise UsageError(f"mac: {mac[:32]!a} is no address", hint="six pairs of hexadecimal digits: 00:16:3e:..")
    return Plug(sequence, (), (NicGrant(number, bridge(params), mac),))


def unplug(command: str, sequence: int, params: Params, default_s: int) -> Unplug:
    """Return the request to take a disk or a card away."""
    kind = Kind.VIF if command == "nic-del" else Kind.VBD
    device = device_number(_needed(command, params, "device")) if kind is Kind.VBD else nic_id(command, params)
    patience_s = max(1, round(seconds(params, "timeout", float(default_s))))
    return Unplug(sequence, kind, device, command == "cd-eject", boolean(params, "force"), patience_s)


def switch(sequence: int, params: Params) -> Rebridge:
    """Return the request to move a card to another bridge."""
    command = "nic-network-switch"
    return Rebridge(sequence, nic_id(command, params), _needed(command, params, "bridge") and bridge(params))


def device_number(name: str) -> int:
    """Return the number of a disk by its name in the guest."""
    if not name.isascii() or not name.isprintable() or len(name) > NAME_LIMIT:
        raise UsageError(f"device: {name[:NAME_LIMIT]!a} is no virtual disk name", hint="one like hda, sda or xvda")
    try:
        return virtual_device_number(name)
    except ValueError as error:
        raise UsageError(f"device: {error}") from None


def nic_id(command: str, params: Params) -> int:
    """Return the id of a card."""
    word = _needed(command, params, "id")
    if not word.isascii() or not word.isdigit() or len(word) > len(str(NICS_LIMIT)) or int(word) >= NICS_LIMIT:
        raise UsageError(f"id: {word[:16]!a} is no number from 0 to {NICS_LIMIT - 1}")
    return int(word)


def bridge(params: Params) -> str:
    """Return the bridge asked for, "" for the host's default."""
    name = params.get("bridge", "")
    if not is_bridge(name):
        raise UsageError(f"bridge: {name[:32]!a} is no name of an interface")
    return name


def shown(states: Iterable[DeviceState], kind: Kind) -> tuple[str, list[dict[str, object]]]:
    """Return the devices of one kind as lines and as data."""
    chosen = [state for state in states if state.kind is kind]
    data = [_data(state) for state in chosen]
    lines = [f"{state.name:<8} {STATES[state.backend]:<22} {_where(state)}".rstrip() for state in chosen]
    return "\n".join(lines), data


def _where(state: DeviceState) -> str:
    if state.kind is Kind.VIF:
        return f"{state.detail} bridge={state.bridge}"
    return f"{'r' if state.read_only else 'w'} {state.detail}"


def _data(state: DeviceState) -> dict[str, object]:
    data: dict[str, object] = {
        "device": state.device,
        "name": state.name,
        "backend": STATES[state.backend],
        "frontend": STATES[state.frontend],
    }
    if state.kind is Kind.VIF:
        return data | {"mac": state.detail, "bridge": state.bridge}
    return data | {"source": state.detail, "read_only": state.read_only}


def _needed(command: str, params: Params, key: str) -> str:
    if not params.get(key):
        raise UsageError(f"{command}: {key}= is missing")
    return params[key]
