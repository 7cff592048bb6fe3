# SPDX-License-Identifier: GPL-2.0-or-later
"""The builder's jobs about buttons and sleep of an HVM guest, against a hypervisor and a xenstore of this test."""

import pytest

from xenvm.boundary.machine import Machine
from xenvm.boundary.messages import Domain, DomainState, Grants, Job, Op, Phase
from xenvm.errors import ExitCode, WrongStateError
from xenvm.helpers.builder.jobs import Builder

UUID = "11111111-2222-4333-8444-555555555555"
MACHINE = Machine(
    **dict.fromkeys(("pae", "acpi", "apic", "nx"), True),
    **dict.fromkeys(("hpet", "vpt_align", "timer_mode", "vnc_port"), -1),
    **dict.fromkeys(("timeoffset_s", "videoram_mib", "serial_port"), 0),
    **dict.fromkeys(("nic_models", "platform", "bios_strings", "extra", "oem_types"), ()),
    **dict.fromkeys(("viridian", "smbios", "slic"), False),
    **dict.fromkeys(("vnc_host", "serial_host", "keymap"), ""),
    boot="c",
    serial="pty",
)
PV = Grants(UUID, "web", "", "", "", 64, 64, 1, True, (), (), False, "", (), (), 40)
HVM = PV.but(machine=(MACHINE,))
RUNNING = Domain(7, DomainState.RUNNING, Phase.BUILT, -1, 65536, 1, 5)
REQUEST = "/local/domain/7/control/shutdown"


class Host:
    """Hypervisor and xenstore with one domain, and what was done to it."""

    def __init__(self, state=0, *, drivers=True, domain=RUNNING):
        self.state, self.drivers, self.domain, self.acts, self.nodes = state, drivers, domain, [], {}

    def look(self, _domid, _uuid):
        return self.domain

    def has_drivers(self, _domid):
        return self.drivers

    def sleep_state(self, _domid):
        return self.state

    def set_sleep_state(self, domid, state):
        self.acts.append(("sleep state", domid, state))
        self.state = state

    def press(self, domid, trigger):
        self.acts.append(("press", domid, trigger))

    def write(self, path, value):
        self.nodes[path] = value

    def run(self, op, grants=HVM):
        builder = Builder(self, self, None, lambda *_: None)
        return builder.run(Job(op, UUID, 7, grants), [])


def test_a_guest_with_drivers_is_asked_to_sleep():
    host = Host()
    assert host.run(Op.ASK_SLEEP).domain == RUNNING
    assert (host.nodes, host.acts) == ({REQUEST: "s3"}, [])


@pytest.mark.parametrize(
    ("host", "why", "hint"),
    [
        (Host(drivers=False), "no PV drivers", "trigger sleep"),
        (Host(3), "sleeps already", "s3resume"),
    ],
)
def test_a_guest_that_cannot_hear_is_not_asked(host, why, hint):
    with pytest.raises(WrongStateError, match=why) as caught:
        host.run(Op.ASK_SLEEP)
    assert caught.value.code is ExitCode.WRONG_STATE
    assert hint in caught.value.hint
    assert (host.nodes, host.acts) == ({}, [])  # nor is a button pressed instead


@pytest.mark.parametrize(("op", "before", "after"), [(Op.FALL_ASLEEP, 0, 3), (Op.WAKE, 3, 0)])
def test_a_guest_falls_asleep_and_wakes_and_does_so_once(op, before, after):
    host = Host(before)
    for _ in range(2):
        assert host.run(op).domain == RUNNING
    assert host.acts == [("sleep state", 7, after)]


def test_the_sleep_state_is_told():
    assert [Host(state).run(Op.S_STATE).text for state in (0, 3)] == ["0", "3"]


@pytest.mark.parametrize(("op", "button"), [(Op.PRESS_POWER, "power"), (Op.PRESS_SLEEP, "sleep"), (Op.NMI, "nmi")])
def test_a_button_is_pressed(op, button):
    host = Host()
    host.run(op)
    assert host.acts == [("press", 7, button)]


@pytest.mark.parametrize("op", [Op.ASK_SLEEP, Op.FALL_ASLEEP, Op.WAKE, Op.S_STATE, Op.PRESS_SLEEP])
def test_a_pv_guest_has_none_of_this(op):
    host = Host()
    with pytest.raises(WrongStateError, match="PV guest"):
        host.run(op, PV)
    assert (host.nodes, host.acts) == ({}, [])


@pytest.mark.parametrize("op", [Op.ASK_SLEEP, Op.FALL_ASLEEP, Op.WAKE, Op.S_STATE, Op.PRESS_SLEEP])
def test_nor_has_a_domain_that_is_gone(op):
    host = Host(domain=None)
    with pytest.raises(WrongStateError, match="domain 7 is gone"):
        host.run(op)
    assert (host.nodes, host.acts) == ({}, [])
