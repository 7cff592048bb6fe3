# SPDX-License-Identifier: GPL-2.0-or-later
"""The program `xenvm` and what it says of a start that takes long, is interrupted, or ends without a guest."""

import itertools
import os
import signal
import sys
import threading
import time

import pytest

from xenvm.boundary import frames
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Outcome
from xenvm.cli import xenvm
from xenvm.errors import ExitCode

UUID = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the program as root would, on a config file, with what is done in place of starting a process."""
    config = tmp_path / "a.cfg"
    config.write_text("memory = 64\n")

    def run_it(spawn, *options):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(xenvm, "spawn", spawn)
        monkeypatch.setattr(sys, "argv", ["xenvm", *options, str(config)])
        return xenvm.main()

    return run_it


def kept(inherited):
    """What the started process has of the connection to us."""
    return Channel.from_descriptor(os.dup(inherited[xenvm.STATUS]))


def telling(outcome):
    def spawn(_role, inherited, *_words, new_session=False):
        channel = kept(inherited)
        channel.send(outcome)
        channel.close()
        return 1

    return spawn


def interrupting(_number, _frame):
    raise KeyboardInterrupt


def test_a_monitor_that_stays_without_its_guest_is_no_success(run, capfd):
    text = "the guest does not run: \x1b destroyed while it was starting\nhint: none"
    assert run(telling(Outcome(0, UUID, text, "warning: odd\n"))) == ExitCode.NOT_RUNNING
    assert capfd.readouterr() == (f"{UUID}\n", f"warning: odd\n{text}\n".replace("\x1b", "\\x1b"))


def test_a_start_may_take_as_long_as_its_steps_may(run, monkeypatch, capfd):
    """The monitor has a deadline for each; that of a restore grows with the memory, beyond any of ours."""
    hours = itertools.count()

    def spawn(_role, inherited, *_words, new_session):
        channel = kept(inherited)

        def tell():
            time.sleep(0.5)
            channel.send(Outcome(0, UUID, "", ""))
            channel.close()

        threading.Thread(target=tell).start()
        return 1

    monkeypatch.setattr(frames.time, "monotonic", lambda: 3600.0 * next(hours))
    assert run(spawn) == 0
    assert capfd.readouterr().out == f"{UUID}\n"


def test_who_interrupts_a_start_hears_that_it_goes_on(run, capfd):
    channels = []

    def spawn(_role, inherited, *_words, new_session):
        channels.append(kept(inherited))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        return 1

    before = signal.signal(signal.SIGALRM, interrupting)
    assert run(spawn) == 130
    signal.signal(signal.SIGALRM, before)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("xenvm: the start goes on; ")
    assert "`xenvm-cmd UUID destroy` ends it" in err
    channels[0].close()


def test_a_host_that_starts_no_process_is_told_in_words(run, capfd):
    def spawn(*_words, **_options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    assert run(spawn) == ExitCode.FAILED
    assert capfd.readouterr() == ("", "xenvm: [Errno 11] Resource temporarily unavailable\n")


def test_a_parser_that_gives_no_answer_is_named(run, monkeypatch, capfd):
    channels = []

    def spawn(_role, inherited, *_words):
        channels.append(kept(inherited))
        return os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "100")

    monkeypatch.setattr(xenvm, "PARSE_WAIT_S", 0.1)
    assert run(spawn, "--check") == ExitCode.TIMED_OUT
    assert "a.cfg: the parser had not read it after 0.1 s\nhint: " in capfd.readouterr().err
    channels[0].close()


def test_a_host_policy_that_is_for_root_alone_hinders_no_check(run, monkeypatch, tmp_path, capfd):
    policy, asked = tmp_path / "policy.toml", []
    policy.write_text("")
    monkeypatch.setattr(xenvm, "HOST_POLICY_FILE", str(policy))
    real = os.open

    def refusing(path, *words, **options):
        if path == str(policy):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *words, **options)

    def spawn(_role, inherited, *_words):
        asked.append(os.fstat(inherited[xenvm.HOST_POLICY]).st_size)
        return os.spawnlp(os.P_NOWAIT, "true", "true")

    monkeypatch.setattr(xenvm.os, "open", refusing)
    assert run(spawn, "--check") == ExitCode.FAILED  # this parser says nothing
    assert asked == [0]
    err = capfd.readouterr().err
    assert err.startswith(f"warning: {policy}: Permission denied: ")
    assert "Traceback" not in err


def test_the_summary_names_every_exit_status_of_its_own():
    told = " ".join(xenvm.USAGE.split())
    for code in set(ExitCode) - {ExitCode.NO_MONITOR}:
        assert f" {int(code)} " in told.partition("Exit status:")[2], code


def test_a_monitor_that_stands_still_is_not_waited_for_for_ever(run, monkeypatch, capfd):
    monkeypatch.setattr(xenvm, "START_WAIT_S", 0.1)
    there = []

    def spawn(_role, inherited, *_words, new_session=False):
        there.append(kept(inherited))
        return 1

    assert run(spawn) == ExitCode.TIMED_OUT
    assert "has not said within" in capfd.readouterr().err
    there[0].close()
