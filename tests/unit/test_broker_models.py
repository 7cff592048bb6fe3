# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker and the device model of its VM: started in time, watched, ended, and its death a crash."""

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import broker_bench
import pytest
from broker_bench import RUNNING, UUID
from children import FakeChild
from test_devicemodel import PLAIN
from vms import until

from xenvm.boundary.devices import DiskGrant
from xenvm.boundary.images import Restore, Save
from xenvm.boundary.machine import (
    Attach,
    EndModel,
    Granted,
    Launch,
    Launched,
    Loaded,
    Model,
    ModelState,
    Wish,
    Wished,
)
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Created,
    DomainState,
    Done,
    Failed,
    Fault,
    Op,
    Ready,
)
from xenvm.boundary.privileges import Role
from xenvm.broker import host, models, spares, work
from xenvm.broker.servers import command_line, server_text
from xenvm.errors import XenvmError


@pytest.fixture
def run_directory():
    """A directory with a short name: that of a socket has 107 letters at most."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def bench(monkeypatch, tmp_path, run_directory):
    for name in ("loader", "bios"):
        (tmp_path / name).write_bytes(b"k")
    monkeypatch.setattr(host, "hvmloader", lambda: str(tmp_path / "loader"))
    monkeypatch.setattr(host, "BIOS", str(tmp_path / "bios"))
    monkeypatch.setattr(host, "LOG_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(models, "RUN_DIRECTORY", str(run_directory))
    monkeypatch.setattr(models, "uid_of", lambda _domid: os.getuid())
    for made in broker_bench.bench(monkeypatch, tmp_path):
        machine = PLAIN.but(vnc_port=-1, videoram_mib=0, nic_models=(), extra=())
        made.broker._grants = made.broker._grants.but(machine=(machine,), kernel="")
        made.kept = []
        yield made
        made.broker._models.forget()
        for descriptor in made.kept:
            os.close(descriptor)


@pytest.fixture
def qemu():
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


GRANT = DiskGrant(
    *(768, "hda", "/dev/vg/a", "phy"),
    read_only=False,
    cdrom=False,
    share=False,
    cipher="",
    key_size_bits=0,
    key_file="",
)


@pytest.fixture
def image_directory():
    """A directory on a file system with direct I/O, which /tmp may not have."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


def drive_of(directory, grant):
    path, held = directory / "disk", []
    path.write_bytes(bytes(4096))
    device = os.open(path, os.O_RDONLY if grant.read_only else os.O_RDWR)
    drive = models._drive(grant, device, held)
    os.close(device)
    assert (drive.descriptors, drive.block) == (len(held), False)
    return held


def worker():
    (child,) = [child for child in FakeChild.made if child.role is Role.DEVICEMODEL and child.pidfd >= 0]
    return child


def tell(bench, child, message):
    child.there.send(message)
    bench.turn()


def said(child):
    message, descriptors = child.there.receive(deadline_s=5)
    for descriptor in descriptors:
        os.close(descriptor)
    return message, len(descriptors)


def begun(bench):
    """Let a start get as far as the device model; return its worker."""
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD, 3)
    _job, images = bench.job()
    assert images == 2
    bench.answer(Created(8, ()))
    return worker()


def running(bench, qemu):
    """Let a whole start happen; return the device model as it is known."""
    child = begun(bench)
    bench.answer(Loaded(8))
    _, bench.kept = child.there.receive(deadline_s=5)  # among them what QEMU listens on
    tell(bench, child, Launched(qemu.pid, up=False, tty=""))
    tell(bench, child, Launched(qemu.pid, up=True, tty="/dev/pts/9"))
    state = ModelState(server_text(qemu.pid, os.getuid()), "/dev/pts/9", 0)
    assert said(bench.builder) == (Ready((), (state,)), 0)
    bench.answer(Done(0, RUNNING.but(domid=8), "", (), (state,)))
    assert bench.heard() == Model(running=True, vnc_port=0)
    assert isinstance(bench.heard(), Done)
    return state


def test_it_starts_when_the_domain_is_loaded_and_not_before(bench, qemu):
    child = begun(bench)
    with pytest.raises(BlockingIOError):
        child.there.receive_now()
    bench.answer(Loaded(8))
    launch, descriptors = said(child)
    assert isinstance(launch, Launch)
    assert (launch.domid, launch.name, launch.drives, launch.taps) == (8, "web", (), ())
    assert descriptors == 4
    assert qemu.poll() is None


def with_a_screen(bench, **changes):
    (machine,) = bench.broker._grants.machine
    bench.broker._grants = bench.broker._grants.but(machine=(machine.but(vnc_port=0, videoram_mib=8, **changes),))
    child = begun(bench)
    bench.answer(Loaded(8))
    return child


