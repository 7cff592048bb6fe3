# SPDX-License-Identifier: GPL-2.0-or-later
"""The state machine, row by row: policies and reasons, commands and their refusals, quick deaths."""

import itertools

import pytest

from xenvm.boundary.messages import NO_DOMAIN, Domain, DomainState, Fault, Op, Phase, Policy
from xenvm.errors import WrongStateError
from xenvm.supervisor.machine import (
    BUILDING,
    QUICK_DEATH_HVM_S,
    QUICK_DEATH_S,
    QUICK_DEATHS_LIMIT,
    TRANSITIONS,
    Happening,
    Vm,
    markdown_table,
    seen,
    step,
)
from xenvm.supervisor.states import ALIVE, COMMANDS, ENDED, STABLE, Event, State

POLICY = Policy("started", "destroy", "reboot", "destroy", 60, 40)
RUNNING = Vm(State.RUNNING, domid=7, started_s=1000.0)
NOT_ALIVE_WITH_DOMAIN = (State.CREATING, State.SHUTDOWNING, State.REBOOTING)
FAULT = Fault(7, "it went wrong", "try again")


def look(state, reason=-1):
    return Domain(7, state, Phase.BUILT, reason, 65536, 1, 5)


def ended(vm, reason, policy=POLICY, after_s=60.0):
    """What follows when the guest is found shut down with `reason`, `after_s` seconds after its start."""
    happening = seen(vm, policy, look(DomainState.SHUTDOWN, reason), vm.started_s + after_s)
    return (happening.event, *step(vm, happening))


def policy_for(**actions):
    return POLICY.but(**actions)


# Policies

REASONS = {"poweroff": (0, "on_halt"), "reboot": (1, "on_reboot"), "crash": (3, "on_crash")}
REASONS |= {"watchdog": (4, "on_crash"), "soft reset": (5, "on_crash"), "shutdown code 9": (9, "on_crash")}
PRESERVED = {"on_halt": State.SHUTDOWN, "on_reboot": State.REBOOTED, "on_crash": State.CRASHED}


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED, State.CREATED, State.SHUTDOWNING, State.CREATING])
@pytest.mark.parametrize(("word", "action"), list(itertools.product(REASONS, ["preserve", "reboot", "destroy"])))
def test_every_policy_for_every_reason(word, action, state):
    reason, key = REASONS[word]
    others = {name: "destroy" if action != "destroy" else "reboot" for name in PRESERVED if name != key}
    vm, op = ended(RUNNING.but(state=state), reason, policy_for(**others, **{key: action}))[1:]
    assert word in vm.reason
    if action == "preserve":
        assert (vm.state, op, vm.domid) == (PRESERVED[key], None, 7)
        assert "preserved as domain 7" in vm.reason
    elif action == "reboot":
        assert (vm.state, op, vm.domid) == (State.REBOOTING, Op.REBUILD, 7)
    else:
        assert (vm.state, op, vm.domid) == (State.SHUTDOWNING, Op.DESTROY, 7)


@pytest.mark.parametrize("action", ["preserve", "reboot", "destroy"])
@pytest.mark.parametrize("state", [*ALIVE, *NOT_ALIVE_WITH_DOMAIN])
def test_a_suspended_guest_is_resumed_whatever_the_policy(state, action):
    everything = policy_for(on_halt=action, on_reboot=action, on_crash=action)
    event, vm, op = ended(RUNNING.but(state=state), 2, everything)
    assert (event, vm.state, op, vm.domid) == (Event.SEEN_SUSPENDED, state, Op.RESUME, 7)


@pytest.mark.parametrize(("found", "state"), [("RUNNING", State.RUNNING), ("PAUSED", State.PAUSED)])
def test_a_suspended_guest_found_at_the_start_is_up_once_it_is_resumed(found, state):
    event, vm, op = ended(RUNNING.but(state=State.CREATING), 2)
    assert (event, vm.state, op) == (Event.SEEN_SUSPENDED, State.CREATING, Op.RESUME)
    vm, op = step(vm, seen(vm, POLICY, look(DomainState[found]), 0))
    assert (vm.state, op) == (state, None)


@pytest.mark.parametrize("state", [DomainState.ABSENT, DomainState.DYING])
def test_a_domain_that_vanished_is_tidied_up(state):
    happening = seen(RUNNING, POLICY, NO_DOMAIN.but(state=state), 2000.0)
    vm, op = step(RUNNING, happening)
    assert (vm.state, op) == (State.SHUTDOWNING, Op.DESTROY)
    assert "domain 7 was destroyed by something else" in vm.reason


