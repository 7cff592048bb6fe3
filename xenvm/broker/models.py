# SPDX-License-Identifier: GPL-2.0-or-later
"""The device model of the VM's domain: started through a worker, watched, ended.

It outlives the monitor, as image servers do: what the next monitor needs is in our dom0-only record, and its QMP
sockets have names that root alone may connect to: one for the supervisor's commands, one for saving and resuming.
"""

from __future__ import annotations

import _socket as socket  # `socket` itself builds enumerations at each start
import errno
import fcntl
import os
import pwd
import select
import stat
import time

from xenvm.boundary.machine import Drive, Launch, Launched, Model, ModelState, Tap
from xenvm.boundary.messages import DomainState, Done, Failed, Op
from xenvm.boundary.privileges import QEMU_USER, Role
from xenvm.broker import host
from xenvm.broker.children import Child
from xenvm.broker.phases import ON_DEVICES, REBUILDING
from xenvm.broker.servers import end_server, find_models, open_server, server_text
from xenvm.broker.talks import state_file
from xenvm.context import suppress
from xenvm.errors import BusyError, ExitCode, ProtocolError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.devices import DiskGrant, Vif
    from xenvm.boundary.machine import Machine
    from xenvm.boundary.messages import Grants
    from xenvm.broker.actlog import ActLog

RUN_DIRECTORY: Final = "/run/xenvm"
VNC_PORTS: Final = range(5900, 6000)  # RFC 6143: display N is port 5900 + N; as many as QEMU itself would try
SERIAL_WAIT_MS: Final = 3000
AGAIN_MOST_S: Final = 60.0
DEFAULT_CARD: Final = "rtl8139"


def uid_of(domid: int) -> int:
    """Return the user that the device model of a domain runs as."""
    try:
        return pwd.getpwnam(QEMU_USER).pw_uid + domid
    except KeyError:
        raise XenvmError(f"the user {QEMU_USER} does not exist", hint="run scripts/install-host as root") from None


def qmp_path(uuid: str, *, for_saving: bool = False) -> str:
    """Return the name of a QMP socket of a VM; each takes one connection at a time."""
    return f"{RUN_DIRECTORY}/qmp-{uuid}{'.save' if for_saving else ''}"


def remove_sockets(uuid: str) -> None:
    """Remove the names of both. Works twice."""
    host.remove(qmp_path(uuid))
    host.remove(qmp_path(uuid, for_saving=True))


class Models:
    """What the broker knows of the device model of its VM; there is one at a time."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self.state: ModelState | None = None
        self.pidfd = -1
        """Becomes readable when it ends; -1: none is watched."""
        self.lost = False
        """It has ended, and its domain has not heard of that yet."""
        self._again_s = self._pause_s = 0.0

    @property
    def server(self) -> str:
        """Its process and start time, "" without one."""
        return self.state.server if self.state else ""

    def follow(self, states: tuple[ModelState, ...], domid: int) -> None:
        """Learn which device model the domain has, if any; one that is not there any more is lost."""
        self.forget()
        if states:
            self.state = states[0]
            self.pidfd = open_server(self.state.server, uid_of(domid))
            self.lost = self.pidfd < 0

    def note(self, op: Op, done: Done, acts: ActLog) -> bool:
        """Learn from a job that has succeeded; tell whether the supervisor should hear of it."""
        if op in REBUILDING | {Op.FIND}:
            had = bool(self.state)
            self.follow(done.models, done.domain.domid)
            if self.state:
                acts.append("model", pid=self.pid, domid=done.domain.domid)
            return had or bool(self.state)
        if done.domain.state is DomainState.ABSENT and op not in ON_DEVICES:
            self.forget()
        return False

    def ended(self, acts: ActLog) -> None:
        """Note that what `pidfd` belongs to has ended."""
        acts.append("ended", role="qemu", pid=self.pid, how="by itself")
        os.close(self.pidfd)
        self.pidfd, self.lost = -1, True

    def take_lost(self) -> bool:
        """Tell once that its guest has stopped, of which Xen says no word."""
        if not self.lost or time.monotonic() < self._again_s:
            return False
        self.lost = False
        return True

    def not_told(self) -> None:
        """Try that again, each time later: whoever should have stopped the guest has failed."""
        if self.state:
            self._pause_s = min(max(1.0, self._pause_s * 2), AGAIN_MOST_S)
            self.lost, self._again_s = True, time.monotonic() + self._pause_s

    @property
    def due_s(self) -> float:
        """When it is tried again (monotonic); 0: not at all."""
        return self._again_s if self.lost else 0.0

    def forget(self) -> None:
        """Watch nothing any more."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.state, self.pidfd, self.lost = None, -1, False
        self._again_s = self._pause_s = 0.0

    def end(self, domid: int, server: str) -> None:
        """End the device model of this text, and remove its sockets' names. Works twice.

        Of one that nobody has recorded the text is "": whoever started it has died, and it is found by what it was
        started with.
        """
        self.forget()
        uid = uid_of(domid)
        for text, owner in [(server, uid)] if server else find_models(self._uuid, domid, uid):
            end_server(text, owner)
        remove_sockets(self._uuid)

    @property
    def pid(self) -> int:
        """Its process number, 0 without one."""
        return int(self.server.split()[0]) if self.server else 0

    @property
    def vnc_port(self) -> int:
        """The port of its screen, 0 without one."""
        return self.state.vnc_port if self.state else 0

    def connect(self, *, for_saving: bool = False) -> tuple[int, ...]:
        """Return a connection to QMP, () without a device model that lives."""
        if self.pidfd < 0:
            return ()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            client.connect(qmp_path(self._uuid, for_saving=for_saving))
        except OSError:
            client.close()
            return ()
        return (client.detach(),)

    def tell(self, send: Callable[[Message, tuple[int, ...]], None]) -> None:
        """Have the supervisor learn of the device model, with a connection to it."""
        connection = self.connect()
        try:
            send(Model(bool(connection), self.vnc_port), connection)
        finally:
            host.close_all(connection)


