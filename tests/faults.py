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
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import vms
from vms import MIB, SimulatedHost, Vm, XenHost, kill, until

from xenvm.errors import XenvmError

HOWS = ("kill", "stop", "memory", "descriptors", "space")
LIMITS = {
    "memory": ("Max address space", "as", MIB),
    "descriptors": ("Max open files", "nofile", 0),
    "space": ("Max file size", "fsize", 0),
}
VICTIMS = {
    "worker": HOWS,
    "broker": HOWS,
    "supervisor": ("kill", "stop", "memory", "descriptors"),
    "watcher": ("kill", "stop"),
    "client": ("kill",),
    "xenstored": ("restart", "gone"),
}
PAIRS = [(victim, how) for victim, hows in VICTIMS.items() for how in hows]
WORKERS = ("builder", "hotplug", "network", "image", "storage", "stream", "unpacker")
PAUSE_S = 1.5  # how long a broker is stopped, or xenstored gone
DEADLINE_S = 4  # of a job, in the copy of the programs that is tested where helpers are stopped
SETTLED_S = 60.0 if os.environ.get("XENVM_TEST_HOST") != "xen" else 180.0


def hurried(directory):
    """Return a copy of the programs in which a job has four seconds: a stopped helper shows by its deadline alone."""
    root = Path(directory) / "hurried"
    shutil.copytree(vms.ROOT / "xenvm", root / "xenvm", ignore=shutil.ignore_patterns("__pycache__"))
    table = root / "xenvm/broker/phases.py"
    text = re.sub(r"(Permit\(\w+, \d+, )[1-9]\d*\)", rf"\g<1>{DEADLINE_S})", table.read_text())
    text = re.sub(r"(_SHORT_S: Final = ).*", rf"\g<1>{DEADLINE_S}", text)
    text = re.sub(r"(START_DEADLINE_S: Final = ).*", rf"\g<1>{DEADLINE_S}.0", text)
    table.write_text(re.sub(r"(IMAGE_S_PER_MIB: Final = ).*", r"\g<1>0.01", text))
    spec = importlib.util.spec_from_file_location("hurried_phases", table)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    assert {permit.deadline_s for permit in changed.PERMITS.values()} <= {0, DEADLINE_S}  # all of them
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


class Operation(ABC):
    """One operation, on a VM of its own. `alive` is whether the guest that was there must live through any fault."""

    name = ""
    alive = True
    settings = MappingProxyType({})
    without_store = False
    taken_over = False  # by another monitor, which has started what was off

    def __init__(self, host, folder):
        self.host, self.folder = host, Path(folder)
        self.file, self.disk = self.folder / "guest.img", self.folder / "disk.img"
        self.disk.write_bytes(bytes(MIB))
        self.disk.chmod(0o666)
        words = "xenvm.boot_ms=1 xenvm.obey_ms=1"
        settings = {"nic": f"bridge={host.bridge}", "on_reboot": "reboot", **self.settings}
        self.vm = Vm(host, folder, words=words, **{key: self._text(value) for key, value in settings.items()})

    def _text(self, value):
        return value.format(folder=self.folder) if isinstance(value, str) else value

    def prepare(self):
        """Bring the VM to where the operation begins."""
        self.vm.start()
        self.vm.up()

    def again(self):  # noqa: B027 - not all have such a step
        """The same for a guest that is there already."""

    @abstractmethod
    def begin(self):
        """Begin the operation; return the process of the client."""

    def mend(self, state, code):
        """Bring a VM in a lasting state back to a running guest, by what an administrator would do."""
        assert state in ("running", "shutdown", "suspended"), state
        if state == "running":
            return
        assert not self.alive, f"the guest was lost: {self.vm.status()}"
        self.vm.ask("start")

    def checks(self, certain):  # noqa: B027 - not all have such a step
        """What else must be so in the end; `certain` is whether the client could learn what has become of the guest."""


class Build(Operation):
    name, alive = "build", False
    settings = MappingProxyType({"disk": "{folder}/disk.img:file:xvda:w:disk"})

    def prepare(self):
        pass

    def begin(self):
        return self.vm.begin()