def test_a_screen_is_served_where_it_was_granted(bench):
    child = with_a_screen(bench, vnc_host="127.0.0.2")
    _, descriptors = child.there.receive(deadline_s=5)
    bench.kept = descriptors
    with socket.socket(fileno=os.dup(descriptors[4])) as listener:
        assert listener.getsockname()[0] == "127.0.0.2"
    assert len(descriptors) == 5


def test_a_start_to_its_end(bench, qemu, run_directory):
    state = running(bench, qemu)
    assert bench.broker._models.state == state
    for name in (f"qmp-{UUID}", f"qmp-{UUID}.save"):
        assert (run_directory / name).is_socket()
        assert (run_directory / name).stat().st_mode & 0o777 == 0o600
    assert bench.acts.of("model") == [{"pid": qemu.pid, "domid": 8}]


def test_one_that_does_not_come_up_is_ended_and_the_builder_hears_why(bench, qemu, run_directory):
    child = begun(bench)
    bench.answer(Loaded(8))
    said(child)
    tell(bench, child, Launched(qemu.pid, up=False, tty=""))
    tell(bench, child, Failed(0, Fault(1, "device model: no", "try"), NO_DOMAIN))
    message, _ = said(bench.builder)
    assert message.fault.message == "device model: no"
    assert qemu.wait(5) == -9
    assert not (run_directory / f"qmp-{UUID}").exists()


def test_a_worker_that_dies_takes_it_along(bench, qemu):
    child = begun(bench)
    bench.answer(Loaded(8))
    said(child)
    tell(bench, child, Launched(qemu.pid, up=False, tty=""))
    child.die()
    bench.turn()
    message, _ = said(bench.builder)
    assert isinstance(message, Failed)
    assert qemu.wait(5) == -9


def test_its_death_makes_the_guest_crash(bench, qemu):
    running(bench, qemu)
    qemu.kill()
    qemu.wait()
    bench.turn()
    job, _ = bench.job()
    assert (job.op, job.domid) == (Op.CRASH, 8)
    assert bench.acts.of("ended")[-1]["role"] == "qemu"
    bench.ask(Op.QUERY, 12)  # waits until the guest has crashed
    assert bench.silent()


def test_a_descriptor_that_is_used_again_is_no_death(bench, qemu, monkeypatch):
    """A start ends processes and opens the pidfd in one turn: the numbers may be the same."""
    monkeypatch.setattr(models, "open_server", lambda *_: os.dup2(bench.wakeup, bench.broker._work_channel))
    child = begun(bench)
    bench.answer(Loaded(8))
    _, bench.kept = child.there.receive(deadline_s=5)
    tell(bench, child, Launched(qemu.pid, up=False, tty=""))
    tell(bench, child, Launched(qemu.pid, up=True, tty=""))
    said(bench.builder)
    bench.broker._work_channel = bench.builder.channel.fileno()  # in poll's answer, and closed before `follow`
    state = ModelState(server_text(qemu.pid, os.getuid()), "", 0)
    bench.answer(Done(0, RUNNING.but(domid=8), "", (), (state,)))
    assert bench.broker._models.pidfd == bench.broker._work_channel
    assert not bench.broker._models.lost
    assert bench.broker._work is None


def test_one_that_died_unwatched_is_found(bench, qemu):
    running(bench, qemu)
    bench.broker._models.follow((ModelState(f"{qemu.pid} 1", "", 0),), 8)
    assert bench.broker._models.lost
    bench.ask(Op.CONSOLE_LOG, 4)
    assert bench.job()[0].op is Op.CRASH


def test_a_builder_has_it_ended_before_the_domain_goes(bench, qemu, run_directory):
    state = running(bench, qemu)
    bench.ask(Op.DESTROY, 5)
    bench.job()
    begin = time.monotonic()
    bench.answer(EndModel(8, state.server))
    assert said(bench.builder) == (Ready(()), 0)
    assert qemu.wait(5) in (-15, -9)
    assert time.monotonic() - begin < 5
    assert not (run_directory / f"qmp-{UUID}").exists()
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert bench.broker._models.pidfd < 0


def test_a_builder_that_dies_over_that_is_one_failed_job_and_not_the_end_of_the_monitor(bench, qemu):
    state = running(bench, qemu)
    bench.ask(Op.DESTROY, 5)
    bench.builder.there.send(EndModel(8, state.server))
    bench.builder.die()
    bench.turn()
    assert qemu.wait(5) in (-15, -9)
    assert bench.job()[0].op is Op.FIND
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert bench.heard() == Done(5, NO_DOMAIN, "")


