# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure disks and network cards of xenvm beside those of xl: `devices.py ROUNDS`, as root in dom0 with both.

Two guests of one kernel run side by side, one made by each. A command is timed until the backend is connected, which
xl does not wait for by itself.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyxs

UUID = "00000000-0000-0000-0000-0000000be0d1"
OURS, THEIRS = "bench-xenvm", "bench-xl"
KERNEL, INITRD = "/lab/vmlinux", "/lab/guest.gz"
CMDLINE = "console=hvc0 mitigations=off rodata=off xenvm.tick_ms=1000000"
BRIDGE = "benchbr0"
SIZE_MIB = 48
STORE = Path("/var/tmp")


def run(*command: str) -> str:
    """Run a command and return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def log(name: str) -> str:
    """Return what a guest has printed."""
    path = Path(f"/var/log/xen/console/guest-{name}.log")
    return path.read_text(errors="replace") if path.exists() else ""


def wait(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.002)


class Guest:
    """One of the two guests."""

    def __init__(self, client: pyxs.Client, name: str, domid: int) -> None:
        self.client, self.name, self.domid, self.asked = client, name, domid, 0

    def node(self, path: str) -> str:
        """Read a xenstore node, "" when it is not there."""
        try:
            return self.client.read(path.encode()).decode()
        except pyxs.PyXSError:
            return ""

    def state(self, kind: str, device: int) -> str:
        """Return the state of a backend."""
        return self.node(f"/local/domain/0/backend/{kind}/{self.domid}/{device}/state")

    def attach(self, kind: str, device: int, *command: str) -> float:
        """Return the seconds from the begin of a command to the connected backend."""
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait(lambda: self.state(kind, device) == "4", f"{command}: connected")
        connected = time.monotonic() - begin
        if process.wait():
            raise RuntimeError(command)
        return connected

    def shell(self, line: str) -> str:
        """Run a line in the guest."""
        self.asked += 1
        before, mark = len(log(self.name)), f"END-{self.asked}-"
        tty = self.node(f"/local/domain/{self.domid}/console/tty")
        terminal = os.open(tty, os.O_RDWR | os.O_NOCTTY)
        os.write(terminal, f"{line}; echo {mark}$?\n".encode())
        os.close(terminal)
        wait(lambda: re.search(rf"{mark}\d+", log(self.name)[before:]), line, 600)
        return log(self.name)[before:]

    def seconds(self, line: str) -> float:
        """Return how long a line took in the guest, by the guest's own clock."""
        said = self.shell(f"read a b </proc/uptime; {line}; read c d </proc/uptime; echo TOOK $a $c")
        first, second = re.findall(r"TOOK ([0-9.]+) ([0-9.]+)", said)[-1]
        return float(second) - float(first)


