# SPDX-License-Identifier: GPL-2.0-or-later
"""Uuids, device numbers, derived addresses."""

import pytest

from xenvm.model import (
    Action,
    DiskSlot,
    DiskSpec,
    DiskType,
    NicSpec,
    PciAddress,
    StartupKind,
    Uuid,
    derived_mac,
    disk_slot,
    parse_uuid,
    same_disk,
    virtual_device_number,
)

UUID = Uuid("00000000-0000-0000-0000-000000000001")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("hda", 768),
        ("hda63", 831),
        ("hdb", 832),
        ("hdc", 5632),
        ("hdd", 5696),
        ("sda", 2048),
        ("sda1", 2049),
        ("sdp15", 2303),
        ("xvda", 51712),
        ("xvdb2", 51730),
        ("xvdp15", 51967),
        ("xvdq", 1 << 28 | 16 << 8),
        ("xvda16", 1 << 28 | 16),
        ("xvdaa", 1 << 28 | 26 << 8),
        ("d0p0", 51712),
        ("d1p1", 51729),
        ("d26p0", 1 << 28 | 26 << 8),
        ("51712", 51712),
        ("0xca00", 51712),
    ],
)
def test_device_numbers(name, number):
    assert virtual_device_number(name) == number


@pytest.mark.parametrize(
    "name",
    [
        "", "hd", "hde", "hda64", "hda0", "hda01", "sdq", "sda16", "sdaa", "xvda256", "xvdzzzzz", "xvda00",
        "d1048576p0", "d0p256", "d01p0", "vda", "HDA", "0", "-1", "536870912", "0x20000000", "99999999999", "hda\n",
        "xvd\u0661", "/dev/sda",
    ],
)  # fmt: skip
def test_device_names_out_of_range(name):
    with pytest.raises(ValueError):
        virtual_device_number(name)


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("hda", DiskSlot("hd", 0, 0)),
        ("hdd3", DiskSlot("hd", 3, 3)),
        ("sdc1", DiskSlot("sd", 2, 1)),
        ("xvdb", DiskSlot("xvd", 1, 0)),
        ("xvdaa7", DiskSlot("xvd", 26, 7)),
        ("256", None),
        ("1000", None),
    ],
)
def test_disk_slots(name, slot):
    assert disk_slot(virtual_device_number(name)) == slot


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("sda", "xvda", True),
        ("hdb", "sdb", True),
        ("xvda", "xvda", True),
        ("xvda", "xvda1", True),
        ("sda1", "sda2", False),
        ("xvda1", "sda2", True),  # of two families even the partitions share their minors
        ("xvda", "xvdb", False),
        ("xvda", "256", False),
        ("256", "256", True),
    ],
)
def test_what_is_one_disk_for_a_linux_guest(first, second, same):
    numbers = [virtual_device_number(name) for name in (first, second)]
    assert same_disk(*numbers) is same_disk(*reversed(numbers)) is same


def test_uuid():
    assert parse_uuid("ABCDEF00-0000-0000-0000-00000000000F") == "abcdef00-0000-0000-0000-00000000000f"
    for text in ("", "x", "00000000000000000000000000000001", "{00000000-0000-0000-0000-000000000001}", UUID + "\n"):
        with pytest.raises(ValueError):
            parse_uuid(text)


def test_derived_mac_check_value():
    assert derived_mac(0, None, UUID) == "4e:1c:b4:98:ed:0a"


def test_derived_mac_depends_on_each_part():
    other = Uuid("00000000-0000-0000-0000-000000000002")
    macs = {
        derived_mac(0, None, UUID),
        derived_mac(1, None, UUID),
        derived_mac(0, "e1000", UUID),
        derived_mac(0, None, other),
    }
    assert len(macs) == 4
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)


def test_nic_address():
    assert NicSpec(id=0).mac_for(UUID) == "4e:1c:b4:98:ed:0a"
    assert NicSpec(id=0, mac="00:16:3e:00:00:01").mac_for(UUID) == "00:16:3e:00:00:01"


def test_words():
    assert [*Action] == ["destroy", "preserve", "reboot"]
    assert StartupKind.RESTORE_DELETE == "restore-del"
    assert str(PciAddress(0, 0x1B, 2, 3)) == "0000:1b:02.3"
    disk = DiskSpec(path="/d", type=DiskType.PHY, virtpath="sda", read_only=False, cdrom=False)
    assert disk.device_number == 2048
