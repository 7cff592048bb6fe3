# SPDX-License-Identifier: GPL-2.0-or-later
"""xenvm-audit: compare the live processes of a monitor with the privilege table, and check the logs of its acts.

`live` collects what the kernel shows, `compare` judges it; here is which processes there are, and what is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import sys
import time
from datetime import UTC, datetime

from xenvm import __version__
from xenvm.boundary.privileges import TABLE, Landlock, Role, markdown_table
from xenvm.boundary.proof import CAPABILITY_SETS, Proof
from xenvm.boundary.spawn import command
from xenvm.broker import actlog
from xenvm.broker.host import LOG_DIRECTORY
from xenvm.cli import live, render
from xenvm.cli.client import NoMonitorError, is_uuid, socket_directory
from xenvm.cli.compare import Expected, Line, lines
from xenvm.errors import ExitCode, PermissionRefusedError, UsageError, XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Final, NoReturn

    from xenvm.boundary.privileges import Row
    from xenvm.cli.live import Live

USAGE: Final = """\
usage: xenvm-audit [-v] [--json] UUID|PREFIX       compare the monitor's live processes with the privilege table
       xenvm-audit [--json] verify [UUID|FILE]     check the hash chain of one act log, or of all
       xenvm-audit table                           print the privilege table
       xenvm-audit --help | --version

The comparison needs root. Exit status: 0 everything fits, 1 something differs, 2 usage, 4 no monitor, 8 not root.
"""
STARTING_S: Final = 5.0
"""How long a process may take from its start until it equals its row; a difference is looked at again until then."""
AGAIN_S: Final = 0.2
RESTART_S: Final = 1.0
"""After this a process that was missing is looked for once more: the broker starts another where one has ended."""
SUFFIX: Final = ".acts"


def identity(user: str | None) -> tuple[int, int]:
    """Return uid and gid of a row's user, None being root; XenvmError when the host has no such user."""
    if user is None:
        return 0, 0
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise XenvmError(f"the user {user} does not exist", hint="run scripts/install-host as root") from None
    return entry.pw_uid, entry.pw_gid


class Host(Record):
    """Where things are on this host: directories, users, and how a role is started."""

    sockets: str
    logs: str = LOG_DIRECTORY
    identity: Callable[[str | None], tuple[int, int]] = staticmethod(identity)
    command: Callable[[Role], list[str]] = staticmethod(command)


class Acts(Record):
    """What the act log says of the present monitor: proofs by process number, its log files, and why it is broken."""

    proofs: dict[int, Proof]
    logs: frozenset[str]
    broken: str


class Audited(Record):
    """One process, judged; of what is missing there is neither process nor role."""

    role: Role | None
    process: Live | None
    lines: tuple[Line, ...]
    proof: Proof | None = None

    @property
    def differences(self) -> int:
        """Count the properties that differ."""
        return sum(line.differs for line in self.lines)


# -- the act log ----------------------------------------------------------------------------------------------------


def read_acts(path: str) -> Acts:
    """Read what concerns the monitor that opened the log last."""
    proofs: dict[int, Proof] = {}
    logs: set[str] = set()
    broken = ""
    try:
        for record in actlog.read(*_files(path)):
            act, grants = record.get("act"), record.get("grants")
            if act == "opened":
                proofs.clear()
                logs.clear()
            elif act == "confined" and (proof := proof_of(record.get("proof"))):
                proofs[proof.pid] = proof
            elif act == "sealed" and isinstance(grants, dict) and isinstance(output := grants.get("output"), str):
                logs.add(output)
    except XenvmError as error:
        broken = error.message
    except OSError as error:
        broken = f"{path}: {error.strerror}"
    return Acts(proofs, frozenset(logs), broken)


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


# -- a monitor ------------------------------------------------------------------------------------------------------


def audit(host: Host, uuid: str) -> list[Audited]:
    """Compare the monitor of `uuid` with the table; NoMonitorError when there is none."""
    if os.geteuid() != 0:
        raise PermissionRefusedError("the descriptors of other processes show to root only", hint="sudo xenvm-audit")
    broker = live.find_broker(host.sockets, uuid)
    try:
        found = _survey(host, uuid, broker)
        if _missing(found):
            time.sleep(RESTART_S)
            found = _survey(host, uuid, broker)
    except live.GoneError:
        raise NoMonitorError(f"the monitor of {uuid} ended meanwhile") from None
    acts = read_acts(_acts_path(host, uuid))
    general = _missing(found)
    if acts.broken:
        general.append(Line("act log", "an unbroken chain", acts.broken, differs=True))
    return [*found, Audited(None, None, tuple(general))] if general else found


