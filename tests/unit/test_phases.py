# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's decisions with children played by the test: what it permits, when, how often, and what it never passes on."""

import os
import signal
import tempfile
import time

import broker_bench
import psutil
import pytest
from broker_bench import FAULT, RUNNING, UUID
from children import FakeChild

from xenvm.boundary.devices import Kind, NicGrant
from xenvm.boundary.frames import encode
from xenvm.boundary.images import Progress, Restore, Save
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Ask,
    Done,
    Failed,
    Fault,
    Hello,
    Init,
    Job,
    Op,
    Phase,
    Plug,
    Rebridge,
    Unplug,
)
from xenvm.boundary.privileges import TABLE, Role
from xenvm.broker import core, spares, work
from xenvm.broker.asked import REFUSALS_PER_MINUTE
from xenvm.broker.core import MESSAGES_A_TURN, RESTARTS_PER_MINUTE
from xenvm.broker.phases import ON_DEVICES, PERMITS, REBUILDING, RESTORING, SAVING, WITH_ARGUMENTS, VmPhase
from xenvm.errors import ExitCode, XenvmError

PHASES = {VmPhase.ABSENT: NO_DOMAIN, VmPhase.BUILT: RUNNING}
WITH_HELPER = sorted(op for op, permit in PERMITS.items() if permit.deadline_s)
REQUESTS = {
    Op.PLUG: Plug(9, (), (NicGrant(3, "br0", "00:16:3e:00:00:03"),)),
    Op.UNPLUG: Unplug(9, Kind.VBD, 51712, False, False, 5),
    Op.REBRIDGE: Rebridge(9, 0, "br0"),
    Op.SAVE: Save(9, False, 5),
    Op.CHECKPOINT: Save(9, True, 5),
    Op.RESTORE: Restore(9, False),
    Op.RESTORE_PAUSED: Restore(9, True),
}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    yield from broker_bench.bench(monkeypatch, tmp_path)


def request(bench, op):
    """Ask as a supervisor does: what is about an image comes with an open file."""
    if op not in WITH_ARGUMENTS:
        bench.ask(op, sequence=9)
    elif op in SAVING | RESTORING:
        with tempfile.TemporaryFile() as file:
            bench.send(REQUESTS[op], [file.fileno()])
    else:
        bench.send(REQUESTS[op])


# The table


def test_every_request_of_a_supervisor_is_in_the_table():
    assert set(PERMITS) == set(Op) - {Op.START, Op.START_PAUSED, Op.START_RESTORED, Op.CRASH, Op.SURVEY}
    assert set(TABLE[Role.BROKER].requests) == {op.value for op in Op}


def test_a_domain_is_needed_for_all_that_touches_one():
    built = {op for op, permit in PERMITS.items() if permit.phases == {VmPhase.BUILT}}
    assert built == {
        *(Op.REBUILD, Op.QUERY, Op.PAUSE, Op.UNPAUSE, Op.RESUME, Op.ASK_POWEROFF, Op.ASK_REBOOT, Op.WITHDRAW),
        *(Op.FORCE_POWEROFF, Op.CONSOLE, Op.PLUG, Op.UNPLUG, Op.REBRIDGE, Op.SETTLE),
        *(Op.SAVE, Op.CHECKPOINT),
        *(Op.PRESS_POWER, Op.PRESS_SLEEP, Op.NMI, Op.S_STATE, Op.FALL_ASLEEP, Op.WAKE, Op.ASK_SLEEP),
    }
    absent = {op for op, permit in PERMITS.items() if permit.phases == {VmPhase.ABSENT}}
    assert absent == {Op.BUILD, Op.BUILD_PAUSED, Op.RESTORE, Op.RESTORE_PAUSED}
    assert PERMITS[Op.DEVICES].phases == {VmPhase.ABSENT, VmPhase.BUILT}  # without one it tells what one has left


