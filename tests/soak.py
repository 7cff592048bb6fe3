# SPDX-License-Identifier: GPL-2.0-or-later
"""Many simulated VMs at once, with all their monitors: random commands and guest events for a long time, or a crowd.

What is counted must stay as it is: processes, descriptors, memory. Run by scripts/soak.
"""

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from vms import SimulatedHost, Vm, json_of, kill, until

from xenvm.errors import XenvmError
from xenvm.supervisor.looking import PAUSE_S, SHARE_S

LASTING = ("broker", "supervisor", "watcher")
CONNECTIONS = {"builder": 2, "hotplug": 1, "network": 1}  # of a helper, to the simulated machine and xenstored
GROWTH = 1.15  # of memory, over a whole run: what an interpreter's allocator keeps
LEAST_MIB = 5 << 10  # a crowd leaves this to whatever else the machine is doing
COMMANDS = (
    *(("pause", {}), ("unpause", {}), ("status", {}), ("domid", {}), ("disk-list", {}), ("doctor", {})),
    *(("nic-add", {}), ("nic-del", {"id": "0", "force": "true"}), ("read-config", {})),
    *(("restart", {"force": "true"}), ("restart", {"timeout": "5"}), ("shutdown", {"timeout": "5"})),
    *(("destroy", {}), ("start", {}), ("start", {"paused": "true"}), ("doctor", {"clean": "true"})),
)
MEMORY = ("Pss:", "Private_Dirty:")


def memory_kib(pid):
    """Proportional and private memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return [sum(int(line.split()[1]) for line in lines if line.startswith(word)) for word in MEMORY]


def switches(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)


def processor_s(host):
    """The processor time that all processes of a host and those that have ended there have used so far."""
    used = 0
    for pid in [host.process.pid, *host.processes()]:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += sum(map(int, stat[11:15]))
    return used / os.sysconf("SC_CLK_TCK")


def free_mib():
    line = next(one for one in Path("/proc/meminfo").read_text().splitlines() if one.startswith("MemAvailable"))
    return int(line.split()[1]) >> 10


def bare_mib():
    """Private memory of an interpreter that has loaded nothing, in MiB."""
    words = [sys.executable, "-I", "-S", "-B", "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(words) as bare:
        time.sleep(1)
        kib = memory_kib(bare.pid)[1]
        bare.kill()
    return kib / 1024


class Count:
    """What there is of all monitors and of the host's process; helpers that wait for the next command do not count."""

    def __init__(self, host):
        parents = {}
        for pid, words in host.processes().items():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                parents[pid] = (int(stat[1]), words[5])
        self.pids = [pid for pid, (_, role) in parents.items() if role in LASTING]
        helpers = [parent for parent, role in parents.values() if role not in LASTING]
        self.processes = len(self.pids)
        self.descriptors, self.pss_kib, self.private_kib = -2 * len(helpers), 0, 0
        self.by_role = dict.fromkeys(LASTING, 0)
        for pid in self.pids:
            with contextlib.suppress(OSError):
                self.descriptors += len(os.listdir(f"/proc/{pid}/fd"))
                pss, private = memory_kib(pid)
                self.pss_kib, self.private_kib = self.pss_kib + pss, self.private_kib + private
                self.by_role[parents[pid][1]] += private
        waiting = sum(CONNECTIONS.get(role, 0) for _, role in parents.values())
        self.host_descriptors = len(os.listdir(f"/proc/{host.process.pid}/fd")) - waiting
        self.host_kib = memory_kib(host.process.pid)[0]

    def __str__(self):
        return (
            f"{self.processes} processes, {self.descriptors} descriptors, {self.pss_kib >> 10} MiB proportional and "
            f"{self.private_kib >> 10} MiB private; host: {self.host_descriptors} descriptors, {self.host_kib >> 10} MiB"
        )


