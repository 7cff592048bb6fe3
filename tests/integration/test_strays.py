# SPDX-License-Identifier: GPL-2.0-or-later
"""What dead workers of a VM left, found by its label: real processes of the image user, a /sys made by the test. Needs root."""

import subprocess
import sys

import pytest
from children import FakeChild

from xenvm.boundary.devices import label
from xenvm.boundary.messages import NO_DOMAIN, Done, Failed, Fault
from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Release
from xenvm.broker import strays
from xenvm.broker.servers import server_text
from xenvm.errors import XenvmError

UUID = "11111111-2222-4333-8444-555555555555"
OTHER = "22222222-2222-4333-8444-555555555555"
WAIT_S = 30
SERVER = "import time; print(1, flush=True); time.sleep(60)"


@pytest.fixture
def server(users):
    """Start a process of the image user that has this in its command line."""
    made = []

    def start(words, user="xenvm-image"):
        child = subprocess.Popen([sys.executable, "-I", "-c", SERVER, words], user=user, stdout=subprocess.PIPE)
        made.append(child)
        assert child.stdout.read(1) == b"1"
        return child

    yield start
    for child in made:
        child.kill()
        child.wait(WAIT_S)
        child.stdout.close()


@pytest.fixture
def block(tmp_path, monkeypatch):
    """Make a block device in a /sys/block of the test's own."""
    monkeypatch.setattr(strays, "BLOCK_DEVICES", str(tmp_path / "block"))
    (tmp_path / "block").mkdir()

    def make(name, node, text):
        path = tmp_path / "block" / name / node
        path.parent.mkdir(parents=True)
        path.write_text(text + "\n")

    return make


def exports(uuid, device):
    return f'{{"type":"nbd","id":"{label(uuid, device)}","node-name":"image"}}'


def test_a_server_of_no_disk_is_found_and_ended(server, block):
    stray, used, other = server(exports(UUID, 51712)), server(exports(UUID, 51728)), server(exports(OTHER, 51712))
    foreign = server(exports(UUID, 51712), user="xenvm")
    found = strays.find(UUID, {51728}, {server_text(used.pid)})
    assert found == strays.Strays((server_text(stray.pid),), (), ())
    assert found.sentences() == [f"image server {stray.pid}: no disk uses it; doctor clean=true removes it"]
    strays.clear(found, UUID, 2)
    assert stray.wait(WAIT_S) != 0
    assert [child.poll() for child in (used, other, foreign)] == [None, None, None]
    assert strays.find(UUID, {51728}, {server_text(used.pid)}) == strays.Strays((), (), ())
    strays.clear(found, UUID, 2)  # twice is harmless


def test_devices_of_no_disk_are_found(block):
    block("nbd0", "backend", label(UUID, 51712))
    block("nbd1", "backend", label(UUID, 51728))
    block("nbd2", "backend", label(OTHER, 51712))
    block("nbd3", "size", "0")
    block("dm-0", "dm/name", label(UUID, 51744))
    block("dm-1", "dm/name", "vg0-web")
    found = strays.find(UUID, {51728}, ())
    assert (found.nbds, found.mappings) == ((0,), (label(UUID, 51744),))
    assert len(found.sentences()) == 2


@pytest.mark.parametrize("answer", [Done(0, NO_DOMAIN, ""), Failed(0, Fault(1, "busy", "wait"), NO_DOMAIN), None])
def test_devices_are_removed_by_a_storage_worker(answer, monkeypatch):
    FakeChild.made = []

    def child(*arguments):
        made = FakeChild(*arguments)
        if answer:
            made.there.send(answer)
        else:
            made.die()
        return made

    monkeypatch.setattr(strays, "Child", child)
    left = strays.Strays((), (3,), (label(UUID, 51744),))
    if isinstance(answer, Done):
        strays.clear(left, UUID, 2)
    else:
        with pytest.raises(XenvmError, match="busy" if answer else "peer is gone|without an answer"):
            strays.clear(left, UUID, 2)
    (worker,) = FakeChild.made
    assert (worker.role, worker.killed) == (Role.STORAGE, True)


def test_what_the_worker_is_asked(monkeypatch):
    FakeChild.made, asked = [], []

    def ask(_child, message, _deadline_s):
        asked.append(message)
        return Done(0, NO_DOMAIN, "")

    monkeypatch.setattr(strays, "Child", FakeChild)
    monkeypatch.setattr(strays, "ask_once", ask)
    strays.clear(strays.Strays((), (3, 4), ("a",)), UUID, 2)
    assert asked == [Release(("a",), (3, 4))]
    FakeChild.made[0].end()
