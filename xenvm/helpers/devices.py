# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks and network cards in xenstore: plugged, looked at, taken away.

B is a device's backend directory, which only dom0 writes; F its frontend directory, which belongs to the guest and is
never trusted. What a device is made of stands in our own dom0-only record of the VM. The `script` node marks a device
as ours. Order and nodes: xen/io/blkif.h, xen/io/netif.h, xen/io/xenbus.h.

Released means that the kernel's device directory is gone: a state of Closed may never come, or come too early.
"""

from __future__ import annotations

import os
import time

from xenvm import forms
from xenvm.boundary.devices import DeviceState, Kind, Vbd, Vif, is_server
from xenvm.boundary.place import HERE
from xenvm.errors import BusyError, ExitCode, TimeoutExpiredError, XenvmError
from xenvm.helpers.store import remove_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Final

    from xenvm.helpers.store import Store

RECORDS: Final = "/xenvm"
SCRIPT: Final = "/usr/libexec/xenvm/hotplug"
SYSFS: Final = f"{HERE.sysfs}/bus/xen-backend/devices"
INTERFACES: Final = f"{HERE.sysfs}/class/net"
INITIALISING, INIT_WAIT, CONNECTED, CLOSING, CLOSED = 1, 2, 4, 5, 6
BACKEND_WAIT_S: Final = 10.0  # for the kernel's driver to take a new device
GONE_WAIT_S: Final = 40.0  # for it to let go of one whose nodes are removed: longer than an image server may take
FORCED_WAIT_S: Final = 1.5
FRONTEND_WAIT_S: Final = 5.0  # for a running guest to connect; a guest without a driver never does
POLL_S: Final = 0.01

Place = tuple[Kind, int]


def backend_path(kind: Kind, domid: int, device: int) -> str:
    """Return B."""
    return f"/local/domain/0/backend/{kind}/{domid}/{device}"


def frontend_path(kind: Kind, domid: int, device: int) -> str:
    """Return F."""
    return f"/local/domain/{domid}/device/{kind}/{device}"


def record_path(uuid: str, kind: Kind, device: int) -> str:
    """Return our record of a device."""
    return f"{RECORDS}/{uuid}/{kind}/{device}"


def named(kind: Kind, name: object) -> str:
    """Return what a user calls a device: a disk by its name in the guest, a card by its number."""
    return f"{'disk' if kind is Kind.VBD else 'network card'} {name}"


def known_as(store: Store, uuid: str, place: Place) -> str:
    """Return what a user calls a device of our record; of one that is not there only the number is known."""
    kind, device = place
    name = (store.read(f"{record_path(uuid, kind, device)}/name") or b"").decode("ascii", "replace")
    return named(kind, name if name and name.isprintable() else device)


def present(kind: Kind, domid: int, device: int) -> bool:
    """Tell whether the kernel has this backend device."""
    return _exists(f"{SYSFS}/{kind}-{domid}-{device}")


# Plugging


def places(vbds: Iterable[Vbd], vifs: Iterable[Vif]) -> list[Place]:
    """Return kind and number of each device."""
    return [*((Kind.VBD, vbd.device) for vbd in vbds), *((Kind.VIF, vif.id) for vif in vifs)]


def write(store: Store, uuid: str, domid: int, vbds: Iterable[Vbd], vifs: Iterable[Vif]) -> None:
    """Make record, F and B of each device, all or none; raise BusyError when one of them is there already."""

    def steps() -> None:
        for kind, device in places(vbds, vifs):
            if store.read(f"{backend_path(kind, domid, device)}/frontend") is not None:
                raise BusyError(f"{known_as(store, uuid, (kind, device))}: the guest has such a device already")
        for vbd in vbds:
            _write_vbd(store, uuid, domid, vbd)
        for vif in vifs:
            _write_vif(store, uuid, domid, vif)

    store.transaction(steps)


def _write_vbd(store: Store, uuid: str, domid: int, vbd: Vbd) -> None:
    kind = "cdrom" if vbd.cdrom else "disk"
    front = {
        "backend-id": "0",
        "state": str(INITIALISING),
        "virtual-device": str(vbd.device),
        "device-type": kind,
        "trusted": "1",
        "protocol": "x86_64-abi",
    }
    back = {
        "params": vbd.source,
        "script": SCRIPT,
        "frontend-id": str(domid),
        "online": "1",
        "removable": "1" if vbd.cdrom else "0",
        "bootable": "1",
        "state": str(INITIALISING),
        "dev": vbd.name,
        "type": "phy",
        "mode": "r" if vbd.read_only else "w",
        "device-type": kind,
        "discard-enable": "0" if vbd.read_only else "1",
        "specification": "xen",
    }
    record = {"name": vbd.name, "source": vbd.source, "mode": back["mode"], "server": vbd.server}
    _write_device(store, uuid, domid, (Kind.VBD, vbd.device), front, back, record)


def _write_vif(store: Store, uuid: str, domid: int, vif: Vif) -> None:
    front = {"backend-id": "0", "state": str(INITIALISING), "handle": str(vif.id), "mac": vif.mac, "trusted": "1"}
    back = {
        "script": SCRIPT,
        "mac": vif.mac,
        "bridge": vif.bridge,
        "handle": str(vif.id),
        "type": "vif",
        "frontend-id": str(domid),
        "online": "1",
        "state": str(INITIALISING),
        "hotplug-status": "",
    }
    _write_device(store, uuid, domid, (Kind.VIF, vif.id), front, back, {"mac": vif.mac, "bridge": vif.bridge})


def _write_device(
    store: Store,
    uuid: str,
    domid: int,
    place: Place,
    front: dict[str, str],
    back: dict[str, str],
    record: dict[str, str],
) -> None:
    """Children inherit owner and readers of their directory, which is made empty first."""
    f, b = frontend_path(place[0], domid, place[1]), backend_path(place[0], domid, place[1])
    for path, owner, nodes in (
        (f, (f"n{domid}", "r0"), {"backend": b, **front}),
        (b, ("n0", f"r{domid}"), {"frontend": f, **back}),
        (record_path(uuid, *place), ("n0",), {"domid": str(domid), **record}),
    ):
        store.remove(path)
        store.make(path)
        store.permissions(path, *owner)
        for node, value in nodes.items():
            store.write(f"{path}/{node}", value)


def connect(store: Store, uuid: str, domid: int, vbds: Iterable[Vbd], vifs: Iterable[Vif]) -> None:
    """Give each backend what it waits for: the open block device, or the word that the interface is in its bridge.

    Returns when the kernel has opened every disk, so that whoever holds one may close it. Raise XenvmError when a disk
    is in use elsewhere, TimeoutExpiredError naming the device and the node that never came.
    """
    for place in places(vbds, vifs):
        kind, device = place
        state = f"{backend_path(kind, domid, device)}/state"
        _until(
            _in_state(store, state, INIT_WAIT),
            BACKEND_WAIT_S,
            f"{known_as(store, uuid, place)}: the backend driver did not take the device",
            f"node {state} to be {INIT_WAIT}",
            f"is the module {'xen-blkback' if kind is Kind.VBD else 'xen-netback'} loaded in dom0?",
        )
    for vbd in vbds:
        _refuse_in_use(store, domid, vbd)
    for vbd in vbds:
        b = backend_path(Kind.VBD, domid, vbd.device)
        if vbd.server:
            store.write(f"{record_path(uuid, Kind.VBD, vbd.device)}/server", vbd.server)
        store.write(f"{b}/physical-device-path", vbd.source)
        store.write(f"{b}/physical-device", f"{vbd.major:x}:{vbd.minor:x}")
        store.write(f"{b}/hotplug-status", "connected")
    for vbd in vbds:
        opened = f"{SYSFS}/vbd-{domid}-{vbd.device}/physical_device"
        _until(
            _there(opened),
            BACKEND_WAIT_S,
            f"disk {vbd.name}: the backend driver did not open {vbd.source}",
            f"{opened} to be there, after node {backend_path(Kind.VBD, domid, vbd.device)}/physical-device was written",
            "see the kernel log of dom0 (dmesg) for what xen-blkback says",
            _error(store, Kind.VBD, domid, vbd.device),
        )
    for vif in vifs:
        store.write(f"{backend_path(Kind.VIF, domid, vif.id)}/hotplug-status", "connected")


def connected(store: Store, domid: int, vbds: Iterable[Vbd], vifs: Iterable[Vif]) -> bool:
    """Wait a while for the guest to take the devices; tell whether it has."""
    paths = [f"{backend_path(kind, domid, device)}/state" for kind, device in places(vbds, vifs)]
    end = time.monotonic() + FRONTEND_WAIT_S
    while time.monotonic() < end:
        paths = [path for path in paths if _state(store.read(path)) != CONNECTED]
        if not paths:
            return True
        time.sleep(POLL_S)
    return False


def _refuse_in_use(store: Store, domid: int, vbd: Vbd) -> None:
    """Refuse a disk that another guest has, when either side may write it.

    It is known by the number of its block device, or by its path: an image that xl has a QEMU serve has no such number,
    and QEMU takes no lock on it.
    """
    if vbd.share:
        return
    number = f"{vbd.major:x}:{vbd.minor:x}".encode("ascii")
    paths = {_path(name) for name in (vbd.source.partition(":")[2], *vbd.names)} - {""}
    for b in _backends(store, ("vbd", "qdisk")):
        if b == backend_path(Kind.VBD, domid, vbd.device):
            continue
        same = store.read(f"{b}/physical-device") == number or _path_in(store.read(f"{b}/params")) in paths
        if same and not (vbd.read_only and store.read(f"{b}/mode") == b"r"):
            raise BusyError(
                f"disk {vbd.name}: {vbd.source} is in use by domain {b.split('/')[-2]} (node {b})",
                hint="two guests that write one disk destroy its file system; share=true says that yours do not",
            )


def _backends(store: Store, kinds: Iterable[str]) -> Iterator[str]:
    """Return B of every device of these kinds, of all guests."""
    for kind in kinds:
        root = f"/local/domain/0/backend/{kind}"
        for domid in store.names(root):
            for device in store.names(f"{root}/{domid}"):
                yield f"{root}/{domid}/{device}"


def _path_in(untrusted_params: bytes | None) -> str:
    """Return the path that the node `params` of a disk names, "" for none: PATH, or FORMAT:PATH."""
    text = (untrusted_params or b"").decode("utf-8", "replace")
    return _path(text if text.startswith("/") else text.partition(":")[2])


def _path(text: str) -> str:
    """Return an absolute path without empty, `.` and `..` parts, "" for what is none. No file is looked at."""
    return os.path.normpath(f"/{text.lstrip('/')}") if text.startswith("/") else ""


def _error(store: Store, kind: Kind, domid: int, device: int) -> Callable[[], str]:
    """Return what gives the driver's own words about a device, "" without any."""

    def words() -> str:
        text = store.read(f"/local/domain/0/error/backend/{kind}/{domid}/{device}/error")
        return f": {text[:200].decode('ascii', 'replace')}" if text else ""

    return words


