# SPDX-License-Identifier: GPL-2.0-or-later
"""What a broker remembers of devices, which bridge a card gets, and what udev may tell it."""

import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from xenvm.boundary.devices import DISKS_LIMIT, DeviceState, DiskGrant, Kind, NicGrant, Vif
from xenvm.boundary.messages import Grants, HostPolicy, Plug
from xenvm.broker import book as module
from xenvm.broker import bridges, findings, uevents
from xenvm.broker.book import Book
from xenvm.broker.plugging import Wanted
from xenvm.broker.uevents import Uevents
from xenvm.errors import ExitCode, UsageError, XenvmError

UUID = "11111111-2222-4333-8444-555555555555"
DISK = DiskGrant(51712, "xvda", "phy", "/dev/vg/a", False, False, False, "", 0, "")
MORE = DiskGrant(51728, "xvdb", "qcow", "/home/me/b", False, False, False, "", 0, "")
DRIVE = DiskGrant(5632, "hdc", "file", "", True, True, False, "", 0, "")
DISC = DRIVE.but(path="/a.iso")
NIC = NicGrant(0, "br0", "00:16:3e:00:00:01")
SERVED = DeviceState(Kind.VBD, 51728, "xvdb", 4, 4, False, "qcow:/home/me/b", "", "4711 99")
CARD = DeviceState(Kind.VIF, 0, "0", 4, 4, False, NIC.mac, "br0", "")


def grants(disks=(DISK, DRIVE), nics=(NIC,)):
    return Grants(*(UUID, "web", "/k", "", "", 64, 64, 1, True, (), (), False, "", disks, nics, 40))


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def there(monkeypatch):
    """The names of the host's bridges."""
    names = ["br0", "dmz"]
    monkeypatch.setattr(bridges, "bridges", lambda: names)
    return names


@pytest.fixture
def ended(monkeypatch):
    texts = []
    monkeypatch.setattr(module, "end_server", lambda text: texts.append(text) if text else None)
    return texts


@pytest.fixture
def book(there, ended):
    before = descriptors()
    made = Book(HostPolicy("br0", ("dmz",)))
    yield made
    made.domain_gone(for_good=True)
    assert descriptors() == before


