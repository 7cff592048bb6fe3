# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's part of plugging, its workers played by the test: in which order, and that nothing stays open."""

import gc
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest
from children import FakeChild

from xenvm.boundary.devices import DISKS_LIMIT, NICS_LIMIT, DeviceState, DiskGrant, Kind, Vif
from xenvm.boundary.frames import BODY_LIMIT_BYTES, encode
from xenvm.boundary.images import Progress
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Done,
    Failed,
    Fault,
    Grants,
    HostPolicy,
    Job,
    Op,
    Parsed,
    Ready,
)
from xenvm.boundary.privileges import Role
from xenvm.boundary.processors import CpuidRule
from xenvm.boundary.workers import Connect, Decrypt, Join, Serve, Served
from xenvm.broker import aliases, disks, plugging
from xenvm.broker.plugging import Plugging, Wanted
from xenvm.errors import BusyError, ExitCode, ProtocolError, XenvmError

UUID = "11111111-2222-4333-8444-555555555555"
NUMBER = os.makedev(7, 63)
PHY = DiskGrant(51712, "xvda", "phy", "/dev/vg/a", False, False, False, "", 0, "")
FILE = DiskGrant(51728, "xvdb", "file", "/b.img", False, False, False, "", 0, "")
IMAGE = DiskGrant(51744, "xvdc", "qcow", "/c.qcow2", True, False, False, "", 0, "")
CARD = Vif(0, "br0", "00:16:3e:00:00:01")
FAILURE = Failed(0, Fault(7, "it does not work", "look into it"), NO_DOMAIN)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


class Bench:
    """Disks that open as what `sources` says, and the texts of servers that were ended."""

    def __init__(self, path):
        self.path = path
        self.block, self.key = path / "block", path / "key"
        os.mknod(self.block, 0o600 | stat.S_IFBLK, NUMBER)
        self.key.write_bytes(b"k" * 64)
        self.crypt = PHY.but(
            device=51760, name="xvdd", cipher="aes-xts-plain64", key_size_bits=256, key_file=str(self.key)
        )
        self.refuse, self.ended, self.opened = {}, [], []
        self.made = []

    def a_block(self):
        return os.open(self.block, os.O_PATH)  # of no driver: it can be looked at, not used

    def open_disk(self, grant, handed=-1):
        self.opened.append((grant.name, handed >= 0))
        if handed >= 0:
            os.close(handed)
        if grant.name in self.refuse:
            raise self.refuse[grant.name]
        return self.a_block() if grant.type == "phy" else os.open(self.key, os.O_RDONLY)

    def loop(self, _grant, image):
        os.close(image)
        return self.a_block()

    def plug(self, *grants, vifs=(), handed=None, begin=True):
        made = Plugging(UUID, 2, Wanted(grants, vifs, handed or {}), 30)
        self.made.append(made)
        if begin:
            made.begin(7)
        return made

    def worker(self, role):
        (child,) = [child for child in FakeChild.made if child.role is role and child.pidfd >= 0]
        return child

    def request(self, role):
        """Return what a worker was asked and how many descriptors came along."""
        message, came = self.worker(role).there.receive(deadline_s=5)
        for descriptor in came:
            os.close(descriptor)
        return message, len(came)

    def answer(self, made, role, message, came=()):
        child = self.worker(role)
        child.there.send(message, came)
        for descriptor in came:
            os.close(descriptor)
        received, taken = child.channel.receive(deadline_s=5)
        made.take(child, received, taken)

    def give(self, made, role=Role.STORAGE):
        self.answer(made, role, Done(0, NO_DOMAIN, "/dev/x"), [self.a_block()])


