# SPDX-License-Identifier: GPL-2.0-or-later
"""A PV guest from its config file to its end, driven by commands, on whichever host."""

import os
import pty
import re
import threading
import time
from pathlib import Path

import pytest
from conftest import QUIET, json_of, until
from storewire import WRITE, Wire

# The published example without its disk and nic. Its 64 MiB are 128 here: Debian's kernel alone unpacks to 58 MiB and
# is loaded at 16 MiB, so no toolstack can start it in 64.
PUBLISHED = """\
uuid = 00000000-0000-0000-0000-000000000001
hvm = false
kernel = {kernel}
initrd = {initrd}
cmdline = root=/dev/sda1 ro {quiet} xenvm.tick_ms=200
memory = 128
"""


def test_the_published_example(host, vm):
    guest = vm(uuid="00000000-0000-0000-0000-000000000001")
    guest.name = guest.uuid  # none is given in the file
    guest.file.write_text(PUBLISHED.format(kernel=host.kernel, initrd=host.initrd, quiet=QUIET))
    assert guest.start().stdout == f"{guest.uuid}\n"
    guest.up()
    status = json_of(host.run("xenvm-cmd", "--json", guest.uuid, "status"))
    assert status["state"] == "running"
    assert status["domid"] == host.domains()[guest.uuid]
    assert guest.cmd("domid").stdout == f"{status['domid']}\n"
    assert guest.cmd("get", "memory").stdout == "128\n"
    assert "GUEST-UP" in guest.cmd("console", "--log").stdout
    listed = host.run("xenvm-cmd", "list").stdout
    assert re.search(rf"{guest.uuid}\s+{guest.uuid}\s+running\s+{status['domid']}", listed)
    assert host.run("xenvm-cmd", guest.uuid[:11], "status").stdout == "running\n"


def test_a_small_guest_says_what_is_missing(vm):
    guest = vm(memory=64)
    done = guest.start(code=1)
    assert "too large" in done.stderr
    assert "raise `memory`" in done.stderr
    assert guest.left() == []


def test_pause_stops_the_ticks_and_unpause_lets_them_go_on(host, vm):
    guest = vm()
    guest.start()
    guest.up()
    guest.cmd("pause")
    assert guest.cmd("status").stdout == "paused\n"
    host.rest(0.5)  # what was on its way to the console arrives
    before = guest.ticks()
    host.rest(2)
    assert guest.ticks() == before
    assert "not possible: the VM is paused" in guest.cmd("pause", code=5).stderr
    assert guest.ticks() == before
    guest.cmd("unpause")
    until(lambda: len(guest.ticks()) > len(before) + 3, "ticks after unpause")
    assert guest.ticks() == list(range(1, len(guest.ticks()) + 1))
    guest.cmd("unpause", code=5)


def test_restart_keeps_the_uuid_and_never_looks_off(host, vm):
    guest = vm(name="xenvm-test-restart")
    guest.start()
    guest.up()
    until(lambda: len(guest.ticks()) > 5, "some ticks")
    first = guest.domid
    seen, done = set(), threading.Event()

    def sample():
        with guest.connect() as monitor:
            while not done.is_set():
                data = monitor.call("status").data
                seen.add((data["state"], data["running"]))
                time.sleep(0.02)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        guest.cmd("restart")
    finally:
        done.set()
        sampler.join()
    assert guest.domid != first
    assert host.domains()[guest.uuid] == guest.domid
    assert seen == {("running", True), ("rebooting", True)}
    guest.up(boots=2)
    assert guest.ticks()[0] == 1
    assert host.run("xenvm-cmd", "xenvm-test-restart", "status").stdout == "running\n"


