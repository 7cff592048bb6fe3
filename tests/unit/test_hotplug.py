# SPDX-License-Identifier: GPL-2.0-or-later
"""What a hotplug worker does with its one job, its broker played by the test, over a xenstore in memory."""

import os

import pytest
from backends import Kernel, Manner, Memory

from xenvm.boundary.devices import DeviceState, Kind, Vbd, Vif
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import NO_DOMAIN, Created, Done, Failed, Fault, Grants, Job, Op, Ready
from xenvm.errors import BusyError, ExitCode, ProtocolError, TimeoutExpiredError, WrongStateError, XenvmError
from xenvm.helpers import devices
from xenvm.helpers.exchange import Devices
from xenvm.helpers.hotplug import main as hotplug

UUID = "11111111-2222-4333-8444-555555555555"
GRANTS = Grants(*(UUID, "web", "/k", "", "", 64, 64, 1, True, (), (), False, "", (), (), 40))
PLANNED = Vbd(51712, "xvda", False, False, False, "file:/a", -1, -1, "")
OPEN = PLANNED.but(major=7, minor=3)
CARD = Vif(0, "br0", "00:16:3e:00:00:01")
CD = Vbd(51728, "xvdb", True, True, False, "file:/a.iso", -1, -1, "")


class Bench:
    """A worker's ends, and the broker's."""

    def __init__(self, tmp_path):
        self.store = Memory()
        self.kernel = Kernel(self.store, tmp_path)
        self.store.make("/local/domain/7")
        self.channel, self.broker = Channel.pair()

    def say(self, message):
        """Let the broker say something, before it is asked: the channel keeps it."""
        self.broker.send(message)

    def heard(self):
        message, descriptors = self.broker.receive_now()
        assert descriptors == []
        return message

    def run(self, op, domid=7, **what):
        return hotplug._run(self.channel, self.store, Job(op, UUID, domid, GRANTS, **what))

    def plug(self, vbd=None, vif=None, **what):
        self.say(Ready((vbd.but(major=7, minor=3),) if vbd else ()))
        done = self.run(Op.PLUG, vbds=(vbd,) if vbd else (), vifs=(vif,) if vif else (), **what)
        assert self.heard() == Created(7, ())
        return done

    def nodes(self):
        return [path for path in self.store.nodes if "/vbd" in path or "/vif" in path or "/xenvm" in path]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = Bench(tmp_path)
    monkeypatch.setattr(devices, "SYSFS", str(tmp_path))
    monkeypatch.setattr(devices, "time", made.kernel)
    yield made
    made.channel.close()
    made.broker.close()


def connect_all(bench):
    """Let the guest take whatever is plugged as soon as it can."""
    sleep = bench.kernel.sleep

    def and_connect(seconds):
        for name in bench.kernel.devices():
            place = tuple(name.split("-"))
            if bench.store.read(f"/local/domain/0/backend/{'/'.join(place)}/hotplug-status") == b"connected":
                bench.kernel.connect(place)
        sleep(seconds)

    bench.kernel.sleep = and_connect


# Plugging


@pytest.mark.parametrize(("vbd", "vif"), [(PLANNED, None), (None, CARD)], ids=["disk", "card"])
def test_a_device_is_plugged(bench, vbd, vif):
    connect_all(bench)
    done = bench.plug(vbd, vif)
    assert (done.text, done.domain) == ("connected", NO_DOMAIN)
    (state,) = done.devices
    assert (state.kind, state.backend) == (Kind.VBD if vbd else Kind.VIF, 4)


def test_a_guest_that_does_not_take_it_is_no_failure(bench):
    done = bench.plug(PLANNED)
    assert done.text == "plugged; the guest has not taken it yet"
    assert done.devices[0].backend == 2
    assert bench.store.read("/local/domain/0/backend/vbd/7/51712/physical-device") == b"7:3"


