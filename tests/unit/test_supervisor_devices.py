# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about devices: from parameters to requests, and from what the broker says to words."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm.boundary.devices import NICS_LIMIT, DeviceState, DiskGrant, Kind, NicGrant
from xenvm.boundary.frames import decode, encode
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Ask,
    Domain,
    DomainState,
    Done,
    Init,
    Op,
    Phase,
    Plug,
    Policy,
    Rebridge,
    Unplug,
)
from xenvm.errors import ExitCode, UsageError, WrongStateError, XenvmError
from xenvm.model import derived_mac
from xenvm.supervisor import commands, devices
from xenvm.supervisor.devices import COMMANDS, STATES, answer, request

UUID = "11111111-2222-4333-8444-555555555555"
INIT = Init(
    *(UUID, "web", "/etc/a.cfg", 64, 1, False, True, os.getpid(), 10, 11),
    *(Policy("started", "destroy", "reboot", "destroy", 60, 25), ("/srv/discs", "/srv/images"), {}),
)
RUNNING = Domain(7, DomainState.RUNNING, Phase.BUILT, -1, 65536, 1, 5)
DISK = DeviceState(Kind.VBD, 51712, "xvda", 4, 4, False, "phy:/dev/vg/a", "", "")
DISC = DeviceState(Kind.VBD, 51728, "xvdb", 2, 1, True, "file:/a.iso", "", "")
CARD = DeviceState(Kind.VIF, 0, "0", 5, -1, False, "00:16:3e:00:00:01", "br0", "")
GOOD = {
    "disk-list": {},
    "disk-add": {"device": "xvdb"},
    "disk-del": {"device": "xvdb"},
    "cd-insert": {"device": "hdc"},
    "cd-eject": {"device": "hdc"},
    "nic-list": {},
    "nic-add": {},
    "nic-del": {"id": "1"},
    "nic-network-switch": {"id": "1", "bridge": "br1"},
    "doctor": {},
    "trigger": {"params": "nmi"},
    "get-acpi-state": {},
}


def asked(name, taken=(), alive=True, **params):
    commands.check_arguments(name, commands.COMMANDS[name], params)
    op, message = request(name, 5, params, INIT, taken, alive=alive)
    assert decode(encode(message)) == message
    assert message.sequence == 5
    return op, message


def disk(device=51728, name="xvdb", *, kind="file", path="handed over", read_only=False, cdrom=False, share=False):
    return DiskGrant(device, name, kind, path, read_only, cdrom, share, "", 0, "")


# Requests


def test_a_disk_without_descriptor_is_a_file_of_a_directory_that_is_open_to_all():
    plug = devices.disk_add("disk-add", 5, {"device": "xvdb", "path": "/srv/images/a b.img"})
    named = devices.by_policy("disk-add", plug, "/srv/images/a b.img", INIT.directories)
    assert named == plug.but(directory=1, file="a b.img")
    assert decode(encode(named)) == named
    for path in ("", "/", "/srv/images", "/srv/images/", "/srv/images/sub/a", "a", "/etc/shadow", "/srv/images/../a"):
        with pytest.raises(XenvmError, match="lies in no directory that is open") as caught:
            devices.by_policy("disk-add", plug, path, INIT.directories)
        assert caught.value.code is ExitCode.PERMISSION_REFUSED
    for name in (".", "..", "x" * 256):
        with pytest.raises(UsageError, match="path: Plug.file"):
            devices.by_policy("disk-add", plug, f"/srv/images/{name}", INIT.directories)


def test_each_command_has_its_request():
    assert set(GOOD) == set(COMMANDS)
    assert {name: asked(name, **params)[0] for name, params in GOOD.items()} == {
        "disk-list": Op.DEVICES,
        "disk-add": Op.PLUG,
        "disk-del": Op.UNPLUG,
        "cd-insert": Op.PLUG,
        "cd-eject": Op.UNPLUG,
        "nic-list": Op.DEVICES,
        "nic-add": Op.PLUG,
        "nic-del": Op.UNPLUG,
        "nic-network-switch": Op.REBRIDGE,
        "doctor": Op.DEVICES,
        "trigger": Op.NMI,
        "get-acpi-state": Op.S_STATE,
    }
    assert asked("disk-list")[1] == Ask(5, Op.DEVICES, "", 0)
    assert asked("doctor", clean="true") == (Op.SETTLE, Ask(5, Op.SETTLE, "", 0))
    assert asked("doctor", alive=False) == (Op.DEVICES, Ask(5, Op.DEVICES, "", 0))
    assert asked("doctor", alive=False, clean="true") == (Op.FIND, Ask(5, Op.FIND, "", 0))


def test_each_trigger_has_its_request():
    triggers = {"power": Op.PRESS_POWER, "sleep": Op.PRESS_SLEEP, "nmi": Op.NMI}
    assert {word: asked("trigger", params=word)[0] for word in triggers} == triggers
    for word in ("", "init", "x" * 1000):
        with pytest.raises(UsageError, match="is none of power, sleep, nmi, reset, s3resume$"):
            asked("trigger", params=word)