def _survey(host: Host, uuid: str, broker: int) -> list[Audited]:
    judged = (_judge(host, uuid, broker, pid) for pid in live.processes(broker))
    return [one for one in judged if one]


def _missing(found: Sequence[Audited]) -> list[Line]:
    roles = [one.role for one in found]
    counts = {role: roles.count(role) for role in (Role.BROKER, Role.SUPERVISOR, Role.WATCHER)}
    return [Line(role.value, "1 process", str(count), differs=True) for role, count in counts.items() if count != 1]


def _judge(host: Host, uuid: str, broker: int, pid: int) -> Audited | None:
    """Compare one process, until it fits or had the time to; None when it has ended, which only the broker may not."""
    looks = 0
    while True:
        try:
            process = live.look(pid)
        except live.GoneError:
            if pid == broker:
                raise
            return None
        looks += 1
        one = judge(host, uuid, process, read_acts(_acts_path(host, uuid)), is_broker=pid == broker)
        if not one.differences or (looks > 1 and time.time() - process.started > STARTING_S):
            return one
        time.sleep(AGAIN_S)


def judge(host: Host, uuid: str, process: Live, acts: Acts, *, is_broker: bool) -> Audited:
    """Compare one process with the row of the role it was started for."""
    role = live.role_of(process.arguments)
    if role is None or (role is Role.BROKER) != is_broker:
        table = "broker" if is_broker else "a role of the table, one broker"
        return Audited(None, process, (Line("role", table, " ".join(process.arguments), differs=True),))
    row, proof = TABLE[role], acts.proofs.get(process.pid)
    return Audited(role, process, tuple(lines(row, process, proof, expected(host, uuid, row, acts))), proof)


def expected(host: Host, uuid: str, row: Row, acts: Acts) -> Expected:
    """Say what a row means for the monitor of `uuid` on this host."""
    uid, gid = host.identity(row.user)
    tails = {Role.SUPERVISOR: {(uuid,)}, Role.WATCHER: {(uuid,)}, Role.BUILDER: {(uuid,), ("-",)}}.get(row.role)
    confined = [p.landlock_abi for p in acts.proofs.values() if _landlocked(p)]
    own_log = f"{host.logs}/{uuid}.log"
    return Expected(
        uid=uid,
        gid=gid,
        command=tuple(host.command(row.role)),
        tails=frozenset(tails) if tails else None,
        filters=1 if row.role is Role.BROKER else 2,
        landlock=max(confined, default=0) if row.landlock is Landlock.NOTHING else 0,
        logs=frozenset(os.path.realpath(log or own_log) for log in {*acts.logs, own_log}),
        acts=os.path.realpath(_acts_path(host, uuid)),
    )


def _landlocked(proof: Proof) -> bool:
    return proof.role in set(Role) and TABLE[Role(proof.role)].landlock is Landlock.NOTHING


def _acts_path(host: Host, uuid: str) -> str:
    return f"{host.logs}/{uuid}{SUFFIX}"


def show(found: Sequence[Audited], *, verbose: bool) -> str:
    """Return the result as text, its last line the counts."""
    parts = []
    for one in found:
        title = f"{one.role or 'unknown'} {one.process.pid}" if one.process else "monitor"
        rows = [(line.name, line.table, line.process, "DIFFERS" if line.differs else "") for line in one.lines]
        parts.append(f"{title}\n" + render.table([("PROPERTY", "TABLE SAYS", "PROCESS HAS", ""), *rows]))
        if verbose and one.process:
            rest = [
                ("open", str(d.number), d.kind, d.target, d.protocol, d.name, d.peer) for d in one.process.descriptors
            ]
            rest += [("tried", name, met, "", "", "", "") for name, met in (one.proof.probes if one.proof else ())]
            parts.append(render.table(rest))
        parts.append("\n")
    return "".join(parts) + f"{_processes(found)} processes, {_differences(found)} differences\n"


