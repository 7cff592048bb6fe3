# SPDX-License-Identifier: GPL-2.0-or-later
"""The parser process: a config file on descriptor 4 becomes grants and policy, or a list of everything wrong in it.

It has no privilege at all, not even to open a file: whether the kernel exists is checked by whoever asked. Started as
`_start.py parser FILENAME`, the name being for messages only.
"""

from __future__ import annotations

import difflib  # noqa: F401 - for suggestions; once confined, this process can load nothing more
import json
import os
import sys
import uuid as uuids

from xenvm.boundary.frames import BODY_LIMIT_BYTES, encode
from xenvm.boundary.messages import Affinity, ConfigIssue, CpuidRule, Grants, Parsed, Policy
from xenvm.boundary.privileges import Role
from xenvm.config.dump import fields
from xenvm.config.issue import visible
from xenvm.config.parse import MAX_FILE_BYTES, ParseResult, parse_bytes
from xenvm.errors import ProtocolError
from xenvm.helpers import serve
from xenvm.model import DisplayKind, StartupKind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from xenvm.config.schema import Config

CONFIG: Final = 4
ISSUES_LIMIT: Final = 200
# Room for everything in the answer but the values of `get`, in bytes: grants repeat paths and the command line.
FIELDS_LIMIT_BYTES: Final = BODY_LIMIT_BYTES // 2
ISSUES_LIMIT_BYTES: Final = BODY_LIMIT_BYTES // 2
MESSAGE_LIMIT_BYTES: Final = BODY_LIMIT_BYTES * 3 // 4  # the broker passes it on, together with the path of the file


def main() -> int:
    """Parse one file; return the exit status."""
    broker = serve.broker_channel()
    broker.send(serve.drop(Role.PARSER, frozenset()))
    untrusted_file = bytearray()
    while len(untrusted_file) <= MAX_FILE_BYTES and (piece := os.read(CONFIG, 65536)):
        untrusted_file += piece
    filename = sys.argv[2]
    broker.send(answer(parse_bytes(bytes(untrusted_file), filename), str(uuids.uuid4())))
    return 0


def answer(result: ParseResult, fresh_uuid: str) -> Parsed:
    """Return what the broker needs of a parsed file; `fresh_uuid` serves when the file gives none."""
    issues = [ConfigIssue(i.line, visible(i.text)[:1000], i.message[:1000], i.hint[:1000]) for i in result.issues]
    config = result.config
    if config is not None:
        issues += _not_yet(config, result)
    values = fields(config) if config is not None else {}
    if sum(map(len, values.values())) > FIELDS_LIMIT_BYTES:
        issues.append(ConfigIssue(0, "", f"the values add up to more than {FIELDS_LIMIT_BYTES} bytes", ""))
    made = _message(result, issues, fresh_uuid)
    if made.grants and not _fits(made):
        made = _message(result, [ConfigIssue(0, "", "the file says more than a monitor can hold", "")], fresh_uuid)
    return made


def _fits(message: Parsed) -> bool:
    try:
        return len(encode(message)) <= MESSAGE_LIMIT_BYTES
    except ProtocolError:
        return False


def _first(issues: list[ConfigIssue]) -> list[ConfigIssue]:
    """Return as many issues as a frame holds, and how many more there are."""
    kept, size = 0, 0
    for issue in issues[:ISSUES_LIMIT]:
        size += len(json.dumps(issue.as_body()))
        if size > ISSUES_LIMIT_BYTES:
            break
        kept += 1
    left_out = len(issues) - kept
    return issues[:kept] + ([ConfigIssue(0, "", f"and {left_out} more errors", "")] if left_out else [])


def _message(result: ParseResult, issues: list[ConfigIssue], fresh_uuid: str) -> Parsed:
    config = result.config
    good = config if config is not None and not issues else None
    kernel, initrd = (_path(result, name) for name in ("kernel", "initrd"))
    return Parsed(
        issues=tuple(_first(issues)),
        grants=(_grants(good, fresh_uuid),) if good else (),
        policy=(_policy(good),) if good else (),
        fields=fields(good) if good else {},
        kernel=kernel,
        initrd=initrd,
        lines={name: result.lines.get(name, 0) for name in ("kernel", "initrd")},
        uuid_given=good is not None and good.uuid is not None,
    )


def _path(result: ParseResult, name: str) -> str:
    value = result.partial.get(name)
    return value if isinstance(value, str) else ""


def _grants(config: Config, fresh_uuid: str) -> Grants:
    uuid = config.uuid or fresh_uuid
    return Grants(
        uuid=uuid,
        name=config.name or uuid,
        kernel=config.kernel or "",
        initrd=config.initrd or "",
        cmdline=config.cmdline,
        memory_mib=config.memory_mib,
        memory_max_mib=config.memory_max_mib or config.memory_mib,
        vcpus=config.vcpus,
        check_memory=not config.no_mem_check,
        cpuid=tuple(
            CpuidRule(
                rule.leaf,
                -1 if rule.subleaf is None else rule.subleaf,
                tuple(mask or "" for mask in (rule.eax, rule.ebx, rule.ecx, rule.edx)),
            )
            for rule in config.cpuid
        ),
        affinity=tuple(Affinity(rule.vcpu, rule.cpus) for rule in config.cpus_affinity),
        debug=config.debug,
        output=config.output or "",
    )


def _policy(config: Config) -> Policy:
    return Policy(
        startup=config.startup.value,
        on_halt=config.on_halt.value,
        on_reboot=config.on_reboot.value,
        on_crash=config.on_crash.value,
        shutdown_timeout_s=config.shutdown_timeout_s,
    )


def _not_yet(config: Config, result: ParseResult) -> Iterator[ConfigIssue]:
    """Name every key that is understood but that this version cannot act on: none is dropped without a word."""
    wanted = {
        "hvm": config.hvm,
        "disks": bool(config.disks),
        "nics": bool(config.nics),
        "pci": bool(config.pci),
        "display": not config.hvm and config.display.kind is not DisplayKind.NONE,
        "cores_per_socket": config.cores_per_socket is not None,
        "startup": config.startup in (StartupKind.RESTORE, StartupKind.RESTORE_DELETE),
    }
    for field, given in wanted.items():
        if given:
            line = result.lines.get(field, 0)
            yield ConfigIssue(line, "", f"this version of xenvm {UNABLE[field]}", "")


UNABLE: Final = {
    "hvm": "starts PV guests only",
    "disks": "does not attach disks",
    "nics": "does not attach network cards",
    "pci": "does not pass PCI devices through",
    "display": "gives PV guests no display",
    "cores_per_socket": "does not shape the processor topology",
    "startup": "does not restore save images",
}
