# SPDX-License-Identifier: GPL-2.0-or-later
"""The names by which another toolstack may know a disk that is open here."""

import os
import stat

import pytest

from xenvm.boundary.devices import DiskGrant
from xenvm.broker import aliases

GRANT = DiskGrant(51712, "xvda", "file", "/a", False, False, False, "", 0, "")


def names(path, descriptor, *, handed=False, shown="file:/a", room_bytes=1000):
    try:
        grant = GRANT.but(path=str(path))
        return aliases.names_of(grant, descriptor, handed=handed, shown=shown, room_bytes=room_bytes)
    finally:
        os.close(descriptor)


def test_a_file_has_its_own_path_and_the_one_it_was_opened_by(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"")
    link.symlink_to(file)
    for shown, expected in ((f"file:{link}", [file]), (f"file:{file}", [link]), ("file:/cut of", [file, link])):
        found = names(link, os.open(link, os.O_RDONLY), shown=shown)
        assert found == tuple(map(str, expected))
    assert names(link, os.open(link, os.O_RDONLY), handed=True) == (str(file),)
    assert names(file, os.open(file, os.O_RDONLY), shown=f"file:{file}") == ()


def test_a_name_that_no_frame_takes_is_left_out(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"")
    assert names("/\udcff", os.open(file, os.O_RDONLY)) == (str(file),)
    assert names("/" + "x" * 4000, os.open(file, os.O_RDONLY)) == (str(file),)
    length = aliases.size((str(file),))
    assert names(file, os.open(file, os.O_RDONLY), room_bytes=length) == (str(file),)
    assert names(file, os.open(file, os.O_RDONLY), room_bytes=length - 1) == ()


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("vg-web--data", ("/dev/mapper/vg-web--data", "/dev/vg/web-data")),
        ("my--vg-a", ("/dev/mapper/my--vg-a", "/dev/my-vg/a")),
        ("plain", ("/dev/mapper/plain",)),
        ("", ()),
    ],
)
def test_a_mapped_device_has_the_names_that_udev_gives_it(tmp_path, monkeypatch, name, paths):
    monkeypatch.setattr(aliases, "BLOCK_DEVICES", str(tmp_path / "sys"))
    device = tmp_path / "dm-3"
    os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(254, 3))
    (tmp_path / "sys/254:3/dm").mkdir(parents=True)
    (tmp_path / "sys/254:3/dm/name").write_text(f"{name}\n")
    assert names("/a", os.open(device, os.O_PATH)) == tuple(sorted((str(device), *paths)))
