# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs for tests, on one of two hosts: this machine's Xen (in dom0, as root), or a simulated one.

A test takes the fixture `vm`, and where it needs more the fixture `host`. On a simulated host everything runs as an
ordinary user; a test that is root itself runs the programs as one.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from storewire import Wire

import xenvm
from xenvm.boundary.spawn import command
from xenvm.cli.client import Monitor, NoMonitorError
from xenvm.errors import XenvmError
from xenvm.simulator.client import Machine
from xenvm.simulator.guest import CRASH
from xenvm.simulator.machine import CPUS

ROOT = Path(xenvm.__file__).parent.parent
KERNEL = "/lab/vmlinux"  # Debian's kernel, unpacked once: half a minute of emulation saved in each test
INITRD = "/lab/guest.gz"
QUIET = "console=hvc0 mitigations=off rodata=off"
CONSOLE_LOGS = Path("/var/log/xen/console")
PATCHED = ("RIP: e030:text_poke_early", "Kernel panic - not syncing: Attempted to kill the idle task!")
PATIENCE_S = 120.0 if os.environ.get("XENVM_TEST_HOST") == "xen" else 30.0
NOBODY = 65534
MIB = 1 << 20
BUILD = ["info", "create", "prepare", "channel", "load", "unpause", "destroy"]  # calls of the simulated machine


def run(*words, timeout=300, **options):
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, **options)


def until(condition, what, patience_s=PATIENCE_S):
    """Wait until the condition gives something true, and return that."""
    end = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {patience_s:g} s: {what}"
        time.sleep(0.05)


def kill(pid, number=signal.SIGKILL):
    assert pid > 0, "there is no such process; 0 would be the tests themselves"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def json_of(done):
    return json.loads(done.stdout)


def processes(mark=""):
    """The processes of all monitors whose command lines have the word `mark`: pid -> words of the command line.

    The oldest come first: of several builders that is the one with a job, since others wait for the next one.
    """
    found, begun = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = [word.decode() for word in (entry / "cmdline").read_bytes().split(b"\0")]
                ours = any(word.endswith("xenvm/_start.py") for word in words) and "simulator" not in words
                if ours and (not mark or mark in words):
                    begun[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[19])  # proc(5)
                    found[int(entry.name)] = words
    return {pid: found[pid] for pid in sorted(found, key=begun.__getitem__)}


def domains():
    """uuid -> domid of all guests, as xl sees them."""
    lines = run("xl", "list", "-v").stdout.splitlines()[2:]
    return {match[1]: int(line.split()[1]) for line in lines if (match := re.search(r"([0-9a-f-]{36})", line))}


def xenstore():
    return sorted(line.split(" = ")[0] for line in run("xenstore-ls", "-f").stdout.splitlines())


def devices():
    """What the host's kernel has of guests' devices: backends, used loop, nbd and dm devices, interfaces."""
    block = Path("/sys/block")
    return {
        "backends": sorted(path.name for path in Path("/sys/bus/xen-backend/devices").glob("v*")),
        "loops": sorted(path.name for path in block.iterdir() if (path / "loop/backing_file").exists()),
        "nbds": sorted(path.name for path in block.glob("nbd*") if (path / "size").read_text().strip() != "0"),
        "dms": sorted(path.name for path in block.glob("dm-*")),
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
    }


