# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices in xenstore, against a xenstore in memory and backends that behave like the kernel's in each known case."""

import pytest
from backends import Kernel, Manner, Memory

from xenvm.boundary.devices import DeviceState, Kind, Vbd, Vif
from xenvm.config.keys import find
from xenvm.errors import BusyError, ExitCode, TimeoutExpiredError, XenvmError
from xenvm.helpers import devices
from xenvm.helpers.store import StoreError

UUID = "11111111-2222-4333-8444-555555555555"
DISK = Vbd(51712, "xvda", False, False, False, "phy:/dev/vg/a", 253, 5, "")
CD = Vbd(51728, "xvdb", True, True, False, "file:/a.iso", 7, 11, "")
CARD = Vif(0, "br0", "00:16:3e:00:00:01")
B, F = "/local/domain/0/backend/vbd/7/51712", "/local/domain/7/device/vbd/51712"
VIF_B, VIF_F = "/local/domain/0/backend/vif/7/0", "/local/domain/7/device/vif/0"
RECORD = f"/xenvm/{UUID}"
PLACES = [(Kind.VBD, 51712), (Kind.VBD, 51728), (Kind.VIF, 0)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A xenstore with backends, a guest of somebody else beside ours, and a clock that only waiting moves."""
    made = Memory()
    kernel = Kernel(made, tmp_path)
    monkeypatch.setattr(devices, "SYSFS", str(tmp_path))
    monkeypatch.setattr(devices, "time", kernel)
    for domid in (7, 8):
        made.make(f"/local/domain/{domid}")
        made.permissions(f"/local/domain/{domid}", "n0", f"r{domid}")
    made.write("/local/domain/0/backend/vbd/8/51712/frontend", "/local/domain/8/device/vbd/51712")
    made.write("/local/domain/0/backend/vbd/8/51712/physical-device", "7:63")
    made.write("/local/domain/0/backend/vbd/8/51712/mode", "w")
    made.write("/local/domain/8/device/vbd/51712/state", "4")
    kernel.directory("vbd", 8, 51712).mkdir()
    return made


def plugged(store, vbds=(DISK, CD), vifs=(CARD,)):
    devices.write(store, UUID, 7, vbds, vifs)
    devices.connect(store, UUID, 7, vbds, vifs)
    return store


def of_others(store):
    return {path: value for path, value in store.nodes.items() if "/8" in path}


def ours(store):
    """What is left of our guest's devices; the roots of its nodes and its record go with the domain."""
    roots = {"/local/domain/7", "/local/domain/7/device", "/xenvm", RECORD}
    parts = ("/backend/vbd/7", "/backend/vif/7", "/local/domain/7", RECORD, "/local/domain/0/error")
    return [path for path in store.nodes if path not in roots and any(part in path for part in parts)]


# Plugging


def test_the_nodes_of_a_disk(store):
    devices.write(store, UUID, 7, (DISK,), ())
    assert store.below(F) == {
        "": b"",
        "/backend": B.encode(),
        "/backend-id": b"0",
        "/state": b"1",
        "/virtual-device": b"51712",
        "/device-type": b"disk",
        "/trusted": b"1",
        "/protocol": b"x86_64-abi",
    }
    assert store.below(B) == {
        "": b"",
        "/frontend": F.encode(),
        "/params": b"phy:/dev/vg/a",
        "/script": devices.SCRIPT.encode(),
        "/frontend-id": b"7",
        "/online": b"1",
        "/removable": b"0",
        "/bootable": b"1",
        "/state": b"2",  # written as 1; the backend driver has taken it
        "/dev": b"xvda",
        "/type": b"phy",
        "/mode": b"w",
        "/device-type": b"disk",
        "/discard-enable": b"1",
        "/specification": b"xen",
    }
    assert store.below(f"{RECORD}/vbd/51712") == {
        "": b"",
        "/domid": b"7",
        "/name": b"xvda",
        "/source": b"phy:/dev/vg/a",
        "/mode": b"w",
        "/server": b"",
    }


def test_the_nodes_of_a_cd(store):
    devices.write(store, UUID, 7, (CD,), ())
    back, front = store.below(f"{B[:-5]}51728"), store.below(f"{F[:-5]}51728")
    assert (back["/mode"], back["/device-type"], back["/removable"], back["/discard-enable"]) == (
        b"r",
        b"cdrom",
        b"1",
        b"0",
    )
    assert front["/device-type"] == b"cdrom"


def test_the_nodes_of_a_card(store):
    devices.write(store, UUID, 7, (), (CARD,))
    assert store.below(VIF_F) == {
        "": b"",
        "/backend": VIF_B.encode(),
        "/backend-id": b"0",
        "/state": b"1",
        "/handle": b"0",
        "/mac": b"00:16:3e:00:00:01",
        "/trusted": b"1",
    }
    assert store.below(VIF_B) == {
        "": b"",
        "/frontend": VIF_F.encode(),
        "/script": devices.SCRIPT.encode(),
        "/mac": b"00:16:3e:00:00:01",
        "/bridge": b"br0",
        "/handle": b"0",
        "/type": b"vif",
        "/frontend-id": b"7",
        "/online": b"1",
        "/state": b"2",
        "/hotplug-status": b"",
    }


def test_who_may_write_what(store):
    """The guest its own directory and nothing else; the record is dom0's, and no guest reads it."""
    plugged(store)
    for kind, device in PLACES:
        front, back = devices.frontend_path(kind, 7, device), devices.backend_path(kind, 7, device)
        assert {store.entries[front + rest] for rest in store.below(front)} == {("n7", "r0")}
        assert {store.entries[back + rest] for rest in store.below(back)} == {("n0", "r7")}
        record = devices.record_path(UUID, kind, device)
        assert {store.entries[record + rest] for rest in store.below(record)} == {("n0",)}
    for parent in ("/local/domain/0/backend/vbd/7", "/local/domain/0/backend/vbd", "/xenvm", RECORD):
        assert store.entries[parent] == ("n0",)


def test_a_disk_is_connected_by_the_number_of_the_open_device(store):
    plugged(store)
    assert store.read(f"{B}/physical-device") == b"fd:5"
    assert store.read(f"{B}/physical-device-path") == b"phy:/dev/vg/a"
    assert store.read(f"{B}/hotplug-status") == b"connected"
    assert store.read(f"{VIF_B}/hotplug-status") == b"connected"
    assert store.kernel.directory("vbd", 7, 51712).joinpath("physical_device").exists()


def test_the_server_of_an_image_is_in_the_record_before_the_backend_has_the_disk(store, monkeypatch):
    served = DISK.but(source="qcow:/a.qcow2", server="4711 998877")
    devices.write(store, UUID, 7, (DISK.but(source="qcow:/a.qcow2", major=-1, minor=-1),), ())
    written = []
    write = store.write
    monkeypatch.setattr(store, "write", lambda path, value: (written.append(path), write(path, value)))
    devices.connect(store, UUID, 7, (served,), ())
    assert written[:3] == [f"{RECORD}/vbd/51712/server", f"{B}/physical-device-path", f"{B}/physical-device"]
    assert devices.look(store, UUID, 7)[0].server == "4711 998877"


def test_a_device_that_is_there_already_changes_nothing(store):
    plugged(store)
    before = dict(store.nodes)
    with pytest.raises(BusyError, match="network card 0: the guest has such a device already"):
        devices.write(store, UUID, 7, (DISK.but(device=51744),), (CARD,))
    assert store.nodes == before


def test_what_an_earlier_device_left_in_its_place_is_gone(store):
    for path in (f"{F}/ring-ref", f"{RECORD}/vbd/51712/junk", f"{B}/sectors"):
        store.write(path, "8")
    devices.write(store, UUID, 7, (DISK,), ())
    assert not {f"{F}/ring-ref", f"{RECORD}/vbd/51712/junk", f"{B}/sectors"} & set(store.nodes)


def test_a_backend_driver_that_is_not_loaded_is_named(store):
    store.kernel.answers = False
    for vbds, vifs, module in (((DISK,), (), "xen-blkback"), ((), (CARD,), "xen-netback")):
        devices.write(store, UUID, 7, vbds, vifs)
        with pytest.raises(
            XenvmError, match=r"(disk xvda|network card 0): .* waited 10 s for node /local/.*/state to be 2$"
        ) as caught:
            devices.connect(store, UUID, 7, vbds, vifs)
        assert caught.value.code is ExitCode.TIMED_OUT
        assert module in caught.value.hint


def test_a_block_device_that_is_not_opened_is_named_with_the_drivers_own_words(store):
    store.kernel.opens = False
    devices.write(store, UUID, 7, (DISK,), ())
    sleep = store.kernel.sleep

    def complain(seconds):
        sleep(seconds)
        store.write("/local/domain/0/error/backend/vbd/7/51712/error", "6 xen_vbd_create: no such device")

    store.kernel.sleep = complain
    with pytest.raises(XenvmError, match=r"disk xvda: .* did not open phy:/dev/vg/a: 6 xen_vbd_create") as caught:
        devices.connect(store, UUID, 7, (DISK,), ())
    assert caught.value.code is ExitCode.TIMED_OUT
    said = f"waited 10 s for {devices.SYSFS}/vbd-7-51712/physical_device to be there, after node {B}/physical-device"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("mode", "read_only", "share", "refused"),
    [
        ("w", False, False, True),
        ("w", True, False, True),
        ("r", False, False, True),
        ("r", True, False, False),
        ("w", False, True, False),
    ],
)
def test_a_block_device_of_another_guest(store, mode, read_only, share, refused):
    """Refused when either side may write, whoever started that guest; share=true says that it is meant."""
    store.write("/local/domain/0/backend/vbd/8/51712/physical-device", "fd:5")
    store.write("/local/domain/0/backend/vbd/8/51712/mode", mode)
    wanted = DISK.but(read_only=read_only, share=share)
    devices.write(store, UUID, 7, (wanted,), ())
    if refused:
        with pytest.raises(BusyError, match="disk xvda: phy:/dev/vg/a is in use by domain 8"):
            devices.connect(store, UUID, 7, (wanted,), ())
        assert store.read(f"{B}/physical-device") is None
    else:
        devices.connect(store, UUID, 7, (wanted,), ())


