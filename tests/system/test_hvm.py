# SPDX-License-Identifier: GPL-2.0-or-later
"""HVM guests: firmware, device model, disks, screen, keys, and what happens when the device model ends."""

import ctypes
import hashlib
import os
import re
import signal
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import MIB, domains, kill, run, until
from hvmguest import LOAD_S, Serial, disc, minutes_ahead, model, models

PIDFD_GETFD = 438  # asm/unistd_64.h
TIMER_MODE, HPET_ENABLED, VPT_ALIGN, VIRIDIAN = 10, 11, 16, 9  # HVM_PARAM_* of xen/hvm/params.h
PAE, APIC, NX = 1 << 6, 1 << 9, 1 << 20  # CPUID 1 edx, and 80000001 edx
XEN, MICROSOFT = (int.from_bytes(name, "little") for name in (b"XenV", b"Micr"))


def xen_says_of(pid):
    """Let Xen's own program try whether the descriptors of a device model reach another domain; return its lines."""
    (program,) = Path("/usr/lib").glob("xen-*/bin/depriv-fd-checker")
    library, words, taken = ctypes.CDLL(None, use_errno=True), [], []
    process = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            kind = {"/dev/xen/privcmd": "privcmd", "/dev/xen/evtchn": "evtchn"}.get(os.readlink(entry))
            if kind:
                taken.append(library.syscall(PIDFD_GETFD, process, int(entry.name), 0))
                assert taken[-1] >= 0, os.strerror(ctypes.get_errno())
                words += [kind, str(taken[-1]), entry.name]
        done = run(str(program), *words, pass_fds=taken)
    finally:
        for descriptor in (process, *taken):
            os.close(descriptor)
    return done.stdout.splitlines()


def test_a_guest_boots_from_its_disk_with_a_device_model_without_privilege(hvm, disk):
    """The emulated drive and the PV disk are one block device; QEMU holds nothing that it does not need."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", nx="true")
    guest.start()
    serial = Serial(guest)
    pid = model(guest)
    status = Path(f"/proc/{pid}/status").read_text()
    number = str(1900000000 + guest.domid)
    assert re.search(rf"^Uid:\s+{number}\s+{number}\s+{number}\s+{number}$", status, re.MULTILINE)
    assert re.search(rf"^Groups:\s+{number}\s*$", status, re.MULTILINE)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert re.search(rf"^{name}:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert os.readlink(f"/proc/{pid}/root") == "/var/lib/xenvm/empty"
    audit = run("xenvm-audit", guest.uuid)
    assert audit.returncode == 0, "\n".join(line for line in audit.stdout.splitlines() if "DIFFERS" in line)
    assert f"devicemodel {pid}\n" in audit.stdout
    tried = xen_says_of(pid)
    verdicts = [line.split()[1] for line in tried]
    assert "pass" in verdicts
    assert set(verdicts) <= {"pass", "checking"}, tried  # each is announced, then judged: pass, fail or maybe
    basic, extended, hypervisor, clock = serial.processor()
    assert basic & PAE
    assert basic & APIC
    assert extended & NX
    assert hypervisor == XEN
    assert abs(minutes_ahead(clock)) <= 3
    serial.up()
    assert guest.cmd("get-acpi-state").stdout == "0\n"
    guest.cmd("get-vnc", code=5)
    guest.cmd("shutdown", "timeout=60")
    assert guest.state == "shutdown"
    assert models() == {}


def test_a_device_model_that_dies_is_a_crash(hvm, disk):
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    guest.start()
    kill(model(guest))
    assert "crash" in guest.until("shutdown", 60)["reason"]
    assert guest.uuid not in domains()


def test_a_device_model_that_stands_still_ends_with_its_domain(hvm, disk):
    """It is not asked: a stopped process would not answer."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    guest.start()
    os.kill(model(guest), signal.SIGSTOP)
    guest.cmd("destroy")
    assert guest.state == "shutdown"
    assert models() == {}
    assert guest.uuid not in domains()


