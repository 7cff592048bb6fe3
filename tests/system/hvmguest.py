# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of HVM guests share: a disc with Linux, a serial port to talk over, and who the device models are.

Most guests are a boot sector, `sector.s`, which is up as soon as the firmware is. Linux boots from a disc that is made
of Debian's parts: isolinux, the kernel, and the test guest's initramfs, which talks on the first serial port.
"""

import contextlib
import os
import re
import shutil
import threading
import time
import tty
from pathlib import Path

from vms import run, until

from xenvm.cli.client import Monitor

PATIENCE_S = 60.0
LOAD_S = 900.0  # how long firmware and loader may take to read a kernel, word by word out of an emulated IDE drive
QEMU = "xen-qemu-system-i386"


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
        f"APPEND initrd=/guest.gz console=ttyS0,115200 quiet mitigations=off rodata=off xenvm.tick_ms=200 {append}\n"
    )
    done = run(
        *("xorriso", "-as", "mkisofs", "-quiet", "-follow-links", "-o", str(made), "-b", "isolinux/isolinux.bin"),
        *("-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"),
        *("-isohybrid-mbr", "/usr/lib/ISOLINUX/isohdpfx.bin", str(tree)),
    )
    assert done.returncode == 0, done.stderr
    return made


class Serial:
    """The serial port of a guest: what it says, and lines for its shell."""

    def __init__(self, guest):
        with Monitor.connect(guest.uuid, reply_timeout_s=60) as monitor:
            self._listen(monitor.call("console").take_descriptor())

    @classmethod
    def of(cls, path):
        """That of a guest of somebody else, by its terminal."""
        made = cls.__new__(cls)
        made._listen(os.open(path, os.O_RDWR | os.O_NOCTTY))
        return made

    def _listen(self, terminal):
        self.terminal = terminal
        tty.setraw(self.terminal)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):
            while piece := os.read(self.terminal, 4096):
                self.text += piece.decode(errors="replace")

    def until(self, what, patience_s=PATIENCE_S):
        try:
            return until(lambda: re.search(what, self.text), f"the guest says {what}", patience_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said {self.text[-1000:]}") from None

    def up(self, patience_s=PATIENCE_S):
        self.until(r"GUEST-UP[\s\S]*tick 1", patience_s)

    def processor(self):
        """What the boot sector has seen: CPUID 1 edx, 80000001 edx, 40000000 ebx, and hour and minute in BCD."""
        found = self.until(r"GUEST-UP ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8})\r\n")
        return [int(word, 16) for word in found.groups()]

    def drives(self):
        """The disks that the firmware has found: number, and the letters that the second sector of each begins with."""
        before = len(self.text)
        self.write("d")
        until(lambda: "END" in self.text[before:], "the boot sector has read all disks", PATIENCE_S)
        return re.findall(r"^DRIVE 000000([0-9a-f]{2}) (\S*)\r$", self.text[before:], re.MULTILINE)

    def ticks_on(self):
        """Wait until the guest says that it goes on."""
        before = len(self.text)
        until(lambda: "tick 1" in self.text[before:], "the guest goes on", PATIENCE_S)

    def write(self, line):
        os.write(self.terminal, f"{line}\n".encode())

    def shell(self, line, patience_s=PATIENCE_S):
        """Run a line in a Linux guest; return what it printed."""
        before = len(self.text)
        self.write(f"{line}; echo END-$?-END")
        found = until(lambda: re.search(r"END-(\d+)-END\r?\n", self.text[before:]), f"the guest ran {line}", patience_s)
        said = self.text[before:]
        assert found[1] == "0", said
        text = said.partition("-END\r\n")[2] if f"{line}; echo" in said else said
        lines = text[: text.find("END-")].replace("\r", "").split("\n")
        return "\n".join(one for one in lines if not re.fullmatch(r"tick \d+", one)).strip()


def minutes_ahead(clock):
    """How far the hour and minute that a boot sector has read are ahead of dom0's UTC."""
    hour, minute = (int(f"{clock >> shift & 0xFF:02x}") for shift in (8, 0))  # BCD
    now = time.gmtime()
    return (60 * (hour - now.tm_hour) + minute - now.tm_min + 720) % 1440 - 720


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