@pytest.mark.parametrize(
    ("kind", "params", "refused"),
    [
        ("qdisk", b"qcow2:/srv/a.qcow2", True),
        ("qdisk", b"aio:/srv/../srv//a.qcow2", True),
        ("qdisk", b"aio:/link", True),
        ("qdisk", "raw:/\u00e4".encode(), True),
        ("vbd", b"/srv/a.qcow2", True),
        ("vbd", b"qcow:/srv/a.qcow2", True),
        ("qdisk", b"aio:/srv/a.qcow", False),
        ("qdisk", b"aio:srv/a.qcow2", False),
        ("qdisk", b"aio:", False),
        ("qdisk", b"", False),
        ("qdisk", b"\xff:\0/\xff", False),
    ],
)
def test_an_image_that_another_guest_has_under_one_of_its_names(store, kind, params, refused):
    """As xl writes them: of what its QEMU serves there is no block device, and no lock."""
    b = f"/local/domain/0/backend/{kind}/8/51728"
    store.write(f"{b}/mode", "w")
    store.nodes[f"{b}/params"], store.entries[f"{b}/params"] = params, ("n0",)
    wanted = DISK.but(source="qcow:/srv/a.qcow2", names=("/link", "/\u00e4"))
    devices.write(store, UUID, 7, (wanted,), ())
    if refused:
        with pytest.raises(BusyError, match=rf"disk xvda: qcow:/srv/a.qcow2 is in use by domain 8 \(node {b}\)"):
            devices.connect(store, UUID, 7, (wanted,), ())
        shared = wanted.but(share=True)
        devices.remove(store, UUID, 7, devices.places((wanted,), ()))
        plugged(store, (shared,), ())
    else:
        devices.connect(store, UUID, 7, (wanted,), ())