@pytest.mark.long
def test_an_idle_monitor_of_an_hvm_guest_sleeps(hvm, disk):
    """Neither its device model nor its sleep state is asked for."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    guest.start()
    Serial(guest).up()
    until(lambda: guest.sleeps(1), "it has done what follows a start", 60)
    assert guest.sleeps(10)


@pytest.mark.long
def test_the_policy_for_a_crash_holds_for_a_device_model_that_dies(hvm, disk):
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", on_crash="reboot")
    guest.start()
    first = guest.domid
    Serial(guest).up()
    kill(model(guest), signal.SIGSEGV)
    until(lambda: (now := guest.status())["state"] == "running" and now["domid"] != first, "started anew", 90)
    Serial(guest).up()
    guest.write(on_crash="preserve")
    guest.cmd("read-config")
    kill(model(guest))
    guest.until("crashed", 60)
    guest.cmd("destroy")
    assert guest.state == "shutdown"


@pytest.mark.long
def test_a_device_model_that_dies_while_no_monitor_is_there(hvm, disk):
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    guest.start()
    broker, pid = guest.broker(), model(guest)
    kill(broker)
    until(lambda: not Path(f"/proc/{broker}").exists(), "the monitor is gone", 30)
    kill(pid)
    until(lambda: not models(), "the device model is gone", 30)
    guest.start()
    assert "crash" in guest.until("shutdown", 60)["reason"]


@pytest.mark.long
def test_a_device_model_that_dies_in_a_start(hvm, disk):
    """It is stopped as soon as it is there, so that the start waits for it, and then killed."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    hits = 0
    for _ in range(4):
        starting = guest.begin()
        pid = next(iter(until(models, "a device model is started", 60)))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        waited = starting.poll() is None
        kill(pid)
        text = starting.communicate(timeout=120)[0]
        until(lambda: not models(), "the device model is gone", 30)
        if starting.returncode == 0:  # it had come up before it was stopped
            guest.end()
            continue
        hits += 1
        assert waited, text
        assert starting.returncode == 1, text
        assert "device model: " in text
        assert "died of SIGKILL" in text
        until(lambda: guest.left() == [], f"nothing is left of {guest.left()}", 30)
    assert hits >= 2


@pytest.mark.long
def test_the_published_example_installs_a_disk_and_boots_from_it(hvm, tmp_path, image, bridge):
    """The firmware boots a disc, Linux takes its disk and its card by PV drivers, and then boots from that disk."""
    target = image("installed.img", 64 * MIB)
    loop = run("losetup", "--find", "--show", "--direct-io=on", str(target)).stdout.strip()
    try:
        installed = f"{loop}:phy:hda:w:disk"
        guest = hvm(
            disk=[installed, f"{disc(tmp_path)}:file:hdd:r:cdrom"],
            boot="dc",
            vcpus=2,
            memory=256,
            nx="true",
            nic=f"bridge={bridge}",
            **{"smbios-pt": "true", "acpi-pt": "true"},
        )
        guest.start()
        serial = Serial(guest)
        serial.up(LOAD_S)
        assert "nx" in serial.shell("grep -m1 flags /proc/cpuinfo").split()
        assert serial.shell("nproc") == "2"
        tables = serial.shell("ls /sys/firmware/acpi/tables").split()
        assert {"APIC", "HPET", "SLIC"} <= set(tables)
        licence = hashlib.md5(Path("/sys/firmware/acpi/tables/SLIC").read_bytes(), usedforsecurity=False).hexdigest()
        assert serial.shell("md5sum </sys/firmware/acpi/tables/SLIC").split()[0] == licence
        for name in ("sys_vendor", "product_name"):
            host = Path(f"/sys/class/dmi/id/{name}").read_text().strip()
            assert serial.shell(f"cat /sys/class/dmi/id/{name}") == host
            assert "HVM domU" not in host
        assert "IO-APIC" in serial.shell("cat /proc/interrupts")
        assert {"xvda", "sr0"} <= set(serial.shell("ls /sys/block").split())
        serial.shell("ip link set eth0 up && ip address add 10.77.0.2/24 dev eth0 && ping -c 3 10.77.0.1")
        serial.shell("dd if=/dev/sr0 of=/dev/xvda bs=64k && sync", 120)
        guest.write(disk=[installed, ":file:hdd:r:cdrom"], boot="c")
        guest.cmd("read-config")
        first = guest.domid
        serial.write("reboot -f")
        until(lambda: (now := guest.status())["state"] == "running" and now["domid"] != first, "rebooted", 120)
        serial = Serial(guest)
        serial.up(LOAD_S)
        assert serial.shell("nproc") == "2"
        serial.write("poweroff -f")
        assert "poweroff" in guest.until("shutdown", 60)["reason"]
    finally:
        run("losetup", "--detach", loop)


