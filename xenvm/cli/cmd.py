# SPDX-License-Identifier: GPL-2.0-or-later
"""xenvm-cmd: send one command to the monitor of a VM and print what it answers.

Scripts run this program often, so it imports little and reads its own command line; what only some commands need is
imported by them.
"""

from __future__ import annotations

import os
import sys
import time

from xenvm import forms
from xenvm.cli import render
from xenvm.cli.client import (
    MAX_WAIT_S,
    REPLY_TIMEOUT_S,
    Monitor,
    NoMonitorError,
    Reply,
    only_one,
    socket_directory,
    uuids_of,
)
from xenvm.cli.verbs import BARE_WORD, SWITCH, VERBS, manual
from xenvm.errors import ExitCode, PermissionRefusedError, ProtocolError, TimeoutExpiredError, UsageError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

USAGE = "xenvm-cmd [--json] [--reply-timeout S] UUID|NAME|PREFIX COMMAND [key=value ...] | -"
BATCH = "-"
ASK_S = 10.0
"""How long `list`, and a search by name, wait for the monitors."""
ASK_AT_ONCE = 200
SAFE_PREFIX = 8
"""A prefix this long is no VM's name by accident; for a shorter one the names are asked too."""


class Line:
    """A command line, taken apart and checked."""

    __slots__ = ("as_json", "command", "params", "reply_timeout_s", "target")

    def __init__(self) -> None:
        self.as_json = False
        self.reply_timeout_s = REPLY_TIMEOUT_S
        self.target = ""
        self.command = ""
        self.params: dict[str, str] = {}


def parse(arguments: Sequence[str]) -> Line:
    """Take a command line apart; options may stand anywhere before `--`. UsageError names the word that is off."""
    line, words, rest = Line(), [], list(arguments)
    log = options_ended = False
    while rest:
        word = rest.pop(0)
        if options_ended or not word.startswith("-") or word == BATCH:
            words.append(word)
        elif word == "--":
            options_ended = True
        elif word == "--json":
            line.as_json = True
        elif word == "--log":
            log = True
        elif word in ("-h", "--help"):
            line.command = "help"
        elif word in ("--version", "--manual"):
            line.command = word
        elif word == "--reply-timeout":
            if not rest:
                raise UsageError("--reply-timeout: a number of seconds is missing", hint=f"usage: {USAGE}")
            line.reply_timeout_s = _seconds(rest.pop(0))
        elif word.startswith("--reply-timeout="):
            line.reply_timeout_s = _seconds(word.partition("=")[2])
        elif word != "--use-socket":  # the only transport there is
            raise UsageError(f"unknown option: {word}", hint=f"usage: {USAGE}")
    if line.command:
        return line
    if words in (["list"], ["help"]):
        line.command = words[0]
    elif len(words) < 2 or not all(words[:2]):
        missing = "COMMAND is" if words and words[0] else "UUID and COMMAND are"
        raise UsageError(f"{missing} missing", hint=f"usage: {USAGE}; `xenvm-cmd help` lists the commands")
    else:
        line.target, line.command = words[:2]
        try:
            line.params = _params(line.command, words[2:])
        except UsageError as error:
            raise _turned(line) or error from None
    if log:
        if line.command != "console":
            raise UsageError(f"{line.command}: --log is an option of console", hint=f"usage: {USAGE}")
        line.command = "console-log"
    return line


def _turned(line: Line) -> UsageError | None:
    """Return what to say of a command line that seems to have the order of xl's; None for another one."""
    from xenvm.supervisor.commands import ALIASES, COMMANDS  # noqa: PLC0415 - only of those that failed

    if line.target not in COMMANDS.keys() | ALIASES.keys():
        return None
    return UsageError(
        f"{line.target} is a command: the VM comes first, and then what it is to do",
        hint=f"xenvm-cmd {line.command} {line.target}",
    )


def _target(line: Line) -> str:
    try:
        return find(line.target)
    except (NoMonitorError, PermissionRefusedError) as error:
        raise _turned(line) or error from None


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_WAIT_S:
        raise UsageError(f"--reply-timeout: not a number of seconds from 0 to {MAX_WAIT_S:.0f}: {word}")
    return seconds


def _params(command: str, words: Sequence[str]) -> dict[str, str]:
    params: dict[str, str] = {}
    bare = BARE_WORD.get(command, "")
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and word == SWITCH.get(command):
            equals, value = "=", "true"
        if not equals or (bare and set(key) & set("/:")):  # a disk's own fields have options of this form
            if not bare:
                raise UsageError(f"{command}: not of the form key=value: {word}", hint="`xenvm-cmd help` shows how")
            key, value, bare = bare, word, ""
        if not key:
            raise UsageError(f"{command}: no key before the equals sign: {word}")
        if key in params:
            raise UsageError(f"{command}: {key} is given twice")
        params[key] = value
    return params


