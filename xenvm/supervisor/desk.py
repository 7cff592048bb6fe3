# SPDX-License-Identifier: GPL-2.0-or-later
"""The clients of one supervisor: accepted, served one request after another, told what happens, let go."""

from __future__ import annotations

import os
import select
import time
from abc import ABC, abstractmethod

from xenvm.context import suppress
from xenvm.errors import ProtocolError, TimeoutExpiredError, UsageError, XenvmError
from xenvm.supervisor.control import PARSE_ERROR, REQUEST_WAIT_S, Client, Request, Rights, accept

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket as socket
    from collections.abc import Mapping
    from typing import Final

    from xenvm.boundary.messages import Init
    from xenvm.supervisor.pending import Operation, Waiter
    from xenvm.supervisor.states import State

DEAF_S: Final = 1.0  # for new clients, when no descriptor is left
ALIVE_S: Final = 10.0  # between two events of progress: a builder may have nothing to say for minutes


class Desk(ABC):
    """Base of the supervisor: its clients. What a command does is for the class that inherits."""

    def __init__(self, listener: socket.socket, init: Init) -> None:
        self._listener, self._init = listener, init
        self._rights = Rights(init.all_gid, init.read_gid)
        self._clients: dict[int, Client] = {}
        self._epoll = select.epoll()
        self._serving = False
        self._waiters: list[Waiter] = []
        self._operation: Operation | None = None  # the command that changes the VM just now
        self._step: dict[str, object] = {}  # what the broker's helper is at
        self._told_s = 0.0
        self._deaf_s = 0.0  # until when no client is accepted

    @abstractmethod
    def _command(self, client: Client, request: Request) -> None:
        """Do what a request asks, at once or later; raise XenvmError when it cannot be."""

    @abstractmethod
    def _publish(self, kind: str, details: dict[str, object]) -> None:
        """Send an event with what is said of each."""

    def _serve_clients(self) -> None:
        """Begin to accept connections: at once on a start, which can be destroyed; else when the state is known."""
        if not self._serving:
            self._serving = True
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def _accept(self) -> None:
        try:
            client = accept(self._listener, self._rights, list(self._clients.values()))
        except OSError:  # else it would be tried again at once, and for ever
            self._epoll.modify(self._listener.fileno(), 0)
            self._deaf_s = time.monotonic() + DEAF_S
            return
        if client is not None:
            self._clients[client.fileno()] = client
            self._epoll.register(client.fileno(), select.EPOLLIN)

    def _from_client(self, client: Client, events: int) -> None:
        if events & select.EPOLLOUT and not client.flush():
            self._drop(client)
            return
        gone = events & (select.EPOLLHUP | select.EPOLLERR)
        if (gone or events & select.EPOLLIN) and (not client.read() or (client.ended and gone)):
            self._drop(client)
            return
        self._serve(client)

    def _serve(self, client: Client) -> None:
        """Answer what a client has asked, one request after another, and let it go when it is done."""
        while client.fileno() >= 0 and not client.waiting and not client.closing:
            try:
                request = client.next_request()
            except ProtocolError as error:
                client.refuse(0, UsageError(error.message), PARSE_ERROR)
                break
            if request is None:
                break
            client.waiting = True
            self._try(client, request)
        if client.fileno() < 0:
            return
        if client.ended and not client.waiting and not client.subscribed:
            client.closing = True
        self._send(client)

    def _send(self, client: Client) -> None:
        """Send what a client takes, and wait for what is to come of it; let it go when it is done, or of no use."""
        if not client.flush():
            self._drop(client)
            return
        wanted = (0 if client.ended else select.EPOLLIN) | (select.EPOLLOUT if client.has_output else 0)
        self._epoll.modify(client.fileno(), wanted)

    def _try(self, client: Client, request: Request) -> None:
        """Do what one request asks, or answer why not; a descriptor that it brought is not kept for another one."""
        try:
            self._command(client, request)
        except XenvmError as error:
            client.refuse(request.identifier, error)
        if not client.waiting:
            client.drop_handed()

    def _drop(self, client: Client) -> None:
        """Forget a client; a command it has begun goes on."""
        self._waiters = [waiter for waiter in self._waiters if waiter.client is not client]
        self._clients.pop(client.fileno(), None)
        self._epoll.unregister(client.fileno())
        client.close()

    def _client_deadlines(self) -> list[float]:
        """Return when waiting for a state, or for the rest of a request, is over."""
        due = [waiter.end for waiter in self._waiters]
        due += [at for at in (self._alive_s, self._deaf_s) if at]
        return due + [client.begun_s + REQUEST_WAIT_S for client in self._clients.values() if client.partial]

    def _expire(self, now_s: float, state: State) -> None:
        """Answer who has waited long enough, drop who does not end a request, tell that a command is at work."""
        if 0 < self._alive_s <= now_s:
            self._publish("progress", self._step or {"step": ""})
        if 0 < self._deaf_s <= now_s:
            self._deaf_s = 0.0
            self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
        for waiter in [waiter for waiter in self._waiters if now_s >= waiter.end]:
            if waiter not in self._waiters:  # dropped by what another one's answer led to
                continue
            self._waiters.remove(waiter)
            waiter.client.refuse(
                waiter.identifier,
                TimeoutExpiredError(
                    f"wait: the VM was not {waiter.state} within {waiter.timeout_s:g} s; it is {state}"
                ),
            )
            self._serve(waiter.client)
        for client in list(self._clients.values()):
            if client.partial and now_s >= client.begun_s + REQUEST_WAIT_S:
                self._drop(client)

    @property
    def _alive_s(self) -> float:
        """When a client that waits for the end of a command, and hears of events, is told that it is still at work."""
        operation = self._operation
        return max(self._told_s, operation.since_s) + ALIVE_S if operation and operation.client else 0.0

    def _wake(self, state: State) -> None:
        """Answer those who have waited for this state."""
        for waiter in [waiter for waiter in self._waiters if waiter.state is state]:
            if waiter not in self._waiters:  # dropped by what another one's answer led to
                continue
            self._waiters.remove(waiter)
            waiter.client.reply(waiter.identifier, "", {"state": state})
            self._serve(waiter.client)

    def _tell(self, event: Mapping[str, object]) -> None:
        """Send an event to all who want to hear of them."""
        self._told_s = time.monotonic()
        for client in [client for client in self._clients.values() if client.subscribed]:
            if client.fileno() >= 0:  # else dropped by what another one's end led to
                client.notify(event)
                self._send(client)

    def _log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = f"{stamp} uuid={self._init.uuid} {text.rstrip()}\n".encode("ascii", "backslashreplace")
        with suppress(OSError):  # it has no room, or this process has written as much of it as it may
            os.write(2, line)

    def _debug(self, text: str) -> None:
        if self._init.debug:
            self._log(text)
