# SPDX-License-Identifier: GPL-2.0-or-later
"""What udev tells of the VM's devices: a socket named by the domid, for root alone. Hints, never orders."""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import os

from xenvm.boundary.place import HERE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from xenvm.boundary.devices import Kind

DEVICES: Final = f"{HERE.sysfs}/bus/xen-backend/devices"
EVENT_LIMIT_BYTES: Final = 128
EVENTS_AT_ONCE: Final = 64


class Uevents:
    """The socket of one domain; it moves when the VM gets another domid."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._socket: socket.socket | None = None
        self._domid = -1
        sweep(directory)

    def fileno(self) -> int:
        """Return the descriptor to poll, -1 without a domain."""
        return self._socket.fileno() if self._socket else -1

    def follow(self, domid: int) -> None:
        """Listen for events of this domain, -1: of none. Works twice."""
        if domid == self._domid:
            return
        if self._socket:
            self._socket.close()
            self._socket = None
            _unlink(self._path())
        self._domid = domid
        if domid > 0:
            _unlink(self._path())
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            before = os.umask(0o177)  # only root may write to it
            try:
                self._socket.bind(self._path())
            finally:
                os.umask(before)

    def removed(self) -> bool:
        """Tell whether udev says that a device of this domain was removed; whatever else arrives is dropped."""
        found = False
        for _ in range(EVENTS_AT_ONCE):
            try:
                untrusted_event = self._socket.recv(EVENT_LIMIT_BYTES) if self._socket else b""
            except BlockingIOError:
                break
            found = found or _removed(untrusted_event, self._domid)
        return found

    def _path(self) -> str:
        return f"{self._directory}/domid-{self._domid}"


def sweep(directory: str) -> None:
    """Remove the sockets of monitors that were killed: nobody listens there, and their domains may be gone for ever."""
    for name in os.listdir(directory):  # noqa: PTH208 - pathlib costs 5 ms at each start
        if not name.startswith("domid-"):
            continue
        path = f"{directory}/{name}"
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            inode = os.stat(path).st_ino  # noqa: PTH116
            probe.connect(path)
        except ConnectionRefusedError:
            _unlink_if(path, inode)
        except OSError:
            continue
        finally:
            probe.close()


def _removed(untrusted_event: bytes, domid: int) -> bool:
    """Tell whether this is the event `remove backend/KIND/DOMID/DEVICE SEQUENCE` of the domain."""
    words = untrusted_event.split(b" ")
    parts = words[1].split(b"/") if len(words) == 3 else []
    return (
        words[0] == b"remove"
        and len(parts) == 4
        and parts[0] == b"backend"
        and parts[1] in (b"vbd", b"vif")
        and parts[2] == b"%d" % domid
        and parts[3].isdigit()
        and len(parts[3]) <= 9
        and words[2].isdigit()
        and len(words[2]) <= 20
    )


def gone(known: Iterable[tuple[Kind, int]], domid: int) -> bool:
    """Tell whether the kernel lacks a backend device of the domain: the truth behind the hints."""
    return any(not os.path.isdir(f"{DEVICES}/{kind}-{domid}-{device}") for kind, device in known)  # noqa: PTH112


def _unlink_if(path: str, inode: int) -> None:
    """Remove a file that is still the same: else another monitor has the name now."""
    try:
        if os.stat(path).st_ino == inode:  # noqa: PTH116
            os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        return


def _unlink(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108 - pathlib costs 5 ms at each start
    except FileNotFoundError:
        return
