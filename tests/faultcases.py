# SPDX-License-Identifier: GPL-2.0-or-later
"""One run of the fault matrix: an operation, a point of it, a victim, and what happens to it."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import vms
from operations import OPERATIONS
from vms import MIB, kill, until

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


class Spared(Exception):  # noqa: N818 - it is no error
    """Nothing was struck in this run, which therefore proves nothing; its text is the letter that it is shown by."""


ABSENT, MISSED = "-", "m"


def hit(pid, number):
    """Send a signal to a process that has not ended."""
    if not lives(pid):
        raise Spared(MISSED)
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise Spared(MISSED) from None


def lives(pid):
    """Tell whether a process has not ended, nor waits for whoever asks how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def copied(directory):
    """Return a copy of the programs that everybody can run, to be changed for a test."""
    root = Path(directory) / "changed"
    shutil.copytree(vms.ROOT / "xenvm", root / "xenvm", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


def hurried(directory):
    """Return a copy of the programs in which a job has four seconds: a stopped helper shows by its deadline alone."""
    root = copied(directory)
    table = root / "xenvm/broker/phases.py"
    text = re.sub(r"(Permit\(\w+, \d+, )[1-9]\d*\)", rf"\g<1>{DEADLINE_S})", table.read_text())
    text = re.sub(r"(_SHORT_S: Final = ).*", rf"\g<1>{DEADLINE_S}", text)
    text = re.sub(r"(START_DEADLINE_S: Final = ).*", rf"\g<1>{DEADLINE_S}.0", text)
    table.write_text(re.sub(r"(IMAGE_S_PER_MIB: Final = ).*", r"\g<1>0.01", text))
    spec = importlib.util.spec_from_file_location("hurried_phases", table)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    assert {permit.deadline_s for permit in changed.PERMITS.values()} <= {0, DEADLINE_S}  # all of them
    return root


def limit(host, pid, how):
    """Let a process have no more of something; return what gives it back."""
    name, option, value = LIMITS[how]
    if not lives(pid):
        raise Spared(MISSED)
    line = next(one for one in Path(f"/proc/{pid}/limits").read_text().splitlines() if one.startswith(name))
    soft, hard = line.removeprefix(name).split()[:2]

    def put(limit):  # in the name of whoever the process runs as
        return vms.run("prlimit", "--pid", str(pid), f"--{option}={limit}:{hard}", **host.options())

    done = put(value)
    if done.returncode and not lives(pid):
        raise Spared(MISSED)
    assert done.returncode == 0, done.stderr
    return lambda: put(soft)


def changed(before, after):
    """Say what of the devices and nodes of a host came and went."""
    parts = [(f"{kind} ", before[0][kind], after[0][kind]) for kind in before[0]] + [("", before[1], after[1])]
    came = [f"+{what}{one}" for what, old, new in parts for one in new if one not in old]
    return " ".join([*came, *(f"-{what}{one}" for what, old, new in parts for one in old if one not in new)])


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
        try:
            self.reach()
            struck = time.monotonic()
            after = self.strike()
        except Spared as spared:
            self.undisturbed()
            return str(spared), 0.0
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
        try:
            until(lambda: self.there() == before, "all is as it was", 30)
        except AssertionError as error:
            raise AssertionError(f"{error}: {changed(before, self.there())}") from None
        assert self.vm.broker_log_is_calm(), "the monitor's log has a traceback"
        return ("o" if code == 0 else "x"), whole_s

    def undisturbed(self):
        """Let an operation end in which nobody was struck: it must have done what it is for."""
        self.go_on()
        code = self.finish()
        assert code == 0, f"nobody was struck, and yet it failed with status {code}"
        if self.stays:
            self.settle(code)
        else:
            self.vm.end()

    def there(self):
        """What there is on the host of guests and their devices."""
        nodes = [path for path in self.host.xenstore() if re.search(r"^/xenvm|/backend|/device/|^/vm", path)]
        return self.host.devices(), nodes

    # To the point

    @abstractmethod
    def reach(self):
        """Begin the operation and let it come to its point; raise Spared when the victim has no part in it there."""

    def strike(self):
        """Do to the victim what is to be done; return what undoes it when the operation has ended.

        Raise Spared when it had ended by itself.
        """
        if self.victim == "xenstored":
            return self.strike_store()
        pid = self.pid()
        assert pid, f"there is no {self.victim}"
        if self.how == "kill":
            hit(pid, signal.SIGKILL)
        elif self.how == "stop":
            hit(pid, signal.SIGSTOP)
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
        client = self.client = self.operation.begin()
        until(lambda: self.held() or (client.poll() is not None and self.name != "reboot"), f"point {self.point}")
        self.caller = self.held()
        if self.caller and self.victim == "worker" and self.caller in (self.vm.broker(), client.pid):
            raise Spared(ABSENT)
        assert self.caller, client.communicate()[0]
        if self.point > last:
            os.kill(self.caller, signal.SIGSTOP)
            self.host.machine.call("points", number=-1)

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
        begin = time.monotonic()
        client = self.client = self.operation.begin()
        with contextlib.suppress(vms.subprocess.TimeoutExpired):
            client.wait(self.lengths[self.name] * self.point)
            self.lengths[self.name] = time.monotonic() - begin  # it is quicker than it was: the next one is struck
            raise Spared(MISSED)
        if self.victim == "worker":
            until(lambda: self.pid() or client.poll() is not None, "a worker, or the end")
            if not self.pid():
                raise Spared(ABSENT)

    def pid(self):
        try:
            if self.victim != "worker":
                return super().pid()
            there = self.vm.pids()
        except FileNotFoundError:  # there is no monitor yet
            return 0
        return next((there[role] for role in WORKERS if role in there), 0)

    def strike(self):
        if self.victim != "xenstored" and not self.pid():
            raise Spared(MISSED)
        return super().strike()


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