def test_everything_has_a_limit():
    assert all(0 < permit.per_minute <= 600 and 0 <= permit.deadline_s <= 720 for permit in PERMITS.values())
    assert {Op.RESTORE, Op.RESTORE_PAUSED, Op.START_RESTORED} == RESTORING
    assert {Op.BUILD, Op.BUILD_PAUSED, Op.REBUILD, Op.START, Op.START_PAUSED} == REBUILDING - RESTORING
    assert {Op.SAVE, Op.CHECKPOINT} == SAVING
    assert {Op.DEVICES, Op.PLUG, Op.UNPLUG, Op.REBRIDGE, Op.SETTLE} == ON_DEVICES
    assert {Op.PLUG, Op.UNPLUG, Op.REBRIDGE, Op.RESTORE, Op.RESTORE_PAUSED, *SAVING} == WITH_ARGUMENTS


# What is permitted


@pytest.mark.parametrize("phase", VmPhase)
@pytest.mark.parametrize("op", WITH_HELPER)
def test_a_request_is_legal_in_its_phases_only(bench, op, phase):
    if phase in PHASES:
        bench.known(PHASES[phase])
    request(bench, op)
    if phase in PERMITS[op].phases:
        assert bench.silent()
        job, images = bench.job()
        assert (job.op, job.uuid, job.grants) == (op, UUID, bench.grants)
        assert job.domid == (7 if phase is VmPhase.BUILT else -1)
        assert images == (1 if op in REBUILDING | SAVING else 0)
        assert bench.builder.role is (Role.HOTPLUG if op in ON_DEVICES else Role.BUILDER)
    else:
        assert "not possible" in bench.refused(ExitCode.WRONG_STATE)
        assert [child.role for child in FakeChild.made] == [Role.SUPERVISOR]
        assert bench.acts.of("refused")[0]["op"] == op.value


@pytest.mark.parametrize("op", [Op.START, Op.START_PAUSED, Op.START_RESTORED, Op.SURVEY, *sorted(WITH_ARGUMENTS)])
@pytest.mark.parametrize("phase", VmPhase)
def test_what_is_begun_otherwise_cannot_be_asked_for(bench, op, phase):
    """START by the broker itself, once; a change of devices by a message that says which."""
    if phase in PHASES:
        bench.known(PHASES[phase])
    bench.ask(op)
    bench.refused(ExitCode.WRONG_STATE)
    assert bench.broker._work is None


def test_a_request_too_many_is_refused_and_not_counted(bench):
    for _ in range(PERMITS[Op.READ_CONFIG].per_minute):
        bench.ask(Op.READ_CONFIG)
        assert isinstance(bench.heard(), Init)
        assert isinstance(bench.heard(), Done)
    for _ in range(100):
        bench.ask(Op.READ_CONFIG)
        assert "more than 30 times a minute" in bench.refused(ExitCode.FAILED)
    assert len(bench.reloaded) == PERMITS[Op.READ_CONFIG].per_minute
    assert len(bench.broker._asked._times[Op.READ_CONFIG]) == PERMITS[Op.READ_CONFIG].per_minute
    bench.ask(Op.FIND)
    assert bench.job()[0].op is Op.FIND


def test_refusals_are_logged_so_often_and_counted_beyond_that(bench, monkeypatch):
    """A supervisor gone mad does not fill the log; each of its requests has its answer all the same."""
    for _ in range(REFUSALS_PER_MINUTE + 5):
        bench.ask(Op.PAUSE)
        assert "not possible" in bench.refused()
    assert len(bench.acts.of("refused")) == REFUSALS_PER_MINUTE
    later_s = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    bench.ask(Op.PAUSE)
    assert bench.acts.of("refused")[-1]["missed"] == 5
    bench.ask(Op.PAUSE)
    assert "missed" not in bench.acts.of("refused")[-1]


def test_who_sends_without_end_does_not_keep_the_others_waiting(bench):
    """A turn takes so much of each, and then looks at signals and deadlines."""
    for _ in range(MESSAGES_A_TURN + 3):
        bench.supervisor.there.send(Ask(1, Op.PAUSE, "", 0))
    bench.turn()
    assert len(bench.acts.of("refused")) == MESSAGES_A_TURN
    bench.turn()
    assert len(bench.acts.of("refused")) == MESSAGES_A_TURN + 3


