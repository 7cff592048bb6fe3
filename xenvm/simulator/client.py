# SPDX-License-Identifier: GPL-2.0-or-later
"""Talk to the machine of a simulated host: what the hypercall devices and the kernel are on a real one.

One SOCK_SEQPACKET datagram each way, a JSON object: a request has `op`, an answer has `error` where it failed.
"""

from __future__ import annotations

import json
import socket

from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

LIMIT_BYTES: Final = 1 << 16
ANSWER_WAIT_S: Final = 10.0


class MachineError(XenvmError):
    """The simulated machine refused a call, or is gone."""


class Machine:
    """A connection to the simulated machine. A loop device made over it lives as long as the connection, or a user."""

    def __init__(self, path: str) -> None:
        """Connect; raise MachineError when nothing simulates a host there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(ANSWER_WAIT_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise MachineError(
                f"cannot reach the simulated host at {path}: {error.strerror}", hint="xenvm --simulator FILE starts one"
            ) from error

    def fileno(self) -> int:
        """Return the descriptor of the connection."""
        return self._socket.fileno()

    def detach(self) -> int:
        """Return the descriptor, which now belongs to the caller."""
        return self._socket.detach()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def call(self, op: str, *descriptors: int, **arguments: object) -> Any:
        """Make one call and return its `result`; raise MachineError with what the machine says."""
        request = json.dumps({"op": op, **arguments}, separators=(",", ":")).encode("ascii")
        try:
            socket.send_fds(self._socket, [request], descriptors)
            answer = self._socket.recv(LIMIT_BYTES)
        except OSError as error:
            raise MachineError(f"{op}: the simulated host does not answer: {error.strerror or error}") from error
        if not answer:
            raise MachineError(f"{op}: the simulated host is gone")
        said = json.loads(answer)
        if "error" in said:
            raise MachineError(said["error"], hint=said.get("hint", ""))
        return said["result"]