class Adopt(Operation):
    name = "adopt"

    def prepare(self):
        super().prepare()
        self.again()

    def again(self):
        self.vm.ask("quit")
        until(lambda: not self.vm.lock.exists(), "the monitor has ended")

    def begin(self):
        return self.vm.begin()


class Attach(Operation):
    name = "attach"

    def begin(self):
        return self.vm.begin_cmd("disk-add", f"{self.disk}:file:xvdb:w:disk")

    def mend(self, state, code):
        super().mend(state, code)
        listed = self.vm.ask("disk-list").text
        if code == 0:
            assert "xvdb" in listed, listed
        if "xvdb" not in listed:
            done = self.host.run("xenvm-cmd", self.vm.uuid, "disk-add", f"{self.disk}:file:xvdb:w:disk")
            assert done.returncode == 0, done.stderr
        self.vm.ask("disk-del", device="xvdb")


class Plug(Operation):
    name = "attach card"

    def begin(self):
        return self.vm.begin_cmd("nic-add", "id=3")

    def mend(self, state, code):
        super().mend(state, code)
        listed = self.vm.ask("nic-list").text
        if not re.search(r"^3\b", listed, re.MULTILINE):
            assert code != 0, listed
            self.vm.ask("nic-add", id="3")
        self.vm.ask("nic-del", id="3")


class Detach(Operation):
    name = "detach"
    settings = MappingProxyType({"disk": "{folder}/disk.img:file:xvda:w:disk"})

    def begin(self):
        return self.vm.begin_cmd("disk-del", "xvda")

    def mend(self, state, code):
        super().mend(state, code)
        if "xvda" in self.vm.ask("disk-list").text:
            assert code != 0
            self.vm.ask("disk-del", device="xvda")
        assert "xvda" not in self.vm.ask("disk-list").text


class Pause(Operation):
    name = "pause"

    def begin(self):
        return self.vm.begin_cmd("pause")

    def mend(self, state, code):
        if state in ("paused", "created"):
            self.vm.ask("unpause")
        else:
            super().mend(state, code)


class Checkpoint(Operation):
    name = "checkpoint"

    def begin(self):
        self.file.write_text("older")
        self.file.chmod(0o666)
        return self.vm.begin_cmd("checkpoint", str(self.file), "timeout=3")

    def mend(self, state, code):
        super().mend(state, code)
        whole = self.file.stat().st_size > MIB
        assert whole or code != 0
        assert whole or self.file.read_text() == "older"

    def checks(self, certain):
        names = {path.name for path in self.folder.iterdir() if path.suffix != ".cfg"}
        if not certain:  # nobody was left who knew whether the guest runs on: then the older file is kept, and told of
            names = {name for name in names if not name.endswith(".before")}
        assert names == {"disk.img", "guest.img"}, names


class Save(Checkpoint):
    """The guest is either in a whole image, or lives on."""

    name, alive = "save", False

    def begin(self):
        self.file.write_text("older")
        self.file.chmod(0o666)
        return self.vm.begin_cmd("suspend", str(self.file), "timeout=3")

    def mend(self, state, code):
        if state == "running":
            Checkpoint.mend(self, state, 1)
            assert self.file.stat().st_size > MIB or self.vm.boots() == 1, "the guest was lost"
            return
        assert state in ("suspended", "shutdown"), state
        assert self.file.stat().st_size > MIB
        done = self.host.run("xenvm-cmd", self.vm.uuid, "restore", str(self.file))
        assert done.returncode == 0, done.stderr


class Restore(Checkpoint):
    name, alive = "restore", False

    def prepare(self):
        super().prepare()
        done = self.host.run("xenvm-cmd", self.vm.uuid, "suspend", str(self.file))
        assert done.returncode == 0, done.stderr
        self.vm.write(startup="shutdown")

    def begin(self):
        return self.vm.begin_cmd("restore", str(self.file))

    def mend(self, state, code):
        if state == "running":
            return
        assert code != 0
        done = self.host.run("xenvm-cmd", self.vm.uuid, "restore", str(self.file))
        assert done.returncode == 0, done.stderr


