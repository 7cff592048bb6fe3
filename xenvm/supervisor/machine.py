# SPDX-License-Identifier: GPL-2.0-or-later
"""The state machine of one VM: step(vm, policy, happening) -> (vm, request). Pure: no clock, no input, no output."""

from __future__ import annotations

from xenvm.boundary.messages import Domain, DomainState, Fault, Op, Policy
from xenvm.errors import ExitCode, WrongStateError
from xenvm.record import MappingProxyType, Record
from xenvm.supervisor.states import ALIVE, COMMANDS, ENDED, Event, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Final

QUICK_DEATH_S: Final = 10.0
QUICK_DEATH_HVM_S: Final = 60.0  # firmware and boot loader come first, and disks are slow until the kernel has drivers
QUICK_DEATHS_LIMIT: Final = 3

REASONS: Final[Mapping[int, str]] = MappingProxyType(  # xen/sched.h, SHUTDOWN_*
    {0: "poweroff", 1: "reboot", 2: "suspend", 3: "crash", 4: "watchdog", 5: "soft reset"}
)
SUSPEND_REASON: Final = 2
ENDS: Final = frozenset(
    {
        *(Event.ENDED_DESTROY, Event.ENDED_REBOOT, Event.VANISHED),
        *(Event.HALTED_PRESERVE, Event.REBOOTED_PRESERVE, Event.CRASHED_PRESERVE),
    }
)
BUILDING: Final = frozenset({Event.START, Event.START_PAUSED, Event.RESTORE, Event.RESTORE_PAUSED})


class Step(Record):
    """What an event leads to: the next state, and what to ask of the broker."""

    state: State
    op: Op | None = None


class Vm(Record):
    """Everything the machine remembers. `fault` is set by the step that went wrong and cleared by the next command.

    `reason` says why the VM is off or held; `domid` is -1 without a domain; `started_s` is on the caller's clock. A
    guest that ends within `quick_death_s` of its start has died too soon.
    """

    state: State
    domid: int = -1
    reason: str = ""
    fault: Fault | None = None
    started_s: float = 0.0
    quick_deaths: int = 0
    quick_death_s: float = QUICK_DEATH_S


class Happening(Record):
    """One event with what is known beside it."""

    event: Event
    now_s: float = 0.0
    domid: int = -1
    reason: str = ""
    fault: Fault | None = None


def _rows(states: Iterable[State], rows: Mapping[Event, Step]) -> dict[tuple[State, Event], Step]:
    return {(state, event): step for state in states for event, step in rows.items()}


_WITH_DOMAIN: Final = (
    *(*ALIVE, State.CREATING, State.SHUTDOWNING, State.REBOOTING),
    *(State.RESTORING, State.SUSPENDING),
)

