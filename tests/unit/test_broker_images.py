# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker and save images: descriptors that it passes on, guests that run on whatever fails, images that it starts from."""

import errno
import os
import signal
import tempfile

import broker_bench
import pytest
from broker_bench import FAULT, RUNNING, UUID
from children import FakeChild

from xenvm.boundary.images import Image, Inspect, Progress, Restore, Room, Save, Sync, Write, Writing, Written
from xenvm.boundary.messages import NO_DOMAIN, DomainState, Done, Failed, HostPolicy, Init, Op
from xenvm.boundary.privileges import Role
from xenvm.broker import core, findings, images, work
from xenvm.broker.phases import IMAGE_S_PER_MIB, MODEL_S, PERMITS
from xenvm.errors import ExitCode, UsageError, XenvmError

SUSPENDED = RUNNING.but(state=DomainState.SHUTDOWN, reason=2)
IMAGE = Image(65536, 1, 4, 17, "")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    yield from broker_bench.bench(monkeypatch, tmp_path)


@pytest.fixture
def file():
    with tempfile.TemporaryFile() as made:
        yield made


def workers(role):
    return [child for child in FakeChild.made if child.role is role]


def save(bench, file, *, go_on=False):
    bench.known(RUNNING)
    bench.send(Save(5, go_on, 30), [file.fileno()])
    return written(bench)


def written(bench):
    """Let the image be written; return the builder's job."""
    message, (entrance,) = bench.builder.there.receive(deadline_s=5)
    _, (image, exit_end) = workers(Role.STREAM)[-1].there.receive(deadline_s=5)
    os.write(image, b"memory")
    for descriptor in (entrance, image, exit_end):
        os.close(descriptor)
    return message


def restore(bench, file, *, paused=False, foreign=False):
    bench.known(NO_DOMAIN)
    bench.send(Restore(6, paused, foreign), [file.fileno()])
    message, descriptors = bench.builder.there.receive(deadline_s=5)
    return message, descriptors[0]


# Saving


@pytest.mark.parametrize(("go_on", "op"), [(False, Op.SAVE), (True, Op.CHECKPOINT)])
def test_a_save_gets_time_for_the_memory(bench, file, go_on, op):
    job = save(bench, file, go_on=go_on)
    assert (job.op, job.timeout_s, job.domid) == (op, 30, 7)
    assert bench.broker._work.deadline_s == PERMITS[op].deadline_s + 30 + MODEL_S + 64 * IMAGE_S_PER_MIB
    bench.answer(Progress(0, "writing the image", 4096, 65536))
    assert bench.heard() == Progress(5, "writing the image", 4096, 65536)
    bench.answer(Done(0, SUSPENDED, "4711"))
    assert bench.heard() == Done(5, SUSPENDED, "4711")
    file.seek(0)
    assert file.read() == b"memory"


@pytest.mark.parametrize("kind", ["append", "read", "write", "full", "none", "pipe"])
def test_what_an_image_cannot_be_written_into(bench, tmp_path, kind):
    path = tmp_path / "image"
    path.write_bytes(b"old" if kind == "full" else b"")
    flags = {"append": os.O_RDWR | os.O_APPEND, "read": os.O_RDONLY, "write": os.O_WRONLY}.get(kind, os.O_RDWR)
    descriptors = [] if kind == "none" else [os.open(path, flags)]
    if kind == "pipe":
        descriptors += os.pipe()
    bench.known(RUNNING)
    bench.send(Save(5, False, 30), descriptors[-1:])
    assert "file" in bench.refused(ExitCode.USAGE) or kind == "none"
    assert workers(Role.BUILDER) == []
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_builder_that_dies_over_a_save_has_the_guest_resumed_before_anybody_hears(bench, file):
    save(bench, file)
    bench.builder.die()
    bench.turn()
    assert bench.silent()
    assert bench.job()[0].op is Op.RESUME
    bench.answer(Done(0, RUNNING, ""))
    assert "save: its builder ended" in bench.refused(ExitCode.FAILED)
    assert bench.broker._work is None