def test_shutdown_and_start_again(host, vm):
    guest = vm()
    guest.start()
    guest.up()
    guest.cmd("shutdown")
    assert guest.uuid not in host.domains()
    assert guest.cmd("status", code=3).stdout == "shutdown (the guest ended: poweroff)\n"
    guest.cmd("shutdown", code=5)
    guest.cmd("console", code=5)
    guest.cmd("start", "paused=true")
    assert guest.cmd("status").stdout == "created\n"
    guest.cmd("unpause")
    guest.up(boots=2)


@pytest.mark.long
@pytest.mark.parametrize(("policy", "state"), [("reboot", "running"), ("preserve", "shutdown")])
def test_on_halt(host, vm, policy, state):
    guest = vm(on_halt=policy)
    guest.start()
    guest.up()
    first = guest.domid
    guest.cmd("shutdown")
    status = guest.status()
    assert status["state"] == state
    if policy == "reboot":
        assert status["domid"] != first
    else:
        assert status["domid"] == first == host.domains()[guest.uuid]
        assert "preserved" in status["reason"]
        assert "destroy it first" in guest.cmd("start", code=5).stderr
        guest.cmd("destroy")
        assert guest.left() == [] or "domain" not in str(guest.left())


@pytest.mark.long
def test_a_guest_that_ignores_shutdown(host, vm):
    guest = vm(mode="deaf")
    guest.start()
    guest.up()
    begin = time.monotonic()
    done = guest.cmd("shutdown", f"timeout={host.short_s}", code=7)
    assert host.short_s <= time.monotonic() - begin < 60
    assert f"did not shut down within {host.short_s} s and runs on" in done.stderr
    before = len(guest.ticks())
    until(lambda: len(guest.ticks()) > before + 3, "the guest ticks on")
    said = f"within {host.short_s} s and runs on)\n"
    assert guest.cmd("status").stdout == f"running (last failure: shutdown: the guest did not shut down {said}"
    assert guest.cmd("restart", f"timeout={host.short_s}", code=7).returncode == 7
    assert guest.cmd("status").stdout == f"running (last failure: restart: the guest did not restart {said}"
    guest.cmd("shutdown", f"timeout={host.short_s}", "force=true")
    assert guest.state == "shutdown"
    assert guest.uuid not in host.domains()


@pytest.mark.long
def test_force_alone_does_not_ask(vm):
    guest = vm(mode="deaf")
    guest.start()
    guest.up()
    guest.cmd("shutdown", "force=true")
    assert guest.state == "shutdown"


@pytest.mark.long
@pytest.mark.parametrize("policy", ["destroy", "reboot", "preserve"])
def test_a_kernel_panic(host, vm, policy):
    guest = vm(mode="panic", on_crash=policy)
    guest.start()
    guest.up()
    first = guest.domid
    if policy == "destroy":
        assert "crash" in guest.until("shutdown")["reason"]
        assert guest.uuid not in host.domains()
    elif policy == "preserve":
        assert "crash" in guest.until("crashed")["reason"]
        assert guest.domid == first == host.domains()[guest.uuid]
        assert guest.cmd("status", code=3).stdout.startswith("crashed (the guest ended: crash; preserved as domain")
        guest.cmd("destroy")
    else:
        until(lambda: (now := guest.status())["state"] == "running" and now["domid"] != first, "started anew")
        guest.up(boots=2)


@pytest.mark.long
@pytest.mark.parametrize("ends", ["crash", "poweroff"])
def test_a_guest_that_ended_preserved_while_nobody_watched(host, vm, ends):
    """Its domain stays and its monitor too, which alone can end it; a start that has not started it says so."""
    guest = vm(mode="poweroff" if ends == "poweroff" else "normal", on_crash="preserve", on_halt="preserve")
    guest.start()
    if ends == "crash":
        guest.up()
        guest.cmd("quit")
        until(lambda: not guest.lock.exists(), "the monitor has ended")
        host.crash(host.domains()[guest.uuid])
    else:
        guest.until("shutdown")
        guest.cmd("quit")
        until(lambda: not guest.lock.exists(), "the monitor has ended")
    domid = host.domains()[guest.uuid]
    done = guest.start(code=3)
    assert f"the guest does not run: the guest ended: {ends}; preserved as domain {domid}" in done.stderr
    assert guest.uuid in done.stdout
    assert (guest.domid, host.domains()[guest.uuid]) == (domid, domid)
    guest.cmd("destroy")
    assert guest.cmd("status", code=3).stdout.startswith("shutdown")
    assert guest.uuid not in host.domains()


