# SPDX-License-Identifier: GPL-2.0-or-later
"""The devicemodel process: starts the QEMU of one domain, which inherits its confinement, and sees it come up.

1. keep of root's powers those to change user and root directory, of the files those that QEMU needs to start;
2. read one Launch, start QEMU, give up the rest;
3. talk to QEMU until it runs, say so and exit; QEMU stays. Should it not come up, the broker ends it.
"""

from __future__ import annotations

import pwd

from xenvm.boundary.confine import become
from xenvm.boundary.machine import Launch, Launched
from xenvm.boundary.privileges import QEMU_USER, TABLE, Role
from xenvm.errors import ProtocolError, XenvmError
from xenvm.helpers import serve
from xenvm.helpers.devicemodel.process import Qemu, major_version


def main() -> int:
    """Run one devicemodel worker; return its exit status."""
    channel = serve.broker_channel()
    try:
        first_uid = _first_uid()
        channel.send(serve.drop(Role.DEVICEMODEL, frozenset()))
        major = major_version()
        received = serve.request(channel)
        if received is None:
            return 0
        message, descriptors = received
        if not isinstance(message, Launch):
            raise ProtocolError("a devicemodel worker launches QEMU only")
        qemu = Qemu(message, descriptors, first_uid + message.domid, major)
        channel.send(Launched(qemu.pid, up=False, tty=""))  # the broker ends it, should it not come up
        become(TABLE[Role.DEVICEMODEL], first_uid)
        channel.send(Launched(qemu.pid, up=True, tty=qemu.take_up()))
    except XenvmError as error:
        return serve.fail(channel, error)
    return 0


def _first_uid() -> int:
    try:
        return pwd.getpwnam(QEMU_USER).pw_uid
    except KeyError:
        raise XenvmError(f"the user {QEMU_USER} does not exist", hint="run scripts/install-host as root") from None
