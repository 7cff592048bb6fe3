# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's part of plugging devices: disks are opened, step by step where workers are needed, cards are bridged.

Each disk is a generator that yields the worker it waits for and is sent that worker's answer; what it returns is the
open block device. Everything opened stays open until the backends have it, which the job's end says.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import os

from xenvm.boundary.devices import Kind, Vbd, label
from xenvm.boundary.machine import EMULATED_NICS
from xenvm.boundary.messages import Done, Failed, Ready
from xenvm.boundary.privileges import TUN, Role
from xenvm.boundary.workers import Connect, Decrypt, Join, Serve, Served
from xenvm.broker import aliases, disks
from xenvm.broker.children import Child
from xenvm.broker.servers import end_server, server_text
from xenvm.context import suppress
from xenvm.errors import ExitCode, ProtocolError, XenvmError
from xenvm.record import MappingProxyType, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.devices import DiskGrant, Vif
    from xenvm.boundary.machine import ModelState
    from xenvm.broker.models import Launching

    Answer = tuple[Message, list[int]]
    Opening = Generator[Child, Answer, int]

RUN_DIRECTORY: Final = "/run/xenvm"
SOURCE_LIMIT: Final = 400  # of each disk that a guest may have, beside the grants, in one frame


class Wanted(Record):
    """Devices to plug; `handed` are open descriptors by disk, for those that are not opened by path."""

    disks: tuple[DiskGrant, ...] = ()
    vifs: tuple[Vif, ...] = ()
    handed: Mapping[int, int] = MappingProxyType({})

    @property
    def place(self) -> tuple[Kind, int]:
        """Kind and number of the first device."""
        return (Kind.VBD, self.disks[0].device) if self.disks else (Kind.VIF, self.vifs[0].id)


