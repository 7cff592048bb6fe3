# SPDX-License-Identifier: GPL-2.0-or-later
"""How helpers wait for their request, and how they say what has failed."""

import importlib
import types

import pytest

from xenvm.boundary.messages import NO_DOMAIN, Domain, DomainState, Failed, Fault, Op, Phase
from xenvm.broker.phases import PERMITS, extra_s
from xenvm.errors import BusyError
from xenvm.helpers import serve, xenstored

LARGE_MIB = 32 << 10
NAMES = ("hotplug", "network", "image", "storage", "unpacker", "stream", "devicemodel", "qmp")


class Channel:
    """A broker that starts a helper and ends without a request."""

    def __init__(self):
        self.sent, self.waited_s = [], []

    def send(self, message, descriptors=()):
        assert not descriptors
        self.sent.append(message)

    def receive(self, *, deadline_s):
        self.waited_s.append(deadline_s)


class Opened:
    def fileno(self):
        return 3


@pytest.fixture
def channel(monkeypatch):
    made = Channel()
    monkeypatch.setattr(serve, "broker_channel", lambda: made)
    monkeypatch.setattr(serve, "drop", lambda _role, _keep: "hello")
    monkeypatch.setattr(xenstored, "connect", Opened)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_helper_waits_as_long_as_the_restore_of_a_large_guest_may_take(channel, monkeypatch, name):
    """Those that are started with a restore are needed when its image has been read whole, and its domain made."""
    module = importlib.import_module(f"xenvm.helpers.{name}.main")
    if name == "devicemodel":
        monkeypatch.setattr(module, "_first_uid", lambda: 64000)
        monkeypatch.setattr(module, "major_version", lambda: 7)
    if name == "network":
        monkeypatch.setattr(module, "link", types.SimpleNamespace(connect=lambda _wait_s: Opened()))
    assert module.main() == 0
    assert channel.sent == ["hello"]
    (waited_s,) = channel.waited_s
    assert waited_s > PERMITS[Op.RESTORE].deadline_s + extra_s(Op.RESTORE, LARGE_MIB, live=False)


def test_a_failure_is_told_with_all_that_is_known_of_it(channel):
    left = Domain(-1, DomainState.ABSENT, Phase.BUILDING, -1, 0, 0, 0)
    error = BusyError("m" * 5000, hint="h" * 2000)
    assert serve.fail(channel, error, left) == 1
    assert serve.fail(channel, BusyError("why")) == 1
    told, plain = channel.sent
    assert told == Failed(0, Fault(9, "m" * 4000, "h" * 1000), left)
    assert plain == Failed(0, Fault(9, "why", ""), NO_DOMAIN)
    assert Failed.from_body(told.as_body()) == told
