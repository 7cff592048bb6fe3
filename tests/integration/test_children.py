# SPDX-License-Identifier: GPL-2.0-or-later
"""Children of the broker as real processes: how their ends, and standing still, are noticed."""

import os
import resource
import signal

import pytest
from vms import until

from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.errors import XenvmError


@pytest.fixture
def child():
    log = os.open("/dev/null", os.O_WRONLY)
    made = Child(Role.STREAM, log, {}, "-")
    os.close(log)
    yield made
    made.end()


def test_one_that_stands_still_is_lost_and_one_that_runs_is_not(child):
    assert not child.lost()
    os.kill(child.pid, signal.SIGSTOP)
    until(child.lost, "it is seen to stand still", 10)
    assert child.how() == "died of SIGKILL"
    assert child.lost()


def test_one_that_has_ended_is_not_lost_before_it_is_reaped(child):
    """Its end is told by its pidfd; a look in between is no error."""
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not child.lost()
    assert child.ended()


def test_one_that_cannot_be_started_is_an_error_in_words_and_leaves_nothing():
    before = sorted(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for more in range(8):  # each step of it
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) - 1 + more, limits[1]))
        try:
            with pytest.raises(XenvmError, match="cannot start the stream: "):
                Child(Role.STREAM, 2, {}, "-")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert sorted(os.listdir("/proc/self/fd")) == before
