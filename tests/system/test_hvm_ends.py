# SPDX-License-Identifier: GPL-2.0-or-later
"""How an HVM guest ends, by itself, by its firmware's buttons or by Xen, and what disks it sees. All are a boot sector."""

import time

import pytest
from conftest import MIB, domains, run, until
from hvmguest import Serial, models


def up(guest):
    """The serial port of a guest that is up."""
    serial = Serial(guest)
    serial.up()
    return serial


def anew(guest, first):
    """The same of its next incarnation."""
    until(lambda: (now := guest.status())["state"] == "running" and now["domid"] != first, "started anew", 120)
    return up(guest)


@pytest.mark.long
def test_an_nmi_arrives_and_a_reset_begins_anew(hvm, disk):
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    guest.start()
    serial = up(guest)
    assert "GUEST-NMI" not in serial.text
    guest.cmd("trigger", "nmi")
    serial.until("GUEST-NMI\r\n")
    serial.ticks_on()
    assert serial.text.count("GUEST-NMI") == 1
    guest.cmd("trigger", "lid", code=2)
    serial.ticks_on()
    first = guest.domid
    guest.cmd("trigger", "reset")  # a restart that does not ask
    assert guest.state == "running"
    assert guest.domid != first
    up(guest)
    assert len(models()) == 1


@pytest.mark.long
def test_the_ways_a_guest_ends_by_itself(hvm, disk):
    """The keyboard's controller resets it, and so does a triple fault; and it switches itself off."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", on_halt="reboot")
    guest.start()
    serial = up(guest)
    for letter in "rfo":
        if letter == "o":  # a third end so soon would be one too many, but for a command in between
            guest.cmd("restart", "force=true")
            serial = up(guest)
        first = guest.domid
        serial.write(letter)
        serial = anew(guest, first)
    guest.write(on_halt="destroy", on_reboot="destroy")
    guest.cmd("read-config")
    serial.write("f")
    assert "reboot" in guest.until("shutdown", 60)["reason"]
    guest.cmd("start")
    serial = up(guest)
    serial.write("o")
    assert "poweroff" in guest.until("shutdown", 60)["reason"]


@pytest.mark.long
def test_a_guest_that_xen_says_has_crashed(host, hvm, disk):
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", on_crash="reboot")
    guest.start()
    up(guest)
    first = guest.domid
    host.crash(first)
    anew(guest, first)
    guest.write(on_crash="destroy")
    guest.cmd("read-config")
    host.crash(guest.domid)
    assert "crash" in guest.until("shutdown", 60)["reason"]
    assert models() == {}


@pytest.mark.long
def test_a_guest_that_has_ended_is_kept_where_its_policy_says_so(host, hvm, disk):
    keys = ("on_halt", "on_reboot", "on_crash")
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", **dict.fromkeys(keys, "preserve"))
    guest.start()
    for ended, state in (("o", "shutdown"), ("f", "rebooted"), ("r", "rebooted"), ("crash", "crashed")):
        serial = up(guest)
        domid = guest.domid
        if ended == "crash":
            host.crash(domid)
        else:
            serial.write(ended)
        guest.until(state, 60)
        assert domains()[guest.uuid] == domid
        assert "preserved" in guest.cmd("start", code=5).stderr
        guest.cmd("destroy")
        assert guest.state == "shutdown"
        assert guest.uuid not in domains()
        assert models() == {}
        guest.cmd("start")


@pytest.mark.long
def test_a_guest_that_does_not_heed_its_power_button(hvm, disk):
    """It is waited for, and runs on; and where that was said it is switched off then."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    guest.start()
    serial = up(guest)
    serial.write("i")
    serial.ticks_on()
    first = guest.domid
    for command in ("shutdown", "restart"):
        begin = time.monotonic()
        assert "runs on" in guest.cmd(command, "timeout=5", code=7).stderr
        assert 5 <= time.monotonic() - begin < 20
        assert guest.state == "running"
        serial.ticks_on()
    assert guest.domid == first
    guest.cmd("shutdown", "timeout=5", "force=true")
    assert guest.state == "shutdown"
    assert models() == {}


@pytest.mark.long
def test_four_drives_at_once(hvm, disk, image):
    """The firmware finds all that there is room for on IDE, each with its own bytes."""
    others = [
        f"{image(f'{name}.img', MIB, bytes(512) + f'this-{name}'.encode())}:file:{name}:w:disk"
        for name in ("hdb", "hdc", "hdd")
    ]
    guest = hvm(disk=[f"{disk(b'this-hda')}:file:hda:w:disk", *others], boot="c")
    guest.start()
    serial = up(guest)
    found = serial.drives()
    assert found[0] == ("80", "this-hda")
    assert sorted(found) == [(f"8{number}", f"this-hd{letter}") for number, letter in enumerate("abcd")]


@pytest.mark.long
def test_a_guest_boots_from_a_qcow_image(hvm, disk, image):
    """Its firmware reads what is in the image, and its device model raw bytes of a block device."""
    plain, packed = disk(b"of-qcow2"), image("packed.qcow2", 0)
    done = run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(plain), str(packed))
    assert done.returncode == 0, done.stderr
    assert packed.read_bytes()[:4] == b"QFI\xfb"
    guest = hvm(disk=f"{packed}:qcow:hda:w:disk", boot="c")
    guest.start()
    serial = up(guest)
    assert serial.drives() == [("80", "of-qcow2")]
    words = next(iter(models().values()))
    drive = words[words.index("-drive") + 1]
    assert "format=raw" in drive
    assert "file.driver=host_device" in drive
    guest.cmd("destroy")
    assert run("qemu-img", "check", "-q", str(packed)).returncode == 0