def test_a_guest_asked_to_restart_that_powers_off_is_restarted():
    asked, op = step(RUNNING, Happening(Event.RESTART))
    assert (asked.state, op) == (State.REBOOTING, Op.ASK_REBOOT)
    everything = policy_for(on_halt="destroy", on_reboot="preserve")
    for reason in (0, 1):
        event, vm, op = ended(asked, reason, everything)
        assert (event, vm.state, op) == (Event.ENDED_REBOOT, State.REBOOTING, Op.REBUILD)
        assert vm.fault is None


@pytest.mark.parametrize("command", [Event.RESTART, Event.SHUTDOWN])
def test_a_crash_instead_of_doing_as_asked_is_a_fault(command):
    asked, _ = step(RUNNING, Happening(command))
    event, vm, op = ended(asked, 3)
    assert (event, vm.state, op) == (Event.ENDED_DESTROY, State.SHUTDOWNING, Op.DESTROY)
    assert "crash, instead of doing as asked" in vm.fault.message
    assert ended(RUNNING, 3)[1].fault is None


# Quick deaths


def die(vm, after_s):
    """Let the guest reboot `after_s` seconds after its start, and be built again where the policy says so."""
    vm, op = ended(vm, 1, after_s=after_s)[1:]
    if op is Op.REBUILD:
        vm, _ = step(vm, Happening(Event.BUILT, vm.started_s + after_s, vm.domid + 1))
        assert (vm.state, vm.reason) == (State.RUNNING, "")
    return vm, op


def test_three_quick_deaths_leave_the_guest_off():
    vm = RUNNING
    for _ in range(QUICK_DEATHS_LIMIT - 1):
        vm, op = die(vm, 1.0)
        assert op is Op.REBUILD
    vm, op = die(vm, QUICK_DEATH_S - 0.1)
    assert (vm.state, op) == (State.SHUTDOWNING, Op.DESTROY)
    off, _ = step(vm, Happening(Event.DESTROYED))
    assert off.state is State.SHUTDOWN
    assert "3 times in a row within 10 s" in off.reason
    assert "reboot" in off.reason
    assert "left off" in off.reason


def test_an_hvm_guest_has_a_minute():
    """Firmware and boot loader come first: one that panics as soon as it can does so after half a minute."""
    vm = RUNNING.but(quick_death_s=QUICK_DEATH_HVM_S)
    for _ in range(QUICK_DEATHS_LIMIT - 1):
        vm, op = die(vm, 30.0)
        assert op is Op.REBUILD
    vm, op = die(vm, QUICK_DEATH_HVM_S - 0.1)
    assert (vm.state, op) == (State.SHUTDOWNING, Op.DESTROY)
    assert "within 60 s" in vm.reason


@pytest.mark.parametrize("reason", [0, 1, 3, 4])
def test_deaths_of_any_kind_count_where_the_policy_is_reboot(reason):
    vm = RUNNING.but(quick_deaths=QUICK_DEATHS_LIMIT - 1)
    everything = policy_for(on_halt="reboot", on_crash="reboot")
    assert ended(vm, reason, everything, after_s=1.0)[0] is Event.ENDED_DESTROY
    assert ended(vm.but(quick_deaths=1), reason, everything, after_s=1.0)[0] is Event.ENDED_REBOOT


def test_a_guest_that_lived_long_enough_starts_counting_anew():
    vm, _ = die(RUNNING, 1.0)
    vm, _ = die(vm, 1.0)
    vm, op = die(vm, QUICK_DEATH_S)
    assert op is Op.REBUILD
    assert vm.quick_deaths == 0
    vm, op = die(vm, 1.0)
    vm, op = die(vm, 1.0)
    assert op is Op.REBUILD


@pytest.mark.parametrize("command", [Event.RESTART, Event.FORCE_RESTART])
def test_a_commanded_restart_does_not_count(command):
    vm = RUNNING
    for _ in range(2 * QUICK_DEATHS_LIMIT):
        vm, op = step(vm, Happening(command, vm.started_s + 1))
        if command is Event.RESTART:
            event, vm, op = ended(vm, 1, after_s=1.0)
            assert event is Event.ENDED_REBOOT
        assert op is Op.REBUILD
        vm, _ = step(vm, Happening(Event.BUILT, vm.started_s + 1, vm.domid + 1))
        assert vm.quick_deaths == 0
    for _ in range(QUICK_DEATHS_LIMIT - 1):
        vm, op = die(vm, 1.0)
        assert op is Op.REBUILD
    assert die(vm, 1.0)[1] is Op.DESTROY