def rebridge(store: Store, uuid: str, domid: int, vifs: Iterable[Vif]) -> None:
    """Note the bridge that a card has moved to."""

    def steps() -> None:
        for vif in vifs:
            store.write(f"{backend_path(Kind.VIF, domid, vif.id)}/bridge", vif.bridge)
            store.write(f"{record_path(uuid, Kind.VIF, vif.id)}/bridge", vif.bridge)

    store.transaction(steps)


# Looking


def listed(store: Store, uuid: str) -> list[Place]:
    """Return the devices of our record."""
    return [
        (kind, int(device))
        for kind in Kind
        for device in store.names(f"{RECORDS}/{uuid}/{kind}")
        if device.isascii() and device.isdigit()
    ]


def leftover(store: Store, uuid: str) -> str:
    """Say what our record tells of a domain that is not there, "" when there is none."""
    record = f"{RECORDS}/{uuid}"
    value = store.read(f"{record}/domid")
    if value is None and not store.names(record):
        return ""
    whose = f"domain {int(value)}" if value and value.isdigit() else "a domain"
    return f"xenstore: {record} is left of {whose}; doctor clean=true removes it"


def is_cdrom(store: Store, domid: int, device: int) -> bool:
    """Tell whether a disk was plugged as a disc in a CD drive."""
    return store.read(f"{backend_path(Kind.VBD, domid, device)}/device-type") == b"cdrom"