def test_the_limit_is_for_a_minute(bench, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(core.time, "monotonic", lambda: now[0])
    for _ in range(PERMITS[Op.READ_CONFIG].per_minute):
        bench.ask(Op.READ_CONFIG)
    now[0] += 61
    bench.ask(Op.READ_CONFIG)
    assert len(bench.reloaded) == PERMITS[Op.READ_CONFIG].per_minute + 1


def test_one_job_at_a_time(bench):
    bench.known(RUNNING)
    bench.ask(Op.QUERY)
    running = bench.builder
    for op in WITH_HELPER:
        if op is not Op.DESTROY and VmPhase.BUILT in PERMITS[op].phases:
            request(bench, op)
            assert "busy with query" in bench.refused(ExitCode.BUSY)
    assert bench.builder is running
    assert not running.killed


def test_destroy_cancels_what_runs(bench):
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD, 3)
    running = bench.builder
    bench.ask(Op.DESTROY, 4)
    failed = bench.heard()
    assert (failed.sequence, failed.fault.message) == (3, "build: ended by destroy")
    assert running.killed
    assert bench.job()[0].op is Op.DESTROY
    assert bench.acts.of("cancelled") == [{"op": "build", "pid": running.pid}]
    bench.answer(Done(0, NO_DOMAIN, ""))
    done = bench.heard()
    assert (done.sequence, done.domain) == (4, NO_DOMAIN)
    assert bench.broker._phase is VmPhase.ABSENT


def test_progress_and_outcome_carry_the_supervisors_number(bench):
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD, 11)
    bench.answer(Progress(0, "creating the domain"))
    assert bench.heard() == Progress(11, "creating the domain")
    bench.answer(Done(0, RUNNING, "not to be passed on"))
    assert bench.heard() == Done(11, RUNNING, "")
    assert (bench.broker._phase, bench.broker._domid) == (VmPhase.BUILT, 7)


def test_each_act_is_logged_before_and_after(bench):
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD)
    assert bench.acts.records[-1] == ("job", {"op": "build", "domid": -1})
    bench.answer(Done(0, RUNNING, ""))
    assert bench.acts.records[-1][0] == "result"


def test_a_failed_build_leaves_nothing(bench):
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD, 2)
    bench.answer(Failed(0, FAULT, RUNNING))
    assert bench.heard() == Failed(2, FAULT, NO_DOMAIN)
    assert bench.broker._phase is VmPhase.ABSENT


def test_a_kernel_that_cannot_be_opened_changes_nothing(bench):
    bench.known(RUNNING)
    bench.kernel.unlink()
    bench.ask(Op.REBUILD, 2)
    failed = bench.heard()
    assert "kernel: cannot open" in failed.fault.message
    assert (failed.domain.domid, failed.domain.phase) == (7, Phase.BUILT)
    assert bench.broker._phase is VmPhase.BUILT
    assert bench.broker._work is None


def test_a_console_that_is_no_terminal_is_not_opened(bench, tmp_path):
    bench.known(RUNNING)
    for path in (str(bench.kernel), "/dev/null", "/etc/passwd", f"{tmp_path}/none"):
        bench.ask(Op.CONSOLE, 2)
        bench.answer(Done(0, RUNNING, path))
        assert "console:" in bench.refused()


def test_started_is_told_and_a_failed_start_ends_the_monitor(bench):
    bench.ask(Op.STARTED, text="fine")
    assert bench.told == [(0, "fine")]
    assert not bench.broker._quitting
    bench.ask(Op.STARTED, text="kernel: not found", code=1)
    assert bench.told[-1] == (1, "kernel: not found")
    assert bench.broker._quitting


# Children that misbehave


def test_a_builder_that_dies_is_one_failed_request(bench):
    bench.known(RUNNING)
    bench.ask(Op.QUERY, 6)
    bench.builder.die()
    bench.turn()
    assert "query: its builder ended with status 0" in bench.refused()
    assert bench.broker._phase is VmPhase.BUILT
    bench.ask(Op.QUERY, 7)
    bench.answer(Done(0, RUNNING, ""))
    assert bench.heard() == Done(7, RUNNING, "")


