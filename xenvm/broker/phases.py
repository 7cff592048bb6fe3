# SPDX-License-Identifier: GPL-2.0-or-later
"""The phase table: which request of the supervisor is legal when, how often, and how long it may take. Pure data."""

from __future__ import annotations

from xenvm.boundary.messages import Op
from xenvm.choice import StrChoice
from xenvm.record import MappingProxyType, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final


class VmPhase(StrChoice):
    """What the broker knows of its VM, from its own helpers alone."""

    UNKNOWN = "unknown"  # not looked yet, or a helper died over it
    ABSENT = "absent"
    BUILT = "built"


class Permit(Record):
    """One request: the phases it is legal in, how many a minute, and the seconds its helper gets (0: no helper)."""

    phases: frozenset[VmPhase]
    per_minute: int
    deadline_s: float


_ANY: Final = frozenset(VmPhase)
_BUILT: Final = frozenset({VmPhase.BUILT})
_ABSENT: Final = frozenset({VmPhase.ABSENT})
_LOOKED: Final = _BUILT | _ABSENT
_SHORT_S: Final = 60.0  # one small thing; what a helper takes to come up is not in it

PERMITS: Final[Mapping[Op, Permit]] = MappingProxyType(
    {
        Op.FIND: Permit(_ANY, 60, 90),
        Op.BUILD: Permit(_ABSENT, 30, 600),
        Op.BUILD_PAUSED: Permit(_ABSENT, 30, 600),
        Op.REBUILD: Permit(_BUILT, 60, 720),
        Op.QUERY: Permit(_BUILT, 600, _SHORT_S),
        Op.PAUSE: Permit(_BUILT, 600, _SHORT_S),
        Op.UNPAUSE: Permit(_BUILT, 600, _SHORT_S),
        Op.RESUME: Permit(_BUILT, 60, 120),
        Op.PRESS_POWER: Permit(_BUILT, 120, _SHORT_S),
        Op.PRESS_SLEEP: Permit(_BUILT, 120, _SHORT_S),
        Op.NMI: Permit(_BUILT, 120, _SHORT_S),
        Op.S_STATE: Permit(_BUILT, 600, _SHORT_S),
        Op.FALL_ASLEEP: Permit(_BUILT, 120, _SHORT_S),
        Op.WAKE: Permit(_BUILT, 120, _SHORT_S),
        Op.ASK_SLEEP: Permit(_BUILT, 120, _SHORT_S),
        Op.ASK_POWEROFF: Permit(_BUILT, 120, _SHORT_S),
        Op.ASK_REBOOT: Permit(_BUILT, 120, _SHORT_S),
        Op.WITHDRAW: Permit(_BUILT, 120, _SHORT_S),
        Op.FORCE_POWEROFF: Permit(_BUILT, 120, _SHORT_S),
        Op.DESTROY: Permit(_ANY, 120, 180),
        Op.SAVE: Permit(_BUILT, 30, 120),
        Op.CHECKPOINT: Permit(_BUILT, 30, 120),
        Op.RESTORE: Permit(_ABSENT, 30, 720),
        Op.RESTORE_PAUSED: Permit(_ABSENT, 30, 720),
        Op.CANCEL: Permit(_ANY, 120, 0),
        Op.DEVICES: Permit(_LOOKED, 600, _SHORT_S),
        Op.PLUG: Permit(_BUILT, 600, 120),
        Op.UNPLUG: Permit(_BUILT, 600, 60),
        Op.REBRIDGE: Permit(_BUILT, 600, _SHORT_S),
        Op.SETTLE: Permit(_BUILT, 60, 60),
        Op.CONSOLE: Permit(_BUILT, 120, _SHORT_S),
        Op.CONSOLE_LOG: Permit(_ANY, 120, 0),
        Op.READ_CONFIG: Permit(_ANY, 30, 0),
        Op.STARTED: Permit(_ANY, 10, 0),
        Op.QUIT: Permit(_ANY, 10, 0),
    }
)
"""START, START_PAUSED, START_RESTORED, CRASH and SURVEY are not here: the broker begins those by itself."""

STARTUP_OPS: Final = MappingProxyType({"started": Op.START, "paused": Op.START_PAUSED, "shutdown": Op.FIND})
"""By the word of the config; all others are from an image."""

SELDOM_FOLLOWED: Final = frozenset({Op.FIND, Op.DESTROY, Op.SETTLE, Op.SURVEY})
"""After these no helper is made ready."""

FOLLOWED_AT_ONCE: Final = frozenset({Op.QUERY, Op.PAUSE, Op.UNPAUSE, Op.SAVE})
"""With these the next one is made ready as they begin: a guest that has rebooted is built anew, one that is paused runs
again soon, one that is saved is destroyed."""

START_DEADLINE_S: Final = 720.0
IMAGE_S_PER_MIB: Final = 0.5
LIVE_PASSES: Final = 4
MODEL_S: Final = 80.0  # for a device model that is slow to note, to stand still and to say its state

SAVING: Final = frozenset({Op.SAVE, Op.CHECKPOINT})
"""What leaves the guest suspended when its helper dies."""

LEAVES_SUSPENDED: Final = SAVING | {Op.RESUME}
"""What is followed by RESUME when the monitor ends over it."""

RESTORING: Final = frozenset({Op.RESTORE, Op.RESTORE_PAUSED, Op.START_RESTORED})
"""What reads an image."""

REBUILDING: Final = RESTORING | {Op.START, Op.START_PAUSED, Op.BUILD, Op.BUILD_PAUSED, Op.REBUILD}
"""What makes devices."""

LEAVES_HALF: Final = REBUILDING | {Op.DESTROY}
"""What leaves half a domain behind when its helper dies."""

ON_DEVICES: Final = frozenset({Op.DEVICES, Op.PLUG, Op.UNPLUG, Op.REBRIDGE, Op.SETTLE})
"""What a hotplug worker does, beside a domain that runs."""

WITH_ARGUMENTS: Final = frozenset({Op.PLUG, Op.UNPLUG, Op.REBRIDGE, Op.RESTORE, Op.RESTORE_PAUSED}) | SAVING
"""What comes as a message of its own, never as a plain Ask."""

LOOKED_UP: Final = frozenset({Op.FIND, Op.START, Op.START_PAUSED, Op.START_RESTORED, Op.SETTLE})
"""After these every device is known."""


def extra_s(op: Op, memory_mib: int, *, live: bool) -> float:
    """Return what reading or writing an image may take beyond the deadline; 0 for all that has none.

    A live image may have the memory several times; whoever restores one cannot tell.
    """
    passes = LIVE_PASSES if live or op in RESTORING else 1
    return MODEL_S + memory_mib * IMAGE_S_PER_MIB * passes if op in SAVING | RESTORING else 0.0
