# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure xenvm beside xl in dom0: `measure.py ROUNDS`, as root on a Xen host with both installed."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

UUID = "00000000-0000-0000-0000-0000000be0c8"
KERNEL = "/lab/vmlinuz"
XENVM_FILE = Path("/run/bench.xenvm")
XL_FILE = Path("/run/bench.xl")
XENVM_FILE.write_text(
    f"uuid = {UUID}\nname = bench-xenvm\nkernel = {KERNEL}\ninitrd = /lab/guest.gz\n"
    "cmdline = console=hvc0\nmemory = 128\n"
)
XL_FILE.write_text(
    f"name = 'bench-xl'\ntype = 'pv'\nkernel = '{KERNEL}'\nramdisk = '/lab/guest.gz'\ncmdline = 'console=hvc0'\n"
    "memory = 128\nvcpus = 1\n"
)


def timed(*command: str) -> float:
    """Run a command to its end and return the seconds it took."""
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def pair(name: str, ours: list[float], theirs: list[float]) -> None:
    """Print one row: median and range of both, median of the ratios pair by pair."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})"

    print(f"| {name} | {cell(ours)} | {cell(theirs)} | {statistics.median(ratios):.2f} |", flush=True)


def memory(processes: list[psutil.Process]) -> tuple[int, int]:
    """Return resident and proportional KiB of some processes together."""
    infos = [process.memory_full_info() for process in processes]
    return sum(info.rss for info in infos) // 1024, sum(info.pss for info in infos) // 1024


def system_calls(processes: list[psutil.Process], seconds: float) -> int:
    """Return how often the processes were switched in during a time: an idle one is not."""
    before = [process.num_ctx_switches() for process in processes]
    time.sleep(seconds)
    after = [process.num_ctx_switches() for process in processes]
    return sum(b.voluntary + b.involuntary - a.voluntary - a.involuntary for a, b in zip(before, after, strict=True))


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1])
    kinds = ("start to unpause", "status", "pause", "unpause", "destroy")
    ours: dict[str, list[float]] = {kind: [] for kind in kinds}
    theirs: dict[str, list[float]] = {kind: [] for kind in kinds}
    facts = []
    for _ in range(rounds):
        ours["start to unpause"].append(timed("xenvm", str(XENVM_FILE)))
        time.sleep(6)
        ours["status"].append(timed("xenvm-cmd", UUID, "status"))
        ours["pause"].append(timed("xenvm-cmd", UUID, "pause"))
        ours["unpause"].append(timed("xenvm-cmd", UUID, "unpause"))
        if not facts:
            broker = int(Path(f"/run/xenvm/lock-{UUID}").read_text())
            monitor = [psutil.Process(broker), *psutil.Process(broker).children(recursive=True)]
            resident, proportional = memory(monitor)
            count = len(monitor)
            facts.append(f"idle monitor: {count} processes, {resident} KiB resident, {proportional} KiB proportional")
            for process in monitor:
                part = memory([process])
                facts.append(f"  {process.cmdline()[5]}: {part[0]} KiB resident, {part[1]} KiB proportional")
            facts.append(f"idle monitor: {system_calls(monitor, 10)} context switches in 10 s")
        ours["destroy"].append(timed("xenvm-cmd", UUID, "destroy"))
        timed("xenvm-cmd", UUID, "quit")
        theirs["start to unpause"].append(timed("xl", "create", "-q", str(XL_FILE)))
        time.sleep(6)
        theirs["status"].append(timed("xl", "list", "bench-xl"))
        theirs["pause"].append(timed("xl", "pause", "bench-xl"))
        theirs["unpause"].append(timed("xl", "unpause", "bench-xl"))
        if len(facts) < 6:
            left = [process for process in psutil.process_iter() if process.name() == "xl"]
            resident, proportional = memory(left)
            facts.append(f"xl leaves: {len(left)} process, {resident} KiB resident, {proportional} KiB proportional")
        theirs["destroy"].append(timed("xl", "destroy", "bench-xl"))
    print("\n| whole command | xenvm | xl | ratio |\n|---|---|---|---|")
    for kind in kinds:
        pair(kind, ours[kind], theirs[kind])
    print("\n" + "\n".join(facts))


main()
