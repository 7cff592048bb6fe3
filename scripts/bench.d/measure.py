# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure xenvm beside xl in dom0: `measure.py ROUNDS`, as root on a Xen host with both installed.

The guest boots Debian's compressed kernel, as users do; with mitigations=off it is up sooner.
"""

import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from xenvm.cli.client import Monitor

UUID = "00000000-0000-0000-0000-0000000be0c8"
KERNEL, INITRD = "/lab/vmlinuz", "/lab/guest.gz"
CMDLINE = "console=hvc0 mitigations=off rodata=off"
CACHE = Path("/var/cache/xenvm")
XENVM_FILE, XL_FILE = Path("/run/bench.xenvm"), Path("/run/bench.xl")
COMMANDS = 200
ROW = "| {:<44} | {:>26} | {:>26} | {:>6} |"


def write(mode: str = "normal") -> None:
    """Write both config files."""
    cmdline = f"{CMDLINE} xenvm.mode={mode}"
    XENVM_FILE.write_text(
        f"uuid = {UUID}\nname = bench-xenvm\nkernel = {KERNEL}\ninitrd = {INITRD}\ncmdline = {cmdline}\nmemory = 128\n"
    )
    XL_FILE.write_text(
        f"name = 'bench-xl'\ntype = 'pv'\nkernel = '{KERNEL}'\nramdisk = '{INITRD}'\ncmdline = '{cmdline}'\n"
        "memory = 128\nvcpus = 1\non_reboot = 'restart'\n"
    )


def timed(*command: str, text: str = "") -> float:
    """Run a command to its end and return the seconds it took."""
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, input=text.encode())
    return time.monotonic() - begin


def wait(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)


class Store:
    """xenstored's events; domains come and go there."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect("/run/xenstored/socket")
        for token in (b"@introduceDomain", b"@releaseDomain"):
            payload = token + b"\0" + token + b"\0"
            self._socket.sendall(struct.pack("=IIII", 4, 0, 0, len(payload)) + payload)  # XS_WATCH, xs_wire.h
        self._data = b""

    def next(self, deadline: float) -> tuple[str, float]:
        """Return the token of the next event and when it came."""
        while True:
            if len(self._data) >= 16:
                kind, _, _, length = struct.unpack_from("=IIII", self._data)
                if len(self._data) >= 16 + length:
                    payload, self._data = self._data[16 : 16 + length], self._data[16 + length :]
                    if kind == 15:  # XS_WATCH_EVENT
                        return payload.split(b"\0")[1].decode(), time.monotonic()
                    continue
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            self._data += self._socket.recv(65536)

    def gap(self) -> float:
        """Return the seconds between the end of a guest and the introduction of its next domain."""
        deadline, ended = time.monotonic() + 300, 0.0
        while True:
            token, when = self.next(deadline)
            if token == "@releaseDomain":
                ended = ended or when
            elif ended:
                return when - ended

    def quiet(self) -> None:
        """Drop what has come so far."""
        try:
            while True:
                self.next(time.monotonic() + 0.2)
        except TimeoutError:
            return


def memory(processes: list[psutil.Process]) -> tuple[int, int]:
    """Return resident and proportional KiB of some processes together."""
    infos = [process.memory_full_info() for process in processes]
    return sum(info.rss for info in infos) // 1024, sum(info.pss for info in infos) // 1024


def switches(processes: list[psutil.Process], seconds: float) -> int:
    """Return how often the processes were switched in during a time: an idle one is not."""
    before = [process.num_ctx_switches() for process in processes]
    time.sleep(seconds)
    after = [process.num_ctx_switches() for process in processes]
    return sum(b.voluntary + b.involuntary - a.voluntary - a.involuntary for a, b in zip(before, after, strict=True))


class Figures:
    """What was measured, by the name of the row."""

    def __init__(self) -> None:
        self.ours: dict[str, list[float]] = {}
        self.theirs: dict[str, list[float]] = {}

    def us(self, name: str, seconds: float) -> None:
        """Note a figure of xenvm."""
        self.ours.setdefault(name, []).append(seconds)

    def them(self, name: str, seconds: float) -> None:
        """Note a figure of xl."""
        self.theirs.setdefault(name, []).append(seconds)

    def print(self, pairs: list[tuple[str, str]]) -> None:
        """Print a row for each pair of names: median and range of both, median of the ratios pair by pair."""
        print(ROW.format("whole command", "xenvm", "xl", "ratio") + "\n|---|---|---|---|")
        for name, other in pairs:
            ours, theirs = self.ours.get(name, []), self.theirs.get(other, [])
            ratio = f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=False)):.2f}" if theirs else ""
            print(ROW.format(name, self.cell(ours), self.cell(theirs), ratio), flush=True)

    @staticmethod
    def cell(values: list[float]) -> str:
        """Return median and range."""
        return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})" if values else ""


