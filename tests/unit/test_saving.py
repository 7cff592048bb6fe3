# SPDX-License-Identifier: GPL-2.0-or-later
"""Saving and restoring in the builder, against a hypervisor and a xenstore of this test."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from test_devicemodel import PLAIN

from xenvm.boundary.images import Image, Progress
from xenvm.boundary.machine import Wish
from xenvm.boundary.messages import Domain, DomainState, Grants, Job, Op, Phase
from xenvm.errors import ExitCode, WrongStateError, XenvmError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.builder import saving, tree
from xenvm.helpers.builder.jobs import Builder
from xenvm.helpers.builder.saving import Saving

UUID = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-555555555555"
GRANTS = Grants(UUID, "web", "/k", "", "", 128, 256, 2, True, (), (), False, "", (), (), 40)
HOME = "/local/domain/7"
RUNNING = Domain(7, DomainState.RUNNING, Phase.NONE, -1, 64, 1, 5)
SUSPENDED = RUNNING.but(state=DomainState.SHUTDOWN, reason=2)


class Xen:
    """One domain, which suspends when asked."""

    def __init__(self, store):
        self.store, self.domain, self.made_with = store, RUNNING, 2
        self.resumed = self.releases = 0

    def look(self, _domid, _uuid):
        if self.store.nodes.get(f"{HOME}/control/shutdown") == b"suspend":
            self.store.nodes[f"{HOME}/control/shutdown"] = b""
            self.domain = SUSPENDED
        return self.domain

    def find(self, _uuid):
        return [self.domain]

    def vcpus(self, _domid):
        return self.made_with

    def save(self, _domid, descriptor, grants, hooks, *, live):
        imagefile.write(descriptor, saved.head(grants))
        hooks.suspend()
        hooks.frames(1, 1)
        imagefile.write(descriptor, bytes(8192))

    def resume(self, _domid):
        self.resumed += 1
        self.domain = RUNNING

    def check_release(self, major, minor):
        self.releases += 1


class Store:
    def __init__(self):
        self.nodes = {f"{HOME}/memory/static-max": b"262144", f"{HOME}/memory/target": b"131072"}
        self.nodes[f"{HOME}/memory/videoram"] = b"0"
        self.resumed = []

    def read(self, path):
        return self.nodes.get(path)

    def write(self, path, value):
        self.nodes[path] = value.encode()

    def names(self, _path):
        return []

    def remove(self, path):
        self.nodes.pop(path, None)

    def resume(self, domid):
        self.resumed.append(domid)

    def transaction(self, steps):
        steps()


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def xen(store):
    return Xen(store)


def job(op=Op.SAVE, grants=GRANTS, **changes):
    return Job(op, UUID, 7, grants, timeout_s=1, **changes)


def save(xen, store, grants=GRANTS):
    with tempfile.TemporaryFile() as file:
        pipe = os.dup(file.fileno())
        Saving(xen, store, job(grants=grants), lambda *_: None, Writer()).run([pipe], RUNNING, go_on=False)
        file.seek(0)
        content = file.read()
    return json.loads(content[52 : content.index(b"\0", 52)])["b_info"]


def test_the_image_tells_of_the_domain_and_not_of_a_config_that_is_newer(xen, store):
    told = save(xen, store, GRANTS.but(memory_mib=512, memory_max_mib=512, vcpus=4))
    assert (told["max_memkb"], told["target_memkb"], told["max_vcpus"]) == (262144, 131072, 2)


class Writer:
    """The broker, which says what the process at the other end of the pipe does."""

    def __init__(self, failure=None):
        self.calls, self.failure = [], failure

    def model(self, wish):
        """Do nothing: a PV guest has no device model."""

    def room(self, memory_kib):
        self.calls.append(memory_kib)

    def written(self):
        self.calls.append("written")
        if self.failure:
            raise self.failure
        return 4711


@pytest.mark.parametrize("go_on", [False, True])
@pytest.mark.parametrize(("compression", "told"), [("none", ""), ("zstd", "image_compression=zstd ")])
def test_an_image_goes_into_a_pipe_whose_end_the_writer_sees(xen, store, go_on, compression, told):
    readable, writable = os.pipe()
    writer = Writer()
    saving = Saving(xen, store, job(grants=GRANTS.but(image_compression=compression)), lambda *_: None, writer)
    assert saving.run([writable], RUNNING, go_on=go_on).startswith(f"image_bytes=4711 {told}still_ms=")
    with os.fdopen(readable, "rb") as pipe:
        assert pipe.read().endswith(bytes(8192) + saved.TAIL)
    assert writer.calls == [RUNNING.memory_kib, "written"]
    assert xen.resumed == go_on


def test_a_writer_that_fails_at_the_end_has_the_guest_run_on(xen, store):
    readable, writable = os.pipe()
    writer = Writer(XenvmError("no"))
    with pytest.raises(XenvmError, match="no"):
        Saving(xen, store, job(grants=GRANTS.but(image_compression="zstd")), lambda *_: None, writer).run(
            [writable], RUNNING, go_on=False
        )
    os.close(readable)
    assert (xen.resumed, xen.domain) == (1, RUNNING)


def test_where_nobody_can_write_the_guest_is_not_even_asked_to_suspend(xen, store):
    class Nobody(Writer):
        def room(self, memory_kib):
            raise XenvmError("libzstd.so.1 is not on this host")

    readable, writable = os.pipe()
    with pytest.raises(XenvmError, match="libzstd"):
        Saving(xen, store, job(grants=GRANTS.but(image_compression="zstd")), lambda *_: None, Nobody()).run(
            [writable], RUNNING, go_on=False
        )
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        assert pipe.read() == b""
    assert xen.domain is RUNNING
    assert f"{HOME}/control/shutdown" not in store.nodes


def test_vcpus_that_are_offline_count(xen, store):
    xen.made_with = 3
    assert save(xen, store)["max_vcpus"] == 3


def test_a_domain_of_unknown_size_is_not_asked_to_suspend(xen, store):
    del store.nodes[f"{HOME}/memory/static-max"]
    with pytest.raises(XenvmError, match="memory/static-max"):
        save(xen, store)
    assert xen.domain is RUNNING
    assert f"{HOME}/control/shutdown" not in store.nodes


@pytest.mark.parametrize(
    ("domain", "woken", "told"),
    [
        (SUSPENDED, 1, [7]),
        (RUNNING, 0, [7]),  # woken by a builder that died before it told xenstored
        (RUNNING.but(state=DomainState.PAUSED), 0, [7]),
        (SUSPENDED.but(reason=0), 0, []),
        (RUNNING.but(state=DomainState.DYING), 0, []),
    ],
)
def test_a_resume_tells_xenstored_of_a_guest_that_runs(xen, store, domain, woken, told):
    xen.domain = domain
    Saving(xen, store, job(Op.RESUME), lambda *_: None, Writer()).resume()
    assert (xen.resumed, store.resumed) == (woken, told)


@pytest.mark.parametrize(("domain", "told"), [(RUNNING, [7]), (SUSPENDED, [])])
def test_who_adopts_a_guest_that_runs_tells_xenstored(xen, store, domain, told):
    store.nodes |= {f"/xenvm/{UUID}/domid": b"7", f"/xenvm/{UUID}/phase": b"built"}
    xen.domain = domain
    found = Builder(xen, store, None, lambda *_: None).run(job(Op.FIND), []).domain
    assert found == domain.but(phase=Phase.BUILT)
    assert store.resumed == told


@pytest.mark.parametrize(
    ("state", "wakes", "woken"),
    [
        (DomainState.PAUSED, True, 1),  # its builder died just before it ran
        (DomainState.RUNNING, True, 0),  # or just after
        (DomainState.PAUSED, False, 0),  # somebody has paused it
    ],
)
def test_a_domain_whose_builder_died_before_it_ran_is_let_run(xen, store, state, wakes, woken):
    store.make = store.permissions = lambda *_: None
    xen.domain, unpaused = RUNNING.but(state=state), []

    def unpause(domid):
        unpaused.append(domid)
        xen.domain = RUNNING

    xen.unpause = unpause
    tree.write_record(store, UUID, 7, Phase.BUILT, "1:2:3", wakes=wakes)
    for _ in range(2):
        done = Builder(xen, store, None, lambda *_: None).run(job(Op.FIND), [])
        assert unpaused == [7] * woken
        assert done.domain.state is (DomainState.RUNNING if woken or wakes else state)
        assert done.text == "1:2:3"
    assert not tree.wakes(store, UUID)


@pytest.mark.parametrize("restored", ["", "8:77:1795745961"])
def test_the_record_says_which_image_a_domain_came_from(xen, store, restored):
    store.make = store.permissions = lambda *_: None
    tree.write_record(store, UUID, 7, Phase.BUILT, restored)
    for op in (Op.FIND, Op.START_RESTORED, Op.START):
        assert Builder(xen, store, None, lambda *_: None).run(job(op), []).text == restored


def check(xen, store, told, **changes):
    Builder(xen, store, None, lambda *_: None)._check_image(told, job(Op.RESTORE, **changes))


def test_the_image_of_another_vm_is_refused_unless_that_is_meant(xen, store):
    for uuid, force in ((UUID, False), ("", False), (OTHER, True)):
        check(xen, store, Image(262144, 2, 4, 17, uuid), force=force)
    assert xen.releases == 3
    with pytest.raises(WrongStateError) as caught:
        check(xen, store, Image(262144, 2, 4, 17, OTHER))
    assert f"of the VM {OTHER}, this one is {UUID}" in caught.value.message
    assert "foreign=true" in caught.value.hint
    assert caught.value.code is ExitCode.WRONG_STATE


def test_an_image_of_another_size_is_refused_though_it_may_be_of_another_vm(xen, store):
    for size, vcpus in ((131072, 2), (262144, 1)):
        with pytest.raises(WrongStateError):
            check(xen, store, Image(size, vcpus, 4, 17, OTHER), force=True)


def test_how_often_is_told_how_far_it_is():
    assert 0 < saving.TELL_PAUSE_S < 5


# An HVM guest, and its device model


class Virtual(Writer):
    """What is asked of the device model."""

    def model(self, wish):
        self.calls.append(wish)
        if self.failure:
            raise self.failure


@pytest.fixture
def virtual(xen, store):
    """A guest with a device model, and what its monitor asks."""
    store.nodes[f"/xenvm/{UUID}/model/server"] = b"4711 99"
    xen.tracked = []
    xen.stop_tracking = xen.tracked.append
    xen.has_drivers, xen.sleep_state = lambda _domid: True, lambda _domid: 0
    return Virtual()


HVM = GRANTS.but(machine=(PLAIN,))


def saving_of(xen, store, broker, **changes):
    made = Saving(xen, store, job(grants=HVM, **changes), lambda *_: None, broker)
    made._memory_kib = 400_000
    return made


def test_its_device_model_stands_still_after_the_guest_and_before_the_memory_is_written(xen, store, virtual):
    def save(_domid, descriptor, grants, hooks, *, live):
        assert live
        hooks.track(True)
        hooks.suspend()
        imagefile.write(descriptor, saved.head(grants))

    xen.save = save
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as state:
        state.write(b"QEVM 123")
        state.flush()
        told = saving_of(xen, store, virtual, live=True).run(
            [os.dup(file.fileno()), state.fileno()], RUNNING, go_on=True
        )
        assert virtual.calls == [RUNNING.memory_kib, Wish.TRACK, Wish.SAVE, Wish.RUN, "written"]
        assert xen.resumed == 1
        file.seek(0)
        assert file.read().endswith(saved.emulator_head(8) + b"QEVM 123" + saved.TAIL)
    assert told.startswith("image_bytes=")
    assert " rounds=0" in told


def test_one_without_pv_drivers_is_not_asked(xen, store, virtual):
    xen.has_drivers = lambda _domid: False
    xen.suspend = lambda _domid: setattr(xen, "domain", SUSPENDED)
    saving_of(xen, store, virtual)._suspend()
    assert virtual.calls == [Wish.SAVE]
    assert f"{HOME}/control/shutdown" not in store.nodes


@pytest.mark.parametrize("state", [b"", b"x" * 9])
def test_a_state_that_is_none_or_too_long_has_the_guest_run_on(xen, store, virtual, state, monkeypatch):
    monkeypatch.setattr(saving, "STATE_LIMIT_BYTES", 8)
    xen.save = lambda _domid, descriptor, grants, hooks, *, live: hooks.suspend()
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as place:
        place.write(state)
        place.flush()
        with pytest.raises(XenvmError, match="a state of"):
            saving_of(xen, store, virtual).run([os.dup(file.fileno()), place.fileno()], RUNNING, go_on=False)
    assert virtual.calls[-1] == Wish.RUN
    assert xen.resumed == 1


@pytest.mark.parametrize(("domain", "resumed"), [(SUSPENDED, 1), (RUNNING, 0)])
def test_whoever_comes_after_a_dead_builder_ends_its_tracking_and_wakes_the_device_model(
    xen, store, virtual, domain, resumed
):
    xen.domain = domain
    saving_of(xen, store, virtual).settle()
    assert (xen.tracked, virtual.calls, xen.resumed) == ([7], [Wish.RUN], resumed)


def test_a_device_model_that_does_not_wake_leaves_the_guest_suspended(xen, store, virtual):
    """Without it the guest's devices would not answer."""
    virtual.failure = XenvmError("device model: no")
    xen.domain = SUSPENDED
    with pytest.raises(XenvmError, match="device model: no"):
        saving_of(xen, store, virtual).settle()
    assert xen.resumed == 0


