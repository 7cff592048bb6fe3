# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket of xenstored, opened while a process is still root. Whoever holds it has dom0's power over xenstore."""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start

from xenvm.boundary.place import HERE
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

SOCKET_PATHS: Final = HERE.stores
CONNECT_WAIT_S: Final = 10.0


class StoreError(XenvmError):
    """xenstored refused or cannot be reached."""


def connect() -> socket.socket:
    """Connect to xenstored (needs root). Raise StoreError when no daemon listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_WAIT_S)
    for path in SOCKET_PATHS:
        try:
            connection.connect(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreError(f"cannot connect to xenstored at {path}: {error.strerror}") from error
        return connection
    raise StoreError(
        f"cannot connect to xenstored: no socket at {SOCKET_PATHS[0]}", hint="is this a Xen host, and is xenstored up?"
    )