def test_a_failed_save_whose_resume_fails_too_tells_of_the_save(bench, file):
    save(bench, file)
    bench.builder.die()
    bench.turn()
    bench.answer(Failed(0, FAULT, NO_DOMAIN))
    assert "save: its builder ended" in bench.refused(ExitCode.FAILED)


def test_a_builder_that_says_why_has_resumed_the_guest_itself(bench, file):
    save(bench, file)
    bench.answer(Failed(0, FAULT, NO_DOMAIN))
    assert bench.refused(FAULT.code) == FAULT.message
    assert bench.broker._work is None


def test_a_save_that_takes_too_long(bench, file, monkeypatch):
    save(bench, file)
    bench.broker._work.latest = 0.0
    bench.turn()
    assert bench.job()[0].op is Op.RESUME
    bench.answer(Done(0, RUNNING, ""))
    assert "save: no answer within" in bench.refused(ExitCode.TIMED_OUT)


def begun(bench, file, compression="none"):
    """A save that has begun; return the worker, the builder's end of the pipe, and the worker's."""
    bench.broker._grants = bench.grants.but(image_compression=compression)
    bench.known(RUNNING)
    bench.send(Save(5, False, 30), [file.fileno()])
    (worker,) = workers(Role.STREAM)
    message, (image, exit_end) = worker.there.receive(deadline_s=5)
    assert message == Write(65536, compression)
    assert os.path.sameopenfile(image, file.fileno())
    os.close(image)
    _, (entrance,) = bench.builder.there.receive(deadline_s=5)
    bench.answer(Room(4096))
    assert worker.there.receive(deadline_s=5)[0] == Room(4096)
    return worker, entrance, exit_end


def hears(bench):
    """What the builder hears of its broker, None when nothing."""
    try:
        return bench.builder.there.receive_now()[0]
    except BlockingIOError:
        return None


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_save_has_a_builder_with_a_pipe_and_a_worker_with_the_image(bench, file, compression):
    worker, entrance, exit_end = begun(bench, file, compression)
    os.write(entrance, b"memory")
    os.close(entrance)
    assert os.read(exit_end, 100) == b"memory"
    assert os.read(exit_end, 100) == b""  # nobody else holds the other end
    os.close(exit_end)
    worker.there.send(Writing())
    bench.turn()
    assert hears(bench) == Writing()
    worker.there.send(Written(6))
    bench.turn()
    worker.die()
    bench.turn()
    assert hears(bench) is None  # before it asks
    bench.answer(Sync())
    assert hears(bench) == Written(6)
    bench.answer(Done(0, SUSPENDED, "6 zstd"))
    assert bench.heard() == Done(5, SUSPENDED, "6 zstd")


@pytest.mark.parametrize("when", [0, 1])
def test_a_writer_that_dies_is_said_to_the_builder_and_to_the_user(bench, file, when):
    worker, *ends = begun(bench, file)
    for descriptor in ends:
        os.close(descriptor)
    if when:
        worker.there.send(Writing())
        bench.turn()
        assert hears(bench) == Writing()
        bench.answer(Sync())
    worker.die()
    bench.turn()
    told = hears(bench).fault.message
    assert told == worker_ended()
    bench.answer(Failed(0, FAULT.but(message="writing the image: Broken pipe"), NO_DOMAIN))
    assert bench.refused() == told


def test_the_words_of_the_writer_count_though_the_builder_sees_the_end_of_the_pipe_first(bench, file):
    worker, *ends = begun(bench, file)
    for descriptor in ends:
        os.close(descriptor)
    worker.there.send(Writing())
    bench.turn()
    worker.there.send(Failed(0, FAULT.but(message="writing the image: No space left"), NO_DOMAIN))
    worker.die()
    bench.answer(Failed(0, FAULT.but(message="writing the image: Broken pipe"), NO_DOMAIN))
    assert bench.refused() == "writing the image: No space left"