def test_a_guest_that_could_not_be_stopped_is_tried_again_ever_later(bench, qemu, monkeypatch):
    """What took QEMU may take the builder too; nobody else would say that the guest stands still."""
    running(bench, qemu)
    qemu.kill()
    qemu.wait()
    bench.turn()
    now_s = time.monotonic()
    monkeypatch.setattr(models.time, "monotonic", lambda: now_s)
    for pause_s in (1, 2, 4):
        assert bench.job()[0].op is Op.CRASH
        bench.builder.die()
        bench.turn()
        assert bench.broker._work is None
        assert bench.broker._models.due_s == now_s + pause_s
        now_s += pause_s
        bench.ask(Op.CONSOLE_LOG, 4)  # a turn
    bench.job()
    bench.answer(Done(0, RUNNING.but(domid=8, state=DomainState.SHUTDOWN, reason=3), ""))
    assert (bench.broker._work, bench.broker._models.due_s) == (None, 0.0)


def test_without_a_process_for_that_the_monitor_goes_on(bench, qemu, monkeypatch):
    running(bench, qemu)
    qemu.kill()
    qemu.wait()
    bench.broker._spares.end()

    def no_process(*_):
        raise XenvmError("cannot start the builder: no memory")

    monkeypatch.setattr(spares, "Child", no_process)
    bench.turn()
    assert bench.broker._work is None
    assert bench.broker._models.due_s > 0


@pytest.mark.parametrize("read", [False, True])
def test_one_that_was_started_and_has_not_been_recorded_is_ended_with_its_start(bench, qemu, read):
    """Also when the broker has not read yet what the worker said of it."""
    child = begun(bench)
    bench.answer(Loaded(8))
    said(child)
    child.there.send(Launched(qemu.pid, up=False, tty=""))
    if read:
        bench.turn()
    bench.broker._cancel("ended")
    assert qemu.wait(5) == -9


def test_one_that_nobody_has_recorded_is_found_by_what_it_was_started_with(bench, run_directory):
    """Its broker was killed before its builder could note it."""
    mine = [sys.executable, "-c", "import time; time.sleep(600)", "-xen-domid", "8", "-uuid", UUID]
    others = [[*mine[:-1], UUID.replace("1", "2")], [*mine[:4], "80", *mine[5:]]]
    processes = [subprocess.Popen(words) for words in (mine, *others)]
    try:
        until(lambda: all(b"-uuid" in command_line(one.pid) for one in processes), "they are what they are", 10)
        bench.known(NO_DOMAIN)
        bench.ask(Op.DESTROY, 5)
        bench.job()
        bench.answer(EndModel(8, ""))
        assert said(bench.builder) == (Ready(()), 0)
        assert processes[0].wait(5) in (-15, -9)
        assert [one.poll() for one in processes[1:]] == [None, None]
    finally:
        for one in processes:
            one.kill()
            one.wait()


def test_one_that_ended_before_it_could_be_watched_leaves_the_word_to_its_worker(bench):
    child = begun(bench)
    bench.answer(Loaded(8))
    said(child)
    gone = subprocess.Popen(["true"])
    gone.wait()
    tell(bench, child, Launched(gone.pid, up=False, tty=""))
    tell(bench, child, Failed(0, Fault(1, "device model: QEMU said no", ""), NO_DOMAIN))
    assert said(bench.builder)[0].fault.message == "device model: QEMU said no"


def test_another_process_of_that_number_is_left_alone(bench, qemu):
    running(bench, qemu)
    bench.ask(Op.DESTROY, 5)
    bench.job()
    bench.answer(EndModel(8, f"{qemu.pid} 1"))
    assert said(bench.builder) == (Ready(()), 0)
    assert qemu.poll() is None


@pytest.mark.parametrize(("changes", "modes"), [({}, [os.O_RDONLY, os.O_RDWR]), ({"read_only": True}, [os.O_RDONLY])])
def test_a_disk_passes_the_page_cache_by_in_each_descriptor_that_qemu_may_pick(image_directory, changes, modes):
    """QEMU 10 looks in the set for one that is direct, and opens it to read first."""
    held = drive_of(image_directory, GRANT.but(**changes))
    flags = [fcntl.fcntl(one, fcntl.F_GETFL) for one in held]
    for one in held:
        os.close(one)
    assert [one & os.O_ACCMODE for one in flags] == modes
    assert all(one & os.O_DIRECT for one in flags)


def test_a_disc_goes_through_the_page_cache(image_directory):
    """Its sectors need not be those of the file system."""
    (one,) = drive_of(image_directory, GRANT.but(read_only=True, cdrom=True))
    assert not fcntl.fcntl(one, fcntl.F_GETFL) & os.O_DIRECT
    os.close(one)


# Saved, and brought back


def target(tmp_path):
    return os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)


def of_role(role):
    (child,) = [child for child in FakeChild.made if child.role is role and child.pidfd >= 0]
    return child