@pytest.fixture
def handed(tmp_path):
    """A descriptor as a client hands one over."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


# Disks and cards


def test_without_anything_added_it_is_what_the_config_says(book):
    assert book.wanted(grants()) == Wanted((DISK,), (Vif(0, "br0", NIC.mac),), {})


def test_what_was_added_comes_back_with_the_next_domain(book, handed):
    wanted = book.plug(Plug(1, (MORE,), ()), grants(), [handed])
    assert (wanted.disks, dict(wanted.handed)) == ((MORE,), {MORE.device: handed})
    book.added(wanted)
    card = book.plug(Plug(1, (), (NicGrant(3, "dmz", "00:16:3e:00:00:03"),)), grants(), [])
    book.added(card)
    again = book.wanted(grants())
    assert again.disks == (DISK, MORE)
    assert again.vifs == (Vif(0, "br0", NIC.mac), Vif(3, "dmz", "00:16:3e:00:00:03"))
    held = again.handed[MORE.device]
    assert held != handed  # a copy of its own
    assert os.path.sameopenfile(held, handed)


@pytest.fixture
def open_to_all(there, ended, tmp_path):
    """A book whose policy opens a directory, and that directory."""
    made = Book(HostPolicy("br0", (), (str(tmp_path),)))
    yield made, tmp_path
    made.domain_gone(for_good=True)


def test_a_file_of_a_directory_of_the_policy_is_opened_here(open_to_all):
    book, directory = open_to_all
    (directory / "a.img").write_bytes(b"a" * 512)
    for read_only, access in ((True, os.O_RDONLY), (False, os.O_RDWR)):
        opened = []
        shown = MORE.but(read_only=read_only, path="/etc/shadow")
        wanted = book.plug(Plug(1, (shown,), (), 0, "a.img"), grants(), opened)
        assert wanted.disks == (shown.but(path=f"{directory}/a.img"),)
        assert wanted.handed[MORE.device] == opened[0]
        assert os.path.samestat(os.fstat(opened[0]), (directory / "a.img").stat())
        assert fcntl.fcntl(opened[0], fcntl.F_GETFL) & os.O_ACCMODE == access
        os.close(opened[0])


def test_a_file_of_no_such_directory_is_not_opened(open_to_all, handed):
    book, directory = open_to_all
    (directory / "link").symlink_to("/etc/passwd")
    before = descriptors()
    for number, name, message in (
        (1, "a.img", "no such directory"),
        (0, "none", "none: cannot open it: No such file"),
        (0, "link", "link: cannot open it"),
    ):
        with pytest.raises(XenvmError, match=message):
            book.plug(Plug(1, (MORE,), (), number, name), grants(), [])
    with pytest.raises(UsageError, match="one device is added at a time"):
        book.plug(Plug(1, (MORE,), (), 0, "link"), grants(), [handed])
    assert descriptors() == before


def test_what_was_taken_away_again_does_not(book, handed):
    book.added(book.plug(Plug(1, (MORE,), ()), grants(), [handed]))
    book.removed(Kind.VBD, MORE.device)
    book.removed(Kind.VBD, MORE.device)
    assert book.wanted(grants()).disks == (DISK,)


def test_a_disk_of_the_config_that_was_taken_away_is_there_again_next_time(book):
    book.removed(Kind.VBD, DISK.device)
    assert book.wanted(grants()).disks == (DISK,)


def test_a_disc_takes_the_place_of_the_drives(book, handed):
    book.added(book.plug(Plug(1, (DISC,), ()), grants(), [handed]))
    assert book.wanted(grants()).disks == (DISK, DISC)
    book.added(book.plug(Plug(1, (DISC.but(path="/b.iso"),), ()), grants(), [handed]))
    assert [disk.path for disk in book.wanted(grants()).disks] == ["/dev/vg/a", "/b.iso"]


def test_the_end_of_the_domain_forgets_what_was_added(book, handed):
    book.added(book.plug(Plug(1, (MORE,), ()), grants(), [handed]))
    book.domain_gone(for_good=False)
    assert book.wanted(grants()).disks == (DISK, MORE)
    book.domain_gone(for_good=True)
    assert book.wanted(grants()) == Wanted((DISK,), (Vif(0, "br0", NIC.mac),), {})


@pytest.mark.parametrize(
    ("plug", "count"),
    [
        (Plug(1, (), ()), 0),
        (Plug(1, (MORE,), (NIC,)), 1),
        (Plug(1, (MORE,), ()), 0),
        (Plug(1, (), (NIC,)), 1),
    ],
)
def test_one_device_at_a_time_a_disk_with_its_descriptor(book, handed, plug, count):
    with pytest.raises(UsageError, match="one device is added at a time"):
        book.plug(plug, grants(), [handed] * count)


def test_no_key_file_comes_from_a_supervisor(book, handed):
    """It would be opened by the broker, with the broker's authority."""
    with pytest.raises(UsageError, match="encrypted disk cannot be added"):
        book.plug(Plug(1, (MORE.but(cipher="aes", key_file="/etc/shadow", key_size_bits=64),), ()), grants(), [handed])


@pytest.mark.parametrize(("name", "number"), [("sda", 2048), ("hda", 768), ("xvda1", 51713)])
def test_a_letter_is_one_disk_to_a_linux_guest(book, handed, name, number):
    with pytest.raises(UsageError, match=f"disk {name} is the same disk in the guest as xvda"):
        book.plug(Plug(1, (MORE.but(device=number, name=name),), ()), grants(), [handed])


def test_a_guest_has_so_many_disks_at_most(book, handed):
    many = tuple(DISK.but(device=1 << 28 | number << 8, name=f"d{number}p0") for number in range(20, 20 + DISKS_LIMIT))
    with pytest.raises(UsageError, match="the guest has 64 disks"):
        book.plug(Plug(1, (DISK,), ()), grants(many), [handed])
    book.plug(Plug(1, (many[5],), ()), grants(many), [handed])  # a place that was counted already
    book.plug(Plug(1, (DISK,), ()), grants(many[1:]), [handed])


def test_disks_that_only_the_domain_knows_count_too(book, handed):
    book.seen((DeviceState(Kind.VBD, 2048, "sda", 4, 4, False, "phy:/dev/a", "", ""),))
    with pytest.raises(UsageError, match="the same disk in the guest as 2048"):
        book.plug(Plug(1, (DISK,), ()), grants(()), [handed])


def test_an_address_twice_is_refused(book):
    with pytest.raises(UsageError, match=f"network card 1: card 0 has the address {NIC.mac}"):
        book.plug(Plug(1, (), (NIC.but(id=1),)), grants(), [])
    assert book.plug(Plug(1, (), (NIC,)), grants(), []).vifs[0].mac == NIC.mac


# Servers of images


