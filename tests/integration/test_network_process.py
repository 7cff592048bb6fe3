# SPDX-License-Identifier: GPL-2.0-or-later
"""The real network worker and the real kernel: interfaces into bridges. Needs root.

A pair of virtual Ethernet interfaces stands for a backend's: one end has the name of that, the other one is the guest.
"""

import json
import os
import pwd
import select
import subprocess
import time
from pathlib import Path

import prctl
import pytest

from xenvm.boundary.devices import Vif
from xenvm.boundary.messages import NO_DOMAIN, Done, Failed, Hello
from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Join
from xenvm.broker.bridges import bridges
from xenvm.broker.children import Child
from xenvm.errors import ExitCode

WAIT_S = 60
DOMID = 32000  # of no guest: this is no Xen host
NET = Path("/sys/class/net")
NAME = f"xt{os.getpid() % 100000}"
FIRST, SECOND = f"{NAME}a", f"{NAME}b"
MAC = "00:16:3e:00:00:0{}"


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def vif(number):
    return f"vif{DOMID}.{number}"


def add(number):
    ip("link", "add", vif(number), "type", "veth", "peer", "name", f"{NAME}g{number}")


@pytest.fixture
def net():
    """Two bridges, one with large frames."""
    ip("link", "add", FIRST, "type", "bridge")
    ip("link", "add", SECOND, "mtu", "9000", "type", "bridge")
    yield
    for path in NET.iterdir():
        if path.name in (FIRST, SECOND) or path.name.startswith(f"vif{DOMID}."):
            subprocess.run(["ip", "link", "delete", path.name], capture_output=True, check=False)
    assert not [path for path in NET.iterdir() if path.name.startswith(NAME)]


class Worker:
    """A confined worker that waits for its request."""

    def __init__(self, tmp_path):
        log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.child = Child(Role.NETWORK, log, {}, "-")
        os.close(log)
        self.log = tmp_path / "log"
        hello, _ = self.child.channel.receive(deadline_s=WAIT_S)
        assert isinstance(hello, Hello)
        self.proof = json.loads(hello.proof)

    def ask(self, message):
        self.child.channel.send(message)
        return self

    def answer(self):
        received = self.child.channel.receive(deadline_s=WAIT_S)
        self.child.end(grace_ms=WAIT_S * 1000)
        assert self.log.read_text() == ""
        return received[0] if received else None

    def silent(self, seconds):
        return not select.select([self.child.channel], [], [], seconds)[0]


@pytest.fixture
def worker(users, net, tmp_path):
    made = []

    def make():
        made.append(Worker(tmp_path))
        return made[-1]

    yield make
    for each in made:
        each.child.end()


def join(*cards, timeout_s=30):
    return Join(DOMID, tuple(Vif(number, bridge, MAC.format(number)) for number, bridge in cards), timeout_s)


def state(number):
    """Return bridge, address, MTU and whether it is switched on."""
    path = NET / vif(number)
    master = path / "master"
    return (
        master.resolve().name if master.exists() else "",
        (path / "address").read_text().strip(),
        int((path / "mtu").read_text()),
        bool(int((path / "flags").read_text(), 16) & 1),
    )


def test_it_keeps_one_capability(worker):
    made = worker()
    uid = pwd.getpwnam("xenvm-network").pw_uid
    assert (made.proof["uid"], made.proof["seccomp"], made.proof["no_new_privs"]) == (uid, 2, True)
    only = f"{1 << prctl.CAP_NET_ADMIN:x}"
    assert made.proof["capabilities"] == {"CapInh": "0", "CapPrm": only, "CapEff": only, "CapBnd": only, "CapAmb": "0"}


def test_interfaces_join_their_bridges(worker):
    """With the highest address, the bridge's MTU, and switched on; a bridge takes the lowest one of its ports."""
    for number in range(2):
        add(number)
    ip("link", "set", f"{NAME}g1", "master", FIRST)
    address = (NET / FIRST / "address").read_text()
    assert isinstance(worker().ask(join((0, FIRST), (1, SECOND))).answer(), Done)
    assert state(0) == (FIRST, "fe:ff:ff:ff:ff:ff", 1500, True)
    assert state(1) == (SECOND, "fe:ff:ff:ff:ff:ff", 9000, True)
    assert (NET / FIRST / "address").read_text() == address != "fe:ff:ff:ff:ff:ff\n"


def test_it_waits_for_the_kernel_to_make_one(worker):
    made = worker().ask(join((3, FIRST)))
    assert made.silent(0.3)
    add(3)
    assert isinstance(made.answer(), Done)
    assert state(3)[0] == FIRST


def test_it_waits_only_so_long_and_names_what_never_came(worker):
    before = time.monotonic()
    failed = worker().ask(join((3, FIRST), timeout_s=1)).answer()
    assert 1 <= time.monotonic() - before < 20
    assert isinstance(failed, Failed)
    assert failed.fault.code == ExitCode.TIMED_OUT
    assert failed.fault.message == f"network card 3: the kernel made no interface {vif(3)} within 1 s"
    assert "xen-netback" in failed.fault.hint


def test_doing_it_again_does_no_harm(worker):
    add(0)
    for _ in range(3):
        assert isinstance(worker().ask(join((0, FIRST))).answer(), Done)
    assert state(0) == (FIRST, "fe:ff:ff:ff:ff:ff", 1500, True)


def test_one_that_is_up_moves_to_another_bridge(worker):
    add(0)
    for bridge, mtu in ((FIRST, 1500), (SECOND, 9000), (FIRST, 1500)):
        assert isinstance(worker().ask(join((0, bridge))).answer(), Done)
        assert state(0) == (bridge, "fe:ff:ff:ff:ff:ff", mtu, True)


@pytest.mark.parametrize("bridge", ["none", vif(1), "lo"])
def test_what_is_no_bridge_is_refused(worker, bridge):
    for number in range(2):
        add(number)
    failed = worker().ask(join((0, bridge))).answer()
    assert isinstance(failed, Failed)
    assert failed.fault.message == f"network card 0: {bridge} is no bridge"
    assert failed.fault.hint == f"ip link add {bridge} type bridge"
    assert state(0)[0] == ""
    assert not state(0)[3]


def test_it_does_nothing_else(worker):
    failed = worker().ask(Done(0, NO_DOMAIN, "")).answer()
    assert isinstance(failed, Failed)
    assert "joins interfaces only" in failed.fault.message


def test_the_broker_sees_the_bridges(net):
    found = bridges()
    assert {FIRST, SECOND} <= set(found)
    assert found == sorted(found)
    assert "lo" not in found
