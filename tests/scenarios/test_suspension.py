# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests written to files and brought back, on whichever host; what becomes of guest and file when something dies."""

import os
import signal
import time

import pytest
from conftest import kill, until
from saving import acts, builder, goes_on, held, only, runs_on, suspend

MIB = 1 << 20


@pytest.mark.long
def test_suspend_and_restore(host, vm, folder):
    """With a disk and a card; the file is whole and private, and the guest goes on where it was."""
    file, disk = folder / "guest.img", host.directory() / "disk.img"
    disk.write_bytes(bytes(16 * MIB))
    disk.chmod(0o666)
    host.make_bridge()
    try:
        guest = vm(disk=f"{disk}:file:xvda:w:disk", nic=f"bridge={host.bridge}")
        guest.start()
        guest.up()
        first, before = guest.domid, len(guest.ticks())
        told = suspend(guest, file)
        assert told["state"] == "suspended"
        assert told["image_bytes"] == file.stat().st_size > MIB
        assert file.stat().st_mode & 0o777 == 0o600
        assert guest.cmd("status", code=3).stdout.startswith("suspended")
        assert guest.uuid not in host.domains()
        assert host.devices()["backends"] == []
        guest.cmd("restore", f"file={file}")
        assert guest.state == "running"
        assert guest.domid != first
        goes_on(guest, before)
        for kind in ("disk", "nic"):
            until(lambda kind=kind: "connected" in guest.cmd(f"{kind}-list").stdout, f"the {kind} is connected")
        guest.cmd("destroy")
        guest.cmd("restore", str(file), "paused=true", "delete=true")
        assert guest.state == "paused"
        assert only(folder) == []
        guest.cmd("unpause")
        guest.until("running")
        guest.end()
    finally:
        host.remove_bridge()


def test_a_checkpoint_goes_on(vm, folder):
    """Twice, in place of the older image; a paused guest is not saved; the last image is one to come back from."""
    file = folder / "guest.img"
    guest = vm()
    guest.start()
    guest.up()
    for _ in range(2):
        before = len(guest.ticks())
        guest.cmd("checkpoint", str(file))
        assert guest.state == "running"
        goes_on(guest, before)
    guest.cmd("pause")
    assert "is paused" in guest.cmd("suspend", str(file), code=5).stderr
    guest.cmd("unpause")
    guest.cmd("destroy")
    guest.cmd("restore", str(file))
    until(lambda: len(guest.ticks()) > before, "the guest ticks on from its last checkpoint")
    assert guest.boots() == 1


def test_kill_9_in_the_middle_of_a_suspend(host, vm, folder):
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
        if victim == "builder":
            assert guest.status()["last_fault"] in text
            assert guest.cmd("status").stdout.startswith("running (last failure: save: its builder died of SIGKILL")
        if victim == "broker":
            until(lambda: not host.processes(), "the rest has ended too")
            guest.write(startup="shutdown")  # which adopts, and builds nothing
            guest.start()
        assert only(folder) == ["guest.img"]
        assert file.read_text() == older
        runs_on(guest, 6 * turn)
    guest.cmd("shutdown")  # xenstored has heard of each resume: else nobody would hear of this


@pytest.mark.parametrize(("victim", "delay_s"), [("builder", 0.1), ("broker", 0.2), ("broker", 0.9)])
@pytest.mark.long
def test_kill_9_at_some_moment_of_a_suspend(host, vm, folder, victim, delay_s):
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
    pid = builder(guest) if victim == "builder" else guest.pids()[victim]
    if pid:  # else it has ended by itself
        kill(pid)
    saving.communicate(timeout=120)
    if victim == "broker":
        until(lambda: not host.processes(), "the rest has ended too")
        guest.write(startup="shutdown")
        guest.start()
    assert only(folder) == ["guest.img"]
    if file.stat().st_size != len(older):
        state = guest.state
        assert state in ("suspended", "shutdown", "running")
        guest.cmd("destroy")
        guest.cmd("restore", str(file))
        if state == "running":  # it had run on, and what it did since is undone by the restore
            before = len(guest.ticks())
            until(lambda: len(guest.ticks()) > before + 2, "the guest ticks on")
            return
    else:
        assert saving.returncode != 0
        assert file.read_text() == older
    runs_on(guest, 8)


