# SPDX-License-Identifier: GPL-2.0-or-later
"""The parser process: a config file on descriptor 4 becomes grants and policy, or a list of everything wrong in it.

Descriptor 5 is the host's policy file, empty when there is none. The process has no privilege at all, not even to open
a file: whether the kernel exists is checked by whoever asked. Started as `_start.py parser FILENAME`, the name being
for messages only.
"""

from __future__ import annotations

import difflib  # noqa: F401 - for suggestions; once confined, this process can load nothing more
import itertools
import os
import sys

from xenvm import jsontext
from xenvm.boundary.devices import DiskGrant, NicGrant
from xenvm.boundary.frames import BODY_LIMIT_BYTES, encode
from xenvm.boundary.messages import ConfigIssue, FileNeed, Grants, HostPolicy, Parsed, Policy
from xenvm.boundary.privileges import Role
from xenvm.boundary.processors import Affinity, CpuidRule
from xenvm.config.dump import fields
from xenvm.config.parse import MAX_FILE_BYTES, Line, ParseResult, parse_bytes
from xenvm.errors import ConfigError, ProtocolError
from xenvm.helpers import serve
from xenvm.model import DiskSpec, DiskType, DisplayKind, Uuid
from xenvm.parser.hostpolicy import NO_POLICY, host_policy, prepare
from xenvm.parser.issues import issue_at, line_of, shown
from xenvm.parser.machine import machine, refused, warned

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Final

    from xenvm.config.schema import Config

CONFIG, HOST_POLICY = 4, 5
ISSUES_LIMIT: Final = 200
# Room for everything in the answer but the values of `get`, in bytes: grants repeat paths and the command line.
FIELDS_LIMIT_BYTES: Final = BODY_LIMIT_BYTES // 2
ISSUES_LIMIT_BYTES: Final = BODY_LIMIT_BYTES // 2
FILES_LIMIT: Final = 200
FILES_LIMIT_BYTES: Final = BODY_LIMIT_BYTES // 4  # of a file that is refused anyway; that of a good one names all
MESSAGE_LIMIT_BYTES: Final = BODY_LIMIT_BYTES * 3 // 4  # the broker passes it on, together with the path of the file


def main() -> int:
    """Parse one file; return the exit status."""
    broker = serve.broker_channel()
    prepare(HOST_POLICY)
    broker.send(serve.drop(Role.PARSER, frozenset()))
    filename = sys.argv[2]
    result = parse_bytes(_read(CONFIG), filename)
    try:
        host = host_policy(_read(HOST_POLICY))
        broker.send(answer(result, random_uuid(), host))
    except ConfigError as error:
        broker.send(_message(result, [ConfigIssue(0, "", error.message[:1000], error.hint)], "", NO_POLICY))
    return 0


def random_uuid() -> str:
    """Return a fresh uuid of version 4 (RFC 9562); the module uuid would cost a tenth of this process's start."""
    octets = bytearray(os.urandom(16))
    octets[6] = octets[6] & 0x0F | 0x40
    octets[8] = octets[8] & 0x3F | 0x80
    digits = octets.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _read(descriptor: int) -> bytes:
    content = bytearray()
    while len(content) <= MAX_FILE_BYTES and (piece := os.read(descriptor, 65536)):
        content += piece
    return bytes(content)


def answer(result: ParseResult, fresh_uuid: str, host: HostPolicy = NO_POLICY) -> Parsed:
    """Return what the broker needs of a parsed file; `fresh_uuid` serves when the file gives none."""
    issues = [issue_at(Line(issue.line, issue.text), issue.message, issue.hint) for issue in result.issues]
    config = result.config
    if config is not None:
        issues += _not_yet(config, result)
    values = fields(config) if config is not None else {}
    if sum(map(len, values.values())) > FIELDS_LIMIT_BYTES:
        message = f"the values add up to more than {FIELDS_LIMIT_BYTES} bytes"
        issues.append(ConfigIssue(0, "", message, "write fewer lines, or shorter ones"))
    made = _message(result, issues, fresh_uuid, host)
    if made.grants and not _fits(made):  # without the texts of lines with which all may be well
        made = made.but(files=tuple(need.but(text="") for need in made.files))
    if made.grants and not _fits(made):
        hint = "write fewer lines, or shorter ones"
        issue = ConfigIssue(0, "", "the file says more than a monitor can hold", hint)
        made = _message(result, [issue], fresh_uuid, host)
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
        size += len(jsontext.dumps(issue.as_body()))
        if size > ISSUES_LIMIT_BYTES:
            break
        kept += 1
    left_out = len(issues) - kept
    return issues[:kept] + ([ConfigIssue(0, "", f"and {left_out} more errors", "")] if left_out else [])