def test_a_builder_that_says_nothing_is_ended_at_its_deadline(bench, monkeypatch):
    bench.known(RUNNING)
    bench.ask(Op.QUERY, 6)
    silent = bench.builder
    bench.broker._work.latest = 0.0
    bench.turn()
    assert "no answer within 60 s" in bench.refused(ExitCode.TIMED_OUT)
    assert silent.killed


def test_a_builder_that_failed_at_its_start_has_said_why(bench):
    """It ends without reading its request; its words count, not the broken channel."""
    FakeChild.made.clear()
    spare = FakeChild(Role.BUILDER, 2, {}, "-")
    spare.there.send(Failed(0, Fault(1, "no Xen here", ""), NO_DOMAIN))
    spare.there.close()
    bench.broker._spares[Role.BUILDER] = spare
    bench.ask(Op.FIND, 3)
    bench.turn()
    assert bench.refused() == "no Xen here"


def test_a_builder_cannot_leave_descriptors_behind(bench):
    bench.known(RUNNING)
    counts = []
    for _ in range(50):
        bench.ask(Op.QUERY)
        bench.answer(Done(0, RUNNING, ""), [bench.wakeup])
        assert isinstance(bench.heard(), Done)
        counts.append(psutil.Process().num_fds())
    assert set(counts) == {counts[0]}


def test_a_builder_made_ready_after_a_command_serves_the_next_one_or_ends(bench, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(core.time, "monotonic", lambda: now[0])
    bench.known(RUNNING)
    bench.ask(Op.ASK_POWEROFF)
    assert bench.broker._spares == {}
    bench.answer(Done(0, RUNNING, ""))
    first = bench.broker._spares[Role.BUILDER]
    assert first.role is Role.BUILDER
    bench.ask(Op.WITHDRAW)
    assert (bench.builder, bench.broker._spares) == (first, {})
    bench.answer(Done(0, RUNNING, ""))
    second = bench.broker._spares[Role.BUILDER]
    assert bench.broker._timeout_ms() == spares.SPARE_S * 1000
    now[0] += spares.SPARE_S
    os.write(bench.signals, bytes([signal.SIGHUP]))  # the end of the wait
    bench.turn()
    assert second.killed
    assert bench.broker._spares == {}


@pytest.mark.parametrize("op", [Op.PAUSE, Op.UNPAUSE, Op.QUERY])
def test_the_next_builder_is_made_ready_while_a_pause_is_under_way(bench, op):
    bench.known(RUNNING)
    bench.ask(op)
    first = bench.broker._spares[Role.BUILDER]
    assert bench.builder is not first
    bench.answer(Done(0, RUNNING, ""))
    assert bench.broker._spares == {Role.BUILDER: first}
    bench.ask(Op.DESTROY)
    assert bench.builder is first


@pytest.mark.parametrize("op", [Op.SETTLE, Op.DESTROY, Op.FIND])
def test_no_helper_is_made_ready_where_no_second_command_is_likely(bench, op):
    bench.known(RUNNING)
    bench.ask(op)
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert bench.broker._spares == {}


@pytest.mark.parametrize(
    "message",
    [Hello("supervisor", 1, ""), Progress(0, "x"), Done(0, RUNNING, ""), Job(Op.FIND, UUID, -1, None), b"garbage", b""],
    ids=lambda message: type(message).__name__,
)
def test_a_supervisor_that_breaks_the_protocol_is_replaced(bench, message):
    first = bench.supervisor
    bench.send(Ask(1, Op.STARTED, "", 0))
    if isinstance(message, Job):
        message = message.but(grants=bench.grants)
    frame = message if isinstance(message, bytes) else encode(message)
    first.there._socket.send(frame)
    bench.turn()
    assert first.killed
    assert bench.supervisor is not first
    init = bench.heard()
    assert isinstance(init, Init)
    assert not init.first
    assert bench.job()[0].op is Op.FIND


def test_a_supervisor_lost_before_the_start_was_told_of_leaves_that_to_the_next(bench):
    """Else whoever has started the monitor would wait for ever."""
    bench.supervisor.there.close()
    bench.turn()
    assert bench.heard().first
    bench.send(Ask(1, Op.STARTED, "", 0))
    bench.supervisor.there.close()
    bench.turn()
    assert not bench.heard().first


def test_a_supervisor_that_closes_its_channel_and_lives_on_is_ended(bench):
    first = bench.supervisor
    first.there.close()
    bench.turn()
    assert first.killed
    assert bench.supervisor is not first


def test_a_supervisor_lost_while_it_was_told_something_is_replaced(bench):
    bench.known(RUNNING)
    bench.ask(Op.QUERY)
    first, builder = bench.supervisor, bench.builder
    builder.there.send(Done(0, RUNNING, ""))
    first.there.send(Ask(5, Op.READ_CONFIG, "", 0))
    first.there.close()
    bench.turn()
    assert first.killed
    os.write(bench.signals, bytes([signal.SIGHUP]))  # so that the next turn has something to do
    bench.turn()
    assert bench.supervisor is not first
    assert isinstance(bench.heard(), Init)


def test_a_supervisor_that_keeps_ending_ends_the_monitor(bench):
    for _ in range(RESTARTS_PER_MINUTE):
        bench.supervisor.die()
        bench.turn()
        if bench.broker._work:
            bench.answer(Done(0, NO_DOMAIN, ""))
    bench.supervisor.die()
    with pytest.raises(XenvmError, match="supervisor ended 6 times in a minute"):
        bench.turn()


def test_the_work_of_a_lost_supervisor_brings_the_next_one_up_to_date(bench):
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD, 8)
    builder = bench.builder
    bench.supervisor.die()
    bench.turn()
    assert isinstance(bench.heard(), Init)
    assert bench.builder is builder
    bench.answer(Done(0, RUNNING, ""))
    assert bench.heard() == Done(0, RUNNING, "")


