# SPDX-License-Identifier: GPL-2.0-or-later
"""The program `xenvm`: start the monitor of one VM, or check its config file.

Run by root it only opens the config file and starts the broker; a process without privilege reads the file.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import contextlib
import os
import select
import sys

from xenvm.boundary.place import OPTION, Place
from xenvm.boundary.spawn import command, spawn
from xenvm.errors import ExitCode, ProtocolError, TimeoutExpiredError, UsageError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.messages import Parsed

USAGE: Final = """\
usage: xenvm [--foreground] FILE       start the monitor of the VM that FILE describes
       xenvm --check FILE              tell whether FILE is fine; start nothing
       xenvm --simulator [--foreground] FILE   the same on a simulated host, as an ordinary user
       xenvm --help | --version

xenvm goes to the background once the guest has reached its startup state, and prints its uuid. With --foreground it
stays, for a service manager. Exit status: 0 done, 1 failed, 2 usage, 3 the monitor runs and its guest does not, 5 a
domain is in the way, 6 config refused, 7 timed out, 8 permission refused, 9 the VM has a monitor already, 130
interrupted. FILE is described in xenvm.cfg(5); xenvm-cmd(1) commands the monitor.
"""
START_WAIT_S: Final = 86400.0  # a restore of a large guest has hours; a monitor that stands still says nothing at all
END_WAIT_S: Final = 10.0  # for a monitor that could not start
PARSE_WAIT_S: Final = 30.0
STATUS, CONFIG, HOST_POLICY = 3, 4, 5
HOST_POLICY_FILE: Final = "/etc/xenvm/policy.toml"
DEFAULT_DIRECTORY: Final = "/run/xenvm"
INTERRUPTED: Final = 130


def main() -> int:
    """Run the program; return its exit status."""
    try:
        return _run(sys.argv[1:])
    except XenvmError as error:
        sys.stderr.write(f"xenvm: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return int(error.code)
    except OSError as error:  # of the host, such as no process or descriptor left
        sys.stderr.write(f"xenvm: {error}\n")
        return int(ExitCode.FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(words: list[str]) -> int:
    options = [word for word in words if word.startswith("-")]
    files = [word for word in words if not word.startswith("-")]
    if options == ["--help"] and not files:
        sys.stdout.write(USAGE)
        return 0
    if options == ["--version"] and not files:
        from xenvm import __version__  # noqa: PLC0415 - not needed to start a guest

        sys.stdout.write(f"xenvm {__version__}\n")
        return 0
    simulated = OPTION in options
    others = [option for option in options if option != OPTION]
    allowed = ([], ["--foreground"]) if simulated else ([], ["--check"], ["--foreground"])
    if len(files) != 1 or others not in allowed or len(options) - len(others) > 1:
        raise UsageError("one config file is needed, and at most one option", hint="xenvm --help")
    path = os.path.abspath(files[0])  # noqa: PTH100 - pathlib costs 5 ms
    try:
        config = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise XenvmError(f"{path}: {error.strerror}", code=ExitCode.CONFIG_REFUSED) from error
    if others == ["--check"]:
        return _check(path, config)
    foreground = others == ["--foreground"]
    if simulated:
        from xenvm.cli import simulator  # noqa: PLC0415 - nothing of it is there when Xen's guests start

        return _start(path, config, simulator.prepare(), foreground=foreground)
    if os.geteuid() != 0:
        raise XenvmError(
            "starting a guest needs root",
            hint="sudo xenvm FILE; or xenvm --simulator FILE, for a look without Xen",
            code=ExitCode.PERMISSION_REFUSED,
        )
    return _start(path, config, Place(), foreground=foreground)


def _start(path: str, config: int, place: Place, *, foreground: bool) -> int:
    directory = place.simulator or os.environ.get("XENVM_SOCKET_DIR", DEFAULT_DIRECTORY)
    if foreground:
        os.dup2(config, CONFIG)
        os.set_inheritable(CONFIG, True)  # where it had that number already, dup2 does nothing
        notify = os.environ.get("NOTIFY_SOCKET", "")
        argv = command("broker", path, directory, "foreground", notify, *place.words)
        os.execve(argv[0], argv, {})  # noqa: S606 - a fixed list, no shell
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        inherited = {0: os.open("/dev/null", os.O_RDWR), 1: 2, 2: 2, STATUS: theirs.fileno(), CONFIG: config}
        spawn("broker", inherited, path, directory, "background", "", *place.words, new_session=True)
    finally:
        theirs.close()
    try:
        return _show_outcome(ours, place)
    except KeyboardInterrupt:
        sys.stderr.write("xenvm: the start goes on; `xenvm-cmd list` shows it, `xenvm-cmd UUID destroy` ends it\n")
        raise


def _show_outcome(ours: socket.socket, place: Place) -> int:
    """Wait until the monitor says how its start went, or has ended; its steps have deadlines of their own."""
    # Not above, so that the broker starts while this process imports.
    from xenvm.boundary.frames import Channel  # noqa: PLC0415
    from xenvm.boundary.messages import Outcome  # noqa: PLC0415
    from xenvm.cli.render import plain  # noqa: PLC0415

    channel = Channel(ours)
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    if not poll.poll(START_WAIT_S * 1000):
        raise TimeoutExpiredError(
            f"the monitor has not said within {START_WAIT_S / 3600:g} hours how its start went",
            hint=f"does it stand still? `xenvm-cmd list` shows it, its log is in {place.logs}",
        )
    received = channel.receive_now()
    if received is None:
        raise XenvmError("the monitor ended without a word", hint=f"its log is in {place.logs}")
    outcome = received[0]
    if not isinstance(outcome, Outcome):
        raise ProtocolError("the monitor answered with something else")
    if outcome.code:
        with contextlib.suppress(XenvmError):  # a start that is tried again finds nothing of this one
            channel.receive(deadline_s=END_WAIT_S)
        sys.stderr.write(plain(outcome.text) + "\n")
        return outcome.code
    sys.stderr.write(plain(outcome.warnings))
    sys.stdout.write(f"{outcome.uuid}\n")
    if not outcome.text:
        return 0
    sys.stderr.write(plain(outcome.text) + "\n")  # the monitor has stayed, but not for the guest
    return int(ExitCode.NOT_RUNNING)


def _check(path: str, config: int) -> int:
    """Have the file parsed as for a start, and look at the files it names as a start does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            policy = os.open(HOST_POLICY_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError) as error:
            if isinstance(error, PermissionError):  # it says nothing of what the file may contain
                sys.stderr.write(f"warning: {HOST_POLICY_FILE}: {error.strerror}: only root sees whether it is sound\n")
            policy = os.memfd_create("policy", os.MFD_CLOEXEC)
        inherited = {0: config, 1: 2, 2: 2, STATUS: theirs.fileno(), CONFIG: config, HOST_POLICY: policy}
        pid = spawn("parser", inherited, path)
    finally:
        theirs.close()
    from xenvm.boundary import messages  # noqa: PLC0415
    from xenvm.boundary.frames import Channel  # noqa: PLC0415 - while the parser starts

    channel = Channel(ours)
    try:
        while (received := channel.receive(deadline_s=PARSE_WAIT_S)) is not None:
            if isinstance(received[0], messages.Parsed):
                return _report(path, received[0])
    except TimeoutExpiredError as error:
        raise TimeoutExpiredError(
            f"{path}: the parser had not read it after {PARSE_WAIT_S:g} s", hint="is this host very busy? Try again"
        ) from error
    finally:  # it has answered, or never will
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise XenvmError(f"{path}: the parser ended without an answer")


def _report(path: str, parsed: Parsed) -> int:
    from xenvm.broker.host import check_files  # noqa: PLC0415 - see above
    from xenvm.cli.render import plain  # noqa: PLC0415

    for warning in parsed.warnings:
        sys.stderr.write(plain(warning.show(path)) + "\n")
    issues = [*parsed.issues, *check_files(parsed, adopts=False)]
    for issue in sorted(issues, key=lambda issue: issue.line):
        sys.stderr.write(plain(issue.show(path)) + "\n")
    if issues:
        return int(ExitCode.CONFIG_REFUSED)
    sys.stdout.write(f"{path}: fine\n")
    return 0
