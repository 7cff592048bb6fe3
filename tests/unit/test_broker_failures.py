# SPDX-License-Identifier: GPL-2.0-or-later
"""What a broker does about a job that has failed: looks what is left, does it once more, or says that it failed."""

import os
import signal

import devices_bench
import pytest
from broker_bench import RUNNING
from children import FakeChild
from devices_bench import DISK, SEEN, devices_of, tell

from xenvm.boundary.devices import Kind, Vif
from xenvm.boundary.messages import (
    NO_DOMAIN,
    Done,
    Failed,
    Fault,
    Init,
    Op,
    Phase,
    Unplug,
)
from xenvm.boundary.privileges import Role
from xenvm.broker import tidying
from xenvm.broker.phases import VmPhase
from xenvm.broker.plugging import Wanted
from xenvm.errors import ExitCode

# A helper that dies over what must not be left half done


@pytest.fixture
def bench(monkeypatch, tmp_path):
    yield from devices_bench.bench(monkeypatch, tmp_path)


def test_a_destroy_whose_builder_dies_is_done_all_the_same(bench):
    bench.known(RUNNING)
    bench.ask(Op.DESTROY, sequence=5)
    bench.builder.die()
    bench.turn()
    assert bench.silent()
    bench.look(Done(0, NO_DOMAIN, ""))
    answer = bench.heard()
    assert (type(answer), answer.sequence, answer.domain) == (Done, 5, NO_DOMAIN)
    assert bench.broker._phase is VmPhase.ABSENT


def test_a_supervisor_that_dies_over_a_change_of_devices_ends_it(bench):
    """Nobody waits for it any more, and the next supervisor could say nothing of the VM as long as a guest takes."""
    bench.known(RUNNING)
    bench.send(Unplug(9, Kind.VBD, 51728, False, False, 30))
    worker = bench.builder
    bench.supervisor.there.close()
    bench.turn()
    assert worker.killed
    assert bench.job()[0].op is Op.FIND
    bench.answer(Done(0, RUNNING, ""))
    assert isinstance(bench.heard(), Init)
    assert bench.heard().domain == RUNNING


def test_one_that_dies_before_it_has_begun_has_a_successor_once(bench):
    """A suspend whose image has its name would else leave a domain that nobody wakes and nobody removes."""
    bench.known(RUNNING)
    bench.ask(Op.DESTROY, sequence=4)
    bench.builder.die()
    bench.turn()
    bench.look(Done(0, RUNNING, ""))
    assert bench.job()[0].op is Op.DESTROY
    bench.answer(Done(0, NO_DOMAIN, ""))
    answer = bench.heard()
    assert (type(answer), answer.sequence) == (Done, 4)
    bench.known(RUNNING)
    bench.ask(Op.DESTROY, sequence=5)
    for _ in range(2):
        bench.builder.die()
        bench.turn()
        bench.look(Done(0, RUNNING, ""))
    answer = bench.heard()
    assert isinstance(answer, Failed)
    assert answer.domain.domid == RUNNING.domid
    assert bench.broker._phase is VmPhase.BUILT


def test_a_build_that_failed_and_could_not_remove_what_it_made_is_looked_at_again(bench):
    """Its domain may even be whole, when xenstored went away at the last moment: then the build has succeeded."""
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD, sequence=5)
    bench.job()
    bench.answer(Failed(0, Fault(1, "xenstored is gone", ""), NO_DOMAIN.but(phase=Phase.BUILDING)))
    bench.look(Done(0, RUNNING, ""))
    answer = bench.heard()
    assert (type(answer), answer.sequence, answer.domain) == (Done, 5, RUNNING)
    assert bench.broker._phase is VmPhase.BUILT


def test_a_reboot_whose_builder_dies_is_built_once_more_and_not_twice(bench):
    """A guest's own reboot has nobody who would ask for it again."""
    bench.known(RUNNING)
    bench.ask(Op.REBUILD, sequence=5)
    for op in (Op.REBUILD, Op.BUILD):
        assert bench.job()[0].op is op
        assert bench.silent()
        bench.builder.die()
        bench.turn()
        bench.look(Done(0, NO_DOMAIN, ""))
    answer = bench.heard()
    assert (type(answer), answer.sequence) == (Failed, 5)
    assert bench.broker._work is None


def test_while_it_is_looked_what_a_failed_job_has_left_the_monitor_serves_its_supervisor(bench):
    """What it cannot do meanwhile it refuses by the name of what was asked for; a destroy takes the place of the look."""
    bench.known(RUNNING)
    bench.ask(Op.REBUILD, sequence=5)
    bench.builder.die()
    bench.turn()
    looking = bench.builder
    bench.ask(Op.CONSOLE_LOG, sequence=6)
    assert "console" in bench.refused()
    bench.ask(Op.FIND, sequence=7)
    assert bench.refused(ExitCode.BUSY) == "the broker is busy with rebuild"
    bench.ask(Op.DESTROY, sequence=8)
    assert looking.killed
    assert bench.refused() == "rebuild: ended by destroy"
    assert bench.job()[0].op is Op.DESTROY
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert bench.heard().sequence == 8


