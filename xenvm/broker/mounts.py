# SPDX-License-Identifier: GPL-2.0-or-later
"""Is a block device mounted on this host, so that what is on it changes? /proc and /sys tell; it is not opened."""

from __future__ import annotations

import os

from xenvm.boundary.place import HERE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

MOUNTS: Final = "/proc/self/mountinfo"
BLOCK_DEVICES: Final = f"{HERE.sysfs}/dev/block"
MOUNTS_LIMIT_BYTES: Final = 16 << 20


def written_at(device: int) -> str:
    """Return where a file system on this device is mounted read-write, "" when it is nowhere.

    That counts too which is on a partition of it, on the whole disk of a partition, or on what is made of it, as a
    logical volume or an opened encrypted disk.
    """
    numbers = _over(f"{os.major(device)}:{os.minor(device)}")
    for found, place in _writable():
        if found in numbers:
            return place
    return ""


def _over(number: str) -> set[str]:
    """Return the numbers of the device and of all whose content lies on it, as MAJOR:MINOR."""
    found: set[str] = set()
    waiting = [number]
    whole = f"{BLOCK_DEVICES}/{number}"
    if os.path.exists(f"{whole}/partition"):  # noqa: PTH110 - pathlib costs 5 ms
        found.add(text_of(f"{os.path.realpath(whole)}/../dev"))
    while waiting:
        number = waiting.pop()
        if number and number not in found:
            found.add(number)
            place = f"{BLOCK_DEVICES}/{number}"
            waiting += [text_of(f"{place}/holders/{name}/dev") for name in _names(f"{place}/holders")]
            parts = [name for name in _names(place) if os.path.exists(f"{place}/{name}/partition")]  # noqa: PTH110
            waiting += [text_of(f"{place}/{name}/dev") for name in parts]
    return found


def _writable() -> Iterator[tuple[str, str]]:
    """Return device number and place of each file system that is mounted read-write, proc(5)."""
    for line in text_of(MOUNTS, MOUNTS_LIMIT_BYTES).split("\n"):
        words, _, rest = line.partition(" - ")
        fields, (kind, source, options) = words.split(" "), [*rest.split(" "), "", "", ""][:3]
        if len(fields) > 4 and "rw" in options.split(","):
            yield fields[2], fields[4]
            if kind == "btrfs" and source.startswith("/dev/"):  # its file systems have numbers of their own
                yield _number(source), fields[4]


def _number(path: str) -> str:
    try:
        device = os.stat(path).st_rdev  # noqa: PTH116
    except OSError:
        return ""
    return f"{os.major(device)}:{os.minor(device)}"


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)  # noqa: PTH208
    except OSError:
        return []


def text_of(path: str, limit_bytes: int = 64) -> str:
    """Return what is in a file of the kernel, "" when it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    content = bytearray()
    try:
        while len(content) < limit_bytes and (piece := os.read(descriptor, limit_bytes - len(content))):
            content += piece
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return content.decode("utf-8", "replace").rstrip("\n")
