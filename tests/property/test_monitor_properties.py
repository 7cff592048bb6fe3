# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole monitor on a simulated host under random commands, guest events, deaths of processes and slow answers.

Whatever the order: at most one domain has the uuid, `status` answers, a refused command changes nothing, and in the end
nothing is left. XENVM_TEST_EXAMPLES says how many runs.
"""

import os
import time

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import sampled_from
from vms import SimulatedHost, Vm, kill, until

from xenvm.cli.client import NoMonitorError
from xenvm.errors import BusyError, TimeoutExpiredError, WrongStateError, XenvmError
from xenvm.supervisor.states import State

POLICIES = ["destroy", "reboot", "preserve"]
KILLS = 3  # of one run: the broker gives up when its children die more often than five times a minute
COMMAND_S = 30.0
ANSWER_S = 5.0  # of a status, on a machine that runs other tests too


class Life(RuleBasedStateMachine):
    host = None

    def __init__(self):
        super().__init__()
        self.host = SimulatedHost()
        self.kills = 0
        self.monitored = False

    @initialize(halt=sampled_from(POLICIES), reboot=sampled_from(POLICIES), crash=sampled_from(POLICIES))
    def begin(self, halt, reboot, crash):
        settings = {"on_halt": halt, "on_reboot": reboot, "on_crash": crash}
        self.vm = Vm(self.host, self.host.directory(), words="xenvm.boot_ms=1 xenvm.obey_ms=1", **settings)
        self.vm.start()
        self.monitored = True

    def alive(self):
        return self.monitored

    @precondition(alive)
    @rule(
        command=sampled_from(
            [
                *(("pause", {}), ("unpause", {}), ("destroy", {}), ("start", {}), ("start", {"paused": "true"})),
                *(("shutdown", {"timeout": "2"}), ("shutdown", {"force": "true"})),
                *(("restart", {"timeout": "2"}), ("restart", {"force": "true"})),
                *(("disk-list", {}), ("nic-add", {}), ("nic-del", {"id": "0", "force": "true"}), ("doctor", {})),
                *(("status", {}), ("domid", {}), ("read-config", {})),
            ]
        )
    )
    def ask(self, command):
        method, params = command
        before = self.host.domains(), self.vm.state
        try:
            with self.vm.connect(COMMAND_S) as monitor:
                monitor.call(method, **params)
        except (WrongStateError, BusyError):
            settled = before[1] not in ("rebooting", "shutdowning", "creating-domain")
            if settled and self.vm.state == before[1]:  # else the guest did something by itself meanwhile
                assert self.host.domains() == before[0]
        except TimeoutExpiredError as error:
            assert "no reply from monitor" not in error.message
        except XenvmError as error:
            assert error.message

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
        assert done.returncode in (0, 1), done.stderr  # 1: the guest ended at once
        self.monitored = done.returncode == 0

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
        begin = time.monotonic()
        until(self._answers, "status is answered", 20)  # a supervisor that died is being replaced
        assert self.kills or time.monotonic() - begin < ANSWER_S

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
