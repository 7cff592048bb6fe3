# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker and the devices of its VM: jobs with their workers, changes by command, hints of udev."""

import errno
import os
import socket

import devices_bench
import pytest
from broker_bench import FAULT, RUNNING
from children import FakeChild
from devices_bench import ADDED, CARD, DISK, MORE, NIC, SEEN, devices_of, plug, said, tell, workers

from xenvm.boundary.devices import Kind, Vif
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Created,
    Done,
    Failed,
    Fault,
    Hello,
    HostPolicy,
    Op,
    Phase,
    Plug,
    Ready,
    Rebridge,
    Unplug,
)
from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Decrypt, Join
from xenvm.broker import findings, strays, uevents
from xenvm.broker.phases import PERMITS, VmPhase
from xenvm.broker.work import POSTPONED_LIMIT
from xenvm.errors import BusyError, ExitCode
from xenvm.helpers import devices

# A domain with its devices


@pytest.fixture
def bench(monkeypatch, tmp_path):
    yield from devices_bench.bench(monkeypatch, tmp_path)


def test_a_domain_is_built_with_its_devices(bench):
    devices_of(bench, disks=(DISK,), nics=(NIC,)).known(NO_DOMAIN)
    bench.ask(Op.BUILD, 3)
    job, images = bench.job()
    assert images == 1
    assert [(vbd.name, vbd.source, vbd.major) for vbd in job.vbds] == [("xvda", "phy:/dev/vg/a", -1)]
    assert job.vifs == (Vif(0, "br0", NIC.mac),)
    assert bench.opened == []  # not before the nodes are there, and an earlier domain has let go of the disk
    (network,) = workers(Role.NETWORK)
    bench.answer(Created(8, ()))
    assert bench.opened == ["xvda"]
    assert said(network) == Join(8, (Vif(0, "br0", NIC.mac),), 40)
    tell(bench, network, Done(0, NO_DOMAIN, ""))
    ready = said(bench.builder)
    assert isinstance(ready, Ready)
    assert [(vbd.name, vbd.major, vbd.minor) for vbd in ready.vbds] == [("xvda", 7, 63)]
    bench.answer(Done(0, RUNNING.but(domid=8), "", (SEEN, CARD)))
    assert bench.heard() == Done(3, RUNNING.but(domid=8), "", (SEEN, CARD))
    assert bench.broker._book.known == {(Kind.VBD, 51712), (Kind.VIF, 0)}
    assert bench.broker._domid == 8


def test_the_greeting_of_a_worker_is_logged(bench):
    devices_of(bench, nics=(NIC,)).known(NO_DOMAIN)
    bench.ask(Op.BUILD)
    (network,) = workers(Role.NETWORK)
    tell(bench, network, Hello("network", network.pid, "proof"))
    assert bench.acts.of("confined")[-1] == {"role": "network", "pid": network.pid, "proof": "proof"}


def test_a_disk_that_cannot_be_opened_is_told_to_the_builder(bench):
    """It undoes what it has begun, and its words reach the supervisor."""
    devices_of(bench, disks=(DISK,), nics=(NIC,)).known(NO_DOMAIN)
    bench.refuse["xvda"] = BusyError("disk xvda: in use", hint="share=true")
    bench.ask(Op.BUILD, 3)
    bench.job()
    bench.answer(Created(8, ()))
    failed = said(bench.builder)
    assert failed == Failed(0, Fault(9, "disk xvda: in use", "share=true"), NO_DOMAIN)
    assert workers(Role.NETWORK) == []
    bench.answer(failed)
    assert bench.heard() == Failed(3, failed.fault, NO_DOMAIN)
    assert bench.broker._phase is VmPhase.ABSENT


def test_a_worker_that_dies_is_told_to_the_builder(bench):
    devices_of(bench, nics=(NIC,)).known(NO_DOMAIN)
    bench.ask(Op.BUILD)
    bench.job()
    bench.answer(Created(8, ()))
    (network,) = workers(Role.NETWORK)
    network.die()
    bench.turn()
    assert "the network worker ended with status 0 without an answer" in said(bench.builder).fault.message


