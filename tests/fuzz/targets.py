# SPDX-License-Identifier: GPL-2.0-or-later
"""What takes bytes of somebody who may be hostile: each target raises for a fault, and for nothing else.

`scripts/fuzz TARGET SECONDS` drives one by coverage; tests/unit/test_fuzz_targets.py runs each over its corpus and what
was made of that at random.
"""

import json

import saveimages
from backends import Memory

from xenvm.boundary import survey
from xenvm.boundary.devices import Vbd, Vif
from xenvm.boundary.frames import decode, encode
from xenvm.boundary.images import Progress
from xenvm.boundary.messages import NO_DOMAIN, Ask, DomainState, Done, Op
from xenvm.boundary.qmp import EVENTS_LIMIT, LINE_LIMIT_BYTES, WORD_LIMIT, Parser, QmpError
from xenvm.config.issue import format_issue
from xenvm.config.parse import parse_bytes
from xenvm.errors import ProtocolError, UsageError, XenvmError
from xenvm.helpers import devices
from xenvm.helpers.image import header
from xenvm.helpers.stream import records
from xenvm.helpers.stream.records import ImageError
from xenvm.helpers.unpacker.tables import acpi_of, smbios_of
from xenvm.parser.main import answer
from xenvm.supervisor import commands, control

UUID = "11111111-2222-4333-8444-555555555555"
DISK = Vbd(51712, "xvda", False, False, False, "file:/a", 7, 1, "")
CARD = Vif(0, "br0", "00:16:3e:00:00:01")
HOME = "/local/domain/7/device/vbd/51712"


def config(data):
    """A config file: accepted and through the broker's checks, or refused with lines."""
    result = parse_bytes(data, "x.cfg")
    for issue in result.issues:
        assert format_issue("x.cfg", issue)
    parsed = answer(result, UUID)
    assert bool(parsed.issues) != bool(parsed.grants)
    assert decode(encode(parsed)) == parsed


def frame(data):
    """A frame of a process that was taken over: a message that can be sent again, or a ProtocolError."""
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


def socket(data):
    """A request of a client: checked, or refused."""
    try:
        request, _ = control.decode(data)
        name, command = commands.find(request.method)
        commands.check_arguments(name, command, request.params)
        assert 0 < commands.seconds(request.params, "timeout", 60.0) <= commands.TIMEOUT_MAX_S
    except (ProtocolError, UsageError) as error:
        assert error.message.isascii()


def xenstore(data):
    """What a guest writes into its own nodes, `name=value` in lines: a look at its devices passes every check."""
    store = Memory()
    store.make("/local/domain/7")
    store.permissions("/local/domain/7", "n0", "r7")
    devices.write(store, UUID, 7, [DISK], [CARD])
    for line in data.split(b"\n")[:20]:
        name, _, value = line.partition(b"=")
        if name.isalnum() and name.isascii():
            store.guest_writes(7, f"{HOME}/{name.decode('ascii')}", value)
    found = devices.look(store, UUID, 7)
    assert [state.name for state in found][:1] == ["xvda"]
    assert decode(encode(Done(0, NO_DOMAIN, "", found))).devices == found


def image(data):
    """A save image, of a PV or an HVM guest: whole, or refused in printable words; never more than there is."""

    def read(length, at):
        assert at >= 0
        return data[at : at + length]

    for hvm in (False, True):
        try:
            facts = records.facts(read, len(data), hvm=hvm)
            guest = records.Guest(facts.memory_max_kib, facts.vcpus, hvm=hvm)
            for piece in records.pieces(read, facts.stream_at, guest):
                assert isinstance(piece, bytes) or 0 <= piece[0] <= piece[0] + piece[1] <= len(data)
            records.rest(read, guest, lambda content: None)
        except ImageError as error:
            assert error.message.isprintable()


def qmp(data):
    """What a device model says: bounded answers, or a QmpError."""
    parser = Parser()
    try:
        for at in range(0, len(data), 97):
            parser.feed(data[at : at + 97])
            assert len(parser.events) <= EVENTS_LIMIT
            assert len(parser.replies) <= EVENTS_LIMIT
            assert len(parser._buffer) <= LINE_LIMIT_BYTES
            assert all(len(event) <= WORD_LIMIT and event.isprintable() for event in parser.events)
    except QmpError as error:
        assert error.message.isprintable()


def tables(data):
    """The host's firmware tables: what was picked is in them, or they are refused."""
    for pick in (lambda: smbios_of(data, ()), lambda: acpi_of([data])):
        try:
            assert len(pick()) <= 2 * len(data)
        except XenvmError as error:
            assert error.message.isprintable()


def disk(data):
    """The header of a qcow or vhd image: its size, or refused."""
    for kind in ("qcow", "vhd"):
        try:
            assert header.driver(kind, data[:512].ljust(512, b"\0"), data[-512:].ljust(512, b"\0"))
        except XenvmError as error:
            assert error.message.isprintable()


def looks(data):
    """What another broker wrote of a look at the host."""
    told = survey.told(data.decode("utf-8", "replace"), 7, UUID, 100, 10**15)
    assert told in (None, DomainState.RUNNING, DomainState.PAUSED, DomainState.ABSENT)


TARGETS = {one.__name__: one for one in (config, frame, socket, xenstore, image, qmp, tables, disk, looks)}
CORPUS = {
    "config": [
        b"kernel = /k\nmemory = 64\ndisk = /a:file:xvda:w:disk\nnic = bridge=br0\non_crash = preserve\n",
        b"hvm = true\nmemory = 64\nboot = dc\ndisplay = vnc:keymap=de\nserial = tcp:127.0.0.1:4555\ncpuid = 1:ecx=x\n",
    ],
    "frame": [
        encode(Ask(1, Op.QUERY, "", 0)),
        encode(Progress(1, "writing", 1, 2)),
        encode(Done(1, NO_DOMAIN, "text")),
    ],
    "socket": [
        json.dumps(
            {"jsonrpc": "2.0", "method": name, "params": dict.fromkeys(command.arguments, "1"), "id": 1}
        ).encode()
        for name, command in commands.COMMANDS.items()
    ],
    "xenstore": [b"state=4\nbackend=/local/domain/0/backend/vbd/8/51712\nring-ref=9", b"state=\nevent-channel=-1"],
    "image": [
        saveimages.image(),
        saveimages.image(sealed=True),
        saveimages.hvm_image(),
        saveimages.hvm_image(sealed=True),
    ],
    "qmp": [
        b'{"QMP": {"version": {}}}\n{"return": {}, "id": 1}\n{"event": "STOP"}\n{"error": {"desc": "no"}, "id": 2}\n',
    ],
    "tables": [
        b"\1\6\0\0\1\2QEMU\0Thing\0\0\x82\4\1\0own\0\0\x7f\4\2\0\0\0",
        b"SLIC\x28\0\0\0\1" + bytes([(-sum(b"SLIC\x28\1key!")) % 256]) + bytes(26) + b"key!",
    ],
    "disk": [b"QFI\xfb\0\0\0\3" + bytes(504), b"conectix" + bytes(504)],
    "looks": [f"200 7r{UUID.replace('-', '')} 8p{UUID.replace('-', '1')[:32]}".encode(), b"0", b""],
}
