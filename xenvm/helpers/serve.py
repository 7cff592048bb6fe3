# SPDX-License-Identifier: GPL-2.0-or-later
"""The one way a confined process begins: it has opened what it needs, now it becomes its row of the table.

Then it waits for its request, and says what has failed.
"""

from __future__ import annotations

import os
import pwd

from xenvm import jsontext
from xenvm.boundary.confine import confine
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import NO_DOMAIN, Failed, Fault, Hello
from xenvm.boundary.privileges import TABLE, Role
from xenvm.errors import ExitCode, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.messages import Domain

BROKER_DESCRIPTOR: Final = 3
REQUEST_WAIT_S: Final = 86400.0
"""A helper may be started long before it is needed: those of a restore wait until the image was read whole, for which a
large guest's has hours. It ends with its broker."""


def drop(role: Role, keep: frozenset[int]) -> Hello:
    """Confine this process to the row of `role`, keeping only the descriptors `keep` and the fixed ones.

    Return the greeting that says what was proved. Without root the identity stays; the proof says so.
    """
    row = TABLE[role]
    uid = gid = None
    if os.geteuid() == 0 and row.user is not None:
        try:
            entry = pwd.getpwnam(row.user)
        except KeyError:
            raise XenvmError(f"the user {row.user} does not exist", hint="run scripts/install-host as root") from None
        uid, gid = entry.pw_uid, entry.pw_gid
    proof = confine(row, uid=uid, gid=gid, keep=keep | frozenset(row.descriptors))
    return Hello(role.value, os.getpid(), jsontext.dumps(proof.as_dict()))


def broker_channel() -> Channel:
    """Return the channel to the process that started this one."""
    return Channel.from_descriptor(BROKER_DESCRIPTOR)


def request(channel: Channel) -> tuple[Message, list[int]] | None:
    """Wait for the broker's request and return it with its descriptors; None when the broker has ended."""
    return channel.receive(deadline_s=REQUEST_WAIT_S)


def fail(channel: Channel, error: XenvmError, left: Domain = NO_DOMAIN) -> int:
    """Tell the broker what has failed, and what is `left` of it; return the exit status for that."""
    fault = Fault(int(error.code), error.message[:4000], error.hint[:1000])
    channel.send(Failed(0, fault, left))
    return int(ExitCode.FAILED)