def test_the_nodes_are_there_before_the_broker_hears_of_it(bench):
    """Only then: it bridges interfaces that the kernel makes because of the nodes."""
    send, seen = bench.channel.send, []
    bench.channel.send = lambda message: (seen.append(set(bench.store.nodes)), send(message))
    bench.plug(PLANNED)
    assert "/local/domain/0/backend/vbd/7/51712/frontend" in seen[0]
    assert f"/xenvm/{UUID}/vbd/51712/domid" in seen[0]


@pytest.mark.parametrize("reason", ["the broker", "the kernel", "another guest", "the broker's end"])
def test_what_fails_leaves_nothing(bench, reason):
    bench.plug(PLANNED.but(device=51744, name="xvdc", source="file:/c"))
    before = dict(bench.store.nodes)
    code, match = ExitCode.FAILED, "not said"
    if reason == "the broker":
        bench.say(Failed(0, Fault(9, "disk xvda: /a is in use", "share=true"), NO_DOMAIN))
        code, match = ExitCode.BUSY, "disk xvda: /a is in use"
    elif reason == "the kernel":
        bench.kernel.opens = False
        bench.say(Ready((OPEN.but(minor=4),)))
        code, match = ExitCode.TIMED_OUT, "did not open file:/a"
    elif reason == "another guest":
        bench.say(Ready((OPEN,)))  # xvdc has this very device
        code, match = ExitCode.BUSY, "in use by domain 7"
    else:
        bench.broker.close()
        code, match = ExitCode.FAILED, "peer is gone"
    with pytest.raises(XenvmError, match=match) as caught:
        bench.run(Op.PLUG, vbds=(PLANNED,))
    assert caught.value.code is code
    if reason != "the broker's end":  # then nobody is there for whom to tidy up: the next look does it
        assert bench.store.nodes == before
        assert bench.kernel.devices() == ["vbd-7-51744"]
        assert bench.heard() == Created(7, ())
    else:
        devices.settle(bench.store, UUID, 7)
        assert bench.kernel.devices() == ["vbd-7-51744"]


def test_a_device_that_the_guest_has_is_refused(bench):
    bench.plug(PLANNED)
    before = dict(bench.store.nodes)
    with pytest.raises(BusyError, match="has such a device already"):
        bench.run(Op.PLUG, vbds=(PLANNED.but(source="file:/b"),))
    assert bench.store.nodes == before
    with pytest.raises(BlockingIOError):
        bench.heard()


def test_a_new_disc_takes_the_place_of_the_old_one(bench):
    bench.plug(CD)
    done = bench.plug(CD.but(source="file:/b.iso"))
    assert [(state.device, state.detail) for state in done.devices] == [(51728, "file:/b.iso")]


def test_a_drive_whose_disc_the_guest_holds_keeps_it(bench):
    bench.plug(CD)
    bench.kernel.manners["vbd", "7", "51728"] = Manner.DEAF
    bench.kernel.connect(("vbd", "7", "51728"))
    said = r"disk xvdb: the guest did not let go within 2 s \(node .*/backend/vbd/7/51728/state did not become 6\)"
    with pytest.raises(TimeoutExpiredError, match=said):
        bench.run(Op.PLUG, vbds=(CD.but(source="file:/b.iso"),), timeout_s=2)
    (state,) = devices.look(bench.store, UUID, 7)
    assert state.detail == "file:/a.iso"


def test_a_disc_never_takes_the_place_of_a_disk(bench):
    """A slip of a letter must not take the root disk away."""
    bench.plug(PLANNED)
    before = dict(bench.store.nodes)
    with pytest.raises(XenvmError, match="xvda is no CD drive"):
        bench.run(Op.PLUG, vbds=(PLANNED.but(read_only=True, cdrom=True, source="file:/a.iso"),))
    assert bench.store.nodes == before


# Everything else