def test_a_supervisor_cannot_say_it_is_another(bench):
    bench.supervisor.there.send(Hello("supervisor", bench.supervisor.pid, "proof"))
    bench.turn()
    assert bench.acts.of("confined") == [{"role": "supervisor", "pid": bench.supervisor.pid, "proof": "proof"}]


def test_a_watcher_that_keeps_ending_is_started_ever_later(bench, monkeypatch):
    now, pauses = [1000.0], []
    monkeypatch.setattr(core.time, "monotonic", lambda: now[0])
    bench.broker._start_watcher()
    for _ in range(RESTARTS_PER_MINUTE):
        watcher = bench.broker._watcher
        watcher.die()
        bench.turn()
        assert bench.broker._watcher is None
        pauses.append(bench.broker._timeout_ms() / 1000)
        now[0] += pauses[-1] - 0.01
        os.write(bench.signals, bytes([signal.SIGHUP]))  # something else to do meanwhile
        bench.turn()
        assert bench.broker._watcher is None
        now[0] += 0.02
        bench.turn()
        assert bench.broker._watcher.role is Role.WATCHER
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0]
    bench.broker._watcher.die()
    with pytest.raises(XenvmError, match="watcher ended 6 times in a minute"):
        bench.turn()


def test_a_failed_start_is_the_exit_status(bench):
    for code in (0, 7):
        bench.ask(Op.STARTED, code=code)
        assert (bench.broker._quitting, bench.broker._code) == (code != 0, code)


def test_the_time_of_a_job_runs_from_when_its_helper_can_begin(bench):
    """On a host full of booting guests it may take long to come up; one that was ready before has no more for that."""
    bench.known(RUNNING)
    bench.ask(Op.PAUSE)
    working, now_s = bench.broker._work, time.monotonic()
    assert working.end == pytest.approx(now_s + 60, abs=5)  # it had greeted before
    working.builder.greeted_s = 0.0
    slow = work.Work(1, Op.PAUSE, working.builder, 60.0, work.Change())
    assert slow.end == pytest.approx(now_s + 60 + work.HELPER_START_S, abs=5)
    slow.latest = 0.0
    assert "its builder did not come up within 180 s" in work.how_it_failed(slow).message
    slow.latest = now_s + 180
    working.builder.greeted_s = time.monotonic() + 30
    assert slow.end == pytest.approx(now_s + 90, abs=5)