@pytest.mark.parametrize("how", ["says so", "dies"])
def test_a_writer_that_fails_meanwhile_is_no_answer_to_what_the_builder_asks_of_the_device_model(bench, file, how):
    """It would take that for a device model that does not run again, and leave the guest suspended."""
    worker, *ends = begun(bench, file)
    for descriptor in ends:
        os.close(descriptor)
    worker.there.send(Writing())
    bench.turn()
    assert hears(bench) == Writing()
    if how == "says so":
        worker.there.send(Failed(0, FAULT, NO_DOMAIN))
        bench.turn()
    worker.die()
    bench.turn()
    assert hears(bench) is None
    bench.answer(Failed(0, FAULT.but(message="writing the image: Broken pipe"), NO_DOMAIN))
    assert bench.refused() == (FAULT.message if how == "says so" else worker_ended())


def worker_ended():
    return "the image was not written: the stream worker ended with status 0; the guest runs on"


@pytest.mark.parametrize("again", [Room(4096), Sync(), Room(1)])
def test_a_builder_that_asks_out_of_turn_gets_no_further(bench, file, again):
    worker, *ends = begun(bench, file)
    for descriptor in ends:
        os.close(descriptor)
    worker.there.send(Writing())
    bench.turn()
    assert hears(bench) == Writing()
    if isinstance(again, Sync):
        bench.answer(Sync())
        assert hears(bench) is None
    bench.answer(again)
    assert "not its turn" in hears(bench).fault.message
    with pytest.raises(BlockingIOError):
        worker.there.receive_now()


@pytest.mark.parametrize("first", [Written(6), IMAGE])
def test_a_writer_that_answers_something_else_fails_the_save_and_not_the_broker(bench, file, first):
    worker, *ends = begun(bench, file)
    for descriptor in ends:
        os.close(descriptor)
    worker.there.send(first)
    bench.turn()
    assert "not asked for" in bench.builder.there.receive(deadline_s=5)[0].fault.message
    bench.answer(Failed(0, FAULT, NO_DOMAIN))
    assert "not asked for" in bench.refused()


def test_what_a_worker_gone_mad_says_costs_neither_descriptors_nor_the_builders_patience(bench, file):
    """The builder hears once why it fails; what came beside the messages is closed, also when the job is over."""
    worker, *ends = begun(bench, file)
    for descriptor in ends:
        os.close(descriptor)
    counts = []
    for _ in range(2):
        for _ in range(40):
            worker.there.send(Failed(0, FAULT, NO_DOMAIN))
        bench.turn()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[0] == counts[1]
    assert isinstance(bench.builder.there.receive(deadline_s=5)[0], Failed)
    with pytest.raises(BlockingIOError):
        bench.builder.there.receive_now()
    while bench.turns():
        pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        worker.there.send(Done(0, NO_DOMAIN, ""), [file.fileno()])
    bench.broker._work.feed.close()  # with what nobody has read yet
    assert len(os.listdir("/proc/self/fd")) <= before
    bench.answer(Failed(0, FAULT, NO_DOMAIN))
    assert bench.refused() == FAULT.message


@pytest.mark.parametrize("asked", [Room(4096), Sync()])
def test_a_builder_that_asks_about_an_image_where_none_is_written_is_ended(bench, asked):
    bench.known(RUNNING)
    bench.ask(Op.PAUSE)
    builder = bench.builder
    bench.answer(asked)
    assert bench.acts.of("protocol")[-1]["role"] == "builder"
    assert builder.killed
    assert isinstance(bench.heard(), Failed)


def test_the_builder_for_the_end_of_a_saved_guest_is_made_ready_meanwhile(bench, file):
    save(bench, file)
    ready = bench.broker._spares[Role.BUILDER]
    bench.answer(Done(0, SUSPENDED, "4711"))
    bench.heard()
    bench.ask(Op.DESTROY)
    assert bench.builder is ready


def test_cancel_ends_a_save(bench, file):
    save(bench, file)
    bench.ask(Op.CANCEL, sequence=9)
    assert bench.heard() == Done(9, RUNNING.but(memory_kib=0, vcpus=0, cpu_time_ms=0), "")
    assert bench.job()[0].op is Op.RESUME
    bench.answer(Done(0, RUNNING, ""))
    assert bench.refused() == "save: cancelled"


