# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a block device is mounted read-write, from tables of mounts and a /sys that the test has made."""

import os

import pytest

from xenvm.broker import mounts

SDA, SDA1, SDA2, SDB, LV, CRYPT = ((8, 0), (8, 1), (8, 2), (8, 16), (254, 0), (254, 1))


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A disk sda with two partitions; on sda2 a logical volume, on that an opened encrypted disk; and a disk sdb."""
    devices, numbers = tmp_path / "devices", tmp_path / "dev/block"
    numbers.mkdir(parents=True)

    def device(place, number):
        path = devices / place
        (path / "holders").mkdir(parents=True)
        (path / "dev").write_text("{}:{}\n".format(*number))
        (numbers / "{}:{}".format(*number)).symlink_to(path)
        if place.count("/"):
            (path / "partition").write_text("1\n")
        return path

    device("sda", SDA)
    device("sda/sda1", SDA1)
    volume, opened = device("dm-0", LV), device("dm-1", CRYPT)
    (device("sda/sda2", SDA2) / "holders/dm-0").symlink_to(volume)
    (volume / "holders/dm-1").symlink_to(opened)
    device("sdb", SDB)
    table = tmp_path / "mountinfo"
    table.write_text("")
    monkeypatch.setattr(mounts, "BLOCK_DEVICES", str(numbers))
    monkeypatch.setattr(mounts, "MOUNTS", str(table))

    def mount(*lines):
        table.write_text("".join(f"{line}\n" for line in lines))

    return mount


def line(number, place="/mnt", *, options="rw", kind="ext4", source="/dev/x", own="rw,relatime", more=" shared:1"):
    """A mount as proc(5) has it; `options` are those of the file system, `own` those of this place."""
    return "36 28 {}:{} / {} {}{} - {} {} {}".format(*number, place, own, more, kind, source, options)


def written(number):
    return mounts.written_at(os.makedev(*number))


@pytest.mark.parametrize(
    ("mounted", "found"),
    [
        (SDA, (SDA, SDA1, SDA2)),
        (SDA1, (SDA1, SDA)),
        (LV, (LV, SDA2, SDA)),
        (CRYPT, (CRYPT, LV, SDA2, SDA)),
        (SDB, (SDB,)),
    ],
)
def test_what_lies_on_a_device_counts_and_its_neighbours_do_not(host, mounted, found):
    host(line((0, 25), "/run", kind="tmpfs", source="tmpfs"), line(mounted))
    for number in (SDA, SDA1, SDA2, SDB, LV, CRYPT):
        assert written(number) == ("/mnt" if number in found else "")


def test_only_a_file_system_that_is_written_counts(host):
    """One that is read-only itself, not one that is only shown so at this place."""
    host(line(SDB, options="ro,errors=continue", own="rw,relatime"))
    assert written(SDB) == ""
    host(line(SDB, own="ro"))
    assert written(SDB) == "/mnt"
    host(line(SDB, options="ro"), line(SDB, "/other", options="errors=continue,rw", more=""))
    assert written(SDB) == "/other"


def test_a_file_system_with_a_number_of_its_own_is_known_by_its_source(host, monkeypatch):
    asked = []
    monkeypatch.setattr(mounts, "_number", lambda path: (asked.append(path), "8:16")[1])
    host(
        line((0, 44), "/b", kind="btrfs", source="/dev/sdb"),
        line((0, 45), "/f", kind="fuse.sshfs", source="/dev/sda"),
        line((0, 46), "/c", kind="btrfs", source="none"),
    )
    assert written(SDB) == "/b"
    assert written(SDA) == ""
    assert set(asked) == {"/dev/sdb"}


@pytest.mark.parametrize("odd", ["", "\n\n", "36 28 8:16", " - ", "36 28 8:16 / /mnt rw - ext4", "\u2028 - - - rw"])
def test_a_table_that_is_none_is_no_mount(host, odd):
    host(odd)
    assert written(SDB) == ""


def test_a_device_that_is_gone_and_a_host_without_tables(host, monkeypatch):
    assert written((99, 99)) == ""
    monkeypatch.setattr(mounts, "MOUNTS", "/nowhere")
    assert written(SDB) == ""


def test_the_number_of_a_device_by_its_name():
    assert mounts._number("/dev/null") == "1:3"
    assert mounts._number("/dev/none") == ""