class XenHost:
    """This machine, which is a Xen host."""

    simulated = False
    kernel, initrd = KERNEL, INITRD
    tick_ms = 200
    short_s = 4
    """A time limit that a guest which listens would keep."""
    sockets, logs, console_logs = Path("/run/xenvm"), Path("/var/log/xenvm"), CONSOLE_LOGS
    bridge = "xenvmbr0"
    store = "/run/xenstored/socket"

    def __init__(self):
        self._made = []

    def program(self, name, *words):
        """Return the argument list that runs a program of ours; to start a monitor, the program is `xenvm`."""
        return [name, *words]

    def options(self):
        """Return what subprocess needs to know for it."""
        return {}

    def run(self, name, *words, **options):
        return run(*self.program(name, *words), **{**self.options(), **options})

    def processes(self):
        return processes()

    def domains(self):
        return domains()

    def favour(self):
        """Give dom0 more of the processor than each guest, as an administrator does of a host that is full of them."""
        done = run("xl", "sched-credit2", "-d", "Domain-0", "-w", "4096")
        assert done.returncode == 0, done.stderr

    def xenstore(self):
        return xenstore()

    def devices(self):
        return devices()

    def shape(self, domid):
        """Return MiB and vcpus of a domain."""
        info = run("xl", "list", str(domid)).stdout.splitlines()[1].split()
        return int(info[2]), int(info[3])

    def limit_mib(self, domid):
        """Return how much memory a domain may have."""
        from xenvm.helpers.builder import xen  # noqa: PLC0415 - see below

        info = xen.ffi.new("xc_domaininfo_t *")
        assert xen.lib.xc_domain_getinfolist(xen.Hypervisor().handle, domid, 1, info) == 1
        assert info.domain == domid
        # `max_pages` behind `tot_pages` (xen/domctl.h), which xenvm itself does not read
        (max_pages,) = struct.unpack_from(
            "<Q", xen.ffi.buffer(info), xen.ffi.offsetof("xc_domaininfo_t", "tot_pages") + 8
        )
        return max_pages >> 8

    def cpus(self):
        """Return how many CPUs there are."""
        return int(re.search(r"^nr_cpus *: (\d+)$", run("xl", "info").stdout, re.MULTILINE)[1])

    def destroy(self, domid):
        """Destroy a domain behind its monitor's back."""
        run("xl", "destroy", str(domid))

    def crash(self, domid):
        """Let a guest end as one whose kernel has panicked."""
        from xenvm.helpers.builder import xen  # noqa: PLC0415 - a machine without Xen has not got it

        hypervisor = xen.Hypervisor()
        hypervisor.check(xen.lib.xc_domain_shutdown(hypervisor.handle, domid, CRASH), "crashing the domain")

    def has_shut_down(self, _domid):
        return re.search(r" -*s-* ", run("xl", "list").stdout)

    def rest(self, seconds):
        """Let guests run for a while."""
        time.sleep(seconds)

    def slow(self, _milliseconds=100, _calls=()):
        """Make a build take long enough to act meanwhile: here it does."""

    def directory(self):
        """Return a directory for config files and images, on a file system with direct I/O."""
        self._made.append(Path(tempfile.mkdtemp(dir="/var/tmp")))
        return self._made[-1]

    def make_bridge(self):
        run("ip", "link", "add", self.bridge, "address", "00:16:3e:00:00:01", "type", "bridge")
        run("ip", "link", "set", self.bridge, "up")

    def remove_bridge(self):
        run("ip", "link", "delete", self.bridge)

    def close(self):
        for directory in self._made:
            shutil.rmtree(directory)