def test_cancel_is_for_images_only(bench):
    bench.known(RUNNING)
    bench.ask(Op.CANCEL)
    assert "nothing runs" in bench.refused(ExitCode.WRONG_STATE)
    bench.ask(Op.QUERY)
    bench.ask(Op.CANCEL)
    assert "nothing runs" in bench.refused(ExitCode.WRONG_STATE)


def test_destroy_overtakes_a_save(bench, file):
    save(bench, file)
    bench.ask(Op.DESTROY, sequence=8)
    assert "ended by destroy" in bench.refused()
    assert bench.job()[0].op is Op.DESTROY


# When more than the builder ends


@pytest.fixture
def resumed(bench, monkeypatch):
    """The jobs given to fresh builders while the monitor ends."""
    given = []

    def ask(child, message, deadline_s, _models=None, talk=None):
        assert talk is None
        child.end()
        given.append((message.op, message.domid, deadline_s))
        return Done(0, RUNNING, "")

    monkeypatch.setattr(work, "ask_once", ask)
    monkeypatch.setattr(core, "clear_up", lambda *_: None)  # of what an unfinished destroy has left
    return given


THE_RESUME = [(Op.RESUME, 7, PERMITS[Op.RESUME].deadline_s)]


def test_a_monitor_that_ends_over_a_save_lets_the_guest_run(bench, file, resumed):
    save(bench, file)
    os.write(bench.signals, bytes([signal.SIGTERM]))
    bench.turn()
    assert bench.broker._quitting
    bench.broker._end_children()
    assert resumed == THE_RESUME
    assert bench.acts.of("result")[-1] == {"op": "resume", "result": "Done"}


def test_a_monitor_that_ends_before_the_image_has_its_name_lets_the_guest_run(bench, file, resumed):
    save(bench, file)
    bench.answer(Done(0, SUSPENDED, "6"))
    bench.broker._end_children()
    assert resumed == THE_RESUME


def test_a_monitor_that_ends_over_the_resume_begins_that_again(bench, file, resumed):
    save(bench, file)
    bench.builder.die()
    bench.turn()
    bench.broker._end_children()
    assert resumed == THE_RESUME


def test_a_monitor_that_ends_without_space_for_its_log_lets_the_guest_run(bench, file, resumed):
    save(bench, file)
    bench.acts.full = True
    bench.broker._end_children()
    assert resumed == THE_RESUME


@pytest.mark.parametrize("when", ["before", "committed", "resumed", "gone"])
def test_a_monitor_that_ends_otherwise_wakes_nobody(bench, file, resumed, when):
    save(bench, file, go_on=when == "before")
    bench.answer(Done(0, SUSPENDED, "6"))
    if when in ("committed", "gone"):
        bench.ask(Op.DESTROY)
        bench.job()
    if when == "resumed":
        bench.ask(Op.RESUME)
        bench.job()
        bench.answer(Done(0, RUNNING, ""))
    if when == "gone":
        bench.answer(Done(0, NO_DOMAIN, ""))
    bench.broker._end_children()
    assert resumed == []


def test_a_guest_is_resumed_though_the_log_of_acts_is_full(bench, file):
    save(bench, file)
    bench.acts.full = True
    bench.builder.die()
    bench.turn()
    assert bench.job()[0].op is Op.RESUME
    bench.answer(Done(0, RUNNING, ""))
    assert "save: its builder ended" in bench.refused(ExitCode.FAILED)


def test_without_space_in_the_log_nothing_else_begins(bench, file):
    bench.known(RUNNING)
    bench.acts.full = True
    with pytest.raises(XenvmError, match="log is full"):
        bench.send(Save(5, False, 30), [file.fileno()])
    assert workers(Role.BUILDER) == []


