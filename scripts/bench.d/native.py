# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure what needs no Xen on this very machine, so that emulation does not hide it: `native.py ROUNDS`, as root.

Wall time and processor time; each process is a fresh one, confined as always. The users of xenvm must exist.
"""

import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from xenvm.boundary.checks import Message
from xenvm.boundary.frames import Channel
from xenvm.boundary.images import Inspect, Pack
from xenvm.boundary.messages import NO_DOMAIN, Domain, DomainState, Done, Grants, Init, Phase, Policy
from xenvm.boundary.privileges import Role
from xenvm.boundary.spawn import spawn
from xenvm.broker.children import Child
from xenvm.cli.client import Monitor
from xenvm.helpers import saved
from xenvm.helpers.stream import records

UUID = "00000000-0000-0000-0000-0000000be0a7"
COMMANDS = 2000
ROLES = {
    Role.NETWORK: (),
    Role.STORAGE: (),
    Role.IMAGE: (),
    Role.UNPACKER: ("unpack",),
    Role.STREAM: (),
}
IDLE = (True, (), (), False, "", (), (), 40)  # the rest of a guest's grants


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


def record(kind: int, body: bytes = b"") -> bytes:
    """Return a record of a stream of libxenguest."""
    return saved.RECORD.pack(kind, len(body)) + body + bytes(-len(body) % 8)


def image(memory_mib: int) -> Iterator[bytes]:
    """Yield an image of a guest of this size as a builder writes it; half of its pages are zero, the others random."""
    frames = memory_mib << 8
    yield saved.head(Grants(UUID, "bench", "/k", "", "", memory_mib, memory_mib, 1, *IDLE)).content
    yield records.LIBXC.pack(records.LIBXC_MARKER, records.LIBXC_IDENT, records.LIBXC_VERSION, 0, 0, 0)
    yield records.DOMAIN.pack(records.PV, records.PAGE_SHIFT, 0, 4, 17)
    yield record(records.PV_INFO, bytes([8, 4, 0, 0, 0, 0, 0, 0])) + record(records.CPUID_POLICY, bytes(24))
    yield record(records.STATIC_DATA_END)
    yield record(records.P2M_FRAMES, struct.pack("<II", 0, frames - 1) + bytes(8 * (frames // 512)))
    zeros, size = bytes(records.PAGE_BYTES), records.PAGE_BYTES * records.PAGES_LIMIT // 2
    for first in range(0, frames, records.PAGES_LIMIT):
        numbers = struct.pack(f"<{records.PAGES_LIMIT}Q", *range(first, first + records.PAGES_LIMIT))
        noise = os.urandom(size)
        contents = b"".join(noise[at : at + records.PAGE_BYTES] + zeros for at in range(0, size, records.PAGE_BYTES))
        yield record(records.PAGE_DATA, records.PAGES.pack(records.PAGES_LIMIT, 0) + numbers + contents)
    yield record(records.SHARED_INFO, bytes(4096)) + record(records.VCPU_BASIC, bytes(64)) + record(records.END)
    yield saved.TAIL


def peak_kib(pid: int) -> int:
    """Return the most memory that a process has had resident."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def worker(request: Message, *descriptors: int) -> Child:
    """Start a stream worker with its request."""
    child = Child(Role.STREAM, 2, {}, UUID)
    child.channel.receive(deadline_s=30)
    child.channel.send(request, descriptors)
    os.close(descriptors[1])
    return child


def packed(memory_mib: int) -> None:
    """Have an image compressed, checked, and fed to a builder; print how long it took, and how much memory."""
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        exit_end, entrance = os.pipe()
        child = worker(Pack(memory_mib << 10), file.fileno(), exit_end)
        child.channel.receive(deadline_s=30)
        begin = time.monotonic()
        with os.fdopen(entrance, "wb") as pipe:
            for piece in image(memory_mib):
                pipe.write(piece)
            pipe.flush()
            pack_kib = peak_kib(child.pid)
        child.channel.receive(deadline_s=600)
        pack_s = time.monotonic() - begin
        child.end()
        length = os.fstat(file.fileno()).st_size
        exit_end, entrance = os.pipe()
        begin = time.monotonic()
        child = worker(Inspect(memory_mib << 10), file.fileno(), entrance)
        child.channel.receive(deadline_s=600)
        check_s = time.monotonic() - begin
        left = 0
        while more := len(os.read(exit_end, 1 << 20)):
            if left // (64 << 20) != (left + more) // (64 << 20):
                feed_kib = peak_kib(child.pid)
            left += more
        os.close(exit_end)
        child.end()
    what = f"image of {memory_mib} MiB"
    print(f"| {what}: compressed to {length >> 20} MiB | {pack_s:.2f} s | peak {pack_kib >> 10} MiB |")
    print(
        f"| {what}: unpacked and checked, then fed | {check_s:.2f} s before | peak {feed_kib >> 10} MiB |", flush=True
    )


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1])
    print("| on this machine | wall time | processor time |\n|---|---|---|")
    bare = [sys.executable, "-I", "-S", "-B", "-c", "pass"]
    row("the bare interpreter", *measured(rounds, lambda: subprocess.run(bare, check=True)))
    for role, arguments in ROLES.items():
        turns = measured(rounds, lambda role=role, arguments=arguments: greeted(role, *arguments))
        row(f"{role}: started, confined, greeted, ended", *turns)
    for memory_mib in (128, 1024):
        packed(memory_mib)
    frames(rounds)
    commands()


main()
