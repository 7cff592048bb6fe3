# SPDX-License-Identifier: GPL-2.0-or-later
"""A broker whose children are all played by the test."""

import os
import select
import socket

import psutil
import pytest
from children import FakeChild

from xenvm.boundary.messages import Ask, Domain, DomainState, Failed, Fault, Grants, HostPolicy, Init, Op, Phase, Policy
from xenvm.broker import bridges, core, images, making, models, plugging, spares, talks, tidying, work
from xenvm.broker.core import Broker
from xenvm.errors import XenvmError

UUID = "11111111-2222-4333-8444-555555555555"
RUNNING = Domain(7, DomainState.RUNNING, Phase.BUILT, -1, 65536, 1, 5)
FAULT = Fault(1, "no", "")


class Acts:
    def __init__(self):
        self.records = []
        self.full = False

    def append(self, act, **details):
        if self.full:
            raise XenvmError("the log is full")
        self.records.append((act, details))

    def of(self, act):
        return [details for name, details in self.records if name == act]


class Bench:
    """A broker with its supervisor's and its builders' places taken by the test."""

    def __init__(self, tmp_path):
        self.kernel = tmp_path / "kernel"
        self.kernel.write_bytes(b"\x7fELF")  # handed over as it is
        self.grants = Grants(
            *(UUID, "web", str(self.kernel), "", "", 64, 64, 1, True, (), (), False, "", (), (), 40),
        )
        self.acts, self.told = Acts(), []
        self.listener = socket.socket(socket.AF_UNIX)
        self.wakeup, self.signals = os.pipe()
        self.reloaded = []
        self.host_policy = HostPolicy("", ())
        self.broker = Broker(
            grants=self.grants,
            policy=Policy("started", "destroy", "reboot", "destroy", 60, 40),
            fields={"name": "web"},
            host_policy=self.host_policy,
            directory=str(tmp_path),
            config_file="/etc/a.cfg",
            listener=self.listener,
            log=2,
            acts=self.acts,
            reload_config=self.reload,
            started=lambda code, text: self.told.append((code, text)),
            spare=None,
        )
        self.broker._start_supervisor(first=True)
        assert isinstance(self.heard(), Init)

    def reload(self):
        self.reloaded.append(1)
        return self.grants, Policy("started", "preserve", "reboot", "destroy", 60, 40), {}, self.host_policy

    def close(self):
        self.broker._book.saved = False  # nobody is there who would resume the guest, or remove half of it
        if self.broker._work:
            self.broker._work.abandon()
            self.broker._work = None
        self.broker._phase = core.VmPhase.UNKNOWN
        self.broker._end_children()
        for child in FakeChild.made:
            child.end()
        for descriptor in (self.wakeup, self.signals):
            os.close(descriptor)
        for end in (self.listener, self.broker._events_in, self.broker._events_out):
            end.close()

    @property
    def supervisor(self):
        return self.broker._supervisor

    @property
    def builder(self):
        return self.broker._work.builder

    def known(self, domain):
        """Let the broker know what a builder has found."""
        self.broker._learn(domain)

    def turn(self):
        self.broker._turn(self.wakeup)

    def turns(self):
        """Let the broker do one turn if anything waits for it; tell whether."""
        poll = select.poll()
        for child in (self.supervisor, *self.broker._work.children):
            poll.register(child.channel.fileno(), select.POLLIN)
        waits = bool(poll.poll(0))
        if waits:
            self.turn()
        return waits

    def ask(self, op, sequence=1, text="", code=0):
        self.supervisor.there.send(Ask(sequence, op, text, code))
        self.turn()

    def send(self, message, descriptors=()):
        self.supervisor.there.send(message, descriptors)
        self.turn()

    def heard(self):
        """Return the next message to the supervisor; its descriptors are closed."""
        message, descriptors = self.supervisor.there.receive(deadline_s=5)
        for descriptor in descriptors:
            os.close(descriptor)
        return message

    def silent(self):
        with pytest.raises(BlockingIOError):
            self.supervisor.there.receive_now()
        return True

    def job(self):
        """Return the running builder's job and how many descriptors came along."""
        message, descriptors = self.builder.there.receive(deadline_s=5)
        for descriptor in descriptors:
            os.close(descriptor)
        return message, len(descriptors)

    def answer(self, message, descriptors=()):
        self.builder.there.send(message, descriptors)
        self.turn()

    def look(self, message):
        """Answer whoever looks what a failed job has left."""
        assert self.job()[0].op is Op.FIND
        self.answer(message)

    def refused(self, code=None):
        message = self.heard()
        assert isinstance(message, Failed)
        assert code is None or message.fault.code == code
        return message.fault.message


def bench(monkeypatch, tmp_path):
    """Give a bench, and take care that nothing of it stays open; for a fixture."""
    FakeChild.made = []
    for module in (core, images, making, plugging, models, spares, talks, tidying, work):
        monkeypatch.setattr(module, "Child", FakeChild)
    monkeypatch.setattr(bridges, "bridges", lambda: ["br0"])
    before = psutil.Process().num_fds()
    made = Bench(tmp_path)
    yield made
    made.close()
    assert psutil.Process().num_fds() == before