def test_a_resume_that_cannot_be_begun_is_told_with_the_failure(bench, file, monkeypatch):
    save(bench, file)

    def none(_self, _role):
        raise XenvmError("no more processes")

    monkeypatch.setattr(type(bench.broker._spares), "take", none)
    bench.builder.die()
    bench.turn()
    assert "save: its builder ended" in bench.refused(ExitCode.FAILED)
    assert bench.broker._work is None
    assert "no more processes" in bench.acts.of("refused")[0]["why"]


def test_a_restore_without_descriptors_left_is_refused(bench, file, monkeypatch):
    def none(_flags):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    bench.known(NO_DOMAIN)
    monkeypatch.setattr(images.os, "pipe2", none)
    bench.send(Restore(6, False), [file.fileno()])
    assert "restore: cannot be begun: Too many open files" in bench.refused(ExitCode.FAILED)
    assert bench.broker._work is None
    assert all(child.killed for child in workers(Role.BUILDER))


@pytest.mark.parametrize("go_on", [False, True])
def test_a_supervisor_that_dies_over_a_save_ends_it(bench, file, go_on):
    save(bench, file, go_on=go_on)
    saver = bench.builder
    bench.supervisor.die()
    bench.turn()
    assert saver.killed
    assert isinstance(bench.heard(), Init)
    assert bench.job()[0].op is Op.RESUME
    assert bench.silent()
    bench.answer(Done(0, RUNNING, ""))
    assert bench.heard() == Done(0, RUNNING, "")  # what the new supervisor waits for


def test_a_supervisor_that_dies_over_the_resume_leaves_that_and_the_next_hears_of_it(bench, file):
    save(bench, file)
    bench.builder.die()
    bench.turn()
    bench.supervisor.die()
    bench.turn()
    assert isinstance(bench.heard(), Init)
    bench.answer(Done(0, RUNNING, ""))
    assert bench.heard() == Done(0, RUNNING, "")


# In a directory of the host's policy


@pytest.fixture
def open_to_clients(bench, tmp_path):
    """Such a directory, in which the VM has an older image."""
    place = tmp_path / "images"
    place.mkdir()
    bench.broker._book.policy = HostPolicy("", (), (), ("/nowhere", str(place)))
    (place / f"{UUID}.img").write_text("older")
    return place


def save_there(bench, name=f"{UUID}.img", *, go_on=False):
    bench.known(RUNNING)
    bench.send(Save(5, go_on, 30, 1, name))


def contents(place):
    return {path.name: path.read_text() for path in place.iterdir()}


OLDER, NEW = {f"{UUID}.img": "older"}, {f"{UUID}.img": "memory"}


def test_a_save_there_is_named_when_it_is_whole_and_final_when_the_domain_is_gone(bench, open_to_clients):
    save_there(bench)
    assert bench.acts.of("image") == [{"file": f"{open_to_clients}/{UUID}.img"}]
    written(bench)
    assert contents(open_to_clients) == OLDER
    bench.answer(Done(0, SUSPENDED, "6"))
    assert bench.heard() == Done(5, SUSPENDED, "6")
    assert sorted(contents(open_to_clients).values()) == ["memory", "older"]
    bench.ask(Op.DESTROY)
    bench.job()
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert contents(open_to_clients) == NEW


def test_a_guest_that_runs_on_takes_its_image_back(bench, open_to_clients, resumed):
    for end in ("resume", "quit"):
        save_there(bench)
        written(bench)
        bench.answer(Done(0, SUSPENDED, "6"))
        if end == "resume":
            bench.ask(Op.RESUME)
            bench.job()
            bench.answer(Done(0, RUNNING, ""))
            bench.heard()
        else:
            bench.broker._end_children()
        assert contents(open_to_clients) == OLDER
    assert resumed == THE_RESUME


def test_a_checkpoint_there_is_final_at_once(bench, open_to_clients):
    save_there(bench, go_on=True)
    written(bench)
    bench.answer(Done(0, RUNNING, "6"))
    assert contents(open_to_clients) == NEW


