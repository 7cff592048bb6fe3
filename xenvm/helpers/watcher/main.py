# SPDX-License-Identifier: GPL-2.0-or-later
"""The watcher process: tells the supervisor that a domain has ended somewhere on the host, and nothing else.

@releaseDomain names no domain, so the event is only a reason to look. Events are levels: any number that arrive
together become one message, and a full pipe drops none of the meaning. It ends when xenstored or the broker does;
the broker then starts another, whose first message (ARMED) makes the supervisor look too.
"""

import select

from xenvm.boundary.checks import Message
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Watch, WatchEvent
from xenvm.boundary.privileges import Role
from xenvm.errors import TimeoutExpiredError
from xenvm.helpers import serve, xenstored
from xenvm.helpers.watcher.wire import WatchConnection

SUPERVISOR_DESCRIPTOR = 4
RELEASE_WATCH = b"@releaseDomain"


def main() -> int:
    """Run until xenstored or the broker ends."""
    broker = serve.broker_channel()
    supervisor = Channel.from_descriptor(SUPERVISOR_DESCRIPTOR)
    connection = xenstored.connect()
    hello = serve.drop(Role.WATCHER, frozenset({connection.fileno()}))
    broker.send(hello)
    watch = WatchConnection(connection)
    watch.watch(RELEASE_WATCH, b"release")
    poll = select.poll()
    poll.register(broker, select.POLLIN)
    poll.register(watch, select.POLLIN)
    event = WatchEvent.ARMED  # xenstored fires each watch once when it is set
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if broker.fileno() in ready:
            return 0  # the broker says nothing to a watcher: it has ended
        if list(watch.events()):  # all of them: one message tells of every event that has arrived
            _tell(supervisor, Watch(event))
            event = WatchEvent.RELEASED


def _tell(supervisor: Channel, message: Message) -> None:
    try:
        supervisor.send(message, deadline_s=0)
    except TimeoutExpiredError:
        return  # events wait there unread already, and they all mean the same