@pytest.mark.long
def test_a_guest_to_be_started_anew_that_ended_while_nobody_watched_is_built_once(host, vm):
    guest = vm(on_crash="reboot")
    guest.start()
    guest.up()
    guest.cmd("quit")
    until(lambda: not guest.lock.exists(), "the monitor has ended")
    host.crash(host.domains()[guest.uuid])
    guest.start()
    guest.up(boots=2)
    guest.cmd("destroy")
    assert guest.cmd("status", code=3).stdout.startswith("shutdown")
    assert guest.uuid not in host.domains()


@pytest.mark.long
def test_a_crash_loop_is_damped(host, vm):
    guest = vm(on_crash="reboot")
    guest.start()
    for _ in range(
        10
    ):  # on a busy machine one crash or another comes more than 10 s after the start, and does not count
        now = until(
            lambda: (now := guest.status())["state"] in ("running", "shutdown") and now, "it runs, or is off", 300
        )
        if now["state"] == "shutdown":
            break
        host.crash(now["domid"])
        until(lambda ended=now["domid"]: guest.domid != ended, "its end is seen")
    reason = guest.until("shutdown", 60)["reason"]
    assert reason == "the guest ended 3 times in a row within 10 s of its start (last: crash): left off"
    assert guest.uuid not in host.domains()
    assert "left off" in guest.cmd("status", code=3).stdout


@pytest.mark.parametrize(
    ("mode", "key", "state"), [("reboot", "on_reboot", "rebooted"), ("poweroff", "on_halt", "shutdown")]
)
@pytest.mark.long
def test_what_the_guest_does_itself_preserved(host, vm, mode, key, state):
    guest = vm(mode=mode, **{key: "preserve"})
    guest.start()
    guest.until(state)
    until(lambda: guest.domid == host.domains().get(guest.uuid), "the domain is still there")
    guest.cmd("destroy")


@pytest.mark.long
def test_the_guests_own_reboot_is_a_new_domain(vm):
    guest = vm(mode="reboot")
    guest.start()
    first = guest.domid
    until(lambda: (now := guest.status())["domid"] not in (None, first) and now["state"] == "running", "rebooted")
    guest.up(boots=2)


@pytest.mark.long
def test_startup_paused_and_shutdown(host, vm):
    paused = vm(startup="paused")
    paused.start()
    assert paused.state == "created"
    host.rest(2)
    assert paused.boots() == 0
    off = vm(startup="shutdown")
    off.start()
    assert off.cmd("status", code=3).stdout == "shutdown\n"
    assert off.uuid not in host.domains()
    off.cmd("start")
    off.up()


