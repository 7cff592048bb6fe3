# SPDX-License-Identifier: GPL-2.0-or-later
"""What dead workers of a VM may have left on the host: image servers, nbd devices, dm-crypt mappings. Found by name.

Each bears the label `xenvm-UUID-DEVICE`; one whose disk the domain does not have serves nobody.
"""

from __future__ import annotations

import os

from xenvm.boundary.devices import label
from xenvm.boundary.messages import Failed
from xenvm.boundary.place import HERE
from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Release
from xenvm.broker.children import Child
from xenvm.broker.mounts import text_of
from xenvm.broker.servers import command_line, end_server, server_text, server_uid
from xenvm.broker.work import ask_once
from xenvm.errors import XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Final

    from xenvm.broker.actlog import ActLog
    from xenvm.broker.book import Book

RELEASE_WAIT_S: Final = 30.0
LINE_BYTES: Final = 256
BLOCK_DEVICES: Final = f"{HERE.sysfs}/block"


class Strays(Record):
    """Servers are texts as in Vbd.server; an nbd device is known by its number in /dev."""

    servers: tuple[str, ...]
    nbds: tuple[int, ...]
    mappings: tuple[str, ...]

    def sentences(self) -> list[str]:
        """Say what there is, one sentence each."""
        found = [f"image server {text.split()[0]}" for text in self.servers]
        found += [f"block device /dev/nbd{number}" for number in self.nbds]
        found += [f"mapping {name}" for name in self.mappings]
        return [f"{what}: no disk uses it; doctor clean=true removes it" for what in found]


def find(uuid: str, used: Collection[int], servers: Collection[str]) -> Strays:
    """Return what is left of this VM, whose domain has the disks `used`, served by `servers`.

    A simulated host has no such devices; those of this machine are not its own.
    """
    if HERE.simulator:
        return Strays((), (), ())
    nbds, mappings = [], []
    for name in sorted(os.listdir(BLOCK_DEVICES)):  # noqa: PTH208 - pathlib costs 5 ms at each start
        if name.startswith("nbd") and _unused(text_of(f"{BLOCK_DEVICES}/{name}/backend", LINE_BYTES), uuid, used):
            nbds.append(int(name.removeprefix("nbd")))
        mapping = text_of(f"{BLOCK_DEVICES}/{name}/dm/name", LINE_BYTES) if name.startswith("dm-") else ""
        if _unused(mapping, uuid, used):
            mappings.append(mapping)
    return Strays(tuple(text for text in _servers(uuid) if text not in servers), tuple(nbds), tuple(mappings))


def clear(strays: Strays, uuid: str, log: int) -> None:
    """End and remove all that was found; raise XenvmError when the kernel does not let go. Works twice."""
    for text in strays.servers:
        end_server(text)
    if not strays.nbds and not strays.mappings:
        return
    answer = ask_once(Child(Role.STORAGE, log, {}, uuid), Release(strays.mappings, strays.nbds), RELEASE_WAIT_S)
    if isinstance(answer, Failed):
        raise XenvmError(answer.fault.message, hint=answer.fault.hint)


def tidy(uuid: str, book: Book, log: int, acts: ActLog) -> None:
    """Remove what dead workers of this VM's disks left; a failure is logged, and `doctor` still shows it."""
    try:
        clear(find(uuid, book.disks, book.servers), uuid, log)
    except (XenvmError, OSError) as error:
        acts.append("left", why=str(error)[:200])


def _unused(name: str, uuid: str, used: Collection[int]) -> bool:
    prefix = label(uuid, 0)[:-1]
    return name.startswith(prefix) and name.removeprefix(prefix) not in map(str, used)


def _servers(uuid: str) -> list[str]:
    """Return the image servers of this VM. What they say of themselves is compared, and means nothing else."""
    mark = f'"id":"{label(uuid, 0)[:-1]}'.encode("ascii")
    found, uid = [], server_uid()
    for name in os.listdir("/proc"):  # noqa: PTH208
        text = server_text(int(name), uid) if name.isdigit() else ""
        if text and mark in command_line(int(name)):
            found.append(text)
    return sorted(found)
