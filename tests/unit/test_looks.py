# SPDX-License-Identifier: GPL-2.0-or-later
"""One look for the whole host: who looks, who waits, who takes another's word, and that no end is ever missed."""

import contextlib
import fcntl
import os
import time

import broker_bench
import pytest
from broker_bench import FAULT, RUNNING, UUID
from hypothesis import given
from hypothesis import strategies as st

from xenvm.boundary import survey
from xenvm.boundary.messages import NO_DOMAIN, Ask, DomainState, Done, Failed, Fault, Job, Op
from xenvm.boundary.privileges import Role
from xenvm.broker import looks
from xenvm.errors import ExitCode, XenvmError
from xenvm.helpers.builder.jobs import Builder
from xenvm.supervisor.looking import PAUSE_S, SHARE_S, Looking

OTHER = "99999999-2222-4333-8444-555555555555"
PAUSED = RUNNING.but(state=DomainState.PAUSED)
SECOND_NS = 1_000_000_000


@pytest.fixture
def bench(monkeypatch, tmp_path):
    for made in broker_bench.bench(monkeypatch, tmp_path):
        made.known(RUNNING)
        made.file = tmp_path / "looks"
        yield made


def line(*domains, ago_s=0.0):
    return survey.text(time.monotonic_ns() - int(ago_s * SECOND_NS), domains)


def write(path, text):
    """Put there what another broker has found."""
    path.touch(0o600)
    descriptor = os.open(path, os.O_RDWR)
    looks.publish([descriptor], text)
    os.close(descriptor)


def look(bench, age_ms=0, sequence=1):
    bench.send(Ask(sequence, Op.QUERY, "", 0, age_ms))


@contextlib.contextmanager
def locked(path):
    path.touch(0o600)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_free(path):
    with contextlib.suppress(BlockingIOError), locked(path):
        return True
    return False


def job(bench):
    message, _ = bench.job()
    return message.op


# The text


def test_what_runs_is_told_and_all_else_is_absent():
    ended = (DomainState.DYING, DomainState.SHUTDOWN, DomainState.ABSENT)
    others = [(RUNNING.but(domid=20 + number, state=state), UUID) for number, state in enumerate(ended)]
    domains = [(RUNNING, UUID), (PAUSED.but(domid=8), OTHER), *others]
    text = survey.text(5, domains)
    assert survey.told(text, 7, UUID, 4, 6) is DomainState.RUNNING
    assert survey.told(text, 8, OTHER, 4, 6) is DomainState.PAUSED
    for domid, uuid in ((7, OTHER), (8, UUID), (20, UUID), (21, UUID), (22, UUID), (1, UUID), (77, UUID), (-1, UUID)):
        assert survey.told(text, domid, uuid, 4, 6) is DomainState.ABSENT


def test_a_look_that_began_before_the_event_or_has_yet_to_begin_tells_nothing():
    text = survey.text(5, [(RUNNING, UUID)])
    assert survey.told(text, 7, UUID, 5, 6) is None
    assert survey.told(text, 7, UUID, 1, 4) is None
    assert survey.told(text, 7, UUID, 4, 5) is DomainState.RUNNING


@pytest.mark.parametrize("begun", ["", "-5", "+5", " 5", "5\n", "5.0", "0x5", "\u0665", "1" * 20, "1e1", "5_0", "x"])
def test_an_odd_time_tells_nothing(begun):
    assert survey.told(f"{begun} 7r{UUID.replace('-', '')}", 7, UUID, -1, 1 << 80) is None


def test_a_domain_in_two_states_is_looked_at_again():
    word = UUID.replace("-", "")
    assert survey.told(f"5 7r{word} 7p{word}", 7, UUID, 4, 6) is DomainState.ABSENT


def test_a_crowd_fits_into_a_frame_and_who_is_cut_off_looks():
    crowd = [(RUNNING.but(domid=30000 + number), OTHER) for number in range(survey.DOMAINS_LIMIT)]
    text = survey.text(time.monotonic_ns(), [*crowd, (RUNNING, UUID)])
    assert Done.from_body(Done(0, RUNNING, text).as_body()).text == text
    assert len(text) + 200 < looks.SIZE_LIMIT_BYTES
    assert survey.told(text, 30000, OTHER, 0, 1 << 62) is DomainState.RUNNING
    assert survey.told(text, 7, UUID, 0, 1 << 62) is DomainState.ABSENT


@given(st.text())
def test_no_text_is_an_error(text):
    assert survey.told(text, 7, UUID, 0, 1 << 62) in (None, DomainState.ABSENT)


