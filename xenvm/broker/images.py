# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images, of which the broker opens one that the config grants and otherwise sees descriptors: it reads none."""

from __future__ import annotations

import fcntl
import os
import stat
from abc import ABC, abstractmethod

from xenvm.boundary.images import Image, Inspect, Room, Sync, Write, Writing, Written
from xenvm.boundary.messages import NO_DOMAIN, Done, Failed, Fault, Op
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, TimeoutExpiredError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.messages import Grants, Policy
    from xenvm.broker.actlog import ActLog

STARTS: Final = frozenset({Op.FIND, Op.START, Op.START_PAUSED, Op.START_RESTORED})  # these tell of a domain's image
OUT_OF_PLACE: Final = "the stream worker has answered something that was not asked for"
PIPE_BYTES: Final = 1 << 20  # fs.pipe-max-size of Linux; the usual 64 KiB cost a switch of processes for each fill


def check_target(descriptor: int) -> None:
    """Refuse what an image cannot be written into and read back from: all but an empty file, open for both."""
    _check_file(descriptor)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_ACCMODE != os.O_RDWR or flags & os.O_APPEND or os.fstat(descriptor).st_size:
        raise UsageError("the file for the image is not empty, or not open for reading and writing")


def check_source(descriptor: int) -> None:
    """Refuse what an image cannot be read from."""
    _check_file(descriptor)
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise UsageError("the image is not open for reading")


def _check_file(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH:
        raise UsageError("an image is a regular file that is open")


def open_granted(path: str, acts: ActLog) -> dict[str, object]:
    """Open the image that the config names; return it and why not, for a Change: a domain that runs needs none."""
    descriptor, why = -1, ""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        check_source(descriptor)
    except OSError as error:
        why = error.strerror or str(error)
    except UsageError as error:
        os.close(descriptor)
        descriptor, why = -1, error.message
    if why:
        acts.append("refused", op=Op.START_RESTORED.value, why=f"cannot read {path[:400]}: {why}")
    return {"image": descriptor, "unreadable": why}


def identity(descriptor: int) -> str:
    """Return what tells this file from any other that has its name later, also when that has its inode again."""
    return _identity(os.fstat(descriptor))


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}"


def restored(policy: Policy, grants: Grants, op: Op, answer: Message | None, acts: ActLog) -> None:
    """Remove the image that the domain came from, if the config says so and another file has not its name by now.

    Whoever finds the domain is told by its record, so that this is made up for when a process died before it.
    """
    if policy.startup != "restore-del" or op not in STARTS or not isinstance(answer, Done) or not answer.text:
        return
    path, why = grants.image, ""
    try:
        if _identity(os.stat(path, follow_symlinks=False)) == answer.text:  # noqa: PTH116
            os.unlink(path)  # noqa: PTH108
        else:
            why = "another file has its name"
    except FileNotFoundError:  # it was removed before
        return
    except OSError as error:
        why = error.strerror or str(error)
    acts.append("image-removed", file=path, why=why)


class Stream(ABC):
    """Base of a process of the role stream, which is at one end of a pipe. `pipe` is the builder's end."""

    def __init__(self, uuid: str, log: int, image: int, request: Message, *, fed: bool, state: int = -1) -> None:
        """Start it; the builder is `fed` through the pipe, or writes into it. `state` is a file for what is beside."""
        ends = os.pipe2(os.O_CLOEXEC)
        self.pipe, theirs = ends if fed else ends[::-1]
        try:
            with suppress(OSError):  # smaller where the host allows no more
                fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self.child = Child(Role.STREAM, log, {}, uuid)
            with suppress(ProtocolError):  # it has ended already: what it said of that comes next
                self.child.channel.send(request, (image, theirs, *((state,) if state >= 0 else ())))
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(theirs)
        self.failure: Failed | None = None

    @abstractmethod
    def take(self, message: Message) -> Message | None:
        """Learn what it says; return what the builder is to hear of that, if anything."""

    @abstractmethod
    def gone(self) -> Message | None:
        """Learn that it has ended; return what the builder is to hear of that."""

    def _failed(self, message: str, hint: str = "") -> Failed:
        self.failure = Failed(0, Fault(int(ExitCode.FAILED), message, hint), NO_DOMAIN)
        return self.failure

    def _said(self, message: Message) -> Failed | None:
        """Learn of a failure that it tells of."""
        if isinstance(message, Failed) and not self.failure:
            self.failure = message.but(domain=NO_DOMAIN)
        return self.failure

    def close(self) -> None:
        """End it, and keep why it has failed: the builder may have seen that first. Works twice."""
        if self.child.pidfd >= 0:
            for message in self.child.channel.said():
                self._said(message)
        self.child.end()
        self.close_pipe()

    def close_pipe(self) -> None:
        """Close the end that the builder has by now; when both have closed theirs, the worker ends."""
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1


class Feed(Stream):
    """The process that checks an image and feeds it to a builder."""

    def __init__(self, uuid: str, log: int, image: int, memory_max_kib: int, state: int) -> None:
        super().__init__(uuid, log, image, Inspect(memory_max_kib), fed=True, state=state)
        self.told = False

    def take(self, message: Message) -> Message | None:
        """Learn what the image is, or what is wrong with it, which is said once."""
        answer: Message | None = self._said(message)
        if not answer:
            answer = message if isinstance(message, Image) and not self.told else self._failed(OUT_OF_PLACE)
        told, self.told = self.told, True
        return None if told else answer

    def gone(self) -> Message | None:
        """Learn that it has ended; the builder hears of it if it waits for the answer."""
        self.child.end()
        if self.told:
            return None
        self.told = True
        return self._failed(f"the image was not checked: the stream worker {self.child.how()} without an answer")


class Sink(Stream):
    """The process that puts what a builder writes into an image, on the disk.

    The builder hears of it when it asks, for room and then whether the image is on the disk: between the two it talks
    about the device model, and would take a failure that comes by itself for an answer about that.
    """

    def __init__(self, uuid: str, log: int, image: int, grants: Grants) -> None:
        super().__init__(uuid, log, image, Write(grants.memory_max_mib << 10, grants.image_compression), fed=False)
        self._questions: list[type[Message]] = [Room, Sync]
        self._answers: list[type[Message]] = [Writing, Written]
        self._waits = False
        self._ready: Message | None = None

    def ask(self, message: Room | Sync) -> Message | None:
        """Take a question of the builder; return the answer if it is known."""
        if not self._questions or not isinstance(message, self._questions.pop(0)):
            return self._failed("the builder asks for what is not its turn")
        self._waits = True
        if isinstance(message, Room) and not self.failure:
            with suppress(ProtocolError, TimeoutExpiredError):  # it has ended, and that comes next
                self.child.channel.send(message)
        return self._answer()

    def take(self, message: Message) -> Message | None:
        """Learn that it can begin, that the image is whole, or why not."""
        if not self.failure and not self._said(message):
            if self._answers and isinstance(message, self._answers[0]):
                self._ready = message
                del self._answers[0]
            else:
                self._failed(OUT_OF_PLACE)
        return self._answer()

    def gone(self) -> Message | None:
        """Learn that it has ended, which it may when the image is whole."""
        self.child.end()
        if self._answers and not self.failure:
            self._failed(f"the image was not written: the stream worker {self.child.how()}; the guest runs on")
        return self._answer()

    def _answer(self) -> Message | None:
        """Return what the builder waits for, once."""
        answer = self.failure or self._ready
        if not self._waits or not answer:
            return None
        self._waits, self._ready = False, None
        return answer