def look(store: Store, uuid: str, domid: int) -> tuple[DeviceState, ...]:
    """Return what is known of each recorded device; of what the guest wrote only a number is taken."""
    return tuple(_look(store, uuid, domid, place) for place in listed(store, uuid))


def _look(store: Store, uuid: str, domid: int, place: Place) -> DeviceState:
    kind, device = place
    record = record_path(uuid, kind, device)

    def word(node: str) -> str:
        return (store.read(f"{record}/{node}") or b"").decode("ascii", "replace")

    server = word("server")
    text = word("source" if kind is Kind.VBD else "mac")
    return DeviceState(
        kind=kind,
        device=device,
        name=word("name") if kind is Kind.VBD else str(device),
        backend=_state(store.read(f"{backend_path(kind, domid, device)}/state")),
        frontend=_state(store.read(f"{frontend_path(kind, domid, device)}/state")),
        read_only=word("mode") == "r",
        detail=text if forms.printable(text) else "",
        bridge=word("bridge"),
        server=server if is_server(server) else "",
    )


def _state(untrusted_value: bytes | None) -> int:
    """Return a XenbusState, -1 for everything that is none."""
    if untrusted_value is None or len(untrusted_value) != 1 or untrusted_value not in b"012345678":
        return -1
    return untrusted_value[0] - ord("0")