@pytest.mark.parametrize("server", [b"4711 99", None])
def test_a_config_of_another_type_saves_nothing(xen, store, server):
    if server:
        store.nodes[f"/xenvm/{UUID}/model/server"] = server
    grants = GRANTS if server else HVM
    with tempfile.TemporaryFile() as file, pytest.raises(WrongStateError, match="another type"):
        Saving(xen, store, job(grants=grants), lambda *_: None, Writer()).run([file.fileno()], RUNNING, go_on=False)
    assert xen.domain is RUNNING


def rounds(saver, dirty, frames=1 << 20):
    """Ask as libxenguest does; return the rounds over the running guest, and how many pages they wrote."""
    number, written, pages = 0, 0, 100_000
    last = frames
    while True:
        more = saver._another(number, written, last)
        number += 1
        pages += 0 if number == 1 else last
        if not more:
            return number, pages
        written += last
        if not saver._another(number, written, -1):
            return number, pages
        last = dirty


@pytest.mark.parametrize(
    ("dirty", "passes"),
    [
        (0, 2),  # the second one is empty
        (49, 2),
        (50, 5),
        (10_000, 5),
        (30_000, 3),
        (100_000, 2),
    ],
)
def test_how_often_the_memory_of_a_running_guest_is_written(xen, store, virtual, dirty, passes):
    """The guest has 100,000 pages; libxenguest counts a million frames for the first round."""
    number, written = rounds(saving_of(xen, store, virtual, live=True), dirty)
    assert number == passes
    assert written <= 2.5 * 100_000


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(saving, "time", made)
    return made


