# SPDX-License-Identifier: GPL-2.0-or-later
"""The storage worker's pure parts: netlink messages, device mapper requests; and what it does without either."""

import os
import socket
import struct

import pytest

from xenvm.boundary.workers import Decrypt
from xenvm.errors import XenvmError
from xenvm.helpers.storage import crypt, nbd

KEY = bytes(range(32))


def test_attributes_are_padded_and_found_again():
    data = nbd.attribute(1, b"abc") + nbd.attribute(2 | nbd.NLA_F_NESTED, b"") + nbd.attribute(3, b"12345")
    assert len(data) == 8 + 4 + 12
    assert nbd.parse_attributes(data) == {1: b"abc", 2: b"", 3: b"12345"}


def test_the_request_to_connect():
    made = nbd.request(27, nbd.NBD_CMD_CONNECT, 5, nbd.connect_attributes(1 << 20, 0x46D, 9, "xenvm-test"))
    assert struct.unpack_from("=IHHII", made) == (len(made), 27, 5, 5, 0)
    assert made[16:20] == b"\x01\x01\0\0"
    found = nbd.parse_attributes(made[20:])
    assert found[2] == (1 << 20).to_bytes(8, "little")
    assert found[3] == (512).to_bytes(8, "little")
    assert found[5] == (0x46D).to_bytes(8, "little")
    # nested twice: the list has items, an item has the descriptor
    assert nbd.parse_attributes(nbd.parse_attributes(found[7])[1]) == {1: (9).to_bytes(4, "little")}
    assert found[4] == nbd.TIMEOUT_S.to_bytes(8, "little")
    assert found[10] == b"xenvm-test\0"
    assert set(found) == {2, 3, 4, 5, 7, 10}  # no index: the kernel chooses


def error(number, sequence=1):
    return struct.pack("=IHHIIi", 20, 2, 0, sequence, 0, -number)


def test_answers_of_other_requests_are_passed_over():
    answer = struct.pack("=IHHIIBBxx", 28, 27, 0, 1, 0, 1, 1) + nbd.attribute(1, b"\x03\0\0\0")
    datagram = error(16, sequence=9) + answer + error(0)
    assert list(nbd.parse_messages(datagram, 1)) == [{1: b"\x03\0\0\0"}, 0]
    assert list(nbd.parse_messages(error(16), 1)) == [16]


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("=IHHII", 15, 27, 0, 1, 0),
        struct.pack("=IHHII", 17, 27, 0, 1, 0),
        struct.pack("=IHHII", 2**32 - 1, 27, 0, 1, 0),
        struct.pack("=IHHII", 16, 2, 0, 1, 0),
        struct.pack("=IHHIIBBxxHH", 24, 27, 0, 1, 0, 1, 1, 5, 1),
        struct.pack("=IHHIIBBxxHH", 24, 27, 0, 1, 0, 1, 1, 3, 1),
    ],
)
def test_an_answer_whose_lengths_do_not_fit(data):
    with pytest.raises(ValueError):
        list(nbd.parse_messages(data, 1))


def test_the_kernel_answers_a_request_made_here():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, nbd.NETLINK_GENERIC) as kernel:
        kernel.settimeout(10)
        name = nbd.attribute(nbd.CTRL_ATTR_FAMILY_NAME, b"nlctrl\0")
        kernel.sendto(nbd.request(nbd.GENL_ID_CTRL, nbd.CTRL_CMD_GETFAMILY, 7, name), (0, 0))
        answers = list(nbd.parse_messages(kernel.recv(65536), 7))
        assert answers[0][nbd.CTRL_ATTR_FAMILY_ID] == nbd.GENL_ID_CTRL.to_bytes(2, "little")
        name = nbd.attribute(nbd.CTRL_ATTR_FAMILY_NAME, b"no-such\0")
        kernel.sendto(nbd.request(nbd.GENL_ID_CTRL, nbd.CTRL_CMD_GETFAMILY, 8, name), (0, 0))
        answers = []
        while not answers:  # the acknowledgement of the first request comes before
            answers = list(nbd.parse_messages(kernel.recv(65536), 8))
        assert answers == [2]  # ENOENT