# Taking away


def unplug(store: Store, uuid: str, domid: int, wanted: Iterable[Place], *, patience_s: float, force: bool) -> None:
    """Take devices from a living guest: ask it, wait for `patience_s` seconds, then give up or, with `force`, do not.

    Raise TimeoutExpiredError naming the devices that the guest did not let go; they stay until asked for again.
    """
    wanted = list(wanted)
    for place in wanted:
        _ask_to_close(store, domid, place)
    left = _unreleased(store, domid, wanted, patience_s)
    if left and not force:
        names = ", ".join(known_as(store, uuid, place) for place in left)
        nodes = ", ".join(f"{backend_path(kind, domid, device)}/state" for kind, device in left)
        raise TimeoutExpiredError(
            f"{names}: the guest did not let go within {patience_s:g} s (node {nodes} did not become {CLOSED})",
            hint="unmount it or take it down in the guest, or use force=true",
        )
    for place in left:  # without its frontend a backend closes; only after it was told to
        store.remove(frontend_path(place[0], domid, place[1]))
        _ask_to_close(store, domid, place)
    _unreleased(store, domid, left, FORCED_WAIT_S)
    remove(store, uuid, domid, wanted)


def remove(store: Store, uuid: str, domid: int, wanted: Iterable[Place]) -> None:
    """Remove devices without asking the guest, whatever state they are in; right also when some or all is gone."""
    wanted = list(wanted)
    for kind, device in wanted:
        remove_all(store, (frontend_path(kind, domid, device), backend_path(kind, domid, device)))
    for kind, device in wanted:
        _until(
            _released(kind, domid, device),
            GONE_WAIT_S,
            f"{known_as(store, uuid, (kind, device))}: the backend driver still holds the device of domain {domid}",
            f"{SYSFS}/{kind}-{domid}-{device} to go",
            "see the kernel log of dom0 (dmesg)",
        )
        remove_all(
            store,
            (f"/local/domain/0/error/backend/{kind}/{domid}/{device}", record_path(uuid, kind, device)),
        )
    _remove_empty(store, uuid, domid)


