# SPDX-License-Identifier: GPL-2.0-or-later
"""The qmp process: what a save or a resume asks of the device model, which may be hostile, is asked here.

1. become user xenvm-qmp, without capabilities and with no file at all;
2. read one Attach: a connection to the device model, and a file for its state;
3. do one Wished after the other, until the broker closes the channel.

It is apart from the supervisor, whose connection is for commands, so that a guest can be woken also when no supervisor
is there; and apart from the builder, which must not read what a device model sends.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import os
import time

from xenvm.boundary.machine import STATE_LIMIT_BYTES, Attach, Granted, Wish, Wished
from xenvm.boundary.privileges import Role
from xenvm.boundary.qmp import Conversation
from xenvm.errors import ExitCode, ProtocolError, XenvmError
from xenvm.helpers import serve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

ANSWER_WAIT_S: Final = 40.0  # standing still waits for the disks' last requests
STATE_SET: Final = 0x7FFF0000  # of descriptors in QEMU, apart from those of drives, which have device numbers


def main() -> int:
    """Run one qmp worker; return its exit status."""
    channel = serve.broker_channel()
    channel.send(serve.drop(Role.QMP, frozenset()))
    received = serve.request(channel)
    if received is None:
        return 0
    message, descriptors = received
    if not isinstance(message, Attach) or not descriptors:
        raise ProtocolError("a qmp worker is attached to one device model first")
    talk = Talk(*descriptors)
    while (received := serve.request(channel)) is not None:
        if not isinstance(received[0], Wished):
            raise ProtocolError("a qmp worker hears wishes only")
        try:
            talk.grant(received[0].wish)
            channel.send(Granted())
        except XenvmError as error:
            serve.fail(channel, error)
    return 0


class Talk:
    """The conversation with one device model."""

    def __init__(self, connection: int, state: int = -1) -> None:
        self._conversation = Conversation(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, connection), 0.0)
        self._state = state
        self._greeted = False

    def grant(self, wish: Wish) -> None:
        """Have a wish granted; raise XenvmError with the reason, and TimeoutExpiredError when there is no answer."""
        self._conversation.end = time.monotonic() + ANSWER_WAIT_S
        try:
            if not self._greeted:
                self._conversation.greet()
                self._greeted = True
            if wish is Wish.SAVE:
                self._save()
            elif wish is Wish.RUN:
                self._track(on=False)
                self._conversation.ask("cont")
            else:
                self._track(on=wish is Wish.TRACK)
        except TimeoutError:
            raise XenvmError(
                f"device model: no answer to {wish} within {ANSWER_WAIT_S:g} s", code=ExitCode.TIMED_OUT
            ) from None
        except XenvmError as error:
            raise XenvmError(f"device model: {error.message}") from None

    def _track(self, *, on: bool) -> None:
        """Have it note what it writes to, or not any more.

        QEMU aborts when it is to end what it has not begun, so it begins first: that it may do twice.
        """
        for enable in (True,) if on else (True, False):
            self._conversation.ask("xen-set-global-dirty-log", {"enable": enable})

    def _save(self) -> None:
        """Have it stand still, then write its state; as its disks stay open, it can go on."""
        if self._state < 0:
            raise ProtocolError("there is no file for the state")
        ask = self._conversation.ask
        ask("stop")
        place: dict[str, object] = {"fdset-id": STATE_SET}
        ask("add-fd", place, (self._state,))
        ask("xen-save-devices-state", {"filename": f"/dev/fdset/{STATE_SET}", "live": False})
        ask("remove-fd", place)
        size = os.fstat(self._state).st_size
        if not 0 < size <= STATE_LIMIT_BYTES:
            raise XenvmError(f"it wrote a state of {size} bytes")