def test_a_device_is_taken_away(bench):
    bench.plug(PLANNED)
    bench.plug(vif=CARD)
    done = bench.run(Op.UNPLUG, kind=Kind.VBD, device=51712, timeout_s=5)
    assert [(state.kind, state.device) for state in done.devices] == [(Kind.VIF, 0)]
    done = bench.run(Op.UNPLUG, kind=Kind.VIF, device=0, timeout_s=5)
    assert done.devices == ()
    assert bench.kernel.devices() == []


def test_force_takes_it_away_from_a_guest_that_does_not_let_go(bench):
    bench.plug(PLANNED)
    bench.kernel.manners["vbd", "7", "51712"] = Manner.DEAF
    bench.kernel.connect(("vbd", "7", "51712"))
    with pytest.raises(TimeoutExpiredError):
        bench.run(Op.UNPLUG, kind=Kind.VBD, device=51712, timeout_s=2)
    assert bench.run(Op.UNPLUG, kind=Kind.VBD, device=51712, timeout_s=2, force=True).devices == ()


def test_only_a_disc_is_ejected(bench):
    bench.plug(PLANNED)
    with pytest.raises(WrongStateError, match="disk xvda is no disc in a CD drive"):
        bench.run(Op.UNPLUG, kind=Kind.VBD, device=51712, disc=True, force=True)
    assert bench.run(Op.UNPLUG, kind=Kind.VBD, device=51712, force=True).devices == ()
    bench.plug(CD)
    assert bench.run(Op.UNPLUG, kind=Kind.VBD, device=51728, disc=True, force=True).devices == ()


@pytest.mark.parametrize(("kind", "device"), [(Kind.VBD, 51712), (Kind.VIF, 0), (Kind.VBD, 0)])
def test_a_device_that_is_not_there_is_not_taken_away(bench, kind, device):
    bench.store.write("/local/domain/0/backend/vbd/7/51712/frontend", "somebody else's")
    with pytest.raises(WrongStateError, match=f"the guest has no {devices.named(kind, device)}$"):
        bench.run(Op.UNPLUG, kind=kind, device=device)
    assert bench.store.read("/local/domain/0/backend/vbd/7/51712/frontend") == b"somebody else's"


def test_a_card_moves_when_the_broker_has_moved_it(bench):
    bench.plug(vif=CARD)
    bench.say(Ready(()))
    done = bench.run(Op.REBRIDGE, vifs=(CARD.but(bridge="dmz"),))
    assert bench.heard() == Created(7, ())
    assert done.devices[0].bridge == "dmz"
    bench.say(Failed(0, Fault(1, "network card 0: no bridge", ""), NO_DOMAIN))
    with pytest.raises(XenvmError, match="no bridge"):
        bench.run(Op.REBRIDGE, vifs=(CARD.but(bridge="gone"),))
    assert devices.look(bench.store, UUID, 7)[0].bridge == "dmz"


def test_a_card_that_is_not_there_does_not_move(bench):
    with pytest.raises(WrongStateError, match="the guest has no network card 5"):
        bench.run(Op.REBRIDGE, vifs=(CARD.but(id=5),))
    with pytest.raises(BlockingIOError):
        bench.heard()


def test_looking_and_settling(bench):
    bench.plug(PLANNED)
    assert bench.run(Op.DEVICES).devices == (DeviceState(Kind.VBD, 51712, "xvda", 2, 1, False, "file:/a", "", ""),)
    devices.write(bench.store, UUID, 7, (CD,), ())
    assert [state.device for state in bench.run(Op.SETTLE).devices] == [51712]


