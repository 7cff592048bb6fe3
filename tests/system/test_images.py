# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images: written, read, exchanged with xl, and what becomes of guest and file when something fails in between."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from conftest import domains, kill, run, until
from saving import acts, goes_on, held, only, runs_on, suspend

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
