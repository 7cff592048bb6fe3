# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of a hostile guest: whatever it writes where it may, a look is decodable and a removal takes exactly ours."""

import tempfile
from pathlib import Path
from unittest import mock

from backends import Kernel, Manner, Memory
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm.boundary.devices import DeviceState, Vbd, Vif
from xenvm.boundary.frames import decode, encode
from xenvm.boundary.messages import NO_DOMAIN, Done
from xenvm.errors import TimeoutExpiredError
from xenvm.helpers import devices

UUID = "11111111-2222-4333-8444-555555555555"
DISKS = [Vbd(51712 + 16 * n, f"xvd{'abc'[n]}", n == 2, n == 2, False, f"phy:/dev/{n}", 253, n, "") for n in range(3)]
CARDS = [Vif(n, "br0", f"00:16:3e:00:00:0{n}") for n in range(2)]
PLACES = devices.places(DISKS, CARDS)
FRONTS = [devices.frontend_path(kind, 7, device) for kind, device in PLACES]
NODES = ["", "/state", "/backend", "/backend-id", "/mac", "/ring-ref", "/event-channel", "/new", "/state/below"]
VALUES = st.one_of(
    st.sampled_from(
        [
            *(b"%d" % number for number in range(-1, 10)),
            *(b"", b"99", b"4\0", b" 4", b"\xff\xfe", b"x" * 4096, "\u0664".encode()),
            *(b"/local/domain/0/backend/vbd/8/51712", b"/xenvm", b"../../0/backend", b"0", b"8"),
        ]
    ),
    st.binary(max_size=64),
)
WRITES = st.lists(
    st.tuples(
        st.sampled_from([*FRONTS, "/local/domain/8/device/vbd/51712", "/local/domain/0/backend/vbd/7/51712", "/xenvm"]),
        st.sampled_from(NODES),
        st.none() | VALUES,  # None: the node and all below it is removed
    ),
    max_size=30,
)
MANNERS = st.sampled_from([manner for manner in Manner if manner is not Manner.STUCK])


class World:
    """Our guest with five devices, another one with one, and the kernel."""

    def __init__(self, directory):
        self.store = Memory()
        self.kernel = Kernel(self.store, directory)
        for domid in (7, 8):
            self.store.make(f"/local/domain/{domid}")
            self.store.permissions(f"/local/domain/{domid}", "n0", f"r{domid}")
        self.store.write("/local/domain/0/backend/vbd/8/51712/frontend", "/local/domain/8/device/vbd/51712")
        self.store.write("/local/domain/0/backend/vbd/8/51712/state", "4")
        self.store.write("/local/domain/8/device/vbd/51712/state", "4")
        self.store.permissions("/local/domain/8/device/vbd/51712", "n8", "r0")
        self.kernel.directory("vbd", 8, 51712).mkdir()

    def plug(self):
        devices.write(self.store, UUID, 7, DISKS, CARDS)
        devices.connect(self.store, UUID, 7, DISKS, CARDS)

    def abuse(self, writes):
        for root, node, value in writes:
            path = root + node
            if value is not None:
                self.store.guest_writes(7, path, value)
            elif self.store.entries.get(path, ("",))[0] == "n7":
                self.store.remove(path)

    def of_others(self):
        return {path: value for path, value in self.store.nodes.items() if "/8" in path}

    def left(self):
        return [path for kind, device in PLACES for path in self.store.below(devices.backend_path(kind, 7, device))] + [
            path
            for kind, device in PLACES
            for place in (devices.frontend_path(kind, 7, device), devices.record_path(UUID, kind, device))
            for path in self.store.below(place)
        ]


def world(test):
    """Run a test in a world of its own whose clock only waiting moves."""

    def run(*arguments):
        with tempfile.TemporaryDirectory() as directory:
            made = World(Path(directory))
            with mock.patch.multiple(devices, SYSFS=directory, time=made.kernel):
                test(made, *arguments)

    return run


@settings(deadline=None)
@given(st.none() | st.binary(max_size=4097))
def test_a_state_is_one_of_the_nine_or_none(untrusted):
    state = devices._state(untrusted)
    assert state == (int(untrusted) if untrusted in [b"%d" % number for number in range(9)] else -1)