def test_a_supervisor_that_ends_over_such_a_look_leaves_no_answer_to_the_next(bench):
    """But what was asked for is done once more all the same."""
    bench.known(RUNNING)
    bench.ask(Op.REBUILD, sequence=5)
    bench.builder.die()
    bench.turn()
    bench.supervisor.there.close()
    bench.turn()
    assert isinstance(bench.heard(), Init)
    bench.look(Done(0, NO_DOMAIN, ""))
    job, _ = bench.job()
    assert job.op is Op.BUILD
    bench.answer(Done(0, RUNNING.but(domid=8), ""))
    answer = bench.heard()
    assert (answer.sequence, answer.domain.domid) == (0, 8)


def test_what_was_added_survives_a_reboot_that_is_done_once_more(bench):
    bench.known(RUNNING)
    bench.broker._book.added(Wanted((), (Vif(3, "br0", "00:16:3e:00:00:09"),)))
    bench.ask(Op.REBUILD, sequence=5)
    bench.builder.die()
    bench.turn()
    bench.look(Done(0, NO_DOMAIN, ""))
    job, _ = bench.job()
    assert job.op is Op.BUILD
    assert [vif.id for vif in job.vifs] == [3]
    bench.builder.die()
    bench.turn()
    bench.look(Done(0, NO_DOMAIN, ""))
    assert bench.broker._book.wanted(bench.grants).vifs == ()


@pytest.mark.parametrize("looking", [False, True])
def test_a_monitor_that_is_ended_over_a_build_has_what_is_half_there_removed(bench, monkeypatch, looking):
    asked = []

    def ask(child, message, deadline_s, models):
        child.end()
        asked.append((message.op, message.domid, deadline_s, models))
        return Done(0, NO_DOMAIN, "")

    monkeypatch.setattr(tidying, "ask_once", ask)
    bench.known(NO_DOMAIN)
    bench.ask(Op.BUILD, sequence=5)
    bench.job()
    if looking:
        bench.builder.die()
        bench.turn()
    working = bench.builder
    os.write(bench.signals, bytes([signal.SIGTERM]))
    bench.turn()
    bench.broker._end_children()
    assert working.killed
    assert asked == [(Op.FIND, -1, tidying.CLEAR_UP_S, bench.broker._models)]
    assert bench.acts.of("result")[-1] == {"op": "find", "result": "Done"}


# A kernel that cannot be unpacked


def unpackers(bench):
    return [child for child in FakeChild.made if child.role is Role.UNPACKER]


def refuse_kernel(bench):
    """Let every unpacker fail that is asked."""
    for number in range(3):
        if len(unpackers(bench)) > number:
            tell(bench, unpackers(bench)[number], Failed(0, Fault(1, "the image is damaged", ""), NO_DOMAIN))


def test_a_damaged_kernel_costs_a_running_domain_nothing(bench):
    """A forced restart: nobody has touched the domain, whose disks go on."""
    devices_of(bench, disks=(DISK,)).known(RUNNING)
    served = SEEN.but(server="4711 99")
    bench.broker._book.seen((served,))
    bench.kernel.write_bytes(b"not an ELF file")
    bench.ask(Op.REBUILD, 3)
    refuse_kernel(bench)
    answer = bench.heard()
    assert isinstance(answer, Failed)
    assert "kernel: the image is damaged" in answer.fault.message
    assert answer.domain.phase is Phase.BUILT
    assert (bench.broker._phase, bench.broker._domid) == (VmPhase.BUILT, RUNNING.domid)
    assert bench.ended == []
    assert bench.broker._book.servers == {"4711 99"}


@pytest.mark.parametrize("found", [True, False])
def test_a_domain_is_adopted_also_when_its_kernel_is_damaged(bench, found):
    """Its image servers live on; without a domain the start fails of the kernel."""
    devices_of(bench, disks=(DISK,))
    served = SEEN.but(server="4711 99")
    answer = Done(0, RUNNING if found else NO_DOMAIN, "", (served,) if found else ())
    bench.kernel.write_bytes(b"not an ELF file")
    bench.broker._begin(0, Op.START, 60)
    refuse_kernel(bench)
    bench.look(answer)
    told = bench.heard()
    assert type(told) is (Done if found else Failed)
    assert bench.ended == []
    assert bench.broker._phase is (VmPhase.BUILT if found else VmPhase.ABSENT)
