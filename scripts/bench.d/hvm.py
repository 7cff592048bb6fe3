# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure HVM guests beside xl in dom0: `hvm.py ROUNDS`, as root on a Xen host with both installed.

The guest is the boot sector of the tests, with a disk, no screen and a serial port; in turn A B A B.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

UUID = "00000000-0000-0000-0000-0000000be0ca"
SECTOR = Path(__file__).resolve().parents[2] / "tests/system/sector.s"
QEMU = "xen-qemu-system-i386"
MEMORY_MIB = 128
SETTLE_S = 8


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def timed(*command: str) -> float:
    """Run a command to its end; return the seconds it took."""
    begin = time.monotonic()
    run(*command)
    return time.monotonic() - begin


def write(folder: Path) -> None:
    """Make a disk for each, and the config files of both."""
    run("as", "--32", "-o", str(folder / "sector.o"), str(SECTOR))
    link = ("ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x7c00")
    run(*link, "-o", str(folder / "sector"), str(folder / "sector.o"))
    for name in ("xenvm", "xl"):
        disk = folder / f"{name}.disk"
        disk.write_bytes((folder / "sector").read_bytes())
        with disk.open("r+b") as file:
            file.truncate(1 << 20)
    (folder / "xenvm.cfg").write_text(
        f"uuid = {UUID}\nname = bench-xenvm\nhvm = true\nmemory = {MEMORY_MIB}\nacpi = true\napic = true\npae = true\n"
        f"boot = c\nserial = pty\ndisplay = none\ndisk = {folder}/xenvm.disk:file:hda:w:disk\n"
    )
    (folder / "xl.cfg").write_text(
        f"name = 'bench-xl'\ntype = 'hvm'\nmemory = {MEMORY_MIB}\nvcpus = 1\nboot = 'c'\nserial = 'pty'\nvga = 'none'\n"
        f"vnc = 0\ndisk = ['format=raw, vdev=hda, access=rw, target={folder}/xl.disk']\n"
    )


def models() -> Iterator[psutil.Process]:
    """Yield the QEMUs of running domains."""
    for process in psutil.process_iter():
        words = process.cmdline()
        if words and words[0].endswith(QEMU) and "-xen-domid" in words:
            yield process


def pss_mib(process: psutil.Process) -> float:
    """Return the proportional memory of a process."""
    return float(process.memory_full_info().pss) / (1 << 20)


def row(name: str, ours: list[float], theirs: list[float], unit: str = "s") -> None:
    """Print one row: median and range of both, median of the ratios pair by pair."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"

    print(f"| {name} | {cell(ours)} | {cell(theirs)} | {statistics.median(ratios):.2f} |", flush=True)


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1])
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        write(folder)
        images = folder / "xenvm.img", folder / "xl.img"
        steps = {
            "start to unpause": (("xenvm", f"{folder}/xenvm.cfg"), ("xl", "create", "-q", f"{folder}/xl.cfg")),
            "checkpoint live=true; xl save -c": (
                ("xenvm-cmd", UUID, "checkpoint", str(images[0]), "live=true"),
                ("xl", "save", "-c", "bench-xl", str(images[1])),
            ),
            "suspend": (("xenvm-cmd", UUID, "suspend", str(images[0])), ("xl", "save", "bench-xl", str(images[1]))),
            "restore": (("xenvm-cmd", UUID, "restore", str(images[0])), ("xl", "restore", str(images[1]))),
            "destroy": (("xenvm-cmd", UUID, "destroy"), ("xl", "destroy", "bench-xl")),
        }
        times: dict[str, tuple[list[float], list[float]]] = {step: ([], []) for step in steps}
        memory: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for step, commands in steps.items():
                for side, command in enumerate(commands):
                    before = {process.pid for process in models()}
                    times[step][side].append(timed(*command))
                    memory[side].extend(pss_mib(one) for one in models() if step == "restore" and one.pid not in before)
                time.sleep(SETTLE_S)
            run("xenvm-cmd", UUID, "quit")
        print("| whole command | xenvm | xl | ratio |\n|---|---|---|---|")
        for step, (ours, theirs) in times.items():
            row(step, ours, theirs)
        row("proportional memory of QEMU", *memory, "MiB")


if __name__ == "__main__":
    main()