@pytest.fixture
def directory():
    """A short path: the address of a unix socket has room for 107 bytes."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture
def bench(directory, monkeypatch):
    FakeChild.made = []
    gc.collect()  # what other tests have dropped closes its descriptors now, and not while these are counted
    before = descriptors()
    made = Bench(directory)
    monkeypatch.setattr(plugging, "Child", FakeChild)
    monkeypatch.setattr(plugging, "RUN_DIRECTORY", str(directory))
    monkeypatch.setattr(plugging, "server_text", lambda pid: f"{pid} 99")
    monkeypatch.setattr(plugging, "end_server", made.ended.append)
    monkeypatch.setattr(disks, "open_disk", made.open_disk)
    monkeypatch.setattr(disks, "loop", made.loop)
    yield made
    for each in made.made:
        each.close(succeeded=False)
        each.close(succeeded=False)
        assert each.children == []
    for child in FakeChild.made:
        assert child.pidfd < 0, f"the {child.role} worker was not ended"
        child.there.close()
    assert descriptors() == before
    assert [path.name for path in directory.iterdir() if path.name.startswith("image-")] == []


# What is done in which order


def test_a_block_device_is_ready_at_once(bench):
    made = bench.plug(PHY, begin=False)
    assert (made.ready, bench.opened) == (None, [])
    (planned,) = made.planned
    assert (planned.device, planned.source, planned.major, planned.minor) == (51712, "phy:/dev/vg/a", -1, -1)
    made.begin(7)
    assert made.ready == (planned.but(major=7, minor=63, names=(str(bench.block),)),)
    assert made.children == []


def test_the_names_of_a_disk_are_those_of_what_was_opened_for_it(bench):
    """Not of the loop device over it; what a client calls what it hands over is no name of it."""
    (vbd,) = bench.plug(FILE).ready
    assert vbd.names == (str(bench.key),)
    (vbd,) = bench.plug(FILE.but(path="/\u00e4")).ready
    assert vbd.names == (str(bench.key), "/\u00e4")
    ours = os.open(bench.key, os.O_RDONLY)
    (vbd,) = bench.plug(FILE.but(path="/\u00e4"), handed={FILE.device: ours}).ready
    os.close(ours)
    assert vbd.names == (str(bench.key),)


def test_the_names_of_all_disks_have_room_in_a_frame(bench, monkeypatch):
    monkeypatch.setattr(aliases.os, "readlink", lambda _path: "/" + "\U0001f600" * 90)
    grants = tuple(PHY.but(device=1 << 28 | n << 8, name=f"d{n}p0", path="/" + '"' * 4000) for n in range(DISKS_LIMIT))
    made = bench.plug(*grants)
    named = [vbd for vbd in made.ready if vbd.names]
    assert 2 < len(named) < 5
    encode(Ready(tuple(vbd.but(server="4194304 99999999999") for vbd in made.ready)))


def test_a_file_becomes_a_loop_device(bench):
    (vbd,) = bench.plug(FILE).ready
    assert (vbd.source, vbd.major, vbd.minor) == ("file:/b.img", 7, 63)


def test_a_file_that_is_a_block_device_needs_no_loop(bench, monkeypatch):
    monkeypatch.setattr(disks, "open_disk", lambda _grant, _handed=-1: bench.a_block())
    monkeypatch.setattr(disks, "loop", None)
    assert bench.plug(FILE).ready[0].minor == 63


def test_the_worker_for_cards_starts_early_and_hears_the_domain_late(bench):
    made = bench.plug(PHY, vifs=(CARD,), begin=False)
    network = bench.worker(Role.NETWORK)
    assert made.children == [network]
    with pytest.raises(BlockingIOError):
        network.there.receive_now()
    made.begin(9)
    assert bench.request(Role.NETWORK) == (Join(9, (CARD,), 30), 0)
    assert made.ready is None
    bench.answer(made, Role.NETWORK, Done(0, NO_DOMAIN, ""))
    assert made.ready[0].minor == 63
    assert network.killed


def test_an_image_goes_through_two_workers(bench):
    """Served by one without privilege, made a block device by one that never sees the image."""
    made = bench.plug(IMAGE)
    assert bench.request(Role.IMAGE) == (Serve("qcow", True, f"xenvm-{UUID}-51744"), 3)
    assert made.ready is None
    bench.answer(made, Role.IMAGE, Served(1 << 20, 0x46D, 4711))
    assert bench.request(Role.STORAGE) == (Connect(1 << 20, 0x46D, True, f"xenvm-{UUID}-51744"), 1)
    assert made.ready is None
    bench.give(made)
    assert [(vbd.server, vbd.minor) for vbd in made.ready] == [("4711 99", 63)]
    made.close(succeeded=True)
    assert bench.ended == []  # it goes on, for the guest


def test_what_the_storage_worker_gets_is_connected_to_what_serves(bench):
    made = bench.plug(IMAGE)
    message, (image, listening, connected) = bench.worker(Role.IMAGE).there.receive(deadline_s=5)
    assert message.format == "qcow"
    bench.answer(made, Role.IMAGE, Served(512, 0, 4711))
    _, (client,) = bench.worker(Role.STORAGE).there.receive(deadline_s=5)
    with socket.socket(fileno=listening) as listener, socket.socket(fileno=client) as ours:
        server, _ = listener.accept()
        with server:
            server.send(b"hello")
            assert ours.recv(5) == b"hello"
    for descriptor in (image, connected):
        os.close(descriptor)


def test_an_encrypted_disk_goes_through_one_worker(bench):
    made = bench.plug(bench.crypt)
    name = f"xenvm-{UUID}-51760"
    assert bench.request(Role.STORAGE) == (Decrypt(name, "aes-xts-plain64", 256, False), 2)
    bench.give(made)
    assert made.ready[0].minor == 63


def test_an_encrypted_image_is_never_asked_for_but_would_be_served_first(bench):
    made = bench.plug(bench.crypt.but(type="qcow"))
    bench.answer(made, Role.IMAGE, Served(512, 0, 4711))
    bench.give(made)
    assert isinstance(bench.request(Role.STORAGE)[0], Decrypt)
    bench.give(made)
    assert made.ready


def test_several_disks_are_opened_side_by_side(bench):
    made = bench.plug(PHY, IMAGE, bench.crypt, FILE, vifs=(CARD,))
    assert [name for name, _ in bench.opened] == ["xvda", "xvdc", "xvdd", "xvdb"]
    assert {child.role for child in made.children} == {Role.NETWORK, Role.IMAGE, Role.STORAGE}
    bench.give(made)
    bench.answer(made, Role.NETWORK, Done(0, NO_DOMAIN, ""))
    bench.answer(made, Role.IMAGE, Served(512, 0, 4711))
    assert made.ready is None
    bench.give(made)
    assert [vbd.name for vbd in made.ready] == ["xvda", "xvdc", "xvdd", "xvdb"]


def test_a_disk_that_was_handed_over_is_not_opened_by_path(bench):
    ours = os.open(bench.key, os.O_RDONLY)
    bench.plug(FILE, handed={FILE.device: ours})
    assert bench.opened == [("xvdb", True)]
    os.close(ours)  # it is still open: what was handed over stays the caller's


def test_one_that_was_handed_over_and_never_needed_is_closed(bench):
    ours = os.open(bench.key, os.O_RDONLY)
    bench.plug(FILE, handed={FILE.device: ours}, begin=False)
    os.close(ours)


@pytest.mark.parametrize(
    ("path", "source"),
    [("/a\u00e4\n\x7fb", "phy:/a???b"), ("/" + "x" * 4000, "phy:/" + "x" * (plugging.SOURCE_LIMIT - 5))],
)
def test_a_path_is_shown_as_xenstore_takes_it(bench, path, source):
    (vbd,) = bench.plug(PHY.but(path=path)).planned
    assert vbd.source == source
    assert type(vbd).from_body(vbd.as_body()) == vbd


def test_a_job_with_every_disk_and_card_there_may_be_fits_into_a_frame(bench):
    """Else it could not be sent: the grants take half of a frame at most, since the config's answer repeats them."""
    grants = tuple(PHY.but(device=1 << 28 | n << 8, name=f"d{n}p0", path="/" + "x" * 4000) for n in range(DISKS_LIMIT))
    cards = tuple(Vif(n, "b" * 15, "00:16:3e:00:00:01") for n in range(NICS_LIMIT))
    planned = bench.plug(*grants, begin=False).planned
    granted = Grants(*(UUID, "web", "/k", "", "", 64, 64, 1, True, (), (), False, "", (), (), 40))
    granted = granted.but(cpuid=tuple(CpuidRule(n, -1, ("1" * 32,) * 4) for n in range(140)))
    assert len(encode(Parsed((), (granted,), (), HostPolicy("", ()), {}, (), False))) > BODY_LIMIT_BYTES // 3
    encode(Job(Op.REBUILD, UUID, 7, granted, planned, cards))
    states = tuple(
        DeviceState(Kind.VBD, vbd.device, vbd.name, 4, 4, False, vbd.source, "", "4194304 99999999999")
        for vbd in planned
    ) + tuple(DeviceState(Kind.VIF, vif.id, "0", 4, 4, False, vif.mac, vif.bridge, "") for vif in cards)
    encode(Done(0, NO_DOMAIN, "", states))


