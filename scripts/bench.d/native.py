# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure what needs no Xen on this very machine, so that emulation does not hide it: `native.py ROUNDS`, as root.

Wall time and processor time; each process is a fresh one, confined as always. The users of xenvm must exist.
"""

import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import NO_DOMAIN, Domain, DomainState, Done, Init, Phase, Policy
from xenvm.boundary.privileges import Role
from xenvm.boundary.spawn import spawn
from xenvm.broker.children import Child
from xenvm.cli.client import Monitor

UUID = "00000000-0000-0000-0000-0000000be0a7"
COMMANDS = 2000
ROLES = {
    Role.NETWORK: (),
    Role.STORAGE: (),
    Role.IMAGE: (),
    Role.UNPACKER: ("unpack",),
}


def row(name: str, values: list[float], spent: list[float], unit: str = "ms", factor: float = 1000) -> None:
    """Print median and range of the wall time, and the median of the processor time."""
    wall = f"{statistics.median(values) * factor:.1f} {unit} ({min(values) * factor:.1f} to {max(values) * factor:.1f})"
    print(f"| {name} | {wall} | {statistics.median(spent) * factor:.1f} {unit} |", flush=True)


def measured(rounds: int, work: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Return wall and processor seconds of each turn, those of the children included."""
    wall, spent = [], []
    for _ in range(rounds):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        work()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.monotonic() - begin)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return wall, spent


def greeted(role: Role, *arguments: str) -> None:
    """Start a process, wait until it has confined itself and says so, and end it."""
    child = Child(role, 2, {}, UUID, *arguments)
    child.channel.receive(deadline_s=30)
    child.end()


def commands() -> None:
    """Start a supervisor and ask it for its status often, over one connection."""
    broker, theirs = Channel.pair()
    watcher, watched = Channel.pair()
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/vm-{UUID}")
        listener.listen()
        descriptors = {0: 0, 1: 2, 2: 2, 3: theirs.fileno(), 4: listener.fileno(), 5: watched.fileno()}
        pid = spawn(Role.SUPERVISOR, descriptors, UUID)
        broker.receive(deadline_s=30)
        policy = Policy("started", "destroy", "reboot", "destroy", 60, 40)
        numbers = (64, 1, False, True, os.getpid(), -1, -1)
        broker.send(Init(UUID, "bench", "/nonexistent", *numbers, policy, (), {}))
        broker.send(Done(0, Domain(7, DomainState.RUNNING, Phase.BUILT, -1, 65536, 1, 5), ""))
        with Monitor.connect(UUID, socket_dir=directory) as monitor:
            monitor.call("status")
            begin = time.monotonic()
            for _ in range(COMMANDS):
                monitor.call("status")
            seconds = time.monotonic() - begin
    for end in (broker, watcher, theirs, watched):
        end.close()
    os.waitpid(pid, 0)
    print(f"| status over one connection | {COMMANDS / seconds:.0f} a second | |", flush=True)


def frames(rounds: int) -> None:
    """Send messages through a pair of channels."""
    one, other = Channel.pair()
    message = Done(0, NO_DOMAIN, "")

    def trip() -> None:
        for _ in range(1000):
            one.send(message)
            other.receive(deadline_s=1)

    wall, _ = measured(rounds, trip)
    row("a frame sent and decoded", [seconds / 1000 for seconds in wall], [0.0], "us", 1_000_000)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1])
    print("| on this machine | wall time | processor time |\n|---|---|---|")
    bare = [sys.executable, "-I", "-S", "-B", "-c", "pass"]
    row("the bare interpreter", *measured(rounds, lambda: subprocess.run(bare, check=True)))
    for role, arguments in ROLES.items():
        turns = measured(rounds, lambda role=role, arguments=arguments: greeted(role, *arguments))
        row(f"{role}: started, confined, greeted, ended", *turns)
    frames(rounds)
    commands()


main()
