# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands about save images: from their parameters to requests. Pure."""

from __future__ import annotations

from xenvm.boundary.images import Restore, Save
from xenvm.boundary.messages import Op
from xenvm.errors import ExitCode, ProtocolError, UsageError, WrongStateError, XenvmError
from xenvm.supervisor.commands import boolean, seconds
from xenvm.supervisor.states import Event

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Final

    Params = Mapping[str, str]

COMMANDS: Final = ("suspend", "checkpoint", "restore")
CANCELLABLE: Final = frozenset(COMMANDS)
NUMBERS: Final = ("image_bytes", "rounds", "still_ms")
SUSPEND_WAIT_S: Final = 60.0  # a guest that suspends does within a second or two
COMMIT_WAIT_S: Final = 60.0  # for the client to give the file its name


def request(name: str, sequence: int, params: Params, *, hvm: bool) -> tuple[Event, Op, Save | Restore]:
    """Return what a command does to the VM, and what to ask of the broker; raise XenvmError when it cannot be done."""
    if name == "restore":
        paused = boolean(params, "paused")
        foreign = boolean(params, "foreign")
        boolean(params, "delete")  # whoever gave the command does that
        event = Event.RESTORE_PAUSED if paused else Event.RESTORE
        return event, Op.RESTORE_PAUSED if paused else Op.RESTORE, Restore(sequence, paused, foreign)
    live = boolean(params, "live")
    if live and not hvm:
        raise WrongStateError(
            f"{name}: a PV guest cannot be saved live here: that needs a hypervisor with shadow paging (log-dirty mode "
            "for PV), which Debian's is not",
            hint=f"without live=true the guest stands still while its memory is written; {name} file=... does that",
        )
    timeout_s = max(1, round(seconds(params, "timeout", SUSPEND_WAIT_S)))
    if name == "checkpoint":
        return Event.CHECKPOINT, Op.CHECKPOINT, Save(sequence, True, timeout_s, live=live)
    return Event.SUSPEND, Op.SAVE, Save(sequence, False, timeout_s, live=live)


def placed(
    name: str, message: Save | Restore, handed: int, params: Params, directories: Sequence[str]
) -> Save | Restore:
    """Return the request if its file was `handed` over; else the file is in a directory that is open to clients.

    Raise XenvmError when it is not.
    """
    if handed == 1:
        return message
    path = params.get("file", "")
    directory, _, file = path.rpartition("/")
    if not file or directory not in directories:
        raise XenvmError(
            f"{name}: {path[:200]!a} was not handed over, and lies in no directory that is open to clients",
            hint="name a file that you may open, or its directory under image-directories in /etc/xenvm/policy.toml",
            code=ExitCode.PERMISSION_REFUSED,
        )
    if boolean(params, "delete"):
        raise UsageError(f"{name}: delete=true: an image in {directory} is removed by those who may write there")
    try:
        return type(message).from_body(message.but(directory=[*directories].index(directory), file=file).as_body())
    except ProtocolError as error:
        raise UsageError(f"{name}: file: {error.message}") from None


def size(text: str) -> dict[str, object]:
    """Return what a command says of the image that it has made, from what the builder says: pairs KEY=VALUE."""
    told: dict[str, object] = {}
    for word in text.split(" "):
        key, _, value = word.partition("=")
        if key in NUMBERS and value.isascii() and value.isdigit():
            told[key] = int(value)
        elif key == "image_compression" and value == "zstd":
            told[key] = value
    return told
