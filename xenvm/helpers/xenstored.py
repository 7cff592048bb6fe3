# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket of xenstored, opened while a process is still root. Whoever holds it has dom0's power over xenstore."""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import struct

from xenvm.boundary.place import HERE
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

SOCKET_PATHS: Final = HERE.stores
CONNECT_WAIT_S: Final = 40  # xenstored has a queue of one for those who connect, and dom0's processor to share
TIMEVAL: Final = struct.Struct("@ll")  # socket(7), SO_SNDTIMEO: so long connect(2) waits in that queue


class StoreError(XenvmError):
    """xenstored refused or cannot be reached."""


def connect() -> socket.socket:
    """Connect to xenstored (needs root). Raise StoreError when no daemon listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(CONNECT_WAIT_S, 0))
    for path in SOCKET_PATHS:
        try:
            connection.connect(path)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            raise StoreError(
                f"xenstored took no connection at {path} within {CONNECT_WAIT_S} s",
                hint="is it, or this host, very busy?",
            ) from None
        except OSError as error:
            raise StoreError(f"cannot connect to xenstored at {path}: {error.strerror}") from error
        connection.settimeout(CONNECT_WAIT_S)
        return connection
    raise StoreError(
        f"cannot connect to xenstored: no socket at {SOCKET_PATHS[0]}", hint="is this a Xen host, and is xenstored up?"
    )
