# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of privileged acts: every change of a valid log but a cut at its end is found; power losses are survived."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm.broker import actlog
from xenvm.broker.actlog import GENESIS, ActLog, read
from xenvm.errors import XenvmError

ACTS = ("job", "result", "confined", "refused")


def make(path, acts=6, **details):
    log = ActLog(str(path))
    for number in range(acts):
        log.append(ACTS[number % len(ACTS)], op="find", why='caf\u00e9 "quoted"', ok=True, share=0.5, **details)
    return log


def _valid():
    """A log of two runs, with the remains of a power loss between them."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a.acts")
        make(path)
        with path.open("ab") as log:
            log.write(b'{"n":8,"time":17')
        make(path, 3)
        return path.read_bytes()


VALID = _valid()
LINES = VALID.splitlines(keepends=True)
TORN = 7  # the place of the remains


def found(data, name="b.acts"):
    """Tell whether reading `data` ends in an error."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        path.write_bytes(data)
        try:
            list(read(str(path)))
        except XenvmError:
            return True
        return False


def test_a_valid_log_reads_back(tmp_path):
    path = tmp_path / "a.acts"
    path.write_bytes(VALID)
    records = list(read(str(path)))
    assert [record["n"] for record in records] == list(range(1, 12))
    assert records[0]["previous"] == GENESIS
    assert [later["previous"] for later in records[1:]] == [earlier["hash"] for earlier in records[:-1]]
    assert [record["torn"] for record in records if record["act"] == "opened"] == [0, 16]
    assert os.stat(make(path)._descriptor).st_mode & 0o777 == 0o644  # an existing file keeps its mode
    make(tmp_path / "new.acts")
    assert (tmp_path / "new.acts").stat().st_mode & 0o777 == 0o600


def test_an_empty_log_is_valid(tmp_path):
    (tmp_path / "a.acts").touch()
    assert list(read(str(tmp_path / "a.acts"))) == []
    assert list(read()) == []


# -- changes --------------------------------------------------------------------------------------------------------


def test_every_single_byte_is_covered():
    for place in range(len(VALID)):
        for mask in (0x01, 0x20, 0x80):
            changed = bytearray(VALID)
            changed[place] ^= mask
            assert found(bytes(changed)), (place, mask)


@settings(deadline=None)  # the disk may be slow
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
def test_any_other_byte_is_found(place, value):
    if value != VALID[place]:
        assert found(VALID[:place] + bytes([value]) + VALID[place + 1 :])


@settings(deadline=None)  # the disk may be slow
@given(st.integers(0, len(VALID)), st.binary(min_size=1, max_size=4))
def test_inserted_bytes_are_found(place, added):
    assert found(VALID[:place] + added + VALID[place:])


@settings(deadline=None)  # the disk may be slow
@given(st.integers(0, len(VALID) - 1), st.integers(1, 200))
def test_removed_bytes_are_found_unless_whole_records_go_from_the_end(place, count):
    rest = VALID[:place] + VALID[place + count :]
    lines_left = [b"".join(LINES[:number]) for number in range(len(LINES)) if number != TORN + 1]
    assert found(rest) is (rest not in lines_left)


@pytest.mark.parametrize("place", range(len(LINES) - 1))
def test_a_removed_line_is_found(place):
    assert found(b"".join(LINES[:place] + LINES[place + 1 :]))


@settings(deadline=None)  # the disk may be slow
@given(st.integers(0, len(LINES) - 1), st.integers(0, len(LINES) - 1))
def test_swapped_lines_are_found(one, other):
    lines = LINES.copy()
    lines[one], lines[other] = lines[other], lines[one]
    assert found(b"".join(lines)) is (one != other)


