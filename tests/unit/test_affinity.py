# SPDX-License-Identifier: GPL-2.0-or-later
"""Maps of processors, and what is said of those that Xen has not."""

import pytest

from xenvm.helpers.builder.hypervisor import HypervisorError, cpu_map, refuse_absent


def test_a_map_has_a_bit_for_each_processor():
    assert cpu_map((0, 1, 9), 2) == bytes((0b11, 0b10))
    assert cpu_map((15, 16, 4095), 2) == bytes((0, 0x80))
    assert cpu_map((), 1) == bytes(1)


@pytest.mark.parametrize(
    ("asked", "there", "absent"),
    [
        ((0,), b"\x01", ""),
        ((0, 3, 8), b"\x0f\x01", ""),
        ((5, 0), b"\x01", "5"),
        ((4, 5, 0), b"\x0f", "4, 5"),
        ((0, 4095), b"\xff", "4095"),
        ((0, 1), b"", "0, 1"),
        (tuple(range(8, 40)), b"\xff", ", ".join(map(str, range(8, 24))) + ", ..."),
    ],
)
def test_what_is_not_there_is_named(asked, there, absent):
    if not absent:
        refuse_absent(2, asked, there)
        return
    with pytest.raises(HypervisorError, match=rf"virtual CPU 2: this host has no CPU {absent} online$") as caught:
        refuse_absent(2, asked, there)
    assert "xl info" in caught.value.hint
