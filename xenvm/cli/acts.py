# SPDX-License-Identifier: GPL-2.0-or-later
"""What the logs of privileged acts tell the audit: the proofs of the live processes, and whether the chain holds."""

from __future__ import annotations

import json
import os
import time

from xenvm.boundary.proof import CAPABILITY_SETS, Proof
from xenvm.broker import actlog
from xenvm.errors import PermissionRefusedError, XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

SUFFIX: Final = ".acts"
AGAIN_S: Final = 0.2
"""A live monitor may be in the middle of a record; after this it is looked at once more."""


class Acts(Record):
    """What the act log says of the present monitor: proofs by process number, its log files, and why it is broken.

    `model` is process number and domid of the device model that it watches; 0 and -1 without one.
    """

    proofs: dict[int, Proof]
    logs: frozenset[str]
    broken: str
    model: tuple[int, int] = (0, -1)


def read_acts(path: str) -> Acts:
    """Read what concerns the monitor that opened the log last; after a break in the chain nothing is believed."""
    acts = _read_acts(path)
    if acts.broken:
        time.sleep(AGAIN_S)
        acts = _read_acts(path)
    return acts


def _read_acts(path: str) -> Acts:
    proofs: dict[int, Proof] = {}
    logs: set[str] = set()
    model = (0, -1)
    broken = ""
    try:
        for record in actlog.read(*_files(path)):
            act, grants = record.get("act"), record.get("grants")
            if act == "opened":
                proofs.clear()
                logs.clear()
                model = (0, -1)
            elif act == "confined" and (proof := proof_of(record.get("proof"))):
                proofs[proof.pid] = proof
            elif act == "sealed" and isinstance(grants, dict) and isinstance(output := grants.get("output"), str):
                logs.add(output)
            elif act == "model" and isinstance(pid := record.get("pid"), int):
                domid = record.get("domid")
                model = (pid, domid if isinstance(domid, int) else -1)
    except XenvmError as error:
        broken = error.message
    except OSError as error:
        broken = f"{path}: {error.strerror}"
    return Acts(proofs, frozenset(logs), broken, model)


def proof_of(untrusted: object) -> Proof | None:
    """Return the proof in a record, given as an object or its JSON text; None for anything else."""
    try:
        told = json.loads(untrusted) if isinstance(untrusted, str) else untrusted
        if not isinstance(told, dict):
            return None
        inheritable, permitted, effective, bounding, ambient = (
            int(told["capabilities"][name], 16) for name in CAPABILITY_SETS
        )
        return Proof(
            role=str(told["role"]),
            pid=int(told["pid"]),
            uid=int(told["uid"]),
            gid=int(told["gid"]),
            groups=tuple(map(int, told["groups"])),
            identity_changed=told["identity_changed"] is True,
            capabilities=(inheritable, permitted, effective, bounding, ambient),
            no_new_privs=told["no_new_privs"] is True,
            seccomp=int(told["seccomp"]),
            landlock_abi=int(told["landlock_abi"]),
            probes=tuple((str(name), str(met)) for name, met in told["probes"].items()),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _files(path: str) -> list[str]:
    """Return the files of one log, the rotated one first."""
    older = path + ".1"
    return [older, path] if os.path.exists(older) else [path]  # noqa: PTH110


def verify(path: str) -> dict[str, object]:
    """Check the chain of one log, and say what it spans; XenvmError names file and line of the first break."""
    try:
        return _verify(path)
    except XenvmError:
        time.sleep(AGAIN_S)
        return _verify(path)


def _verify(path: str) -> dict[str, object]:
    count = power_losses = 0
    first: object = None
    last: dict[str, object] = {}
    try:
        for last in actlog.read(*_files(path)):
            count += 1
            first = last["time"] if count == 1 else first
            power_losses += "torn_hash" in last
    except PermissionError as error:
        raise PermissionRefusedError(f"{path}: {error.strerror}", hint="sudo xenvm-audit verify") from None
    except OSError as error:
        raise XenvmError(f"{path}: {error.strerror}") from None
    return {
        "file": path,
        "records": count,
        "from": first,
        "to": last.get("time"),
        "power_losses": power_losses,
        "head": last.get("hash", actlog.GENESIS),
    }
