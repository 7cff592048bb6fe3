# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated kernel of dom0: backend drivers for disks and cards, loop devices, bridges, and what udev tells.

Its devices show as directories below DIRECTORY/sys, where a real kernel has them below /sys. What the drivers do is
what was seen on Xen 4.17 and 4.20, also with hostile guests.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from xenvm.simulator.loop import Loop
    from xenvm.simulator.xenstored import Watcher, Xenstored

    Place = tuple[str, int, int]

BACKENDS: Final = "/local/domain/0/backend"
KINDS: Final = ("vbd", "vif")
BRIDGE: Final = "xenbr0"
LOOP_MAJOR: Final = 7
INTERFACE: Final = re.compile(r"[A-Za-z0-9._-]{1,15}", re.ASCII)
LOOPS_LIMIT: Final = 4096
STATES: Final = frozenset({b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8"})


class Loops:
    """Loop devices: each lives as long as whoever made it, or a backend that has it open."""

    def __init__(self) -> None:
        self._images: dict[int, int] = {}
        self._users: dict[int, set[object]] = {}

    def make(self, image: int, maker: object) -> int:
        """Return the number of a new device over an open image, which is taken over."""
        number = next(one for one in range(LOOPS_LIMIT) if one not in self._images)
        self._images[number], self._users[number] = image, {maker}
        return number

    def open(self, number: int, user: object) -> bool:
        """Open a device; tell whether it is there."""
        if number not in self._images:
            return False
        self._users[number].add(user)
        return True

    def close(self, user: object) -> None:
        """Let a user have none any more; devices without one go."""
        for number, users in [*self._users.items()]:
            users.discard(user)
            if not users:
                os.close(self._images.pop(number))
                del self._users[number]

    @property
    def numbers(self) -> list[int]:
        """Those in use."""
        return sorted(self._images)


class _Device:
    """One backend device."""

    def __init__(self, frontend: str, watch: Watcher | None) -> None:
        self.frontend = frontend
        self.watch = watch
        self.opened = False


class Kernel:
    """All drivers of dom0."""

    def __init__(self, loop: Loop, store: Xenstored, directory: str, told: Callable[[int], None]) -> None:
        """Begin to watch; `told` is called with a domid when one of its backends has another state."""
        self._loop, self._store, self._directory, self._told = loop, store, directory, told
        self.loops = Loops()
        self.bridges: dict[str, str] = {}
        """Interface and the bridge it is in."""
        self._devices: dict[Place, _Device] = {}
        self._due: set[Place] = set()
        self._sequence = 0
        self._udev = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sysfs = f"{directory}/sys/bus/xen-backend/devices"
        self._net = f"{directory}/sys/class/net"
        for path in (self._sysfs, f"{directory}/sys/block", f"{self._net}/{BRIDGE}/bridge"):
            os.makedirs(path, exist_ok=True)  # noqa: PTH103
        store.watch(0, BACKENDS, self._changed)

    def _changed(self, path: str) -> None:
        """Note what is to be looked at; removals above a device mean all of them."""
        words = path.removeprefix(BACKENDS).strip("/").split("/")
        if len(words) >= 3 and words[0] in KINDS and words[1].isdigit() and words[2].isdigit():
            self._look_soon((words[0], int(words[1]), int(words[2])))
        else:
            for place in self._devices:
                self._look_soon(place)

    def _look_soon(self, place: Place) -> None:
        if not self._due:
            self._loop.soon(self._look_at_due)
        self._due.add(place)

    def _look_at_due(self) -> None:
        due, self._due = self._due, set()
        for place in due:
            self._look(place)

    def _look(self, place: Place) -> None:
        """Do what the driver does in the present state of a device."""
        kind, domid, number = place
        b = f"{BACKENDS}/{kind}/{domid}/{number}"
        state = self._store.read(0, f"{b}/state")
        front = self._store.read(0, f"{b}/frontend")
        if state is None or front is None:
            self._release(place)
            return
        frontend = front.decode("ascii", "replace")
        theirs = self._store.read(0, f"{frontend}/state")
        device = self._devices.get(place)
        if device is None:
            if state == b"1" and theirs is not None:
                self._probe(place, b, frontend)
            return
        if theirs is not None and theirs not in STATES:  # no number: xenbus takes the device away, its state stays
            self._release(place)
            return
        if kind == "vbd" and not device.opened:
            self._open(place, device, b)
        ready = device.opened if kind == "vbd" else self._store.read(0, f"{b}/hotplug-status") == b"connected"
        if state == b"2" and theirs in (b"3", b"4") and ready:
            self._set(domid, b, 4)
        elif (state == b"4" and theirs in (b"5", b"6")) or (state == b"5" and theirs in (None, b"6")):
            self._set(domid, b, 6)
            self._closed(place, b)
        elif theirs is None:
            self._release(place)
        else:
            self._told(domid)

    def _probe(self, place: Place, b: str, frontend: str) -> None:
        kind, domid, number = place
        watch = self._store.watch(0, frontend, lambda _path: self._look_soon(place))
        self._devices[place] = _Device(frontend, watch)
        os.makedirs(f"{self._sysfs}/{kind}-{domid}-{number}", exist_ok=True)  # noqa: PTH103
        if kind == "vif":
            os.makedirs(f"{self._net}/vif{domid}.{number}", exist_ok=True)  # noqa: PTH103
        self._set(domid, b, 2)

    def _open(self, place: Place, device: _Device, b: str) -> None:
        """Open the disk whose number was written; one that is none is ignored, as by blkback."""
        text = (self._store.read(0, f"{b}/physical-device") or b"").decode("ascii", "replace")
        major, _, minor = text.partition(":")
        try:
            numbers = int(major, 16), int(minor, 16)
        except ValueError:
            return
        if numbers[0] == LOOP_MAJOR and not self.loops.open(numbers[1], place):
            return
        device.opened = True
        path = f"{self._sysfs}/{place[0]}-{place[1]}-{place[2]}/physical_device"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))

    def _set(self, domid: int, b: str, state: int) -> None:
        self._store.write(0, f"{b}/state", str(state))
        self._told(domid)

    def _closed(self, place: Place, b: str) -> None:
        """Let go of a device that has closed for good: the kernel's goes, its nodes stay for who made them."""
        if self._store.read(0, f"{b}/online") != b"1":
            self._release(place)

    def _release(self, place: Place) -> None:
        device = self._devices.pop(place, None)
        if device is None:
            return
        if device.watch:
            self._store.unwatch(device.watch)
        kind, domid, number = place
        self.loops.close(place)
        directory = f"{self._sysfs}/{kind}-{domid}-{number}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/physical_device")  # noqa: PTH108
        os.rmdir(directory)  # noqa: PTH106
        if kind == "vif":
            interface = f"vif{domid}.{number}"
            self.bridges.pop(interface, None)
            os.rmdir(f"{self._net}/{interface}")  # noqa: PTH106
        self._sequence += 1
        event = f"remove backend/{kind}/{domid}/{number} {self._sequence}"
        with contextlib.suppress(OSError):  # no monitor listens, or too many events wait there already
            self._udev.sendto(event.encode("ascii"), f"{self._directory}/domid-{domid}")

    def interface(self, name: str) -> str:
        """Return the kind of an interface, "" when there is none of this name."""
        if not INTERFACE.fullmatch(name) or not os.path.isdir(f"{self._net}/{name}"):  # noqa: PTH112
            return ""
        return "bridge" if os.path.isdir(f"{self._net}/{name}/bridge") else "vif"  # noqa: PTH112