def test_how_fast_an_image_is_written_is_told(xen, store, clock):
    """From when the guest stands still; waiting for that is not counted."""
    told = []
    saver = Saving(xen, store, job(), lambda *what: told.append(what), Writer())
    xen.domain = SUSPENDED
    saver._suspend()
    told.clear()
    for done, after_s in ((256, 0.1), (512, 0.1), (1024, 1.9)):
        clock.now_s += after_s
        saver._frames(done, 2048)
    assert told == [
        ("writing the image", 1024, 8192, 0, -1, 10240),
        ("writing the image", 4096, 8192, 0, -1, 1950),
    ]
    assert Progress(1, *told[1]).told() == {
        "step": "writing the image",
        "done_kib": 4096,
        "total_kib": 8192,
        "rate_kib_s": 1950,
    }


def test_how_fast_a_running_guest_writes_to_its_memory_is_told(xen, store, virtual, clock):
    """The first round is all of it; those after it are what it has written to, over the time of a whole round."""
    told = []
    saver = Saving(xen, store, job(grants=HVM, live=True), lambda *what: told.append(what), virtual)
    saver._memory_kib = 400_000
    assert saver._another(0, 0, 100_000)
    clock.now_s += 10
    saver._frames(50_000, 100_000)
    clock.now_s += 10
    assert saver._another(1, 100_000, -1)
    assert saver._another(1, 100_000, 4_000)
    clock.now_s += 2
    saver._frames(1_000, 4_000)
    assert saver._another(2, 104_000, -1)
    assert saver._another(2, 104_000, 600)
    clock.now_s += 1
    saver._frames(600, 600)
    step = "writing the memory of the running guest"
    assert told == [
        (step, 200_000, 400_000, 1, -1, 20_000, -1),
        (step, 4_000, 16_000, 2, 4_000, 2_000, 200),
        (step, 2_400, 2_400, 3, 600, 2_400, 300),
    ]
    said = Progress(1, *told[2]).told()
    assert {key: said[key] for key in ("round", "dirty_pages", "dirty_pages_s")} == {
        "round": 3,
        "dirty_pages": 600,
        "dirty_pages_s": 300,
    }
    assert Progress.from_body(Progress(1, *told[2]).as_body()).dirty_pages_s == 300


def test_the_protocol_page_lists_every_field_of_a_progress():
    page = (Path(saving.__file__).parents[3] / "docs/xenvm-protocol.7.md").read_text()
    table = page.partition("A `progress` tells only")[2].partition("###")[0]
    fields = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    assert fields == set(Progress(1, "x", 1, 1, 1, 1, 1, 1).told())
