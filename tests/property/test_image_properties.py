# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images that were damaged anyhow: refused in words or still an image, never a crash, never more than was read."""

from hypothesis import given, settings
from hypothesis import strategies as st
from saveimages import emulator, hvm_image, image

from xenvm.helpers.stream import records
from xenvm.helpers.stream.records import ImageError

PLAIN, SEALED, HVM = image(), image(sealed=True), hvm_image(sealed=True)
HEAD = PLAIN.index(b"LibxlFmt")


def reader(content):
    return lambda length, at: content[at : at + length]


def walk(content):
    """Return what an image is said to be and the pieces of its stream; ImageError for what is refused."""
    read = reader(content)
    hvm = b'"type": "hvm"' in content[:200]
    facts = records.facts(read, len(content), hvm=hvm)
    guest = records.Guest(facts.memory_max_kib, facts.vcpus, hvm=hvm)
    fed, state = b"", bytearray()
    for piece in records.pieces(read, facts.stream_at, guest):
        fed += piece if isinstance(piece, bytes) else content[piece[0] : piece[0] + piece[1]]
    records.rest(read, guest, state.extend)
    return facts, guest, fed + (emulator(bytes(state)) if hvm else b"")


def refused_or_whole(content):
    try:
        facts, _, fed = walk(content)
    except ImageError as error:
        assert error.message
        assert error.message.isprintable()
        assert "\n" not in error.message
        return False
    assert fed == content[facts.stream_at : -8]
    return True


def test_the_images_that_are_varied_are_good():
    assert refused_or_whole(PLAIN)
    assert refused_or_whole(SEALED)
    assert refused_or_whole(HVM)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([PLAIN, SEALED, HVM]), st.data())
def test_bytes_changed(content, data):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    refused_or_whole(bytes(changed))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([PLAIN, SEALED, HVM]), st.integers(0, 600), st.binary(min_size=1, max_size=16))
def test_headers_overwritten(content, at, garbage):
    refused_or_whole(content[: HEAD + at] + garbage + content[HEAD + at + len(garbage) :])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([PLAIN, SEALED, HVM]), st.data())
def test_cut_off_is_always_refused(content, data):
    assert not refused_or_whole(content[: data.draw(st.integers(0, len(content) - 1))])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([PLAIN, SEALED, HVM]), st.data())
def test_a_piece_taken_out_or_doubled(content, data):
    begin = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(begin + 1, min(len(content), begin + 5000)))
    refused_or_whole(content[:begin] + content[end:])
    refused_or_whole(content[:end] + content[begin:end] + content[end:])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes(content):
    assert not refused_or_whole(content)