class SimulatedHost:
    """A simulated host of its own, all of whose processes run as an ordinary user."""

    simulated = True
    tick_ms = 20
    short_s = 1
    bridge = "xenbr0"

    def __init__(self, root=ROOT):
        self.root = root
        self.top = Path(tempfile.mkdtemp(prefix="xenvm-", dir="/tmp"))
        self.sockets = self.top / "run"
        self.logs, self.console_logs = self.sockets / "log", self.sockets / "console"
        self.store = self.sockets / "xenstored/socket"
        self.kernel, self.initrd = str(self.top / "vmlinux"), str(self.top / "guest.gz")
        for path, size in ((self.kernel, 58 * MIB), (self.initrd, 2 * MIB)):  # as large as the lab's
            with open(path, "wb") as file:
                file.truncate(size)
        self.sockets.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chmod(self.top, 0o755)
            os.chown(self.top, NOBODY, NOBODY)
            os.chown(self.sockets, NOBODY, NOBODY)
        words = f"exec 3</dev/null 2>{self.top}/simulator; exec {shlex.join(command('simulator', str(self.sockets)))}"
        self.process = subprocess.Popen(["/bin/sh", "-c", words], stdin=subprocess.DEVNULL, **self._user())
        self._machine = None
        self.machine = until(self._connect, "the simulated host is there", 30)

    def _connect(self):
        assert self.process.poll() is None, (self.top / "simulator").read_text()
        with contextlib.suppress(XenvmError):
            return Machine(f"{self.sockets}/xenstored/machine")

    @staticmethod
    def _user():
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}

    def program(self, name, *words):
        module = {"xenvm": "xenvm", "xenvm-cmd": "cmd", "xenvm-audit": "audit"}[name]
        code = (
            f"import sys; sys.path.insert(0, {str(self.root)!r}); from xenvm.cli.{module} import main; sys.exit(main())"
        )
        where = ["--simulator"] if name == "xenvm" and "--check" not in words else []
        return [sys.executable, "-B", "-c", code, *where, *words]

    def options(self):
        environment = {"XENVM_SOCKET_DIR": str(self.sockets), "PYTHONPATH": str(self.root), "PATH": os.environ["PATH"]}
        return {"env": environment, **self._user()}

    def run(self, name, *words, **options):
        done = run(*self.program(name, *words), **{**self.options(), **options})
        done.stderr = re.sub(r"^(using|started) the simulated host .*\nnot in force: .*\n", "", done.stderr)
        return done

    def processes(self):
        return processes(str(self.sockets))

    def favour(self):
        """Do nothing: nothing of a guest uses the processor."""

    def domains(self):
        return {told["uuid"]: told["domid"] for told in self.machine.call("list")}

    def xenstore(self):
        with Wire(self.store) as wire:
            return wire.paths()

    def devices(self):
        names = {"backends": "bus/xen-backend/devices", "interfaces": "class/net"}
        found = {key: sorted(os.listdir(self.sockets / "sys" / path)) for key, path in names.items()}
        return {**found, "loops": self.machine.call("devices")["loops"], "nbds": [], "dms": []}

    def shape(self, domid):
        told = self.machine.call("look", domid=domid)
        return told["memory_kib"] // 1024, told["vcpus"]

    def limit_mib(self, domid):
        return self.machine.call("look", domid=domid)["limit_kib"] // 1024

    def cpus(self):
        return CPUS

    def destroy(self, domid):
        self.machine.call("destroy", domid=domid)

    def crash(self, domid):
        self.machine.call("shutdown", domid=domid, reason=CRASH)

    def has_shut_down(self, domid):
        return self.machine.call("look", domid=domid)["reason"] >= 0

    def rest(self, seconds):
        time.sleep(seconds / 10)

    def slow(self, milliseconds=100, calls=BUILD):
        """Let each of these calls take so long; by default the steps of a build."""
        self.machine.call("slow", calls=calls if milliseconds else [], milliseconds=milliseconds)

    def again(self):
        """Cut the power, and make another host of it, whatever state this one is in."""
        for pid in self.processes():
            kill(pid)
        self.machine.close()
        self.process.kill()
        self.process.wait(timeout=30)
        shutil.rmtree(self.top)
        self.__init__(self.root)

    def directory(self):
        path = Path(tempfile.mkdtemp(dir=self.top))
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        return path

    def make_bridge(self):
        """It has one."""

    def remove_bridge(self):
        """It stays."""

    def close(self):
        self.machine.close()
        self.process.terminate()
        assert self.process.wait(timeout=30) == 0, (self.top / "simulator").read_text()
        said = (self.top / "simulator").read_text()
        assert said == "", said
        left = sorted(path.name for path in self.sockets.iterdir())
        assert left == ["console", "log"], left
        shutil.rmtree(self.top)


