# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images: written, read, exchanged with xl, and what becomes of guest and file when something fails in between."""

import contextlib
import os
import re
import socket
import time
from pathlib import Path

import pytest
from conftest import MIB, domains, processes, run, until
from savedguest import cap, unpacked, verify
from saving import acts, goes_on, held, only, runs_on, suspend


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


@pytest.mark.long
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


@pytest.mark.long
def test_a_user_saves_into_a_directory_that_the_policy_opens(vm, folder):
    """Where only root may write, a member of the group xenvm has images of this VM, and no other files."""
    folder.chmod(0o700)
    policy = Path("/etc/xenvm/policy.toml")
    policy.write_text(f'image-directories = ["{folder}"]\n')
    as_user = ("setpriv", "--reuid=nobody", "--regid=xenvm", "--clear-groups", "xenvm-cmd")
    try:
        guest = vm()
        guest.start()
        guest.up()
        file, before = folder / f"{guest.uuid}.img", len(guest.ticks())
        for path, words in (
            (folder / "other.img", "names begin with its uuid"),
            (Path("/root/x.img"), "image-directories"),
        ):
            refused = run(*as_user, guest.uuid, "suspend", str(path))
            assert (refused.returncode, words in refused.stderr) == (8, True), refused.stderr
        assert only(folder) == []
        for turn in range(2):  # the second time there is an older one
            done = run(*as_user, guest.uuid, "checkpoint", str(file))
            assert done.returncode == 0, done.stderr
            assert only(folder) == [file.name]
            verify(file)
            goes_on(guest, before, stops=2 * turn + 2)
        done = run(*as_user, guest.uuid, "suspend", str(file))
        assert done.returncode == 0, done.stderr
        assert guest.state == "suspended"
        assert only(folder) == [file.name]
        assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (0, 0o600)
        verify(file)
        done = run(*as_user, guest.uuid, "restore", str(file))
        assert done.returncode == 0, done.stderr
        goes_on(guest, before, stops=8)
        was = file.read_bytes()
        saving, _ = held(guest, file, user="nobody", group="xenvm", extra_groups=[])
        guest.cmd("cancel")
        assert saving.wait(120) == 1
        assert (only(folder), file.read_bytes() == was) == ([file.name], True)
        runs_on(guest, 14)
        assert acts(guest).count('"act":"image"') >= 4
    finally:
        policy.unlink()


def test_a_compressed_image(vm, folder):
    """It is small, the guest comes back from it, and what zstd makes of it is an image for xl."""
    file = folder / "guest.img"
    guest = vm(**{"image-compression": "zstd"})
    guest.start()
    guest.up()
    guest.shell("echo kept-in-memory >/tmp-note")
    before = len(guest.ticks())
    told = suspend(guest, file)
    assert told["image_compression"] == "zstd"
    assert told["image_bytes"] == file.stat().st_size <= 0.35 * 128 * MIB
    plain = unpacked(file)
    assert plain.stat().st_size > 128 * MIB
    verify(plain)
    plain.unlink()
    assert only(folder) == ["guest.img"]
    guest.cmd("restore", str(file))
    goes_on(guest, before)
    assert "kept-in-memory" in guest.shell("cat /tmp-note").splitlines()
    before = len(guest.ticks())
    note = guest.cmd("checkpoint", str(file)).stderr
    assert "xl cannot read it" in note
    goes_on(guest, before)
    guest.write(**{"image-compression": "none"})  # of a restore, the image decides
    guest.cmd("destroy")
    guest.cmd("read-config")
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert "cut off" in guest.cmd("restore", str(file), "delete=true", code=1).stderr
    file.write_bytes(good[:3000000] + bytes(4) + good[3000004:])
    assert "damaged" in guest.cmd("restore", str(file), code=1).stderr
    file.write_bytes(good)
    guest.cmd("restore", str(file), "delete=true")
    until(lambda: len(guest.ticks()) > before, "the guest ticks on from its checkpoint")
    assert only(folder) == []
    assert "image_compression" not in suspend(guest, file)


@pytest.mark.long
def test_xl_restores_what_zstd_has_unpacked(vm, folder):
    file = folder / "guest.img"
    guest = vm(**{"image-compression": "zstd"})
    guest.start()
    guest.up()
    before = len(guest.ticks())
    suspend(guest, file)
    assert run("xl", "restore", str(file)).returncode != 0
    done = run("xl", "restore", str(unpacked(file)))
    assert done.returncode == 0, done.stderr
    goes_on(guest, before)
    before = len(guest.ticks())
    theirs = folder / "theirs.img"
    assert run("xl", "save", guest.name, str(theirs)).returncode == 0
    until(lambda: guest.uuid not in domains(), "xl has ended the domain")
    assert run("zstd", "-q", "-1", "--rm", str(theirs), "-o", str(theirs) + ".zst").returncode == 0
    guest.cmd("restore", str(theirs) + ".zst")
    goes_on(guest, before)
    run("xenstore-rm", "/libxl")  # an empty directory that xl leaves


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