def monitors() -> list[str]:
    """Return the uuids with a command socket, sorted; whether anyone answers there is another question."""
    directory = socket_directory()
    try:
        names = os.listdir(directory)  # noqa: PTH208 - pathlib costs start time
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        raise PermissionRefusedError(
            f"you may not list {directory}", hint="give the full uuid, or become a member of the group xenvm"
        ) from None
    return uuids_of(names, "vm-")


def ask_status(uuids: Sequence[str], wait_s: float = ASK_S) -> dict[str, Reply | XenvmError]:
    """Ask all these monitors for their status, side by side, each for at most `wait_s` seconds."""
    answers: dict[str, Reply | XenvmError] = {}
    for start in range(0, len(uuids), ASK_AT_ONCE):
        _ask(uuids[start : start + ASK_AT_ONCE], time.monotonic() + wait_s, answers)
    return answers


def _ask(uuids: Sequence[str], deadline: float, answers: dict[str, Reply | XenvmError]) -> None:
    import select  # noqa: PLC0415 - most commands do without

    poll, asked, queueing = select.poll(), dict[int, Monitor](), list(uuids)
    try:
        while (queueing or asked) and (left_s := deadline - time.monotonic()) > 0:
            for uuid in queueing.copy():
                try:
                    monitor = Monitor.try_connect(uuid, reply_timeout_s=left_s)
                    monitor.send("status", {})
                    asked[monitor.fileno()] = monitor
                    poll.register(monitor.fileno(), select.POLLIN)
                except BlockingIOError:
                    continue
                except XenvmError as failure:
                    answers[uuid] = failure
                queueing.remove(uuid)
            for descriptor, _ in poll.poll((min(left_s, 0.02) if queueing else left_s) * 1000):
                monitor = asked[descriptor]
                try:
                    answer = _step(monitor)
                except XenvmError as failure:
                    answer = failure
                if answer is not None:
                    answers[monitor.uuid] = answer
                    poll.unregister(descriptor)
                    asked.pop(descriptor).close()
    finally:
        for monitor in asked.values():
            monitor.close()
    for uuid in uuids:
        answers.setdefault(uuid, TimeoutExpiredError(f"status: monitor {uuid} did not answer in time"))


def _step(monitor: Monitor) -> Reply | XenvmError | None:
    """Read what one monitor sent; return its reply once that is whole."""
    if not monitor.receive("status", ASK_S):
        return NoMonitorError(f"monitor {monitor.uuid} hung up")
    while (message := monitor.next_message("status")) is not None:
        if isinstance(message, Reply):
            return message
    return None


def find(word: str) -> str:
    """Return the uuid that a uuid, a unique prefix of one, or a VM's name stands for.

    UsageError lists the candidates when there are several; NoMonitorError when there is none.
    """
    lowered = word.lower()
    if forms.uuid(lowered):
        return lowered
    uuids = monitors()
    found = [uuid for uuid in uuids if uuid.startswith(lowered)]
    refused = 0
    if not found or (len(found) == 1 and len(lowered) < SAFE_PREFIX):
        for uuid, answer in ask_status(uuids).items():
            refused += isinstance(answer, PermissionRefusedError)
            if isinstance(answer, Reply) and _members(answer).get("name") == word and uuid not in found:
                found.append(uuid)
    if not found and refused:
        raise PermissionRefusedError(
            f"no VM named {word} among those you may ask; {refused} refused",
            hint="the command sockets are for root and the group xenvm",
        )
    return only_one(word, found)


def _members(reply: Reply) -> Mapping[str, object]:
    return reply.data if isinstance(reply.data, dict) else {}


def summary(uuid: str, answer: Reply | XenvmError) -> dict[str, object]:
    """Return what `list` tells of one VM; a member of the wrong type in the answer counts as not given."""
    entry: dict[str, object] = {"uuid": uuid}
    told = _members(answer) if isinstance(answer, Reply) else {}
    kinds = {"name": str, "state": str, "domid": int, "memory_mib": int, "vcpus": int, "monitor_pid": int}
    for key, kind in kinds.items():
        entry[key] = value if type(value := told.get(key)) is kind else None
    if entry["state"] is None:
        entry["state"] = "permission refused" if isinstance(answer, PermissionRefusedError) else "no answer"
    return entry


def _list(line: Line) -> ExitCode:
    answers = ask_status(uuids := monitors())
    entries = [summary(uuid, answers[uuid]) for uuid in uuids]
    if line.as_json:
        render.out(render.json_line(entries))
        return ExitCode.DONE
    shown = ("uuid", "name", "state", "domid")
    rows = [["-" if entry[key] is None else str(entry[key]) for key in shown] for entry in entries]
    render.out(render.table([[key.upper() for key in shown], *rows]))
    return ExitCode.DONE


def _help(line: Line) -> ExitCode:
    if line.as_json:
        render.out(render.json_line([{"name": v.name, "arguments": v.arguments, "summary": v.summary} for v in VERBS]))
        return ExitCode.DONE
    render.out(f"usage: {USAGE}\n\n{render.table([(verb.usage, verb.summary) for verb in VERBS])}")
    return ExitCode.DONE


