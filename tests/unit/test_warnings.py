# SPDX-License-Identifier: GPL-2.0-or-later
"""What is no error and yet to be said: from the broker to the terminal, the journal and the device model's nodes."""

import os

import pytest
from test_devicemodel import PLAIN

from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Outcome
from xenvm.boundary.place import Place
from xenvm.broker import service
from xenvm.cli import xenvm
from xenvm.helpers.builder import tree

WARNING = "/a.cfg:5: warning: `oem-features`: no effect\n"
UUID = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def launcher(monkeypatch):
    """Make a Launcher in the background, with the end that `xenvm` listens on."""
    ours, theirs = Channel.pair()
    monkeypatch.setattr(service, "LAUNCHER", os.dup(theirs.fileno()))
    theirs.close()
    made = service.Launcher(background=True, notify="")
    made.uuid, made.warnings = UUID, WARNING
    yield made, ours
    ours.close()


def test_they_reach_whoever_has_started_the_monitor(launcher):
    made, ours = launcher
    made.tell(0, "")
    assert ours.receive(deadline_s=5)[0] == Outcome(0, UUID, "", WARNING)


def test_a_start_that_failed_has_worse_to_say(launcher):
    made, ours = launcher
    made.tell(1, "no memory")
    assert ours.receive(deadline_s=5)[0] == Outcome(1, UUID, "no memory", "")


def test_many_of_them_are_cut_to_what_a_frame_holds(launcher):
    made, ours = launcher
    made.warnings = "\U0001f600" * 60000
    made.tell(0, "")
    told = ours.receive(deadline_s=5)[0].warnings
    assert told.endswith("\n...")
    assert len(told) > 1000


def test_in_the_foreground_they_go_to_the_journal_and_then_the_outcome(capfd):
    made = service.Launcher(background=False, notify="")
    made.warnings = WARNING
    made.tell(0, "the guest does not run: destroyed")
    assert capfd.readouterr() == ("", f"{WARNING}the guest does not run: destroyed\n")


@pytest.mark.parametrize("warnings", ["", f"{WARNING}\x1b[31m\n"])
def test_the_terminal_shows_them_beside_the_uuid(monkeypatch, capfd, warnings):
    def spawn(_role, inherited, *_words, new_session):
        channel = Channel.from_descriptor(os.dup(inherited[xenvm.STATUS]))
        channel.send(Outcome(0, UUID, "", warnings))
        channel.close()
        assert new_session
        return 1

    monkeypatch.setattr(xenvm, "spawn", spawn)
    config = os.open("/dev/null", os.O_RDONLY)
    assert xenvm._start("/a.cfg", config, Place(), foreground=False) == 0
    os.close(config)
    assert capfd.readouterr() == (f"{UUID}\n", warnings.replace("\x1b", "\\x1b"))


class Store:
    """Nodes and their permissions; a directory's are those of what is made in it."""

    def __init__(self):
        self.nodes, self.owners = {}, {}

    def make(self, path):
        self.nodes.setdefault(path, "")

    def write(self, path, value):
        self.nodes[path] = value

    def permissions(self, path, *owners):
        self.owners[path] = owners

    def remove(self, path):
        self.nodes = {node: value for node, value in self.nodes.items() if node != path and path not in node}

    def transaction(self, steps):
        steps()


def test_a_device_model_that_knows_the_settings_finds_them():
    store, model = Store(), "/local/domain/0/device-model/7"
    store.write(f"{model}/state", "left by an earlier domain 7")
    tree.write_machine(store, 7, UUID, PLAIN.but(power_management=1, oem_features=5, inject_sci=2))
    found = {path: value for path, value in store.nodes.items() if path.startswith(model)}
    assert found == {
        model: "",
        f"{model}/xen_extended_power_mgmt": "1",
        f"{model}/oem_features": "5",
        f"{model}/inject-sci": "2",
    }
    assert store.owners[model] == ("n0",)
    tree.write_machine(store, 7, UUID, PLAIN)
    assert [path for path in store.nodes if path.startswith(model)] == [model]
