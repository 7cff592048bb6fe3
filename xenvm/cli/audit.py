# SPDX-License-Identifier: GPL-2.0-or-later
"""xenvm-audit: compare the live processes of a monitor with the privilege table, and check the logs of its acts.

`live` collects what the kernel shows, `compare` judges it; here is which processes there are, and what is printed.
"""

from __future__ import annotations

import argparse
import os
import pwd
import sys
import time
from datetime import UTC, datetime

from xenvm import __version__, forms
from xenvm.boundary.devices import label
from xenvm.boundary.place import MARK, Place
from xenvm.boundary.privileges import QEMU_USER, TABLE, Landlock, Role, markdown_table
from xenvm.boundary.spawn import command
from xenvm.broker.host import LOG_DIRECTORY
from xenvm.broker.plugging import RUN_DIRECTORY
from xenvm.cli import live, render
from xenvm.cli.acts import SUFFIX, read_acts, verify
from xenvm.cli.client import NoMonitorError, socket_directory
from xenvm.cli.compare import Expected, Line, lines, model_lines, server_lines
from xenvm.errors import ExitCode, PermissionRefusedError, UsageError, XenvmError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Final, NoReturn

    from xenvm.boundary.privileges import Row
    from xenvm.boundary.proof import Proof
    from xenvm.cli.acts import Acts
    from xenvm.cli.live import Live

USAGE: Final = """\
usage: xenvm-audit [-v] [--json] UUID|PREFIX       compare the monitor's live processes with the privilege table
       xenvm-audit [--json] verify [UUID|FILE]     check the hash chain of one act log, or of all
       xenvm-audit table                           print the privilege table
       xenvm-audit --help | --version

The comparison needs root. Exit status: 0 everything fits, 1 something differs, 2 usage, 4 no monitor, 8 not root.
"""
IMAGE_SERVER: Final = "/usr/bin/qemu-storage-daemon"
"""What an image worker starts; a child of the monitor until that worker has ended, then the VM's by its label."""
STARTING_S: Final = 5.0
"""How long a process may take from its start until it equals its row; a difference is looked at again until then."""
AGAIN_S: Final = 0.2
RESTART_S: Final = 1.0
"""After this a process that was missing is looked for once more: the broker starts another where one has ended."""


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
    place: Place = Place()


def host_of(directory: str) -> Host:
    """Return the host whose command sockets are in `directory`: this one, or a simulated one, where all run as one."""
    try:
        owner = os.stat(f"{directory}/{MARK}")  # noqa: PTH116
    except OSError:
        return Host(directory)
    place = Place(directory)
    return Host(directory, place.logs, lambda _user: (owner.st_uid, owner.st_gid), place=place)


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


# -- a monitor ------------------------------------------------------------------------------------------------------


def audit(host: Host, uuid: str) -> list[Audited]:
    """Compare the monitor of `uuid` with the table; NoMonitorError when there is none."""
    if os.geteuid() != 0:
        raise PermissionRefusedError("the descriptors of other processes show to root only", hint="sudo xenvm-audit")
    broker = live.find_broker(host.sockets, uuid)
    try:
        found, acts = _survey(host, uuid, broker)
        if _missing(found):
            time.sleep(RESTART_S)
            found, acts = _survey(host, uuid, broker)
    except live.GoneError:
        raise NoMonitorError(f"the monitor of {uuid} ended meanwhile") from None
    general = _missing(found)
    if acts.broken:
        general.append(Line("act log", "an unbroken chain", acts.broken, differs=True))
    found += _model(host, uuid, acts, found[0])
    return [*found, Audited(None, None, tuple(general))] if general else found


def _model(host: Host, uuid: str, acts: Acts, broker: Audited) -> list[Audited]:
    """Judge the device model, which is nobody's child; by the act log, since it could call itself anything."""
    pid, domid = acts.model
    if not pid or domid < 0:
        return []
    try:
        process = live.look(pid)
        root = os.readlink(f"/proc/{pid}/root")  # noqa: PTH115
    except (live.GoneError, FileNotFoundError):
        return []
    row = TABLE[Role.DEVICEMODEL]
    inherited = broker.process.filters or 1 if broker.process else 1
    number = host.identity(QEMU_USER)[0] + domid
    # the worker's filter, and the one against children
    wanted = expected(host, uuid, row, acts, inherited + 1).but(uid=number, gid=number)
    wanted = wanted.but(logs=wanted.logs | {os.path.realpath(f"{host.logs}/{uuid}.qemu")})
    return [Audited(Role.DEVICEMODEL, process, tuple(model_lines(row, process, wanted, root)))]


