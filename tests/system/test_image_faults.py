# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of guest, file and monitor when saving or restoring fails: full disks, broken disks, killed processes."""

import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from conftest import MIB, domains, kill, processes, run, until
from savedguest import Flaky, asked, cap, helper, small_disk
from saving import acts, goes_on, held, only, runs_on, suspend

from xenvm.errors import XenvmError
from xenvm.supervisor.states import STABLE


@pytest.mark.long
def test_no_space(vm, tmp_path):
    """No room at all; or there is when the save begins, and others take it: the guest runs on, the older image stays."""
    place = tmp_path / "small"
    file = place / "guest.img"
    guest = vm()
    guest.start()
    guest.up()
    image_bytes = 128 * MIB
    for turn, percent in enumerate((0, 1, 50, 99), 1):
        before = len(guest.ticks())
        with small_disk(place, 16 * MIB if not percent else 200 * MIB) as resize:
            file.write_text("an older image")
            cap(guest, 1 if percent else 0)  # so that it takes its time to suspend
            saving = guest.begin_cmd("suspend", str(file))
            if percent:
                builder = asked(guest, saving)
                cap(guest, 0)
                resize(image_bytes * percent // 100)
                kill(builder, signal.SIGCONT)
            text = saving.communicate(timeout=300)[0]
            assert saving.returncode == 1, text
            assert ("No space left" if percent else "are free") in text
            assert "make room" in text
            assert file.read_text() == "an older image"
            assert only(place) == ["guest.img"]
            goes_on(guest, before, stops=2 * turn)
            guest.until("running")
            file.unlink()
            room = os.statvfs(place)
            assert room.f_bfree == room.f_blocks, "the space of the part is free again"
    guest.shell("echo and its console answers")


@pytest.mark.long
def test_a_packer_that_is_killed_or_has_no_room(vm, folder, tmp_path):
    """The guest runs on, no file is left, and the reply says why."""
    guest = vm(**{"image-compression": "zstd"})
    guest.start()
    guest.up()
    file, older = folder / "guest.img", "an older image"
    file.write_text(older)
    cap(guest, 1)
    saving = guest.begin_cmd("suspend", str(file))
    builder = asked(guest, saving)
    cap(guest, 0)
    kill(helper("stream"))
    kill(builder, signal.SIGCONT)
    text = saving.communicate(timeout=120)[0]
    assert saving.returncode == 1
    assert "the stream worker died of SIGKILL; the guest runs on" in text
    assert (only(folder), file.read_text()) == (["guest.img"], older)
    runs_on(guest, 4)
    place = tmp_path / "small"
    for turn, size in enumerate((16, 60), 1):
        with small_disk(place, size * MIB) as resize:
            cap(guest, 1 if turn == 2 else 0)
            saving = guest.begin_cmd("checkpoint", str(place / "guest.img"))
            if turn == 2:
                builder = asked(guest, saving)
                resize(8 * MIB)
                cap(guest, 0)
                kill(builder, signal.SIGCONT)
            text = saving.communicate(timeout=120)[0]
            assert saving.returncode == 1
            assert ("No space left" if turn == 2 else "are free") in text
            assert only(place) == []
            runs_on(guest, 4 + 2 * turn)


def test_image_and_act_log_on_one_full_disk(vm):
    """The builder dies, and there is no space to log that: the guest runs on."""
    logs = Path("/var/log/xenvm")
    assert run("mount", "-t", "tmpfs", "-o", "size=200m", "none", str(logs)).returncode == 0
    try:
        guest = vm()
        guest.start()
        guest.up()
        file = logs / "guest.img"
        saving, builder = held(guest, file)
        file.unlink(missing_ok=True)
        run("dd", "if=/dev/zero", f"of={logs}/other", "bs=64k")
        for number in range(20):  # what is left in the last page of the log
            with contextlib.suppress(OSError), (logs / f"more{number}").open("wb", buffering=0) as more:
                more.write(bytes(4096))
        with contextlib.suppress(OSError), (logs / f"{guest.uuid}.acts").open("ab", buffering=0) as log:
            while log.write(b" "):
                pass
        results = acts(guest).count('"act":"result","op":"save"')
        kill(builder)
        assert saving.wait(120) != 0
        goes_on(guest, len(guest.ticks()), 6)
        assert acts(guest).count('"act":"result","op":"save"') == results  # for that there was no space
        (logs / "other").unlink()
        if not guest.lock.exists() or not guest.pids():
            guest.write(startup="shutdown")
            guest.start()
        guest.end()
    finally:
        run("umount", "-l", str(logs))


def finished(guest, saving, victim):
    """Wait for the client of a save whose monitor has lost a process; see to it that a monitor is there again."""
    text = saving.communicate(timeout=120)[0]
    if victim == "broker":
        until(lambda: not processes(), "the rest has ended too")
        guest.write(startup="shutdown")  # which adopts, and builds nothing
        guest.start()
    return text


def state_of(guest):
    """The state of the VM, "" while a supervisor that was killed is not replaced, or still is at something."""
    with contextlib.suppress(XenvmError):
        state = guest.state
        return state if state in STABLE else ""
    return ""


def uses_its_disk(guest, note):
    """The guest's disk and its console work: it writes through the one what the other said, and reads it back."""
    guest.shell(f"echo {note} | dd of=/dev/xvda bs=512 conv=sync,fsync 2>/dev/null")
    assert note in guest.shell("dd if=/dev/xvda bs=512 count=1 iflag=direct 2>/dev/null; echo").split()


@pytest.mark.parametrize("victim", ["builder", "stream", "supervisor", "broker"])
@pytest.mark.long
def test_kill_9_at_ten_moments_of_a_suspend(vm, image, folder, victim):
    """Spread over all that a suspend takes. The guest runs on, or it is whole in an image that has its name."""
    file, older = folder / "guest.img", "an older image"
    guest = vm(disk=f"{image('disk')}:file:xvda:w:disk")
    guest.start()
    guest.up()
    saving = guest.begin_cmd("suspend", str(file))
    until(lambda: '"op":"save"' in acts(guest), "a save has begun")
    began = time.monotonic()
    assert saving.wait(300) == 0
    whole_s = time.monotonic() - began
    guest.cmd("restore", str(file))
    outcomes = []
    for turn in range(10):
        file.write_text(older)
        jobs = acts(guest).count('"op":"save"')
        saving = guest.begin_cmd("suspend", str(file))
        until(lambda jobs=jobs: acts(guest).count('"op":"save"') > jobs, "a save has begun")
        time.sleep(whole_s * turn / 10)
        pid = helper(victim) if victim in ("builder", "stream") else guest.pids().get(victim, 0)
        if pid:  # else it has ended by itself
            kill(pid)
        text = finished(guest, saving, victim)
        state = until(lambda: state_of(guest), "the monitor answers")
        for name in only(folder):
            if name.endswith(".before"):  # the client could not learn whether the guest has run on
                assert name in text
                assert (folder / name).read_text() == older
                (folder / name).unlink()
        assert only(folder) in (["guest.img"], [])
        if only(folder) and file.stat().st_size != len(older):
            outcomes.append("image")
            if state == "crashed":  # its builder died over ending the domain
                assert "is whole" in text
                guest.cmd("destroy")
            if state in ("suspended", "shutdown", "crashed"):
                guest.cmd("restore", str(file))
        else:
            outcomes.append("runs on")
            assert saving.returncode != 0, text
            assert not only(folder) or file.read_text() == older
        runs_on(guest, 2 * turn + 6)
        uses_its_disk(guest, f"turn-{turn}")
        if turn % 4 == 3 and victim == "supervisor":  # a monitor replaces five a minute
            guest.cmd("quit")
            until(lambda: not processes(), "the monitor has ended")
            guest.write(startup="shutdown")
            guest.start()
    print(victim, f"{whole_s:.1f} s", outcomes)
    assert outcomes.count("runs on") >= 3


@pytest.mark.long
def test_a_guest_that_knows_no_suspend(vm, folder):
    """Its kernel listens to no request: exit 7, with the likely reason, and the request is taken back."""
    file = folder / "guest.img"
    guest = vm(words="initcall_blacklist=__setup_shutdown_event")
    guest.start()
    guest.up()
    for command in ("suspend", "checkpoint"):
        before = len(guest.ticks())
        refused = guest.cmd(command, str(file), "timeout=3", code=7).stderr
        assert "did not suspend within 3 s and runs on" in refused
        assert "control/feature-suspend" in refused
        assert run("xenstore-read", f"/local/domain/{guest.domid}/control/shutdown").stdout.strip() == ""
        assert only(folder) == []
        goes_on(guest, before, stops=0)
    assert "answers" in guest.shell("echo its console answers")


@pytest.fixture
def flaky(folder):
    made = Flaky(folder)
    yield made
    made.close()


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.long
def test_a_disk_that_fails(vm, image, flaky, compression):
    """While an image is written: the guest runs on, and what was there is there. While one is read: no domain is made."""
    file = flaky.place / "guest.img"
    guest = vm(disk=f"{image('disk')}:file:xvda:w:disk", **{"image-compression": compression})
    guest.start()
    guest.up()
    file.write_text("an older image")
    os.sync()
    cap(guest, 1)
    saving = guest.begin_cmd("suspend", str(file))
    builder = asked(guest, saving)
    flaky.fails(now=True)
    cap(guest, 0)
    kill(builder, signal.SIGCONT)
    text = saving.communicate(timeout=300)[0]
    assert saving.returncode == 1, text
    assert "writing the image: Input/output error" in text
    runs_on(guest, 4)
    uses_its_disk(guest, "after-the-failure")
    flaky.mend()
    assert [name for name in only(flaky.place) if name != "lost+found"] == ["guest.img"]
    assert file.read_text() == "an older image"
    suspend(guest, file)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    flaky.fails(now=True)
    refused = guest.cmd("restore", str(file), code=1).stderr
    assert "Input/output error" in refused
    assert guest.uuid not in domains()
    flaky.mend()
    guest.cmd("restore", str(file))
    runs_on(guest, 8)


def mutations(random, size, streams_at):
    """Endlessly: what is done to an image, as (offset, bytes) to be written, or as the length to cut it to."""
    while True:
        kind = random.randrange(6)
        near = random.randrange(streams_at + 8192)  # head, config and the first records
        if kind == 0:
            yield near, bytes([random.randrange(256)])
        elif kind == 1:
            yield near, random.randbytes(random.randrange(1, 64))
        elif kind == 2:
            yield random.randrange(size), random.randbytes(random.randrange(1, 64))
        elif kind == 3:
            yield max(0, size - random.randrange(1, 16384)), random.randbytes(8)  # the last records
        elif kind == 4:
            yield random.choice((random.randrange(size), random.randrange(streams_at + 64), size - 1)), None
        else:
            yield size, random.randbytes(random.randrange(1, 64))  # appended


def refused(guest, file):
    """Why a restore is refused; each monitor tries thirty a minute."""
    while True:
        with guest.connect() as monitor, pytest.raises(XenvmError) as caught:
            monitor.handed = os.open(file, os.O_RDONLY)
            monitor.watch("restore", lambda _event: None, file=str(file))
        if "times a minute" not in caught.value.message:
            return caught.value.message
        time.sleep(2)


@pytest.mark.long
def test_two_hundred_mutated_images(vm, folder):
    """Each is refused in words of what is wrong, over four monitors; none makes a domain, crashes a process, or leaks."""
    saved = {}
    for compression in ("none", "zstd"):
        guest = vm(**{"image-compression": compression})
        guest.start()
        guest.up()
        saved[compression] = folder / compression
        suspend(guest, saved[compression])
        guest.end()
    others = [vm(startup="shutdown") for _ in range(4)]
    for one in others:
        one.start()
    counts = [len(os.listdir(f"/proc/{one.broker()}/fd")) for one in others]
    random, tried, words = Random(4711), 0, Counter()
    for compression, file in saved.items():
        size = file.stat().st_size
        streams_at = file.open("rb").read(1 << 16).index(b"LibxlFmt") if compression == "none" else 2048
        with file.open("r+b", buffering=0) as image:
            for number, (at, content) in zip(range(100), mutations(random, size, streams_at), strict=False):
                if content is None:
                    was = os.pread(image.fileno(), size - at, at)
                    image.truncate(at)
                else:
                    was = os.pread(image.fileno(), len(content), at)
                    os.pwrite(image.fileno(), content, at)
                message = refused(others[number % len(others)], file)
                assert message.isprintable(), message
                assert not any(word in message for word in ("died", "without an answer", "not asked for")), message
                words[message.split(":")[0][:40]] += 1
                tried += 1
                os.pwrite(image.fileno(), was, at)
                image.truncate(size)
        assert domains() == {}
    print(words)
    assert tried == 200
    for one, count in zip(others, counts, strict=True):
        assert one.state == "shutdown"
        until(
            lambda one=one, count=count: len(os.listdir(f"/proc/{one.broker()}/fd")) <= count,
            "no descriptor is left",
            90,
        )