def test_the_servers_of_a_domain_end_with_it(book, ended):
    book.seen((SERVED, CARD))
    assert book.known == {(Kind.VBD, 51728), (Kind.VIF, 0)}
    book.domain_gone(for_good=False)
    assert (ended, book.known) == (["4711 99"], set())
    book.domain_gone(for_good=True)
    assert ended == ["4711 99"]


def test_the_server_of_a_disk_that_was_taken_away_ends(book, ended):
    book.seen((SERVED,))
    book.removed(Kind.VIF, 51728)
    assert ended == []
    book.removed(Kind.VBD, 51728)
    book.removed(Kind.VBD, 51728)
    assert ended == ["4711 99"]


def test_the_server_of_a_disk_that_something_else_took_away_ends(book, ended):
    """It would keep the lock on its image, and doctor would take it for one in use."""
    book.seen((SERVED,))
    book.seen((SERVED, CARD))
    assert ended == []
    book.seen((CARD,))
    assert (ended, book.servers) == (["4711 99"], frozenset())


def test_a_card_stays_where_it_was_moved_over_the_guests_own_reboot(book):
    book.moved(Vif(0, "dmz", "00:00:00:00:00:00"), (SERVED, CARD))
    assert book.wanted(grants()).vifs == (Vif(0, "dmz", NIC.mac),)
    book.domain_gone(for_good=False)
    assert book.wanted(grants()).vifs == (Vif(0, "dmz", NIC.mac),)
    book.domain_gone(for_good=True)
    assert book.wanted(grants()).vifs == (Vif(0, "br0", NIC.mac),)


def test_the_server_of_the_disc_before_ends(book, ended, handed):
    book.seen((SERVED.but(device=DISC.device),))
    book.added(book.plug(Plug(1, (DISC.but(type="qcow"),), ()), grants(), [handed]))
    assert ended == ["4711 99"]


# Bridges


@pytest.mark.parametrize(
    ("names", "bridge", "default", "chosen"),
    [
        (["br0"], "", "", "br0"),
        (["br0", "dmz"], "", "dmz", "dmz"),
        (["br0", "dmz"], "br0", "dmz", "br0"),
        (["br0"], "br0", "", "br0"),
    ],
)
def test_the_bridge_of_a_card(monkeypatch, names, bridge, default, chosen):
    monkeypatch.setattr(bridges, "bridges", lambda: names)
    assert bridges.choose([NIC.but(bridge=bridge)], default) == (Vif(0, chosen, NIC.mac),)


@pytest.mark.parametrize(
    ("names", "bridge", "default", "text", "hint"),
    [
        ([], "", "", "network card 0: this host has no bridge", "ip link add br0 type bridge"),
        ([], "br1", "", "network card 0: there is no bridge br1; this host has no bridge at all", "ip link add br1"),
        (["br0", "dmz"], "", "", "several bridges, br0, dmz", "bridge=NAME, or the default in /etc/xenvm/policy.toml"),
        (["br0", "dmz"], "br1", "", "there is no bridge br1; this host has br0, dmz", "ip link add br1 type bridge"),
        (["br0"], "", "dmz", "there is no bridge dmz; this host has br0", "ip link add dmz type bridge"),
    ],
)
def test_no_bridge_for_a_card(monkeypatch, names, bridge, default, text, hint):
    monkeypatch.setattr(bridges, "bridges", lambda: names)
    with pytest.raises(XenvmError, match=text) as caught:
        bridges.choose([NIC.but(bridge=bridge)], default)
    assert hint in caught.value.hint


def test_no_card_needs_no_bridge(monkeypatch):
    monkeypatch.setattr(bridges, "bridges", list)
    assert bridges.choose([], "") == ()


@pytest.mark.parametrize(
    ("policy", "names", "bridge", "given"),
    [
        (HostPolicy("", ()), ["br0", "dmz"], "br0", "br0"),  # a nic line of the config has it
        (HostPolicy("", ()), ["br0", "dmz"], "dmz", None),
        (HostPolicy("", ("dmz",)), ["br0", "dmz"], "dmz", "dmz"),
        (HostPolicy("dmz", ()), ["br0", "dmz"], "dmz", "dmz"),
        (HostPolicy("dmz", ()), ["br0", "dmz"], "", "dmz"),
        (HostPolicy("", ()), ["dmz"], "dmz", "dmz"),  # there is nothing to choose from
        (HostPolicy("", ()), ["dmz"], "", "dmz"),
    ],
)
def test_which_bridges_a_running_guest_may_be_given(there, ended, policy, names, bridge, given):
    there[:] = names
    book, nic = Book(policy), NicGrant(1, bridge, "00:16:3e:00:00:02")
    if given:
        assert book.bridged(nic, grants()).bridge == given
        return
    with pytest.raises(XenvmError, match="the bridge dmz is not open to this VM") as caught:
        book.plug(Plug(1, (), (nic,)), grants(), [])
    assert caught.value.code is ExitCode.PERMISSION_REFUSED
    assert "policy.toml" in caught.value.hint


