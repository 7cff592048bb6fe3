# SPDX-License-Identifier: GPL-2.0-or-later
"""Compressed save images that were damaged anyhow: refused in words, or what they were; never a crash, never more memory."""

import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saveimages import image

from xenvm.errors import XenvmError
from xenvm.helpers.stream import main as stream
from xenvm.helpers.stream import zstd

WHOLE = image(sealed=True)


@pytest.fixture(scope="module", autouse=True)
def _library():
    zstd.load()


def compressed(content, *options):
    words = ["zstd", "-q", *options]
    return subprocess.run(words, input=content, capture_output=True, check=True, timeout=60).stdout


GOOD = (compressed(WHOLE), compressed(WHOLE, "--no-check"), compressed(WHOLE[:600]) + compressed(WHOLE[600:]))


def refused_or_whole(content):
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            told, _ = stream.inspect(file.fileno(), 131072)
        except XenvmError as error:
            assert error.message.isprintable()
            return False
    assert (told.memory_max_kib, told.vcpus) == (131072, 1)
    return True


def test_those_that_are_varied_are_good():
    assert all(refused_or_whole(content) for content in GOOD)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(GOOD), st.data())
def test_bytes_changed(content, data):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    refused_or_whole(bytes(changed))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(GOOD), st.data())
def test_cut_off_is_always_refused(content, data):
    assert not refused_or_whole(content[: data.draw(st.integers(0, len(content) - 1))])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(GOOD), st.binary(min_size=1, max_size=64), st.integers(0, 2000))
def test_something_put_in_between(content, garbage, at):
    refused_or_whole(content[:at] + garbage + content[at:])
    refused_or_whole(content[:at] + garbage + content[at + len(garbage) :])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_in_a_frame(content):
    assert not refused_or_whole(zstd.raw_frame(content or b"x", 0, 1)[0])
    assert not refused_or_whole(zstd.MAGIC + content)
