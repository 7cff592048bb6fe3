# SPDX-License-Identifier: GPL-2.0-or-later
"""xenvm-hotplug: run by udev for a backend device; hands the event to the monitor of its VM and is done.

What it says is a hint: the monitor knows its devices and looks for itself. Without a monitor nothing is to be done at
once: the kernel frees loop, nbd and dm devices by itself, and the next `xenvm FILE` removes the rest from its record.
"""

from __future__ import annotations

import _socket  # `socket` would be half of the start time
import os
import re
import sys

DIRECTORY = "/run/xenvm"
EVENT = re.compile(r"backend/(vbd|vif)/([1-9][0-9]{0,4})/[0-9]{1,9}", re.ASCII)
ACTIONS = frozenset({"online", "offline", "remove"})


def main() -> int:
    """Hand one event over; return 0 also when nobody wants it, 2 when the environment is none of udev's."""
    action, path = os.environ.get("ACTION", ""), os.environ.get("XENBUS_PATH", "")
    number = os.environ.get("SEQNUM", "0")
    match = EVENT.fullmatch(path)
    if action not in ACTIONS or not match or not (number.isascii() and number.isdigit()):
        sys.stderr.write("xenvm-hotplug: run by udev rules, with ACTION and XENBUS_PATH of a backend device\n")
        return 2
    with_socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK)
    try:
        with_socket.sendto(f"{action} {path} {number[:20]}".encode("ascii"), f"{DIRECTORY}/domid-{match[2]}")
    except OSError:  # no monitor, or one that has events enough
        return 0
    finally:
        with_socket.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