class Destroy(Operation):
    name, alive = "destroy", False

    def begin(self):
        return self.vm.begin_cmd("destroy")

    def mend(self, state, code):
        assert state != "running" or code != 0 or self.taken_over
        super().mend(state, code)


class Restart(Operation):
    """The command that cuts a guest off and builds it anew: the user is told when it fails, and the VM is off then."""

    name, alive = "restart", False

    def begin(self):
        return self.vm.begin_cmd("restart", "force=true")


class Reboot(Operation):
    """The guest's own: nobody is there who could be told, so it has to come back."""

    name = "reboot"

    def mend(self, state, code):
        if state == "shutdown" and "xenstored" in self.vm.status()["reason"] and self.without_store:
            self.alive = False  # without xenstored nothing can be built, and the status says so
        super().mend(state, code)

    def begin(self):
        waiting = self.vm.begin_cmd("wait", "state=rebooting", "timeout=20")
        until(lambda: self.vm.ask("status"), "it waits")
        with self.vm.connect(60) as monitor:
            terminal = monitor.call("console").take_descriptor()
        os.write(terminal, b"reboot\n" if self.host.simulated else b"reboot -f\n")
        os.close(terminal)
        return waiting


OPERATIONS = {
    kind.name: kind
    for kind in (
        *(Build, Adopt, Pause, Attach, Plug, Detach, Checkpoint, Save, Restore),
        *(Destroy, Restart, Reboot),
    )
}


def limit(host, pid, how):
    """Let a process have no more of something; return what gives it back."""
    name, option, value = LIMITS[how]
    line = next(one for one in Path(f"/proc/{pid}/limits").read_text().splitlines() if one.startswith(name))
    soft, hard = line.removeprefix(name).split()[:2]

    def put(limit):  # in the name of whoever the process runs as
        vms.run("prlimit", "--pid", str(pid), f"--{option}={limit}:{hard}", **host.options())

    put(value)
    return lambda: put(soft)


