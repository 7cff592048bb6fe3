# SPDX-License-Identifier: GPL-2.0-or-later
"""What the system tests stand on: they run in dom0 of a real Xen host, as root, with the project installed."""

import pytest
from vms import *  # noqa: F403
from vms import XenHost, nothing_is_left, pytest_runtest_logreport, vm  # noqa: F401


@pytest.fixture(scope="session")
def host():
    made = XenHost()
    yield made
    made.close()