def _survey(host: Host, uuid: str, broker: int) -> tuple[list[Audited], Acts]:
    """Judge each process, until it fits or had the time to."""
    acts = read_acts(_acts_path(host, uuid))
    found = []
    inherited = 0
    family = live.processes(broker)
    image_uid, _ = host.identity(TABLE[Role.IMAGE].user)
    left_alone = set(live.servers(IMAGE_SERVER, image_uid, label(uuid, 0)[:-1])).difference(family)
    for pid in (*family, *sorted(left_alone)):
        # one that an earlier monitor has started has its filter and that of the row, whatever this one's are
        one, looks = _look(host, uuid, broker, pid, acts, 1 if pid in left_alone else inherited), 1
        while one and one.differences and (looks == 1 or _is_starting(one)):
            time.sleep(AGAIN_S)
            acts = read_acts(_acts_path(host, uuid))
            one, looks = _look(host, uuid, broker, pid, acts, 1 if pid in left_alone else inherited), looks + 1
        if one and pid == broker and one.process:
            inherited = max(one.process.filters or 0, 1)  # a service manager may have added some
        if one:
            found.append(one)
    return found, acts


def _is_starting(one: Audited) -> bool:
    return one.process is not None and time.time() - one.process.started < STARTING_S


def _look(host: Host, uuid: str, broker: int, pid: int, acts: Acts, inherited: int) -> Audited | None:
    """Compare one process now; None when it has ended, which only the broker may not."""
    try:
        return judge(host, uuid, live.look(pid), acts, inherited)
    except live.GoneError:
        if pid == broker:
            raise
        return None


def _missing(found: Sequence[Audited]) -> list[Line]:
    roles = [one.role for one in found]
    counts = {role: roles.count(role) for role in (Role.BROKER, Role.SUPERVISOR, Role.WATCHER)}
    return [Line(role.value, "1 process", str(count), differs=True) for role, count in counts.items() if count != 1]


def judge(host: Host, uuid: str, process: Live, acts: Acts, inherited: int) -> Audited:
    """Compare one process with the row of the role it was started for; see `expected` for `inherited`."""
    role = live.role_of(process.arguments)
    if inherited and process.program == IMAGE_SERVER:
        row = TABLE[Role.IMAGE]
        return Audited(
            Role.IMAGE, process, tuple(server_lines(row, process, expected(host, uuid, row, acts, inherited)))
        )
    if role is None or (role is Role.BROKER) != (not inherited):
        table = "a role of the table" if inherited else "broker"
        return Audited(None, process, (Line("role", table, " ".join(process.arguments), differs=True),))
    row, proof = TABLE[role], acts.proofs.get(process.pid)
    wanted = expected(host, uuid, row, acts, inherited)
    return Audited(role, process, tuple(lines(row, process, proof, wanted)), proof)


def expected(host: Host, uuid: str, row: Row, acts: Acts, inherited: int) -> Expected:
    """Say what a row means for the monitor of `uuid` on this host.

    `inherited` is the number of seccomp filters that the broker has, to which each child adds one; 0 for the broker.
    """
    uid, gid = host.identity(row.user)
    special: dict[Role, set[tuple[str, ...]] | None] = {
        Role.BUILDER: {(uuid,), ("-",)},
        Role.UNPACKER: {(uuid, "unpack"), (uuid, "sum")},
        Role.BROKER: None,
        Role.PARSER: None,
    }
    tails = special.get(row.role, {(uuid,)})
    following = frozenset((*tail, *host.place.words) for tail in tails) if tails else None
    confined = [p.landlock_abi for p in acts.proofs.values() if _landlocked(p)]
    own_log = f"{host.logs}/{uuid}.log"
    return Expected(
        uid=uid,
        gid=gid,
        command=tuple(host.command(row.role)),
        tails=following,
        filters=inherited + 1,
        landlock=0 if row.landlock is Landlock.UNRESTRICTED else max(confined, default=0),
        logs=frozenset(os.path.realpath(log or own_log) for log in {*acts.logs, own_log}),
        acts=os.path.realpath(_acts_path(host, uuid)),
        images=f"{RUN_DIRECTORY}/image-{uuid}-",
        simulator=host.place.simulator,
        model=f"{RUN_DIRECTORY}/qmp-{uuid}",
    )


def _landlocked(proof: Proof) -> bool:
    return proof.role in set(Role) and TABLE[Role(proof.role)].landlock is not Landlock.UNRESTRICTED


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


def as_json(uuid: str, found: Sequence[Audited], simulator: str = "") -> dict[str, object]:
    """Return the result as plain values; `simulator` is the directory of a simulated host, "" on Xen's."""
    return {
        "uuid": uuid,
        "simulator": simulator,
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


# -- the logs ---------------------------------------------------------------------------------------------------------


def _logs(host: Host, word: str) -> list[str]:
    if forms.uuid(word.lower()):
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
        if host.place.simulator and not line.json:
            render.out(
                f"simulated host in {render.plain(host.sockets)}: one user for all processes, no capabilities\n\n"
            )
        if line.json:
            render.out(render.json_line(as_json(uuid, found, host.place.simulator)))
        else:
            render.out(show(found, verbose=line.verbose))
        return ExitCode.FAILED if _differences(found) else ExitCode.DONE
    return ExitCode.DONE


def main(arguments: Sequence[str] | None = None, host: Host | None = None) -> int:
    """Run xenvm-audit and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return run(_parse(given), host or host_of(socket_directory()))
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