@pytest.mark.parametrize(
    ("params", "grant"),
    [
        ({}, disk()),
        ({"path": "/srv/b.img"}, disk(path="/srv/b.img")),
        ({"type": "qcow", "mode": "r"}, disk(kind="qcow", read_only=True)),
        ({"devtype": "cdrom", "mode": "r"}, disk(cdrom=True, read_only=True)),
        ({"share": "true"}, disk(share=True)),
        ({"device": "sda"}, disk(2048, "sda")),
        ({"device": "51728"}, disk(51728, "51728")),
        ({"path": "/x" * 5000}, disk(path=("/x" * 5000)[:1000])),
    ],
)
def test_a_disk_to_add(params, grant):
    assert asked("disk-add", **{"device": "xvdb"} | params)[1] == Plug(5, (grant,), ())


def test_a_disc_to_insert_is_read():
    assert asked("cd-insert", device="xvdb", type="phy")[1].disks == (disk(kind="phy", read_only=True, cdrom=True),)


def test_no_key_and_no_cipher_can_be_asked_for():
    for name in ("cipher", "key-file", "key_file", "key-size"):
        with pytest.raises(UsageError, match="no argument"):
            asked("disk-add", device="xvdb", **{name: "x"})
    grant = asked("disk-add", device="xvdb")[1].disks[0]
    assert (grant.cipher, grant.key_size_bits, grant.key_file) == ("", 0, "")


@pytest.mark.parametrize(
    ("taken", "params", "number", "mac"),
    [
        ((), {}, 0, derived_mac(0, None, UUID)),
        ((0, 1, 3), {}, 2, derived_mac(2, None, UUID)),
        ((0,), {"id": "7"}, 7, derived_mac(7, None, UUID)),
        ((), {"mac": "00:16:3E:00:00:0A"}, 0, "00:16:3e:00:00:0a"),
    ],
)
def test_a_card_to_add(taken, params, number, mac):
    assert asked("nic-add", taken, **params)[1] == Plug(5, (), (NicGrant(number, "", mac),))
    assert asked("nic-add", taken, bridge="dmz", **params)[1].nics[0].bridge == "dmz"


def test_a_guest_has_so_many_cards_at_most():
    with pytest.raises(WrongStateError, match="the guest has 32 network cards"):
        asked("nic-add", range(NICS_LIMIT))


@pytest.mark.parametrize(
    ("name", "params", "wanted"),
    [
        ("disk-del", {"device": "xvdb"}, Unplug(5, Kind.VBD, 51728, False, False, 25)),
        ("disk-del", {"device": "xvdb", "force": "true", "timeout": "3"}, Unplug(5, Kind.VBD, 51728, False, True, 3)),
        ("disk-del", {"device": "xvdb", "timeout": "0.2"}, Unplug(5, Kind.VBD, 51728, False, False, 1)),
        ("cd-eject", {"device": "hdc"}, Unplug(5, Kind.VBD, 5632, True, False, 25)),
        ("nic-del", {"id": "31", "force": "no"}, Unplug(5, Kind.VIF, 31, False, False, 25)),
    ],
)
def test_a_device_to_take_away(name, params, wanted):
    assert asked(name, **params)[1] == wanted


def test_a_card_to_move():
    assert asked("nic-network-switch", id="2", bridge="br1")[1] == Rebridge(5, 2, "br1")


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("disk-add", {}, "disk-add: device= is missing"),
        ("cd-insert", {}, "cd-insert: device= is missing"),
        ("disk-del", {}, "disk-del: device= is missing"),
        ("cd-eject", {"device": ""}, "cd-eject: device= is missing"),
        ("nic-del", {}, "nic-del: id= is missing"),
        ("nic-network-switch", {"bridge": "b"}, "nic-network-switch: id= is missing"),
        ("nic-network-switch", {"id": "1"}, "nic-network-switch: bridge= is missing"),
        ("disk-add", {"device": "vda"}, "device: `vda` is no virtual disk name"),
        ("disk-add", {"device": "hde"}, "out of range"),
        ("disk-add", {"device": "xvdb", "type": "qcow2"}, "type: 'qcow2' is none of phy, file, aio, qcow, vhd"),
        ("disk-add", {"device": "xvdb", "type": "\x1b[31m" * 9}, "is none of"),
        ("disk-add", {"device": "xvdb", "mode": "rw"}, "mode is r or w"),
        ("disk-add", {"device": "xvdb", "devtype": "tape"}, "devtype disk or cdrom"),
        ("disk-add", {"device": "xvdb", "devtype": "cdrom", "mode": "w"}, "a cdrom has mode r"),
        ("disk-add", {"device": "xvdb", "share": "perhaps"}, "neither true nor false"),
        ("disk-add", {"device": "xvdb", "path": "/a\0b"}, "DiskGrant.path"),
        ("disk-add", {"device": "xvdb", "path": "/\ud800"}, "DiskGrant.path"),
        ("disk-add", {"device": "0x" + "0" * 40 + "ca10"}, "is no virtual disk name"),
        ("disk-del", {"device": "\x1b[31m"}, "is no virtual disk name"),
        ("disk-del", {"device": "x" * 60000}, "is no virtual disk name"),
        ("cd-eject", {"device": "\ud800"}, "is no virtual disk name"),
        ("disk-del", {"device": "xvdb", "timeout": "soon"}, "timeout"),
        ("disk-del", {"device": "xvdb", "force": "2"}, "neither true nor false"),
        ("nic-add", {"mac": "00:16:3e"}, "mac: '00:16:3e' is no address"),
        ("nic-add", {"bridge": "a/b"}, "bridge: 'a/b' is no name of an interface"),
        ("nic-add", {"bridge": "b" * 16}, "no name of an interface"),
        ("nic-add", {"id": "32"}, "id: '32' is no number from 0 to 31"),
        ("nic-add", {"id": "-1"}, "no number from 0 to 31"),
        ("nic-add", {"id": "\u0664"}, "no number from 0 to 31"),
        ("nic-add", {"id": "1" * 5000}, "no number from 0 to 31"),
        ("doctor", {"clean": "x"}, "neither true nor false"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_off_is_told_in_clear_words(name, params, text):
    with pytest.raises(UsageError) as caught:
        asked(name, **params)
    assert text in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


WORDS = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                "xvda",
                "sdb1",
                "51712",
                "0x10",
                "d5p1",
                "true",
                "1",
                "31",
                "br0",
                "r",
                "w",
                "cdrom",
                "disk",
                "phy",
                "vhd",
            )
        ]
    ),
    st.text(st.characters(), max_size=40),
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(COMMANDS)), st.data(), st.sets(st.integers(0, 31)))
def test_any_parameters_are_a_request_that_the_broker_takes_or_an_error(name, data, taken):
    """One that it did not take would end the supervisor: its broker believes that it was taken over."""
    arguments = sorted(commands.COMMANDS[name].arguments)
    params = data.draw(st.dictionaries(st.sampled_from(arguments), WORDS)) if arguments else {}
    try:
        asked(name, taken, **params)
    except (UsageError, WrongStateError) as error:
        error.message.encode()