@pytest.mark.long
def test_what_linux_sees_of_the_keys_that_are_off(hvm, tmp_path):
    """Neither ACPI nor APIC nor NX, a clock two hours ahead; and a panic, which reaches Xen as a reboot."""
    guest = hvm(
        disk=f"{disc(tmp_path)}:file:hdc:r:cdrom",
        boot="d",
        timeoffset=7200,
        on_reboot="destroy",
        **dict.fromkeys(("acpi", "apic", "nx"), "false"),
    )
    guest.start()
    serial = Serial(guest)
    serial.up(LOAD_S)
    assert "nx" not in serial.shell("grep -m1 flags /proc/cpuinfo").split()
    assert "absent" in serial.shell("ls -d /sys/firmware/acpi/tables/APIC || echo absent")
    interrupts = serial.shell("cat /proc/interrupts")
    assert "XT-PIC" in interrupts
    assert "IO-APIC" not in interrupts
    ahead_s = int(serial.shell("cat /sys/class/rtc/rtc0/since_epoch")) - time.time()
    assert 7200 - 60 < ahead_s < 7200 + 60
    serial.write("echo c >/proc/sysrq-trigger")
    assert "reboot" in guest.until("shutdown", 60)["reason"]


@pytest.mark.long
def test_what_linux_sees_of_the_other_keys(hvm, tmp_path, image):
    """No HPET, strings for the BIOS, 4 vcpus, and disks of three kinds whose letters are apart."""
    marks = {name: image(f"{name}.img", MIB, f"this is {name}".encode()) for name in ("hda", "sdb", "xvde")}
    guest = hvm(
        disk=[*(f"{path}:file:{name}:w:disk" for name, path in marks.items()), f"{disc(tmp_path)}:file:hdc:r:cdrom"],
        boot="d",
        vcpus=4,
        hpet="false",
        **{"bios-string": "system-manufacturer=Somebody", "platform": "acpi_s3=0"},
    )
    guest.start()
    serial = Serial(guest)
    serial.up(LOAD_S)
    assert serial.shell("nproc") == "4"
    assert "HPET" not in serial.shell("ls /sys/firmware/acpi/tables").split()
    assert serial.shell("cat /sys/class/dmi/id/sys_vendor") == "Somebody"
    assert serial.shell("cat /sys/power/mem_sleep") == "[s2idle]"  # with S3 it says `deep` too
    content = "echo $(head -c 12 /dev/{} | tr -d '\\0')"  # a whole line: else a tick stands behind it
    found = {serial.shell(content.format(name)) for name in ("xvda", "xvdb", "xvde")}
    assert found == {"this is hda", "this is sdb", "this is xvde"}
    other = image("other.iso", MIB, b"another disc")
    guest.cmd("cd-insert", "device=hdc", f"path={other}")
    until(lambda: "another disc" in serial.shell(content.format("sr0")), "it reads the disc that was inserted", 60)
    first = guest.domid
    guest.cmd("restart", "timeout=60")
    assert guest.domid != first