def test_an_image_that_two_only_read_is_no_clash(store):
    b = "/local/domain/0/backend/qdisk/8/51728"
    store.write(f"{b}/mode", "r")
    store.write(f"{b}/params", "aio:/a.iso")
    plugged(store, (CD,), ())
    store.write(f"{b}/mode", "w")
    devices.remove(store, UUID, 7, devices.places((CD,), ()))
    devices.write(store, UUID, 7, (CD,), ())
    with pytest.raises(BusyError, match="is in use by domain 8"):
        devices.connect(store, UUID, 7, (CD,), ())


def test_a_disk_without_a_path_is_like_no_other(store):
    store.write("/local/domain/0/backend/qdisk/8/51728/params", "aio:")
    plugged(store, (DISK.but(source="file:handed over"),), ())


def test_one_block_device_twice_in_one_guest(store):
    twice = (DISK, DISK.but(device=51728, name="xvdb"))
    plugged(store, (DISK,), ())
    devices.write(store, UUID, 7, twice[1:], ())
    with pytest.raises(BusyError, match="disk xvdb: .* is in use by domain 7"):
        devices.connect(store, UUID, 7, twice[1:], ())


def test_whether_the_guest_has_taken_a_device(store):
    plugged(store)
    assert devices.connected(store, 7, (DISK,), (CARD,)) is False
    assert store.kernel.slept == pytest.approx(devices.FRONTEND_WAIT_S, abs=0.1)
    for place in (("vbd", "7", "51712"), ("vif", "7", "0")):
        store.kernel.connect(place)
    before = store.kernel.slept
    assert devices.connected(store, 7, (DISK,), (CARD,)) is True
    assert store.kernel.slept == before