# Answers


def done(*states, text="", domain=RUNNING):
    return Done(5, domain, text, states)


def test_a_list_of_disks():
    text, data = answer("disk-list", done(DISK, CARD, DISC))
    assert text.splitlines() == [
        "xvda     connected              w phy:/dev/vg/a",
        "xvdb     waiting for the guest  r file:/a.iso",
    ]
    assert data == [
        {
            "device": 51712,
            "name": "xvda",
            "backend": "connected",
            "frontend": "connected",
            "source": "phy:/dev/vg/a",
            "read_only": False,
        },
        {
            "device": 51728,
            "name": "xvdb",
            "backend": "waiting for the guest",
            "frontend": "initialising",
            "source": "file:/a.iso",
            "read_only": True,
        },
    ]


def test_a_list_of_cards():
    text, data = answer("nic-list", done(DISK, CARD))
    assert text == "0        closing                00:16:3e:00:00:01 bridge=br0"
    assert data == [
        {
            "device": 0,
            "name": "0",
            "backend": "closing",
            "frontend": "none",
            "mac": "00:16:3e:00:00:01",
            "bridge": "br0",
        }
    ]


def test_empty_lists():
    assert answer("disk-list", done(CARD)) == ("", [])
    assert answer("nic-list", done()) == ("", [])


def test_a_change_says_one_word_and_shows_what_there_is_now():
    text, data = answer("disk-add", done(DISK, CARD, text="connected"))
    assert (text, [row["name"] for row in data]) == ("connected", ["xvda"])
    text, data = answer("nic-del", done(DISK, CARD))
    assert (text, [row["name"] for row in data]) == ("", ["0"])


def test_every_state_has_a_word():
    assert set(STATES) == set(range(-1, 9))
    assert len(set(STATES.values())) == len(STATES)
    for number in STATES:
        answer("disk-list", done(DISK.but(backend=number, frontend=number)))


def test_a_doctor_without_findings():
    assert answer("doctor", done(DISK, DISC, CARD)) == ("", [])


def test_a_doctor_names_devices_that_are_not_whole_and_what_the_broker_found():
    text, data = answer(
        "doctor", done(DISK.but(backend=1), CARD.but(backend=-1), DISC, text="udev: no rule\nnbd: gone")
    )
    assert data == [
        "vbd xvda: its backend is initialising; doctor clean=true removes it",
        "vif 0: its backend is none; doctor clean=true removes it",
        "udev: no rule",
        "nbd: gone",
    ]
    assert text == "\n".join(data)


def test_a_doctor_names_every_device_of_a_domain_that_is_gone():
    _, data = answer("doctor", done(DISK, CARD, text="xenstore: /xenvm/x is left", domain=NO_DOMAIN))
    assert data == [
        "vbd xvda: left of an earlier domain; doctor clean=true removes it",
        "vif 0: left of an earlier domain; doctor clean=true removes it",
        "xenstore: /xenvm/x is left",
    ]


def test_a_device_command_is_never_about_another_vm():
    assert {field for message in (Plug, Unplug, Rebridge) for field in message.FIELDS}.isdisjoint({"domid", "uuid"})
    assert devices.request is request
