# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor's log: appended to, and begun anew when a monitor starts and it is large."""

import os

import pytest

from xenvm.broker import host
from xenvm.errors import XenvmError

UUID = "11111111-2222-4333-8444-555555555555"


@pytest.fixture(params=["by the uuid", "output"])
def place(request, monkeypatch, tmp_path):
    """The path of the log, and how it is opened."""
    monkeypatch.setattr(host, "LOG_DIRECTORY", str(tmp_path))
    named = request.param == "output"
    path = tmp_path / ("a.txt" if named else f"{UUID}.log")

    def write(text):
        descriptor = host.open_log(UUID, str(path) if named else "")
        os.write(descriptor, text)
        os.close(descriptor)

    return path, write


def test_it_is_appended_to(place):
    path, write = place
    write(b"one\n")
    write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(path.parent.iterdir()) == [path]


def test_one_that_has_grown_large_is_kept_once_and_begun_anew(place):
    path, write = place
    older = path.with_name(f"{path.name}.1")
    older.write_text("the one before")
    with open(path, "wb") as log:
        log.truncate(host.LOG_LIMIT_BYTES)
    write(b"one\n")
    assert path.stat().st_size == host.LOG_LIMIT_BYTES + 4
    assert older.read_text() == "the one before"
    write(b"two\n")
    assert path.read_bytes() == b"two\n"
    assert older.stat().st_size == host.LOG_LIMIT_BYTES + 4
    assert sorted(path.parent.iterdir()) == sorted([path, older])


@pytest.mark.parametrize("what", ["link", "fifo", "no directory"])
def test_what_is_no_file_is_refused(monkeypatch, tmp_path, what):
    path = tmp_path / "a.txt"
    if what == "link":
        path.symlink_to(tmp_path / "b.txt")
    elif what == "fifo":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    else:
        path = tmp_path / "none/a.txt"
    with pytest.raises(XenvmError, match="a.txt"):
        host.open_log(UUID, str(path))
    if what == "fifo":
        os.close(reader)
    assert not (tmp_path / "b.txt").exists()
