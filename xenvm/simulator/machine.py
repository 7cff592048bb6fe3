# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated machine: a hypervisor with its domains, and the socket on which builders and brokers reach it.

Domain numbers grow, pauses are counted, a domain that has shut down stays until it is destroyed: as with Xen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import time

from xenvm.simulator.client import LIMIT_BYTES
from xenvm.simulator.console import Console
from xenvm.simulator.guest import Guest
from xenvm.simulator.kernel import Kernel
from xenvm.simulator.points import Points
from xenvm.simulator.xenstored import Xenstored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from xenvm.simulator.loop import Loop

MEMORY_MIB: Final = 256 << 10
CPUS: Final = 64
DOMID_LIMIT: Final = 0x7FF0  # DOMID_FIRST_RESERVED, xen/xen.h
KERNEL_AT_MIB: Final = 16  # where a Linux kernel is loaded
UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
NAME: Final = re.compile(r"[A-Za-z0-9._+-]{1,64}", re.ASCII)
INT: Final = struct.Struct("@i")
CREDENTIALS: Final = struct.Struct("@iII")  # pid, uid, gid
SUSPEND: Final = 2  # xen/sched.h
EFFECTS: Final = frozenset(
    {
        *("create", "prepare", "channel", "load", "restore", "pause", "unpause", "resume", "shutdown", "destroy"),
        *("join", "loop"),
    }
)
"""The calls that change something."""
MIB: Final = 1 << 20