def test_a_card_moves_in_record_and_backend(store):
    plugged(store)
    devices.rebridge(store, UUID, 7, (CARD.but(bridge="dmz"),))
    assert store.read(f"{VIF_B}/bridge") == store.read(f"{RECORD}/vif/0/bridge") == b"dmz"
    assert devices.look(store, UUID, 7)[2].bridge == "dmz"


# Looking


def test_a_look_shows_what_was_plugged(store):
    plugged(store)
    store.kernel.connect(("vbd", "7", "51712"))
    store.guest_writes(7, f"{F}/state", b"4")
    assert devices.look(store, UUID, 7) == (
        DeviceState(Kind.VBD, 51712, "xvda", 4, 4, False, "phy:/dev/vg/a", "", ""),
        DeviceState(Kind.VBD, 51728, "xvdb", 2, 1, True, "file:/a.iso", "", ""),
        DeviceState(Kind.VIF, 0, "0", 2, 1, False, "00:16:3e:00:00:01", "br0", ""),
    )


def test_a_look_without_anything(store):
    assert devices.look(store, UUID, 7) == ()


@pytest.mark.parametrize(
    "value", [b"", b"9", b"44", b"-1", b" 4", b"4\n", b"\xff", b"\0", b"4" * 4096, "\u0664".encode()]
)
def test_a_state_that_is_none(store, value):
    plugged(store)
    assert store.guest_writes(7, f"{F}/state", value)
    state = devices.look(store, UUID, 7)[0]
    assert state.frontend == -1
    assert DeviceState.from_body(state.as_body()) == state


@pytest.mark.parametrize("value", range(9))
def test_every_state_there_is(store, value):
    plugged(store)
    store.guest_writes(7, f"{F}/state", b"%d" % value)
    assert devices.look(store, UUID, 7)[0].frontend == value


def test_what_is_no_device_in_the_record_is_passed_over(store):
    for name in ("x", "-1", "\u0664", "51712x"):
        store.nodes[f"{RECORD}/vbd/{name}"] = b""
    assert devices.listed(store, UUID) == []


# Taking away

ENDINGS = {
    # manner: seconds that a removal with 10 s of patience may take, whether the guest keeps the device without force
    Manner.POLITE: (0.1, False),
    Manner.LATE: (3.1, False),
    Manner.UNCONNECTED: (10.1, True),
    Manner.GARBAGE: (0.1, False),
    Manner.ENDED: (0.1, False),
    Manner.DEAF: (11.6, True),
    Manner.ABSENT: (0.1, False),
}


