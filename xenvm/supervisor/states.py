# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of the state machine. Imports nothing of xenvm, so that everything may import it."""

from __future__ import annotations

from xenvm.choice import StrChoice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class State(StrChoice):
    """What `status` says; the words of the original, and `crashed`."""

    CREATING = "creating-domain"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    REBOOTING = "rebooting"
    REBOOTED = "rebooted"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    RESTORING = "restoring"
    SHUTDOWNING = "shutdowning"
    SHUTDOWN = "shutdown"
    CRASHED = "crashed"


class Event(StrChoice):
    """What can happen to a VM: commands, outcomes of what the broker was asked for, and what was seen of the guest."""

    # commands
    START = "start"
    START_PAUSED = "start paused"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    SHUTDOWN = "shutdown"
    RESTART = "restart"
    FORCE_OFF = "shutdown force"
    FORCE_RESTART = "restart force"
    DESTROY = "destroy"
    SUSPEND = "suspend"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    RESTORE_PAUSED = "restore paused"
    # the guest did not do as asked in time
    IGNORED = "ignored the request"
    IGNORED_FORCE = "ignored the request, force"
    # outcomes
    BUILT = "built"
    BUILT_PAUSED = "built, paused"
    ABSENT = "no domain found"
    DESTROYED = "destroyed"
    SAVED = "saved"
    COMMITTED = "image taken over"
    ABANDONED = "image abandoned"
    WITHDRAWN = "request withdrawn"
    FAILED_UP = "failed, domain there"
    FAILED_OFF = "failed, no domain"
    DESTROY_FAILED = "destroy failed"
    # the guest, as seen
    SEEN_RUNNING = "seen running"
    SEEN_PAUSED = "seen paused"
    SEEN_SUSPENDED = "seen suspended"
    ENDED_DESTROY = "ended: destroy"
    ENDED_REBOOT = "ended: reboot"
    HALTED_PRESERVE = "halted: preserve"
    REBOOTED_PRESERVE = "rebooted: preserve"
    CRASHED_PRESERVE = "crashed: preserve"
    VANISHED = "vanished"


COMMANDS: Final = frozenset(
    {
        Event.START,
        Event.START_PAUSED,
        Event.PAUSE,
        Event.UNPAUSE,
        Event.SHUTDOWN,
        Event.RESTART,
        Event.FORCE_OFF,
        Event.FORCE_RESTART,
        Event.DESTROY,
        Event.SUSPEND,
        Event.CHECKPOINT,
        Event.RESTORE,
        Event.RESTORE_PAUSED,
    }
)
"""Events that are refused where the table has no row; all others are then no news."""

ALIVE: Final = frozenset({State.CREATED, State.RUNNING, State.PAUSED})
ENDED: Final = frozenset({State.SHUTDOWN, State.SUSPENDED, State.REBOOTED, State.CRASHED})
STABLE: Final = ALIVE | ENDED
"""States that last until something happens; a command is over when one is reached."""