class Soak:
    """Some VMs, and whoever disturbs them."""

    def __init__(self, host, vms, seed):
        self.host, self.random = host, random.Random(seed)
        words = "xenvm.boot_ms=5 xenvm.obey_ms=5"
        self.vms = [Vm(host, host.directory(), words=words, tick_ms=500, on_crash="reboot") for _ in range(vms)]
        self.done = threading.Event()
        self.commands = self.refused = self.events = self.kills = 0
        self.slowest_s = 0.0
        self.wrong = []

    def begin(self):
        for vm in self.vms:
            vm.start()

    def level(self):
        """Have every VM run without added devices, and count."""
        for vm in self.vms:
            with contextlib.suppress(XenvmError):
                vm.ask("destroy")
            vm.ask("start")
            vm.until("running", 60)
        until(lambda: self.host.machine.call("held")["pid"] == 0, "nothing is held")
        time.sleep(PAUSE_S + SHARE_S)  # then all have looked what has ended
        return Count(self.host)

    def disturb(self, seconds):
        """Give random commands from four sides, and let guests end and supervisors die, for so long."""
        end = time.monotonic() + seconds
        self.done.clear()
        sides = [threading.Thread(target=self._commands, args=(self.random.random(),)) for _ in range(4)]
        for side in sides:
            side.start()
        while time.monotonic() < end:
            time.sleep(self.random.uniform(0.2, 0.8))
            with contextlib.suppress(XenvmError, OSError, ValueError):
                self._event()
        self.done.set()
        for side in sides:
            side.join()

    def _commands(self, seed):
        chance = random.Random(seed)
        while not self.done.is_set():
            vm = chance.choice(self.vms)
            method, params = chance.choice(COMMANDS)
            begin = time.monotonic()
            try:
                with vm.connect(60) as monitor:
                    monitor.call(method, **params)
            except XenvmError as error:
                self.refused += 1
                if "Traceback" in error.message or not error.message:
                    self.wrong.append(f"{method}: {error.message}")
            except Exception as error:
                self.wrong.append(f"{method}: {error!r}")
            self.commands += 1
            if method in ("status", "domid"):
                self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
            time.sleep(chance.uniform(0.0, 0.1))

    def _event(self):
        self.events += 1
        if self.random.random() < 0.1:
            pid = self.random.choice(self.vms).pids().get(self.random.choice(("supervisor", "watcher")))
            if pid:
                self.kills += 1
                kill(pid)
            return
        domids = list(self.host.domains().values())
        if domids:
            call = self.random.choice(("shutdown", "shutdown", "shutdown", "destroy"))
            arguments = {"reason": self.random.choice((0, 1, 3))} if call == "shutdown" else {}
            self.host.machine.call(call, domid=self.random.choice(domids), **arguments)

    def end(self):
        for vm in self.vms:
            vm.end()
        until(lambda: not self.host.processes(), "all processes have ended", 60)
        assert self.host.domains() == {}
        assert self.host.devices()["backends"] == []
        assert self.host.machine.call("devices")["loops"] == []


def soak(vms, seconds, seed):
    """Run; raise AssertionError when something grows, is lost or left. Return lines that tell of it."""
    host = SimulatedHost()
    one = Soak(host, vms, seed)
    try:
        one.begin()
        one.disturb(min(20, seconds / 3))  # all code has run once then
        first = one.level()
        one.disturb(seconds)
        last = one.level()
        lines = [
            f"{vms} VMs, {seconds} s, seed {seed}: {one.commands} commands ({one.refused} refused or failed in words), "
            f"{one.events} guest events, {one.kills} supervisors and watchers killed",
            f"slowest status {one.slowest_s:.2f} s",
            f"before: {first}",
            f"after:  {last}",
        ]
        print("\n".join(lines), flush=True)
        assert one.wrong == [], f"these commands failed without words: {one.wrong[:5]}"
        assert (last.processes, last.processes) == (first.processes, 3 * vms), "there are more or fewer processes"
        assert last.descriptors == first.descriptors, "there are more or fewer descriptors"
        assert last.host_descriptors == first.host_descriptors, "there are more or fewer descriptors of the host"
        assert last.private_kib < first.private_kib * GROWTH, "the memory of the monitors has grown"
        assert last.host_kib < first.host_kib * GROWTH + 4096, "the memory of the host has grown"
        one.end()
        return lines
    except BaseException:
        for vm in one.vms:
            if not vm.socket.exists():
                print(vm.uuid, vm.acts.read_text()[-2500:], *vm.host.logs.glob(f"{vm.uuid}.log"), file=sys.stderr)
                print((host.logs / f"{vm.uuid}.log").read_text()[-1500:], file=sys.stderr)
        raise
    finally:
        for pid in host.processes():
            kill(pid)
        if sys.exc_info()[0]:
            host.again()
        host.close()


