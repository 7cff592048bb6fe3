# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a simulated guest: what is written is what the checks of every image accept, and what comes back."""

import contextlib
import os
import threading

import pytest

from xenvm.errors import XenvmError
from xenvm.helpers import saved
from xenvm.helpers.builder import pages
from xenvm.helpers.stream import records

STATE = {"cmdline": "xenvm.tick_ms=5 " + "x" * 6000, "ticks": 77, "memory_kib": 65536}


def through_a_pipe(content):
    out, entrance = os.pipe()

    def feed():
        with contextlib.suppress(BrokenPipeError), open(entrance, "wb") as file:
            file.write(content)

    writer = threading.Thread(target=feed)
    writer.start()
    try:
        return pages.state_in(out)
    finally:
        os.close(out)
        writer.join()


def test_what_is_written_passes_the_checks_and_comes_back():
    content = b"".join(pages.stream(STATE, 65536)) + saved.TAIL
    guest = records.Guest(65536, 1)
    for _ in records.pieces(lambda length, at: content[at : at + length], 0, guest):
        pass
    assert (guest.xen_major, guest.xen_minor) == pages.RELEASE
    assert len(content) > 65536 * 1024 // pages.TOUCHED
    assert through_a_pipe(content) == STATE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-9], "cut off"),
        (lambda content: content[:500000] + b"\xff" + content[500001:], "not that of the guest"),
        (lambda content: content.replace(b'"ticks":77', b'"ticks":78'), ""),  # another guest, and as good as this one
        (lambda content: content.replace(b'{"cmdline"', b'["cmdline"'), "no state"),
        (lambda content: content.replace(b"\xff\xff\0\0\0\0\0\0", b"\4\0\0\0\x11\0\0\0", 1), "of a real guest"),
    ],
)
def test_what_is_not_as_written_is_refused(change, words):
    content = b"".join(pages.stream(STATE, 65536)) + saved.TAIL
    changed = change(content)
    assert changed != content
    if words:
        with pytest.raises(XenvmError, match=words):
            through_a_pipe(changed)
    else:
        assert through_a_pipe(changed)["ticks"] == 78