class Caller:
    """A process in the guest that says numbers over one TCP connection, ten a second, and who hears them here."""

    def __init__(self, guest):
        self._listener = socket.create_server(("10.77.0.1", 0))
        self._listener.settimeout(120)
        port = self._listener.getsockname()[1]
        counts = "n=0; while true; do n=$((n+1)); echo $n; usleep 100000; done"
        guest.shell(f"({counts}) | nc 10.77.0.1 {port} & true")
        self._connection, _ = self._listener.accept()
        self._connection.setblocking(False)
        self._text = b""

    def heard(self):
        """How far it has counted; not a number may be missing."""
        with contextlib.suppress(BlockingIOError):
            while more := self._connection.recv(65536):
                self._text += more
            raise AssertionError("the connection has ended")
        numbers = [int(line) for line in self._text.split(b"\n")[:-1]]
        assert numbers == list(range(1, len(numbers) + 1))
        return len(numbers)

    def goes_on(self):
        before = self.heard()
        until(lambda: self.heard() > before + 5, "the connection goes on")

    def close(self):
        self._connection.close()
        self._listener.close()


def words(form, text):
    """What of such a form the guest has said; its kernel may have said something in between."""
    (found,) = re.findall(form, text)
    return found


@pytest.fixture
def busy(vm, image, bridge):
    """A guest with a disk that is read without end, and with a connection; give it, the caller, and a check of both."""
    guest = vm(disk=f"{image('disk')}:file:xvda:w:disk", nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    guest.shell("ip addr add 10.77.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -w 20 10.77.0.1")
    guest.shell("dd if=/dev/urandom of=/dev/xvda bs=64k count=32 conv=fsync 2>/dev/null")
    summed = "dd if=/dev/xvda bs=64k count=32 iflag=direct 2>/dev/null | md5sum"
    was = words(r"[0-9a-f]{32}", guest.shell(summed))
    guest.shell("(while dd if=/dev/xvda of=/dev/null bs=64k iflag=direct 2>/dev/null; do true; done) & true")
    caller = Caller(guest)

    def sound():
        """Its disk is as it was, its connection goes on, its clock is right."""
        assert words(r"[0-9a-f]{32}", guest.shell(summed)) == was
        caller.goes_on()
        assert abs(int(words(r"\b\d{10}\b", guest.shell("date +%s"))) - time.time()) < 10

    yield guest, caller, sound
    caller.close()


@pytest.mark.long
def test_round_after_round(busy, folder):
    """Suspend and restore under load, again and again: not a tick is lost, disk, connection and clock are as they were.

    Each fifth time the monitor ends too, and the next one begins with the restore. XENVM_TEST_ROUNDS says how often.
    """
    file = folder / "guest.img"
    guest, _, sound = busy
    for turn in range(1, 1 + int(os.environ.get("XENVM_TEST_ROUNDS", "20"))):
        before = len(guest.ticks())
        suspend(guest, file)
        assert guest.uuid not in domains()
        if turn % 5:
            guest.cmd("restore", str(file), "delete=true")
        else:
            verify(file)
            guest.cmd("quit")
            until(lambda: not processes(), "the monitor has ended")
            guest.write(startup=f"restore-del {file}")
            guest.start()
        assert only(folder) == []
        goes_on(guest, before, stops=2 * turn + 2)
        sound()
        print(f"round {turn} at tick {guest.ticks()[-1]}", flush=True)
    until(lambda: "connected" in guest.cmd("disk-list").stdout, "the disk is connected")


@pytest.mark.long
def test_checkpoint_under_load(busy, folder):
    """Ten times: the guest stands still for less than it is asked to, and goes on; each image comes back."""
    guest, _, sound = busy
    kept = []
    for turn in range(1, 11):
        file = folder / f"guest{turn}.img"
        before, steps = len(guest.ticks()), []
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        with guest.connect() as monitor:
            monitor.handed = descriptor
            monitor.watch(
                "checkpoint", lambda event, told=steps: told.append((time.monotonic(), event)), file=str(file)
            )
        kept.append((file, before))
        goes_on(guest, before, stops=2 * turn + 2)
        sound()
        print(f"checkpoint {turn}:", [(round(at - steps[0][0], 2), event.get("step")) for at, event in steps])
    for file, _ in kept:
        verify(file)
    for file, before in kept:
        guest.cmd("destroy")
        seen = len(guest.ticks())
        guest.cmd("restore", str(file), "delete=true")
        until(lambda seen=seen: len(guest.ticks()) > seen + 2, "the guest ticks on")
        first = guest.ticks()[seen]
        assert before <= first <= before + 200, "it goes on from its checkpoint"
        assert guest.boots() == 1