@pytest.mark.parametrize("code", [7, 1])
def test_which_device_was_late_is_said_before_what_its_helper_knows(bench, code):
    """Its helper waits for all of them together; of another failure it knows best itself."""
    devices_of(bench, disks=(DISK,), nics=(NIC,)).known(NO_DOMAIN)
    bench.ask(Op.BUILD)
    bench.job()
    bench.answer(Created(8, ()))
    (network,) = workers(Role.NETWORK)
    bench.answer(Failed(0, Fault(code, "waited 40 s", ""), NO_DOMAIN))
    late = f"network card 0 (bridge br0): no answer of the network worker (process {network.pid}); "
    assert bench.refused(code) == (late if code == 7 else "") + "waited 40 s"


def test_a_bridge_that_is_not_there_is_refused_before_anything_is_built(bench):
    devices_of(bench, nics=(NIC.but(bridge="gone"),)).known(RUNNING)
    bench.ask(Op.REBUILD, 3)
    failed = bench.heard()
    assert "there is no bridge gone; this host has br0" in failed.fault.message
    assert (failed.domain.domid, failed.domain.phase) == (7, Phase.BUILT)
    assert [child.role for child in FakeChild.made] == [Role.SUPERVISOR]


def test_the_servers_of_the_domain_before_end_when_it_is_gone(bench):
    """Between its end and the next domain's disks: the images are locked until then."""
    devices_of(bench, disks=(DISK,)).known(RUNNING)
    bench.ask(Op.REBUILD)
    bench.job()
    assert bench.ended == []
    bench.answer(Created(8, (SEEN.but(server="4711 99"),)))
    assert bench.ended == ["4711 99"]


def test_they_end_too_when_the_next_domain_cannot_be_built_or_has_no_devices(bench):
    """What a builder has not made, it may not have destroyed either: another one looks."""
    bench.known(RUNNING)
    bench.broker._book.seen((ADDED,))
    bench.ask(Op.REBUILD)
    bench.job()
    bench.answer(Failed(0, Fault(1, "memory: 5 MiB are free", ""), NO_DOMAIN))
    bench.look(Done(0, NO_DOMAIN, ""))
    bench.broker._cancel("the rebuild is not done once more")
    assert bench.ended == ["4711 99"]
    bench.known(RUNNING)
    bench.ask(Op.REBUILD)
    bench.answer(Created(8, (ADDED.but(server="4712 5"),)))
    assert bench.ended == ["4711 99", "4712 5"]


def test_a_second_word_that_the_nodes_are_there_is_out_of_place(bench):
    bench.known(RUNNING)
    plug(bench)
    worker = bench.builder
    bench.job()
    bench.answer(Created(7, ()))
    said(worker)
    tell(bench, worker, Created(8, ()))
    assert worker.killed
    assert bench.opened == ["xvdb"]
    assert {"role": "hotplug", "pid": worker.pid, "why": "message out of place"} in bench.acts.of("protocol")
    assert bench.job()[0].op is Op.UNPLUG


def test_a_builder_without_devices_that_claims_some_gets_none(bench):
    bench.known(RUNNING)
    bench.ask(Op.QUERY)
    bench.answer(Created(8, ()))
    with pytest.raises(BlockingIOError):
        bench.builder.there.receive_now()
        bench.builder.there.receive_now()
    assert bench.opened == []


def test_destroy_ends_everything_that_works_on_a_build(bench):
    devices_of(bench, disks=(DISK,), nics=(NIC,)).known(NO_DOMAIN)
    bench.ask(Op.BUILD, 3)
    bench.job()
    bench.answer(Created(8, ()))
    made = [bench.builder, *workers(Role.NETWORK)]
    bench.ask(Op.DESTROY, 4)
    assert all(child.killed for child in made)
    assert bench.refused() == "build: ended by destroy"
    assert bench.job()[0].op is Op.DESTROY


# Changes of a running guest


def test_a_disk_is_added(bench):
    bench.known(RUNNING)
    plug(bench)
    job, _ = bench.job()
    assert bench.builder.role is Role.HOTPLUG
    assert (job.op, job.domid, [vbd.name for vbd in job.vbds]) == (Op.PLUG, 7, ["xvdb"])
    assert bench.opened == []
    bench.answer(Created(7, ()))
    assert bench.opened == ["xvdb"]
    assert said(bench.builder).vbds[0].minor == 63
    bench.answer(Done(0, NO_DOMAIN, "connected", (SEEN, ADDED)))
    done = bench.heard()
    assert (done.sequence, done.text, done.devices) == (9, "connected", (SEEN, ADDED))
    assert done.domain.domid == 7
    assert bench.broker._phase is VmPhase.BUILT  # what a hotplug worker says of the domain counts for nothing
    bench.ask(Op.REBUILD)  # and there it is again
    assert [vbd.name for vbd in bench.job()[0].vbds] == ["xvdb"]


