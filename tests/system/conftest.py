# SPDX-License-Identifier: GPL-2.0-or-later
"""What the system tests stand on: they run in dom0 of a real Xen host, as root, with the project installed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from xenvm.cli.client import Monitor, NoMonitorError
from xenvm.errors import XenvmError

KERNEL = "/lab/vmlinux"  # Debian's kernel, unpacked once: half a minute of emulation saved in each test
INITRD = "/lab/guest.gz"
QUIET = "console=hvc0 mitigations=off rodata=off"
CONSOLE_LOGS = Path("/var/log/xen/console")
PATIENCE_S = 120.0


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


def processes():
    """The processes of all monitors: pid -> words of the command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"xenvm/_start.py") for word in words):
                    found[int(entry.name)] = [word.decode() for word in words]
    return found


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


class Vm:
    def __init__(self, directory, **settings):
        self.uuid = settings.pop("uuid", None) or str(uuid.uuid4())
        self.name = settings.setdefault("name", f"xenvm-test-{self.uuid[:8]}")
        self.file = Path(directory) / f"{self.uuid}.cfg"
        self.asked = 0
        self.settings = {
            "uuid": self.uuid,
            "kernel": KERNEL,
            "initrd": INITRD,
            "memory": 128,
            "cmdline": f"{QUIET} xenvm.tick_ms={settings.pop('tick_ms', 200)} "
            f"xenvm.mode={settings.pop('mode', 'normal')}",
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
        done = run("xenvm", str(self.file))
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def begin(self):
        return subprocess.Popen(["xenvm", str(self.file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def cmd(self, *words, code=0, **options):
        done = run("xenvm-cmd", self.uuid, *words, **options)
        assert code in (done.returncode, None), f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def ask(self, method, **params):
        with Monitor.connect(self.uuid, reply_timeout_s=300) as monitor:
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
            return (CONSOLE_LOGS / f"guest-{self.name}.log").read_text(errors="replace")
        return ""

    def boots(self):
        return self.console().count("GUEST-UP")

    def ticks(self):
        """The ticks since the last boot."""
        text = self.console().rpartition("GUEST-UP")[2]
        return [int(number) for number in re.findall(r"^tick (\d+)\r?$", text, re.MULTILINE)]

    def up(self, boots=1):
        until(lambda: self.boots() >= boots and self.ticks(), "guest userspace up and ticking")

    def shell(self, line, patience_s=PATIENCE_S, code=0):
        """Run a line in the guest, through its console; return what it printed."""
        self.asked += 1
        mark = f"END-{self.asked}-"
        before = len(self.console())
        with Monitor.connect(self.uuid, reply_timeout_s=60) as monitor:
            terminal = monitor.call("console").take_descriptor()
        try:
            os.write(terminal, f"{line}; echo {mark}$?\n".encode())
        finally:
            os.close(terminal)
        found = until(lambda: re.search(rf"{mark}(\d+)", self.console()[before:]), f"the guest ran: {line}", patience_s)
        text = self.console()[before:][: found.start()].replace("\r", "")
        assert int(found[1]) == code, text
        return "\n".join(part for part in text.splitlines()[1:] if not re.fullmatch(r"tick \d+", part))

    def broker(self):
        return int(Path(f"/run/xenvm/lock-{self.uuid}").read_text())

    def pids(self):
        """role -> pid of this monitor's processes."""
        broker = self.broker()
        found = {"broker": broker}
        for pid, words in processes().items():
            with contextlib.suppress(OSError, IndexError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == broker:
                    found[words[5]] = pid
        return found

    def end(self):
        """Destroy and quit, whatever the test has left; nothing may remain."""
        try:
            self.ask("destroy")
        except NoMonitorError:
            if self.uuid in domains() or Path(f"/run/xenvm/lock-{self.uuid}").exists():
                self.write(startup="shutdown")
                run("xenvm", str(self.file))  # adopts what a killed monitor left
                with contextlib.suppress(XenvmError):
                    self.ask("destroy")
        except XenvmError:
            pass
        with contextlib.suppress(XenvmError):
            self.ask("quit")
        until(lambda: not Path(f"/run/xenvm/lock-{self.uuid}").exists(), "the monitor has ended", 60)

    def left(self):
        """Everything on the host that still belongs to this VM."""
        found = [f"domain {number}" for name, number in domains().items() if name == self.uuid]
        found += [path for path in xenstore() if self.uuid in path]
        found += [str(path) for path in Path("/run/xenvm").iterdir() if self.uuid in path.name]
        found += [f"process {pid} {words}" for pid, words in processes().items() if self.uuid in " ".join(words)]
        return found


@pytest.fixture
def vm(tmp_path):
    made = []

    def make(**settings):
        made.append(Vm(tmp_path, **settings))
        return made[-1]

    yield make
    for one in made:
        one.end()
        assert one.left() == []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No test may leave a process, a guest, a xenstore node or a socket on the host."""
    before, there = xenstore(), devices()
    yield
    until(lambda: not processes(), "all processes of all monitors have ended", 60)
    assert domains() == {}
    assert [path for path in xenstore() if path not in before and not path.startswith("/tool")] == []
    assert devices() == there
    assert list(Path("/run/xenvm").iterdir()) == []


def kill(pid, number=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def json_of(done):
    return json.loads(done.stdout)


def pytest_runtest_logreport(report):
    """Show a failure when it happens: a whole run takes long, and may be cut off."""
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}, {report.duration:.0f} s)\n{report.longreprtext}", flush=True)
