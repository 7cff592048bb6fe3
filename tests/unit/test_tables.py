# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest may see of the host's firmware tables, and which tables are refused."""

import os
import struct
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm.errors import XenvmError
from xenvm.helpers.unpacker.tables import acpi_of, pick, smbios_of


def structure(kind, handle=0, formatted=b"\1\2", strings=(b"Vendor", b"Thing")):
    body = struct.pack("<BBH", kind, 4 + len(formatted), handle) + formatted
    return body + (b"".join(text + b"\0" for text in strings) or b"\0") + b"\0"


def counted(*structures):
    return b"".join(struct.pack("<I", len(one)) + one for one in structures)


def licence(name=b"SLIC", body=b"key", length=None, damage=0):
    content = bytearray(name + struct.pack("<I", 36 + len(body) if length is None else length) + bytes(28) + body)
    content[9] = (-sum(content) + damage) % 256
    return bytes(content)


END = structure(127, strings=())


def test_the_first_of_each_type_that_a_guest_may_see():
    system, board, memory = structure(1, 1), structure(2, 2), structure(17, 3)
    second = structure(1, 4, strings=(b"another",))
    bare = structure(3, 5, strings=())
    assert smbios_of(system + memory + second + board + bare + END, ()) == counted(system, board, bare)


def test_the_vendors_own_types_are_all_seen_or_those_that_are_named():
    first, again, other = structure(130, 1), structure(130, 2), structure(200, 3)
    assert smbios_of(first + again + other + END, ()) == counted(first, again, other)
    assert smbios_of(first + again + other + END, (130,)) == counted(first, again)


def test_what_follows_the_end_is_not_looked_at():
    assert smbios_of(structure(1) + END + b"\xff" * 9, ()) == counted(structure(1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "nothing that a guest could see"),
        (structure(17) + END, "nothing that a guest could see"),
        (structure(1)[:-1], "no sense at byte 0"),
        (structure(1) + b"\1\3\0\0\0\0", "no sense at byte 20"),
    ],
)
def test_smbios_tables_that_are_none(content, words):
    with pytest.raises(XenvmError, match=words):
        smbios_of(content, ())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_tables_or_refused_in_words(content):
    try:
        picked = smbios_of(content, ())
    except XenvmError as error:
        assert error.message.isprintable()
        return
    at = 0
    while at < len(picked):
        (length,) = struct.unpack_from("<I", picked, at)
        assert picked[at + 4 : at + 4 + length] in content
        at += 4 + length
    assert at == len(picked)


def test_licences_follow_each_other():
    tables = [licence(), licence(b"MSDM", b"another")]
    assert acpi_of(tables) == b"".join(tables)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"SLIC", "4 bytes only"),
        (licence(b"DSDT"), "is no licence"),
        (licence(b"\x1b[1m"), "is no licence"),
        (licence(length=35), "damaged"),
        (licence(damage=1), "damaged"),
    ],
)
def test_tables_that_are_no_licences(table, words):
    with pytest.raises(XenvmError, match=words) as caught:
        acpi_of([licence(), table])
    assert caught.value.message.isprintable()


def test_files_are_read_and_written_whole():
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(structure(1) + END)
        source.seek(0)
        size = pick(target.fileno(), [source.fileno()], smbios=True, oem_types=())
        assert os.pread(target.fileno(), 1000, 0) == counted(structure(1))
        assert size == len(counted(structure(1)))


def test_a_table_without_end_is_refused():
    with open("/dev/zero", "rb") as source, tempfile.TemporaryFile() as target:
        with pytest.raises(XenvmError, match="more than 1048576 bytes"):
            pick(target.fileno(), [source.fileno()], smbios=True, oem_types=())
        assert os.fstat(target.fileno()).st_size == 0