class Xen:
    """A hypervisor with two domains; `asked_ns` is when they were listed."""

    def domains(self):
        self.asked_ns = time.monotonic_ns()
        yield from ((RUNNING, UUID), (PAUSED.but(domid=8), OTHER))

    def look(self, domid, uuid):
        return PAUSED if (domid, uuid) == (7, UUID) else None


def test_a_builder_takes_the_time_before_it_lists_and_looks_at_its_own_after_that(bench):
    xen, before_ns = Xen(), time.monotonic_ns()
    done = Builder(xen, None, None, lambda *_: None).run(Job(Op.SURVEY, UUID, 7, bench.grants), [])
    begun_ns = int(done.text.split(" ")[0])
    assert before_ns <= begun_ns <= xen.asked_ns
    assert survey.told(done.text, 8, OTHER, begun_ns - 1, begun_ns) is DomainState.PAUSED
    assert done.domain == PAUSED


# The broker


def test_alone_it_looks_at_once_and_says_what_it_saw(bench):
    begun = time.monotonic_ns()
    look(bench, sequence=4)
    assert job(bench) is Op.SURVEY
    assert not is_free(bench.file)
    assert bench.file.stat().st_mode & 0o777 == 0o600
    bench.answer(Done(0, PAUSED, line((PAUSED, UUID))))
    assert bench.heard() == Done(4, PAUSED, "")  # the list is not for supervisors
    assert is_free(bench.file)
    with open(bench.file) as file:
        text = looks._read(file.fileno())
    assert survey.told(text, 7, UUID, begun, time.monotonic_ns()) is DomainState.PAUSED


def test_with_few_domains_the_next_builder_is_begun_and_in_a_crowd_it_is_not(bench):
    look(bench)
    assert Role.BUILDER in bench.broker._spares
    bench.answer(Done(0, RUNNING, line(*((RUNNING.but(domid=number), OTHER) for number in range(1, 30)))))
    bench.heard()
    bench.broker._spares.end()
    look(bench)
    assert Role.BUILDER not in bench.broker._spares
    bench.answer(Done(0, RUNNING, line()))
    assert Role.BUILDER not in bench.broker._spares


@pytest.mark.parametrize("domain", [RUNNING, PAUSED])
def test_another_monitors_look_will_do(bench, domain):
    write(bench.file, line((domain, UUID), ago_s=1))
    look(bench, age_ms=2000, sequence=3)
    answer = bench.heard()
    assert (answer.sequence, answer.domain.state, answer.domain.domid) == (3, domain.state, 7)
    assert (bench.broker._work, bench.acts.of("job"), bench.acts.of("refused")) == (None, [], [])
    assert is_free(bench.file)


def test_it_will_do_while_the_next_look_is_under_way(bench):
    write(bench.file, line((RUNNING, UUID), ago_s=1))
    with locked(bench.file):
        look(bench, age_ms=2000)
        assert isinstance(bench.heard(), Done)


def test_one_that_began_before_the_event_will_not(bench):
    write(bench.file, line((RUNNING, UUID), ago_s=2))
    look(bench, age_ms=1000)
    assert job(bench) is Op.SURVEY


@pytest.mark.parametrize("domains", [(), ((RUNNING.but(domid=8), UUID),), ((RUNNING, OTHER),)])
def test_whose_domain_has_not_been_seen_looks_at_it_and_lets_others_look(bench, domains):
    write(bench.file, line(*domains, ago_s=1))
    look(bench, age_ms=2000)
    assert job(bench) is Op.QUERY
    assert is_free(bench.file)
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert bench.heard().domain == NO_DOMAIN


def test_while_another_looks_the_answer_is_busy_and_nothing_is_begun(bench):
    with locked(bench.file):
        look(bench, sequence=9)
        answer = bench.heard()
    assert (answer.sequence, answer.fault.code, answer.domain.domid) == (9, ExitCode.BUSY, 7)
    assert (bench.broker._work, bench.acts.of("refused")) == (None, [])


def test_a_look_of_ones_own_asks_nobody(bench):
    write(bench.file, line((RUNNING, UUID)))
    with locked(bench.file):
        bench.ask(Op.QUERY)
        assert job(bench) is Op.QUERY