@pytest.mark.long
def test_a_monitor_that_is_ended_lets_a_suspended_guest_run(host, vm, folder):
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
        until(lambda: not host.processes(), "the monitor has ended")
        assert '"op":"resume"' in acts(guest).splitlines()[-3]
        goes_on(guest, len(guest.ticks()), stops)  # with no monitor there
        guest.write(startup="shutdown")
        guest.start()
        guest.until("running")


@pytest.mark.long
def test_the_config_changes_before_a_suspend(vm, folder):
    """The image tells of the guest that is in it, and comes back once the config is that one again."""
    file = folder / "guest.img"
    guest = vm(vcpus=2)
    guest.start()
    guest.up()
    guest.write(memory=160, vcpus=1)
    guest.cmd("read-config")
    suspend(guest, file)
    assert "128 MiB of memory, this VM has 160 MiB" in guest.cmd("restore", str(file), code=5).stderr
    guest.write(memory=128)
    guest.cmd("read-config")
    assert "2 vcpus, this VM has 1" in guest.cmd("restore", str(file), code=5).stderr
    guest.write(vcpus=2)
    guest.cmd("read-config")
    guest.cmd("restore", str(file))
    runs_on(guest, 3)


@pytest.mark.long
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


@pytest.mark.long
def test_the_start_of_a_monitor_restores(host, vm, folder):
    """restore-del removes the image once the guest runs; a monitor that finds the domain adopts it without one."""
    file = folder / "guest.img"
    guest = vm()
    guest.start()
    guest.up()
    before = len(guest.ticks())
    suspend(guest, file)
    guest.cmd("quit")
    until(lambda: not host.processes(), "the monitor has ended")
    guest.write(startup=f"restore-del {file}")
    guest.start()
    goes_on(guest, before)
    assert only(folder) == []
    guest.cmd("quit")
    until(lambda: not host.processes(), "the monitor has ended")
    domid = host.domains()[guest.uuid]
    guest.start()
    assert guest.domid == domid
    suspend(guest, file)
    guest.cmd("quit")
    until(lambda: not host.processes(), "the monitor has ended")
    guest.write(startup=f"restore {file}")
    guest.start()
    guest.cmd("quit")
    until(lambda: not host.processes(), "the monitor has ended")
    assert only(folder) == ["guest.img"]
    guest.write(startup=f"restore-del {file}")  # as if the monitor had died before it could remove the image
    guest.start()
    guest.until("running")
    assert only(folder) == []
    guest.end()
    assert f"startup: {file}: No such file" in guest.start(code=6).stderr
    until(lambda: guest.left() == [], "nothing is left")


def test_a_start_says_what_is_wrong_with_its_image(vm, folder):
    """In the words that `xenvm --check` has for it, and with its exit status; nothing is left."""
    guest = vm(startup=f"restore {folder}/none")
    for file, why in ((folder / "none", "No such file or directory"), (folder, "is a regular file")):
        guest.write(startup=f"restore {file}")
        said = guest.start(code=6).stderr
        assert said.startswith(f"startup: {file}: ")
        assert why in said
        assert "hint: `startup = started`" in said
        until(lambda: guest.left() == [], "nothing is left")


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
    assert "cancelled" in guest.status()["last_fault"]
    assert only(folder) == []
    runs_on(guest, 6)


@pytest.mark.long
def test_bad_images_leave_nothing(host, vm, folder):
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
        assert guest.uuid not in host.domains()
        assert acts(guest).count('"op":"restore"') > 0
    guest.write(memory=160)
    guest.cmd("read-config")
    assert "128 MiB of memory, this VM has 160 MiB" in guest.cmd("restore", str(good), code=5).stderr
    guest.write(memory=128)
    guest.cmd("read-config")
    guest.cmd("restore", str(good))
    goes_on(guest, before)
