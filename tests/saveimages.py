# SPDX-License-Identifier: GPL-2.0-or-later
"""Small save images for tests, laid out record by record from Xen's specification, not by the code under test."""

import json
import struct
import zlib

MAGIC = b"Xen saved domain, xl format\n \x00 \r"
PAGE = bytes(range(256)) * 16
XENTYPE_XTAB = 15


def record(kind, body=b"", length=None):
    return struct.pack("<II", kind, len(body) if length is None else length) + body + bytes(-len(body) % 8)


def pages(numbers, contents):
    body = struct.pack("<II", len(numbers), 0) + b"".join(struct.pack("<Q", number) for number in numbers)
    return record(1, body + b"".join(contents))


def vcpu(kind, number=0, size=64):
    return record(kind, struct.pack("<II", number, 0) + bytes(size))


def parts(**changes):
    """Return the records of a good stream by name, in order."""
    made = {
        "info": record(2, bytes([8, 4, 0, 0, 0, 0, 0, 0])),
        "cpuid": record(0x11, bytes(24 * 3)),
        "msr": record(0x12, bytes(16)),
        "static": record(0x10),
        "map": record(3, struct.pack("<II", 0, 1023) + struct.pack("<QQ", 5, 6)),
        "pages": pages([0, 1 | 9 << 60, 2 | 15 << 60, 1023], [PAGE, bytes(4096), PAGE[::-1]]),
        "more": pages([7], [PAGE]),
        "tsc": record(8, bytes(24)),
        "shared": record(7, bytes(4096)),
        "vcpu": vcpu(4),
        "extended": vcpu(5),
        "end": record(0),
    }
    return made | changes


def libxc(records=None, *, kind=1, version=3, xen=(4, 17), ident=0x58454E46, options=0):
    head = struct.pack(">QIIHHI", 2**64 - 1, ident, version, options, 0, 0)
    head += struct.pack("<IHHII", kind, 12, 0, *xen)
    return head + b"".join((records or parts()).values())


def config(**changes):
    build = {"max_memkb": 131072, "target_memkb": 131072, "max_vcpus": 1, "type.pv": {}}
    return {"c_info": {"type": "pv", "name": "guest"}, "b_info": build} | changes


def image(stream=None, *, told=None, text=None, flags=3, order=0x01020304, libxl_version=2, tail=None, sealed=False):
    """Return a whole image; `sealed` with the member that xenvm adds."""
    text = json.dumps(config() if told is None else told).encode() if text is None else text
    if sealed:
        text = text[:-1] + b',"xenvm":{"bytes":"0000000000000000","crc32":"00000000"}}'
    text += b"\0"
    head = MAGIC + struct.pack("<IIII", order, flags, 0, 4 + len(text)) + struct.pack("<I", len(text)) + text
    streams = struct.pack(">QII", 0x4C6962786C466D74, libxl_version, 0) + struct.pack("<II", 1, 0)
    streams += (libxc() if stream is None else stream) + (record(0) if tail is None else tail)
    whole = head + streams
    if sealed:
        whole = whole.replace(b'"bytes":"0000000000000000"', b'"bytes":"%016x"' % len(whole))
        whole = whole.replace(b'"crc32":"00000000"', b'"crc32":"%08x"' % zlib.crc32(streams))
    return whole


def hvm_parts(**changes):
    """Return the records of a good stream of an HVM guest."""
    made = {
        "cpuid": record(0x11, bytes(24 * 3)),
        "msr": record(0x12, bytes(16)),
        "static": record(0x10),
        "pages": pages([0, 1, 2 | XENTYPE_XTAB << 60, 0xFEFFC], [PAGE, bytes(4096), PAGE[::-1]]),
        "more": pages([7], [PAGE]),
        "tsc": record(8, bytes(24)),
        "params": record(0xA, struct.pack("<II", 2, 0) + struct.pack("<QQQQ", 1, 0xFEFFC, 17, 0xFEFFF)),
        "context": record(9, bytes(range(200))),
        "end": record(0),
    }
    return made | changes


def emulator(state=b"QEVM state of a device model", *, which=(2, 0)):
    return record(3, struct.pack("<II", *which) + state)


def hvm_config():
    made = config()
    made["c_info"]["type"] = "hvm"
    return made


def hvm_image(stream=None, *, after=None, **options):
    """Return a whole image of an HVM guest; `after` is what follows the stream."""
    stream = libxc(hvm_parts(), kind=2) if stream is None else stream
    return image(stream, told=hvm_config(), tail=emulator() + record(0) if after is None else after, **options)
