# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor says of its VM: to clients, and to whoever started the monitor."""

from __future__ import annotations

import time

from xenvm.boundary.messages import Fault
from xenvm.errors import ExitCode, UsageError, WrongStateError
from xenvm.supervisor.states import ENDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.messages import Init
    from xenvm.supervisor.machine import Vm
    from xenvm.supervisor.pending import Errand, Operation

DESTROYED: Final = "the guest does not run: destroyed while it was starting"


def status(init: Init, vm: Vm, busy: Operation | Errand | None, step: dict[str, object]) -> dict[str, object]:
    """Return what `status` tells."""
    return {
        "uuid": init.uuid,
        "name": init.name,
        "state": vm.state,
        "running": vm.state not in ENDED,
        "domid": vm.domid if vm.domid > 0 else None,
        "memory_mib": init.memory_mib,
        "vcpus": init.vcpus,
        "monitor_pid": init.monitor_pid,
        "config_file": init.config_file,
        **why(vm),
        "busy": {"command": busy.name, "for_s": round(time.monotonic() - busy.since_s, 1)} if busy else None,
        "step": step.get("step", ""),
        "progress": step,
    }


def why(vm: Vm) -> dict[str, object]:
    """Return why the VM is as it is, and what the last command has failed of; "" for neither."""
    return {"reason": vm.reason, "last_fault": vm.fault.message if vm.fault else ""}


def summary(vm: Vm) -> str:
    """Return the state in words."""
    fault = vm.fault.message if vm.fault else ""
    said = vm.reason or (f"last failure: {fault}" if fault else "")
    return str(vm.state) + (f" ({said})" if said else "")


def field(init: Init, name: str) -> str:
    """Return a field of the config; raise UsageError for an unknown one."""
    value = init.fields.get(name)
    if value is None:
        raise UsageError(f"get: no field {name[:64]!a}", hint=f"one of {', '.join(sorted(init.fields))}")
    return value


def ignored(operation: Operation, now_s: float) -> Fault:
    """Return the fault of a command that the guest has ignored."""
    hint = f"a guest without a shutdown daemon ignores the request; {operation.name} force=true does not ask"
    if operation.name == "s3suspend":
        hint = (
            "Windows with Xen's PV drivers knows the request (`s3` in control/shutdown), Linux does not; "
            "`trigger sleep` presses the sleep button"
        )
    verb = {"shutdown": "shut down", "s3suspend": "fall asleep"}.get(operation.name, "restart")
    return Fault(
        int(ExitCode.TIMED_OUT),
        f"{operation.name}: the guest did not {verb} within {now_s - operation.since_s:.0f} s and runs on",
        hint,
    )


def missed(operation: Operation, vm: Vm) -> str:
    """Return why a command has failed that left the VM in another state than it was given for."""
    why = f": {vm.reason}" if vm.reason else ""
    ended = "the guest went another way; " if operation.name in ("s3suspend", "s3resume") else ""
    return f"{operation.name}: {ended}the VM is {vm.state}{why}"


def outcome(init: Init, vm: Vm, fault: Fault | None) -> tuple[str, int]:
    """Return text and exit status for whoever started the monitor; with a text and 0 it stays, without its guest."""
    if fault:
        return fault.message + (f"\nhint: {fault.hint}" if fault.hint else ""), fault.code
    if vm.state in ENDED and init.policy.startup != "shutdown":
        if vm.domid > 0:
            hint = f"`xenvm-cmd {init.uuid} destroy` ends its domain, `start` builds a new one then"
            return f"the guest does not run: {vm.reason}\nhint: {hint}", 0
        return f"the guest did not stay up: {vm.reason}", int(ExitCode.FAILED)
    return "", 0


def event(init: Init, vm: Vm, kind: str, details: dict[str, object]) -> dict[str, object]:
    """Return what those hear who listen for events."""
    return {
        "time": round(time.time(), 3),
        "uuid": init.uuid,
        "event": kind,
        "state": vm.state,
        "domid": vm.domid if vm.domid > 0 else None,
        **details,
    }


def other_file(init: Init) -> UsageError:
    """Return the error of who wants another config file read."""
    return UsageError(
        "read-config: only the file this monitor was started with is read again",
        hint=f"that is {init.config_file}; for another one: quit, then xenvm FILE",
    )


def vnc_port(init: Init, vm: Vm, port: int) -> str:
    """Return the port of the guest's screen; raise WrongStateError for a guest without one."""
    if not is_hvm(init):
        raise WrongStateError("get-vnc: a PV guest has no display")
    if vm.state in ENDED:
        raise WrongStateError(f"get-vnc: the VM is {vm.state}")
    if not port:
        raise WrongStateError("get-vnc: the guest has no display", hint="the key `display = vnc` gives it one")
    return str(port)


def is_hvm(init: Init) -> bool:
    """Tell whether the config is that of an HVM guest."""
    return init.fields.get("hvm") == "true"