@pytest.mark.parametrize("command", [Event.PAUSE, Event.UNPAUSE])
def test_a_pause_does_not_make_quick_deaths_forgotten(command):
    vm = RUNNING.but(state=State.RUNNING if command is Event.PAUSE else State.PAUSED, quick_deaths=2)
    assert step(vm, Happening(command))[0].quick_deaths == 2


def test_a_start_by_command_forgets_quick_deaths():
    off = Vm(State.SHUTDOWN, quick_deaths=2, reason="left off")
    vm, op = step(off, Happening(Event.START))
    assert (vm.state, op, vm.quick_deaths, vm.fault) == (State.CREATING, Op.BUILD, 0, None)


# Commands


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, sorted(COMMANDS))))
def test_a_command_has_a_row_or_is_refused(state, event):
    vm = Vm(state, domid=-1 if state in (State.SHUTDOWN, State.SUSPENDED) else 7, fault=FAULT)
    if (state, event) in TRANSITIONS:
        after, op = step(vm, Happening(event))
        assert after.state is TRANSITIONS[state, event].state
        assert op is TRANSITIONS[state, event].op
        assert op is not None
        assert after.fault is None
    else:
        with pytest.raises(WrongStateError, match=f"{event} is not possible: the VM is {state}"):
            step(vm, Happening(event))
        assert vm == Vm(state, domid=-1 if state in (State.SHUTDOWN, State.SUSPENDED) else 7, fault=FAULT)


@pytest.mark.parametrize(
    ("event", "states"),
    [
        *((event, {State.SHUTDOWN, State.SUSPENDED}) for event in BUILDING),
        (Event.SUSPEND, {State.RUNNING}),
        (Event.CHECKPOINT, {State.RUNNING}),
        (Event.PAUSE, {State.RUNNING}),
        (Event.UNPAUSE, {State.PAUSED, State.CREATED}),
        (Event.SHUTDOWN, {State.RUNNING}),
        (Event.RESTART, {State.RUNNING}),
        (Event.FORCE_OFF, ALIVE),
        (Event.FORCE_RESTART, ALIVE),
        (Event.DESTROY, set(State)),
    ],
)
def test_where_each_command_is_possible(event, states):
    assert {state for state in State if (state, event) in TRANSITIONS} == set(states)


@pytest.mark.parametrize("state", ENDED)
@pytest.mark.parametrize("event", sorted(BUILDING))
def test_a_preserved_domain_keeps_its_vm_from_starting(state, event):
    with pytest.raises(WrongStateError, match="domain 7 is preserved") as caught:
        step(Vm(state, domid=7), Happening(event))
    assert caught.value.hint == "destroy it first"


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, sorted(set(Event) - COMMANDS))))
def test_what_has_no_row_is_no_news(state, event):
    vm = Vm(state, domid=7, reason="because", quick_deaths=1)
    after, op = step(vm, Happening(event, 5.0, 9, "another", FAULT))
    if (state, event) in TRANSITIONS:
        assert (after.state, op) == (TRANSITIONS[state, event].state, TRANSITIONS[state, event].op)
    else:
        assert after is vm
        assert op is None


def test_pausing_and_unpausing():
    vm, op = step(RUNNING, Happening(Event.PAUSE))
    assert (vm.state, op) == (State.RUNNING, Op.PAUSE)
    vm, op = step(vm, seen(vm, POLICY, look(DomainState.PAUSED), 0))
    assert (vm.state, op) == (State.PAUSED, None)
    vm, op = step(vm, Happening(Event.UNPAUSE))
    assert (vm.state, op) == (State.PAUSED, Op.UNPAUSE)
    vm, op = step(vm, seen(vm, POLICY, look(DomainState.RUNNING), 0))
    assert (vm.state, op, vm.started_s) == (State.RUNNING, None, RUNNING.started_s)


@pytest.mark.parametrize(("command", "forced"), [(Event.SHUTDOWN, Op.FORCE_POWEROFF), (Event.RESTART, Op.REBUILD)])
def test_a_guest_that_ignores_the_request(command, forced):
    asked, _ = step(RUNNING, Happening(command))
    vm, op = step(asked, Happening(Event.IGNORED, fault=FAULT))
    assert (vm.state, op, vm.fault) == (asked.state, Op.WITHDRAW, FAULT)
    vm, op = step(vm, Happening(Event.WITHDRAWN))
    assert (vm.state, op, vm.fault, vm.domid) == (State.RUNNING, None, FAULT, 7)
    vm, op = step(asked, Happening(Event.IGNORED_FORCE))
    assert (vm.state, op) == (asked.state, forced)