def test_looking_where_there_is_no_domain(bench):
    """It tells of the record, and of the devices in it: neither would be there had their domain ended well."""
    assert bench.run(Op.DEVICES, domid=-1) == Done(0, NO_DOMAIN, "")
    bench.plug(PLANNED)
    bench.store.write(f"/xenvm/{UUID}/domid", "7")
    nodes = dict(bench.store.nodes)
    done = bench.run(Op.DEVICES, domid=-1)
    assert done.text == f"xenstore: /xenvm/{UUID} is left of domain 7; doctor clean=true removes it"
    assert [state.name for state in done.devices] == ["xvda"]
    assert bench.store.nodes == nodes
    bench.store.write(f"/xenvm/{UUID}/domid", "\x1b[31m")
    assert "is left of a domain;" in bench.run(Op.DEVICES, domid=-1).text


@pytest.mark.parametrize("op", sorted(set(Op) - {Op.PLUG, Op.UNPLUG, Op.REBRIDGE, Op.SETTLE, Op.DEVICES}))
def test_what_is_no_job_for_it(bench, op):
    before = dict(bench.store.nodes)
    with pytest.raises(ProtocolError, match="no job of a hotplug worker"):
        bench.run(op)
    assert bench.store.nodes == before


# The talk with the broker


def talk(bench, **what):
    what = {"vbds": (PLANNED,), "timeout_s": 1} | what
    return Devices(bench.channel, bench.store, Job(Op.BUILD, UUID, -1, GRANTS, **what))


def test_a_job_without_devices_needs_no_talk(bench):
    exchange = talk(bench, vbds=())
    exchange.begin(7)
    exchange.finish(7)
    with pytest.raises(BlockingIOError):
        bench.heard()
    assert bench.nodes() == []


def test_the_devices_of_the_domain_before_are_passed_on_also_when_the_next_one_has_none(bench):
    """What served them must not stay."""
    earlier = (DeviceState(Kind.VBD, 51712, "xvda", 4, 4, False, "qcow:/a", "", "4711 5"),)
    exchange = talk(bench, vbds=())
    exchange.begin(9, earlier)
    assert bench.heard() == Created(9, earlier)
    exchange.finish(9)
    assert bench.nodes() == []


def test_the_devices_of_the_domain_before_are_passed_on(bench):
    earlier = (DeviceState(Kind.VBD, 51712, "xvda", 4, 4, False, "qcow:/a", "", "4711 5"),)
    talk(bench).begin(9, earlier)
    assert bench.heard() == Created(9, earlier)


def test_a_broker_that_says_nothing_is_waited_for_only_so_long(bench):
    exchange = talk(bench, vifs=(CARD,))
    exchange.begin(7)
    with pytest.raises(TimeoutExpiredError, match="disk xvda, network card 0: .* within 1 s") as caught:
        exchange.finish(7)
    nodes = f"/local/domain/0/backend/vbd/7/51712/physical-device, {devices.INTERFACES}/vif7.0/master"
    assert caught.value.message.endswith(f"(nothing in {nodes})")
    assert "device-timeout" in caught.value.hint


@pytest.mark.parametrize(
    "answer", [Created(7, ()), Done(0, NO_DOMAIN, ""), None], ids=lambda answer: type(answer).__name__
)
def test_any_other_word_of_the_broker_ends_the_job(bench, answer):
    exchange = talk(bench)
    exchange.begin(7)
    bench.broker.send(answer) if answer else bench.broker.close()
    with pytest.raises(ProtocolError, match="did not say whether the devices are ready"):
        exchange.finish(7)


def test_the_brokers_reason_keeps_its_code_and_hint(bench):
    exchange = talk(bench)
    exchange.begin(7)
    bench.say(Failed(0, Fault(8, "not open to this VM", "ask the administrator"), NO_DOMAIN))
    with pytest.raises(XenvmError, match="not open to this VM") as caught:
        exchange.finish(7)
    assert (caught.value.code, caught.value.hint) == (ExitCode.PERMISSION_REFUSED, "ask the administrator")


def test_no_descriptor_stays(bench):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        bench.plug(PLANNED)
        bench.run(Op.UNPLUG, kind=Kind.VBD, device=51712, timeout_s=5)
    assert len(os.listdir("/proc/self/fd")) == before
