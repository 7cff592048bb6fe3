# SPDX-License-Identifier: GPL-2.0-or-later
"""HVM guests that are saved and brought back, with the state of their device model."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import MIB, domains, json_of, kill, run, until
from hvmguest import LOAD_S, Serial, disc, model, models
from savedguest import Flaky, helper, verify
from saving import step

ROUNDS = int(os.environ.get("XENVM_TEST_ROUNDS", "20")) // 2


def counts(serial):
    """What the boot sector has counted, as far as it was said on this port."""
    return [int(found, 16) for found in re.findall(r"tick 1 ([0-9a-f]{8})\r", serial.text)]


def goes_on(serial, after):
    """It counts on from there, and not one number is missing."""
    until(lambda: len(counts(serial)) > 4, "the guest counts", 60)
    heard = counts(serial)
    assert heard == list(range(heard[0], heard[-1] + 1))
    assert after <= heard[0] <= after + 3  # what it was saying when it was stopped


def brought_back(guest, file, last):
    """Restore a guest, listen before it runs, and see it count on; return its serial port."""
    guest.cmd("restore", str(file), "paused=true")
    serial = Serial(guest)
    time.sleep(2)  # until QEMU sees that somebody listens: before that it throws away what the guest says
    assert counts(serial) == []
    guest.cmd("unpause")
    goes_on(serial, last)
    return serial


def told(guest, *words):
    done = run("xenvm-cmd", "--json", guest.uuid, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json_of(done)


@pytest.fixture
def saved(hvm, disk, folder):
    """A guest that counts, and a file for its image."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", memory=64)
    guest.start()
    serial = Serial(guest)
    until(lambda: len(counts(serial)) > 2, "the guest counts", 120)
    return guest, serial, folder / "guest.img"


def test_suspend_and_restore(saved):
    """A guest without PV drivers: it is not asked. Its image is one that xl knows, and nothing of it is left."""
    guest, serial, file = saved
    first = guest.domid
    image = told(guest, "suspend", str(file))
    assert image["image_bytes"] == file.stat().st_size > 64 * MIB
    assert models() == {}
    assert guest.state == "suspended"
    assert guest.uuid not in domains()
    verify(file)
    assert file.stat().st_blocks * 512 < 0.6 * file.stat().st_size  # pages of zeros are holes
    brought_back(guest, file, counts(serial)[-1])
    assert guest.domid != first
    assert run("xenvm-audit", guest.uuid).returncode == 0
    guest.cmd("shutdown", "timeout=60")
    assert guest.state == "shutdown"


def test_checkpoint_and_live(saved):
    """The guest runs on, and its device model with it; live it stands still for a fraction of the time."""
    guest, serial, file = saved
    still = told(guest, "checkpoint", str(file))
    verify(file)
    at = counts(serial)[-1]
    until(lambda: counts(serial)[-1] > at + 2, "the guest counts on", 60)
    live = told(guest, "checkpoint", str(file), "live=true")
    verify(file)
    print(f"stood still for {still['still_ms']} ms, live for {live['still_ms']} ms in {live['rounds']} rounds")
    assert 1 <= live["rounds"] <= 5
    assert live["still_ms"] < still["still_ms"]
    at = counts(serial)[-1]
    until(lambda: counts(serial)[-1] > at + 2, "the guest counts on", 60)
    heard = counts(serial)
    assert heard == list(range(heard[0], heard[-1] + 1))
    guest.cmd("suspend", str(file), "live=true")
    verify(file)
    brought_back(guest, file, counts(serial)[-1])


@pytest.mark.long
def test_round_after_round(saved):
    guest, serial, file = saved
    for turn in range(ROUNDS):
        guest.cmd("suspend", str(file), f"live={'true' if turn % 2 else 'false'}")
        verify(file)
        serial = brought_back(guest, file, counts(serial)[-1])


@pytest.mark.long
def test_xl_restores_ours(saved):
    guest, serial, file = saved
    guest.cmd("suspend", str(file))
    last = counts(serial)[-1]
    done = run("xl", "restore", "-p", str(file))
    assert done.returncode == 0, done.stderr
    path = until(
        lambda: run("xenstore-read", f"/local/domain/{domains()[guest.uuid]}/serial/0/tty").stdout.strip(), "tty"
    )
    theirs = Serial.of(path)
    time.sleep(2)
    assert run("xl", "unpause", guest.name).returncode == 0
    goes_on(theirs, last)
    assert run("xl", "destroy", guest.name).returncode == 0
    run("xenstore-rm", "/libxl")


@pytest.mark.long
@pytest.mark.parametrize("victim", ["builder", "stream", "qmp", "supervisor", "broker"])
def test_kill_9_over_a_suspend(saved, victim):
    """Whoever dies, the guest goes on as if nothing had been asked, and no image is there."""
    guest, serial, file = saved
    saving = guest.begin_cmd("suspend", str(file))
    until(lambda: step(guest) == "writing the image", "the image is written", 60)
    pid = guest.broker() if victim == "broker" else helper(victim)
    assert pid
    kill(pid)
    assert saving.wait(120) != 0
    saving.communicate()
    assert not file.exists()
    if victim == "broker":
        guest.start()
    until(lambda: guest.state == "running", "the guest runs", 60)
    at = counts(serial)[-1]
    until(lambda: counts(serial)[-1] > at + 2, "the guest counts on", 60)
    heard = counts(serial)
    assert heard == list(range(heard[0], heard[-1] + 1))
    guest.cmd("suspend", str(file))
    guest.cmd("restore", str(file))


