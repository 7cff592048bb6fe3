# SPDX-License-Identifier: GPL-2.0-or-later
"""Talk to monitors over their command sockets; this is also the Python API.

    with Monitor.connect("6f1d0a3e-...") as monitor:
        print(monitor.call("status").data["state"])
        monitor.call("shutdown", timeout="30")

A monitor is a process without privilege that a guest might have taken over. What it sends is named `untrusted_*` until
it is bounded and type-checked here; texts keep their control characters, and `xenvm.cli.render` escapes them.

Errors are those of `xenvm.errors`, by what the caller can do about them: `NoMonitorError` (start one),
`PermissionRefusedError`, `TimeoutExpiredError`, `ProtocolError` (the monitor talks nonsense), and the error a monitor
answered, as the class of its exit code.
"""

from __future__ import annotations

import _socket  # `socket` would load selectors and build enums: a tenth of the start time of xenvm-cmd
import os
import struct
import time

from xenvm import forms, jsontext
from xenvm.errors import (
    BusyError,
    ConfigError,
    ExitCode,
    PermissionRefusedError,
    ProtocolError,
    TimeoutExpiredError,
    UsageError,
    WrongStateError,
    XenvmError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Self

DEFAULT_SOCKET_DIR = "/run/xenvm"
REPLY_TIMEOUT_S = 90.0
"""How long one wait for a monitor lasts when the caller does not say."""
OWN_TIMEOUT_S = 60.0
"""Added to the wait for a command that itself waits for the guest and was given no `timeout`."""
MAX_WAIT_S = 1_000_000.0
MAX_RENEWALS = 60
"""Each notification starts the wait for a reply anew, but a call never lasts longer than this many waits."""
REQUEST_LIMIT = 64 * 1024
REPLY_LIMIT = 1024 * 1024
DEPTH_LIMIT = 32
EARLY_EVENTS_LIMIT = 1000

_WAITING = frozenset(
    {
        *("shutdown", "halt", "restart", "reboot", "wait"),
        *("disk-add", "disk-del", "cd-insert", "cd-eject", "nic-add", "nic-del", "nic-network-switch"),
        *("suspend", "checkpoint", "restore"),
    }
)
_PASSING_DESCRIPTOR = frozenset({"console", "console-log"})
_CONNECT_RETRY_S = 0.02


class NoMonitorError(XenvmError):
    """No monitor answers for this VM."""

    code = ExitCode.NO_MONITOR


_CLASS_OF: Mapping[ExitCode, type[XenvmError]] = {
    kind.code: kind
    for kind in (
        UsageError,
        NoMonitorError,
        WrongStateError,
        ConfigError,
        TimeoutExpiredError,
        PermissionRefusedError,
        BusyError,
    )
}


class Reply:
    """What a monitor answered: a text for people, data for programs, and for `console` a descriptor the caller owns."""

    __slots__ = ("data", "descriptor", "text")

    def __init__(self, text: str, data: object, descriptor: int | None = None) -> None:
        self.text = text
        self.data = data
        self.descriptor = descriptor

    def take_descriptor(self) -> int:
        """Return the descriptor, which now belongs to the caller; ProtocolError when the reply carried none."""
        if self.descriptor is None:
            raise ProtocolError("the monitor's reply carries no descriptor")
        descriptor, self.descriptor = self.descriptor, None
        return descriptor


def socket_directory(given: str | None = None) -> str:
    """Return the directory of the command sockets: `given`, $XENVM_SOCKET_DIR, or /run/xenvm."""
    return given or os.environ.get("XENVM_SOCKET_DIR") or DEFAULT_SOCKET_DIR


def uuids_of(names: Iterable[str], prefix: str) -> list[str]:
    """Return the uuids in those names that are a prefix and a uuid, sorted."""
    words = (name[len(prefix) :] for name in names if name.startswith(prefix))
    return sorted(filter(forms.uuid, words))


def only_one(word: str, found: Iterable[str]) -> str:
    """Return the one uuid that was found for a word.

    UsageError lists the candidates when there are several; NoMonitorError when there is none.
    """
    uuids = sorted(found)
    if len(uuids) > 1:
        raise UsageError(f"{word} stands for several VMs", hint="give one of: " + " ".join(uuids))
    if not uuids:
        hint = "`xenvm FILE` starts one; `xenvm-cmd list` shows those running"
        raise NoMonitorError(f"no monitor runs for a VM {word}", hint=hint)
    return uuids[0]


class Monitor:
    """A connection to the monitor of one VM. One request at a time; after any broken exchange it is closed."""

    def __init__(self, uuid: str, connected: _socket.socket, reply_timeout_s: float) -> None:
        self.uuid = uuid
        self.reply_timeout_s = reply_timeout_s
        self._socket: _socket.socket | None = connected
        self._untrusted = bytearray()
        self._descriptor: int | None = None
        self.handed: int | None = None
        """A descriptor that the next request takes along, and closes."""
        self._last_id = 0

    @classmethod
    def connect(cls, uuid: str, *, socket_dir: str | None = None, reply_timeout_s: float = REPLY_TIMEOUT_S) -> Monitor:
        """Connect to the monitor of the VM `uuid` (canonical form).

        NoMonitorError when none listens, PermissionRefusedError, TimeoutExpiredError after `reply_timeout_s` seconds.
        """
        deadline = time.monotonic() + reply_timeout_s
        while True:
            try:
                return cls.try_connect(uuid, socket_dir=socket_dir, reply_timeout_s=reply_timeout_s)
            except BlockingIOError:  # its queue of connections is full, and a unix socket cannot be polled for that
                if time.monotonic() >= deadline:
                    raise TimeoutExpiredError(
                        f"connect: monitor {uuid} accepted no connection within {reply_timeout_s:g} s",
                        hint="it is stuck or overloaded; --reply-timeout S waits longer",
                    ) from None
            time.sleep(_CONNECT_RETRY_S)

    @classmethod
    def try_connect(
        cls, uuid: str, *, socket_dir: str | None = None, reply_timeout_s: float = REPLY_TIMEOUT_S
    ) -> Monitor:
        """Connect without waiting; BlockingIOError when the monitor's queue of connections is full."""
        if not forms.uuid(uuid):
            raise UsageError(f"not a canonical uuid: {uuid}", hint="8-4-4-4-12 hexadecimal digits in lower case")
        path = f"{socket_directory(socket_dir)}/vm-{uuid}"
        connecting = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            connecting.setblocking(False)
            connecting.connect(path)
        except OSError as error:
            connecting.close()
            if isinstance(error, BlockingIOError):
                raise
            raise _refusal(error, uuid, path) from None
        return cls(uuid, connecting, reply_timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; harmless when it has ended."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self.handed is not None:
            os.close(self.handed)
            self.handed = None

    def fileno(self) -> int:
        """Return the descriptor to wait on for messages."""
        return self._connected("fileno").fileno()

    def call(self, method: str, /, **params: str) -> Reply:
        """Send one command and return its reply; notifications before the reply are dropped.

        One wait lasts `reply_timeout_s` seconds, plus the command's own `timeout` where it has one.
        """
        return self._exchange(method, params, lambda _event: None)

    def watch(self, method: str, on_event: Callable[[dict[str, object]], None], /, **params: str) -> Reply:
        """Like `call`, but hear of events meanwhile; as long as some come, the wait goes on."""
        handed, self.handed = self.handed, None
        try:
            self._exchange("events", {}, on_event)
        except PermissionRefusedError:  # so is the command, then, and says so itself
            pass
        except XenvmError as error:
            if error.message.startswith("events: "):
                error.message = f"{method}: {error.message.removeprefix('events: ')}"
            raise
        finally:
            self.handed = handed
        return self._exchange(method, params, on_event)

    def events(self, /, **params: str) -> Iterator[dict[str, object]]:
        """Yield what happens to the VM, for as long as its monitor lives; the request is sent with the first step."""
        early: list[dict[str, object]] = []

        def keep(event: dict[str, object]) -> None:
            if len(early) == EARLY_EVENTS_LIMIT:
                raise ProtocolError(f"events: monitor {self.uuid} floods its client")
            early.append(event)

        self._exchange("events", params, keep)
        yield from early
        while True:
            message = self.next_message("events")
            if isinstance(message, dict):
                yield message
            elif message is not None:
                raise ProtocolError(f"events: monitor {self.uuid} answered twice")
            elif not self.receive("events"):
                return

    def send(self, method: str, params: Mapping[str, str]) -> None:
        """Send one request; for callers that watch several monitors, everyone else uses `call`."""
        self._last_id += 1
        body = jsontext.dumps(
            {"jsonrpc": "2.0", "method": method, "params": dict(params), "id": self._last_id, "xenvm": 1}
        ).encode("ascii")
        if len(body) > REQUEST_LIMIT:
            raise UsageError(f"{method}: the request takes {len(body)} bytes, at most {REQUEST_LIMIT} are allowed")
        connected = self._connected(method)
        connected.settimeout(self.reply_timeout_s)
        try:
            self._send_whole(connected, struct.pack(">I", len(body)) + body)
        except TimeoutError:
            raise self._expired(method, self.reply_timeout_s) from None
        except OSError as error:
            raise self._lost(method, error.strerror) from None

    def _send_whole(self, connected: _socket.socket, frame: bytes) -> None:
        """Send a frame; a descriptor that is to be handed over travels with its first byte, and is closed here then."""
        handed, self.handed = self.handed, None
        if handed is None:
            connected.sendall(frame)
            return
        try:
            rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", handed))
            sent = connected.sendmsg([frame], [rights])
            if sent < len(frame):  # to send nothing would still fail when the monitor has answered and hung up
                connected.sendall(frame[sent:])
        finally:
            os.close(handed)

    def receive(self, method: str, wait_s: float | None = None) -> bool:
        """Read once from the monitor, waiting at most `wait_s` seconds (None: for ever); False when it hung up.

        TimeoutError when nothing came.
        """
        if wait_s is not None and wait_s <= 0:
            raise TimeoutError
        connected = self._connected(method)
        connected.settimeout(wait_s)
        try:  # room for exactly one descriptor: the kernel drops further ones and sets MSG_CTRUNC
            untrusted, ancillary, flags, _ = connected.recvmsg(65536, _socket.CMSG_LEN(4), _socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        for level, kind, untrusted_body in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS and len(untrusted_body) >= 4:
                descriptor: int = struct.unpack_from("i", untrusted_body)[0]
                if self._descriptor is not None:
                    os.close(descriptor)
                    raise ProtocolError(f"{method}: monitor {self.uuid} sent several descriptors")
                self._descriptor = descriptor
        if flags & _socket.MSG_CTRUNC:
            raise ProtocolError(f"{method}: monitor {self.uuid} sent several descriptors")
        self._untrusted += untrusted
        return bool(untrusted)

    def next_message(self, method: str) -> Reply | dict[str, object] | None:
        """Take a whole message from what was received: a reply, an event's params, or None; raise an error reply."""
        untrusted_frame = self._next_frame(method)
        if untrusted_frame is None:
            return None
        try:
            message = _decode(untrusted_frame)
            if "id" not in message and isinstance(message.get("method"), str):
                return _params_of(message)
            return self._reply(method, message)
        except ProtocolError as error:
            raise ProtocolError(f"{method}: monitor {self.uuid} sent {error.message}") from None

    def _reply(self, method: str, message: dict[str, object]) -> Reply:
        ident, result, error = message.get("id"), message.get("result"), message.get("error")
        if isinstance(ident, bool) or (ident != self._last_id and (error is None or ident not in (0, None))):
            raise ProtocolError("a reply to another request")
        if isinstance(error, dict) and result is None:
            raise _error_of(error)
        if not isinstance(result, dict) or error is not None:
            raise ProtocolError("a reply with neither a result nor an error")
        text = result.get("text", "")
        if not isinstance(text, str):
            raise ProtocolError("a reply whose text is none")
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None and method not in _PASSING_DESCRIPTOR:
            os.close(descriptor)
            raise ProtocolError("a descriptor nobody asked for")
        return Reply(text, result.get("data", {}), descriptor)

    def _next_frame(self, method: str) -> bytes | None:
        if len(self._untrusted) < 4:
            return None
        size = int.from_bytes(self._untrusted[:4], "big")
        if self._untrusted.startswith(b'{"'):
            raise ProtocolError(
                f"{method}: monitor {self.uuid} answered without a frame", hint="is it a monitor of an older release?"
            )
        if not 0 < size <= REPLY_LIMIT:
            raise ProtocolError(
                f"{method}: monitor {self.uuid} announced {size} bytes, at most {REPLY_LIMIT} are allowed"
            )
        if len(self._untrusted) < 4 + size:
            return None
        frame = bytes(self._untrusted[4 : 4 + size])
        del self._untrusted[: 4 + size]
        return frame

    def _exchange(self, method: str, params: Mapping[str, str], on_event: Callable[[dict[str, object]], None]) -> Reply:
        limit_s = min(self.reply_timeout_s + own_timeout_s(method, params), MAX_WAIT_S)
        try:
            self.send(method, params)
            started = time.monotonic()
            deadline = started + limit_s
            while True:
                message = self.next_message(method)
                if isinstance(message, Reply):
                    return message
                if message is not None:
                    on_event(message)
                    deadline = min(time.monotonic(), started + (MAX_RENEWALS - 1) * limit_s) + limit_s
                elif not self.receive(method, deadline - time.monotonic()):
                    raise self._lost(method)
        except TimeoutError:
            self.close()
            raise self._expired(method, limit_s) from None
        except ProtocolError:
            self.close()
            raise

    def _connected(self, method: str) -> _socket.socket:
        if self._socket is None:
            raise XenvmError(f"{method}: the connection to monitor {self.uuid} is closed")
        return self._socket

    def _expired(self, method: str, waited_s: float) -> TimeoutExpiredError:
        return TimeoutExpiredError(
            f"{method}: no reply from monitor {self.uuid} within {waited_s:g} s",
            hint=f"--reply-timeout S waits longer; `xenvm-cmd {self.uuid} status` shows what became of the command",
        )

    def _lost(self, method: str, reason: str | None = None) -> XenvmError:
        self.close()
        return XenvmError(
            f"{method}: monitor {self.uuid} hung up without a reply" + (f" ({reason})" if reason else ""),
            hint=f"it may have done the command or not; `xenvm-cmd {self.uuid} status` tells",
        )


def _refusal(error: OSError, uuid: str, path: str) -> XenvmError:
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
        hint = "`xenvm FILE` starts one; `xenvm-cmd list` shows those running"
        return NoMonitorError(f"no monitor runs for VM {uuid}", hint=hint)
    if isinstance(error, PermissionError):
        hint = "the command sockets are for root and the group xenvm"
        return PermissionRefusedError(f"you may not connect to {path}", hint=hint)
    return XenvmError(f"cannot connect to {path}: {error.strerror or error}")


def own_timeout_s(method: str, params: Mapping[str, str]) -> float:
    """Return how many seconds a command may take by its own arguments; a malformed one is the monitor's to refuse."""
    given = params.get("timeout")
    if given is None:
        return OWN_TIMEOUT_S if method in _WAITING else 0.0
    try:
        seconds = float(given)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds <= MAX_WAIT_S else 0.0


def _decode(untrusted_frame: bytes) -> dict[str, object]:
    try:
        message = jsontext.loads(untrusted_frame.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ProtocolError("what is not JSON") from None
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0" or not _is_shallow(message, DEPTH_LIMIT):
        raise ProtocolError("what is not a JSON-RPC 2.0 message")
    return message


def _is_shallow(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_is_shallow(member, depth - 1) for member in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_is_shallow(member, depth - 1) for member in value)
    return True


def _params_of(notification: dict[str, object]) -> dict[str, object]:
    params = notification.get("params")
    if not isinstance(params, dict):
        raise ProtocolError("a notification without params")
    return params


def _error_of(untrusted_error: dict[str, object]) -> XenvmError:
    message, data = untrusted_error.get("message"), untrusted_error.get("data")
    if not isinstance(message, str):
        raise ProtocolError("an error without a message")
    number, hint = (data.get("exit"), data.get("hint")) if isinstance(data, dict) else (None, None)
    code = ExitCode.FAILED
    if isinstance(number, int) and not isinstance(number, bool) and ExitCode.FAILED <= number <= ExitCode.BUSY:
        code = ExitCode(number)
    return _CLASS_OF.get(code, XenvmError)(message, hint=hint if isinstance(hint, str) else "", code=code)