def test_a_disk_that_was_not_added_does_not_come_back(bench):
    bench.known(RUNNING)
    plug(bench)
    bench.job()
    bench.answer(Failed(0, FAULT, NO_DOMAIN))
    assert bench.refused() == FAULT.message
    assert bench.broker._phase is VmPhase.BUILT
    bench.ask(Op.REBUILD)
    assert bench.job()[0].vbds == ()


@pytest.mark.parametrize(
    ("what", "handed", "match"),
    [
        ({}, False, "one device is added at a time"),
        ({"cipher": "aes", "key_file": "/etc/shadow", "key_size_bits": 256}, True, "encrypted disk cannot be added"),
        ({"device": 2048, "name": "sda"}, True, "the same disk"),
    ],
)
def test_a_disk_that_may_not_be_added_is_closed(bench, what, handed, match):
    devices_of(bench, disks=(DISK,)).known(RUNNING)
    plug(bench, handed=handed, **what)
    assert match in bench.refused()
    assert bench.broker._work is None
    assert bench.acts.of("refused")[-1]["op"] == "plug"


def test_reading_the_config_again_takes_on_the_policy_of_the_host(bench, monkeypatch):
    """What it opens and closes to clients counts from then on, and the supervisor hears of its directories."""
    monkeypatch.setattr("xenvm.broker.bridges.bridges", lambda: ["br0", "dmz"])
    bench.known(RUNNING)
    bench.send(Rebridge(9, 0, "dmz"))
    assert "not open to this VM" in bench.refused()
    bench.host_policy = HostPolicy("br0", ("dmz",), ("/srv/discs",))
    bench.ask(Op.READ_CONFIG)
    assert bench.heard().directories == ("/srv/discs",)
    assert isinstance(bench.heard(), Done)
    bench.send(Rebridge(9, 0, "dmz"))
    assert bench.job()[0].op is Op.REBRIDGE


def test_a_card_for_a_bridge_that_is_not_open_to_the_vm(bench, monkeypatch):
    monkeypatch.setattr("xenvm.broker.bridges.bridges", lambda: ["br0", "dmz"])
    bench.known(RUNNING)
    bench.send(Plug(9, (), (NIC.but(bridge="dmz"),)))
    assert "not open to this VM" in bench.refused(ExitCode.PERMISSION_REFUSED)
    bench.send(Rebridge(9, 0, "dmz"))
    assert "not open to this VM" in bench.refused(ExitCode.PERMISSION_REFUSED)


def test_a_device_is_taken_away(bench):
    bench.known(RUNNING)
    bench.broker._book.seen((ADDED,))
    bench.send(Unplug(9, Kind.VBD, 51728, False, True, 5))
    job, _ = bench.job()
    assert (job.op, job.kind, job.device, job.force, job.timeout_s) == (Op.UNPLUG, Kind.VBD, 51728, True, 5)
    assert bench.broker._work.deadline_s == PERMITS[Op.UNPLUG].deadline_s + 5
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert bench.heard().devices == ()
    assert bench.ended == ["4711 99"]


def test_a_device_that_the_guest_keeps_keeps_its_server(bench):
    bench.known(RUNNING)
    bench.broker._book.seen((ADDED,))
    bench.send(Unplug(9, Kind.VBD, 51728, False, False, 5))
    bench.answer(Failed(0, Fault(7, "vbd 51728: the guest did not let go", ""), NO_DOMAIN))
    assert "did not let go" in bench.refused(ExitCode.TIMED_OUT)
    assert bench.ended == []


def test_a_card_is_moved(bench):
    devices_of(bench, nics=(NIC,)).known(RUNNING)
    bench.send(Rebridge(9, 0, "br0"))
    job, _ = bench.job()
    assert (job.op, [(vif.id, vif.bridge) for vif in job.vifs]) == (Op.REBRIDGE, [(0, "br0")])
    bench.answer(Created(7, ()))
    (network,) = workers(Role.NETWORK)
    assert said(network).vifs[0].bridge == "br0"
    tell(bench, network, Done(0, NO_DOMAIN, ""))
    assert said(bench.builder) == Ready(())
    bench.answer(Done(0, NO_DOMAIN, "", (CARD,)))
    assert bench.heard().devices == (CARD,)