def saving(bench, qemu, tmp_path, **changes):
    """Begin a save; return the qmp worker, what it was handed, the builder's job and its descriptors."""
    running(bench, qemu)
    image = target(tmp_path)
    bench.send(Save(5, False, 60, **changes), (image,))
    os.close(image)
    talk = of_role(Role.QMP)
    attach, handed = talk.there.receive(deadline_s=5)
    assert attach == Attach()
    job, descriptors = bench.builder.there.receive(deadline_s=5)
    bench.kept += [*handed, *descriptors]
    return talk, handed, job, descriptors


def test_the_builder_reads_what_the_device_model_writes_through_a_worker(bench, qemu, tmp_path):
    talk, (connection, writable), job, (_image, readable) = saving(bench, qemu, tmp_path, live=True)
    assert (job.op, job.live) == (Op.SAVE, True)
    with socket.socket(fileno=os.dup(connection)) as client:
        assert client.getpeername().endswith(f"qmp-{UUID}.save")
    assert fcntl.fcntl(writable, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    os.write(writable, b"QEVM")
    assert os.pread(readable, 9, 0) == b"QEVM"
    bench.answer(Wished(Wish.SAVE))
    assert said(talk) == (Wished(Wish.SAVE), 0)
    tell(bench, talk, Granted())
    assert said(bench.builder) == (Granted(), 0)
    bench.answer(Done(0, RUNNING, "image_bytes=9"))
    assert bench.heard() == Done(5, RUNNING, "image_bytes=9")
    assert talk.killed


def test_a_refusal_and_the_workers_end_reach_the_builder_once(bench, qemu, tmp_path):
    talk, _, _, _ = saving(bench, qemu, tmp_path)
    bench.answer(Wished(Wish.SAVE))
    tell(bench, talk, Failed(0, Fault(1, "device model: no", ""), RUNNING))
    assert said(bench.builder) == (Failed(0, Fault(1, "device model: no", ""), NO_DOMAIN), 0)
    tell(bench, talk, Granted())  # nobody has asked
    bench.answer(Wished(Wish.RUN))
    talk.die()
    bench.turn()
    for _ in range(2):  # the next wish, too: the builder has the guest run on
        message, _ = said(bench.builder)
        assert "without an answer" in message.fault.message
        bench.answer(Wished(Wish.RUN))


def test_a_wish_before_the_worker_has_answered_ends_that_worker(bench, qemu, tmp_path):
    """Its late answer could pass for one to this wish."""
    talk, _, _, _ = saving(bench, qemu, tmp_path)
    bench.answer(Wished(Wish.SAVE))
    bench.answer(Wished(Wish.RUN))
    message, _ = said(bench.builder)
    assert "without an answer" in message.fault.message
    assert talk.killed
    assert bench.broker._work


def test_without_a_device_model_nothing_is_begun(bench, qemu, tmp_path):
    running(bench, qemu)
    os.close(bench.broker._models.pidfd)
    bench.broker._models.pidfd = -1  # it has ended
    image = target(tmp_path)
    bench.send(Save(5, False, 60), (image,))
    os.close(image)
    assert "device model: it does not run" in bench.refused()
    assert bench.broker._work is None


def test_a_resume_has_a_worker_too_and_no_state(bench, qemu):
    running(bench, qemu)
    bench.ask(Op.RESUME, 6)
    talk = of_role(Role.QMP)
    assert said(talk) == (Attach(), 1)
    assert bench.job()[1] == 0
    bench.answer(Wished(Wish.RUN))
    assert said(talk) == (Wished(Wish.RUN), 0)


def test_a_monitor_that_ends_over_a_save_has_the_device_model_run_first(bench, qemu, tmp_path, monkeypatch):
    asked = []

    def ask(child, message, _deadline_s, talk):
        child.end()
        asked.append((message.op, talk is not None))
        return Done(0, RUNNING, "")

    monkeypatch.setattr(work, "ask_once", ask)
    saving(bench, qemu, tmp_path)
    bench.broker._end_children()
    assert asked == [(Op.RESUME, True)]


def test_a_restore_begins_with_the_state_that_its_image_has(bench, tmp_path):
    bench.known(NO_DOMAIN)
    image = target(tmp_path)
    bench.send(Restore(4, False), (image,))
    os.close(image)
    feed = of_role(Role.STREAM)
    _, handed = feed.there.receive(deadline_s=5)
    assert len(handed) == 3
    os.write(handed[2], b"QEVM state")
    host.close_all(handed)
    bench.job()
    bench.answer(Created(8, ()))
    bench.answer(Loaded(8))
    launch, descriptors = worker().there.receive(deadline_s=5)
    bench.kept = descriptors
    assert launch.incoming
    assert os.read(descriptors[-1], 100) == b"QEVM state"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(descriptors[-1], b"x")