class CallError(Exception):
    """A call that fails; the text is for whoever made it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Domain:
    """One domain."""

    def __init__(self, domid: int, uuid: str, vcpus: int) -> None:
        self.domid, self.uuid, self.vcpus = domid, uuid, vcpus
        self.pauses = 1  # as Xen leaves a new domain
        self._ran_ns = self._since_ns = 0
        self.reason = -1
        self.memory_kib = 0
        self.limit_kib = 0
        self.ports = 0
        self.guest: Guest | None = None
        self.console: Console | None = None

    def count(self) -> int:
        """Return the processor time so far, in ms, of a guest that never rests; called when it stops and goes, too."""
        now_ns = time.monotonic_ns()
        self._ran_ns += now_ns - self._since_ns if self._since_ns else 0
        self._since_ns = 0 if self.pauses or self.reason >= 0 else now_ns
        return -(-self._ran_ns // 1_000_000)

    def told(self) -> dict[str, object]:
        """Return what a look at it shows."""
        return {
            "domid": self.domid,
            "uuid": self.uuid,
            "paused": self.pauses > 0,
            "reason": self.reason,
            "memory_kib": self.memory_kib,
            "limit_kib": self.limit_kib,
            "vcpus": self.vcpus,
            "cpu_time_ms": self.count(),
        }


class Machine:
    """The host: hypervisor, xenstored, kernel of dom0."""

    def __init__(self, loop: Loop, directory: str) -> None:
        self._loop, self._directory = loop, directory
        self.domains: dict[int, Domain] = {}
        self._next = 1
        self.connections = 0
        self.slow_s: dict[str, float] = {}
        """How long calls of a name take: a real hypervisor takes its time too, and tests want to act meanwhile."""
        self.points = Points()
        self.store = Xenstored(loop, f"{directory}/xenstored/socket", self.points)
        self.store.exists = lambda domid: domid in self.domains
        self.kernel = Kernel(loop, self.store, directory, self._backend_changed)
        self.store.watch(0, "@introduceDomain", lambda _path: self._introduced())
        self._path = f"{directory}/xenstored/machine"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self._path)
        self._listener.listen(512)
        self._listener.setblocking(False)
        loop.watch(self._listener.fileno(), self._accept)

    @property
    def idle(self) -> bool:
        """Tell whether nobody would miss the host."""
        return not self.domains and not self.connections and not self.store.connections

    def close(self) -> None:
        """End all domains and remove the sockets."""
        for domid in [*self.domains]:
            self._destroy(domid)
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108
        self.store.close()

    # Guests

    def _backend_changed(self, domid: int) -> None:
        domain = self.domains.get(domid)
        if domain and domain.guest:
            domain.guest.backend_changed()

    def _introduced(self) -> None:
        """Do what xenconsoled does: offer a terminal for each new guest."""
        for domain in self.domains.values():
            if domain.console or not self.store.introduced(domain.domid):
                continue
            home = f"/local/domain/{domain.domid}"
            name = (self.store.read(0, f"{home}/name") or b"").decode("ascii", "replace")
            name = name if NAME.fullmatch(name) else str(domain.domid)
            domain.console = Console(self._loop, f"{self._directory}/console/guest-{name}.log")
            self.store.write(0, f"{home}/console/tty", domain.console.open())

    def _run(self, domain: Domain) -> None:
        """Let a guest run that has just been unpaused for the first time, or stop and go."""
        domain.count()
        if domain.reason >= 0 or domain.guest is None:
            return
        if domain.console:
            domain.console.typed = domain.guest.typed
        if domain.pauses:
            domain.guest.stop()
        else:
            domain.guest.go()

    def _shut_down(self, domain: Domain, reason: int) -> None:
        if domain.reason < 0:
            domain.reason = reason
            if domain.guest and reason == SUSPEND:
                domain.guest.stop()
            elif domain.guest:
                domain.guest.end()
            self.store.ended(domain.domid, gone=False)

    def _destroy(self, domid: int) -> None:
        domain = self.domains.pop(domid)
        if domain.guest:
            domain.guest.end()
        if domain.console:
            domain.console.close()
        self.store.ended(domid, gone=True)

    # Calls

    def call(self, op: str, arguments: dict[str, Any], descriptors: list[int], caller: _Caller) -> object:
        """Do one call; raise CallError. A descriptor that is taken over leaves the list."""
        handler = getattr(self, f"_call_{op}", None)
        if handler is None:
            raise CallError(f"the simulated machine has no call {op}")
        if op == "loop":
            return self.kernel.loops.make(descriptors.pop(0), caller)
        if op == "points":
            self.points.arm(**arguments, exempt=caller.pid)
            return None
        return handler(**arguments)

    def _domain(self, domid: int) -> Domain:
        if domid not in self.domains:
            raise CallError(f"no domain {domid}")
        return self.domains[domid]

    def _call_loop(self) -> None:
        """Take an image, see call."""

    def _call_points(self) -> None:
        """Count effects and hold one, see call."""

    def _call_slow(self, calls: list[str], milliseconds: int) -> None:
        self.slow_s = dict.fromkeys(calls, milliseconds / 1000)

    def _call_disconnect(self) -> None:
        """End all connections to xenstored, as a restart of it does."""
        self.store.disconnect()

    def _call_held(self) -> dict[str, object]:
        return {"names": self.points.names, "pid": self.points.pid}

    def _call_let_go(self) -> None:
        self.points.let_go()

    def _call_info(self) -> dict[str, int]:
        used_kib = sum(domain.memory_kib for domain in self.domains.values())
        return {"free_kib": MEMORY_MIB * 1024 - used_kib, "scrubbing_kib": 0, "cpus": CPUS}

    def _call_list(self, first: int = 1, limit: int = DOMID_LIMIT) -> list[dict[str, object]]:
        return [self.domains[domid].told() for domid in sorted(self.domains) if domid >= first][:limit]

    def _call_look(self, domid: int) -> dict[str, object] | None:
        return self.domains[domid].told() if domid in self.domains else None

    def _call_find(self, uuid: str) -> list[dict[str, object]]:
        return [domain.told() for domain in self.domains.values() if domain.uuid == uuid]

    def _call_create(self, uuid: str, vcpus: int) -> int:
        if not UUID.fullmatch(uuid):
            raise CallError("a domain's handle is a uuid")
        domid = self._next
        while domid in self.domains:
            domid = domid % (DOMID_LIMIT - 1) + 1
        self._next = domid % (DOMID_LIMIT - 1) + 1
        self.domains[domid] = Domain(domid, uuid, vcpus)
        return domid

    def _call_prepare(self, domid: int, memory_kib: int) -> None:
        self._domain(domid).limit_kib = memory_kib

    def _call_pin(self, domid: int) -> int:
        self._domain(domid)
        return CPUS

    def _call_channel(self, domid: int) -> int:
        domain = self._domain(domid)
        domain.ports += 1
        return domain.ports

    def _call_load(self, domid: int, cmdline: str, memory_mib: int, image_bytes: int) -> dict[str, int]:
        domain = self._domain(domid)
        if KERNEL_AT_MIB * MIB + image_bytes > memory_mib * MIB:
            raise CallError(
                f"loading the kernel: too large for {memory_mib} MiB",
                "raise `memory`: the unpacked kernel and the initrd must fit",
            )
        return self._furnish(domain, memory_mib * 1024, {"cmdline": cmdline})

    def _furnish(self, domain: Domain, memory_kib: int, state: dict[str, Any]) -> dict[str, int]:
        """Give a domain its memory, with what is in it: a kernel with a command line, or a guest as it once was."""
        if memory_kib > min(domain.limit_kib, self._call_info()["free_kib"]):
            raise CallError(f"allocating {memory_kib // 1024} MiB of memory: not enough")
        domain.memory_kib = memory_kib

        def off(reason: int) -> None:
            self._loop.soon(lambda: self._shut_down(domain, reason))

        # The console is there when the domain has been introduced, which comes after this and before it runs.
        domain.guest = Guest(self._loop, self.store, _LateConsole(domain), domain.domid, state, off)
        return {"store_frame": 0x1000 + domain.domid, "console_frame": 0x2000 + domain.domid}

    def _call_memory(self, domid: int) -> dict[str, object]:
        domain = self._domain(domid)
        if domain.guest is None or domain.reason != SUSPEND:
            raise CallError(f"domain {domid} is not suspended: its memory changes")
        return {"memory_kib": domain.memory_kib, "state": {**domain.guest.state, "memory_kib": domain.memory_kib}}

    def _call_restore(self, domid: int, state: dict[str, Any]) -> dict[str, int]:
        memory_kib = state["memory_kib"]
        if type(memory_kib) is not int or memory_kib <= 0:
            raise CallError("the state of the guest does not say how much memory it has")
        return self._furnish(self._domain(domid), memory_kib, state)

    def _call_pause(self, domid: int) -> None:
        domain = self._domain(domid)
        domain.pauses += 1
        self._run(domain)

    def _call_unpause(self, domid: int) -> None:
        domain = self._domain(domid)
        if not domain.pauses:
            raise CallError(f"domain {domid} is not paused")
        domain.pauses -= 1
        self._run(domain)

    def _call_resume(self, domid: int) -> None:
        domain = self._domain(domid)
        if domain.reason != SUSPEND:
            raise CallError(f"domain {domid} is not suspended")
        domain.reason = -1
        self._run(domain)

    def _call_shutdown(self, domid: int, reason: int) -> None:
        self._shut_down(self._domain(domid), reason)

    def _call_destroy(self, domid: int) -> None:
        self._domain(domid)
        self._destroy(domid)

    def _call_interface(self, name: str) -> str:
        return self.kernel.interface(name)

    def _call_join(self, interface: str, bridge: str) -> None:
        if (self.kernel.interface(interface), self.kernel.interface(bridge)) != ("vif", "bridge"):
            raise CallError(f"{interface} cannot join {bridge}")
        self.kernel.bridges[interface] = bridge

    def _call_devices(self) -> dict[str, object]:
        return {"loops": self.kernel.loops.numbers, "bridges": self.kernel.bridges}

    # Connections

    def _accept(self, _events: int) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            _Caller(self, self._loop, connection)


class _LateConsole(Console):
    """The console of a domain, whenever that gets one."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def write(self, data: bytes) -> None:
        if self._domain.console:
            self._domain.console.write(data)