def _remove_empty(store: Store, uuid: str, domid: int) -> None:
    """Remove the nodes above devices that have none below them any more; what is not there costs no request."""
    backends, errors = "/local/domain/0/backend", "/local/domain/0/error/backend"
    for root, below in (
        (errors, f"/{domid}"),
        (f"/local/domain/{domid}/device", ""),
        (f"{RECORDS}/{uuid}", ""),
        (backends, f"/{domid}"),
    ):
        names = store.names(root)
        for kind in (kind for kind in Kind if kind in names):
            for parent in dict.fromkeys((f"{root}/{kind}{below}", f"{root}/{kind}")):
                store.remove_if_empty(parent)
    for parent in (errors, errors.rpartition("/")[0]):
        store.remove_if_empty(parent)


def remove_every(store: Store, uuid: str, domid: int) -> None:
    """Remove all devices of a domain that is about to end or has ended: those in our record and those in B.

    Also when there are none: what was above them is left by a process that was killed when they had gone.
    """
    found = {
        (kind, int(device))
        for kind in Kind
        for device in store.names(f"/local/domain/0/backend/{kind}/{domid}")
        if device.isascii() and device.isdigit()
    }
    remove(store, uuid, domid, sorted(found.union(listed(store, uuid))))


def settle(store: Store, uuid: str, domid: int) -> None:
    """Remove what an interrupted plug has left, and of devices that something else removed the rest.

    Those are devices whose backend still waits for its block device or bridge, or is no longer there in the kernel.
    """
    half = []
    for kind, device in listed(store, uuid):
        b = backend_path(kind, domid, device)
        waiting = _state(store.read(f"{b}/state")) in (-1, INITIALISING, INIT_WAIT)
        if not present(kind, domid, device) or (waiting and store.read(f"{b}/hotplug-status") != b"connected"):
            half.append((kind, device))
    if half:
        remove(store, uuid, domid, half)


def _ask_to_close(store: Store, domid: int, place: Place) -> None:
    b = backend_path(place[0], domid, place[1])

    def steps() -> None:
        state = store.read(f"{b}/state")
        if state is None:
            return
        store.write(f"{b}/online", "0")
        if _state(state) != CLOSED:
            store.write(f"{b}/state", str(CLOSING))

    store.transaction(steps)


def _unreleased(store: Store, domid: int, wanted: list[Place], patience_s: float) -> list[Place]:
    """Wait until each device is closed or gone; return those that are neither."""
    end = time.monotonic() + patience_s
    while True:
        wanted = [
            (kind, device)
            for kind, device in wanted
            if present(kind, domid, device)
            and _state(store.read(f"{backend_path(kind, domid, device)}/state")) != CLOSED
        ]
        if not wanted or time.monotonic() >= end:
            return wanted
        time.sleep(POLL_S)


def _until(
    condition: Callable[[], bool], patience_s: float, what: str, node: str, hint: str, why: Callable[[], str] = str
) -> None:
    """Wait; raise XenvmError saying what failed, and of which node nothing came."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() >= end:
            message = f"{what}{why()}; waited {patience_s:g} s for {node}"
            raise XenvmError(message, hint=hint, code=ExitCode.TIMED_OUT)
        time.sleep(POLL_S)


def _in_state(store: Store, path: str, wanted: int) -> Callable[[], bool]:
    return lambda: _state(store.read(path)) == wanted


def _there(path: str) -> Callable[[], bool]:
    return lambda: _exists(path)


def _released(kind: Kind, domid: int, device: int) -> Callable[[], bool]:
    """Tell whether a device is released; a card is when its interface is gone too, and with it the name."""
    interface = f"{INTERFACES}/vif{domid}.{device}"
    return lambda: not present(kind, domid, device) and not (kind is Kind.VIF and _exists(interface))


def _exists(path: str) -> bool:
    try:
        os.stat(path)  # noqa: PTH116 - pathlib costs 5 ms at each start
    except OSError:
        return False
    return True
