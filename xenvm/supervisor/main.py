# SPDX-License-Identifier: GPL-2.0-or-later
"""The supervisor process: the VM's state and its command socket, without any privilege.

Descriptor 3 is the broker, 4 the listening command socket, 5 the watcher. It confines itself first and hears from the
broker whom it serves after that.
"""

import _socket as socket  # `socket` itself builds enumerations at each start

from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Init
from xenvm.boundary.privileges import Role
from xenvm.errors import ProtocolError
from xenvm.helpers import serve
from xenvm.supervisor.loop import Supervisor

LISTENER, WATCHER = 4, 5
INIT_WAIT_S = 60.0


def main() -> int:
    """Run one supervisor until its broker ends; return the exit status."""
    broker = serve.broker_channel()
    listener = socket.socket(fileno=LISTENER)
    watcher = Channel.from_descriptor(WATCHER)
    broker.send(serve.drop(Role.SUPERVISOR, frozenset()))
    received = broker.receive(deadline_s=INIT_WAIT_S)
    if received is None:
        return 0
    init, _ = received
    if not isinstance(init, Init):
        raise ProtocolError("a supervisor is told first whom it serves")
    return Supervisor(broker, listener, watcher, init).run()
