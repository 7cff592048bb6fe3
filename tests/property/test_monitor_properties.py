# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole monitor on a simulated host under random commands, guest events, deaths of processes and slow answers.

Whatever the order: at most one domain has the uuid, `status` answers, a refused command changes nothing, and in the end
nothing is left. XENVM_TEST_EXAMPLES says how many runs.
"""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import sampled_from
from vms import MIB, SimulatedHost, Vm, kill, until

from xenvm.cli.client import NoMonitorError
from xenvm.errors import BusyError, ExitCode, TimeoutExpiredError, WrongStateError, XenvmError
from xenvm.supervisor.states import State

ENDED = "is shutdown: a guest suspends only while it runs"
POLICIES = ["destroy", "reboot", "preserve"]
KILLS = 3  # of one run: the broker gives up when its children die more often than five times a minute
COMMAND_S = 30.0
ANSWER_S = 5.0  # of a status, on a machine that runs other tests too, and by the supervisor that follows a dead one


class Life(RuleBasedStateMachine):
    host = None

    def __init__(self):
        super().__init__()
        self.host = SimulatedHost()
        self.kills = 0
        self.monitored = False

    @initialize(halt=sampled_from(POLICIES), reboot=sampled_from(POLICIES), crash=sampled_from(POLICIES))
    def begin(self, halt, reboot, crash):
        self.folder = self.host.directory()
        self.disk, self.image = self.folder / "disk.img", self.folder / "guest.img"
        self.disk.write_bytes(bytes(MIB))
        self.disk.chmod(0o666)
        settings = {"on_halt": halt, "on_reboot": reboot, "on_crash": crash}
        self.vm = Vm(self.host, self.host.directory(), words="xenvm.boot_ms=1 xenvm.obey_ms=1", **settings)
        self.vm.start()
        self.monitored = True

    def alive(self):
        return self.monitored

    def there(self):
        """What there is of the VM: all that `status` says and lasts, the domains, and every device on the host."""
        status = self.vm.status()
        lasting = {key: value for key, value in status.items() if key not in ("busy", "step", "progress")}
        devices = [path for path in self.host.xenstore() if "/vbd/" in path or "/vif/" in path]
        return lasting, self.host.domains(), self.host.devices(), devices

    def refused(self, before):
        """Assert that a command which was refused has changed nothing."""
        settled = before[0]["state"] not in ("rebooting", "shutdowning", "creating-domain", "suspending", "restoring")
        after = self.there()
        if ENDED in after[0]["last_fault"]:  # its builder has seen what the monitor has not looked at yet
            before[0]["last_fault"] = after[0]["last_fault"]
        if settled and (after[0]["state"], after[0]["domid"]) == (before[0]["state"], before[0]["domid"]):
            assert after == before  # else the guest did something by itself meanwhile

    @precondition(alive)
    @rule(
        command=sampled_from(
            [
                *(("pause", {}), ("unpause", {}), ("destroy", {}), ("start", {}), ("start", {"paused": "true"})),
                *(("shutdown", {"timeout": "2"}), ("shutdown", {"force": "true"})),
                *(("restart", {"timeout": "2"}), ("restart", {"force": "true"})),
                *(("disk-list", {}), ("nic-add", {}), ("nic-del", {"id": "0", "force": "true"}), ("doctor", {})),
                *(("disk-add", {"device": "xvdb"}), ("disk-del", {"device": "xvdb", "force": "true"})),
                *(("status", {}), ("domid", {}), ("read-config", {}), ("doctor", {"clean": "true"})),
            ]
        )
    )
    def ask(self, command):
        method, params = command
        before = self.there()
        try:
            with self.vm.connect(COMMAND_S) as monitor:
                if method == "disk-add":
                    monitor.handed = os.open(self.disk, os.O_RDWR)
                monitor.call(method, **params)
        except (WrongStateError, BusyError):
            self.refused(before)
        except TimeoutExpiredError as error:
            assert "no reply from monitor" not in error.message
        except XenvmError as error:
            assert error.message

    @precondition(alive)
    @rule(words=sampled_from([("suspend", "timeout=2"), ("checkpoint", "timeout=2")]))
    def an_image_is_written(self, words):
        if self.with_image(*words) == 0:
            assert self.image.stat().st_size > MIB

    @precondition(alive)
    @rule(words=sampled_from([("restore",), ("restore", "paused=true"), ("restore", "delete=true")]))
    def an_image_is_restored(self, words):
        if not self.image.exists():
            self.with_image("suspend", "timeout=2")
        there = self.image.exists()
        if self.with_image(*words) == 0 and "delete=true" in words:
            assert not self.image.exists()
        else:
            assert self.image.exists() == there

    def with_image(self, command, *words):
        """Run xenvm-cmd, which opens the image; nothing is left beside it. Return the exit status."""
        before = self.there()
        done = self.host.run("xenvm-cmd", self.vm.uuid, command, str(self.image), *words)
        if done.returncode in (ExitCode.WRONG_STATE, ExitCode.BUSY):
            self.refused(before)
        elif done.returncode:
            assert done.stderr
            assert done.returncode != ExitCode.USAGE, done.stderr
        assert {path.name for path in self.folder.iterdir()} - {"guest.img"} == {"disk.img"}
        return done.returncode

    @rule(reason=sampled_from([0, 1, 3, 4]))
    def guest_ends(self, reason):
        for domid in self.host.domains().values():
            self.host.machine.call("shutdown", domid=domid, reason=reason)

    @rule()
    def something_else_destroys_it(self):
        for domid in self.host.domains().values():
            self.host.destroy(domid)

    @precondition(lambda self: self.monitored and self.kills < KILLS)
    @rule(role=sampled_from(["supervisor", "watcher", "builder"]))
    def a_child_dies(self, role):
        pid = self.vm.pids().get(role)
        if pid:
            self.kills += 1
            kill(pid)

    @precondition(alive)
    @rule(way=sampled_from(["quit", "kill -9"]))
    def the_monitor_ends(self, way):
        if way == "quit":
            until(self._quits, "it quits", 60)
        else:
            kill(self.vm.broker())
        until(lambda: not self.host.processes(), "its processes have ended", 20)
        self.monitored = False

    def _quits(self):
        try:
            self.vm.ask("quit")
        except BusyError:  # with what the end of its guest has begun
            return False
        return True

    @precondition(lambda self: not self.monitored)
    @rule()
    def it_is_started_again(self):
        done = self.host.run("xenvm", str(self.vm.file))
        assert done.returncode in (0, 1, 3), done.stderr  # 1: the guest ended at once; 3: its domain is preserved
        self.monitored = done.returncode != 1

    @rule(milliseconds=sampled_from([0, 50, 300]))
    def answers_are_slow(self, milliseconds):
        self.host.slow(milliseconds)

    @invariant()
    def at_most_one_domain(self):
        uuids = [told["uuid"] for told in self.host.machine.call("list")]
        assert len(uuids) <= 1

    @invariant()
    def status_answers(self):
        if not self.monitored:
            return
        until(self._answers, "status is answered", ANSWER_S)  # also while a supervisor that died is being replaced

    def _answers(self):
        try:
            return State(self.vm.state)
        except NoMonitorError:
            raise
        except XenvmError:
            return None

    def teardown(self):
        try:
            if hasattr(self, "vm"):
                self.host.slow(0)
                self.vm.end()
                until(lambda: self.vm.left() == [], "nothing is left", 20)
                assert self.host.devices()["backends"] == []
                assert self.host.devices()["loops"] == []
                assert [path for path in self.host.xenstore() if "/vif/" in path or "/vbd/" in path] == []
        finally:
            for pid in self.host.processes():
                kill(pid)
            self.host.close()


Life.TestCase.settings = settings(
    max_examples=int(os.environ.get("XENVM_TEST_EXAMPLES", "4")),
    stateful_step_count=14,
    deadline=None,
    phases=[
        Phase.explicit,
        Phase.reuse,
        Phase.generate,
    ],  # to shrink a failure takes minutes; the log of acts tells more
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestLife = Life.TestCase