@pytest.mark.parametrize("manner", ENDINGS)
@pytest.mark.parametrize("force", [True, False], ids=["force", "asking"])
@pytest.mark.parametrize("place", [(Kind.VBD, 51712), (Kind.VIF, 0)], ids=["vbd", "vif"])
def test_one_device_is_taken_away(store, manner, force, place):
    plugged(store)
    kernel, others = store.kernel, of_others(store)
    name = (str(place[0]), "7", str(place[1]))
    kernel.manners[name] = manner
    for other in PLACES:
        kernel.connect((str(other[0]), "7", str(other[1])))
    limit_s, keeps = ENDINGS[manner]
    kernel.slept = 0.0
    if keeps and not force:
        named = "disk xvda" if place[0] is Kind.VBD else "network card 0"
        with pytest.raises(TimeoutExpiredError, match=rf"^{named}: .* within 10 s \(node .*/state did") as caught:
            devices.unplug(store, UUID, 7, [place], patience_s=10.0, force=False)
        assert "force=true" in caught.value.hint
        assert place in devices.listed(store, UUID)
        assert kernel.slept <= 10.1
        return
    devices.unplug(store, UUID, 7, [place], patience_s=10.0, force=force)
    assert kernel.slept <= limit_s
    assert not kernel.directory(*name).exists()
    for path in (devices.backend_path, devices.frontend_path):
        assert not store.below(path(place[0], 7, place[1]))
    assert not store.below(devices.record_path(UUID, *place))
    assert devices.listed(store, UUID) == [other for other in PLACES if other != place]
    assert of_others(store) == others
    assert "vbd-8-51712" in kernel.devices()


def test_a_guest_that_kept_a_device_can_let_go_of_it_later(store):
    plugged(store)
    store.kernel.manners["vbd", "7", "51712"] = Manner.DEAF
    store.kernel.connect(("vbd", "7", "51712"))
    with pytest.raises(TimeoutExpiredError):
        devices.unplug(store, UUID, 7, [PLACES[0]], patience_s=2.0, force=False)
    assert (store.read(f"{B}/online"), store.read(f"{B}/state")) == (b"0", b"5")
    store.kernel.manners["vbd", "7", "51712"] = Manner.POLITE
    devices.unplug(store, UUID, 7, [PLACES[0]], patience_s=2.0, force=False)
    assert devices.listed(store, UUID) == PLACES[1:]


def test_several_devices_are_asked_together(store):
    plugged(store)
    for kind, device in PLACES:
        store.kernel.manners[str(kind), "7", str(device)] = Manner.LATE
        store.kernel.connect((str(kind), "7", str(device)))
    store.kernel.slept = 0.0
    devices.unplug(store, UUID, 7, iter(PLACES), patience_s=10.0, force=False)
    assert store.kernel.slept < 4
    assert ours(store) == []


def test_the_wait_for_the_kernel_to_let_go(store):
    """Nodes first, then the device directory; only then may whoever holds disk or interface end."""
    plugged(store)
    store.kernel.let_go_s = 4.0
    devices.remove(store, UUID, 7, PLACES)
    assert 4.0 <= store.kernel.slept < 4.5
    assert store.kernel.devices() == ["vbd-8-51712"]


def test_a_device_that_the_kernel_never_lets_go_is_an_error_and_stays_recorded(store):
    plugged(store)
    store.kernel.manners["vbd", "7", "51712"] = Manner.STUCK
    with pytest.raises(XenvmError, match="disk xvda: the backend driver still holds the device of domain 7") as caught:
        devices.remove(store, UUID, 7, PLACES)
    assert caught.value.code is ExitCode.TIMED_OUT
    assert caught.value.message.endswith(f"waited 40 s for {devices.SYSFS}/vbd-7-51712 to go")
    assert PLACES[0] in devices.listed(store, UUID)
    store.kernel.manners.clear()
    devices.remove(store, UUID, 7, PLACES)
    assert devices.listed(store, UUID) == []