CONTENTS = {
    "empty": b"",
    "no seal": b"%d 7r11111111222243338444555555555555",
    "another seal": b"%d 7r11111111222243338444555555555555\n" + b"0" * 64 + b"\n",
    "binary": bytes(range(256)),
    "not text": "\u00e4".encode() * 40 + b"\n",
    "too long": b"1 " * looks.SIZE_LIMIT_BYTES,
    "holes": b"\0" * 4096,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_whatever_else_is_in_the_file_is_no_answer(bench, name):
    bench.file.touch(0o600)
    bench.file.write_bytes(CONTENTS[name].replace(b"%d", str(time.monotonic_ns()).encode()))
    look(bench, age_ms=60_000)
    assert job(bench) is Op.SURVEY
    bench.answer(Done(0, RUNNING, line((RUNNING, UUID))))
    bench.heard()
    look(bench, age_ms=60_000)
    assert isinstance(bench.heard(), Done)  # by now there is a true one in it


@given(st.binary(), st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_file_is_as_none(tmp_path_factory, more, place, byte):
    path = tmp_path_factory.mktemp("looks") / "looks"
    write(path, survey.text(5, [(RUNNING, UUID)]))
    whole = path.read_bytes()
    damaged = whole[:place] + bytes([byte]) + whole[place + 1 :] + more
    path.write_bytes(damaged)
    with open(path) as file:
        assert looks._read(file.fileno()) == ("" if damaged != whole else survey.text(5, [(RUNNING, UUID)]))


def test_a_file_that_others_could_write_or_that_cannot_be_is_not_used(bench, monkeypatch):
    write(bench.file, line((RUNNING, UUID), ago_s=1))
    there = bench.file.read_bytes()

    def alone():
        look(bench, age_ms=2000)
        assert job(bench) is Op.QUERY
        bench.answer(Done(0, RUNNING, ""))
        return bench.heard() == Done(1, RUNNING, "")

    bench.file.chmod(0o660)
    assert alone()
    bench.file.rename(bench.file.with_name("elsewhere"))
    bench.file.symlink_to("elsewhere")
    bench.file.with_name("elsewhere").chmod(0o600)
    assert alone()
    bench.file.unlink()
    bench.file.mkdir()
    assert alone()
    bench.file.rmdir()
    os.mkfifo(bench.file, 0o600)
    assert alone()
    bench.file.unlink()
    bench.broker._directory = "/nowhere"
    assert alone()
    bench.broker._directory = str(bench.file.parent)
    monkeypatch.setattr(looks, "HERE", looks.HERE.but(simulator=str(bench.file.parent)))
    assert alone()  # on a simulated host nobody else makes it
    assert not bench.file.exists()
    assert bench.file.with_name("elsewhere").read_bytes() == there


def test_a_file_of_another_user_is_not_used(bench, monkeypatch):
    write(bench.file, line((RUNNING, UUID), ago_s=1))
    monkeypatch.setattr(looks.os, "geteuid", lambda: os.getuid() + 1)
    look(bench, age_ms=2000)
    assert job(bench) is Op.QUERY


def test_however_a_look_ends_the_lock_is_free(bench):
    look(bench)
    bench.builder.die()
    bench.turn()
    assert "survey: its builder ended" in bench.refused()
    assert is_free(bench.file)
    look(bench)
    bench.answer(Failed(0, FAULT, RUNNING))
    assert isinstance(bench.heard(), Failed)
    assert is_free(bench.file)
    look(bench)
    bench.ask(Op.DESTROY, 2)
    assert isinstance(bench.heard(), Failed)
    assert is_free(bench.file)
    assert bench.file.read_bytes() == b""
    for _ in range(4):  # it is begun once more, and each time looked what it has left
        bench.broker._finish()
    bench.heard()


def test_a_look_that_cannot_be_logged_leaves_the_lock(bench):
    bench.acts.full = True
    with pytest.raises(XenvmError):
        look(bench)  # the refusal cannot be logged either: the monitor ends
    assert is_free(bench.file)


def test_a_full_disk_costs_the_others_their_own_look(bench, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    look(bench)
    monkeypatch.setattr(looks.os, "pwrite", full)
    bench.answer(Done(0, RUNNING, line((RUNNING, UUID))))
    assert isinstance(bench.heard(), Done)
    assert bench.file.read_bytes() == b""


# The supervisor

BUSY = Failed(1, Fault(int(ExitCode.BUSY), "another monitor looks at the host", ""), RUNNING)


def test_at_most_one_look_a_second_and_the_newest_event_counts():
    looking = Looking()
    looking.soon(100.0, alone=False)
    looking.soon(100.5, alone=False)
    assert looking.due_s == 100.0
    assert looking.begin(101.0) == 500
    assert not looking.put_off(Op.QUERY, Done(1, RUNNING, ""), 101.1)
    looking.soon(101.2, alone=False)
    assert looking.due_s == 101.0 + PAUSE_S


def test_another_monitor_is_waited_for_but_not_for_long():
    looking, now_s, tries = Looking(), 100.0, 0
    looking.soon(now_s, alone=False)
    while (age_ms := looking.begin(now_s)) >= 0:
        assert age_ms in (int((now_s - 100) * 1000), int((now_s - 100) * 1000) - 1)
        assert looking.put_off(Op.QUERY, BUSY, now_s)
        assert 0 < looking.due_s - now_s <= 0.21
        now_s, tries = looking.due_s, tries + 1
    assert now_s == 100.0 + SHARE_S
    assert tries < 15  # the broker allows 600 a minute
    looking.put_off(Op.QUERY, Done(1, RUNNING, ""), now_s)
    looking.soon(now_s, alone=False)
    assert looking.begin(looking.due_s) >= 0  # afterwards all is as before


def test_events_that_go_on_do_not_move_the_deadline():
    looking, now_s = Looking(), 100.0
    looking.soon(now_s, alone=False)
    while looking.begin(now_s) >= 0:
        assert looking.put_off(Op.QUERY, BUSY, now_s)
        looking.soon(looking.due_s - 0.01, alone=False)
        now_s = looking.due_s
    assert now_s == 100.0 + SHARE_S


def test_a_fresh_watcher_or_a_failure_means_a_look_of_ones_own():
    looking = Looking()
    looking.soon(100.0, alone=True)
    looking.soon(100.0, alone=False)
    assert looking.begin(100.0) == -1
    looking.soon(102.0, alone=False)
    assert looking.begin(102.0) == 0


def test_after_a_look_that_fails_comes_another_one_later_each_time():
    looking, now_s, failed = Looking(), 100.0, Failed(1, FAULT, RUNNING)
    looking.soon(now_s, alone=False)
    pauses = []
    while len(pauses) < 8:
        begun_s = now_s
        assert looking.begin(now_s) == (-1 if pauses else 0)  # another monitor's look would not tell how ours went
        assert not looking.put_off(Op.QUERY, failed, now_s)
        looking.failed(now_s)
        now_s = looking.due_s
        pauses.append(now_s - begun_s)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    looking.soon(begun_s, alone=False)
    assert looking.due_s == begun_s + PAUSE_S  # an event does not wait for that long
    assert looking.begin(looking.due_s) == -1
    looking.put_off(Op.QUERY, Done(1, RUNNING, ""), now_s)
    looking.failed(now_s)
    assert looking.due_s == now_s + 1


def test_what_was_seen_before_a_command_does_not_count_after_it():
    """Else a guest that has just been unpaused would be called paused."""
    looking = Looking()
    looking.soon(100.0, alone=False)
    assert looking.begin(100.0) == 0
    assert looking.put_off(Op.QUERY, BUSY, 100.0)
    assert not looking.put_off(Op.UNPAUSE, Done(2, RUNNING, ""), 100.04)
    assert looking.begin(100.05) in (9, 10)


STEPS = st.lists(
    st.sampled_from(("end", "other", "begin", "write", "lock", "unlock", "turn", "turn", "long")),
    max_size=40,
)


@given(STEPS, st.floats(0, 0.02))
def test_an_end_is_never_missed(steps, transit_s):
    """One monitor among others, which look and write whenever they like, also long after they have begun to look."""
    now_s, ended, noticed, locked_by_another = 1000.0, False, False, False
    looking, begun, file = Looking(), None, ""

    def seen():
        return survey.text(int(now_s * SECOND_NS), [] if ended else [(RUNNING, UUID)])

    def turn(for_s):
        nonlocal now_s, noticed
        end_s = now_s + for_s
        while looking.due_s and looking.due_s <= end_s and not noticed:
            now_s = max(now_s, looking.due_s)
            age_ms = looking.begin(now_s)
            now_s += transit_s
            now_ns = int(now_s * SECOND_NS)
            told = survey.told(file, 7, UUID, now_ns - age_ms * 1_000_000, now_ns) if age_ms >= 0 else None
            if told is None and age_ms >= 0 and locked_by_another:
                assert looking.put_off(Op.QUERY, BUSY, now_s)
                continue
            if told not in (DomainState.RUNNING, DomainState.PAUSED):
                noticed = ended
            looking.put_off(Op.QUERY, Done(1, RUNNING, ""), now_s)
        now_s = max(now_s, end_s)

    looking.put_off(Op.QUERY, Done(1, RUNNING, ""), now_s)
    for step in [*steps, "end"]:
        if step in ("end", "other"):
            ended |= step == "end"
            looking.soon(now_s, alone=False)
        elif step == "begin":
            begun = seen()
        elif step == "write" and begun:
            file, begun = begun, None
        elif step in ("lock", "unlock"):
            locked_by_another = step == "lock"
        turn({"turn": 0.03, "long": 0.7}.get(step, 0.001))
    if begun:
        file = begun
    locked_by_another = True  # for ever: it was stopped, say
    turn(PAUSE_S + SHARE_S + 1)
    assert noticed