@pytest.mark.parametrize("event", [Event.DESTROYED, Event.FAILED_OFF])
@pytest.mark.parametrize("state", State)
def test_without_a_domain_there_is_no_domid(state, event):
    vm, op = step(Vm(state, domid=7), Happening(event, fault=FAULT if event is Event.FAILED_OFF else None))
    saved = (state, event) == (State.SUSPENDING, Event.DESTROYED)
    assert (vm.state, vm.domid, op) == (State.SUSPENDED if saved else State.SHUTDOWN, -1, None)
    assert vm.reason == (FAULT.message if event is Event.FAILED_OFF else "")


def test_a_failed_destroy_keeps_the_domain_and_says_why():
    vm, op = step(RUNNING.but(state=State.SHUTDOWNING), Happening(Event.DESTROY_FAILED, fault=FAULT))
    assert (vm.state, vm.domid, vm.reason, op) == (State.CRASHED, 7, FAULT.message, None)
    assert step(vm, Happening(Event.DESTROY))[1] is Op.DESTROY


# Save images


def test_a_guest_is_suspended_when_its_image_has_been_taken_over():
    vm, op = step(RUNNING, Happening(Event.SUSPEND))
    assert (vm.state, op) == (State.SUSPENDING, Op.SAVE)
    vm, op = step(vm, Happening(Event.SAVED))
    assert (vm.state, op) == (State.SUSPENDING, None)
    assert step(vm, Happening(Event.SEEN_SUSPENDED)) == (vm, None)  # as it should be
    vm, op = step(vm, Happening(Event.COMMITTED))
    assert (vm.state, op) == (State.SUSPENDING, Op.DESTROY)
    vm, op = step(vm, Happening(Event.DESTROYED))
    assert (vm.state, vm.domid, op) == (State.SUSPENDED, -1, None)


@pytest.mark.parametrize("event", [Event.SUSPEND, Event.CHECKPOINT])
def test_a_guest_whose_image_failed_runs_on(event):
    vm, _ = step(RUNNING, Happening(event))
    vm, op = step(vm, Happening(Event.FAILED_UP, domid=7, fault=FAULT))
    assert (vm.state, vm.fault, vm.domid, op) == (State.RUNNING, FAULT, 7, None)


def test_a_guest_whose_image_nobody_takes_over_is_resumed():
    vm, _ = step(RUNNING, Happening(Event.SUSPEND))
    vm, _ = step(vm, Happening(Event.SAVED))
    vm, op = step(vm, Happening(Event.ABANDONED, fault=FAULT))
    assert (vm.state, op) == (State.SUSPENDING, Op.RESUME)
    vm, op = step(vm, seen(vm, POLICY, look(DomainState.RUNNING), 0))
    assert (vm.state, vm.fault, op) == (State.RUNNING, FAULT, None)


def test_destroy_ends_a_guest_that_is_being_saved():
    vm, _ = step(RUNNING, Happening(Event.SUSPEND))
    vm, op = step(vm, Happening(Event.DESTROY))
    assert (vm.state, op) == (State.SHUTDOWNING, Op.DESTROY)
    assert step(vm, Happening(Event.DESTROYED))[0].state is State.SHUTDOWN


@pytest.mark.parametrize("state", [State.SHUTDOWN, State.SUSPENDED])
@pytest.mark.parametrize(
    ("event", "built", "goal"),
    [(Event.RESTORE, Event.BUILT, State.RUNNING), (Event.RESTORE_PAUSED, Event.BUILT_PAUSED, State.PAUSED)],
)
def test_restoring(state, event, built, goal):
    vm, op = step(Vm(state), Happening(event))
    assert (vm.state, op.value.partition("-")[0]) == (State.RESTORING, "restore")
    assert step(vm, Happening(built, domid=9))[0].state is goal
    failed, op = step(vm, Happening(Event.FAILED_OFF, fault=FAULT))
    assert (failed.state, failed.reason, op) == (State.SHUTDOWN, FAULT.message, None)


# The table as a whole


def test_every_state_can_be_reached_and_left():
    reached, frontier = {State.CREATING}, {State.CREATING}
    while frontier:
        frontier = {row.state for (state, _), row in TRANSITIONS.items() if state in frontier} - reached
        reached |= frontier
    assert reached == set(State)
    for state in State:
        assert {row.state for (origin, _), row in TRANSITIONS.items() if origin is state} - {state}


def test_a_state_that_does_not_last_has_a_way_to_one_that_does():
    for state in set(State) - STABLE:
        assert {row.state for (origin, _), row in TRANSITIONS.items() if origin is state and row.op is None} & STABLE


def test_the_printed_table_has_every_row():
    lines = markdown_table().splitlines()
    assert len(lines) == len(TRANSITIONS) + 2
    for (state, event), row in TRANSITIONS.items():
        assert f"| {state} | {event} | {row.state} | {row.op or ''} |" in lines
