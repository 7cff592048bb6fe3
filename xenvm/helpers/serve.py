# SPDX-License-Identifier: GPL-2.0-or-later
"""The one way a confined process begins: it has opened what it needs, now it becomes its row of the table."""

import os
import pwd

from xenvm import jsontext
from xenvm.boundary.confine import confine
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Hello
from xenvm.boundary.privileges import TABLE, Role
from xenvm.errors import XenvmError

BROKER_DESCRIPTOR = 3


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