class Plugging:
    """The devices of one job."""

    def __init__(
        self,
        uuid: str,
        log: int,
        wanted: Wanted,
        timeout_s: int,
        network: Child | None = None,
        launching: Launching | None = None,
    ) -> None:
        """Take over or start the worker for the cards now: it makes itself ready while the domain is made.

        `launching` is the device model of a domain that is to have one.
        """
        self._uuid, self._log, self._timeout_s = uuid, log, timeout_s
        self._launching, self._loaded = launching, -1
        self._taps: list[int] = []
        self._grants, vifs = wanted.disks, wanted.vifs
        self._vifs = vifs
        self._network = network
        self._handed: dict[int, int] = {}
        self._waiting: dict[Child, tuple[DiskGrant, Opening]] = {}
        self._opened: dict[int, int] = {}
        self._servers: dict[int, str] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._begun = self._bridged = False
        try:
            for device, descriptor in wanted.handed.items():
                self._handed[device] = os.dup(descriptor)
            if vifs and not network:
                self._network = Child(Role.NETWORK, log, {}, uuid)
        except (OSError, XenvmError):
            self.close(succeeded=False)
            raise

    @property
    def children(self) -> list[Child]:
        """The workers that run now."""
        model = self._launching.worker if self._launching else None
        return [child for child in (*self._waiting, self._network, model) if child]

    @property
    def planned(self) -> tuple[Vbd, ...]:
        """The disks as far as they are known before they are open."""
        return tuple(_vbd(grant, -1, "") for grant in self._plugged)

    @property
    def _plugged(self) -> tuple[DiskGrant, ...]:
        """The disks that become vbds: a CD drive of an HVM guest is its device model's alone."""
        return tuple(grant for grant in self._grants if not (self._launching and grant.cdrom))

    @property
    def model(self) -> ModelState | None:
        """The device model, once it runs."""
        return self._launching.state if self._launching else None

    @property
    def ready(self) -> tuple[Vbd, ...] | None:
        """The disks with their numbers once everything is open and bridged; None before."""
        if not self._all_open or (self._launching and not self._launching.state):
            return None
        return tuple(
            _vbd(grant, disks.number(self._opened[grant.device]), self._servers.get(grant.device, "")).but(
                names=self._names[grant.device]
            )
            for grant in self._plugged
        )

    @property
    def answer(self) -> Ready | None:
        """What the helper is told once everything is ready; None before."""
        ready, model = self.ready, self.model
        return Ready(ready, (model,) if model else ()) if ready is not None else None

    @property
    def late(self) -> str:
        """What everything waits for just now, "" for nothing: the device, and the process that works on it."""
        found = [(child, f"disk {grant.name} ({_source(grant)})") for child, (grant, _) in self._waiting.items()]
        if self._network:
            found.append(
                (self._network, ", ".join(f"network card {vif.id} (bridge {vif.bridge})" for vif in self._vifs))
            )
        if not found and self._loaded == 0 and self._launching and self._launching.worker:
            found.append((self._launching.worker, "device model"))
        return "; ".join(f"{what}: no answer of the {child.role} worker (process {child.pid})" for child, what in found)

    @property
    def _all_open(self) -> bool:
        return self._begun and not self._waiting and not (self._vifs and not self._bridged)

    def begin(self, domid: int) -> None:
        """Open the disks, and have the cards of `domid` bridged; raise XenvmError for what fails at once."""
        if self._begun:
            raise ProtocolError("a job begins with its devices once")
        self._begun = True
        if self._network:
            if self._launching:
                self._taps = [_tap() for _ in self._vifs[:EMULATED_NICS]]
            _ask(self._network, Join(domid, self._vifs, self._timeout_s), tuple(self._taps))
        for grant in self._grants:
            self._go_on(grant, self._open(grant, self._handed.pop(grant.device, -1)), None)

    def loaded(self, domid: int) -> None:
        """Have the device model of `domid` started once everything is open; raise XenvmError when it cannot be."""
        if not self._launching or self._loaded >= 0:
            raise ProtocolError("a domain is loaded once, and only with a device model to come")
        self._loaded = domid
        self._launch()

    def _launch(self) -> None:
        if self._launching and self._loaded > 0 and self._all_open:
            self._launching.launch(self._loaded, self._opened, self._vifs, self._taps)
            self._loaded = 0

    def take(self, child: Child, message: Message, descriptors: list[int]) -> None:
        """Go on with what a worker has answered; its descriptors are taken over. Raise XenvmError when it failed."""
        launching = self._launching if self._launching and child is self._launching.worker else None
        try:
            if launching:
                launching.take(message)
                return
            child.end(grace_ms=1000)
            if child is self._network:
                self._network = None
                _refuse(message)
                self._bridged = True
            else:
                grant, opening = self._waiting.pop(child)
                self._go_on(grant, opening, (message, descriptors))
        finally:
            for descriptor in descriptors:  # what was of use is no longer among them
                os.close(descriptor)
        self._launch()

    def gone(self, child: Child) -> None:
        """Learn that a worker has ended without an answer."""
        child.end()
        raise XenvmError(f"devices: the {child.role} worker {child.how()} without an answer")

    def close(self, *, succeeded: bool) -> None:
        """End the workers and close what is open; without success the image servers end too. Works twice."""
        if self._launching:
            self._launching.close(succeeded=succeeded)
        for child in self.children:
            child.end()
        for _grant, opening in self._waiting.values():
            opening.close()
        self._waiting.clear()
        self._network = None
        for descriptor in (*self._opened.values(), *self._handed.values(), *self._taps):
            os.close(descriptor)
        self._taps.clear()
        self._opened.clear()
        self._handed.clear()
        if not succeeded:
            for text in self._servers.values():
                end_server(text)
        self._servers.clear()

    def _go_on(self, grant: DiskGrant, opening: Opening, answer: Answer | None) -> None:
        try:
            child = opening.send(answer) if answer else next(opening)
        except StopIteration as result:
            self._opened[grant.device] = result.value
        else:
            self._waiting[child] = (grant, opening)

    def _open(self, grant: DiskGrant, handed: int) -> Opening:
        descriptor = disks.open_disk(grant, handed)
        room_bytes = aliases.ALL_LIMIT_BYTES - sum(map(aliases.size, self._names.values()))
        self._names[grant.device] = aliases.names_of(
            grant, descriptor, handed=handed >= 0, shown=_source(grant), room_bytes=room_bytes
        )
        if grant.type in disks.IMAGE_FORMATS:
            descriptor = yield from self._serve(grant, descriptor)
        elif grant.type != "phy" and not _is_block(descriptor) and not (self._launching and grant.cdrom):
            descriptor = disks.loop(grant, descriptor)
        if grant.cipher:
            descriptor = yield from self._decrypt(grant, descriptor)
        return descriptor

    def _serve(self, grant: DiskGrant, image: int) -> Opening:
        """Have an image served by a process without privilege, and make a kernel block device of what it serves."""
        name = label(self._uuid, grant.device)
        try:
            listener, client = self._private_socket(grant)
        except BaseException:
            os.close(image)
            raise
        try:
            worker = Child(Role.IMAGE, self._log, {}, self._uuid)
            _ask(worker, Serve(grant.type, grant.read_only, name), (image, listener.fileno(), client.fileno()))
        except BaseException:
            client.close()
            raise
        finally:
            listener.close()
            os.close(image)
        try:
            served, _ = yield worker
            _refuse(served, grant)
            if not isinstance(served, Served):
                raise ProtocolError("an image worker answered with something else")
            self._servers[grant.device] = server_text(served.pid)
            worker = Child(Role.STORAGE, self._log, {}, self._uuid)
            _ask(worker, Connect(served.size_bytes, served.flags, grant.read_only, name), (client.fileno(),))
        finally:
            client.close()
        answer, descriptors = yield worker
        _refuse(answer, grant)
        return _only(descriptors)

    def _private_socket(self, grant: DiskGrant) -> tuple[socket.socket, socket.socket]:
        """Return a listening socket and one connected to it; its name has gone, so nobody else can connect."""
        path = f"{RUN_DIRECTORY}/image-{self._uuid}-{grant.device}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            before = os.umask(0o177)  # only root may connect while the name is there
            try:
                listener.bind(path)
            finally:
                os.umask(before)
            listener.listen(1)
            client.connect(path)
            os.unlink(path)  # noqa: PTH108
        except OSError as error:
            listener.close()
            client.close()
            raise XenvmError(f"disk {grant.name}: cannot make the socket {path}: {error.strerror or error}") from error
        return listener, client

    def _decrypt(self, grant: DiskGrant, device: int) -> Opening:
        try:
            try:
                key = os.open(grant.key_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
            except OSError as error:
                raise XenvmError(f"disk {grant.name}: key-file {grant.key_file}: {error.strerror}") from error
            try:
                worker = Child(Role.STORAGE, self._log, {}, self._uuid)
                name = label(self._uuid, grant.device)
                _ask(worker, Decrypt(name, grant.cipher, grant.key_size_bits, grant.read_only), (device, key))
            finally:
                os.close(key)
            answer, descriptors = yield worker
            _refuse(answer, grant)
            return _only(descriptors)
        finally:
            os.close(device)


def _tap() -> int:
    """Return a tap that is attached to no interface yet; that is for the network worker."""
    try:
        return os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise XenvmError(f"{TUN}: {error.strerror}", hint="is the module tun loaded in dom0?") from error


def _ask(worker: Child, message: Message, descriptors: tuple[int, ...] = ()) -> None:
    with suppress(ProtocolError):  # it has ended already: what it said of that comes next
        worker.channel.send(message, descriptors)


def _refuse(message: Message, grant: DiskGrant | None = None) -> None:
    if isinstance(message, Failed):
        label = f"disk {grant.name}: {grant.path}: " if grant else ""
        fault = message.fault
        raise XenvmError(label + fault.message, hint=fault.hint, code=ExitCode(fault.code))
    if not isinstance(message, Done | Served):
        raise ProtocolError("a worker answered with something else")


def _only(descriptors: list[int]) -> int:
    """Take the one descriptor out of the list."""
    if len(descriptors) != 1 or not _is_block(descriptors[0]):
        raise ProtocolError("a storage worker did not hand over a block device")
    return descriptors.pop()


def _is_block(descriptor: int) -> bool:
    return os.fstat(descriptor).st_mode & 0o170000 == 0o060000  # S_ISBLK, inode(7)


def _source(grant: DiskGrant) -> str:
    """Return what is shown of a disk; of a path with unprintable characters these are question marks."""
    source = f"{grant.type}:{grant.path}".encode("ascii", "replace").decode("ascii")[:SOURCE_LIMIT]
    return "".join(letter if letter.isprintable() else "?" for letter in source)


def _vbd(grant: DiskGrant, number: int, server: str) -> Vbd:
    """Return what a helper learns of a disk."""
    source = _source(grant)
    major, minor = (os.major(number), os.minor(number)) if number >= 0 else (-1, -1)
    return Vbd(grant.device, grant.name, grant.read_only, grant.cdrom, grant.share, source, major, minor, server)