@pytest.mark.parametrize(("content", "message"), [(None, "not loaded"), ("16\n", "max_part=16")])
def test_the_module_must_be_there_and_leave_partitions_alone(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(nbd, "MODULE", str(tmp_path))
    if content is not None:
        (tmp_path / "parameters").mkdir()
        (tmp_path / "parameters" / "max_part").write_text(content)
    with pytest.raises(XenvmError) as caught:
        nbd.Kernel()
    assert message in caught.value.message
    assert "modprobe nbd max_part=0" in caught.value.hint


# -- the device mapper ----------------------------------------------------------------------------------------------


def test_requests_have_the_form_of_the_kernel():
    # sizeof(struct dm_ioctl) is 312 and is part of each request's number, linux/dm-ioctl.h
    for request in (crypt.DM_DEV_CREATE, crypt.DM_DEV_REMOVE, crypt.DM_DEV_SUSPEND, crypt.DM_TABLE_LOAD):
        assert request >> 16 & 0x3FFF == crypt.REQUEST.size == 312
    assert crypt.TARGET.size == 40
    made = crypt.encode("vm-a", 1, uuid="CRYPT-PLAIN-vm-a")
    assert struct.unpack_from("=3I4x2I4xI", made) == (4, 27, 0, 312, 0, 1)
    assert made[48:53] == b"vm-a\0"
    assert made[176:193] == b"CRYPT-PLAIN-vm-a\0"
    assert len(made) == 312


def test_the_longest_name_fits():
    made = crypt.encode("n" * 64, 0, uuid="CRYPT-PLAIN-" + "n" * 64)
    assert (made[48 + 64], made[176 + 76]) == (0, 0)


def test_a_table_is_one_whole_line():
    line = crypt.table("aes-xts-plain", KEY, (7, 300), 2048)
    first, sectors, status, following, kind = struct.unpack_from("=QQiI16s", line)
    assert (first, sectors, status, following, kind.rstrip(b"\0")) == (0, 2048, 0, len(line), b"crypt")
    assert line[40:].rstrip(b"\0").decode() == f"aes-xts-plain {KEY.hex()} 0 7:300 0"
    assert line.endswith(b"\0")
    assert len(line) % 8 == 0
    made = crypt.encode("x", crypt.DM_SECURE_DATA_FLAG, line=line)
    assert struct.unpack_from("=12x3I", made) == (312 + len(line), 312, 1)
    assert made[312:] == line


def test_the_device_of_a_reply():
    reply = crypt.encode("x", 0)
    struct.pack_into("=Q", reply, 40, os.makedev(253, 1000))
    assert crypt.node_of(reply) == (253, 1000)


def decrypt(**changes):
    values = {"name": "x", "cipher": "aes-xts-plain64", "key_size_bits": 256, "read_only": False}
    return Decrypt(**{**values, **changes})


def opened(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    return os.open(tmp_path / "key", os.O_RDONLY)


def test_the_key_is_the_beginning_of_the_file(tmp_path):
    assert crypt._key(opened(tmp_path, KEY + b"more\n"), 256) == KEY


@pytest.mark.parametrize(
    ("content", "message", "bits"),
    [
        (b"", "has 0 bytes; a key of 256 bits takes 32", 256),
        (KEY[:31], "has 31 bytes; a key of 256 bits takes 32", 256),
        (KEY, "no whole number", 255),
        (KEY, "no block device", 256),
    ],
)
def test_a_request_that_cannot_be_met(content, message, bits, tmp_path):
    descriptor = opened(tmp_path, content)
    with pytest.raises(XenvmError) as caught:
        crypt.open_mapping(decrypt(key_size_bits=bits), descriptor, descriptor)
    assert message in caught.value.message
    assert KEY[:8].hex() not in caught.value.message + caught.value.hint


class FakeMapper:
    """Answers the requests of a mapping in order; `fails` maps a request to an error."""

    def __init__(self, fails=None):
        self.fails, self.seen = fails or {}, []

    def __call__(self, _descriptor, request, data):
        self.seen.append((request, bytes(data)))
        if request in self.fails:
            raise OSError(self.fails[request], os.strerror(self.fails[request]))
        struct.pack_into("=Q", data, 40, os.makedev(253, 5))
        return 0


def test_the_steps_of_a_mapping(monkeypatch):
    kernel = FakeMapper()
    monkeypatch.setattr(crypt.fcntl, "ioctl", kernel)
    monkeypatch.setattr(crypt, "_open", lambda path, device, access: (path, device, access))
    made, path = crypt._map(3, decrypt(read_only=True), crypt.table("aes", KEY, (7, 1), 8))
    assert path == "/dev/dm-5"
    assert made == (path, os.makedev(253, 5), os.O_RDONLY)
    steps = [crypt.DM_DEV_CREATE, crypt.DM_TABLE_LOAD, crypt.DM_DEV_SUSPEND, crypt.DM_DEV_REMOVE]
    assert [request for request, _ in kernel.seen] == steps
    flags = [struct.unpack_from("=I", data, 28)[0] for _, data in kernel.seen]
    assert flags == [1, 1 | 1 << 15, 1, 1 << 17]


@pytest.mark.parametrize(
    ("request_", "number", "message"),
    [
        (crypt.DM_TABLE_LOAD, 22, "refuses the cipher aes-xts-plain64 with a key of 256 bits"),
        (crypt.DM_TABLE_LOAD, 16, "is in use: mounted, or part of another device"),
        (crypt.DM_DEV_SUSPEND, 12, "Cannot allocate memory"),
    ],
)
def test_a_mapping_that_fails_is_removed(request_, number, message, monkeypatch):
    kernel = FakeMapper({request_: number})
    monkeypatch.setattr(crypt.fcntl, "ioctl", kernel)
    with pytest.raises(XenvmError) as caught:
        crypt._map(3, decrypt(), crypt.table("aes", KEY, (7, 1), 8))
    assert message in caught.value.message
    assert kernel.seen[-1][0] == crypt.DM_DEV_REMOVE


def test_a_mapping_of_somebody_else_is_left_alone(monkeypatch):
    kernel = FakeMapper({crypt.DM_DEV_CREATE: 16})
    monkeypatch.setattr(crypt.fcntl, "ioctl", kernel)
    with pytest.raises(XenvmError, match="a mapping x exists already"):
        crypt._map(3, decrypt(), crypt.table("aes", KEY, (7, 1), 8))
    assert len(kernel.seen) == 1


def test_what_is_left_is_said(monkeypatch):
    kernel = FakeMapper({crypt.DM_TABLE_LOAD: 22, crypt.DM_DEV_REMOVE: 16})
    monkeypatch.setattr(crypt.fcntl, "ioctl", kernel)
    with pytest.raises(XenvmError) as caught:
        crypt._map(3, decrypt(), crypt.table("aes", KEY, (7, 1), 8))
    assert caught.value.message.endswith("; the mapping x is left (Device or resource busy)")


def test_mappings_that_were_left_are_removed(monkeypatch):
    kernel = FakeMapper()
    monkeypatch.setattr(crypt.fcntl, "ioctl", kernel)
    monkeypatch.setattr(crypt, "CONTROL", "/dev/null")
    crypt.remove_mappings(("a", "b"))
    assert [request for request, _ in kernel.seen] == [crypt.DM_DEV_REMOVE] * 2
    crypt_gone = FakeMapper({crypt.DM_DEV_REMOVE: 6})  # ENXIO: it is gone already
    monkeypatch.setattr(crypt.fcntl, "ioctl", crypt_gone)
    crypt.remove_mappings(("a",))
    monkeypatch.setattr(crypt.fcntl, "ioctl", FakeMapper({crypt.DM_DEV_REMOVE: 1}))
    with pytest.raises(XenvmError, match="the mapping a cannot be removed: Operation not permitted"):
        crypt.remove_mappings(("a",))