def test_what_everything_waits_for(bench):
    """By device and process; what is ready is not among it."""
    made = bench.plug(PHY, IMAGE, bench.crypt, vifs=(CARD,))
    image, storage, network = (bench.worker(role).pid for role in (Role.IMAGE, Role.STORAGE, Role.NETWORK))
    said = [
        f"disk xvdc (qcow:/c.qcow2): no answer of the image worker (process {image})",
        f"disk xvdd (phy:/dev/vg/a): no answer of the storage worker (process {storage})",
        f"network card 0 (bridge br0): no answer of the network worker (process {network})",
    ]
    assert made.late.split("; ") == said
    bench.answer(made, Role.NETWORK, Done(0, NO_DOMAIN, ""))
    bench.give(made)
    assert made.late == said[0]
    made.close(succeeded=False)
    assert made.late == ""


# What goes wrong


def test_a_domain_begins_once(bench):
    made = bench.plug(PHY)
    with pytest.raises(ProtocolError, match="once"):
        made.begin(8)


def test_one_disk_that_cannot_be_opened_fails_the_job(bench):
    bench.refuse["xvdb"] = BusyError("disk xvdb: /b.img is in use")
    made = bench.plug(PHY, FILE, IMAGE, vifs=(CARD,), begin=False)
    with pytest.raises(BusyError, match="xvdb"):
        made.begin(7)
    assert [name for name, _ in bench.opened] == ["xvda", "xvdb"]


