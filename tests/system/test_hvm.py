# SPDX-License-Identifier: GPL-2.0-or-later
"""HVM guests: firmware, device model, disks, screen, and what happens when the device model ends.

The guest boots from a disc or a disk that is made here of Debian's parts: isolinux, the kernel, and the test guest's
initramfs, which talks on the first serial port.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import threading
import time
import tty
from pathlib import Path

import pytest
from conftest import domains, kill, run, until

from xenvm.cli.client import Monitor
from xenvm.errors import XenvmError

MEMORY_MIB = 192
PATIENCE_S = 60.0
QEMU = "xen-qemu-system-i386"

# A boot sector that is up as soon as the firmware is: it says GUEST-UP, then "tick 1" four times a second, and asks for
# S5 when its power button is pressed (PM1a status in port 0xb000, control in 0xb004). The byte at MODE, when not 0, has it
# reset itself through the keyboard's controller instead of ticking. Real mode, at 0:7c00:
#
#   xor ax,ax; mov ds,ax; mov ss,ax; mov sp,7c00; sti; mov si,up
#   say:    lodsb; test al,al; jz wait; mov dx,3f8; out dx,al; jmp say
#   wait:   mov ah,0; int 1a; mov bx,dx
#   poll:   mov dx,b000; in ax,dx; test ah,1; jnz off; mov ah,0; int 1a; sub dx,bx; cmp dx,4; jb poll
#           cmp [mode],0; jne reboot; mov si,tick; jmp say
#   off:    mov dx,b004; mov ax,2000; out dx,ax; jmp off
#   reboot: mov al,fe; out 64,al; jmp reboot
SECTOR = bytes.fromhex(
    "31c08ed88ed0bc007cfbbe4d7cac84c07406baf803eeebf5b400cd1a89d3ba00b0edf6c4017517b4"
    "00cd1a29da83fa0472ec803e607c00750ebe577cebcfba04b0b80020efebf7b0fee664ebfa475545"
    "53542d55500d0a7469636b20310d0a0000"
)
MODE = 0x60


def disc(directory, append=""):
    """Make a disc that boots the test guest, which is also a disk that does."""
    tree = Path(directory) / f"tree-{len(append)}"
    made = tree.with_suffix(".iso")
    (tree / "isolinux").mkdir(parents=True)
    shutil.copy("/usr/lib/ISOLINUX/isolinux.bin", tree / "isolinux")
    shutil.copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", tree / "isolinux")
    for part in ("vmlinuz", "guest.gz"):
        (tree / part).symlink_to(f"/lab/{part}")
    (tree / "isolinux/isolinux.cfg").write_text(
        "SERIAL 0 115200\nDEFAULT linux\nLABEL linux\nKERNEL /vmlinuz\n"
        f"APPEND initrd=/guest.gz console=ttyS0,115200 mitigations=off rodata=off xenvm.tick_ms=200 {append}\n"
    )
    done = run(
        *("xorriso", "-as", "mkisofs", "-quiet", "-follow-links", "-o", str(made), "-b", "isolinux/isolinux.bin"),
        *("-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"),
        *("-isohybrid-mbr", "/usr/lib/ISOLINUX/isohdpfx.bin", str(tree)),
    )
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def disk():
    """Return a maker of disks that boot: a file of whole sectors on a file system with direct I/O."""
    made = []

    def make(reboots=False):
        path = Path(f"/root/hvm-{len(made)}.img")
        code = bytearray(SECTOR.ljust(510, b"\0") + b"\x55\xaa")
        code[MODE] = reboots
        path.write_bytes(code.ljust(1 << 20, b"\0"))
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink()


class Serial:
    """The serial port of a guest: what it says, and lines for its shell."""

    def __init__(self, guest):
        with Monitor.connect(guest.uuid, reply_timeout_s=60) as monitor:
            self.terminal = monitor.call("console").take_descriptor()
        tty.setraw(self.terminal)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):
            while piece := os.read(self.terminal, 4096):
                self.text += piece.decode(errors="replace")

    def until(self, what, patience_s=PATIENCE_S):
        return until(
            lambda: re.search(what, self.text), f"the guest says {what}; it said {self.text[-500:]}", patience_s
        )

    def up(self, patience_s=PATIENCE_S):
        self.until(r"GUEST-UP[\s\S]*tick 1", patience_s)

    def shell(self, line):
        before = len(self.text)
        os.write(self.terminal, f"{line}; echo END-$?-END\n".encode())
        found = until(lambda: re.search(r"END-(\d+)-END\r?\n", self.text[before:]), f"the guest ran {line}", 60)
        assert found[1] == "0", self.text[before:]
        return self.text[before:]


@pytest.fixture
def hvm(vm):
    def make(**settings):
        words = {"kernel": "", "initrd": "", "cmdline": ""}
        chosen = {"hvm": "true", "memory": MEMORY_MIB, "acpi": "true", "apic": "true", "pae": "true", "display": "none"}
        guest = vm(**words, **{**chosen, **settings})
        for key in ("initrd", "cmdline"):
            guest.settings.pop(key)
        guest.write()
        return guest

    return make


@pytest.fixture(autouse=True)
def no_device_model_is_left():
    """Look after everything else has been torn down."""
    yield
    until(lambda: not models(), "no device model is left", 30)


def models():
    """The QEMUs that serve a domain: pid -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                if words[0].endswith(QEMU) and "-xen-domid" in words:
                    found[int(entry.name)] = words
    return found


def model(guest):
    """The pid of the device model of a guest."""
    return next(pid for pid, words in models().items() if words[words.index("-xen-domid") + 1] == str(guest.domid))


