# SPDX-License-Identifier: GPL-2.0-or-later
"""Image servers known by number and start time: real processes of the user they have. Needs root."""

import os
import signal
import subprocess
import sys
import time

import pytest

from xenvm.broker import servers
from xenvm.broker.servers import end_server, server_text

WAIT_S = 30
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
HONEST = "import time; print(1, flush=True); time.sleep(60)"


@pytest.fixture
def process(users):
    made = []

    def make(code=HONEST, user="xenvm-image"):
        child = subprocess.Popen([sys.executable, "-I", "-c", code], user=user, stdout=subprocess.PIPE)
        made.append(child)
        assert child.stdout.read(1) == b"1"
        return child

    before = len(os.listdir("/proc/self/fd"))
    yield make
    for child in made:
        child.kill()
        child.wait(WAIT_S)
        child.stdout.close()
    assert len(os.listdir("/proc/self/fd")) == before


def start_time(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[19]


def test_a_server_is_its_number_and_its_start(process):
    child = process()
    assert server_text(child.pid) == f"{child.pid} {start_time(child.pid)}"


def test_a_process_of_another_user_is_none_of_ours(process):
    for user in ("root", "xenvm"):
        assert server_text(process(user=user).pid) == ""
    assert server_text(1) == ""
    assert server_text(2**22 + 1) == ""


def test_it_is_asked_to_end_and_can_flush(process):
    child = process()
    text = server_text(child.pid)
    end_server(text)
    assert child.wait(WAIT_S) == -signal.SIGTERM
    end_server(text)


def test_one_that_does_not_end_is_killed(process, monkeypatch):
    monkeypatch.setattr(servers, "END_WAIT_MS", 200)
    child = process(STUBBORN)
    before = time.monotonic()
    end_server(server_text(child.pid))
    assert child.wait(WAIT_S) == -signal.SIGKILL
    assert 0.2 <= time.monotonic() - before < 10


@pytest.mark.parametrize("user", ["xenvm-image", "root"])
def test_another_process_that_got_the_number_lives_on(process, user):
    """The start time is another, or the user is."""
    child = process(user=user)
    end_server(f"{child.pid} {int(start_time(child.pid)) - (user == 'xenvm-image')}")
    end_server(f"{child.pid} 1")
    assert child.poll() is None


@pytest.mark.parametrize("text", ["", "1 1", f"{2**22 + 1} 5", f"{2**31 - 1} 5"])
def test_texts_of_no_process(text):
    end_server(text)
