# SPDX-License-Identifier: GPL-2.0-or-later
"""The form of save images, byte by byte: what is written before the stream, and what is read and refused."""

import json
import os
import struct
import tempfile
import zlib

import pytest
import saveimages
from saveimages import PAGE, image, libxc, pages, parts, record, vcpu

from xenvm.boundary.devices import DiskGrant, NicGrant
from xenvm.boundary.images import Image
from xenvm.boundary.messages import Grants
from xenvm.helpers import saved
from xenvm.helpers.stream import main as stream
from xenvm.helpers.stream import records
from xenvm.helpers.stream.records import ImageError

UUID = "11111111-2222-4333-8444-555555555555"
DISKS = (
    DiskGrant(51712, "xvda", "phy", "/dev/vg/web", False, False, False, "", 0, ""),
    DiskGrant(51728, "xvdb", "qcow", "/var/b.qcow2", True, False, False, "", 0, ""),
    DiskGrant(51744, "xvdc", "file", "/var/secret", False, False, False, "aes-xts-plain64", 256, "/key"),
    DiskGrant(51760, "xvdd", "file", "/var/disc.iso", True, True, False, "", 0, ""),
    DiskGrant(51776, "xvde", "file", "", True, True, False, "", 0, ""),
)
NICS = (NicGrant(0, "br0", "00:16:3e:00:00:01"), NicGrant(1, "", "00:16:3e:00:00:02"))
GRANTS = Grants(UUID, "web", "/k", "", "", 128, 256, 2, True, (), (), False, "", DISKS, NICS, 40)


def inspect(content):
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return stream.inspect(file.fileno(), 131072)


def refusal(content):
    with pytest.raises(ImageError) as caught:
        inspect(content)
    assert caught.value.message.isprintable()
    return caught.value.message


# What is written


def test_the_head_is_laid_out_as_xl_does():
    content = saved.head(GRANTS)
    assert content[:32] == b"Xen saved domain, xl format\n \x00 \r"
    order, mandatory, optional, length = struct.unpack_from("<IIII", content, 32)
    assert (order, mandatory, optional) == (0x01020304, 3, 0)
    (inner,) = struct.unpack_from("<I", content, 48)
    assert length == inner + 4
    text = content[52 : 52 + inner]
    assert text[-1:] == b"\0"
    assert text.count(b"\0") == 1
    at = 52 + inner
    assert struct.unpack_from(">QII", content, at) == (0x4C6962786C466D74, 2, 0)
    assert struct.unpack_from("<II", content, at + 16) == (1, 0)
    assert len(content) == at + 24
    assert bytes(8) == saved.TAIL


def test_the_config_is_what_xl_needs():
    told = json.loads(saved.config(GRANTS))
    assert told["c_info"] == {"type": "pv", "name": "web", "uuid": UUID}
    assert told["b_info"] == {
        "max_vcpus": 2,
        "avail_vcpus": [0, 1],
        "max_memkb": 262144,
        "target_memkb": 131072,
        "type.pv": {},
    }
    assert told["disks"] == [
        {"pdev_path": "/dev/vg/web", "vdev": "xvda", "format": "raw", "readwrite": 1},
        {"pdev_path": "/var/b.qcow2", "vdev": "xvdb", "format": "qcow2"},
        {"pdev_path": "/var/disc.iso", "vdev": "xvdd", "format": "raw", "removable": 1, "is_cdrom": 1},
    ]
    assert told["nics"] == [
        {"devid": 0, "mac": "00:16:3e:00:00:01", "bridge": "br0"},
        {"devid": 1, "mac": "00:16:3e:00:00:02"},
    ]
    assert list(told)[-1] == "xenvm"


# What is read


def of(vcpus):
    return saveimages.config(b_info={"max_memkb": 131072, "max_vcpus": vcpus})