def _events(monitor: Monitor, line: Line) -> ExitCode:
    try:
        for event in monitor.events(**line.params):
            if not render.out(render.json_line(event)):
                return ExitCode.DONE
    except KeyboardInterrupt:
        return ExitCode.DONE
    raise NoMonitorError(f"monitor ended: {monitor.uuid}", hint="`xenvm FILE` starts one, which takes over the VM")


def _console(monitor: Monitor, line: Line) -> ExitCode:
    from xenvm.cli import console  # noqa: PLC0415 - most commands do without a terminal

    with monitor:  # the console outlives the connection, and the monitor
        descriptor = monitor.call(line.command, **line.params).take_descriptor()
    if line.command == "console-log":
        console.copy_log(descriptor)
    elif not console.relay(descriptor):
        render.note("the console ended")
    return ExitCode.DONE


def _image(monitor: Monitor, line: Line) -> ExitCode:
    from xenvm.cli import images  # noqa: PLC0415 - most commands do without

    if line.command == "restore":
        return _show(images.restore(monitor, line.params), line)
    return _show(images.save(monitor, line.command, line.params), line)


def _call(monitor: Monitor, line: Line) -> ExitCode:
    if line.command in ("disk-add", "cd-insert"):
        from xenvm.cli import handover  # noqa: PLC0415 - most commands do without

        line.params, monitor.handed = handover.opened(line.command, line.params)
    return _show(monitor.call(line.command, **line.params), line)


def _change(monitor: Monitor, line: Line) -> ExitCode:
    """Give a command whose end may be far off: it is waited for as long as the monitor tells that it is at work."""
    return _show(monitor.watch(line.command, lambda _event: None, **line.params), line)


def _show(reply: Reply, line: Line) -> ExitCode:
    code = ExitCode.DONE
    if line.command in ("status", "get-status"):
        running = _members(reply).get("running")
        if not isinstance(running, bool):
            raise ProtocolError(f"{line.command}: the monitor of {line.target} does not say whether the VM runs")
        code = ExitCode.DONE if running else ExitCode.NOT_RUNNING
    if line.command == "doctor" and reply.data:
        code = ExitCode.FAILED
    if line.as_json:
        render.out(render.json_line(reply.data))
    elif reply.text:
        render.out(render.plain(reply.text.removesuffix("\n")) + "\n")
    return code


def run(line: Line) -> ExitCode:
    """Do what the command line asks and return the exit status; failures are raised as XenvmError."""
    if line.command == "--version":
        from xenvm import __version__  # noqa: PLC0415

        render.out(f"xenvm-cmd {__version__}\n")
        return ExitCode.DONE
    if line.command == "--manual":
        render.out(manual())
        return ExitCode.DONE
    if not line.target:
        return _list(line) if line.command == "list" else _help(line)
    with Monitor.connect(_target(line), reply_timeout_s=line.reply_timeout_s) as monitor:
        if line.command == BATCH:
            from xenvm.cli import batch  # noqa: PLC0415 - most commands do without

            return batch.run(lambda words: _one_of_many(monitor, line, words))
        special = {"events": _events, "console": _console, "console-log": _console}
        special |= dict.fromkeys(("suspend", "checkpoint", "restore"), _image)
        special |= dict.fromkeys(CHANGING, _change)
        return special.get(line.command, _call)(monitor, line)


CHANGING = frozenset(
    {
        *("start", "pause", "unpause", "shutdown", "halt", "restart", "reboot", "destroy"),
        *("trigger", "s3suspend", "s3resume"),
    }
)
"""What changes the state of the VM or of its guest."""
NOT_IN_BATCH = frozenset(
    {"events", "console", "console-log", "help", "list", "suspend", "checkpoint", "restore", BATCH}
)
"""What keeps a terminal or a file of its own open, or needs no monitor."""


def _one_of_many(monitor: Monitor, batch: Line, words: list[str]) -> ExitCode:
    """Do one command of a batch, which has the options of the whole."""
    line = Line()
    line.as_json, line.command = batch.as_json, words[0]
    if line.command in NOT_IN_BATCH or line.command.startswith("-"):
        raise UsageError(f"{line.command}: not in a batch", hint="call xenvm-cmd for it alone")
    line.params = _params(line.command, words[1:])
    return _call(monitor, line)


def _occupy_standard_descriptors() -> None:
    """Open what the caller closed of the descriptors 0 to 2, lest a socket or a console get such a number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run xenvm-cmd and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _occupy_standard_descriptors()
        return run(parse(given))
    except XenvmError as failure:
        render.error(failure, as_json="--json" in given)
        return failure.code
    except OSError as failure:  # of the host, such as no descriptors left
        render.error(XenvmError(str(failure)), as_json="--json" in given)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
