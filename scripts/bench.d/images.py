# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure save and restore beside xl in dom0: `images.py ROUNDS`, as root on a Xen host with both installed.

One guest each, of one kernel and initrd, side by side; in turn A B A B.
"""

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

UUID = "00000000-0000-0000-0000-0000000be0c9"
KERNEL = "/lab/vmlinux"
CMDLINE = "console=hvc0 mitigations=off rodata=off"
XENVM_FILE = Path("/run/bench.xenvm")
XL_FILE = Path("/run/bench.xl")


def describe(memory_mib: int, compression: str) -> None:
    """Write the config files of both."""
    XENVM_FILE.write_text(
        f"uuid = {UUID}\nname = bench-xenvm\nkernel = {KERNEL}\ninitrd = /lab/guest.gz\ncmdline = {CMDLINE}\n"
        f"memory = {memory_mib}\nimage-compression = {compression}\n"
    )
    XL_FILE.write_text(
        f"name = 'bench-xl'\ntype = 'pv'\nkernel = '{KERNEL}'\nramdisk = '/lab/guest.gz'\ncmdline = '{CMDLINE}'\n"
        f"memory = {memory_mib}\nvcpus = 1\n"
    )


class Peak(threading.Thread):
    """The largest proportional memory, in KiB, of the processes that a test takes for ours, while a command runs."""

    def __init__(self, ours: Callable[[psutil.Process], bool]) -> None:
        super().__init__(daemon=True)
        self._ours, self._over, self.kib = ours, threading.Event(), 0

    def run(self) -> None:
        """Look again and again."""
        while not self._over.wait(0.1):
            kib = 0
            for process in psutil.process_iter():
                try:
                    if self._ours(process):
                        kib += process.memory_full_info().pss // 1024
                except psutil.Error:
                    continue
            self.kib = max(self.kib, kib)

    def end(self) -> None:
        """Stop looking."""
        self._over.set()
        self.join()


def ours(process: psutil.Process) -> bool:
    """Tell whether a process is one of xenvm."""
    return any("xenvm" in word for word in process.cmdline()[:6])


def theirs(process: psutil.Process) -> bool:
    """Tell whether a process is one of xl."""
    return process.name() in ("xl", "libxl-save-helper")


def timed(*command: str) -> float:
    """Run a command to its end; return the seconds it took."""
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - begin


def watched(mine: Callable[[psutil.Process], bool], *command: str) -> int:
    """Run a command to its end; return the largest memory that it took meanwhile, in KiB."""
    peak = Peak(mine)
    peak.start()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak.end()
    return peak.kib


def pair(name: str, ours_s: list[float], theirs_s: list[float]) -> None:
    """Print one row: median and range of both, median of the ratios pair by pair."""
    ratios = [a / b for a, b in zip(ours_s, theirs_s, strict=True)]

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})"

    print(f"| {name} | {cell(ours_s)} | {cell(theirs_s)} | {statistics.median(ratios):.2f} |", flush=True)


class Pair:
    """Two running guests of one size, and their images."""

    def __init__(self, folder: str, memory_mib: int) -> None:
        self.memory_mib = memory_mib
        self.files = Path(folder) / "xenvm.img", Path(folder) / "xl.img"
        self.commands = {
            "save": (
                ("xenvm-cmd", UUID, "suspend", str(self.files[0])),
                ("xl", "save", "bench-xl", str(self.files[1])),
            ),
            "restore": (("xenvm-cmd", UUID, "restore", str(self.files[0])), ("xl", "restore", str(self.files[1]))),
        }
        describe(memory_mib, "none")
        timed("xenvm", str(XENVM_FILE))
        timed("xl", "create", "-q", str(XL_FILE))
        time.sleep(20)

    def compress(self, compression: str) -> None:
        """Let xenvm write images so from now on."""
        describe(self.memory_mib, compression)
        timed("xenvm-cmd", UUID, "read-config")

    def times(self, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
        """Save and restore both, several times."""
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in self.commands}
        for _ in range(rounds):
            for name, commands in self.commands.items():
                for side, command in enumerate(commands):
                    times[name][side].append(timed(*command))
                time.sleep(5)
        return times

    def peaks(self) -> list[list[int]]:
        """Save and restore both once more; return how much memory each took."""
        return [
            [watched(mine, *command) for mine, command in zip((ours, theirs), commands, strict=True)]
            for commands in self.commands.values()
        ]

    def end(self) -> None:
        """End both."""
        timed("xenvm-cmd", UUID, "destroy")
        timed("xenvm-cmd", UUID, "quit")
        timed("xl", "destroy", "bench-xl")


def ratio(name: str, mine: int, other: int, unit: str) -> None:
    """Print one row of numbers that are measured once."""
    print(f"| {name} | {mine} {unit} | {other} {unit} | {mine / other:.2f} |", flush=True)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1])
    print("\n| | xenvm | xl | ratio |\n|---|---|---|---|")
    for memory_mib in (128, 384):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            both = Pair(folder, memory_mib)
            for compression in ("none", "zstd"):
                both.compress(compression)
                what = f"{memory_mib} MiB" + (f", {compression}" if compression != "none" else "")
                if memory_mib == 128:
                    for name, (ours_s, theirs_s) in both.times(rounds).items():
                        pair(f"{what}: {name}", ours_s, theirs_s)
                for name, peaks in zip(both.commands, both.peaks(), strict=True):
                    ratio(f"{what}: {name}: peak proportional memory", *peaks, "KiB")
                one, other = (path.stat() for path in both.files)
                ratio(f"{what}: length of the image", one.st_size >> 20, other.st_size >> 20, "MiB")
                ratio(f"{what}: space on the disk", one.st_blocks >> 11, other.st_blocks >> 11, "MiB")
            both.end()


main()