def per_command() -> float:
    """Return the seconds of one status over one connection."""
    with Monitor.connect(UUID) as monitor:
        begin = time.monotonic()
        for _ in range(COMMANDS):
            monitor.call("status")
        return (time.monotonic() - begin) / COMMANDS


def of_xenvm(figures: Figures, facts: list[str]) -> None:
    """Measure one life of a guest: a cold start, then a warm one."""
    for entry in CACHE.glob("*"):
        entry.unlink()
    figures.us("start to unpause, cold kernel cache", timed("xenvm", str(XENVM_FILE)))
    time.sleep(6)
    wait(lambda: any(CACHE.glob("*")), "kept kernel")
    timed("xenvm-cmd", UUID, "destroy")
    timed("xenvm-cmd", UUID, "quit")
    figures.us("start to unpause, warm", timed("xenvm", str(XENVM_FILE)))
    time.sleep(6)
    figures.us("status", timed("xenvm-cmd", UUID, "status"))
    figures.us("pause", timed("xenvm-cmd", UUID, "pause"))
    figures.us("unpause", timed("xenvm-cmd", UUID, "unpause"))
    figures.us("status, one of many over one connection", per_command())
    batch = timed("xenvm-cmd", UUID, "-", text="status\n" * COMMANDS)
    figures.us(f"a batch of {COMMANDS} status, each", batch / COMMANDS)
    if not facts:
        broker = int(Path(f"/run/xenvm/lock-{UUID}").read_text())
        monitor = [psutil.Process(broker), *psutil.Process(broker).children(recursive=True)]
        for process in monitor:
            part = memory([process])
            facts.append(f"  {process.cmdline()[5]}: {part[0]} KiB resident, {part[1]} KiB proportional")
        time.sleep(65)
        monitor = [psutil.Process(broker), *psutil.Process(broker).children(recursive=True)]
        resident, proportional = memory(monitor)
        facts.append(
            f"idle monitor: {len(monitor)} processes, {resident} KiB resident, {proportional} KiB proportional"
        )
        facts.append(f"idle monitor: {switches(monitor, 10)} context switches in 10 s")
        figures.us("pause after a minute", timed("xenvm-cmd", UUID, "pause"))
        figures.us("destroy after a minute", timed("xenvm-cmd", UUID, "destroy"))
    else:
        figures.us("destroy", timed("xenvm-cmd", UUID, "destroy"))
    timed("xenvm-cmd", UUID, "quit")


def of_xl(figures: Figures, facts: list[str]) -> None:
    """Measure the same of xl."""
    figures.them("start", timed("xl", "create", "-q", str(XL_FILE)))
    time.sleep(6)
    figures.them("status", timed("xl", "list", "bench-xl"))
    figures.them("pause", timed("xl", "pause", "bench-xl"))
    figures.them("unpause", timed("xl", "unpause", "bench-xl"))
    if not any("xl leaves" in fact for fact in facts):
        left = [process for process in psutil.process_iter() if process.name() == "xl"]
        resident, proportional = memory(left)
        facts.append(f"xl leaves: {len(left)} process, {resident} KiB resident, {proportional} KiB proportional")
    figures.them("destroy", timed("xl", "destroy", "bench-xl"))


def reboots(figures: Figures) -> None:
    """Measure how long a guest that reboots is without a domain that may run."""
    write("reboot")
    for name, start, end in (
        ("us", ("xenvm", str(XENVM_FILE)), (("xenvm-cmd", UUID, "destroy"), ("xenvm-cmd", UUID, "quit"))),
        ("them", ("xl", "create", "-q", str(XL_FILE)), (("xl", "destroy", "bench-xl"),)),
    ):
        timed(*start)
        store = Store()
        store.quiet()
        getattr(figures, name)("guest's reboot: end to next domain", store.gap())
        time.sleep(2)
        for command in end:
            timed(*command)


def main() -> None:
    """Measure and print."""
    figures, facts = Figures(), []
    for _ in range(int(sys.argv[1])):
        write()
        of_xenvm(figures, facts)
        of_xl(figures, facts)
        reboots(figures)
    same = ("status", "pause", "unpause", "destroy", "guest's reboot: end to next domain")
    pairs = [("start to unpause, cold kernel cache", "start"), ("start to unpause, warm", "start")]
    pairs += [(name, name) for name in same]
    pairs += [("pause after a minute", "pause"), ("destroy after a minute", "destroy")]
    pairs += [("status, one of many over one connection", "status"), (f"a batch of {COMMANDS} status, each", "status")]
    print()
    figures.print([pair for pair in pairs if pair[0] in figures.ours])
    print("\n" + "\n".join(facts))


main()