@pytest.mark.parametrize(
    ("grant", "role", "label"),
    [(IMAGE, Role.IMAGE, "disk xvdc: /c.qcow2: "), (None, Role.STORAGE, "disk xvdd: /dev/vg/a: ")],
)
def test_a_worker_that_fails_names_its_disk(bench, grant, role, label):
    made = bench.plug(PHY, grant or bench.crypt)
    with pytest.raises(XenvmError) as caught:
        bench.answer(made, role, FAILURE)
    assert (caught.value.message, caught.value.hint) == (f"{label}it does not work", "look into it")
    assert caught.value.code is ExitCode.TIMED_OUT
    made.close(succeeded=False)
    assert bench.ended == []


def test_the_second_worker_of_an_image_fails(bench):
    """Its server has been started already: it must not stay."""
    made = bench.plug(IMAGE)
    bench.answer(made, Role.IMAGE, Served(512, 0, 4711))
    with pytest.raises(XenvmError, match=r"disk xvdc: /c\.qcow2: it does not work"):
        bench.answer(made, Role.STORAGE, FAILURE)
    made.close(succeeded=False)
    assert bench.ended == ["4711 99"]


def test_another_disk_fails_when_an_image_is_served_already(bench):
    made = bench.plug(IMAGE, bench.crypt)
    child = next(each for each in made.children if each.role is Role.STORAGE)
    bench.answer(made, Role.IMAGE, Served(512, 0, 4711))
    with pytest.raises(XenvmError, match="xvdd"):
        made.take(child, FAILURE, [])
    made.close(succeeded=False)
    assert bench.ended == ["4711 99"]


def test_the_card_fails(bench):
    made = bench.plug(PHY, vifs=(CARD,))
    with pytest.raises(XenvmError, match="^it does not work$"):
        bench.answer(made, Role.NETWORK, FAILURE)