TRANSITIONS: Final[Mapping[tuple[State, Event], Step]] = MappingProxyType(
    _rows(
        State,
        {
            Event.DESTROY: Step(State.SHUTDOWNING, Op.DESTROY),
            Event.DESTROYED: Step(State.SHUTDOWN),
            Event.DESTROY_FAILED: Step(State.CRASHED),
            Event.FAILED_OFF: Step(State.SHUTDOWN),
        },
    )
    | _rows(
        _WITH_DOMAIN,
        {
            Event.ENDED_DESTROY: Step(State.SHUTDOWNING, Op.DESTROY),
            Event.ENDED_REBOOT: Step(State.REBOOTING, Op.REBUILD),
            Event.HALTED_PRESERVE: Step(State.SHUTDOWN),
            Event.REBOOTED_PRESERVE: Step(State.REBOOTED),
            Event.CRASHED_PRESERVE: Step(State.CRASHED),
            Event.VANISHED: Step(State.SHUTDOWNING, Op.DESTROY),
        },
    )
    | _rows([state for state in _WITH_DOMAIN if state not in ALIVE], {Event.FAILED_UP: Step(State.RUNNING)})
    | {(state, Event.FAILED_UP): Step(state) for state in (*ALIVE, *ENDED)}
    | {(state, Event.SEEN_SUSPENDED): Step(state, Op.RESUME) for state in _WITH_DOMAIN if state is not State.SUSPENDING}
    | _rows(
        [State.SHUTDOWN, State.SUSPENDED],
        {
            Event.START: Step(State.CREATING, Op.BUILD),
            Event.START_PAUSED: Step(State.CREATING, Op.BUILD_PAUSED),
            Event.RESTORE: Step(State.RESTORING, Op.RESTORE),
            Event.RESTORE_PAUSED: Step(State.RESTORING, Op.RESTORE_PAUSED),
        },
    )
    | _rows(
        [State.RESTORING],
        {
            Event.BUILT: Step(State.RUNNING),
            Event.BUILT_PAUSED: Step(State.PAUSED),
            Event.SEEN_RUNNING: Step(State.RUNNING),
            Event.SEEN_PAUSED: Step(State.PAUSED),
            Event.ABSENT: Step(State.SHUTDOWN),
        },
    )
    | _rows(
        [State.SUSPENDING],
        {
            Event.SAVED: Step(State.SUSPENDING),
            Event.COMMITTED: Step(State.SUSPENDING, Op.DESTROY),
            Event.DESTROYED: Step(State.SUSPENDED),
            Event.ABANDONED: Step(State.SUSPENDING, Op.RESUME),
            Event.SEEN_RUNNING: Step(State.RUNNING),
            Event.SEEN_PAUSED: Step(State.PAUSED),
        },
    )
    | _rows(
        [State.CREATING],
        {
            Event.BUILT: Step(State.RUNNING),
            Event.BUILT_PAUSED: Step(State.CREATED),
            Event.SEEN_RUNNING: Step(State.RUNNING),
            Event.SEEN_PAUSED: Step(State.PAUSED),
            Event.ABSENT: Step(State.SHUTDOWN),
        },
    )
    | _rows(
        [State.RUNNING],
        {
            Event.PAUSE: Step(State.RUNNING, Op.PAUSE),
            Event.SEEN_PAUSED: Step(State.PAUSED),
            Event.SHUTDOWN: Step(State.SHUTDOWNING, Op.ASK_POWEROFF),
            Event.RESTART: Step(State.REBOOTING, Op.ASK_REBOOT),
            Event.SUSPEND: Step(State.SUSPENDING, Op.SAVE),
            Event.CHECKPOINT: Step(State.SUSPENDING, Op.CHECKPOINT),
        },
    )
    | {(state, Event.UNPAUSE): Step(state, Op.UNPAUSE) for state in (State.PAUSED, State.CREATED)}
    | _rows([State.PAUSED, State.CREATED], {Event.SEEN_RUNNING: Step(State.RUNNING)})
    | _rows(
        ALIVE,
        {
            Event.FORCE_OFF: Step(State.SHUTDOWNING, Op.FORCE_POWEROFF),
            Event.FORCE_RESTART: Step(State.REBOOTING, Op.REBUILD),
        },
    )
    | _rows(
        [State.SHUTDOWNING],
        {
            Event.IGNORED: Step(State.SHUTDOWNING, Op.WITHDRAW),
            Event.IGNORED_FORCE: Step(State.SHUTDOWNING, Op.FORCE_POWEROFF),
            Event.WITHDRAWN: Step(State.RUNNING),
        },
    )
    | _rows(
        [State.REBOOTING],
        {
            Event.BUILT: Step(State.RUNNING),
            Event.BUILT_PAUSED: Step(State.CREATED),
            Event.IGNORED: Step(State.REBOOTING, Op.WITHDRAW),
            Event.IGNORED_FORCE: Step(State.REBOOTING, Op.REBUILD),
            Event.WITHDRAWN: Step(State.RUNNING),
        },
    )
)