@pytest.mark.parametrize("how", ["fail", "die", "cancel"])
def test_a_save_there_that_fails_leaves_the_older_image_alone(bench, open_to_clients, how):
    save_there(bench)
    written(bench)
    if how == "fail":
        bench.answer(Failed(0, FAULT, NO_DOMAIN))
    elif how == "die":
        bench.builder.die()
        bench.turn()
    else:
        bench.ask(Op.CANCEL)
    assert contents(open_to_clients) == OLDER


def test_an_image_there_that_cannot_be_named_has_the_guest_run_on(bench, open_to_clients, monkeypatch):
    def refuse(*_words, **_options):
        raise OSError(errno.EIO, "no luck")

    save_there(bench)
    written(bench)
    monkeypatch.setattr(os, "rename", refuse)
    bench.answer(Done(0, SUSPENDED, "6"))
    assert bench.job()[0].op is Op.RESUME
    bench.answer(Done(0, RUNNING, ""))
    assert "cannot be named" in bench.refused(ExitCode.FAILED)
    monkeypatch.undo()
    assert contents(open_to_clients) == OLDER


@pytest.mark.parametrize("kind", [Save, Restore])
@pytest.mark.parametrize(
    ("directory", "name", "words"),
    [
        (1, "guest.img", "whose names begin with its uuid"),
        (1, "", "whose names begin with its uuid"),
        (2, f"{UUID}.img", "no such directory"),
        (0, f"{UUID}.img", "No such file"),
    ],
)
def test_a_vm_has_its_own_images_there_and_no_others(bench, open_to_clients, kind, directory, name, words):
    bench.known(RUNNING if kind is Save else NO_DOMAIN)
    place = {"directory": directory, "file": name}
    bench.send(Save(5, False, 30, **place) if kind is Save else Restore(5, False, **place))
    assert words in bench.refused()
    assert contents(open_to_clients) == OLDER


def test_links_there_are_not_followed(bench, open_to_clients):
    (open_to_clients / f"{UUID}.link").symlink_to(open_to_clients / f"{UUID}.img")
    bench.known(NO_DOMAIN)
    bench.send(Restore(5, False, directory=1, file=f"{UUID}.link"))
    assert "Too many levels" in bench.refused()
    save_there(bench, f"{UUID}.link")
    assert "not a regular file" in bench.refused()


def test_a_restore_from_there(bench, open_to_clients):
    bench.known(NO_DOMAIN)
    bench.send(Restore(6, False, directory=1, file=f"{UUID}.img"))
    (worker,) = workers(Role.STREAM)
    _, (image, entrance) = worker.there.receive(deadline_s=5)
    assert os.read(image, 100) == b"older"
    for descriptor in (image, entrance):
        os.close(descriptor)
    assert bench.job()[1] == 1


# Restoring


@pytest.mark.parametrize(("paused", "op"), [(False, Op.RESTORE), (True, Op.RESTORE_PAUSED)])
def test_a_restore_has_a_builder_with_a_pipe_and_a_worker_with_the_image(bench, file, paused, op):
    job, pipe = restore(bench, file, paused=paused)
    assert job.op is op
    (worker,) = workers(Role.STREAM)
    message, (image, entrance) = worker.there.receive(deadline_s=5)
    assert message == Inspect(65536)
    assert os.path.sameopenfile(image, file.fileno())
    os.write(entrance, b"stream")
    assert os.read(pipe, 100) == b"stream"
    for descriptor in (image, entrance):
        os.close(descriptor)
    assert os.read(pipe, 100) == b""  # nobody else holds the other end
    os.close(pipe)
    worker.there.send(IMAGE)
    bench.turn()
    assert bench.builder.there.receive(deadline_s=5)[0] == IMAGE
    worker.die()
    bench.turn()
    bench.answer(Done(0, RUNNING, "restored"))
    assert bench.heard() == Done(6, RUNNING, "")


@pytest.mark.parametrize("foreign", [False, True])
def test_who_restores_the_image_of_another_vm_says_so_and_the_log_has_it(bench, file, foreign):
    job, pipe = restore(bench, file, foreign=foreign)
    os.close(pipe)
    assert job.force is foreign
    assert len(bench.acts.of("restore-foreign")) == foreign


