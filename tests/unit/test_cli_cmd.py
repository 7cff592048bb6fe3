# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of xenvm-cmd, its printing, its manual page and its start, without any monitor."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xenvm
from xenvm import __version__, forms
from xenvm.cli import client, cmd, render, verbs
from xenvm.errors import UsageError, XenvmError

ROOT = Path(cmd.__file__).resolve().parents[2]
UUID = "6f1d0a3e-52c7-4b0e-9a55-0d3c1b7e8f21"


def test_start_loads_little():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); import xenvm.cli.cmd; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", script, str(ROOT)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "xenvm.cli.cmd" in loaded
    unwanted = "argparse asyncio subprocess dataclasses selectors logging psutil cffi difflib socket typing "
    unwanted += "re json enum collections functools contextlib types signal"
    assert {name.partition(".")[0] for name in loaded} & set(unwanted.split()) == set()


SCRIPT = ROOT / "scripts/bin/xenvm-cmd"


def installed(prefix, version):
    """Install the script and the package below a prefix, as pip does."""
    (prefix / "bin").mkdir()
    shutil.copy(SCRIPT, prefix / "bin")
    packages = prefix / f"lib/python{version}/dist-packages"
    packages.mkdir(parents=True)
    (packages / "xenvm").symlink_to(ROOT / "xenvm")
    return prefix / "bin/xenvm-cmd"


def of_the_system():
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(["/usr/bin/python3", "-c", show], capture_output=True, text=True, check=True).stdout.strip()


def test_the_installed_program_starts_without_site_and_environment(tmp_path):
    program = installed(tmp_path, of_the_system())
    assert program.read_text().splitlines()[0] == "#!/usr/bin/python3 -ISB"
    environment = {"PYTHONPATH": "/nonexistent", "PYTHONSTARTUP": "/nonexistent", "PYTHONVERBOSE": "1"}
    done = subprocess.run(
        [program, "--version"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == (f"xenvm-cmd {xenvm.__version__}\n", "")
    link = tmp_path / "link"
    link.symlink_to(program)
    assert subprocess.run([link, "bad"], capture_output=True, timeout=60, check=False).returncode == 2


def test_where_only_another_interpreter_knows_the_package(tmp_path):
    program = installed(tmp_path, "2.7")
    told = tmp_path / "bin/python3"
    told.write_text('#!/bin/sh\necho "$@"\n')
    alone = subprocess.run([program, "list"], capture_output=True, text=True, timeout=60, check=False)
    assert (alone.returncode, "No module named 'xenvm'" in alone.stderr) == (1, True)
    told.chmod(0o755)
    done = subprocess.run([program, "list", "a b"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "-I -m xenvm.cli.cmd list a b\n"


# Command line


def parsed(*words):
    line = cmd.parse(words)
    return line.target, line.command, line.params


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((UUID, "start"), (UUID, "start", {})),
        ((UUID, "start", "paused=true"), (UUID, "start", {"paused": "true"})),
        ((UUID, "x", "a=b=c", "d="), (UUID, "x", {"a": "b=c", "d": ""})),
        ((UUID, "get", "vnc"), (UUID, "get", {"field": "vnc"})),
        ((UUID, "get", "field=vnc"), (UUID, "get", {"field": "vnc"})),
        ((UUID, "wait", "timeout=5", "running"), (UUID, "wait", {"timeout": "5", "state": "running"})),
        ((UUID, "console"), (UUID, "console", {})),
        ((UUID, "console", "--log"), (UUID, "console-log", {})),
        ((UUID, "disk-del", "xvdb", "force=true"), (UUID, "disk-del", {"device": "xvdb", "force": "true"})),
        ((UUID, "disk-add", "/a:file:xvdb:w:disk"), (UUID, "disk-add", {"spec": "/a:file:xvdb:w:disk"})),
        (
            (UUID, "disk-add", "/a=b:file:xvdb:w:disk:share=true", "type=aio"),
            (UUID, "disk-add", {"spec": "/a=b:file:xvdb:w:disk:share=true", "type": "aio"}),
        ),
        ((UUID, "disk-add", "path=/a:b=c", "device=xvdb"), (UUID, "disk-add", {"path": "/a:b=c", "device": "xvdb"})),
        ((UUID, "doctor"), (UUID, "doctor", {})),
        ((UUID, "doctor", "clean"), (UUID, "doctor", {"clean": "true"})),
        ((UUID, "doctor", "clean=true"), (UUID, "doctor", {"clean": "true"})),
        ((UUID, "suspend", "file"), (UUID, "suspend", {"file": "file"})),
        ((UUID, "nic-network-switch", "1", "bridge=b"), (UUID, "nic-network-switch", {"id": "1", "bridge": "b"})),
        (("list",), ("", "list", {})),
        (("help",), ("", "help", {})),
        (("--help",), ("", "help", {})),
        (("list", "status"), ("list", "status", {})),
        (("--", "-odd", "-x", "-y=1"), ("-odd", "-x", {"-y": "1"})),
    ],
)
def test_parse(words, expected):
    assert parsed(*words) == expected


def test_options_stand_anywhere():
    for words in (("--json", "--reply-timeout", "2.5", UUID, "x"), (UUID, "x", "--reply-timeout=2.5", "--json")):
        line = cmd.parse([*words, "--use-socket"])
        assert (line.as_json, line.reply_timeout_s, line.target, line.command) == (True, 2.5, UUID, "x")
    line = cmd.parse([UUID, "x"])
    assert (line.as_json, line.reply_timeout_s) == (False, 90.0)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "UUID and COMMAND are missing"),
        ((UUID,), "COMMAND is missing"),
        ((UUID, "doctor", "cleam"), "not of the form key=value: cleam"),
        ((UUID, "doctor", "clean", "clean=true"), "clean is given twice"),
        (("", "destroy"), "missing"),
        ((UUID, ""), "COMMAND is missing"),
        ((UUID, "destroy", "now"), "now"),
        ((UUID, "get", "a", "b"), "b"),
        ((UUID, "get", "a", "field=b"), "field is given twice"),
        ((UUID, "x", "a=1", "a=1"), "a is given twice"),
        ((UUID, "x", "=1"), "=1"),
        ((UUID, "x", "--wrong"), "--wrong"),
        ((UUID, "status", "--log"), "--log"),
        (("list", "--log"), "--log"),
        ((UUID, "x", "--reply-timeout"), "--reply-timeout"),
        *(((UUID, "x", "--reply-timeout", bad), bad) for bad in ("0", "-1", "nan", "inf", "1e9", "soon")),
    ],
)
def test_usage_errors_name_the_word(words, named, capsys):
    with pytest.raises(UsageError) as raised:
        cmd.parse(words)
    assert named in raised.value.message
    assert cmd.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert cmd.main([*words, "--json"]) == 2 or words[-1:] == ("--reply-timeout",)


