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
XENVM_FILE.write_text(
    f"uuid = {UUID}\nname = bench-xenvm\nkernel = {KERNEL}\ninitrd = /lab/guest.gz\ncmdline = {CMDLINE}\nmemory = 128\n"
)
XL_FILE.write_text(
    f"name = 'bench-xl'\ntype = 'pv'\nkernel = '{KERNEL}'\nramdisk = '/lab/guest.gz'\ncmdline = '{CMDLINE}'\n"
    "memory = 128\nvcpus = 1\n"
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


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1])
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        one, other = f"{folder}/xenvm.img", f"{folder}/xl.img"
        save = (("xenvm-cmd", UUID, "suspend", one), ("xl", "save", "bench-xl", other))
        back = (("xenvm-cmd", UUID, "restore", one), ("xl", "restore", other))
        timed("xenvm", str(XENVM_FILE))
        timed("xl", "create", "-q", str(XL_FILE))
        time.sleep(20)
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("save", "restore")}
        for _ in range(rounds):
            for name, commands in (("save", save), ("restore", back)):
                for side, command in enumerate(commands):
                    times[name][side].append(timed(*command))
                time.sleep(5)
        peaks = [
            [watched(mine, *command) for mine, command in zip((ours, theirs), commands, strict=True)]
            for commands in (save, back)
        ]
        files = [Path(path).stat() for path in (one, other)]
        timed("xenvm-cmd", UUID, "destroy")
        timed("xenvm-cmd", UUID, "quit")
        timed("xl", "destroy", "bench-xl")
    print("\n| a guest of 128 MiB | xenvm | xl | ratio |\n|---|---|---|---|")
    for name, (ours_s, theirs_s) in times.items():
        pair(name, ours_s, theirs_s)
    for name, (mine, other_kib) in zip(times, peaks, strict=True):
        print(f"| {name}: peak proportional memory | {mine} KiB | {other_kib} KiB | {mine / other_kib:.2f} |")
    mine, other_file = files
    print(f"| length of the image | {mine.st_size >> 20} MiB | {other_file.st_size >> 20} MiB | ", end="")
    print(f"{mine.st_size / other_file.st_size:.2f} |")
    print(f"| space on the disk | {mine.st_blocks >> 11} MiB | {other_file.st_blocks >> 11} MiB | ", end="")
    print(f"{mine.st_blocks / other_file.st_blocks:.2f} |")


main()
