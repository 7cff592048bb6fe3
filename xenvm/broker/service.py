# SPDX-License-Identifier: GPL-2.0-or-later
"""What the broker does once it is confined: read the config through the parser, take what the VM needs, serve."""

from __future__ import annotations

import _signal as signal  # `signal` itself builds enumerations at each start
import _socket as socket  # `socket` itself builds enumerations at each start
import os
import sys
import time

from xenvm import jsontext
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Grants, HostPolicy, Outcome, Parsed, Policy
from xenvm.boundary.privileges import Role
from xenvm.broker import host, policyfile
from xenvm.broker.actlog import ActLog
from xenvm.broker.children import Child
from xenvm.broker.core import Broker
from xenvm.context import ExitStack, suppress
from xenvm.errors import ConfigError, ExitCode, TimeoutExpiredError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

LAUNCHER, CONFIG, HOST_POLICY = 3, 4, 5
PARSE_WAIT_S: Final = 120.0  # half a second on an idle host; sixteen starts at once on one slow processor need more
TEXT_LIMIT_BYTES: Final = 60000


class Launcher:
    """Whoever started the monitor and waits to hear how that went; told once."""

    def __init__(self, *, background: bool, notify: str) -> None:
        self._channel = Channel.from_descriptor(LAUNCHER) if background else None
        self._notify = notify
        self._told = False
        self._log = -1
        self.uuid = self.warnings = ""

    def to_log(self, log: int = -1) -> None:
        """Give the terminal or journal of whoever started the monitor back: from now on output goes to the log.

        In the background at once, in the foreground when the outcome has been told.
        """
        self._log = log if log >= 0 else self._log
        if self._log >= 0 and (self._told or self._channel is not None):
            os.dup2(self._log, 1)
            os.dup2(self._log, 2)

    def tell(self, code: int, text: str) -> None:
        """Report the outcome; later calls do nothing."""
        if self._told:
            return
        self._told = True
        warnings = _cut(self.warnings) if code == 0 else ""
        if self._channel is None:
            os.write(2, warnings.encode())
            if text:
                os.write(2, text.encode() + b"\n")
            if self._notify and code == 0:
                _notify_ready(self._notify)
            self.to_log()
            return
        with suppress(XenvmError):  # nobody may wait any more; the log has it
            self._channel.send(Outcome(code, self.uuid, _cut(text), warnings))
        if code == 0:  # else it shows, by closing with this process, when nothing of the monitor is left
            self._channel.close()


def serve(
    launcher: Launcher, config_file: str, directory: str, proof: dict[str, object], parser: Child, spare: Child
) -> int:
    """Run the monitor of the VM that the parser is just reading; return the exit status.

    `spare` is a builder that was started early, for the first job. Raise XenvmError when the monitor cannot start.
    """
    host.check_directory(directory)
    parsed = _parsed(parser, config_file)
    grants = parsed.grants[0]
    launcher.uuid, launcher.warnings = grants.uuid, _warned(parsed, config_file)
    with ExitStack() as undo:
        lock = host.take_lock(directory, grants.uuid)
        undo.callback(host.release_lock, directory, grants.uuid, lock)
        listener = host.listen(directory, grants.uuid)
        undo.callback(host.remove, host.socket_path(directory, grants.uuid))
        undo.callback(listener.close)
        log = host.open_log(grants.uuid, grants.output)
        os.write(log, launcher.warnings.encode())
        launcher.to_log(log)
        acts = ActLog(f"{host.LOG_DIRECTORY}/{grants.uuid}.acts")
        acts.append("confined", role="broker", pid=os.getpid(), proof=proof)
        acts.append("sealed", grants=grants.as_body())

        def reload_config() -> tuple[Grants, Policy, dict[str, str], HostPolicy]:
            descriptors = {CONFIG: _open_config(config_file)}
            try:
                descriptors[HOST_POLICY] = policyfile.open_host_policy()
                parser = Child(Role.PARSER, 2, descriptors, config_file)
            finally:
                for descriptor in descriptors.values():
                    os.close(descriptor)
            again = _parsed(parser, config_file)
            os.write(log, _warned(again, config_file).encode())
            new = again.grants[0]
            if again.uuid_given and new.uuid != grants.uuid:
                raise ConfigError(f"{config_file}: the uuid is now {new.uuid}; this monitor serves {grants.uuid}")
            return new.but(uuid=grants.uuid), again.policy[0], again.fields, again.host

        broker = Broker(
            grants=grants,
            policy=parsed.policy[0],
            host_policy=parsed.host,
            fields=parsed.fields,
            config_file=config_file,
            directory=directory,
            listener=listener,
            log=log,
            acts=acts,
            reload_config=reload_config,
            started=launcher.tell,
            spare=spare,
        )
        return broker.run(_signal_pipe())


def _signal_pipe() -> int:
    """Turn SIGTERM, SIGINT, SIGHUP and SIGCHLD (a child stands still) into bytes, their numbers, on a descriptor."""
    readable, writable = socket.socketpair()
    readable.setblocking(False)
    writable.setblocking(False)
    signal.set_wakeup_fd(writable.detach())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return readable.detach()


def _open_config(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _parsed(parser: Child, config_file: str) -> Parsed:
    """Return what the parser makes of the file, with grants and policy; raise ConfigError with every error in it.

    Missing files count as errors.
    """
    try:
        end = time.monotonic() + PARSE_WAIT_S
        while (received := parser.channel.receive(deadline_s=max(0.0, end - time.monotonic()))) is not None:
            parsed = received[0]
            for descriptor in received[1]:  # none belongs there
                os.close(descriptor)
            if isinstance(parsed, Parsed):
                break
        else:
            parser.end(grace_ms=1000)
            raise ConfigError(f"{config_file}: the parser {parser.how()} without an answer")
    except TimeoutExpiredError:
        raise TimeoutExpiredError(
            f"{config_file}: the parser did not answer within {PARSE_WAIT_S:g} s", hint="is this host overloaded?"
        ) from None
    finally:
        parser.end(grace_ms=1000)
    issues = sorted([*parsed.issues, *host.check_files(parsed, adopts=True)], key=lambda issue: issue.line)
    if issues or not parsed.grants or not parsed.policy:
        text = "\n".join(issue.show(config_file) for issue in issues)
        raise ConfigError(text or f"{config_file}: refused")
    return parsed


def _warned(parsed: Parsed, config_file: str) -> str:
    """Return the warnings of a file as the user sees them, "" for none."""
    return "".join(f"{warning.show(config_file)}\n" for warning in parsed.warnings)


def _cut(text: str) -> str:
    """Shorten a text to what a frame holds, in which one character may take twelve bytes."""
    whole = text
    while len(jsontext.dumps(text)) > TEXT_LIMIT_BYTES:
        text = text[: len(text) * 3 // 4]
    return text if text == whole else f"{text}\n..."


def _notify_ready(path: str) -> None:
    """Tell the service manager (sd_notify(3)); a leading @ stands for the abstract name space."""
    notifier = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        notifier.sendto(b"READY=1", address)
    except OSError as error:
        os.write(2, f"cannot notify the service manager at {path}: {error.strerror}\n".encode())
        sys.exit(ExitCode.FAILED)
    finally:
        notifier.close()