@pytest.mark.parametrize("role", [Role.NETWORK, Role.IMAGE, Role.STORAGE])
def test_a_worker_that_dies_is_named(bench, role):
    made = bench.plug(IMAGE, bench.crypt, vifs=(CARD,))
    child = bench.worker(role)
    child.die()
    with pytest.raises(XenvmError, match=f"the {role} worker ended with status 0 without an answer"):
        made.gone(child)


@pytest.mark.parametrize("role", [Role.NETWORK, Role.IMAGE, Role.STORAGE])
def test_a_worker_that_has_died_before_it_was_asked_is_heard_later(bench, monkeypatch, role):
    """What it said of its reason still lies in the channel."""

    class Dying(FakeChild):
        def __init__(self, kind, *rest):
            super().__init__(kind, *rest)
            if kind is role:
                self.there.send(FAILURE)
                self.die()

    monkeypatch.setattr(plugging, "Child", Dying)
    made = bench.plug(IMAGE if role is Role.IMAGE else bench.crypt, vifs=(CARD,))
    child = bench.worker(role)
    message, taken = child.channel.receive(deadline_s=5)
    with pytest.raises(XenvmError, match="it does not work"):
        made.take(child, message, taken)


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (Role.NETWORK, Progress(0, "x")),
        (Role.IMAGE, Progress(0, "x")),
        (Role.IMAGE, Done(0, NO_DOMAIN, "")),
        (Role.STORAGE, Progress(0, "x")),
        (Role.STORAGE, Done(0, NO_DOMAIN, "")),  # without the device
        (Role.STORAGE, Served(512, 0, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_worker_that_answers_something_else(bench, role, message):
    made = bench.plug(IMAGE if role is Role.IMAGE else bench.crypt, vifs=(CARD,))
    with pytest.raises(ProtocolError):
        bench.answer(made, role, message)


@pytest.mark.parametrize("role", [Role.NETWORK, Role.IMAGE, Role.STORAGE])
def test_a_descriptor_that_nobody_asked_for_is_closed(bench, role):
    """A hijacked worker cannot fill the broker with descriptors."""
    made = bench.plug(IMAGE if role is Role.IMAGE else bench.crypt, vifs=(CARD,))
    before = descriptors()
    junk = os.open(bench.key, os.O_RDONLY)
    try:
        bench.answer(made, role, Done(0, NO_DOMAIN, ""), [junk])
    except ProtocolError:
        assert role is not Role.NETWORK
    made.close(succeeded=False)
    assert descriptors() < before


def test_a_key_file_that_cannot_be_read_is_named(bench):
    gone = bench.crypt.but(key_file=f"{bench.path}/none")
    with pytest.raises(XenvmError, match=r"disk xvdd: key-file .*/none: No such file"):
        bench.plug(gone)


def test_a_directory_for_sockets_that_is_not_there_is_no_end_of_the_monitor(bench, monkeypatch):
    monkeypatch.setattr(plugging, "RUN_DIRECTORY", f"{bench.path}/none")
    with pytest.raises(XenvmError, match="disk xvdc: cannot make the socket .*/none/image-"):
        bench.plug(IMAGE)


def test_a_socket_that_an_earlier_monitor_left_is_no_hindrance(bench):
    (bench.path / f"image-{UUID}-51744").write_text("")
    bench.plug(IMAGE)


def test_the_socket_was_for_root_alone_while_it_had_a_name(bench, monkeypatch):
    modes, unlink = [], os.unlink

    def looked_at(path):
        if os.path.lexists(path):
            modes.append(stat.S_IMODE(os.lstat(path).st_mode))
        unlink(path)

    monkeypatch.setattr(plugging.os, "unlink", looked_at)
    bench.plug(IMAGE)
    assert modes == [0o600]


def test_ended_in_the_middle_of_everything(bench):
    """As by destroy: whatever each disk waits for."""
    for step in range(4):
        made = bench.plug(PHY, IMAGE, vifs=(CARD,), begin=step > 0)
        if step > 1:
            bench.answer(made, Role.IMAGE, Served(512, 0, 4711))
        if step > 2:
            bench.give(made)
        made.close(succeeded=False)
        assert made.children == []
    assert bench.ended == ["4711 99"] * 2