class Case(ABC):
    """One run: an operation, a point of it, a victim, and what happens to it."""

    def __init__(self, host, name, point, victim, how, operation=None):
        """With an `operation` its guest is there already, and stays."""
        self.host, self.name, self.point, self.victim, self.how = host, name, point, victim, how
        self.stays = operation is not None
        self.operation = operation or OPERATIONS[name](host, host.directory())
        self.vm = self.operation.vm
        self.client = None
        self.operation.without_store = (victim, how) == ("xenstored", "gone")

    def __str__(self):
        return f"{self.name} {self.point} {self.victim} {self.how}"

    def run(self):
        """Do it all; return a letter for how the operation itself ended, and how long it took to be well again."""
        before = self.there()
        if self.stays:
            self.operation.again()
        else:
            self.operation.prepare()
        self.client = self.reach()
        if self.client is None:
            if self.stays:  # the operation has been done
                self.settle(0)
            else:
                self.vm.end()
            return "-", 0.0
        struck = time.monotonic()
        after = self.strike()
        code = self.finish()
        for undo in after:
            undo()
        self.settle(code)
        whole_s = time.monotonic() - struck
        self.commands()
        self.operation.checks(self.victim not in ("broker", "client"))
        if not self.stays:
            self.vm.end()
            until(lambda: self.vm.left() == [], "nothing is left of the VM", 20)
        until(lambda: self.there() == before, f"all is as it was: {before}", 30)
        assert self.vm.broker_log_is_calm(), "the monitor's log has a traceback"
        return ("o" if code == 0 else "x"), whole_s

    def there(self):
        """What there is on the host of guests and their devices."""
        nodes = [path for path in self.host.xenstore() if re.search(r"^/xenvm|/backend|/device/|^/vm", path)]
        return self.host.devices(), nodes

    # To the point

    @abstractmethod
    def reach(self):
        """Begin the operation and let it come to its point; None when the victim has no part in it there."""

    def strike(self):
        """Do to the victim what is to be done; return what undoes it when the operation has ended."""
        if self.victim == "xenstored":
            return self.strike_store()
        pid = self.pid()
        assert pid, f"there is no {self.victim}"
        if self.how == "kill":
            kill(pid)
        elif self.how == "stop":
            os.kill(pid, signal.SIGSTOP)
            if self.victim == "broker":
                return self.stopped_broker(pid)
        else:
            after = [limit(self.host, pid, self.how)]
            self.go_on()
            return after
        self.go_on()
        return []

    def stopped_broker(self, pid):
        """It stands still for a while: status answers meanwhile, and then all goes on."""
        self.go_on()
        time.sleep(PAUSE_S)
        if self.vm.socket.exists() and self.name not in ("build", "adopt"):
            assert self.vm.state
        os.kill(pid, signal.SIGCONT)
        return []

    @abstractmethod
    def strike_store(self):
        """Do to xenstored what is to be done; return what undoes it."""

    def go_on(self):  # noqa: B027 - not all have such a step
        """Let what is held go on."""

    def pid(self):
        if self.victim == "client":
            return self.client.pid
        return self.vm.pids().get(self.victim, 0)

    # And on

    def finish(self):
        try:
            self.client.communicate(timeout=SETTLED_S)
        except vms.subprocess.TimeoutExpired:
            kill(self.client.pid)
            raise AssertionError(f"the command hangs: {self.client.communicate()[0]}") from None
        return self.client.returncode

    def served(self):
        """Tell whether a monitor that has not ended holds the VM."""
        try:
            words = Path(f"/proc/{self.vm.broker()}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return False
        return b"broker" in words

    def settle(self, code):
        """Wait for a lasting state, with the next `xenvm FILE` where no monitor is left; then have the guest run."""
        if self.name in ("build", "adopt") and code and self.victim != "client":
            until(lambda: not self.served(), "a monitor whose start failed ends")
        if not self.served() or (self.victim == "broker" and self.how in ("kill", "memory")):
            self.take_over()
        for _ in range(3):  # the monitor may have looked away just when something happened, and looks again
            if (state := until(self.lasting, "a lasting state", SETTLED_S)) == "unserved":
                self.take_over()
                state = until(self.lasting, "a lasting state", SETTLED_S)
            if state == "crashed":  # half of it could not be destroyed in time: that is tried again
                self.vm.ask("destroy")
                state = self.vm.state
            self.operation.mend(state, code)
            until(lambda: self.now().get("state") == "running", "the guest runs")
            before = len(self.vm.ticks())
            until(
                lambda seen=before: len(self.vm.ticks()) != seen or self.now().get("state") != "running",
                f"the guest ticks, or is told not to run: {self.now()}",
            )
            if self.now().get("state") == "running":
                break
        if self.operation.alive and self.name not in ("reboot",):
            assert self.vm.boots() == 1, "the guest was lost, and another one runs"

    def take_over(self):
        with contextlib.suppress(AssertionError):
            until(lambda: not self.served(), "the broker has ended", 5)
        if self.served():
            return
        until(lambda: not self.vm.pids_left(), "all processes of the monitor have ended", 30)
        self.operation.taken_over = True
        self.vm.start()

    def now(self):
        with contextlib.suppress(XenvmError, OSError):
            return self.vm.status()
        return {}

    def lasting(self):
        now = self.now()
        if not now:
            return "unserved" if not self.served() else None
        state = now["state"]
        if self.name == "reboot" and state == "running" and self.vm.boots() < 2:
            return None
        return (
            state
            if not now["busy"] and state in ("running", "paused", "created", "shutdown", "suspended", "crashed")
            else None
        )

    def commands(self):
        """The next commands work, and nothing is missing or left over."""
        self.vm.ask("pause")
        self.vm.ask("unpause")
        done = self.host.run("xenvm-cmd", self.vm.uuid, "doctor")
        assert done.returncode == 0, done.stdout + done.stderr


class Numbered(Case):
    """On a simulated host: the point is the number of an effect, which is held."""

    effects: ClassVar = {}
    """How many each operation has; the point behind the last is when that has happened, and nobody knows it yet."""

    def reach(self):
        last = self.effects[self.name]
        self.host.machine.call("points", number=min(self.point, last))
        client = self.operation.begin()
        until(lambda: self.held() or (client.poll() is not None and self.name != "reboot"), f"point {self.point}")
        self.caller = self.held()
        if self.caller and self.victim == "worker" and self.caller in (self.vm.broker(), client.pid):
            self.go_on()
            client.wait()
            return None
        assert self.caller, client.communicate()[0]
        if self.point > last:
            os.kill(self.caller, signal.SIGSTOP)
            self.host.machine.call("points", number=-1)
        return client

    def held(self):
        return self.host.machine.call("held")["pid"]

    def go_on(self):
        self.held()  # by then the host knows of connections that have ended
        self.host.machine.call("points", number=-1)
        if self.point > self.effects[self.name] and (self.victim, self.how) != ("worker", "stop"):
            kill(self.caller, signal.SIGCONT)

    def pid(self):
        return self.caller if self.victim == "worker" else super().pid()

    def strike_store(self):
        path = self.host.store
        away = path.with_name("away")
        if self.how == "gone":
            path.rename(away)
        self.host.machine.call("disconnect")
        self.go_on()
        if self.how == "gone":
            time.sleep(PAUSE_S)
            away.rename(path)
        return []


class Sampled(Case):
    """On Xen: the point is a part of the time that the operation takes."""

    lengths: ClassVar = {}

    def strike_store(self):
        raise AssertionError("a real xenstored cannot be started again: it is a victim on a simulated host only")

    def reach(self):
        client = self.operation.begin()
        time.sleep(self.lengths[self.name] * self.point)
        if self.victim == "worker":
            until(lambda: self.pid() or client.poll() is not None, "a worker, or the end")
            if not self.pid():
                client.wait()
                return None
        return client

    def pid(self):
        if self.victim != "worker":
            return super().pid()
        there = self.vm.pids()
        return next((there[role] for role in WORKERS if role in there), 0)

    def strike(self):
        try:
            return super().strike()
        except (ProcessLookupError, AssertionError):
            return []  # it had ended by itself


def count(host, name):
    """Return the effects of an operation that nothing disturbs."""
    operation = OPERATIONS[name](host, host.directory())
    operation.prepare()
    host.machine.call("points", number=0)
    client = operation.begin()
    assert client.wait(timeout=60) == 0, client.communicate()[0]
    if name == "reboot":
        until(lambda: operation.vm.boots() == 2, "it has rebooted")
        operation.vm.until("running")
    names = host.machine.call("held")["names"]
    host.machine.call("points", number=-1)
    operation.vm.end()
    return names


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


class Table:
    """The results, printed as they come."""

    def __init__(self, pairs):
        self.pairs, self.runs, self.failed, self.longest_s = pairs, 0, [], 0.0

    def head(self):
        print(
            "o: the operation succeeded all the same; x: it failed in words, and all was well again; -: no such victim"
        )
        print("   there; F: a fault of xenvm. The columns:")
        for number, (victim, how) in enumerate(self.pairs, 1):
            print(f"   {number:2d} {victim}: {how}")
        print(f"\n{'operation, point':62s} " + " ".join(f"{number:2d}" for number in range(1, len(self.pairs) + 1)))

    def cell(self, case):
        try:
            letter, seconds = case.run()
            self.longest_s = max(self.longest_s, seconds)
            self.runs += letter != "-"
        except Exception as error:
            letter = "F"
            self.runs += 1
            self.failed.append((str(case), f"{error!s:.600}", traceback.format_exc()))
            with contextlib.suppress(OSError):
                self.failed[-1] = (*self.failed[-1][:2], self.failed[-1][2] + case.vm.acts.read_text()[-1500:])
            print(f"FAULT {case}: {why_of(error)}", file=sys.stderr, flush=True)
            recover(case.host)
        print(f"{letter:>2s}", end=" ", flush=True)

    def end(self):
        print(f"\n{self.runs} runs, {len(self.failed)} faults; well again after {self.longest_s:.1f} s at the latest")
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


def on_xen(chosen, limit_s):
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
                    if pair not in pairs:
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
        return on_xen(chosen, asked.seconds)
    return simulated(chosen, pairs, asked.every)


if __name__ == "__main__":
    sys.exit(main())
