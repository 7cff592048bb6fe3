# SPDX-License-Identifier: GPL-2.0-or-later
"""What writing a save image takes, whoever writes it: room for it, every byte of it, words for what goes wrong."""

from __future__ import annotations

import errno
import os

from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

HEADROOM_BYTES: Final = 8 << 20  # of an image above the guest's memory: its records, and the map of its pages


def check_space(image: int, memory_bytes: int) -> None:
    """Raise XenvmError when the file system has not room for so much memory; what it turns out to need may be less."""
    need_bytes = memory_bytes + HEADROOM_BYTES
    status = os.fstatvfs(image)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < need_bytes:
        raise XenvmError(
            f"the image needs up to {need_bytes >> 20} MiB, {free_bytes >> 20} MiB are free where it is to be written",
            hint="make room, or name a file on another file system",
        )


def put(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of the content; OSErrors pass."""
    while content:
        content = content[os.write(descriptor, content) :]


def write(image: int, content: bytes | memoryview) -> None:
    """Write all of the content; raise XenvmError with the reason."""
    try:
        put(image, content)
    except OSError as error:
        raise failure(error) from error


def take(pipe: int, length: int) -> bytes:
    """Return so many bytes that come through a pipe; fewer only at its end."""
    content = b""
    while len(content) < length and (more := os.read(pipe, length - len(content))):
        content += more
    return content


def failure(error: OSError) -> XenvmError:
    """Return what to say of an error in writing."""
    return XenvmError(f"writing the image: {error.strerror or error}", hint=hint(error.errno))


def hint(number: int | None) -> str:
    """Return what to try against an error of this number."""
    return "make room, or name a file on another file system" if number in (errno.ENOSPC, errno.EDQUOT) else ""
