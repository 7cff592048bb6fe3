# SPDX-License-Identifier: GPL-2.0-or-later
"""The state machine against a small model of broker and guest, in any order of events."""

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xenvm.boundary.messages import NO_DOMAIN, Domain, DomainState, Fault, Op, Phase, Policy
from xenvm.errors import WrongStateError
from xenvm.supervisor.machine import TRANSITIONS, Happening, Vm, seen, step
from xenvm.supervisor.states import ALIVE, COMMANDS, ENDED, STABLE, Event, State

ACTIONS = st.sampled_from(["preserve", "reboot", "destroy"])
POLICIES = st.builds(Policy, st.just("started"), ACTIONS, ACTIONS, ACTIONS, st.just(60), st.just(40))
FAULT = Fault(1, "no", "")
HAPPENINGS = st.builds(
    Happening,
    st.sampled_from(list(Event)),
    st.floats(0, 1e6),
    st.sampled_from([-1, 1, 7]),
    st.sampled_from(["", "because"]),
    st.sampled_from([None, FAULT]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(HAPPENINGS, max_size=40))
def test_no_order_of_events_leaves_the_table(happenings):
    vm = Vm(State.CREATING)
    for happening in happenings:
        row = TRANSITIONS.get((vm.state, happening.event))
        try:
            after, op = step(vm, happening)
        except WrongStateError:
            assert happening.event in COMMANDS
            assert row is None or vm.domid > 0
            continue
        assert (after.state, op) == ((row.state, row.op) if row else (vm.state, None))
        if row is None:
            assert after == vm
        if happening.event in (Event.DESTROYED, Event.FAILED_OFF):
            assert after.domid == -1
        if happening.event in COMMANDS:
            assert after.domid == vm.domid
            assert after.fault is None
        assert after.quick_deaths <= vm.quick_deaths + 1
        vm = after


class Guest(RuleBasedStateMachine):
    """A VM with a broker that does as asked or fails, and a guest that does what it likes.

    It begins with a search for a domain that an earlier monitor left, in whatever state. The broker's job is done between two rules, so the guest may end, and commands may come, while it is under way.
    """

    def __init__(self):
        super().__init__()
        self.vm = Vm(State.CREATING)
        self.now_s, self.domids = 0.0, 0
        self.domain = None
        self.job = Op.FIND
        self.stale = False  # the guest has changed and nobody has looked

    @initialize(policy=POLICIES, left=st.sampled_from([None, *DomainState]), reason=st.integers(0, 6))
    def choose(self, policy, left, reason):
        self.policy = policy
        if left in (DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTDOWN):
            self.domids = 1
            self.domain = Domain(1, left, Phase.BUILT, reason if left is DomainState.SHUTDOWN else -1, 1, 1, 1)

    def happen(self, happening):
        before = self.vm
        self.vm, op = step(before, happening)
        if op is not None:
            self.job = op
        if before.state is State.REBOOTING and happening.event not in (*COMMANDS, Event.FAILED_OFF):
            crashed = happening.event in (Event.ENDED_DESTROY, Event.CRASHED_PRESERVE, Event.VANISHED)
            assert crashed or self.vm.state in ALIVE | {State.REBOOTING}

    def look(self):
        self.stale = False
        self.happen(seen(self.vm, self.policy, self.domain or NO_DOMAIN, self.now_s))

    def build(self, state):
        self.domids += 1
        self.domain = Domain(self.domids, state, Phase.BUILT, -1, 1, 1, 1)
        event = Event.BUILT if state is DomainState.RUNNING else Event.BUILT_PAUSED
        self.happen(Happening(event, self.now_s, self.domids))

    @rule(event=st.sampled_from(sorted(COMMANDS)))
    def command(self, event):
        if self.job and event is not Event.DESTROY:
            return
        before = self.vm
        try:
            self.happen(Happening(event, self.now_s))
        except WrongStateError:
            assert self.vm is before
            assert self.job is None
            assert (before.state, event) not in TRANSITIONS or (before.state in ENDED and before.domid > 0)
        else:
            assert self.job is not None

    @precondition(lambda self: self.job is not None)
    @rule(works=st.sampled_from([True, True, True, False]))
    def broker(self, works):
        job, self.job = self.job, None
        if not works:
            if job in (Op.BUILD, Op.BUILD_PAUSED, Op.REBUILD):
                self.domain = None
            failed = Event.FAILED_OFF if self.domain is None else Event.FAILED_UP
            event = Event.DESTROY_FAILED if job is Op.DESTROY else failed
            self.happen(Happening(event, self.now_s, self.domain.domid if self.domain else -1, fault=FAULT))
            self.stale = self.domain is not None
        elif job is Op.FIND:
            self.find()
        elif job in (Op.BUILD, Op.REBUILD):
            self.build(DomainState.RUNNING)
        elif job is Op.BUILD_PAUSED:
            self.build(DomainState.PAUSED)
        elif job is Op.DESTROY:
            self.domain = None
            self.happen(Happening(Event.DESTROYED, self.now_s))
        elif job is Op.WITHDRAW:
            self.happen(Happening(Event.WITHDRAWN, self.now_s))
            self.stale = True
        elif self.domain is None:
            self.look()
        else:
            self.act(job)

    def find(self):
        self.stale = False
        if self.domain is None:
            self.happen(Happening(Event.ABSENT, self.now_s))
        elif self.domain.state is DomainState.SHUTDOWN:
            self.vm = self.vm.but(domid=self.domain.domid)
            self.look()
        else:
            found = Event.BUILT if self.domain.state is DomainState.RUNNING else Event.BUILT_PAUSED
            self.happen(Happening(found, self.now_s, self.domain.domid))

    def act(self, job):
        over = self.domain.state is DomainState.SHUTDOWN
        if job is Op.PAUSE and not over:
            self.domain = self.domain.but(state=DomainState.PAUSED)
        elif (job is Op.UNPAUSE and not over) or job is Op.RESUME:
            self.domain = self.domain.but(state=DomainState.RUNNING, reason=-1)
        elif job is Op.FORCE_POWEROFF and not over:
            self.domain = self.domain.but(state=DomainState.SHUTDOWN, reason=0)
        if job not in (Op.ASK_POWEROFF, Op.ASK_REBOOT) or self.domain.state is DomainState.SHUTDOWN:
            self.look()

    @precondition(lambda self: self.job is None and self.vm.state in (State.SHUTDOWNING, State.REBOOTING))
    @rule(force=st.booleans())
    def ignore(self, force):
        self.happen(Happening(Event.IGNORED_FORCE if force else Event.IGNORED, self.now_s, fault=FAULT))

    @precondition(lambda self: self.domain is not None and self.domain.state is DomainState.RUNNING)
    @rule(reason=st.integers(0, 6))
    def end(self, reason):
        self.domain = self.domain.but(state=DomainState.SHUTDOWN, reason=reason)
        self.stale = True

    @precondition(lambda self: self.domain is not None)
    @rule()
    def vanish(self):
        self.domain, self.stale = None, True

    @precondition(lambda self: self.job is None and self.stale and self.vm.state not in ENDED)
    @rule()
    def watch(self):
        self.look()

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]))
    def wait(self, seconds):
        self.now_s += seconds

    @invariant()
    def the_state_tells_the_truth(self):
        vm, domain = self.vm, self.domain
        if self.job is not None or self.stale:
            return
        if vm.state in ALIVE:
            assert domain is not None
            assert domain.domid == vm.domid
            wanted = DomainState.RUNNING if vm.state is State.RUNNING else DomainState.PAUSED
            assert domain.state is wanted
        elif vm.domid < 0:
            assert domain is None
            assert vm.state is State.SHUTDOWN or vm.fault is not None
        elif vm.state in ENDED:
            assert domain is not None or vm.fault is not None

    @invariant()
    def what_does_not_last_waits_for_something(self):
        asked = self.vm.state in (State.SHUTDOWNING, State.REBOOTING) and self.domain is not None
        assert self.vm.state in STABLE or self.job is not None or asked or self.stale

    @invariant()
    def quick_deaths_are_bounded(self):
        assert 0 <= self.vm.quick_deaths < 3


Guest.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestGuest = Guest.TestCase