def crowd(limit):
    """Start VMs, up to `limit` or as memory allows; command, reboot and stop all of them; print figures per VM."""
    host = SimulatedHost()
    try:
        made = []
        begin = time.monotonic()
        took = []
        while len(made) < limit and free_mib() > LEAST_MIB:
            vm = Vm(host, host.directory(), words="xenvm.boot_ms=5 xenvm.obey_ms=5", tick_ms=600_000)
            once = time.monotonic()
            vm.start()
            took.append(time.monotonic() - once)
            made.append(vm)
        n = len(made)
        print(
            f"{n} VMs started in {time.monotonic() - begin:.0f} s, one after the other: {statistics.median(took):.2f} s"
        )
        print(
            f"each (median), the last ten {statistics.median(took[-10:]):.2f} s; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        time.sleep(70)  # helpers that wait for a next command have ended then
        count = Count(host)
        print(f"idle: {count}")
        print(
            f"per VM: {count.processes / n:.1f} processes, {count.descriptors / n:.1f} descriptors, "
            f"{count.pss_kib / n / 1024:.1f} MiB proportional, {count.private_kib / n / 1024:.1f} MiB private, "
            f"{count.host_kib / n:.0f} KiB of the host's process",
            flush=True,
        )
        each = ", ".join(f"{role} {kib / n / 1024:.1f}" for role, kib in count.by_role.items())
        print(f"private memory of each process, in MiB: {each}; a bare interpreter {bare_mib():.1f}")
        assert count.processes == 3 * n
        before = sum(map(switches, count.pids))
        time.sleep(20)
        print(
            f"switched in within 20 s, all {3 * n} processes together: {sum(map(switches, count.pids)) - before} times"
        )
        used = []
        for vm in made[:: max(1, n // 5)]:
            before = processor_s(host)
            vm.ask("restart", timeout="60")
            time.sleep(5)  # until nobody looks any more
            used.append(processor_s(host) - before)
        print(
            f"processor time of one VM's reboot, with all that follows from it on the host: "
            f"{statistics.median(used):.2f} s ({min(used):.2f} to {max(used):.2f})",
            flush=True,
        )
        for name, act in (
            ("status", lambda vm: vm.ask("status")),
            ("pause and unpause", lambda vm: (vm.ask("pause"), vm.ask("unpause"))),
            ("reboot", lambda vm: vm.ask("restart", timeout="60")),
        ):
            once = time.monotonic()
            every = []
            for vm in made:
                single = time.monotonic()
                act(vm)
                every.append(time.monotonic() - single)
            print(
                f"{name}: {time.monotonic() - once:.1f} s for all, {1000 * statistics.median(every):.0f} ms each (median), "
                f"{1000 * max(every):.0f} at most",
                flush=True,
            )
        listed = json_of(host.run("xenvm-cmd", "--json", "list"))
        assert len(listed) == n, len(listed)
        assert all(one["state"] == "running" for one in listed)
        once = time.monotonic()
        for vm in made:
            vm.ask("shutdown", timeout="60")
            vm.ask("quit")
        until(lambda: not host.processes(), "all processes have ended", 120)
        print(f"shut down and quit: {time.monotonic() - once:.0f} s for all")
        assert host.domains() == {}
        assert [path for path in host.xenstore() if path.startswith(("/xenvm", "/vm"))] == []
    finally:
        for pid in host.processes():
            kill(pid)
        host.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vms", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--crowd", type=int, default=0, help="instead: so many VMs, if memory allows")
    asked = parser.parse_args()
    if asked.crowd:
        crowd(asked.crowd)
    else:
        soak(asked.vms, asked.seconds, asked.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
