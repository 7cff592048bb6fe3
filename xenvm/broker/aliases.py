# SPDX-License-Identifier: GPL-2.0-or-later
"""By which other names a disk may be known that is open here.

A toolstack writes the path of an image into xenstore as it was given. Nobody opens, or even looks up, such a path to
see which file it is: the names of what is open here are compared with it.
"""

from __future__ import annotations

import os
import stat

from xenvm import jsontext
from xenvm.broker.mounts import BLOCK_DEVICES, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.devices import DiskGrant

NAME_LIMIT: Final = 1024
ALL_LIMIT_BYTES: Final = 4 << 10
"""Of the names of all disks of a guest: they share a frame with what else is said of them."""


def names_of(grant: DiskGrant, descriptor: int, *, handed: bool, shown: str, room_bytes: int) -> tuple[str, ...]:
    """Return names of an open disk beside the one that is `shown` of it (TYPE:PATH); none where they have no room.

    The path of one that was `handed` over is what a client says.
    """
    found = set() if handed else {grant.path}
    found.add(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115 - pathlib costs 5 ms at each start
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        found.update(
            _mapped(text_of(f"{BLOCK_DEVICES}/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}/dm/name", 256))
        )
    found.discard(shown.partition(":")[2])
    names = tuple(sorted(name for name in found if len(name) <= NAME_LIMIT and _is_text(name)))
    return names if size(names) <= room_bytes else ()


def size(names: tuple[str, ...]) -> int:
    """Return how much of a frame some names take."""
    return len(jsontext.dumps([*names])) if names else 0


def _mapped(name: str) -> list[str]:
    """Return the paths of a device-mapper device; lvm doubles the hyphens inside of the names of group and volume."""
    if not name:
        return []
    group, _, volume = name.replace("--", "\0").partition("-")
    lvm = [f"/dev/{group}/{volume}".replace("\0", "-")] if group and volume else []
    return [f"/dev/mapper/{name}", *lvm]


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode()) and "\0" not in name
    except UnicodeEncodeError:
        return False
