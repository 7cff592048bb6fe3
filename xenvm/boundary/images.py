# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages about save images, which themselves cross as descriptors only. No I/O."""

from __future__ import annotations

from xenvm import forms
from xenvm.boundary.checks import DIRECTORIES_LIMIT, INT32_MAX, Message, flag, is_file_name, number, string
from xenvm.errors import WrongStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

_SEQUENCE = number(0, INT32_MAX)
_SECONDS = number(1, 86400)
_PLACE = {"directory": number(-1, DIRECTORIES_LIMIT - 1), "file": string(255, is_file_name)}


def other_memory(told_kib: int, wanted_kib: int) -> WrongStateError:
    """Return what to say of an image whose guest has another size than this VM."""
    return WrongStateError(
        f"the image is of a guest with {told_kib >> 10} MiB of memory, this VM has {wanted_kib >> 10} MiB",
        hint="memory and memory_max of the config file must be what they were when the image was written",
    )


def is_uuid_or_none(text: str) -> bool:
    """Tell whether a text is a uuid, or empty."""
    return not text or forms.uuid(text)


class Progress(Message):
    """A step of a long request has begun, or is so far; `total_kib` is 0 where the end is not known.

    `rate_kib_s` is how fast it goes, 0 where that is not known. A guest that is saved live is told of by `round`, from
    1 on, the pages that it has written to in the last one, and how many in a second (-1: not known).
    """

    sequence: int
    step: str
    done_kib: int = 0
    total_kib: int = 0
    round: int = 0
    dirty_pages: int = -1
    rate_kib_s: int = 0
    dirty_pages_s: int = -1
    KIND: ClassVar = 6
    CHECKS: ClassVar = {
        "sequence": _SEQUENCE,
        "step": string(64),
        "done_kib": number(0, 2**52),
        "total_kib": number(0, 2**52),
        "round": number(0, 10000),
        "dirty_pages": number(-1, 2**42),
        "rate_kib_s": number(0, 2**42),
        "dirty_pages_s": number(-1, 2**42),
    }

    def told(self) -> dict[str, object]:
        """Return what clients hear of it."""
        body: dict[str, object] = {"step": self.step}
        if self.total_kib:
            body |= {"done_kib": self.done_kib, "total_kib": self.total_kib}
        if self.rate_kib_s:
            body["rate_kib_s"] = self.rate_kib_s
        if self.round:
            body["round"] = self.round
        known = {"dirty_pages": self.dirty_pages, "dirty_pages_s": self.dirty_pages_s}
        return body | {key: value for key, value in known.items() if value >= 0}


class Save(Message):
    """Supervisor to broker: write an image of the running guest into the file that comes along, empty and writable.

    Or into the file `file` of the host policy's directory of images number `directory` (-1: none). The guest may take
    `timeout_s` to suspend. With `go_on` it runs again afterwards; else it stays suspended, until RESUME or DESTROY.
    When saving fails it runs on. With `live` most of its memory is written while it still runs.
    """

    sequence: int
    go_on: bool
    timeout_s: int
    directory: int = -1
    file: str = ""
    live: bool = False
    KIND: ClassVar = 31
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "go_on": flag, "timeout_s": _SECONDS, **_PLACE, "live": flag}


class Restore(Message):
    """Supervisor to broker: bring the guest back from the image that comes along, open for reading.

    Or from one that `directory` and `file` name, as in Save. With `foreign` it may be the image of a VM with another
    uuid.
    """

    sequence: int
    paused: bool
    foreign: bool = False
    directory: int = -1
    file: str = ""
    KIND: ClassVar = 32
    DESCRIPTORS: ClassVar = 1
    CHECKS: ClassVar = {"sequence": _SEQUENCE, "paused": flag, "foreign": flag, **_PLACE}


class Inspect(Message):
    """Broker to stream: check this image whole, say what it is, then feed a builder.

    Descriptors: the image, a pipe, and for an HVM guest an empty file for the state of its device model. A compressed
    one is unpacked no further than a guest of this VM's size can have made it.
    """

    memory_max_kib: int
    KIND: ClassVar = 33
    DESCRIPTORS: ClassVar = 3
    CHECKS: ClassVar = {"memory_max_kib": number(1, 2**42)}


class Image(Message):
    """Stream to broker, and on to the builder: the image is whole, and of such a guest, saved under such a Xen.

    What follows in the pipe is its stream for libxenguest and nothing else. `uuid` is "" when the image names none.
    """

    memory_max_kib: int
    vcpus: int
    xen_major: int
    xen_minor: int
    uuid: str
    KIND: ClassVar = 34
    CHECKS: ClassVar = {
        "memory_max_kib": number(1, 2**42),
        "vcpus": number(1, 8192),
        "xen_major": number(0, 2**16 - 1),
        "xen_minor": number(0, 2**16 - 1),
        "uuid": string(36, is_uuid_or_none),
    }


class Write(Message):
    """Broker to stream: write what comes through a pipe into an image. Descriptors: the image, the pipe.

    Room follows, as soon as the builder knows how much it will be.
    """

    memory_max_kib: int
    compression: str
    KIND: ClassVar = 35
    DESCRIPTORS: ClassVar = 2
    CHECKS: ClassVar = {"memory_max_kib": number(1, 2**42), "compression": string(8, forms.one_of("none", "zstd"))}


class Room(Message):
    """Builder to broker, and on to the stream worker: it wants room for the image of a guest with so much memory.

    It answers Writing when it can begin.
    """

    memory_kib: int
    KIND: ClassVar = 38
    CHECKS: ClassVar = {"memory_kib": number(1, 2**42)}


class Sync(Message):
    """Builder to broker: all is in the pipe, and its end is closed. It waits for Written."""

    KIND: ClassVar = 39
    CHECKS: ClassVar = {}


class Writing(Message):
    """Stream to broker, and on to the builder: there is room, and what comes through the pipe will be written."""

    KIND: ClassVar = 36
    CHECKS: ClassVar = {}


class Written(Message):
    """Stream to broker, and on to the builder: the image is on the disk, and has so many bytes."""

    length: int
    KIND: ClassVar = 37
    CHECKS: ClassVar = {"length": number(1, 2**62)}