def test_all_of_a_domain_goes_also_what_the_record_has_lost(store):
    plugged(store)
    others = of_others(store)
    store.remove(f"{RECORD}/vbd/51712")
    for kind, device in PLACES:
        store.write(f"/local/domain/0/error/backend/{kind}/7/{device}/error", "22 saw state 99 at frontend")
    devices.remove_every(store, UUID, 7)
    assert ours(store) == []
    assert of_others(store) == others
    assert store.kernel.devices() == ["vbd-8-51712"]
    devices.remove_every(store, UUID, 7)


def test_a_dead_domain_whose_frontends_xenstored_has_removed(store):
    plugged(store)
    store.remove("/local/domain/7")
    devices.remove_every(store, UUID, 7)
    assert ours(store) == []


def test_the_backend_path_of_the_frontend_is_never_followed(store):
    """What the guest writes about its backend decides nothing: somebody else's stays, its own goes."""
    plugged(store)
    others = of_others(store)
    assert store.guest_writes(7, f"{F}/backend", b"/local/domain/0/backend/vbd/8/51712")
    assert store.guest_writes(7, f"{F}/backend-id", b"8")
    devices.unplug(store, UUID, 7, [PLACES[0]], patience_s=1.0, force=True)
    assert of_others(store) == others
    assert not store.below(B)


def test_one_node_that_cannot_be_removed_does_not_keep_the_other(store):
    plugged(store)
    store.denied = {F}
    with pytest.raises(StoreError, match="EACCES"):
        devices.remove(store, UUID, 7, [PLACES[0]])
    assert not store.below(B)


# What an interrupted plug has left


def test_settling_leaves_what_is_whole(store):
    plugged(store)
    for kind, device in PLACES[:2]:
        store.kernel.connect((str(kind), "7", str(device)))
    devices.settle(store, UUID, 7)
    assert devices.listed(store, UUID) == PLACES


@pytest.mark.parametrize("step", ["nodes", "half", "removed elsewhere", "record only"])
def test_settling_removes_what_is_not(store, step):
    plugged(store, (DISK,), ())
    store.kernel.connect(("vbd", "7", "51712"))
    others = of_others(store)
    if step in ("nodes", "half"):
        devices.write(store, UUID, 7, (CD,), (CARD,))
        if step == "half":
            store.write(f"{B[:-5]}51728/physical-device", "7:b")
    elif step == "removed elsewhere":
        plugged(store, (CD,), (CARD,))
        for name in ("vbd/7/51728", "vif/7/0"):
            store.remove(f"/local/domain/0/backend/{name}")
            store.remove(f"/local/domain/7/device/{name.replace('/7', '')}")
    else:
        store.write(f"{RECORD}/vbd/51728/domid", "7")
    devices.settle(store, UUID, 7)
    assert devices.listed(store, UUID) == [PLACES[0]]
    assert of_others(store) == others
    assert sorted(store.kernel.devices()) == ["vbd-7-51712", "vbd-8-51712"]


@pytest.mark.parametrize("left", ["/local/domain/0/backend/vif/7", "/local/domain/7/device/vbd", f"{RECORD}/vif"])
def test_what_was_above_devices_goes_when_they_were_removed_and_nothing_more(store, left):
    """By a process that was killed just then: the record names no device, and yet something of them is there."""
    plugged(store)
    devices.remove_every(store, UUID, 7)
    store.make(left)
    devices.remove_every(store, UUID, 7)
    assert ours(store) == []


def test_the_reference_page_names_every_wait():
    text = find("device-timeout").help
    assert f"{devices.BACKEND_WAIT_S:g} seconds for a backend driver to take a new device" in text
    assert f"{devices.BACKEND_WAIT_S:g} for it to open a disk" in text
    assert f"{devices.FORCED_WAIT_S:g} seconds, after `force=true`, for it to close" in text
    assert f"{devices.GONE_WAIT_S:g} seconds for it to let go" in text
    assert f"wait {devices.FRONTEND_WAIT_S:g} seconds for the guest to connect" in text
