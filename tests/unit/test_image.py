# SPDX-License-Identifier: GPL-2.0-or-later
"""The image worker's pure parts: headers of images, the NBD handshake against a server of this test, the arguments."""

import json
import socket
import struct
import time

import pytest

from xenvm.errors import ProtocolError, TimeoutExpiredError, XenvmError
from xenvm.helpers.image import header, nbd, server

NOTHING = bytes(512)


def qcow(version, backing=0, crypt=0, incompatible=0):
    data = bytearray(512)
    struct.pack_into(">4sIQ", data, 0, b"QFI\xfb", version, backing)
    struct.pack_into(">I", data, 36 if version == 1 else 32, crypt)
    if version == 3:
        struct.pack_into(">Q", data, 72, incompatible)
    return bytes(data)


def vhd(disk_type):
    data = bytearray(512)
    data[:8] = b"conectix"
    struct.pack_into(">I", data, 60, disk_type)
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "head", "tail", "driver"),
    [
        ("qcow", qcow(1), NOTHING, "qcow"),
        ("qcow", qcow(2), NOTHING, "qcow2"),
        ("qcow", qcow(3), NOTHING, "qcow2"),
        ("qcow", qcow(3, incompatible=1), NOTHING, "qcow2"),  # dirty: QEMU repairs it
        ("qcow", qcow(2), vhd(3), "qcow2"),  # the guest's data may look like anything
        ("vhd", NOTHING, vhd(2), "vpc"),
        ("vhd", qcow(3), vhd(2), "vpc"),
        ("vhd", vhd(3), vhd(3), "vpc"),
        ("vhd", vhd(3), NOTHING, "vpc"),  # its end was lost; the copy at the beginning is whole
    ],
)
def test_the_driver_of_an_image(kind, head, tail, driver):
    assert header.driver(kind, head, tail) == driver


@pytest.mark.parametrize(
    ("kind", "head", "tail", "message"),
    [
        ("qcow", qcow(2, backing=1), NOTHING, "difference to another file"),
        ("qcow", qcow(1, backing=2**63), NOTHING, "difference to another file"),
        ("qcow", qcow(3, incompatible=4), NOTHING, "data in another file"),
        ("qcow", qcow(3, incompatible=2**64 - 1), NOTHING, "data in another file"),
        ("qcow", qcow(1, crypt=1), NOTHING, "encrypted in itself"),
        ("qcow", qcow(2, crypt=2), NOTHING, "encrypted in itself"),
        ("qcow", qcow(0), NOTHING, "version 0"),
        ("qcow", qcow(2**32 - 1), NOTHING, "version 4294967295"),
        ("qcow", vhd(3), vhd(3), "is of type qcow, but its image is a VHD image"),
        ("qcow", NOTHING, vhd(2), "is of type qcow, but its image is a VHD image"),
        ("qcow", NOTHING, NOTHING, "of no format known here (it begins with 00 00 00 00 00 00 00 00)"),
        ("qcow", b"KDMV" + bytes(508), NOTHING, "a VMDK image"),
        ("qcow", b"\x1b[2J" + bytes(508), NOTHING, "begins with 1b 5b 32 4a"),
        ("qcow", b"QFI\xfb", b"QFI\xfb", "shorter than 512"),
        ("qcow", b"", b"", "shorter than 512"),
        ("vhd", b"vhdxfile" + bytes(504), NOTHING, "a VHDX image"),
        ("vhd", qcow(3), NOTHING, "is of type vhd, but its image is a qcow image of version 3"),
        ("vhd", vhd(4), vhd(4), "differencing"),
        ("vhd", vhd(0), NOTHING, "VHD of type 0"),
        ("vhd", NOTHING, vhd(3), "type 3 without a header"),
        ("vhd", vhd(3), vhd(2), "fixed VHD whose first sector"),
    ],
)
def test_an_image_that_is_refused(kind, head, tail, message):
    with pytest.raises(XenvmError) as caught:
        header.driver(kind, head, tail)
    assert message in caught.value.message


# -- the handshake --------------------------------------------------------------------------------------------------

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
MAGIC = 0x3E889045565A9


def reply(kind, data=b"", option=7, magic=MAGIC):
    return struct.pack(">QIII", magic, option, kind, len(data)) + data


EXPORT = struct.pack(">HQH", 0, 1 << 20, 0x46D)


def negotiate(answer, patience_s=5.0):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        result = nbd.negotiate(ours, time.monotonic() + patience_s)
        return result, theirs.recv(1000), ours.recv(1000)


def test_the_handshake():
    result, asked, left = negotiate(GREETING + reply(3, b"\0\x01name") + reply(3, EXPORT) + reply(1) + b"rest")
    assert result == (1 << 20, 0x46D)
    assert asked == struct.pack(">I8sIIIH", 3, b"IHAVEOPT", 7, 6, 0, 0)
    assert left == b"rest"  # for the kernel


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"NBDMAGIC",
        b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x03",  # oldstyle
        b"NBDMAGICIHAVEOPT\x00\x00",
        GREETING,
        GREETING + reply(1),
        GREETING + reply(3, EXPORT) + reply(1, b"x"),
        GREETING + reply(3, EXPORT[:-1]) + reply(1),
        GREETING + reply(3, EXPORT + b"x") + reply(1),
        GREETING + reply(3) * 9,
        GREETING + reply(2),
        GREETING + reply(3, EXPORT, option=1) + reply(1),
        GREETING + reply(3, EXPORT, magic=1) + reply(1),
        GREETING + reply(2**31 + 6, b"\x1b[2Jno\xff" * 100),
        GREETING + struct.pack(">QIII", MAGIC, 7, 3, 2**32 - 1),
        GREETING + struct.pack(">QIII", MAGIC, 7, 3, 4097) + bytes(4097),
    ],
)
def test_a_server_that_is_not_honest(answer):
    with pytest.raises(ProtocolError) as caught:
        negotiate(answer)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_a_server_that_says_nothing():
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutExpiredError):
        nbd.negotiate(ours, time.monotonic() + 0.05)


@pytest.mark.parametrize("driver", ["qcow", "qcow2", "vpc"])
@pytest.mark.parametrize("read_only", [True, False])
def test_the_arguments_are_what_qemu_reads(driver, read_only):
    words = server.command(driver, "xenvm-test", device=False, read_only=read_only)
    below, image, export = json.loads(words[2]), json.loads(words[4]), json.loads(words[8])
    assert words[0] == "/usr/bin/qemu-storage-daemon"
    assert (below["driver"], image["driver"]) == ("file", driver)
    assert below["read-only"] == image["read-only"] == (not export["writable"]) == read_only
    assert below["cache"] == {"direct": True, "no-flush": False}
    assert image["file"] == below["node-name"]
    assert ("backing" in image, image.get("backing")) == (driver != "vpc", None)
    assert (
        json.loads(server.command(driver, "xenvm-test", device=True, read_only=read_only)[2])["driver"] == "host_device"
    )