def test_the_words_of_the_worker_reach_the_builder_and_then_the_user(bench, file):
    _, pipe = restore(bench, file)
    os.close(pipe)
    (worker,) = workers(Role.STREAM)
    worker.there.send(Failed(0, FAULT, NO_DOMAIN))
    bench.turn()
    assert bench.builder.there.receive(deadline_s=5)[0] == Failed(0, FAULT, NO_DOMAIN)
    bench.answer(Failed(0, FAULT, NO_DOMAIN))
    assert bench.refused(FAULT.code) == FAULT.message


def test_a_worker_that_dies_is_said_to_the_builder(bench, file):
    _, pipe = restore(bench, file)
    os.close(pipe)
    workers(Role.STREAM)[0].die()
    bench.turn()
    told = bench.builder.there.receive(deadline_s=5)[0]
    assert "the stream worker ended with status 0 without an answer" in told.fault.message


def test_what_went_wrong_later_is_told_in_the_words_of_the_worker(bench, file):
    _, pipe = restore(bench, file)
    os.close(pipe)
    (worker,) = workers(Role.STREAM)
    worker.there.send(IMAGE)
    worker.there.send(Failed(0, FAULT, NO_DOMAIN))
    bench.turn()
    bench.answer(Failed(0, FAULT.but(message="reading the image: end of file"), NO_DOMAIN))
    assert bench.refused() == FAULT.message


def test_a_worker_that_says_twice_what_the_image_is_breaks_the_protocol(bench, file):
    _, pipe = restore(bench, file)
    os.close(pipe)
    (worker,) = workers(Role.STREAM)
    worker.there.send(IMAGE)
    bench.turn()
    worker.there.send(Done(0, NO_DOMAIN, ""))
    bench.turn()
    assert bench.acts.of("protocol")


@pytest.mark.parametrize("how", ["die", "cancel"])
def test_a_restore_that_is_ended_is_tidied_up(bench, file, how):
    _, pipe = restore(bench, file)
    os.close(pipe)
    if how == "die":
        bench.builder.die()
        bench.turn()
    else:
        bench.ask(Op.CANCEL, sequence=9)
        assert bench.heard().sequence == 9
    bench.look(Failed(0, FAULT, NO_DOMAIN))
    assert "cancelled" in bench.refused() if how == "cancel" else "builder ended" in bench.refused()
    assert all(child.killed for child in workers(Role.STREAM))


def test_an_image_that_cannot_be_read(bench, tmp_path):
    bench.known(NO_DOMAIN)
    descriptor = os.open(tmp_path / "image", os.O_WRONLY | os.O_CREAT)
    bench.send(Restore(6, False), [descriptor])
    os.close(descriptor)
    assert "not open for reading" in bench.refused(ExitCode.USAGE)


# At the start


@pytest.fixture
def granted(bench, tmp_path):
    path = tmp_path / "guest.img"
    path.write_bytes(b"image")
    bench.broker._grants = bench.grants.but(image=str(path))
    bench.broker._policy = bench.broker._policy.but(startup="restore-del")
    return path


def begin(bench):
    bench.broker._begin(0, Op.START_RESTORED, 100)
    message, descriptors = bench.builder.there.receive(deadline_s=5)
    for descriptor in descriptors:
        os.close(descriptor)
    return message, len(descriptors)


def identity(path):
    with path.open("rb") as file:
        return images.identity(file.fileno())


@pytest.mark.parametrize(("came", "stays"), [(True, False), (False, True)])
def test_the_granted_image_is_removed_when_the_guest_came_from_it(bench, granted, came, stays):
    job, pipes = begin(bench)
    assert (job.op, pipes, job.restored) == (Op.START_RESTORED, 1, identity(granted))
    bench.answer(Done(0, RUNNING, job.restored if came else ""))
    assert bench.heard() == Done(0, RUNNING, "")
    assert granted.exists() is stays
    assert len(bench.acts.of("image-removed")) == came