class _Caller:
    """One connection to the machine."""

    def __init__(self, machine: Machine, loop: Loop, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._machine, self._loop, self._socket = machine, loop, connection
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        self.pid: int = CREDENTIALS.unpack(credentials)[0]
        machine.connections += 1
        loop.watch(connection.fileno(), self._ready)

    def _ready(self, _events: int) -> None:
        descriptors: list[int] = []
        try:
            request, ancillary, _flags, _ = self._socket.recvmsg(
                LIMIT_BYTES, socket.CMSG_LEN(INT.size), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += [number for (number,) in INT.iter_unpack(data[: len(data) // INT.size * INT.size])]
        except BlockingIOError:
            return
        except OSError:
            request = b""
        try:
            if not request:
                self._close()
                return
            self._take(request, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _take(self, request: bytes, descriptors: list[int]) -> None:
        """Answer a request, at once or, where calls are slow, after a while (then it is not done before)."""
        try:
            arguments = json.loads(request)
            op = arguments.pop("op")
            wait_s = self._machine.slow_s.get(op, 0.0)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._send({"error": "not a call of the simulated machine"})
            return
        held, descriptors[:] = [*descriptors], []

        def act() -> None:
            try:
                self._answer(op, arguments, held)
            finally:
                for descriptor in held:
                    os.close(descriptor)

        def go() -> None:
            if wait_s:
                self._loop.after(wait_s, act)
            else:
                act()

        if op in EFFECTS:
            self._machine.points.pass_by(op, self.pid, go)
        else:
            go()

    def _answer(self, op: str, arguments: dict[str, Any], descriptors: list[int]) -> None:
        if self._socket.fileno() < 0:  # whoever asked has gone
            return
        try:
            answer: dict[str, object] = {"result": self._machine.call(op, arguments, descriptors, self)}
        except CallError as error:
            answer = {"error": error.message, "hint": error.hint}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            answer = {"error": f"not a call of the simulated machine: {error}"}
        self._send(answer)

    def _send(self, answer: dict[str, object]) -> None:
        try:
            self._socket.send(json.dumps(answer, separators=(",", ":")).encode("ascii"))
        except OSError:
            self._close()

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._machine.connections -= 1
            self._machine.kernel.loops.close(self)