def as_json(uuid: str, found: Sequence[Audited]) -> dict[str, object]:
    """Return the result as plain values."""
    return {
        "uuid": uuid,
        "processes": _processes(found),
        "differences": _differences(found),
        "audited": [
            {
                "role": one.role.value if one.role else None,
                "pid": one.process.pid if one.process else None,
                "properties": [
                    {"name": line.name, "table": line.table, "process": line.process, "differs": line.differs}
                    for line in one.lines
                ],
                "probes": dict(one.proof.probes) if one.proof else {},
            }
            for one in found
        ],
    }


def _processes(found: Sequence[Audited]) -> int:
    return sum(one.process is not None for one in found)


def _differences(found: Sequence[Audited]) -> int:
    return sum(one.differences for one in found)


# -- verify ---------------------------------------------------------------------------------------------------------


def verify(path: str) -> dict[str, object]:
    """Check the chain of one log, and say what it spans; XenvmError names file and line of the first break."""
    try:
        return _verify(path)
    except XenvmError:  # a live monitor may have been in the middle of a record
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


def _logs(host: Host, word: str) -> list[str]:
    if is_uuid(word.lower()):
        return [_acts_path(host, word.lower())]
    if word:
        return [word]
    try:
        names = os.listdir(host.logs)  # noqa: PTH208
    except PermissionError as error:
        raise PermissionRefusedError(f"{host.logs}: {error.strerror}", hint="sudo xenvm-audit verify") from None
    except OSError as error:
        raise XenvmError(f"{host.logs}: {error.strerror}") from None
    stems = {name.removesuffix(".1") for name in names}
    return sorted(f"{host.logs}/{name}" for name in stems if name.endswith(SUFFIX))


def _run_verify(host: Host, word: str, *, json_wanted: bool) -> ExitCode:
    code = ExitCode.DONE
    for path in _logs(host, word):
        try:
            told = verify(path)
        except PermissionRefusedError:
            raise
        except XenvmError as error:
            code = ExitCode.FAILED
            told = {"file": path, "error": error.message, "hint": error.hint}
        if json_wanted:
            render.out(render.json_line(told))
        elif "error" in told:
            render.out(render.plain(f"{told['error']}\n" + (f"hint: {told['hint']}\n" if told["hint"] else "")))
        else:
            losses = f", {told['power_losses']} power losses" if told["power_losses"] else ""
            span = f"{_when(told['from'])} to {_when(told['to'])}"
            text = f"{path}: {told['records']} records, {span}{losses}, head {told['head']}\n"
            render.out(render.plain(text))
    return code


def _when(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return "-"
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


# -- the program ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="xenvm-audit --help")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("words", nargs="*")
    line = parser.parse_intermixed_args(arguments)
    limit = 2 if line.words[:1] == ["verify"] else 1
    if not (line.help or line.version) and not (0 < len(line.words) <= limit and all(line.words)):
        raise UsageError("give the uuid of one VM, or verify, or table", hint="xenvm-audit --help")
    return line


def run(line: argparse.Namespace, host: Host) -> ExitCode:
    """Do what the command line asks; failures are raised as XenvmError."""
    if line.help:
        render.out(USAGE)
    elif line.version:
        render.out(f"xenvm-audit {__version__}\n")
    elif line.words == ["table"]:
        render.out(markdown_table())
    elif line.words[0] == "verify":
        return _run_verify(host, "".join(line.words[1:]), json_wanted=line.json)
    else:
        uuid = live.find_uuid(host.sockets, line.words[0])
        found = audit(host, uuid)
        render.out(render.json_line(as_json(uuid, found)) if line.json else show(found, verbose=line.verbose))
        return ExitCode.FAILED if _differences(found) else ExitCode.DONE
    return ExitCode.DONE


def main(arguments: Sequence[str] | None = None, host: Host | None = None) -> int:
    """Run xenvm-audit and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return run(_parse(given), host or Host(socket_directory()))
    except XenvmError as failure:
        render.error(failure, as_json="--json" in given)
        return failure.code
    except OSError as failure:
        render.error(XenvmError(str(failure)), as_json="--json" in given)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