@pytest.mark.long
def test_kill_9_of_a_builder_when_the_guest_runs_again(saved, folder):
    """Nothing is tracked any more, and QEMU is not stopped: whoever resumes it has nothing to do, and does no harm.

    The disk of the image stands still, so that the builder has to wait for it.
    """
    guest, serial, file = saved
    pid = model(guest)
    with contextlib.closing(Flaky(folder)) as disk:
        there = str(disk.place / "guest.img")
        guest.cmd("checkpoint", there)  # where there is room is read from the disk the first time
        disk.stands_still()
        saving = guest.begin_cmd("checkpoint", there)
        until(lambda: step(guest) == "finishing the image", "the guest runs again", 120)
        kill(helper("builder"))
        time.sleep(1)
        disk.goes_on()
        assert saving.wait(120) != 0
        saving.communicate()
    at = counts(serial)[-1]
    until(lambda: counts(serial)[-1] > at + 8, "the guest counts on", 60)
    assert model(guest) == pid
    guest.cmd("checkpoint", str(file), "live=true")
    assert model(guest) == pid


@pytest.mark.long
@pytest.mark.parametrize("stopped", [False, True])
def test_a_device_model_that_dies_or_hangs_over_a_save(saved, stopped):
    """Dead it is a crash, for which there is a policy; one that does not answer has the save fail, no more."""
    guest, serial, file = saved
    pid = model(guest)
    if stopped:
        os.kill(pid, signal.SIGSTOP)
        done = run("xenvm-cmd", guest.uuid, "suspend", str(file))
        assert done.returncode in (1, 7), done.stderr
        assert "device model" in done.stderr
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        until(lambda: guest.state == "running", "the guest runs", 120)
        at = counts(serial)[-1]
        until(lambda: counts(serial)[-1] > at + 2, "the guest counts on", 120)
    else:
        saving = guest.begin_cmd("suspend", str(file))
        until(lambda: step(guest) == "writing the image", "the image is written", 60)
        kill(pid)
        assert saving.wait(120) != 0
        saving.communicate()
        assert "crash" in guest.until("shutdown", 90)["reason"]
    assert not file.exists()


@pytest.mark.long
def test_bad_images_are_refused_before_a_domain_is_made(saved):
    guest, _serial, file = saved
    guest.cmd("suspend", str(file))
    whole = file.read_bytes()
    bad = file.with_suffix(".bad")
    state_at = whole.rindex(b"QEVM")
    for content, words in (
        (whole[:-8], "bytes of"),
        (whole[: state_at + 100], "bytes of"),
        (whole[:state_at] + b"VMEQ" + whole[state_at + 4 :], "device model has no beginning"),
        (whole.replace(b'"type":"hvm"', b'"type":"pv" ', 1), "type pv"),
    ):
        bad.write_bytes(content)
        done = run("xenvm-cmd", guest.uuid, "restore", str(bad))
        assert done.returncode != 0
        assert re.search(words, done.stderr), done.stderr
        assert guest.uuid not in domains()
        assert models() == {}
    guest.cmd("restore", str(file))


@pytest.mark.long
def test_linux_with_pv_drivers(hvm, tmp_path, folder, image, bridge):
    """It is asked to suspend, as a PV guest is; its disk and its card come back, and shutdown is heard after that."""
    target = image("disk.img", 16 * MIB)
    guest = hvm(
        disk=[f"{target}:file:hda:w:disk", f"{disc(tmp_path)}:file:hdd:r:cdrom"],
        boot="d",
        memory=256,
        nic=f"bridge={bridge}",
    )
    guest.start()
    serial = Serial(guest)
    serial.up(LOAD_S)
    serial.shell("ip link set eth0 up && ip address add 10.77.0.2/24 dev eth0 && ping -c 1 10.77.0.1")
    serial.shell("echo before >/kept && echo onto-the-disk | dd of=/dev/xvda conv=fsync")
    file = folder / "linux.img"
    live = told(guest, "checkpoint", str(file), "live=true")
    print(f"Linux stood still for {live['still_ms']} ms after {live['rounds']} rounds")
    verify(file)
    assert serial.shell("cat /kept") == "before"
    guest.cmd("suspend", str(file))
    verify(file)
    guest.cmd("restore", str(file))
    serial = Serial(guest)
    until(lambda: "tick" in serial.text, "the guest ticks", 120)
    assert serial.shell("cat /kept", 120) == "before"
    assert serial.shell("echo $(head -c 13 /dev/xvda)", 120) == "onto-the-disk"
    serial.shell("ping -c 3 10.77.0.1", 120)
    ahead_s = int(serial.shell("date +%s")) - time.time()
    assert abs(ahead_s) < 60
    guest.cmd("shutdown", "timeout=120")
    assert guest.state == "shutdown"
    assert Path(target).read_bytes().startswith(b"onto-the-disk")