@pytest.mark.long
def test_what_a_boot_sector_sees_of_the_keys(hvm, disk):
    """Processor and clock as the keys have them, a serial port over TCP, and what only Xen can tell of the timers."""
    guest = hvm(
        disk=[f"{disk()}:file:hda:w:disk", f"{disk()}:file:sdb:w:disk"],
        boot="c",
        pae="false",
        nx="false",
        viridian="true",
        hpet="false",
        timeoffset=7200,
        serial="tcp:127.0.0.1:4555",
        **{"vpt-align": "false", "timer-mode": 2},
    )
    with socket.create_server(("127.0.0.1", 4555)) as listener:
        guest.start()
        port, _ = listener.accept()
        with port:
            port.settimeout(30)
            said = b""
            while b"tick 1" not in said:
                piece = port.recv(4096)
                assert piece, said
                said += piece
    basic, extended, hypervisor, clock = (int(word, 16) for word in said.partition(b"GUEST-UP ")[2].split()[:4])
    assert not basic & PAE
    assert not extended & NX
    assert hypervisor == MICROSOFT
    assert abs(minutes_ahead(clock) - 120) <= 3
    program = (
        "import sys; from xenvm.helpers.builder.xen import Hypervisor; xen = Hypervisor();"
        "print(*(xen.parameter(int(sys.argv[1]), int(one), one) for one in sys.argv[2:]))"
    )
    words = (str(guest.domid), *(str(one) for one in (TIMER_MODE, HPET_ENABLED, VPT_ALIGN)))
    done = run("python3", "-c", program, *words)
    assert done.stdout.split() == ["2", "0", "0"], done.stderr


def screenshot(port):
    """Greet a VNC server as RFC 6143 has it; return width, height, and how often each colour is on its screen."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as screen:
        stream = screen.makefile("rb")
        greeting = stream.read(12)
        assert greeting.startswith(b"RFB 003.")
        screen.sendall(b"RFB 003.008\n")
        assert 1 in stream.read(stream.read(1)[0])  # security type None
        screen.sendall(b"\x01")
        assert stream.read(4) == bytes(4)
        screen.sendall(b"\x01")  # shared
        width, height, bits, *_rest, length = struct.unpack(">HHB15sI", stream.read(24))
        stream.read(length)
        screen.sendall(struct.pack(">BxHi", 2, 1, 0))  # raw bytes only
        screen.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height))
        pixels = b""
        while len(pixels) < width * height * bits // 8:
            kind, count = struct.unpack(">BxH", stream.read(4))
            assert kind == 0
            for _ in range(count):
                _x, _y, wide, high, encoding = struct.unpack(">HHHHi", stream.read(12))
                assert encoding == 0
                pixels += stream.read(wide * high * bits // 8)
        size = bits // 8
        return width, height, Counter(pixels[at : at + size] for at in range(0, len(pixels), size))


@pytest.mark.long
def test_a_disc_in_a_drive_the_screen_and_the_next_monitor(hvm, disk, image):
    """Look at the firmware's screen, change the disc, and go on under another monitor."""
    other = image("other.iso", MIB, b"another disc")
    guest = hvm(disk=[f"{disk()}:file:hda:w:disk", ":file:hdd:r:cdrom"], boot="c", display="vnc:keymap=de")
    guest.start()
    port = int(guest.cmd("get-vnc").stdout)
    words = models()[model(guest)]
    assert words[words.index("-k") + 1] == "de"
    serial = Serial(guest)
    serial.up(120)
    width, height, colours = screenshot(port)
    assert width >= 640
    assert height >= 400
    (_, ground), (_, letters), *_ = colours.most_common()
    assert ground > 0.6 * width * height  # a dark screen, and on it some lines of text: a full one is 0.8 percent
    assert 0.002 < letters / (width * height) < 0.4
    assert guest.cmd("get-stubdomid").stdout.startswith("none")
    broker = guest.broker()
    kill(broker)
    until(lambda: not Path(f"/proc/{broker}").exists(), "the monitor is gone", 30)
    guest.start()
    assert int(guest.cmd("get-vnc").stdout) == port
    guest.cmd("cd-insert", "device=hdd", f"path={other}")
    assert run("xenvm-audit", guest.uuid).returncode == 0
    before = len(serial.text)
    until(lambda: "tick 1" in serial.text[before:], "the guest goes on", 60)
    guest.cmd("cd-eject", "hdd")
    guest.cmd("cd-eject", "hda", code=5)