def test_the_image_of_a_guest_that_is_adopted_is_removed_when_its_monitor_had_no_time_for_it(
    bench, granted, monkeypatch
):
    """Whatever else a look tells, and whoever has the name by now, stays."""
    monkeypatch.setattr(findings, "of_host", list)
    was = identity(granted)
    for said, stays in (("", True), ("1:2:3", True), (was, False)):
        bench.ask(Op.FIND)
        bench.job()
        bench.answer(Done(0, RUNNING, said))
        assert bench.heard() == Done(1, RUNNING, "")
        assert granted.exists() is stays
    logged = len(bench.acts.of("image-removed"))
    granted.write_bytes(b"image")
    os.utime(granted, ns=(1, 1))  # even if it should have the same inode
    bench.ask(Op.QUERY)
    bench.job()
    bench.answer(Done(0, RUNNING, identity(granted)))
    assert granted.exists()
    assert len(bench.acts.of("image-removed")) == logged


def test_the_image_is_removed_though_the_builder_died_when_the_domain_was_whole(bench, granted):
    job, _ = begin(bench)
    bench.builder.die()
    bench.turn()
    bench.look(Done(0, RUNNING, job.restored))
    assert bench.heard().domain == RUNNING
    assert not granted.exists()


def test_the_granted_image_stays_after_a_failure_and_where_the_config_says_so(bench, granted):
    begin(bench)
    bench.answer(Failed(0, FAULT, NO_DOMAIN))
    bench.heard()
    assert granted.exists()
    bench.broker._policy = bench.broker._policy.but(startup="restore")
    job, _ = begin(bench)
    bench.answer(Done(0, RUNNING, job.restored))
    assert granted.exists()


def test_another_file_of_its_name_stays(bench, granted):
    job, _ = begin(bench)
    granted.unlink()
    granted.write_bytes(b"another")
    bench.answer(Done(0, RUNNING, job.restored))
    assert granted.read_bytes() == b"another"
    assert bench.acts.of("image-removed")[0]["why"] == "another file has its name"


@pytest.mark.parametrize(
    ("kind", "why"),
    [("missing", "No such file or directory"), ("directory", "an image is a regular file that is open")],
)
def test_without_the_granted_image_a_domain_can_still_be_adopted(bench, granted, kind, why):
    """Where there is none the builder has to say what is wrong with the image; the broker alone knows."""
    granted.unlink()
    if kind == "directory":
        granted.mkdir()
    job, pipes = begin(bench)
    assert (job.op, pipes, job.unreadable) == (Op.START_RESTORED, 0, why)
    assert workers(Role.STREAM) == []
    assert bench.acts.of("refused")[0] == {"op": "start-restored", "why": f"cannot read {granted}: {why}"}


def test_a_name_alone_is_no_image(tmp_path):
    """O_PATH takes no permission on the file."""
    path = tmp_path / "image"
    path.write_bytes(b"image")
    descriptor = os.open(path, os.O_PATH)
    for check in (images.check_source, images.check_target):
        with pytest.raises(UsageError, match="open"):
            check(descriptor)
    os.close(descriptor)


def test_the_checks_of_descriptors(tmp_path):
    path = tmp_path / "image"
    with path.open("w+b") as made:
        images.check_target(made.fileno())
        images.check_source(made.fileno())
        made.write(b"x")
        made.flush()
        with pytest.raises(UsageError):
            images.check_target(made.fileno())


# What was plugged by command


def test_devices_added_by_command_belong_to_a_saved_guest(bench, file):
    gone = []
    bench.broker._book.domain_gone = lambda *, for_good: gone.append(for_good)
    save(bench, file)
    bench.answer(Done(0, SUSPENDED, "6"))
    bench.ask(Op.DESTROY)
    bench.job()
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert gone == [False]
    bench.known(RUNNING)
    bench.broker._book.saved = False
    bench.ask(Op.DESTROY)
    bench.job()
    bench.answer(Done(0, NO_DOMAIN, ""))
    assert gone == [False, True]
