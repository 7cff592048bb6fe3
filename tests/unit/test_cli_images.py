# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images on the side of xenvm-cmd: a file without a name until it is whole, an older one untouched until then."""

import errno
import os
import stat

import pytest

from xenvm.cli import images
from xenvm.cli.client import NoMonitorError, Reply
from xenvm.errors import ExitCode, UsageError, WrongStateError, XenvmError


class Monitor:
    """What of a monitor the commands about images use; `refuse` is the command that fails."""

    def __init__(self, content=b"image", refuse="", running=True):
        self.running, self.uuid = running, "11111111-2222-4333-8444-555555555555"
        self.handed, self.calls, self.content, self.refuse = None, [], content, refuse
        self.seen = None

    def watch(self, command, _on_event, /, **params):
        self._called(command, params)
        handed, self.handed = self.handed, None
        try:
            if command == "restore":
                self.seen = os.pread(handed, 100, 0)
            else:
                os.write(handed, self.content)
        finally:
            os.close(handed)
        return Reply("", {"image_bytes": len(self.content)})

    def call(self, command, /, **params):
        self._called(command, params)
        if command == "status" and self.running is None:
            raise NoMonitorError("status: the monitor hung up")
        return Reply("", {"state": "suspended", "running": self.running})

    def _called(self, command, params):
        self.calls.append((command, params))
        if command == self.refuse:
            if self.handed is not None:
                os.close(self.handed)
                self.handed = None
            raise WrongStateError(f"{command} is not possible")

    @property
    def commands(self):
        return [command for command, _ in self.calls]


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(params=[True, False], ids=["nameless", "named"])
def file(tmp_path, request, monkeypatch):
    """A place for an image, on a file system that knows files without a name, and one that does not."""
    if not request.param:
        real = os.open

        def limited(path, flags, *more, **options):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *more, **options)

        monkeypatch.setattr(os, "open", limited)
    return tmp_path / "guest.img"


@pytest.mark.parametrize("command", ["suspend", "checkpoint"])
def test_the_new_image_takes_the_place_of_the_old_one(file, command):
    file.write_bytes(b"old")
    monitor = Monitor()
    images.save(monitor, command, {"file": str(file)})
    assert file.read_bytes() == b"image"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["guest.img"]
    assert monitor.commands == ([command, "commit"] if command == "suspend" else [command])
    assert monitor.calls[0][1] == {"file": str(file)}


@pytest.mark.parametrize("command", ["suspend", "checkpoint"])
def test_a_failure_leaves_the_old_image_and_nothing_else(file, command):
    file.write_bytes(b"old")
    with pytest.raises(WrongStateError):
        images.save(Monitor(refuse=command), command, {"file": str(file)})
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == ["guest.img"]


def test_an_image_that_cannot_be_named_is_not_committed(file, monkeypatch):
    def refuse(*_words, **_options):
        raise OSError(errno.EIO, "no luck")

    monkeypatch.setattr(os, "rename", refuse)
    monitor = Monitor()
    with pytest.raises(XenvmError, match="cannot be named .* no luck; the guest runs on"):
        images.save(monitor, "suspend", {"file": str(file)})
    assert monitor.commands == ["suspend", "cancel"]
    assert os.listdir(file.parent) == []


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("running", [True, False, None])
def test_a_domain_that_was_not_ended(file, running, older):
    """A guest that has run on takes its image with it; else that stays; when nobody knows, both files stay."""
    if older:
        file.write_bytes(b"old")
    with pytest.raises(WrongStateError, match="commit is not possible; ") as caught:
        images.save(Monitor(refuse="commit", running=running), "suspend", {"file": str(file)})
    told, names = caught.value.message, sorted(os.listdir(file.parent))
    if running is False:
        assert f"the image {file} is whole" in told
        assert (file.read_bytes(), names) == (b"image", ["guest.img"])
    elif running and older:
        assert f"{file} is the file that it was" in told
        assert (file.read_bytes(), names) == (b"old", ["guest.img"])
    elif running:
        assert f"the image {file} was removed" in told
        assert names == []
    else:
        assert f"the new image is {file}" in told
        assert file.read_bytes() == b"image"
        assert len(names) == 1 + older
        if older:
            assert f"the older file is {file.parent / names[0]};" in told
            assert (file.parent / names[0]).read_bytes() == b"old"


class Successor:
    """The monitor with another supervisor: busy at first, and then it knows."""

    def __init__(self, running):
        self.answers = [{"running": True, "busy": {"command": "start"}}, {"running": running, "busy": None}]
        self.closed = False

    def call(self, _command):
        return Reply("", self.answers.pop(0))

    def close(self):
        self.closed = True


@pytest.mark.parametrize(("running", "left"), [(False, b"image"), (True, b"older")])
def test_a_supervisor_that_dies_over_a_commit_has_a_successor_who_knows(file, monkeypatch, running, left):
    """No file is left beside: whether the guest runs is asked until it is certain."""
    file.write_bytes(b"older")
    successor = Successor(running)
    monkeypatch.setattr(images, "LOOK_PAUSE_S", 0)
    monkeypatch.setattr(images.Monitor, "connect", lambda _uuid, **_: successor)
    with pytest.raises(XenvmError):
        images.save(Monitor(refuse="commit", running=None), "suspend", {"file": str(file)})
    assert file.read_bytes() == left
    assert os.listdir(file.parent) == [file.name]
    assert successor.closed