@given(st.lists(st.text(max_size=8), max_size=6))
def test_any_command_line_is_understood_or_refused(words):
    with contextlib.suppress(UsageError):
        assert cmd.parse(words).command


# Waiting


@pytest.mark.parametrize(
    ("method", "params", "seconds"),
    [
        ("status", {}, 0),
        ("shutdown", {}, 60),
        ("reboot", {}, 60),
        ("shutdown", {"timeout": "5"}, 5),
        ("start", {"timeout": "1.5"}, 1.5),
        ("wait", {"timeout": "nan"}, 0),
        ("wait", {"timeout": "-5"}, 0),
        ("wait", {"timeout": "1e300"}, 0),
        ("wait", {"timeout": "soon"}, 0),
    ],
)
def test_own_timeout(method, params, seconds):
    assert client.own_timeout_s(method, params) == seconds


@given(st.text())
def test_only_a_canonical_uuid_becomes_part_of_a_path(word):
    assert not forms.uuid(word) or "/" not in word
    assert client.uuids_of([f"vm-{word}", "vm-", "", word], "vm-") == ([word] if forms.uuid(word) else [])


@given(st.uuids())
def test_every_uuid_is_canonical(uuid):
    assert forms.uuid(str(uuid))
    assert not forms.uuid(str(uuid) + "\n")
    assert not forms.uuid(uuid.hex)
    assert client.uuids_of([f"vm-{uuid}", f"lock-{uuid}"], "vm-") == [str(uuid)]


def test_socket_directory(monkeypatch):
    monkeypatch.setenv("XENVM_SOCKET_DIR", "")
    assert client.socket_directory() == "/run/xenvm"
    monkeypatch.setenv("XENVM_SOCKET_DIR", "/a")
    assert client.socket_directory() == "/a"
    assert client.socket_directory("/b") == "/b"


# Printing


@given(st.text())
def test_nothing_steers_the_terminal(text):
    shown = render.plain(text)
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert render.plain(shown) == shown
    line = render.json_line({"k": text})
    assert line[:-1].isprintable()
    assert line.isascii()
    assert json.loads(line) == {"k": text}


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
def test_a_table_has_one_line_for_each_row(rows):
    assert render.table(rows).count("\n") == len(rows)


def test_table_is_aligned():
    assert render.table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc  d\n"


def test_closed_output_is_no_failure(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert render.out("x")
    render.error(XenvmError("x"), as_json=False)
    assert cmd.main(["help"]) == 0


def test_help_names_every_command(capsys):
    assert cmd.main(["help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: xenvm-cmd ")
    assert all(f"\n{verb.usage} " in told for verb in verbs.VERBS)
    assert cmd.main(["help", "--json"]) == 0
    assert [verb["name"] for verb in json.loads(capsys.readouterr().out)] == [verb.name for verb in verbs.VERBS]


def test_version(capsys):
    assert cmd.main(["--version"]) == 0
    assert capsys.readouterr().out == f"xenvm-cmd {__version__}\n"


def test_manual_page_holds_the_present_command_table(capsys):
    page = (ROOT / "docs" / "xenvm-cmd.1.md").read_text()
    begin, end = "<!-- commands: begin -->\n", "<!-- commands: end -->\n"
    assert cmd.main(["--manual"]) == 0
    assert page.partition(begin)[2].partition(end)[0] == capsys.readouterr().out == verbs.manual()


def test_manual_page_tells_every_exit_status():
    page = (ROOT / "docs" / "xenvm-cmd.1.md").read_text()
    assert all(f"| {int(code)} | `{code.name}` |" in page for code in cmd.ExitCode)


def test_interrupt_and_trouble_of_the_host(monkeypatch, capsys):
    def interrupted(_line):
        raise KeyboardInterrupt

    def troubled(_line):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(cmd, "run", interrupted)
    assert cmd.main([UUID, "x"]) == 130
    monkeypatch.setattr(cmd, "run", troubled)
    assert cmd.main([UUID, "x"]) == 1
    assert capsys.readouterr().err == "error: [Errno 24] Too many open files\n"