def wide(last):
    """A map of so many frames."""
    return record(3, struct.pack("<II", 0, last) + bytes(8 * (last // 512 + 1)))


def test_vcpus_that_were_offline_have_no_state():
    """libxenguest writes those that are online: the second of three is not."""
    stream = libxc(parts(vcpu=vcpu(4) + vcpu(4, 2), extended=vcpu(5) + vcpu(5, 2)))
    assert inspect(image(stream, told=of(3)))[0].vcpus == 3


def test_a_map_may_reach_somewhat_beyond_the_memory():
    assert inspect(image(libxc(parts(map=wide(32767 + (1 << 23))))))[0].memory_max_kib == 131072


def test_the_uuid_of_the_guest_is_told():
    for written in (UUID, UUID.upper()):
        told = saveimages.config(c_info={"type": "pv", "uuid": written})
        assert inspect(image(told=told))[0].uuid == UUID


@pytest.mark.parametrize("sealed", [False, True])
def test_a_good_image(sealed):
    whole = image(sealed=sealed)
    told, at = inspect(whole)
    assert told == Image(131072, 1, 4, 17, "")
    assert whole[at:].startswith(libxc())


def test_what_is_fed_is_the_stream_and_nothing_else():
    whole = image(libxc(parts(more=pages(list(range(1, 65)), [PAGE] * 64))))
    with tempfile.TemporaryFile() as file:
        file.write(whole)
        file.flush()
        readable, writable = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(readable)
            stream.feed(file.fileno(), writable, whole.index(b"\xff" * 8), Image(131072, 1, 4, 17, ""))
            os._exit(0)
        os.close(writable)
        got = b""
        while more := os.read(readable, 1 << 16):
            got += more
        os.close(readable)
        assert os.waitpid(pid, 0)[1] == 0
    assert got == whole[whole.index(b"\xff" * 8) : -8]


def test_a_file_that_changes_after_it_was_checked_ends_the_pipe():
    whole = bytearray(image())
    at = whole.index(b"\xff" * 8)
    whole[whole.index(record(8, bytes(24)), at)] = 0x55
    with tempfile.TemporaryFile() as file:
        file.write(whole)
        file.flush()
        readable, writable = os.pipe()
        with pytest.raises(ImageError, match="unknown type 0x55"):
            stream.feed(file.fileno(), writable, at, Image(131072, 1, 4, 17, ""))
        os.close(writable)
        os.close(readable)


def test_an_optional_record_that_nobody_knows_is_passed_on():
    assert inspect(image(libxc(parts(more=record(0x80000055, b"whatever")))))[0].vcpus == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends after 0 bytes: it is cut off"),
        (image()[:20], "ends after 20 bytes: it is cut off"),
        (image()[:60], "is cut off"),
        (b"\x7fELF" + bytes(100), "no save image"),
        (b"XenSavedDomain\n" + bytes(100), "old xenvm"),
        (b"XenSavedDomv2-\n" + bytes(100), "XenServer"),
        (image(order=0x04030201), "byte order"),
        (image(flags=1), "mandatory flags 0x1"),
        (image(flags=7), "mandatory flags 0x7"),
        (image(libxl_version=3), "libxl has version 3"),
        (image(text=b"{"), "not JSON"),
        (image(text=b"[" * 100000), "not JSON"),
        (image(text=b"[]"), "says nothing of a guest"),
        (image(told=saveimages.config(c_info={"type": "hvm"})), "type hvm"),
        (image(told=saveimages.config(c_info={"type": "\x1b[2J"})), "type unknown"),
        (image(told=saveimages.config(b_info={})), "how much memory"),
        (image(told=saveimages.config(b_info={"max_memkb": True})), "how much memory"),
        (image(told=saveimages.config(b_info={"max_memkb": 4096, "max_vcpus": "2"})), "how many vcpus"),
        (image(text=b" " * (1 << 20)), "at most 1048576"),
        (image(libxc(ident=1)), "no beginning"),
        (image(libxc(version=4)), "version 4"),
        (image(libxc(version=2)), "version 2"),
        (image(libxc(options=1)), "options 0x1"),
        (image(libxc(kind=2)), "of a guest of the type hvm"),
        (image(libxc(kind=9)), "of a guest of the type unknown"),
        (image(libxc(parts(info=record(2, bytes([4, 3, 0, 0, 0, 0, 0, 0]))))), "not a 64-bit one"),
        (image(libxc(parts(cpuid=b""))), "processor's features"),
        (image(libxc(parts(static=b""))), "comes too early"),
        (image(libxc(parts(map=b""))), "before its map"),
        (image(libxc(parts(shared=b""))), "lacks the shared info page"),
        (image(libxc(parts(vcpu=b""))), "lacks the state of a vcpu"),
        (image(libxc(parts(pages=b"", more=b""))), "lacks memory"),
        (image(libxc(parts(more=record(0x55)))), "unknown type 0x55"),
        (image(libxc(parts(more=record(9, bytes(64))))), "0x9 is not of this type of guest"),
        (image(libxc(parts(more=record(0xB, bytes(64))))), "unknown type 0xb"),
        (image(libxc(parts(more=record(0x80000055, b"", 1 << 30)))), "has 1073741824 bytes"),
        (image(libxc(parts(tsc=record(8, bytes(32))))), "0x8 has 32 bytes"),
        (image(libxc(parts(tsc=record(8, bytes(24), 20)))), "0x8 has 20 bytes"),
        (image(libxc(parts(map=record(3, struct.pack("<IIQ", 0, 1023, 5))))), "another length than it says"),
        (image(libxc(parts(map=record(3, struct.pack("<IIQ", 9, 1, 5))))), "another length than it says"),
        (image(libxc(parts(more=pages([], [])))), "says that it has 0"),
        (image(libxc(parts(more=pages(list(range(1025)), [])))), "says that it has 1025"),
        (image(libxc(parts(more=pages([1024], [PAGE])))), "number 1024, the last one is 1023"),
        (image(libxc(parts(more=pages([1 | 5 << 60], [PAGE])))), "impossible type 5"),
        (image(libxc(parts(more=pages([1 | 1 << 53], [PAGE])))), "a page has the number"),
        (image(libxc(parts(more=pages([1, 2], [PAGE])))), "a record of 2 pages has"),
        (image(libxc(parts(vcpu=vcpu(4, 1)))), "state of other vcpus"),
        (image(libxc(parts(vcpu=vcpu(4, 8192)))), "state of other vcpus"),
        (image(libxc(parts(extended=vcpu(4, 1)))), "state of other vcpus"),
        (image(libxc(parts(extended=vcpu(5, 1)))), "state of other vcpus"),
        (image(libxc(parts(extended=vcpu(6, 7)))), "state of other vcpus"),
        (image(libxc(parts(extended=vcpu(0xC, 1)))), "state of other vcpus"),
        (image(libxc(parts(vcpu=vcpu(4, 1))), told=of(3)), "lacks the state of vcpu 0"),
        (image(libxc(parts(map=wide(32768 + (1 << 23))))), "map of the memory has 8421377 frames"),
        (image(told=saveimages.config(c_info={"type": "pv", "uuid": 5})), "by no uuid"),
        (image(told=saveimages.config(c_info={"type": "pv", "uuid": "../x"})), "by no uuid"),
        (image(libxc(parts(more=parts()["info"]))), "comes at the wrong place"),
        (image(libxc(parts(tsc=record(8, bytes(24))[:-24] + bytes(24)))[:-40]), "cut off"),
        (image(tail=b""), "is cut off"),
        (image(tail=record(3, bytes(8))), "something else follows"),
        (image() + b"x", "follows the end"),
        (image(sealed=True)[:-1], "of"),
        (image(sealed=True) + b"\0", "it is cut off or damaged"),
    ],
)
def test_what_is_refused_and_in_which_words(content, words):
    assert words in refusal(content)


def test_an_image_that_was_never_finished():
    text = json.dumps(saveimages.config()).encode()[:-1] + b',"xenvm":{"bytes":"0000000000000000","crc32":"00000000"}}'
    assert "never finished" in refusal(image(text=text))


def test_one_bit_of_memory_is_found_by_the_checksum():
    whole = bytearray(image(sealed=True))
    whole[whole.index(PAGE) + 77] ^= 1
    assert "checksum" in refusal(bytes(whole))


def test_the_checksum_is_that_of_the_streams():
    whole = image(sealed=True)
    at = whole.index(b"LibxlFmt")
    assert b'"crc32":"%08x"' % zlib.crc32(whole[at:]) in whole
    facts = records.facts(lambda length, offset: whole[offset : offset + length], len(whole))
    assert (facts.sealed_bytes, facts.streams_at) == (len(whole), at)