@settings(deadline=None)  # the disk may be slow
@given(st.integers(0, len(LINES) - 1), st.integers(0, len(LINES)))
def test_a_duplicated_line_is_found(which, place):
    assert found(b"".join([*LINES[:place], LINES[which], *LINES[place:]]))


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[]\n", b"null\n", b"[" * 100000 + b"\n", b"\xff\x00\n", b'"x"\r'])
@pytest.mark.parametrize("place", range(len(LINES) + 1))
def test_an_inserted_line_is_found(line, place):
    assert found(b"".join([*LINES[:place], line, *LINES[place:]]))


def test_a_record_forged_with_a_true_hash_is_found(tmp_path):
    forged = {"n": 3, "time": 1.0, "act": "job", "previous": GENESIS}
    forged["hash"] = actlog.hexdigest(actlog._bytes(forged))
    line = actlog._bytes(forged) + b"\n"
    assert all(found(b"".join([*LINES[:place], line, *LINES[place:]])) for place in range(len(LINES) + 1))
    assert all(found(b"".join([*LINES[:place], line, *LINES[place + 1 :]])) for place in range(len(LINES)))


@pytest.mark.parametrize("missing", ["n", "previous"])
def test_a_record_without_its_links_is_none(missing):
    forged = {"n": 1, "act": "job", "previous": GENESIS}
    del forged[missing]
    forged["hash"] = actlog.hexdigest(actlog._bytes(forged))
    assert found(actlog._bytes(forged) + b"\n")


def test_records_missing_at_the_end_cannot_be_found():
    for number in range(len(LINES)):
        assert found(b"".join(LINES[:number])) is (number == TORN + 1)


def test_the_error_names_the_line(tmp_path):
    path = tmp_path / "a.acts"
    for change, message in (
        (LINES[:3] + LINES[4:], f"{path}:4: the chain is broken before this record"),
        ([*LINES[:3], b"x\n", *LINES[4:]], f"{path}:4: no true record, and no monitor reported that"),
        (LINES[1:], f"{path}:1: the chain is broken before this record"),
        ([*LINES, b"x"], f"{path}:{len(LINES) + 1}: no true record at the end"),
        (
            LINES[:TORN] + LINES[TORN + 1 :],
            f"{path}:{TORN + 1}: not what the monitor found here when it started",
        ),
    ):
        path.write_bytes(b"".join(change))
        with pytest.raises(XenvmError) as caught:
            list(read(str(path)))
        assert caught.value.message == message


# -- power losses ---------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the disk may be slow
@given(st.integers(1, len(VALID)), st.integers(0, len(VALID)))
def test_a_log_cut_anywhere_goes_on(first, second):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a.acts")
        path.write_bytes(VALID[:first])
        make(path, 2)
        path.write_bytes(path.read_bytes()[: len(VALID[:first]) + second])  # and once more
        make(path, 2)
        records = list(read(str(path)))
    assert [record["n"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["act"] == "result"


@settings(deadline=None)  # the disk may be slow
@given(st.binary(min_size=1, max_size=300))
def test_blocks_of_junk_at_the_end_are_reported(junk):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a.acts")
        path.write_bytes(VALID + junk)
        make(path, 1)
        records = list(read(str(path)))
    opened = records[-2]
    assert (opened["act"], opened["torn"]) == ("opened", len(junk.removesuffix(b"\n")))


def test_a_whole_record_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "a.acts"
    path.write_bytes(VALID[:-1])
    assert found(VALID[:-1])
    make(path, 1)
    records = list(read(str(path)))
    assert [record["n"] for record in records] == list(range(1, 14))
    assert records[-2]["torn"] == 0


@pytest.mark.parametrize("size", [100, actlog.TAIL_BYTES, 5 * actlog.TAIL_BYTES])
@pytest.mark.parametrize("remains", [0, 50, 3 * actlog.TAIL_BYTES])
def test_the_end_is_found_behind_long_records(tmp_path, size, remains):
    path = tmp_path / "a.acts"
    make(path, 2, long="x" * size)
    with path.open("ab") as log:
        log.write(b"y" * remains)
    make(path, 1)
    records = list(read(str(path)))
    assert [record["n"] for record in records] == [1, 2, 3, 4, 5]
    assert records[3]["torn"] == remains


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    path = tmp_path / "a.acts"
    log = make(path, 2)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(actlog.os, "write", lambda descriptor, data: write(descriptor, data[:20]))
        with pytest.raises(XenvmError, match="No space left"):
            log.append("job")
    assert path.read_bytes() == before
    log.append("job")
    assert [record["n"] for record in read(str(path))] == [1, 2, 3, 4]


# -- rotation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rotated(tmp_path, monkeypatch):
    """Two files of one chain, remains of a power loss at the end of the first."""
    path = tmp_path / "a.acts"
    make(path, 4)
    with path.open("ab") as log:
        log.write(b'{"n":6')
    monkeypatch.setattr(actlog, "SIZE_LIMIT_BYTES", 500)
    make(path, 3)
    return path


def test_the_chain_goes_on_in_the_next_file(rotated):
    older = f"{rotated}.1"
    records = list(read(older, str(rotated)))
    assert [record["n"] for record in records] == list(range(1, 10))
    assert records[5]["torn"] == 6
    with pytest.raises(XenvmError, match=r"a.acts:1: "):
        list(read(str(rotated)))
    with pytest.raises(XenvmError, match=r"a.acts.1:6: no true record at the end"):
        list(read(older))


def test_a_rotated_file_may_start_in_the_middle(rotated):
    make(rotated, 2)  # rotates again: the first records are gone
    records = list(read(f"{rotated}.1", str(rotated)))
    assert [record["n"] for record in records] == list(range(6, 13))


@pytest.mark.parametrize("n", [1, 2])
def test_the_first_record_fits_its_number(n):
    record = {"n": n, "act": "job", "previous": GENESIS if n == 2 else "1" * 64}
    record["hash"] = actlog.hexdigest(actlog._bytes(record))
    assert found(actlog._bytes(record) + b"\n", "a.acts.1")


def test_a_line_lost_between_the_files_is_found(rotated):
    older = Path(f"{rotated}.1")
    lines = older.read_bytes().splitlines(keepends=True)
    older.write_bytes(b"".join(lines[:-2] + lines[-1:]))
    with pytest.raises(XenvmError, match=r"a.acts:1: the chain is broken"):
        list(read(str(older), str(rotated)))


@pytest.mark.parametrize("left", [b"", b"half a record"])
def test_a_power_loss_between_the_files_is_survived(rotated, left):
    rotated.write_bytes(left)
    make(rotated, 1)
    records = list(read(f"{rotated}.1", str(rotated)))
    assert [record["n"] for record in records] == list(range(1, 8))
    assert records[5]["torn"] > 0
