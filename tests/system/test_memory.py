# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a real host, when more of it is wanted than there is."""

import re

import pytest
from conftest import run, until


def free_mib():
    return int(re.search(r"free_memory\s*:\s*(\d+)", run("xl", "info").stdout)[1])


@pytest.mark.parametrize("kind", ["pv", pytest.param("hvm", marks=pytest.mark.long)])
def test_of_two_guests_of_which_one_fits_one_runs(vm, hvm, kind):
    """Nobody looks at what is free before: each claims all of its memory in Xen, and the one that comes late gets none."""
    memory = free_mib() * 6 // 10
    guests = [(hvm if kind == "hvm" else vm)(memory=memory, no_mem_check="true") for _ in range(2)]
    starting = [guest.begin() for guest in guests]
    said = [one.communicate(timeout=300)[0] for one in starting]
    assert sorted(one.returncode for one in starting) == [0, 1], said
    late = next(number for number, one in enumerate(starting) if one.returncode)
    assert f"allocating {memory} MiB of memory: " in said[late]
    assert "another guest was started just now" in said[late]
    until(lambda: guests[late].left() == [], "nothing is left of it", 30)
    assert guests[1 - late].state == "running"
