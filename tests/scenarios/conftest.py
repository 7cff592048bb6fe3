# SPDX-License-Identifier: GPL-2.0-or-later
"""What the scenarios stand on: a simulated host, or in dom0 with XENVM_TEST_HOST=xen real Xen. The tests are the same."""

import os

import pytest
from vms import *  # noqa: F403
from vms import SimulatedHost, XenHost, folder, nothing_is_left, pytest_runtest_logreport, vm  # noqa: F401


@pytest.fixture(scope="session")
def host():
    made = {"xen": XenHost, "simulator": SimulatedHost}[os.environ.get("XENVM_TEST_HOST", "simulator")]()
    yield made
    made.close()