@pytest.mark.long
def test_a_guest_sleeps_and_wakes_and_what_a_patched_device_model_would_read(hvm, disk):
    """Its device model may not tell Xen that it sleeps, so its monitor does."""
    keys = {"power-management": 1, "oem-features": 5, "inject-sci": 1}
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", on_reboot="destroy", **keys)
    lines = guest.file.read_text().splitlines()
    done = guest.start()
    assert done.stdout == f"{guest.uuid}\n"
    for key, value in keys.items():
        assert f"{guest.file}:{lines.index(f'{key} = {value}') + 1}: warning: `{key}`: " in done.stderr
    first = guest.domid
    node = f"/local/domain/0/device-model/{first}"
    listed = run("xenstore-ls", "-p", node).stdout
    for name, value in (("xen_extended_power_mgmt", "1"), ("oem_features", "5"), ("inject-sci", "1")):
        assert re.search(rf'^{name} = "{value}" [ .]*\(n0\)$', listed, re.MULTILINE), listed
    serial = Serial(guest)
    serial.up()
    assert "no PV drivers" in guest.cmd("s3suspend", code=5).stderr
    assert "does not sleep" in guest.cmd("s3resume", code=5).stderr
    assert guest.cmd("get-acpi-state").stdout == "0\n"
    guest.cmd("trigger", "sleep")
    until(lambda: guest.cmd("get-acpi-state").stdout == "3\n", "the guest sleeps", 60)
    assert guest.state == "running"
    assert "GUEST-WOKE" not in serial.text
    assert guest.domid == first
    guest.cmd("s3resume")
    # It runs again, in the firmware, which finds no place to go on in a boot sector without ACPI tables, and resets it.
    assert "reboot" in guest.until("shutdown", 120)["reason"]


@pytest.mark.long
def test_a_device_model_that_does_not_start_leaves_nothing(hvm, disk):
    image = disk()
    guest = hvm(disk=f"{image}:file:hda:w:disk", boot="c")
    guest.write(**{"extra-hvm": "no-such-option"})
    done = guest.start(code=1)
    assert "device model" in done.stderr
    assert guest.left() == []
    guest.write(**{"extra-hvm": []})
    busy = socket.create_server(("127.0.0.1", 5955))
    with busy:
        guest.write(display="vnc:port=5955")
        assert "port 5955 is in use" in guest.start(code=9).stderr
    assert guest.left() == []


@pytest.mark.long
def test_destroy_at_any_point_of_a_start(hvm, disk):
    """From the first moment the socket answers to the end of the start, in ten steps."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    begin = time.monotonic()
    guest.start()
    whole_s = time.monotonic() - begin
    guest.end()
    hits = 0
    for step in range(10):
        starting = guest.begin()
        until(lambda one=starting: guest.socket.exists() or one.poll() is not None, "socket")
        time.sleep(whole_s * step / 12)
        guest.cmd("destroy")
        hits += "destroyed while" in starting.communicate(timeout=120)[0]
        assert guest.state == "shutdown"
        assert models() == {}
        assert guest.uuid not in domains()
        guest.end()
        assert guest.left() == []
    assert hits >= 3


@pytest.mark.long
def test_cards_are_emulated_beside_the_pv_ones(hvm, disk, bridge):
    """And a screen is served on the address of the bridge."""
    guest = hvm(
        disk=f"{disk()}:file:hda:w:disk",
        boot="c",
        nic=f"bridge={bridge},model=e1000",
        display="vnc:listen=10.77.0.1",
    )
    guest.start()
    with socket.create_connection(("10.77.0.1", int(guest.cmd("get-vnc").stdout)), timeout=60) as screen:
        assert screen.recv(12).startswith(b"RFB 003.")
    ports = {path.name for path in Path(f"/sys/class/net/{bridge}/brif").iterdir()}
    assert ports == {f"vif{guest.domid}.0", f"vif{guest.domid}.0-emu"}
    assert run("xenvm-audit", guest.uuid).returncode == 0
    guest.cmd("destroy")
    assert not list(Path(f"/sys/class/net/{bridge}/brif").iterdir())