@settings(deadline=None, max_examples=60)
@given(WRITES)
def test_a_look_at_a_hostile_guest_passes_every_check(writes):
    @world
    def run(made):
        made.plug()
        made.abuse(writes)
        found = devices.look(made.store, UUID, 7)
        assert [(state.kind, state.device) for state in found] == PLACES
        assert decode(encode(Done(0, NO_DOMAIN, "", found))).devices == found
        for state, disk in zip(found, DISKS, strict=False):
            assert (state.name, state.detail, state.read_only) == (disk.name, disk.source, disk.read_only)
        assert all(DeviceState.from_body(state.as_body()) == state for state in found)

    run()


@settings(deadline=None, max_examples=80)
@given(WRITES, st.lists(MANNERS, min_size=5, max_size=5), st.booleans())
def test_a_domains_end_removes_exactly_its_devices(writes, manners, dead):
    """Whether it is still there or xenstored has removed what it owned: in time, and nothing of anybody else."""

    @world
    def run(made):
        made.plug()
        for (kind, device), manner in zip(PLACES, manners, strict=True):
            made.kernel.manners[str(kind), "7", str(device)] = manner
            made.kernel.connect((str(kind), "7", str(device)))
        made.abuse(writes)
        others = made.of_others()
        if dead:
            made.store.remove("/local/domain/7")
        made.kernel.slept = 0.0
        devices.remove_every(made.store, UUID, 7)
        assert made.left() == []
        assert made.of_others() == others
        assert made.kernel.devices() == ["vbd-8-51712"]
        assert made.kernel.slept < 1

    run()


@settings(deadline=None, max_examples=80)
@given(WRITES, MANNERS, st.sampled_from(PLACES), st.booleans())
def test_a_device_taken_away_is_gone_or_still_whole(writes, manner, place, force):
    @world
    def run(made):
        made.plug()
        kind, device = place
        made.kernel.manners[str(kind), "7", str(device)] = manner
        for each in PLACES:
            made.kernel.connect((str(each[0]), "7", str(each[1])))
        made.abuse(writes)
        others, made.kernel.slept = made.of_others(), 0.0
        try:
            devices.unplug(made.store, UUID, 7, [place], patience_s=5.0, force=force)
        except TimeoutExpiredError:
            assert not force
            assert devices.listed(made.store, UUID) == PLACES
        else:
            assert devices.listed(made.store, UUID) == [other for other in PLACES if other != place]
            assert not made.store.below(devices.backend_path(kind, 7, device))
            assert not made.kernel.directory(kind, 7, device).exists()
        assert made.kernel.slept < 5 + devices.FORCED_WAIT_S + 1
        assert made.of_others() == others

    run()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 160), st.booleans())
def test_a_plug_that_stops_anywhere_is_undone_by_the_next_look(stop, connects):
    """A worker may be killed between any two requests; what it had begun goes, and the whole stays."""

    class KilledError(Exception):
        pass

    @world
    def run(made):
        store = made.store
        devices.write(store, UUID, 7, DISKS[:1], ())
        devices.connect(store, UUID, 7, DISKS[:1], ())
        made.kernel.connect(("vbd", "7", str(DISKS[0].device)))
        left, write = [stop], store.write

        def dying(path, value):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            write(path, value)

        store.write = dying
        try:
            devices.write(store, UUID, 7, DISKS[1:], CARDS)
            devices.connect(store, UUID, 7, DISKS[1:], CARDS)
        except KilledError:
            pass
        store.write = write
        if connects:
            for kind, device in PLACES:
                if store.read(f"{devices.backend_path(kind, 7, device)}/hotplug-status") == b"connected":
                    made.kernel.connect((str(kind), "7", str(device)))
        devices.settle(store, UUID, 7)
        kept = devices.listed(store, UUID)
        assert PLACES[0] in kept
        for kind, device in PLACES:
            b = devices.backend_path(kind, 7, device)
            whole = store.read(f"{b}/hotplug-status") == b"connected"
            assert whole == ((kind, device) in kept)
            assert whole == bool(store.below(b)) == bool(store.below(devices.frontend_path(kind, 7, device)))
            assert whole == made.kernel.directory(kind, 7, device).exists()

    run()