@pytest.mark.long
def test_the_interactive_console(host, vm):
    guest = vm()
    guest.start()
    guest.up()
    ours, theirs = pty.openpty()
    client = guest.begin_cmd("console", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    host.rest(5)
    os.write(ours, b"echo hello\r")
    got = b""
    end = time.monotonic() + 60
    while b"\nhello" not in got and time.monotonic() < end:
        got += os.read(ours, 4096)
    assert b"\nhello" in got
    os.write(ours, b"\x1d")  # Ctrl-]
    assert client.wait(timeout=30) == 0
    os.close(ours)


@pytest.mark.long
def test_xl_destroy_is_noticed_and_cleaned_up(host, vm):
    guest = vm()
    guest.start()
    host.destroy(guest.domid)
    assert "destroyed by something else" in guest.until("shutdown")["reason"]
    assert [entry for entry in guest.left() if entry.startswith(("domain", "/"))] == [
        entry for entry in guest.left() if entry.startswith(str(host.sockets))
    ]
    guest.cmd("start")
    guest.up()


@pytest.mark.long
def test_read_config_counts_from_the_next_start(host, vm):
    guest = vm()
    guest.start()
    guest.up()
    guest.write(memory=144, vcpus=2)
    guest.cmd("read-config")
    assert guest.cmd("get", "memory").stdout == "144\n"
    guest.file.write_text("memory = lots\n")
    refused = guest.cmd("read-config", code=6).stderr
    assert "lots" in refused
    assert f"{guest.file}:1" in refused
    assert guest.cmd("get", "memory").stdout == "144\n"
    guest.cmd("restart")
    guest.up(boots=2)
    assert host.shape(guest.domid) == (144, 2)


@pytest.mark.long
def test_memory_is_checked_before_anything_is_created(vm):
    guest = vm(memory=1000000)
    done = guest.start(code=1)
    assert re.search(r"needs \d+ MiB .* \d+ MiB are free", done.stderr)
    assert guest.left() == []


@pytest.mark.long
def test_a_guest_may_grow_to_memory_max(host, vm):
    """It starts with `memory`, and the hypervisor lets it have more by itself."""
    guest = vm(**{"memory-max": 160})
    guest.start()
    guest.up()
    assert host.shape(guest.domid)[0] in (128, 129)
    assert 160 <= host.limit_mib(guest.domid) <= 162
    guest.write(**{"memory-max": 128})
    guest.cmd("read-config")
    guest.cmd("restart", "force=true")
    assert 128 <= host.limit_mib(guest.domid) <= 130


@pytest.mark.long
def test_a_processor_that_the_host_has_not_is_refused(host, vm):
    """Also beside one that it has: Xen alone would take that without a word."""
    cpus = host.cpus()
    guest = vm(**{"cpus-affinity": f"0:0,{cpus}"})
    said = f"cpus-affinity: virtual CPU 0: this host has no CPU {cpus} online"
    assert said in guest.start(code=1).stderr
    guest.write(**{"cpus-affinity": f"0:{cpus},4095"})
    assert f"no CPU {cpus}, 4095 online" in guest.start(code=1).stderr
    assert guest.left() == []
    guest.write(**{"cpus-affinity": f"0:0,{cpus - 1}" if cpus > 1 else "0:0"})
    guest.start()
    guest.up()


@pytest.mark.long
@pytest.mark.parametrize("where", ["log", "output"])
def test_debug_logs_every_operation(host, vm, where):
    """Into the log of this VM, or the file that the config names; without it only changes of state are there."""
    log = host.logs / "{}.log" if where == "log" else host.directory() / "{}"
    guest, other = vm(debug="true"), vm()
    paths = [str(log).format(one.uuid) for one in (guest, other)]
    for one, path in zip((guest, other), paths, strict=True):
        one.write(**({"output": path} if where == "output" else {}))
        one.start()
        one.up()
        one.cmd("pause")
        one.cmd("unpause")
        one.cmd("destroy")
    texts = [Path(path).read_text() for path in paths]
    for text, one in zip(texts, (guest, other), strict=True):
        assert re.search(rf"^\d{{4}}-\d\d-\d\dT[0-9:]+Z uuid={one.uuid} state=paused domid=\d+ ", text, re.MULTILINE)
    for said in ("command pause from user ", "asked pause", "command unpause from", "asked unpause", "asked destroy"):
        assert f"uuid={guest.uuid} {said}" in texts[0]
    assert "command" not in texts[1]
    assert "asked" not in texts[1]
    guest.cmd("start")
    guest.write(debug="false")
    guest.cmd("read-config")
    guest.cmd("pause")
    assert Path(paths[0]).read_text().count("asked pause") == 1


@pytest.mark.long
def test_events_and_wait(host, vm):
    guest = vm(startup="shutdown")
    guest.start()
    events = guest.begin_cmd("events")
    host.rest(5)
    waiting = guest.begin_cmd("wait", "running", "timeout=120")
    guest.cmd("start")
    assert waiting.wait(timeout=60) == 0
    guest.cmd("wait", "paused", "timeout=1", code=7)
    guest.cmd("destroy")
    guest.cmd("quit")
    states = [
        line for line in events.communicate(timeout=60)[0].splitlines() if '"event":"state"' in line.replace(" ", "")
    ]
    words = [word for line in states for word in re.findall(r'"state": ?"([a-z-]+)"', line)]
    assert words == ["creating-domain", "running", "shutdowning", "shutdown"]
    assert (host.logs / f"{guest.uuid}.log").read_text().count("state=") >= 4


@pytest.mark.long
def test_what_is_left_of_a_vm_that_is_off_is_told_and_removed(host, vm):
    """The record and a disk's nodes of a domain that is long gone, as a destroy leaves them that could not end."""
    guest = vm(startup="shutdown")
    guest.start()

    def doctor(*words):
        """Return what it finds of the VM; the host itself may lack modules."""
        found = host.run("xenvm-cmd", guest.uuid, "doctor", *words).stdout.splitlines()
        return [line for line in found if not line.startswith(("udev", "modules"))]

    assert doctor() == []
    domid, device = 30000, 51712
    b, f = f"/local/domain/0/backend/vbd/{domid}/{device}", f"/local/domain/{domid}/device/vbd/{device}"
    record = f"/xenvm/{guest.uuid}"
    nodes = {f"{record}/domid": domid, f"{record}/phase": "building", f"{f}/state": 1, f"{f}/backend": b}
    nodes |= {f"{record}/vbd/{device}/{key}": value for key, value in (("domid", domid), ("name", "xvda"))}
    nodes |= {f"{b}/frontend": f, f"{b}/frontend-id": domid, f"{b}/online": 1, f"{b}/state": 1}
    before = host.xenstore()
    with Wire(host.store) as wire:
        for path, value in nodes.items():
            assert wire.ask(WRITE, path, tail=str(value).encode()) == b"OK\0"
    until(lambda: f"vbd-{domid}-{device}" in host.devices()["backends"], "the kernel has the device")
    assert doctor() == [
        "vbd xvda: left of an earlier domain; doctor clean=true removes it",
        f"xenstore: {record} is left of domain {domid}; doctor clean=true removes it",
    ]
    assert guest.state == "shutdown"
    assert doctor("clean") == doctor() == []
    assert host.xenstore() == before
    assert f"vbd-{domid}-{device}" not in host.devices()["backends"]
    guest.cmd("start")
    guest.up()


@pytest.mark.long
def test_files_beside_an_image_stay(host, vm):
    """Whatever their names say: a disk is what the config names, and nothing else there is ours."""
    directory = host.directory()
    names = ["disk.vhd", "disk.vhd.snap", "disk.vhd.hib", "disk", "disk.tmp", "disk.lock"]
    for name in names:
        (directory / name).write_bytes(bytes(1 << 20))
        (directory / name).chmod(0o666)
    guest = vm(disk=f"{directory}/disk.vhd:file:xvda:w:disk")
    guest.start()
    guest.up()
    guest.cmd("restart", "force=true")
    guest.up(boots=2)
    guest.cmd("disk-del", "xvda", "force=true")
    guest.end()
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)
    assert all((directory / name).read_bytes() == bytes(1 << 20) for name in names)


def test_an_idle_monitor_sleeps(host, vm):
    """Nothing is polled: once it has done what follows a start, no process of it is woken up."""
    guest = vm()
    guest.start()
    guest.up()
    until(lambda: guest.sleeps(1), "it has done what follows a start")
    assert guest.sleeps(4 if host.simulated else 10)
    assert guest.state == "running"
