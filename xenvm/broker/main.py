# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker process: `_start.py broker CONFIG-FILE SOCKET-DIRECTORY MODE`, started by `xenvm FILE` as root.

Descriptor 3 is a channel to whoever waits for the outcome (MODE background), 4 the opened config file. In MODE
foreground there is no 3: the outcome goes to standard error and, if NOTIFY names a socket, to the service manager.

1. cut the capabilities to the few that opening and starting need;
2. have the config parsed by a process without any privilege;
3. take the lock of the uuid, open log, act log and command socket, seal the grants;
4. serve until told to quit.
"""

import os
import socket
import sys
from dataclasses import replace
from typing import Final

from xenvm.boundary.confine import confine
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Grants, Outcome, Parsed, Policy
from xenvm.boundary.privileges import TABLE, Role
from xenvm.broker import host
from xenvm.broker.actlog import ActLog
from xenvm.broker.children import Child
from xenvm.broker.core import Broker, signal_pipe
from xenvm.errors import ConfigError, ExitCode, XenvmError

LAUNCHER, CONFIG = 3, 4
PARSE_WAIT_S: Final = 30.0


class Launcher:
    """Whoever started the monitor and waits to hear how that went; told once."""

    def __init__(self, *, background: bool, notify: str) -> None:
        self._channel = Channel.from_descriptor(LAUNCHER) if background else None
        self._notify = notify
        self._told = False
        self.uuid = ""

    def tell(self, code: int, text: str) -> None:
        """Report the outcome; later calls do nothing."""
        if self._told:
            return
        self._told = True
        if self._channel is None:
            if text:
                os.write(2, text.encode() + b"\n")
            if self._notify and code == 0:
                _notify_ready(self._notify)
            return
        try:
            self._channel.send(Outcome(code, self.uuid, text[:60000]))
        except XenvmError:
            pass  # nobody waits any more; the log has it
        self._channel.close()


def main() -> int:
    """Run one monitor; return its exit status."""
    config_file, directory, mode, notify = sys.argv[2:6]
    launcher = Launcher(background=mode == "background", notify=notify)
    os.umask(0o027)
    try:
        keep = frozenset({LAUNCHER, CONFIG} if mode == "background" else {CONFIG})
        proof = confine(TABLE[Role.BROKER], uid=None, gid=None, keep=keep)
        spare = Child(Role.BUILDER, 2, {}, "-")
        try:
            return _serve(launcher, config_file, directory, proof.as_dict(), spare)
        finally:
            spare.end()
    except XenvmError as error:
        launcher.tell(int(error.code), error.message + (f"\nhint: {error.hint}" if error.hint else ""))
        return int(error.code)


def _serve(launcher: Launcher, config_file: str, directory: str, proof: dict[str, object], spare: Child) -> int:
    host.check_directory(directory)
    grants, policy, fields, given = _parse(config_file, CONFIG)
    os.close(CONFIG)
    launcher.uuid = grants.uuid
    lock = host.take_lock(directory, grants.uuid)
    listener = host.listen(directory, grants.uuid)
    try:
        log = host.open_log(grants.uuid, grants.output)
        acts = ActLog(f"{host.LOG_DIRECTORY}/{grants.uuid}.acts")
        acts.append("confined", role="broker", pid=os.getpid(), proof=proof)
        acts.append("sealed", grants=grants.as_body())

        def reload_config() -> tuple[Grants, Policy, dict[str, str]]:
            descriptor = _open_config(config_file)
            try:
                new, new_policy, new_fields, new_given = _parse(config_file, descriptor)
            finally:
                os.close(descriptor)
            if new_given and new.uuid != grants.uuid:
                raise ConfigError(f"{config_file}: the uuid is now {new.uuid}; this monitor serves {grants.uuid}")
            return replace(new, uuid=grants.uuid), new_policy, new_fields

        broker = Broker(
            grants=grants,
            policy=policy,
            fields=fields,
            config_file=config_file,
            listener=listener,
            log=log,
            acts=acts,
            reload_config=reload_config,
            started=launcher.tell,
            spare=spare,
        )
        return broker.run(signal_pipe())
    finally:
        listener.close()
        host.remove(host.socket_path(directory, grants.uuid))
        host.release_lock(directory, grants.uuid, lock)


def _open_config(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _parse(config_file: str, descriptor: int) -> tuple[Grants, Policy, dict[str, str], bool]:
    """Have the file parsed without privilege; raise ConfigError with every error in it, missing files included."""
    parser = Child(Role.PARSER, 2, {CONFIG: descriptor}, config_file)
    try:
        while (received := parser.channel.receive(deadline_s=PARSE_WAIT_S)) is not None:
            parsed = received[0]
            if isinstance(parsed, Parsed):
                break
        else:
            parser.end(grace_ms=1000)
            raise ConfigError(f"{config_file}: the parser {parser.how()} without an answer")
    finally:
        parser.end(grace_ms=1000)
    issues = sorted([*parsed.issues, *host.check_files(parsed)], key=lambda issue: issue.line)
    if issues or not parsed.grants or not parsed.policy:
        text = "\n".join(issue.show(config_file) for issue in issues)
        raise ConfigError(text or f"{config_file}: refused")
    return parsed.grants[0], parsed.policy[0], parsed.fields, parsed.uuid_given


def _notify_ready(path: str) -> None:
    """Tell the service manager (sd_notify(3)); a leading @ stands for the abstract name space."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
        address = "\0" + path[1:] if path.startswith("@") else path
        try:
            notifier.sendto(b"READY=1", address)
        except OSError as error:
            os.write(2, f"cannot notify the service manager at {path}: {error.strerror}\n".encode())
            sys.exit(ExitCode.FAILED)