class Launching:
    """One device model on its way."""

    def __init__(self, grants: Grants, log: int, *, incoming: bool = False) -> None:
        """Start the worker now: it makes itself ready while the domain is built.

        `incoming`: it begins with the state that somebody writes into the file `incoming` until then.
        """
        self._grants = grants
        self.incoming = -1
        self._machine: Machine = grants.machine[0]
        self.worker: Child | None = Child(Role.DEVICEMODEL, log, {}, grants.uuid)
        self._domid, self._pid, self._pidfd, self._port = -1, -1, -1, 0
        self.state: ModelState | None = None
        self._named = False
        if incoming:
            try:
                self.incoming = state_file()
            except OSError:
                self.close(succeeded=False)
                raise

    def launch(self, domid: int, opened: Mapping[int, int], vifs: Iterable[Vif], taps: list[int]) -> None:
        """Have QEMU started for `domid`, with the `opened` disks by device number, and `taps` of the first cards."""
        self._domid = domid
        held: list[int] = []
        try:
            held.append(_open_log(self._grants.uuid))
            held += self._sockets()
            drives = tuple(
                _drive(grant, opened.get(grant.device, -1), held) for grant in self._grants.disks if emulated(grant)
            )
            models = {model.id: model.model for model in self._machine.nic_models}
            cards = tuple(Tap(vif.id, vif.mac, models.get(vif.id, DEFAULT_CARD)) for vif in list(vifs)[: len(taps)])
            launch = Launch(
                domid=domid,
                name=self._grants.name,
                uuid=self._grants.uuid,
                vcpus=self._grants.vcpus,
                memory_mib=self._grants.memory_mib,
                machine=self._machine,
                drives=drives,
                taps=cards,
                incoming=self.incoming >= 0,
            )
            handed = [*held, *taps]
            if self.incoming >= 0:  # opened anew: it is read from its beginning
                handed.append(os.open(f"/proc/self/fd/{self.incoming}", os.O_RDONLY | os.O_CLOEXEC))
                held.append(handed[-1])
            if self.worker:
                with suppress(ProtocolError):  # it has ended already: what it said of that comes next
                    self.worker.channel.send(launch, handed)
        finally:
            for descriptor in held:
                os.close(descriptor)

    def take(self, message: Message) -> None:
        """Go on with what the worker has said; raise XenvmError when QEMU does not run."""
        if isinstance(message, Launched) and not message.up and self._pid < 0:
            self._pid = message.pid
            with suppress(ProcessLookupError):  # it has ended at once, and the worker says why
                self._pidfd = os.pidfd_open(message.pid)  # a child of the worker's: this very process
            return
        if isinstance(message, Failed):
            fault = message.fault
            raise XenvmError(fault.message, hint=fault.hint, code=ExitCode(fault.code))
        if not isinstance(message, Launched) or message.pid != self._pid:
            raise ProtocolError("a devicemodel worker answered with something else")
        server = server_text(message.pid, uid_of(self._domid))
        if not server:
            raise XenvmError("device model: QEMU ended, or did not become the user that it should be")
        self.state = ModelState(server, message.tty, self._port)
        if self.worker:
            self.worker.end(grace_ms=1000)
            self.worker = None

    def close(self, *, succeeded: bool) -> None:
        """End the worker; without success QEMU ends too, and its socket's name goes. Works twice."""
        if self.worker:
            with suppress(XenvmError):  # it may have started QEMU, and the broker has not read of that yet
                for message in self.worker.channel.said() if self._pid < 0 and self.worker.pidfd >= 0 else ():
                    self.take(message)
        if self.worker:
            self.worker.end()
            self.worker = None
        if self._pidfd >= 0:
            if not succeeded:
                with suppress(ProcessLookupError):
                    host.kill(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if not succeeded and self._named:
            remove_sockets(self._grants.uuid)
            self._named = False
        if self.incoming >= 0:
            os.close(self.incoming)
            self.incoming = -1

    def _sockets(self) -> list[int]:
        """Return QMP's three, then what VNC and the serial port need, as they are wanted."""
        made = self._qmp()
        try:
            if self._machine.vnc_port >= 0:
                vnc, self._port = _listen(self._machine.vnc_host, self._machine.vnc_port)
                made.append(vnc)
            if self._machine.serial == "tcp":
                made.append(_connect(self._machine.serial_host, self._machine.serial_port))
        except BaseException:
            for descriptor in made:
                os.close(descriptor)
            raise
        return made

    def _qmp(self) -> list[int]:
        """Return the two listening sockets, and one connected to the first."""
        made = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
        listener, saving, client = made
        path = qmp_path(self._grants.uuid)
        before = os.umask(0o177)  # only root may connect
        try:
            remove_sockets(self._grants.uuid)
            self._named = True
            listener.bind(path)
            saving.bind(qmp_path(self._grants.uuid, for_saving=True))
            for listening in (listener, saving):
                listening.listen(4)
            client.connect(path)
        except OSError as error:
            for one in made:
                one.close()
            raise XenvmError(f"device model: cannot make the socket {path}: {error.strerror}") from error
        finally:
            os.umask(before)
        return [one.detach() for one in made]


def emulated(grant: DiskGrant) -> bool:
    """Tell whether a disk of an HVM guest is a drive of QEMU too: all hd and sd ones are."""
    return grant.cdrom or grant.name.startswith(("hd", "sd"))


def _drive(grant: DiskGrant, device: int, held: list[int]) -> Drive:
    """Add what QEMU gets of an open disk to `held`: a descriptor to read, and one to write if it may be written.

    One of them is that of the broker, not opened anew: the lock that it has goes on with it. Those of a disk pass the
    page cache by, which QEMU 10 does not arrange itself: it looks for a descriptor that is already so.
    """
    if device < 0:
        return Drive(grant.device, grant.name, grant.cdrom, block=False, descriptors=0)
    direct = 0 if grant.cdrom else os.O_DIRECT
    if not grant.read_only:
        held.append(os.open(f"/proc/self/fd/{device}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | direct))
    held.append(os.dup(device))
    fcntl.fcntl(device, fcntl.F_SETFL, fcntl.fcntl(device, fcntl.F_GETFL) | direct)
    block = stat.S_ISBLK(os.fstat(device).st_mode)
    return Drive(grant.device, grant.name, grant.cdrom, block, 1 if grant.read_only else 2)


def _open_log(uuid: str) -> int:
    """Open a fresh log for QEMU; the one before it is kept as well."""
    path = f"{host.LOG_DIRECTORY}/{uuid}.qemu"
    with suppress(FileNotFoundError):
        os.replace(path, f"{path}.1")  # noqa: PTH105
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o640)
    except OSError as error:
        raise XenvmError(f"device model: cannot open the log {path}: {error.strerror}") from error


def _listen(address: str, wanted: int) -> tuple[int, int]:
    """Return a socket that listens for VNC clients, and its port; 0 takes the first free one."""
    for port in (wanted,) if wanted else VNC_PORTS:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(8)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise XenvmError(f"display: cannot listen on {address}:{port}: {error.strerror}") from error
            continue
        return listener.detach(), port
    if wanted:
        raise BusyError(f"display: port {wanted} is in use", hint="vnc without port= takes the first unused one")
    raise BusyError(f"display: all ports from {VNC_PORTS[0]} to {VNC_PORTS[-1]} are in use")


def _connect(address: str, port: int) -> int:
    """Return a connection for the serial port."""
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    number = client.connect_ex((address, port))
    if number == errno.EINPROGRESS:
        poll = select.poll()
        poll.register(client, select.POLLOUT)
        ready = poll.poll(SERIAL_WAIT_MS)
        number = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if ready else errno.ETIMEDOUT
    if number:
        client.close()
        raise XenvmError(
            f"serial: cannot connect to {address}:{port} within {SERIAL_WAIT_MS / 1000:g} s: {os.strerror(number)}",
            hint="something has to listen there before the guest starts",
        )
    return client.detach()