def test_somebody_elses_file_is_not_taken_back(file):
    class Replacing(Monitor):
        def call(self, command, /, **params):
            if command == "commit":
                file.unlink()
                file.write_bytes(b"another")
            return super().call(command, **params)

    with pytest.raises(WrongStateError, match="the new image is"):
        images.save(Replacing(refuse="commit"), "suspend", {"file": str(file)})
    assert file.read_bytes() == b"another"


def test_an_interrupted_commit_says_which_file_is_which(file, capsys):
    class Interrupted(Monitor):
        def call(self, command, /, **params):
            raise KeyboardInterrupt

    file.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        images.save(Interrupted(), "suspend", {"file": str(file)})
    assert f"the new image is {file}, the older file is" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["suspend", "checkpoint"])
@pytest.mark.parametrize("older", [True, False])
def test_a_name_that_cannot_be_put_on_the_disk_is_taken_back(file, monkeypatch, command, older):
    def refuse(_descriptor):
        raise OSError(errno.EIO, "no luck")

    if older:
        file.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    monitor = Monitor()
    with pytest.raises(XenvmError, match="cannot be put on the disk: no luck; the guest runs on"):
        images.save(monitor, command, {"file": str(file)})
    assert monitor.commands == [command, *(["cancel"] if command == "suspend" else [])]
    assert os.listdir(file.parent) == (["guest.img"] if older else [])
    assert not older or file.read_bytes() == b"old"


def test_without_hard_links_the_older_file_is_gone(tmp_path, monkeypatch):
    """As on a FAT file system, which has no files without a name either."""
    real = os.open

    def limited(path, flags, *more, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *more, **options)

    def none(*_words, **_options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "open", limited)
    monkeypatch.setattr(os, "link", none)
    file = tmp_path / "guest.img"
    file.write_bytes(b"old")
    images.save(Monitor(), "suspend", {"file": str(file)})
    assert file.read_bytes() == b"image"
    with pytest.raises(WrongStateError, match="was removed"):
        images.save(Monitor(refuse="commit"), "suspend", {"file": str(file)})
    assert os.listdir(tmp_path) == []


def test_what_is_no_place_for_an_image(tmp_path):
    for given, kind, words in (
        ({}, UsageError, "file= is missing"),
        ({"file": f"{tmp_path}/"}, UsageError, "names no file"),
        ({"file": f"{tmp_path}/no/image"}, XenvmError, "No such file"),
        ({"file": str(tmp_path)}, UsageError, "not a regular file"),
        ({"file": "/dev/null"}, UsageError, "not a regular file"),
    ):
        with pytest.raises(kind, match=words):
            images.save(Monitor(), "suspend", given)
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="not a regular file"):
        images.save(Monitor(), "suspend", {"file": str(tmp_path / "link")})


def test_restore_hands_the_image_over_and_keeps_it(file):
    file.write_bytes(b"content")
    monitor = Monitor()
    images.restore(monitor, {"file": str(file), "paused": "true"})
    assert monitor.seen == b"content"
    assert monitor.calls == [("restore", {"file": str(file), "paused": "true"})]
    assert file.exists()


def test_restore_removes_the_image_afterwards_only(file):
    file.write_bytes(b"content")
    with pytest.raises(WrongStateError):
        images.restore(Monitor(refuse="restore"), {"file": str(file), "delete": "true"})
    assert file.exists()
    images.restore(Monitor(), {"file": str(file), "delete": "true"})
    assert not file.exists()
    with pytest.raises(XenvmError, match="No such file") as caught:
        images.restore(Monitor(), {"file": str(file)})
    assert caught.value.code is ExitCode.FAILED


def test_another_file_of_that_name_stays(file):
    file.write_bytes(b"content")

    class Replacing(Monitor):
        def watch(self, *words, **params):
            file.unlink()
            file.write_bytes(b"another")
            return super().watch(*words, **params)

    with pytest.raises(XenvmError, match="another file by now"):
        images.restore(Replacing(), {"file": str(file), "delete": "true"})
    assert file.read_bytes() == b"another"


def test_the_bar():
    assert images.bar(0, 4096).startswith("[" + " " * 40 + "]   0 %")
    assert images.bar(2048, 4096) == "[" + "#" * 20 + " " * 20 + "]  50 %, 2 of 4 MiB"
    assert images.bar(4096, 4096).startswith("[" + "#" * 40 + "] 100 %")


@pytest.mark.parametrize(("command", "asked"), [("suspend", ["suspend", "commit"]), ("checkpoint", ["checkpoint"])])
def test_where_the_caller_may_not_write_the_monitor_is_asked_to(monkeypatch, tmp_path, command, asked):
    def refuse(_path, _flags, *_more, **_options):
        raise PermissionError(errno.EACCES, "Permission denied")

    class Alone(Monitor):
        def watch(self, command, _on_event, /, **params):
            assert self.handed is None
            self._called(command, params)
            return Reply("", {"image_bytes": 5})

    monkeypatch.setattr(os, "open", refuse)
    monitor, path = Alone(), str(tmp_path / "guest.img")
    images.save(monitor, command, {"file": path})
    assert monitor.commands == asked
    assert monitor.calls[0][1] == {"file": path}
    images.restore(monitor, {"file": path})
    assert monitor.calls[-1] == ("restore", {"file": path})
    refused = Alone(refuse=command)
    with pytest.raises(WrongStateError):
        images.save(refused, command, {"file": path})
    assert refused.commands == [command]