def _message(result: ParseResult, issues: list[ConfigIssue], fresh_uuid: str, host: HostPolicy) -> Parsed:
    config = result.config
    good = config if config is not None and not issues else None
    return Parsed(
        issues=tuple(_first(issues)),
        grants=(_grants(good, fresh_uuid),) if good else (),
        policy=(_policy(good),) if good else (),
        host=host,
        fields=fields(good) if good else {},
        files=tuple(_files(result) if good else _some(_files(result))),
        uuid_given=good is not None and good.uuid is not None,
        warnings=tuple(warned(good, result.lines)) if good and good.hvm else (),
    )


def _some(files: Iterable[FileNeed]) -> Iterator[FileNeed]:
    """Give as many of them as a frame holds beside the issues."""
    size = 0
    for need in itertools.islice(files, FILES_LIMIT):
        size += len(jsontext.dumps(need.as_body()))
        if size > FILES_LIMIT_BYTES:
            return
        yield need


def _files(result: ParseResult) -> Iterator[FileNeed]:
    """Name the files that must be there, also when something else in the config is wrong."""
    for key, place, kind in (
        ("kernel", "kernel", "file"),
        ("initrd", "initrd", "file"),
        ("startup_file", "startup", "image"),
    ):
        value = result.partial.get(key)
        if isinstance(value, str) and value:
            yield _need(line_of(result.lines, place), place, value, kind)
    disks = result.partial.get("disks")
    for index, disk in enumerate(disks if isinstance(disks, tuple) else ()):
        if isinstance(disk, DiskSpec) and disk.path:
            line = line_of(result.lines, "disks", index)
            yield _need(line, "disk", disk.path, "block" if disk.type is DiskType.PHY else "either")
            if disk.crypt:
                yield _need(line, "key-file", disk.crypt.key_file, "file")


def _need(line: Line, key: str, path: str, kind: str) -> FileNeed:
    return FileNeed(key, line.number, path, kind, shown(line))


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
        disks=tuple(_disk(disk) for disk in config.disks),
        nics=tuple(NicGrant(nic.id, nic.bridge or "", nic.mac_for(Uuid(uuid))) for nic in config.nics),
        device_timeout_s=config.device_timeout_s,
        image=config.startup_file or "",
        image_compression=config.image_compression.value,
        machine=(machine(config),) if config.hvm else (),
    )


def _disk(disk: DiskSpec) -> DiskGrant:
    crypt = disk.crypt
    return DiskGrant(
        device=disk.device_number,
        name=disk.virtpath,
        type=disk.type.value,
        path=disk.path,
        read_only=disk.read_only,
        cdrom=disk.cdrom,
        share=disk.share,
        cipher=crypt.cipher if crypt else "",
        key_size_bits=crypt.key_size_bits if crypt else 0,
        key_file=crypt.key_file if crypt else "",
    )


def _policy(config: Config) -> Policy:
    return Policy(
        startup=config.startup.value,
        on_halt=config.on_halt.value,
        on_reboot=config.on_reboot.value,
        on_crash=config.on_crash.value,
        shutdown_timeout_s=config.shutdown_timeout_s,
        device_timeout_s=config.device_timeout_s,
    )


def _not_yet(config: Config, result: ParseResult) -> Iterator[ConfigIssue]:
    """Name every key that is understood but that this version cannot act on: none is dropped without a word."""
    if config.hvm:
        yield from refused(config, result.lines)
    wanted = {
        "pci": bool(config.pci),
        "display": not config.hvm and config.display.kind is not DisplayKind.NONE,
        "cores_per_socket": config.cores_per_socket is not None,
    }
    for field, given in wanted.items():
        if given:
            for line in result.lines[field]:
                yield issue_at(line, f"this version of xenvm {UNABLE[field]}", HINTS[field])


UNABLE: Final = {
    "pci": "does not pass PCI devices through",
    "display": "gives PV guests no display",
    "cores_per_socket": "does not shape the processor topology",
}
HINTS: Final = {
    "pci": "remove the line; the guest reaches disks and networks of the host by `disk` and `nic`",
    "display": "remove the line; xenvm-cmd UUID console connects to the guest's console",
    "cores_per_socket": "remove the line; `vcpus` alone says how many virtual CPUs there are",
}