@pytest.mark.parametrize(
    "answer",
    [Done(0, NO_DOMAIN, ""), Failed(0, Fault(3, "the guest has no vbd 51728", ""), NO_DOMAIN)],
    ids=["was begun", "was not"],
)
def test_what_a_dead_worker_has_begun_is_taken_back(bench, answer):
    bench.known(RUNNING)
    plug(bench)
    bench.job()
    bench.answer(Created(7, ()))
    bench.builder.die()
    bench.turn()
    assert bench.silent()  # it hears of it when nothing is left
    job, _ = bench.job()
    assert (job.op, job.kind, job.device, job.force) == (Op.UNPLUG, Kind.VBD, 51728, True)
    bench.answer(answer)
    failed = bench.heard()
    assert (failed.sequence, "plug: its hotplug ended with status 0" in failed.fault.message) == (9, True)
    assert bench.silent()
    assert bench.broker._work is None
    bench.ask(Op.REBUILD)
    assert bench.job()[0].vbds == ()


def test_a_card_is_taken_back_too(bench):
    bench.known(RUNNING)
    bench.send(Plug(9, (), (NIC.but(id=4),)))
    bench.broker._work.latest = 0.0
    bench.turn()
    job, _ = bench.job()
    assert (job.op, job.kind, job.device) == (Op.UNPLUG, Kind.VIF, 4)
    assert workers(Role.NETWORK) == []
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert "no answer within" in bench.refused(ExitCode.TIMED_OUT)


def test_an_encrypted_disk_of_the_config_comes_through_its_worker(bench, tmp_path):
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    crypt = DISK.but(cipher="aes-xts-plain64", key_size_bits=256, key_file=str(key))
    devices_of(bench, disks=(crypt,)).known(NO_DOMAIN)
    bench.ask(Op.BUILD)
    bench.job()
    bench.answer(Created(8, ()))
    (storage,) = workers(Role.STORAGE)
    assert isinstance(said(storage), Decrypt)
    block = os.open(bench.block, os.O_PATH)
    tell(bench, storage, Done(0, NO_DOMAIN, "/dev/dm-0"), [block])
    os.close(block)
    assert said(bench.builder).vbds[0].minor == 63


@pytest.mark.parametrize("role", [Role.NETWORK, Role.STORAGE])
def test_a_worker_that_breaks_the_protocol_fails_the_job(bench, role, tmp_path):
    (tmp_path / "key").write_bytes(b"k" * 32)
    crypt = DISK.but(cipher="aes", key_size_bits=256, key_file=f"{tmp_path}/key")
    devices_of(bench, disks=(crypt,), nics=(NIC,)).known(NO_DOMAIN)
    bench.ask(Op.BUILD)
    bench.job()
    bench.answer(Created(8, ()))
    (worker,) = workers(role)
    worker.there._socket.send(b"garbage")
    bench.turn()
    assert isinstance(said(bench.builder), Failed)
    assert workers(Role.NETWORK) + workers(Role.STORAGE) == []


def test_many_changes_leave_no_descriptor(bench):
    bench.known(RUNNING)
    counts = []
    for _ in range(20):
        plug(bench)
        bench.job()
        bench.answer(Created(7, ()))
        said(bench.builder)
        bench.answer(Done(0, NO_DOMAIN, "connected", (ADDED,)))
        bench.heard()
        bench.send(Unplug(9, Kind.VBD, 51728, False, False, 5))
        bench.job()
        bench.answer(Done(0, NO_DOMAIN, ""))
        bench.heard()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert set(counts) == {counts[0]}


def test_they_live_on_with_a_domain_that_the_builder_could_not_destroy(bench):
    bench.known(RUNNING)
    bench.broker._book.seen((ADDED,))
    bench.ask(Op.REBUILD)
    bench.job()
    bench.answer(Failed(0, Fault(1, "xenstored is gone", ""), NO_DOMAIN))
    bench.look(Done(0, RUNNING, "", (ADDED,)))
    assert bench.ended == []
    assert isinstance(bench.heard(), Failed)
    assert bench.broker._phase is VmPhase.BUILT


