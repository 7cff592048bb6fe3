# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure many starts at once, of xenvm beside xl, and the memory of the monitors: `crowd.py ROUNDS`, in dom0."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

KERNEL, INITRD = "/lab/vmlinuz", "/lab/guest.gz"
CMDLINE = "console=hvc0 mitigations=off rodata=off xenvm.tick_ms=1000000"
SIZES = (4, 16)
MEMORY_MIB = 96


def uuid(number: int) -> str:
    """Return the uuid of a guest."""
    return f"00000000-0000-0000-0000-0000000be{number:03d}"


def write(number: int) -> None:
    """Write both config files of a guest."""
    Path(f"/run/bench-{number}.xenvm").write_text(
        f"uuid = {uuid(number)}\nname = ours-{number}\nkernel = {KERNEL}\ninitrd = {INITRD}\ncmdline = {CMDLINE}\n"
        f"memory = {MEMORY_MIB}\n"
    )
    Path(f"/run/bench-{number}.xl").write_text(
        f"name = 'theirs-{number}'\ntype = 'pv'\nkernel = '{KERNEL}'\nramdisk = '{INITRD}'\ncmdline = '{CMDLINE}'\n"
        f"memory = {MEMORY_MIB}\nvcpus = 1\n"
    )


def together(*commands: tuple[str, ...]) -> float:
    """Start all these at once, wait for all, and return the seconds."""
    begin = time.monotonic()
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    failed = [process.args for process in running if process.wait()]
    if failed:
        raise RuntimeError(failed)
    return time.monotonic() - begin


def proportional(word: str) -> float:
    """Return the proportional MiB of all processes with this word in their command line."""
    found = [process for process in psutil.process_iter() if any(word in part for part in process.cmdline())]
    return sum(process.memory_full_info().pss for process in found) / 2**20


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1])
    print("| at once | xenvm | xl | ratio |\n|---|---|---|---|")
    for size in SIZES:
        ours: list[float] = []
        theirs: list[float] = []
        for number in range(size):
            write(number)
        for _ in range(rounds):
            ours.append(together(*(("xenvm", f"/run/bench-{number}.xenvm") for number in range(size))))
            time.sleep(70)  # what waited ready has ended
            memory = proportional("xenvm/_start.py") / size
            for number in range(size):
                subprocess.run(("xenvm-cmd", uuid(number), "destroy"), check=True)
                subprocess.run(("xenvm-cmd", uuid(number), "quit"), check=True)
            theirs.append(together(*(("xl", "create", "-q", f"/run/bench-{number}.xl") for number in range(size))))
            other = proportional("xl") / size
            for number in range(size):
                subprocess.run(("xl", "destroy", f"theirs-{number}"), check=True)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"| {size} starts | {statistics.median(ours):.1f} s | {statistics.median(theirs):.1f} s | {ratio:.2f} |")
        print(
            f"| memory of each, proportional | {memory:.1f} MiB | {other:.1f} MiB | {memory / other:.1f} |", flush=True
        )


main()