def row(name: str, ours: list[float], theirs: list[float], unit: str = "s") -> None:
    """Print one row."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"

    print(f"| {name} | {cell(ours)} | {cell(theirs)} | {statistics.median(ratios):.2f} |", flush=True)


def image(name: str, kind: str) -> str:
    """Make an empty image."""
    path = str(STORE / name)
    run("qemu-img", "create", "-q", "-f", kind, path, f"{SIZE_MIB}M")
    return path


def start(client: pyxs.Client) -> tuple[Guest, Guest]:
    """Start both guests and wait until they are up."""
    ours, theirs = Path("/run/bench.xenvm"), Path("/run/bench.xl")
    ours.write_text(
        f"uuid = {UUID}\nname = {OURS}\nkernel = {KERNEL}\ninitrd = {INITRD}\ncmdline = {CMDLINE}\nmemory = 160\n"
    )
    theirs.write_text(
        f"name = '{THEIRS}'\ntype = 'pv'\nkernel = '{KERNEL}'\nramdisk = '{INITRD}'\ncmdline = '{CMDLINE}'\n"
        f"memory = 160\nvcpus = 1\ndisk = ['{image('first.qcow2', 'qcow2')},qcow2,xvdb,w']\n"  # so that it has a QEMU
    )
    run("xenvm", str(ours))
    run("xl", "create", "-q", str(theirs))
    guests = [
        Guest(client, OURS, int(run("xenvm-cmd", UUID, "domid"))),
        Guest(client, THEIRS, int(run("xl", "domid", THEIRS))),
    ]
    for guest in guests:
        wait(lambda guest=guest: "GUEST-UP" in log(guest.name), "guest up")
    time.sleep(10)  # their shells make links for every command first
    return guests[0], guests[1]


def hotplug(ours: Guest, theirs: Guest, rounds: int) -> None:
    """Compare attaching and detaching."""
    mine, other = image("mine.raw", "raw"), image("other.raw", "raw")
    figures: dict[str, tuple[list[float], list[float]]] = {
        key: ([], []) for key in ("disk attach", "disk detach", "card attach", "card detach")
    }

    def timed(key: str, place: int, seconds: float) -> None:
        figures[key][place].append(seconds)

    def whole(*command: str) -> float:
        begin = time.monotonic()
        run(*command)
        return time.monotonic() - begin

    for _ in range(rounds):
        timed("disk attach", 0, ours.attach("vbd", 51744, "xenvm-cmd", UUID, "disk-add", f"{mine}:file:xvdc:w:disk"))
        timed("disk attach", 1, theirs.attach("vbd", 51744, "xl", "block-attach", THEIRS, f"{other},raw,xvdc,w"))
        timed("disk detach", 0, whole("xenvm-cmd", UUID, "disk-del", "xvdc"))
        timed("disk detach", 1, whole("xl", "block-detach", THEIRS, "xvdc"))
        timed("card attach", 0, ours.attach("vif", 0, "xenvm-cmd", UUID, "nic-add", "id=0"))
        timed("card attach", 1, theirs.attach("vif", 0, "xl", "network-attach", THEIRS, f"bridge={BRIDGE}"))
        timed("card detach", 0, whole("xenvm-cmd", UUID, "nic-del", "0"))
        timed("card detach", 1, whole("xl", "network-detach", THEIRS, "0"))
    for key, (a, b) in figures.items():
        row(key, a, b)


def transfer(ours: Guest, theirs: Guest, rounds: int) -> None:
    """Compare writing, reading and small direct reads: block devices, raw files, qcow2 (an image server beside qdisk).

    A block device takes the same way through the kernel for both, a file does not: ours has direct I/O.
    """
    lines = {
        f"write {SIZE_MIB // 2} MiB, fsync": f"dd if=/dev/zero of=/dev/xvdc bs=1M count={SIZE_MIB // 2} conv=fsync",
        f"read {SIZE_MIB // 2} MiB": "echo 3 >/proc/sys/vm/drop_caches; "
        f"dd if=/dev/xvdc of=/dev/null bs=1M count={SIZE_MIB // 2}",
        "500 reads of 4 KiB": "echo 3 >/proc/sys/vm/drop_caches; "
        "dd if=/dev/xvdc of=/dev/null bs=4k count=500 iflag=direct",
    }
    for kind, theirs_kind in (("phy", "raw"), ("file", "raw"), ("qcow", "qcow2")):
        mine, other = image(f"mine.{kind}", theirs_kind), image(f"other.{kind}", theirs_kind)
        if kind == "phy":
            mine, other = (run("losetup", "--find", "--show", path).strip() for path in (mine, other))
        attached = ours.attach("vbd", 51744, "xenvm-cmd", UUID, "disk-add", f"{mine}:{kind}:xvdc:w:disk")
        backend = "qdisk" if kind == "qcow" else "vbd"
        there = theirs.attach(backend, 51744, "xl", "block-attach", THEIRS, f"{other},{theirs_kind},xvdc,w")
        row(f"{kind}: attach", [attached], [there])
        for name, line in lines.items():
            figures: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                figures[0].append(max(0.01, ours.seconds(line)))
                figures[1].append(max(0.01, theirs.seconds(line)))
            row(f"{kind}: {name}", *figures)
        if kind == "qcow":
            servers = [memory("qemu-storage-daemon"), memory("qemu-system-i386")]
            row("qcow: proportional memory of the server", [servers[0]], [servers[1]], "MiB")
        run("xenvm-cmd", UUID, "disk-del", "xvdc")
        run("xl", "block-detach", THEIRS, "xvdc")
        if kind == "phy":
            run("losetup", "--detach", mine)
            run("losetup", "--detach", other)


def memory(word: str) -> float:
    """Return the proportional memory in MiB of the processes whose command line has this word."""
    found = [process for process in psutil.process_iter() if any(word in part for part in process.cmdline()[:1])]
    return sum(process.memory_full_info().pss for process in found) / 2**20


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1])
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "link", "set", BRIDGE, "up")
    with pyxs.Client() as client:
        ours, theirs = start(client)
        print("\n| devices of a running guest | xenvm | xl | ratio |\n|---|---|---|---|", flush=True)
        hotplug(ours, theirs, rounds)
        transfer(ours, theirs, rounds)
    run("xenvm-cmd", UUID, "destroy")
    run("xenvm-cmd", UUID, "quit")
    run("xl", "destroy", THEIRS)


main()
