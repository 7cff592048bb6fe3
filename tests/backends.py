# SPDX-License-Identifier: GPL-2.0-or-later
"""A xenstore in memory with the kernel's backend drivers beside it, for tests of helpers/devices.py.

What the drivers do in each case is what was seen on Xen 4.17 and 4.20; time is a number that sleeping raises.
"""

from enum import StrEnum

from xenvm.helpers.store import StoreError


class Manner(StrEnum):
    """How a backend takes it when it is asked to close."""

    POLITE = "closes at once"
    LATE = "closes after a while"
    UNCONNECTED = "closes when its frontend has gone after that, as of a guest that never connected"
    GARBAGE = "went away when the guest wrote garbage, and its state stays 4"
    ENDED = "has closed with its guest and still holds the device"
    DEAF = "goes with its nodes only"
    STUCK = "does not go at all"
    ABSENT = "was taken away by something else"


class Memory:
    """Store's interface over a dictionary; `node -> value`, and `node -> permissions`, which children inherit."""

    def __init__(self):
        self.nodes, self.entries = {"/": b""}, {"/": ("n0",)}
        self.kernel = None
        self.denied = set()
        self._inside = False

    # what Store has

    def read(self, path):
        return self.nodes.get(path)

    def write(self, path, value):
        if path in self.denied:
            raise StoreError(f"xenstore write {path}: EACCES")
        self._make_parents(path)
        self._set(path, value.encode("ascii"))
        self._look()

    def make(self, path):
        if path not in self.nodes:
            self._make_parents(path)
            self._set(path, b"")

    def remove(self, path):
        if path in self.denied:
            raise StoreError(f"xenstore rm {path}: EACCES")
        for node in [node for node in self.nodes if node == path or node.startswith(path + "/")]:
            del self.nodes[node], self.entries[node]
        self._look()

    def names(self, path):
        inside = [node[len(path) + 1 :] for node in self.nodes if node.startswith(path + "/")]
        return [name for name in inside if "/" not in name]

    def remove_if_empty(self, path):
        if path in self.nodes and not self.names(path):
            self.remove(path)

    def permissions(self, path, *entries):
        assert path in self.nodes
        self.entries[path] = entries

    def transaction(self, steps):
        before = dict(self.nodes), dict(self.entries)
        self._inside = True
        try:
            steps()
        except BaseException:
            self.nodes, self.entries = before
            raise
        finally:
            self._inside = False
        self._look()

    # and for tests

    def below(self, path):
        """Return what is at and below a path, by the rest of it."""
        return {
            node[len(path) :]: value
            for node, value in self.nodes.items()
            if node == path or node.startswith(path + "/")
        }

    def guest_writes(self, domid, path, value):
        """Let a guest write where it may, which is in its own nodes."""
        if self.entries.get(path, self.entries.get(path.rpartition("/")[0], ()))[:1] == (f"n{domid}",):
            self._set(path, value)
            self._look()
            return True
        return False

    def _make_parents(self, path):
        parent = path.rpartition("/")[0] or "/"
        if parent not in self.nodes:
            self._make_parents(parent)
            self._set(parent, b"")

    def _set(self, path, value):
        if path not in self.nodes:
            self.entries[path] = self.entries[path.rpartition("/")[0] or "/"]
        self.nodes[path] = value

    def _look(self):
        if self.kernel and not self._inside:
            self.kernel.look()


class Kernel:
    """blkback and netback: their devices are directories in `sysfs`, as those of /sys/bus/xen-backend/devices."""

    def __init__(self, memory, sysfs, *, answers=True, opens=True):
        self.memory, self.sysfs = memory, sysfs
        self.answers, self.opens = answers, opens
        self.manners, self.now_s, self.closing, self.slept = {}, 1000.0, {}, 0.0
        self.let_go_s = 0.0  # after the nodes have gone
        self._leaving = {}
        memory.kernel = self

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds
        self.slept += seconds
        assert self.slept < 10000, "this wait never ends"
        self.look()

    def directory(self, kind, domid, device):
        return self.sysfs / f"{kind}-{domid}-{device}"

    def devices(self):
        return sorted(path.name for path in self.sysfs.iterdir())

    def look(self):
        memory, root = self.memory, "/local/domain/0/backend"
        there = {
            (kind, domid, device)
            for kind in ("vbd", "vif")
            for domid in memory.names(f"{root}/{kind}")
            for device in memory.names(f"{root}/{kind}/{domid}")
        }
        for place in there:
            self._serve(place, f"{root}/{'/'.join(place)}")
        for path in self.sysfs.iterdir():
            place = tuple(path.name.split("-"))
            if place not in there and self.manners.get(place) is not Manner.STUCK:
                since = self._leaving.setdefault(place, self.now_s)
                if self.now_s >= since + self.let_go_s:
                    self._remove(place)

    def _serve(self, place, b):
        memory, manner = self.memory, self.manners.get(place, Manner.POLITE)
        state, directory = memory.read(f"{b}/state"), self.directory(*place)
        front = memory.read(f"{b}/frontend")
        frontend_there = front is not None and front.decode() in memory.nodes
        if state == b"1" and frontend_there and self.answers and manner is not Manner.ABSENT:
            directory.mkdir(exist_ok=True)
            memory.nodes[f"{b}/state"] = b"2"
            return
        if memory.read(f"{b}/physical-device") and self.opens and directory.exists():
            (directory / "physical_device").touch()
        if state != b"5" or not directory.exists():
            return
        since = self.closing.setdefault(place, self.now_s)
        if (
            manner is Manner.POLITE
            or (manner is Manner.LATE and self.now_s >= since + 3)
            or (manner is Manner.UNCONNECTED and not frontend_there)
        ):
            memory.nodes[f"{b}/state"] = b"6"

    def connect(self, place):
        """The guest's driver takes the device, or the guest does what its manner says."""
        b, manner = f"/local/domain/0/backend/{'/'.join(place)}", self.manners.get(place)
        state = {Manner.UNCONNECTED: b"2", Manner.ENDED: b"6"}.get(manner, b"4")
        if f"{b}/state" in self.memory.nodes:
            self.memory.nodes[f"{b}/state"] = state
        if manner in (Manner.GARBAGE, Manner.ABSENT):
            self._remove(place)

    def _remove(self, place):
        directory = self.directory(*place)
        if directory.exists():
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
        self._leaving.pop(place, None)
