# SPDX-License-Identifier: GPL-2.0-or-later
"""The fault matrix: every operation of several steps, with something dying or lacking at each of its points.

On a simulated host the points are numbered: each effect of the operation on hypervisor, kernel and xenstore is one, and
is held while the fault is made (xenvm/simulator/points.py). On Xen they are samples in time, from the beginning of the
operation to its end. No fault hook is in the programs themselves.

After each fault: the guest runs, or has ended as the command or its policy wanted; the monitor answers, or the next
`xenvm FILE` takes over; the next commands work; `doctor` finds nothing; and when the VM is gone, so is everything.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
import traceback

from faultcases import ABSENT, MISSED, PAIRS, VICTIMS, Numbered, Sampled, count, hurried
from operations import OPERATIONS
from vms import SimulatedHost, Vm, XenHost, kill, until

from xenvm.errors import XenvmError


def named(effect, uuid=r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"):
    return re.sub(
        r"/(vif|vbd)/\d+/\d+", r"/\1/N/N", re.sub(r"domain/[1-9]\d*", "domain/N", re.sub(uuid, "UUID", effect))
    )


def recover(host):
    """After a run that failed: leave nothing to the next one."""
    if host.simulated:
        host.again()
        return
    for pid in host.processes():
        kill(pid)
    until(lambda: not host.processes(), "all processes have ended", 20)
    for path in host.directory().parent.glob("tmp*/*.cfg"):  # what is half there, the programs themselves remove
        with contextlib.suppress(XenvmError, OSError):
            vm = Vm(host, path.parent, uuid=path.stem)
            vm.end()


def why_of(error):
    return " ".join(f"{error!s:.400}".split())


LONG_S = 90.0  # of a run, on Xen


class Table:
    """The results, printed as they come."""

    def __init__(self, pairs):
        self.pairs, self.runs, self.missed, self.failed, self.took = pairs, 0, 0, [], []

    def head(self):
        print("o: the operation succeeded all the same; x: it failed in words, and all was well again; F: a fault of")
        print(
            "   xenvm. Nothing was struck, and no run is counted: -: no such victim there; m: it, or the operation, had"
        )
        print("   ended before. The columns:")
        for number, (victim, how) in enumerate(self.pairs, 1):
            print(f"   {number:2d} {victim}: {how}")
        print(f"\n{'operation, point':62s} " + " ".join(f"{number:2d}" for number in range(1, len(self.pairs) + 1)))

    def cell(self, case):
        begin = time.monotonic()
        try:
            letter, seconds = case.run()
            self.took.append((seconds, str(case)))
            self.runs += letter not in (ABSENT, MISSED)
            self.missed += letter == MISSED
        except Exception as error:
            letter = "F"
            self.runs += 1
            self.failed.append((str(case), f"{error!s:.600}", traceback.format_exc()))
            with contextlib.suppress(OSError):
                self.failed[-1] = (*self.failed[-1][:2], self.failed[-1][2] + case.vm.acts.read_text()[-1500:])
            print(f"FAULT {case}: {why_of(error)}", file=sys.stderr, flush=True)
            recover(case.host)
        if (whole_s := time.monotonic() - begin) > LONG_S:
            print(f"({case}: {whole_s:.0f} s with all that was looked at)", file=sys.stderr, flush=True)
        print(f"{letter:>2s}", end=" ", flush=True)

    def end(self):
        self.took.sort(reverse=True)
        longest = "; ".join(f"{case}: {seconds:.1f} s" for seconds, case in self.took[:5])
        missed = f" ({self.missed} more missed their victim)" if self.missed else ""
        print(f"\n{self.runs} runs{missed}, {len(self.failed)} faults; what took longest to be well again: {longest}")
        for name, why, trace in self.failed:
            print(f"\nFAULT {name}: {why}\n{trace}")
        return 1 if self.failed else 0


def simulated(chosen, pairs, every):
    """Run the matrix on simulated hosts: one as it is, and one whose jobs have less time, for helpers that stand still."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        host, hasty = SimulatedHost(), SimulatedHost(hurried(directory))
        table = Table(pairs)
        table.head()
        turn = 0
        try:
            for name in chosen:
                effects = count(host, name)
                Numbered.effects[name] = len(effects)
                for point, effect in enumerate([*effects, "all is done"], 1):
                    turn += 1
                    if turn % every:
                        continue
                    print(f"{name + ' ' + str(point) + ': ' + named(effect):62.62s} ", end="", flush=True)
                    for victim, how in pairs:
                        where = hasty if (victim, how) == ("worker", "stop") else host
                        table.cell(Numbered(where, name, point, victim, how))
                    print()
        finally:
            for one in (host, hasty):
                one.close()
        return table.end()


