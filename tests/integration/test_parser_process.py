# SPDX-License-Identifier: GPL-2.0-or-later
"""The real parser process on hostile files: always an answer that says something, never a privilege. Needs root."""

import json
import os
import pwd
import select
import signal

import pytest

from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Hello, HostPolicy, Parsed
from xenvm.boundary.privileges import Role
from xenvm.boundary.spawn import spawn
from xenvm.model import derived_mac

WAIT_S = 60
UUID = "11111111-2222-4333-8444-555555555555"
GOOD = b"kernel = /boot/k\nmemory = 64\nvcpus = 1\n"


def parse(content, tmp_path, policy=b""):
    """Return the messages of a parser that was given a file, how it ended and what it wrote."""
    (tmp_path / "a.cfg").write_bytes(content)
    (tmp_path / "policy.toml").write_bytes(policy)
    config = os.open(tmp_path / "a.cfg", os.O_RDONLY)
    host = os.open(tmp_path / "policy.toml", os.O_RDONLY)
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open("/dev/null", os.O_RDWR)
    ours, theirs = Channel.pair()
    pid = spawn(Role.PARSER, {0: null, 1: log, 2: log, 3: theirs.fileno(), 4: config, 5: host}, "a.cfg")
    for descriptor in (config, host, log, null):
        os.close(descriptor)
    theirs.close()
    messages = []
    while (received := ours.receive(deadline_s=WAIT_S)) is not None:
        messages.append(received[0])
    ours.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return messages, status, (tmp_path / "log").read_text()


def answer(content, tmp_path, policy=b""):
    (hello, parsed), status, log = parse(content, tmp_path, policy)
    assert isinstance(hello, Hello)
    assert isinstance(parsed, Parsed)
    assert (status, log) == (0, "")
    return parsed


def test_it_has_no_privilege_when_it_reads(users, tmp_path):
    (hello, parsed), status, _ = parse(GOOD, tmp_path)
    proof = json.loads(hello.proof)
    assert proof["uid"] == pwd.getpwnam("xenvm-parse").pw_uid
    assert set(proof["capabilities"].values()) == {"0"}
    assert proof["no_new_privs"]
    assert proof["seccomp"] == 2
    assert (parsed.grants[0].kernel, parsed.issues, status) == ("/boot/k", (), 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"\xff" * 1000,
        b"\n" * 262144,
        b"=" * 262144,
        b"#" * 262145,
        b"x" * (10 << 20),
        b"a = b\n" * 43000,
        b"kernel=/" + b"k" * 262000,
        GOOD + b"name = \x1b[2J\n",
        GOOD + b"memroy = 1\n" * 20000,
        GOOD + b"cpuid = 0x1:eax=" + b"x" * 32 + b"\n" + b"cpuid = 0x2:eax=" * 15000,
        GOOD + "name = \U0001f600\u202e\n".encode() * 5000,
        GOOD + b"disk = " + b":" * 200000,
        GOOD + b"disk = /a:phy:xvda:w:disk\n" * 5000,
        GOOD + b"".join(b"disk = /a:phy:d%dp0:w:disk\n" % number for number in range(5000)),
        GOOD + b"".join(b"disk = /%b:phy:d%dp0:w:disk\n" % (b"a" * 3000, number) for number in range(64)),
        GOOD + b"nic = " + b"id=0," * 40000,
        GOOD + b"nic =\n" * 40000,
        GOOD + b"memory = 0x" + b"f" * 200000,
        GOOD + b"vcpus = " + b"9" * 200000,
        GOOD + b"cpus-affinity = " + b"0-4095," * 30000,
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
    ],
    ids=lambda content: f"{content[:24]!r}*{len(content)}",
)
def test_a_hostile_file_is_a_list_of_errors(users, tmp_path, content):
    parsed = answer(content, tmp_path)
    assert parsed.issues
    assert parsed.grants == parsed.policy == ()
    assert all(issue.message.isprintable() for issue in parsed.issues)
    assert all(issue.text.isprintable() for issue in parsed.issues)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("memroy = 64", "did you mean `memory`?"),
        (f"nic = bridge=br0\nnic = mac={derived_mac(0, None, UUID)}\nuuid = {UUID}", ""),
        ("startup = strated", ""),
        ("\x80", ""),
    ],
)
def test_what_an_error_needs_is_loaded_before_the_drop(users, tmp_path, line, text):
    """A confined process can import nothing more: neither to make a suggestion nor to derive an address."""
    parsed = answer(GOOD + line.encode() + b"\n", tmp_path)
    assert any(text in issue.hint for issue in parsed.issues)


POLICY = b'default-bridge = "br0"\nbridges = ["br0", "dmz"]\n'


def test_the_hosts_policy_is_read_beside_the_config(users, tmp_path):
    """The module that reads it is loaded before the drop, and only for a host that has a policy."""
    parsed = answer(GOOD, tmp_path, POLICY)
    assert (parsed.issues, parsed.host) == ((), HostPolicy("br0", ("br0", "dmz")))
    assert answer(GOOD, tmp_path).host == HostPolicy("", ())


@pytest.mark.parametrize(
    "policy",
    [
        b"\0",
        b"default-bridge",
        b'default-bridge = "br0\xff"',
        b'default-brdige = "br0"',
        b"default-bridge = 5",
        b"bridges = " + b"[" * 100000,
        b'bridges = ["' + b"b" * 200 + b'"]',
        b'bridges = ["br0", ' * 50000,
        b"a = 1\n" * 40000,
        b"a." * 100000 + b"a = 1",
        b"#" * (1 << 20),
    ],
    ids=lambda policy: f"{policy[:24]!r}*{len(policy)}",
)
def test_a_policy_that_is_none_is_an_error_that_names_it(users, tmp_path, policy):
    parsed = answer(GOOD, tmp_path, policy)
    assert parsed.grants == parsed.policy == ()
    (issue,) = parsed.issues
    assert issue.message.startswith("/etc/xenvm/policy.toml: ")
    assert issue.message.isprintable()


def test_a_parser_without_its_parent_ends(users, tmp_path):
    """One that waits for a file that does not come dies with whoever started it."""
    pipe, report = os.pipe(), os.pipe()
    starter = os.fork()
    if starter == 0:
        ours, theirs = Channel.pair()
        policy = os.memfd_create("policy", os.MFD_CLOEXEC)
        pid = spawn(Role.PARSER, {0: 0, 1: 2, 2: 2, 3: theirs.fileno(), 4: pipe[0], 5: policy}, "a.cfg")
        ours.receive(deadline_s=WAIT_S)
        os.write(report[1], str(pid).encode())
        signal.pause()
        os._exit(1)
    pidfd = os.pidfd_open(int(os.read(report[0], 64)))
    assert not select.select([pidfd], [], [], 0.2)[0]
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    assert select.select([pidfd], [], [], WAIT_S)[0]
    for descriptor in (*pipe, *report, pidfd):
        os.close(descriptor)
