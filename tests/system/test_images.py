# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images: written, read, exchanged with xl, and what becomes of guest and file when something fails in between."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from conftest import domains, json_of, kill, processes, run, until

VERIFY = ("bin/verify-stream-v2", "-f", "xl", "-i")


def verify(file):
    """Let Xen's own checker read an image."""
    base = next(path for path in sorted(Path("/usr/lib").glob("xen-4.*")) if (path / VERIFY[0]).exists())
    done = subprocess.run(
        ["python3", f"{base}/{VERIFY[0]}", *VERIFY[1:], str(file)],
        env={"PYTHONPATH": f"{base}/lib/python", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def goes_on(guest, before, stops=3, patience_s=120):
    """The guest ticks on where it was: none again, and none missing but one for each of `stops` times it was suspended.

    What is in the console's ring when a guest is saved is lost by a restore, also with xl: libxenguest clears the ring.
    And what the guest's kernel says when it suspends and resumes can stand in the middle of a line.
    """
    until(lambda: len(guest.ticks()) > before + 2, "the guest ticks on", patience_s)
    ticks = guest.ticks()
    assert ticks == sorted(set(ticks))
    assert len(set(range(1, ticks[-1])) - set(ticks)) <= stops
    assert guest.boots() == 1


def only(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def folder():
    """A place for save images on a file system of a disk, which is empty again afterwards."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        yield Path(made)


def suspend(guest, file, *words):
    """Suspend; return what was told of it."""
    done = run("xenvm-cmd", "--json", guest.uuid, "suspend", str(file), *words)
    assert done.returncode == 0, done.stdout
    return json_of(done)


def acts(guest):
    return Path(f"/var/log/xenvm/{guest.uuid}.acts").read_text()


def helper(role):
    return next((pid for pid, words in processes().items() if role in words), 0)


def test_suspend_and_restore_with_disk_and_card(vm, image, bridge, folder):
    """Memory, disk and card are as they were; the image is one that Xen's own checker accepts, and has holes."""
    file = folder / "guest.img"
    guest = vm(disk=f"{image('disk')}:file:xvda:w:disk", nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    guest.shell("echo kept-in-memory >/tmp-note; echo on-disk | dd of=/dev/xvda bs=512 conv=sync,fsync")
    guest.shell("ip addr add 10.77.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -w 20 10.77.0.1")
    first, before = guest.domid, len(guest.ticks())
    told = suspend(guest, file)
    assert told["state"] == "suspended"
    assert told["image_bytes"] == file.stat().st_size
    assert guest.cmd("status", code=3).stdout.startswith("suspended")
    assert guest.uuid not in domains()
    assert only(folder) == ["guest.img"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_blocks * 512 < file.stat().st_size * 0.9
    verify(file)
    guest.cmd("restore", f"file={file}")
    assert guest.state == "running"
    assert guest.domid != first
    goes_on(guest, before)
    assert "kept-in-memory" in guest.shell("cat /tmp-note").splitlines()
    assert "on-disk" in guest.shell("dd if=/dev/xvda bs=512 count=1 2>/dev/null; echo")
    guest.shell("ping -c 2 -w 30 10.77.0.1")
    guest.shell("echo again | dd of=/dev/xvda bs=512 conv=sync,fsync")
    assert "connected" in guest.cmd("nic-list").stdout
    assert "connected" in guest.cmd("disk-list").stdout
    guest.cmd("destroy")
    guest.cmd("restore", str(file), "paused=true", "delete=true")
    assert guest.state == "paused"
    assert only(folder) == []
    guest.cmd("unpause")
    guest.until("running")


def cap(guest, percent):
    """Limit how much of a processor the guest gets, in percent, 0 for no limit: one that has little is slow to suspend."""
    limit = ("-d", guest.name, "-c", str(percent))
    assert not run("xl", "sched-credit2", *limit).returncode or not run("xl", "sched-credit", *limit).returncode


def test_checkpoint_and_what_is_refused(vm, folder):
    """The guest runs on after a checkpoint, twice; what cannot be is refused before anything is touched."""
    file = folder / "guest.img"
    guest = vm()
    guest.start()
    guest.up()
    before = len(guest.ticks())
    cap(guest, 1)
    late = guest.cmd("suspend", str(file), "timeout=1", code=7).stderr
    cap(guest, 0)
    assert "did not suspend within 1 s and runs on" in late
    assert only(folder) == []
    goes_on(guest, before)
    guest.until("running")
    file.write_text("an older image")
    for word in ("suspend", "checkpoint"):
        refused = guest.cmd(word, str(file), "live=true", code=5).stderr
        assert "shadow paging" in refused
    before = len(guest.ticks())
    goes_on(guest, before)
    for _ in range(2):
        before = len(guest.ticks())
        guest.cmd("checkpoint", str(file))
        assert guest.state == "running"
        verify(file)
        goes_on(guest, before)
    guest.cmd("pause")
    assert "is paused" in guest.cmd("suspend", str(file), code=5).stderr
    guest.cmd("unpause")
    guest.cmd("destroy")
    guest.cmd("restore", str(file))
    until(lambda: len(guest.ticks()) > before, "the guest ticks on from its last checkpoint")
    assert guest.boots() == 1


def step(guest):
    """What the monitor is at, "" when nothing."""
    return guest.status()["step"]


def held(guest, file):
    """Begin a suspend and stop its builder while it writes the image: the guest is suspended then.

    Return the client and the builder's pid. One that was too fast is undone, and it is tried again.
    """
    for _ in range(5):
        saving = guest.begin_cmd("suspend", str(file))
        until(lambda one=saving: step(guest) == "writing the image" or one.poll() is not None, "the image is written")
        pid = helper("builder")
        if pid:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)  # for what it has said before
            if step(guest) == "writing the image" and helper("builder") == pid:
                return saving, pid
            kill(pid, signal.SIGCONT)
        assert saving.wait(300) == 0
        guest.cmd("restore", str(file))
    raise AssertionError("the builder was always too fast")


def runs_on(guest, stops):
    """The guest runs and ticks on from here."""
    guest.until("running")
    goes_on(guest, len(guest.ticks()), stops)


def test_kill_9_in_the_middle_of_a_suspend(vm, folder):
    """Builder, supervisor and broker, with the guest suspended: it runs on, the older image stays, no file is left."""
    file, older = folder / "guest.img", "an older image"
    guest = vm()
    guest.start()
    guest.up()
    for turn, victim in enumerate(("builder", "supervisor", "broker"), 1):
        saving, builder = held(guest, file)
        file.write_text(older)
        kill(builder if victim == "builder" else guest.pids()[victim])
        text = saving.communicate(timeout=120)[0]
        assert saving.returncode != 0
        assert "SIGKILL" in text or "hung up" in text
        if victim == "broker":
            until(lambda: not processes(), "the rest has ended too")
            guest.write(startup="shutdown")  # which adopts, and builds nothing
            guest.start()
        assert only(folder) == ["guest.img"]
        assert file.read_text() == older
        runs_on(guest, 6 * turn)
    guest.shell("poweroff -f & true")  # xenstored has heard of each resume: else nobody would hear of this
    guest.until("shutdown")


@pytest.mark.parametrize(("victim", "delay_s"), [("builder", 0.1), ("broker", 0.2), ("broker", 0.9)])
@pytest.mark.long
def test_kill_9_at_some_moment_of_a_suspend(vm, folder, victim, delay_s):
    """One that is killed too late, when the image is whole, leaves that."""
    file, older = folder / "guest.img", "an older image"
    guest = vm()
    guest.start()
    guest.up()
    file.write_text(older)
    jobs = acts(guest).count('"op":"save"')
    saving = guest.begin_cmd("suspend", str(file))
    until(lambda: acts(guest).count('"op":"save"') > jobs, "a save has begun")
    time.sleep(delay_s)
    pid = helper("builder") if victim == "builder" else guest.pids()[victim]
    if pid:  # else it has ended by itself
        kill(pid)
    saving.communicate(timeout=120)
    if victim == "broker":
        until(lambda: not processes(), "the rest has ended too")
        guest.write(startup="shutdown")
        guest.start()
    assert only(folder) == ["guest.img"]
    if file.stat().st_size != len(older):
        assert guest.state in ("suspended", "shutdown", "running")
        verify(file)
        guest.cmd("destroy")
        guest.cmd("restore", str(file))
    else:
        assert saving.returncode != 0
        assert file.read_text() == older
    runs_on(guest, 8)


def test_a_monitor_that_is_ended_lets_a_suspended_guest_run(vm, folder):
    """SIGTERM while the image is written, and when it is whole but has no name yet; then who adopts the guest."""
    file = folder / "guest.img"
    guest = vm()
    guest.start()
    guest.up()
    for when, stops in (("writing", 6), ("whole", 9)):
        if when == "writing":
            saving, _ = held(guest, file)
            file.unlink(missing_ok=True)
            kill(guest.broker(), signal.SIGTERM)
            assert saving.wait(120) != 0
            assert only(folder) == []
        else:
            with guest.connect() as monitor:
                monitor.handed = os.open(file, os.O_RDWR | os.O_CREAT)
                monitor.call("suspend", file=str(file))
                kill(guest.broker(), signal.SIGTERM)
                until(lambda: not guest.lock.exists(), "the monitor has ended")
        until(lambda: not processes(), "the monitor has ended")
        assert '"op":"resume"' in acts(guest).splitlines()[-3]
        goes_on(guest, len(guest.ticks()), stops)  # with no monitor there
        guest.write(startup="shutdown")
        guest.start()
        guest.until("running")


def test_the_config_changes_before_a_suspend(vm, folder):
    """The image tells of the guest that is in it, and comes back once the config is that one again."""
    file = folder / "guest.img"
    guest = vm(vcpus=2)
    guest.start()
    guest.up()
    guest.write(memory=160, vcpus=1)
    guest.cmd("read-config")
    suspend(guest, file)
    verify(file)
    assert "128 MiB of memory, this VM has 160 MiB" in guest.cmd("restore", str(file), code=5).stderr
    guest.write(memory=128)
    guest.cmd("read-config")
    assert "2 vcpus, this VM has 1" in guest.cmd("restore", str(file), code=5).stderr
    guest.write(vcpus=2)
    guest.cmd("read-config")
    guest.cmd("restore", str(file))
    runs_on(guest, 3)


def test_a_guest_with_a_vcpu_switched_off(vm, folder):
    file = folder / "guest.img"
    guest = vm(vcpus=3)
    guest.start()
    guest.up()
    guest.shell("echo 0 >/sys/devices/system/cpu/cpu1/online")
    suspend(guest, file)
    verify(file)
    guest.cmd("restore", str(file))
    runs_on(guest, 4)


def test_the_image_of_another_vm(vm, folder):
    file = folder / "guest.img"
    one, other = vm(), vm()
    one.start()
    one.up()
    suspend(one, file)
    other.write(startup="shutdown")
    other.start()
    refused = other.cmd("restore", str(file), code=5).stderr
    assert f"of the VM {one.uuid}, this one is {other.uuid}" in refused
    assert "foreign=true" in refused
    other.cmd("restore", str(file), "foreign=true")
    assert other.state == "running"
    assert '"restore-foreign"' in acts(other)


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


@pytest.mark.long
def test_xl_reads_ours_and_we_read_what_xl_wrote(vm, folder):
    ours, theirs = folder / "ours.img", folder / "theirs.img"
    guest = vm()
    guest.start()
    guest.up()
    before = len(guest.ticks())
    suspend(guest, ours)
    verify(ours)
    done = run("xl", "restore", str(ours))
    assert done.returncode == 0, done.stderr
    goes_on(guest, before)
    before = len(guest.ticks())
    done = run("xl", "save", guest.name, str(theirs))
    assert done.returncode == 0, done.stderr
    verify(theirs)
    until(lambda: guest.uuid not in domains(), "xl has ended the domain")
    guest.cmd("restore", str(theirs))
    goes_on(guest, before)
    suspend(guest, ours)
    verify(ours)
    run("xenstore-rm", "/libxl")  # an empty directory that xl leaves


@pytest.mark.long
def test_the_start_of_a_monitor_restores(vm, folder):
    """restore-del removes the image once the guest runs; a monitor that finds the domain adopts it without one."""
    file = folder / "guest.img"
    guest = vm()
    guest.start()
    guest.up()
    before = len(guest.ticks())
    suspend(guest, file)
    guest.cmd("quit")
    until(lambda: not processes(), "the monitor has ended")
    guest.write(startup=f"restore-del {file}")
    guest.start()
    goes_on(guest, before)
    assert only(folder) == []
    guest.cmd("quit")
    until(lambda: not processes(), "the monitor has ended")
    domid = domains()[guest.uuid]
    guest.start()
    assert guest.domid == domid
    suspend(guest, file)
    guest.cmd("quit")
    until(lambda: not processes(), "the monitor has ended")
    guest.write(startup=f"restore {file}")
    guest.start()
    guest.cmd("quit")
    until(lambda: not processes(), "the monitor has ended")
    assert only(folder) == ["guest.img"]
    guest.write(startup=f"restore-del {file}")  # as if the monitor had died before it could remove the image
    guest.start()
    guest.until("running")
    assert only(folder) == []
    guest.end()
    failed = guest.start(code=1).stderr
    assert str(file) in failed
    assert guest.left() == []


@pytest.mark.long
def test_no_space(vm, tmp_path):
    """A file system that is too small, or fills up meanwhile: the guest runs on, the older image stays."""
    guest = vm()
    guest.start()
    guest.up()
    place = tmp_path / "small"
    place.mkdir()
    for size_mib, room in ((16, False), (150, True)):
        assert run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(place)).returncode == 0
        try:
            file = place / "guest.img"
            file.write_text("an older image")
            before, jobs = len(guest.ticks()), acts(guest).count('"op":"save"')
            saving = subprocess.Popen(
                ["xenvm-cmd", guest.uuid, "suspend", str(file)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if room:
                until(lambda seen=jobs: acts(guest).count('"op":"save"') > seen, "a save has begun")
                run("dd", "if=/dev/zero", f"of={place}/other", "bs=1M", "count=100")
            text = saving.communicate(timeout=300)[0]
            assert saving.returncode == 1, text
            assert "are free" in text or (room and "No space left" in text)
            assert file.read_text() == "an older image"
            assert "guest.img" in only(place)
            assert len(only(place)) == 1 + room
            goes_on(guest, before)
        finally:
            run("umount", str(place))


def test_two_saves_at_once_and_cancel(vm, folder):
    guest = vm()
    guest.start()
    guest.up()
    saving, _ = held(guest, folder / "one")
    (folder / "one").unlink(missing_ok=True)
    assert "busy with suspend" in guest.cmd("suspend", str(folder / "two"), code=9).stderr
    guest.cmd("cancel")
    text = saving.communicate(timeout=120)[0]
    assert saving.returncode == 1, text
    assert "cancelled" in text
    assert only(folder) == []
    runs_on(guest, 6)


@pytest.mark.long
def test_bad_images_leave_nothing(vm, folder):
    """Cut off, damaged, foreign, of another size: refused in words before there is a domain; the file stays."""
    good = folder / "good.img"
    guest = vm()
    guest.start()
    guest.up()
    before = len(guest.ticks())
    suspend(guest, good)
    content = good.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    for name, bad, words in (
        ("cut", content[: len(content) // 2], "cut off"),
        ("damaged", bytes(damaged), "damaged"),
        ("foreign", b"\x7fELF" + bytes(1000), "no save image"),
        ("empty", b"", "cut off"),
    ):
        file = folder / name
        file.write_bytes(bad)
        assert words in guest.cmd("restore", str(file), "delete=true", code=1).stderr
        assert file.read_bytes() == bad
        assert guest.uuid not in domains()
        assert acts(guest).count('"op":"restore"') > 0
    guest.write(memory=160)
    guest.cmd("read-config")
    assert "128 MiB of memory, this VM has 160 MiB" in guest.cmd("restore", str(good), code=5).stderr
    guest.write(memory=128)
    guest.cmd("read-config")
    guest.cmd("restore", str(good))
    goes_on(guest, before)


@pytest.mark.long
def test_round_after_round(vm, image, bridge, folder):
    """Suspend and restore under load, again and again: not a tick is lost, the disk is whole.

    XENVM_TEST_ROUNDS says how often, five times by default.
    """
    file = folder / "guest.img"
    guest = vm(disk=f"{image('disk')}:file:xvda:w:disk", nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    guest.shell("(while dd if=/dev/xvda of=/dev/null bs=64k iflag=direct 2>/dev/null; do true; done) & true")
    for turn in range(int(os.environ.get("XENVM_TEST_ROUNDS", "5"))):
        before = len(guest.ticks())
        if turn % 2:
            guest.cmd("checkpoint", str(file))
        else:
            suspend(guest, file)
            guest.cmd("restore", str(file), "delete=true")
        goes_on(guest, before, stops=2 * turn + 2)
    until(lambda: "connected" in guest.cmd("disk-list").stdout, "the disk is connected")