KILLS = [pair for pair in PAIRS if pair[1] == "kill"]
ON_XEN = [
    ("attach card", (0.2, 0.5, 0.8), [*KILLS, ("supervisor", "stop"), ("broker", "descriptors")]),
    ("attach", (0.2, 0.5, 0.8), [*KILLS, ("watcher", "stop"), ("broker", "memory")]),
    ("pause", (0.3, 0.8), KILLS),
    ("checkpoint", (0.3, 0.6, 0.9), [*KILLS, ("worker", "space")]),
    ("adopt", (0.3, 0.7), KILLS),
    ("restart", (0.3, 0.7), [("worker", "kill"), ("broker", "kill")]),
    ("build", (0.5,), [("worker", "kill"), ("broker", "kill")]),
]
"""Operations, parts of their time, and what happens then. What a guest lives through, one guest lives through."""


def on_xen(chosen, wanted, limit_s):
    """Run samples of the matrix in dom0, as many as fit into the time."""
    host = XenHost()
    host.make_bridge()
    end = time.monotonic() + limit_s
    table = Table(PAIRS)
    table.head()
    left_out = 0
    try:
        for name, points, pairs in ON_XEN:
            if name not in chosen:
                continue
            operation = OPERATIONS[name](host, host.directory())
            operation.prepare()
            begin = time.monotonic()
            client = operation.begin()
            assert client.wait(timeout=300) == 0, client.communicate()[0]
            Sampled.lengths[name] = time.monotonic() - begin
            if operation.alive:
                operation.mend(operation.vm.until("paused" if name == "pause" else "running")["state"], 0)
            else:
                operation.vm.end()
            for point in points:
                print(f"{name + f', at {point:.0%} of {Sampled.lengths[name]:.1f} s':62.62s} ", end="", flush=True)
                for pair in PAIRS:
                    if pair not in pairs or pair not in wanted:
                        print("  ", end=" ")
                    elif time.monotonic() > end:
                        left_out += 1
                        print(" .", end=" ")
                    else:
                        table.cell(Sampled(host, name, point, *pair, operation if operation.alive else None))
                        if operation.alive and table.failed and table.failed[-1][0].startswith(name):
                            operation = OPERATIONS[name](host, host.directory())
                            operation.prepare()
                print()
            if operation.alive:
                operation.vm.end()
    finally:
        recover(host)
        host.remove_bridge()
        host.close()
    print(f"{left_out} left out for want of time (.)")
    return table.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("host", choices=["simulator", "xen"])
    parser.add_argument("--operation", action="append", choices=sorted(OPERATIONS))
    parser.add_argument("--victim", action="append", choices=sorted(VICTIMS))
    parser.add_argument("--how", action="append")
    parser.add_argument("--every", type=int, default=1, help="take one point of so many")
    parser.add_argument("--seconds", type=int, default=600, help="on Xen: begin no run after so long")
    asked = parser.parse_args()
    chosen = asked.operation or list(OPERATIONS)
    pairs = [
        (victim, how)
        for victim, how in PAIRS
        if (not asked.victim or victim in asked.victim) and (not asked.how or how in asked.how)
    ]
    if asked.host == "xen":
        return on_xen(chosen, pairs, asked.seconds)
    return simulated(chosen, pairs, asked.every)


if __name__ == "__main__":
    sys.exit(main())