def step(vm: Vm, happening: Happening) -> tuple[Vm, Op | None]:
    """Return the VM after an event, and what to ask of the broker.

    A command that the state does not allow raises WrongStateError and changes nothing; other events without a row are
    no news and change nothing either.
    """
    event = happening.event
    row = TRANSITIONS.get((vm.state, event))
    if row is None or (event in BUILDING and vm.domid > 0):
        if event in COMMANDS:
            raise _refusal(vm, event)
        return vm, None
    if event in COMMANDS:
        quick_deaths = vm.quick_deaths if event in (Event.PAUSE, Event.UNPAUSE) else 0
        return vm.but(state=row.state, fault=None, quick_deaths=quick_deaths), row.op
    so_far = None if event in ENDS else vm.fault  # that a guest runs on in spite of a request is no longer so
    after = vm.but(state=row.state, fault=happening.fault or so_far, reason=happening.reason or vm.reason)
    if happening.domid > 0:
        after = after.but(domid=happening.domid)
    if event is Event.ENDED_REBOOT:
        quick = (
            happening.now_s - vm.started_s < vm.quick_death_s and vm.state is not State.REBOOTING
        )  # then a command did it
        after = after.but(quick_deaths=vm.quick_deaths + 1 if quick else 0)
    if row.state in ALIVE and vm.state not in ALIVE and event in (Event.BUILT, Event.BUILT_PAUSED):
        after = after.but(started_s=happening.now_s, reason="")
    if event in (Event.DESTROYED, Event.FAILED_OFF, Event.ABSENT):
        after = after.but(domid=-1)
    if after.fault and event in (Event.FAILED_OFF, Event.DESTROY_FAILED):
        after = after.but(reason=after.fault.message)
    return after, row.op


def _refusal(vm: Vm, event: Event) -> WrongStateError:
    held = vm.state in ENDED and vm.domid > 0
    text = f"{event} is not possible: the VM is {vm.state}"
    if held:
        return WrongStateError(f"{text}, its domain {vm.domid} is preserved", hint="destroy it first")
    return WrongStateError(text)


def seen(vm: Vm, policy: Policy, domain: Domain, now_s: float) -> Happening:
    """Turn a look at the domain into the event it means under the VM's policy.

    A guest that was asked to restart and stops in whatever orderly way is restarted. A guest whose policy is reboot
    and that ended for the third time in a row soon after its start is left off.
    """
    if domain.state is DomainState.RUNNING:
        return Happening(Event.SEEN_RUNNING, now_s, domain.domid)
    if domain.state is DomainState.PAUSED:
        return Happening(Event.SEEN_PAUSED, now_s, domain.domid)
    if domain.state is not DomainState.SHUTDOWN:
        return Happening(Event.VANISHED, now_s, reason=f"domain {vm.domid} was destroyed by something else")
    if domain.reason == SUSPEND_REASON:
        return Happening(Event.SEEN_SUSPENDED, now_s, domain.domid)
    word = REASONS.get(domain.reason, f"shutdown code {domain.reason}")
    reason = f"the guest ended: {word}"
    if domain.reason == 0:
        action, preserve = policy.on_halt, Event.HALTED_PRESERVE
    elif domain.reason == 1:
        action, preserve = policy.on_reboot, Event.REBOOTED_PRESERVE
    else:
        action, preserve = policy.on_crash, Event.CRASHED_PRESERVE
    asked_to_restart = vm.state is State.REBOOTING
    if asked_to_restart and domain.reason in (0, 1):
        action = "reboot"
    fault = None
    if domain.reason > 1 and vm.state in (State.SHUTDOWNING, State.REBOOTING):
        fault = Fault(int(ExitCode.FAILED), f"{reason}, instead of doing as asked", "")
    if action == "preserve":
        return Happening(preserve, now_s, domain.domid, f"{reason}; preserved as domain {domain.domid}", fault)
    if action == "reboot":
        quick = now_s - vm.started_s < vm.quick_death_s
        if not asked_to_restart and quick and vm.quick_deaths + 1 >= QUICK_DEATHS_LIMIT:
            reason = (
                f"the guest ended {QUICK_DEATHS_LIMIT} times in a row within {vm.quick_death_s:g} s of its start "
                f"(last: {word}): left off"
            )
            return Happening(Event.ENDED_DESTROY, now_s, domain.domid, reason, fault)
        return Happening(Event.ENDED_REBOOT, now_s, domain.domid, reason, fault)
    return Happening(Event.ENDED_DESTROY, now_s, domain.domid, reason, fault)


def markdown_table() -> str:
    """Return the transition table for the manual, one row per line."""
    lines = ["| state | event | next state | asks the broker |", "|---|---|---|---|"]
    order = {state: place for place, state in enumerate(State)}
    for (state, event), row in sorted(TRANSITIONS.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        lines.append(f"| {state} | {event} | {row.state} | {row.op or ''} |")
    return "\n".join(lines) + "\n"