class Vm:
    def __init__(self, host, directory, **settings):
        self.host = host
        self.uuid = settings.pop("uuid", None) or str(uuid.uuid4())
        self.name = settings.setdefault("name", f"xenvm-test-{self.uuid[:8]}")
        self.file = Path(directory) / f"{self.uuid}.cfg"
        self.asked = 0
        words = f"xenvm.tick_ms={settings.pop('tick_ms', host.tick_ms)} xenvm.mode={settings.pop('mode', 'normal')}"
        self.settings = {
            "uuid": self.uuid,
            "kernel": host.kernel,
            "initrd": host.initrd,
            "memory": 128,
            "cmdline": f"{QUIET} {words} {settings.pop('words', '')}",
            **settings,
        }
        self.write()

    def write(self, **changes):
        """Write the config file; a list is a key given several times."""
        self.settings.update(changes)
        lines = [
            f"{key} = {one}\n"
            for key, value in self.settings.items()
            for one in (value if isinstance(value, list) else [value])
        ]
        self.file.write_text("".join(lines))

    def start(self, code=0):
        done = self.host.run("xenvm", str(self.file))
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def begin(self):
        return self._begin("xenvm", str(self.file))

    def begin_cmd(self, *words, **options):
        """Start xenvm-cmd without waiting for it."""
        return self._begin("xenvm-cmd", self.uuid, *words, **options)

    def _begin(self, *words, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.host.program(*words), **{**pipes, **self.host.options(), **options})

    def cmd(self, *words, code=0, **options):
        done = self.host.run("xenvm-cmd", self.uuid, *words, **options)
        assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def connect(self, reply_timeout_s=300):
        return Monitor.connect(self.uuid, socket_dir=str(self.host.sockets), reply_timeout_s=reply_timeout_s)

    def ask(self, method, **params):
        with self.connect() as monitor:
            return monitor.call(method, **params)

    def status(self):
        return self.ask("status").data

    @property
    def state(self):
        return self.status()["state"]

    def until(self, state, patience_s=PATIENCE_S):
        return until(lambda: (now := self.status())["state"] == state and now, f"state {state}", patience_s)

    @property
    def domid(self):
        return self.status()["domid"]

    def console(self):
        """All that the guest of this name has printed, over every incarnation."""
        with contextlib.suppress(FileNotFoundError):
            return (self.host.console_logs / f"guest-{self.name}.log").read_text(errors="replace")
        return ""

    def boots(self):
        return self.console().count("GUEST-UP")

    def ticks(self):
        """The ticks since the last boot."""
        text = self.console().rpartition("GUEST-UP")[2]
        return [int(number) for number in re.findall(r"^tick (\d+)\r?$", text, re.MULTILINE)]

    def up(self, boots=1, patience_s=PATIENCE_S):
        """Wait for the guest's userspace.

        Under emulation Debian 13's kernel dies now and then early in its boot, while it patches its own code. A guest
        that has died of just that is started again, and that is told; any other end is a failure.
        """

        def there():
            last_boot = self.console().rpartition("Linux version")[2]
            if all(words in last_boot for words in PATCHED) and self.state == "shutdown":
                print(f"{self.name}: its kernel died of patching its own code; started again", flush=True)
                self.cmd("start")
            return self.boots() >= boots and self.ticks()

        try:
            until(there, "guest userspace up and ticking", patience_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.status()}; its console ends: {self.console()[-2000:]}") from None

    def shell(self, line, patience_s=PATIENCE_S, code=0):
        """Run a line in the guest, through its console; return what it printed. A simulated guest has no shell."""
        self.asked += 1
        mark = f"END-{self.asked}-"
        before = len(self.console())
        with self.connect(60) as monitor:
            terminal = monitor.call("console").take_descriptor()
        try:
            os.write(terminal, f"{line}; echo {mark}$?\n".encode())
        finally:
            os.close(terminal)
        found = until(lambda: re.search(rf"{mark}(\d+)", self.console()[before:]), f"the guest ran: {line}", patience_s)
        text = self.console()[before:][: found.start()].replace("\r", "")
        assert int(found[1]) == code, text
        return "\n".join(part for part in text.splitlines()[1:] if not re.fullmatch(r"tick \d+", part))

    @property
    def socket(self):
        return self.host.sockets / f"vm-{self.uuid}"

    @property
    def lock(self):
        return self.host.sockets / f"lock-{self.uuid}"

    @property
    def acts(self):
        return self.host.logs / f"{self.uuid}.acts"

    def broker(self):
        return int(self.lock.read_text())

    def pids(self):
        """role -> pid of this monitor's processes; of several with one role, the oldest."""
        broker = self.broker()
        found = {"broker": broker}
        for pid, words in self.host.processes().items():
            with contextlib.suppress(OSError, IndexError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == broker and words[5] != "broker":  # a child that is just being made looks like it
                    found.setdefault(words[5], pid)
        return found

    def sleeps(self, seconds):
        """Tell whether none of these processes is woken up for so long."""

        def switches():
            lines = [
                line for pid in self.pids().values() for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            ]
            return [line for line in lines if line.startswith("Pid:") or "ctxt_switches" in line]

        before = switches()
        time.sleep(seconds)
        return switches() == before

    def pids_left(self):
        """The processes of this monitor, whoever is their parent."""
        return [pid for pid, words in self.host.processes().items() if self.uuid in " ".join(words)]

    def broker_log_is_calm(self):
        """Tell whether no process of the monitor has ended by an error that nobody has thought of."""
        return not any(
            "Traceback" in path.read_text(errors="replace") for path in self.host.logs.glob(f"{self.uuid}*.log")
        )

    def end(self):
        """Destroy and quit, whatever the test has left; nothing may remain."""
        try:
            self.ask("destroy")
        except NoMonitorError:
            if self.left():
                self.write(startup="shutdown")
                self.host.run("xenvm", str(self.file))  # adopts what a killed monitor left, removes what is half there
                with contextlib.suppress(XenvmError):
                    self.ask("destroy")
        except XenvmError:
            pass
        with contextlib.suppress(XenvmError):
            self.ask("quit")
        until(lambda: not self.lock.exists(), "the monitor has ended", 60)

    def left(self):
        """Everything on the host that still belongs to this VM."""
        host = self.host
        found = [f"domain {number}" for name, number in host.domains().items() if name == self.uuid]
        found += [path for path in host.xenstore() if self.uuid in path]
        found += [str(path) for path in host.sockets.iterdir() if self.uuid in path.name]
        found += [f"process {pid} {words}" for pid, words in host.processes().items() if self.uuid in " ".join(words)]
        return found


@pytest.fixture
def vm(host):
    made = []
    directory = host.directory()

    def make(**settings):
        made.append(Vm(host, directory, **settings))
        return made[-1]

    yield make
    host.slow(0)
    left = []
    for one in made:  # all of them, whatever becomes of one
        try:
            one.end()
            until(lambda one=one: one.left() == [], "nothing of it is left", 10)
        except (AssertionError, XenvmError, OSError) as error:
            left.append(f"{one.uuid}: {error}: {one.left()}")
    assert left == []


@pytest.fixture
def folder(host):
    """A place for save images on a file system of a disk."""
    return host.directory()


@pytest.fixture(autouse=True)
def nothing_is_left(host):
    """No test may leave a process, a guest, a xenstore node or a socket on the host."""
    host.slow(0)
    before, there, files = host.xenstore(), host.devices(), sorted(host.sockets.iterdir())
    yield
    until(lambda: not host.processes(), "all processes of all monitors have ended", 60)
    assert host.domains() == {}
    assert [path for path in host.xenstore() if path not in before and not path.startswith("/tool")] == []
    assert host.devices() == there
    assert sorted(host.sockets.iterdir()) == files


def pytest_runtest_logreport(report):
    """Show a failure when it happens: a whole run takes long, and may be cut off."""
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}, {report.duration:.0f} s)\n{report.longreprtext}", flush=True)