# Events


@pytest.fixture
def events():
    before = descriptors()
    with tempfile.TemporaryDirectory() as directory:
        made = Uevents(directory)
        yield made, Path(directory)
        made.follow(-1)
        assert list(Path(directory).iterdir()) == []
    assert descriptors() == before


def send(directory, *messages, domid=7):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        for message in messages:
            sender.sendto(message, str(directory / f"domid-{domid}"))


def test_the_socket_is_named_by_the_domid_and_for_root_alone(events):
    made, directory = events
    assert made.fileno() == -1
    assert made.removed() is False
    for domid in (7, 7, 8):
        made.follow(domid)
        (path,) = directory.iterdir()
        assert path.name == f"domid-{domid}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    made.follow(-1)
    assert made.fileno() == -1


def test_what_another_monitor_left_is_replaced(events):
    made, directory = events
    (directory / "domid-7").write_text("")
    made.follow(7)
    send(directory, b"remove backend/vbd/7/51712 123")
    assert made.removed() is True
    assert made.removed() is False


@pytest.mark.parametrize(
    "event",
    [
        b"remove backend/vbd/8/51712 1",  # of another guest
        b"online backend/vif/7/0 1",
        b"offline backend/vif/7/0 1",
        b"add backend/vbd/7/51712 1",
        b"remove backend/qdisk/7/51712 1",
        b"remove backend/vbd/7/51712",
        b"remove backend/vbd/7/51712 x",
        b"remove backend/vbd/07/51712 1",
        b"remove backend/vbd/7/../8/1 1",
        b"remove backend/vbd/7/51712 1\n",
        b"remove backend/vbd/7/51712 1\0",
        "remove backend/vbd/\u0667/51712 1".encode(),
        b"remove backend/vbd/7/9999999999 1",
        b"",
        b"\0" * 200,
        b"x" * 100_000,
        b"remove backend/vbd/7/51712 1" + b" " * 200,
    ],
)
def test_anything_else_says_nothing(events, event):
    made, directory = events
    made.follow(7)
    send(directory, event)
    assert made.removed() is False


def test_a_removal_among_nonsense_is_heard(events):
    made, directory = events
    made.follow(7)
    send(directory, b"x", b"remove backend/vif/7/3 1", b"remove backend/vbd/8/1 1")
    assert made.removed() is True
    assert made.removed() is False


def test_a_flood_ends_with_the_queue_and_keeps_nobody(events):
    """The sender is told that the queue is full, and each turn of the broker takes a bounded number."""
    made, directory = events
    made.follow(7)
    with pytest.raises(BlockingIOError):
        send(directory, *[b"remove backend/vbd/7/51712 1"] * 100_000)
    turns = 0
    while made.removed():
        turns += 1
    assert 1 <= turns < 100


def test_the_truth_is_in_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(uevents, "DEVICES", str(tmp_path))
    known = {(Kind.VBD, 51712), (Kind.VIF, 0)}
    assert uevents.gone((), 7) is False
    assert uevents.gone(known, 7) is True
    for name in ("vbd-7-51712", "vif-7-0"):
        (tmp_path / name).mkdir()
    assert uevents.gone(known, 7) is False
    assert uevents.gone(known, 8) is True


# What is wrong with the host


def test_what_a_host_lacks_is_named_with_its_remedy(monkeypatch, tmp_path):
    rules, helper = tmp_path / "rules", tmp_path / "hotplug"
    monkeypatch.setattr(findings, "RULE_DIRECTORIES", (str(rules),))
    monkeypatch.setattr(findings, "HELPER", str(helper))
    monkeypatch.setattr(findings, "MODULES", ("none_of_this_name",))
    assert any("no rule 60-xenvm.rules; scripts/install-host" in text for text in findings.of_host())
    rules.mkdir()
    (rules / findings.RULES).write_text("")
    assert any(str(helper) in text and "install-host" in text for text in findings.of_host())
    helper.write_text("")
    found = findings.of_host()
    assert not any("install-host" in text for text in found)
    assert any(text.startswith("modules not loaded: none_of_this_name") for text in found)