def test_an_error_of_the_kernel_over_a_device_fails_the_request_and_not_the_monitor(bench):
    bench.known(RUNNING)
    bench.refuse[MORE.name] = OSError(errno.ESTALE, "Stale file handle")
    plug = Plug(9, (MORE,), ())
    descriptor = os.open(bench.block, os.O_PATH)
    bench.send(plug, [descriptor])
    os.close(descriptor)
    bench.job()
    bench.answer(Created(7, ()))
    refused, _ = bench.job()
    assert refused.fault.message == "devices: Stale file handle"


# What the kernel says


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """The directory of the kernel's backend devices, with one for each that is seen."""
    directory = tmp_path / "backends"
    directory.mkdir()
    monkeypatch.setattr(uevents, "DEVICES", str(directory))
    for name in ("vbd-7-51712", "vif-7-0"):
        (directory / name).mkdir()
    return directory


def event(bench, kind="vbd", device=51712):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(f"remove backend/{kind}/7/{device} 1".encode(), bench.broker._uevents._path())
    bench.turn()


def test_a_device_that_something_else_removed_is_tidied_up(bench, kernel):
    bench.known(RUNNING)
    bench.broker._book.seen((SEEN, CARD))
    event(bench)  # a lie, or late: the kernel still has it
    assert bench.broker._work is None
    (kernel / "vbd-7-51712").rmdir()
    event(bench)
    assert bench.job()[0].op is Op.SETTLE
    bench.answer(Done(0, NO_DOMAIN, "", (CARD,)))
    assert bench.broker._book.known == {(Kind.VIF, 0)}
    event(bench)
    assert bench.broker._work is None


# What an earlier failure has left


@pytest.fixture
def left(monkeypatch):
    """What dead workers have left, by the disks and servers that are said to be in use."""
    asked = []

    def find(_uuid, used, servers):
        asked.append((set(used), set(servers)))
        return strays.Strays((), (), (f"mapping{len(asked)}",))

    monkeypatch.setattr(strays, "find", find)
    monkeypatch.setattr(strays, "clear", lambda *_: None)
    monkeypatch.setattr(findings, "of_host", lambda: ["udev: no rule"])
    return asked


def test_without_a_domain_everything_in_the_record_is_left_over(bench, left):
    """Also its image servers: they are no longer those of a disk."""
    bench.known(NO_DOMAIN)
    bench.ask(Op.DEVICES, sequence=4)
    job, _ = bench.job()
    assert (job.op, job.domid, bench.builder.role) == (Op.DEVICES, -1, Role.HOTPLUG)
    bench.answer(Done(0, NO_DOMAIN, "xenstore: a record", (ADDED,)))
    said = "udev: no rule\nxenstore: a record\nmapping mapping1: no disk uses it; doctor clean=true removes it"
    assert bench.heard() == Done(4, NO_DOMAIN, said, (ADDED,))
    assert left == [(set(), set())]
    assert bench.broker._book.known == set()


def test_what_is_left_of_no_domain_is_removed_as_at_a_start(bench, left):
    """A builder tells of the devices that it has removed, so that their servers end; nobody else hears of those."""
    bench.known(NO_DOMAIN)
    bench.ask(Op.FIND, sequence=4)
    assert bench.builder.role is Role.BUILDER
    bench.answer(Done(0, NO_DOMAIN, "", (ADDED,)))
    said = "udev: no rule\nmapping mapping2: no disk uses it; doctor clean=true removes it"
    assert bench.heard() == Done(4, NO_DOMAIN, said, ())
    assert left == [(set(), set())] * 2
    assert bench.ended == [ADDED.server]


def test_with_a_domain_its_disks_and_servers_are_in_use(bench, left):
    bench.known(RUNNING)
    bench.ask(Op.DEVICES, sequence=4)
    bench.answer(Done(0, NO_DOMAIN, "", (SEEN, ADDED)))
    assert bench.heard().devices == (SEEN, ADDED)
    assert left == [({51712, 51728}, {ADDED.server})]


def test_while_nothing_is_known_of_the_domain_nothing_is_said_to_be_left(bench, left):
    bench.ask(Op.DEVICES, sequence=4)
    assert bench.refused(ExitCode.WRONG_STATE) == "devices is not possible while the domain is unknown"


def test_an_event_of_another_domain_or_of_none_is_nothing(bench, kernel):
    bench.known(RUNNING)
    bench.broker._book.seen((SEEN,))
    (kernel / "vbd-7-51712").rmdir()
    path = bench.broker._uevents._path()
    assert path.endswith("/domid-7")
    bench.known(RUNNING.but(domid=8))
    assert not os.path.exists(path)
    bench.known(NO_DOMAIN)
    assert bench.broker._uevents.fileno() == -1
    assert bench.broker._work is None