def test_a_guest_boots_from_its_disk_with_a_device_model_without_privilege(hvm, disk):
    """The emulated drive and the PV disk are one block device; QEMU holds nothing that it does not need."""
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
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
    serial.up()
    guest.cmd("shutdown", "timeout=60")
    assert guest.state == "shutdown"
    assert guest.left() == [
        path for path in guest.left() if path.startswith(("/run/xenvm/vm", "/run/xenvm/lock", "process"))
    ]


@pytest.mark.long
def test_a_device_model_that_dies_is_a_crash(hvm, disk):
    guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c")
    guest.start()
    kill(model(guest))
    assert "crash" in guest.until("shutdown", 60)["reason"]
    assert guest.uuid not in domains()
    guest.write(on_crash="reboot")
    guest.cmd("read-config")
    guest.cmd("start")
    first = guest.domid
    kill(model(guest), signal.SIGSEGV)
    until(lambda: (now := guest.status())["state"] == "running" and now["domid"] != first, "started anew", 90)
    Serial(guest).up()
    guest.write(on_crash="preserve")
    guest.cmd("read-config")
    kill(model(guest))
    guest.until("crashed", 60)
    guest.cmd("destroy")


@pytest.mark.long
def test_linux_from_a_disc(hvm, tmp_path):
    """The firmware boots a disc, and a Linux with PV drivers hears requests."""
    guest = hvm(disk=f"{disc(tmp_path)}:file:hdc:r:cdrom", boot="d", vcpus=2)
    guest.start()
    serial = Serial(guest)
    serial.up(240)
    assert "nx" in serial.shell("grep -m1 flags /proc/cpuinfo").split()
    assert serial.shell("nproc").split("\n")[1].strip() == "2"
    guest.cmd("shutdown", "timeout=60")
    assert guest.state == "shutdown"


@pytest.mark.long
def test_a_disc_in_a_drive_the_screen_and_the_next_monitor(hvm, disk, tmp_path):
    """Look at the screen's greeting, change the disc, and go on under another monitor."""
    other = tmp_path / "other.iso"
    other.write_bytes(b"another disc".ljust(1 << 20, b"\0"))
    guest = hvm(disk=[f"{disk()}:file:hda:w:disk", ":file:hdd:r:cdrom"], boot="c", display="vnc")
    guest.start()
    port = int(guest.cmd("get-vnc").stdout)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as screen:
        assert screen.recv(12).startswith(b"RFB 003.")
    assert guest.cmd("get-stubdomid").stdout.startswith("none")
    broker = guest.broker()
    kill(broker)
    until(lambda: not Path(f"/proc/{broker}").exists(), "the monitor is gone", 30)
    guest.start()
    assert int(guest.cmd("get-vnc").stdout) == port
    guest.cmd("cd-insert", "device=hdd", f"path={other}")
    assert run("xenvm-audit", guest.uuid).returncode == 0
    Serial(guest).until("tick 1")
    guest.cmd("cd-eject", "hdd")
    guest.cmd("cd-eject", "hda", code=5)
    assert guest.cmd("get-acpi-state").stdout == "0\n"


@pytest.mark.long
def test_the_ways_a_guest_ends(hvm, disk):
    guest = hvm(disk=f"{disk(reboots=True)}:file:hda:w:disk", boot="c")
    guest.start()
    first = guest.domid
    until(lambda: (now := guest.status())["domid"] not in (None, first) and now["state"] == "running", "rebooted", 240)
    guest.cmd("trigger", "nmi")
    guest.cmd("trigger", "reset")
    guest.cmd("trigger", "lid", code=2)
    assert guest.state == "running"
    guest.cmd("shutdown", "force=true")
    assert guest.state == "shutdown"


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
    image = disk()
    for moment in (0.3, 0.8, 1.3, 1.8, 2.5, 3.5, 5):
        guest = hvm(disk=f"{image}:file:hda:w:disk", boot="c")
        starting = guest.begin()
        time.sleep(moment)
        with contextlib.suppress(XenvmError):
            guest.ask("destroy")
        starting.communicate(timeout=120)
        guest.end()
        assert guest.left() == []
        assert models() == {}


@pytest.mark.long
def test_cards_are_emulated_beside_the_pv_ones(hvm, disk):
    run("ip", "link", "add", "xtbr0", "type", "bridge")
    run("ip", "link", "set", "xtbr0", "up")
    try:
        guest = hvm(disk=f"{disk()}:file:hda:w:disk", boot="c", nic="bridge=xtbr0,model=e1000")
        guest.start()
        ports = {path.name for path in Path("/sys/class/net/xtbr0/brif").iterdir()}
        assert ports == {f"vif{guest.domid}.0", f"vif{guest.domid}.0-emu"}
        assert run("xenvm-audit", guest.uuid).returncode == 0
        guest.cmd("destroy")
        assert not list(Path("/sys/class/net/xtbr0/brif").iterdir())
    finally:
        run("ip", "link", "del", "xtbr0")


@pytest.mark.long
def test_the_keys_of_the_machine_are_taken(hvm, disk):
    """Xen, the firmware and QEMU take each of them: the guest runs. What it makes of them is not looked at."""
    switches = ("pae", "acpi", "apic", "nx", "hpet", "vpt-align")
    values = {"viridian": "true", "timer-mode": 2, "timeoffset": 3600, "serial": "tcp:127.0.0.1:4555"}
    guest = hvm(
        disk=[f"{disk()}:file:hda:w:disk", f"{disk()}:file:sda:w:disk"],
        boot="c",
        **dict.fromkeys(switches, "false"),
        **values,
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
