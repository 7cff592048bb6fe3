# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk opened by xenvm-cmd with its own rights, and the request that goes with it."""

import fcntl
import os

import pytest

from xenvm.cli import handover
from xenvm.errors import ExitCode, UsageError, XenvmError


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    return path


@pytest.fixture
def opened():
    """Return the parameters and how the disk was opened; it is closed afterwards."""
    before, made = len(os.listdir("/proc/self/fd")), []

    def run(command, **given):
        params, descriptor = handover.opened(command, given)
        made.append(descriptor)
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        assert not os.get_inheritable(descriptor)
        assert os.readlink(f"/proc/self/fd/{descriptor}") == params["path"]
        return params, "r" if access == os.O_RDONLY else "w"

    yield run
    for descriptor in made:
        os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "w"),
        ({"mode": "w"}, "w"),
        ({"mode": "r"}, "r"),
        ({"devtype": "cdrom"}, "r"),
        ({"devtype": "disk"}, "w"),
        ({"devtype": "cdrom", "mode": "w"}, "w"),  # the monitor says that this cannot be
    ],
)
def test_parameters_one_by_one(opened, image, given, mode):
    params, access = opened("disk-add", path=str(image), device="xvdb", **given)
    assert params == {"path": str(image), "device": "xvdb", "mode": mode} | given
    assert access == mode


def test_the_form_of_the_config_file(opened, image):
    params, access = opened("disk-add", spec=f" {image} : file:xvdb:r:disk:share=true")
    assert params == {
        "path": str(image),
        "type": "file",
        "device": "xvdb",
        "mode": "r",
        "devtype": "disk",
        "share": "true",
    }
    assert access == "r"


def test_what_is_given_by_name_counts_more(opened, image):
    params, access = opened("disk-add", spec=f"{image}:file:xvdb:w:disk", mode="r", device="xvdc")
    assert (params["device"], params["mode"], access) == ("xvdc", "r", "r")


def test_a_disc_is_read(opened, image):
    params, access = opened("cd-insert", path=str(image), device="hdc")
    assert params == {"path": str(image), "device": "hdc"}
    assert access == "r"


def test_a_relative_path_is_the_callers(opened, image, monkeypatch):
    monkeypatch.chdir(image.parent)
    assert opened("disk-add", path="disk.img", device="xvdb")[0]["path"] == str(image)


def test_a_path_with_colons_goes_by_name(opened, tmp_path):
    path = tmp_path / "pci-0000:00:1f.2"
    path.write_bytes(b"")
    assert opened("disk-add", path=str(path), device="xvdb")[0]["path"] == str(path)


@pytest.mark.parametrize(
    ("command", "given", "text"),
    [
        ("disk-add", {}, "path= is missing"),
        ("disk-add", {"device": "xvdb"}, "path= is missing"),
        ("disk-add", {"spec": ":file:xvdb:w:disk"}, "path= is missing"),
        ("disk-add", {"spec": ""}, "five fields, here are 1"),
        ("disk-add", {"spec": "/a:file:xvdb:w"}, "five fields, here are 4"),
        ("disk-add", {"spec": "/a:file:xvdb:w:disk:share"}, "not an option"),
        ("disk-add", {"spec": "/a:file:xvdb:w:disk:path=/b"}, "not an option"),
        ("disk-add", {"path": "/dev/null", "mode": "rw"}, "mode=rw is neither r nor w"),
        ("disk-add", {"path": "/dev/null", "mode": ""}, "mode= is neither r nor w"),
        ("cd-insert", {"device": "hdc"}, "cd-insert: path= is missing"),
    ],
)
def test_what_is_off_is_told_before_anything_is_opened(monkeypatch, command, given, text):
    monkeypatch.setattr(handover.os, "open", None)
    with pytest.raises(UsageError, match=text):
        handover.opened(command, given)


def test_one_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(XenvmError, match=f"disk-add: cannot open {tmp_path}/none: No such file") as caught:
        handover.opened("disk-add", {"path": f"{tmp_path}/none"})
    assert caught.value.code is ExitCode.FAILED


def test_one_that_the_caller_may_not_open_is_the_monitors_to_judge(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(handover.os, "open", refuse)
    params, descriptor = handover.opened("disk-add", {"path": "/srv/images/a.img"})
    assert (params["path"], descriptor) == ("/srv/images/a.img", None)


def test_a_fifo_is_not_waited_for(opened, tmp_path):
    """That it is no disk is the broker's to say."""
    os.mkfifo(tmp_path / "fifo")
    opened("disk-add", path=str(tmp_path / "fifo"), mode="r")