def test_tidying_up_gives_way_to_destroy(bench, kernel):
    bench.known(RUNNING)
    bench.broker._book.seen((SEEN,))
    (kernel / "vbd-7-51712").rmdir()
    event(bench)
    settling = bench.builder
    bench.ask(Op.DESTROY, 5)
    assert settling.killed
    messages = [bench.heard()] if not bench.broker._work or bench.broker._work.op is not Op.DESTROY else []
    assert bench.job()[0].op is Op.DESTROY
    assert all(isinstance(message, Failed) for message in messages)


def settling(bench, kernel):
    """Let the broker tidy up of its own accord."""
    bench.known(RUNNING)
    bench.broker._book.seen((SEEN, CARD))
    (kernel / "vbd-7-51712").rmdir()
    event(bench)
    assert bench.job()[0].op is Op.SETTLE


def test_requests_wait_for_what_the_broker_does_by_itself(bench, kernel):
    settling(bench, kernel)
    plug(bench, sequence=9)
    bench.ask(Op.QUERY, 10)
    assert bench.silent()
    bench.answer(Done(0, NO_DOMAIN, "", (CARD,)))
    while bench.broker._work.op is Op.SETTLE:
        bench.turn()
    job, _ = bench.job()
    assert (job.op, [vbd.name for vbd in job.vbds]) == (Op.PLUG, ["xvdb"])


def test_a_supervisor_cannot_have_requests_wait_without_end(bench, kernel):
    settling(bench, kernel)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        plug(bench, sequence=number)
    assert len(os.listdir("/proc/self/fd")) == before + POSTPONED_LIMIT
    assert "busy with settle" in bench.refused(ExitCode.BUSY)


def test_what_waits_is_forgotten_with_its_supervisor(bench, kernel):
    """The next one counts anew: it must not hear an answer to what it has not asked."""
    settling(bench, kernel)
    before = len(os.listdir("/proc/self/fd"))
    plug(bench, sequence=1)
    bench.supervisor.die()
    bench.turn()
    assert bench.broker._supervisor.role is Role.SUPERVISOR
    assert not bench.broker._postponed
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_flood_of_events_is_bounded(bench, kernel):
    bench.known(RUNNING)
    (kernel / "vbd-7-51712").rmdir()
    jobs = 0
    for _ in range(200):
        bench.broker._book.seen((SEEN,))
        event(bench)
        if bench.broker._work:
            jobs += 1
            bench.answer(Done(0, NO_DOMAIN, "", (SEEN,)))
    assert 1 <= jobs <= PERMITS[Op.SETTLE].per_minute


# Time


def test_a_job_has_the_time_that_its_worker_may_take():
    """Else the broker would end a worker that is about to say what is wrong."""
    to_let_go_s = devices.FORCED_WAIT_S + devices.GONE_WAIT_S
    assert PERMITS[Op.UNPLUG].deadline_s > to_let_go_s
    assert PERMITS[Op.SETTLE].deadline_s > devices.GONE_WAIT_S
    assert PERMITS[Op.FIND].deadline_s > devices.GONE_WAIT_S
    assert PERMITS[Op.DESTROY].deadline_s > devices.GONE_WAIT_S
    # the old disc goes within the guest's patience, the new one is opened within as much
    assert PERMITS[Op.PLUG].deadline_s > 2 * devices.BACKEND_WAIT_S + devices.FRONTEND_WAIT_S + devices.GONE_WAIT_S


def test_after_a_card_a_network_worker_waits_for_the_next_one(bench):
    bench.known(RUNNING)
    ready = None
    for turn in range(2):
        bench.send(Plug(9, (), (NIC.but(id=4 + turn, mac=f"00:16:3e:00:00:0{turn}"),)))
        bench.job()
        used = bench.broker._work.plugging._network
        assert ready in (None, used)
        bench.answer(Created(7, ()))
        tell(bench, used, Done(0, NO_DOMAIN, ""))
        bench.answer(Done(0, NO_DOMAIN, "connected"))
        assert bench.heard().text == "connected"
        ready = bench.broker._spares[Role.NETWORK]
        assert used.killed
        assert not ready.killed
    assert {*bench.broker._spares} == {Role.HOTPLUG, Role.NETWORK}
