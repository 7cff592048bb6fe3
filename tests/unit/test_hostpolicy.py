# SPDX-License-Identifier: GPL-2.0-or-later
"""/etc/xenvm/policy.toml: how the broker opens it, and what the parser makes of it."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm.boundary.messages import HostPolicy
from xenvm.broker import policyfile
from xenvm.errors import ConfigError, XenvmError
from xenvm.parser import hostpolicy
from xenvm.parser.hostpolicy import LIMIT_BYTES, NO_POLICY, host_policy


def test_directories_of_a_policy():
    text = b'disk-directories = ["/srv/discs", "/var/lib/a b"]\n'
    assert host_policy(text) == HostPolicy("", (), ("/srv/discs", "/var/lib/a b"))
    text = b'image-directories = ["/srv/images"]\n'
    assert host_policy(text) == HostPolicy("", (), (), ("/srv/images",))


@pytest.mark.parametrize("path", ["", "/", "srv", "/srv/", "//srv", "/srv/../etc", "/srv/./a", "/..", "/a\\u0000b"])
def test_what_is_no_directory(path):
    with pytest.raises(ConfigError, match=r"directories|TOML|Illegal|Invalid"):
        host_policy(f'disk-directories = ["{path}"]'.encode())
    with pytest.raises(ConfigError, match=r"directories|TOML|Illegal|Invalid"):
        host_policy(f'image-directories = ["{path}"]'.encode())


def test_a_policy():
    text = b'# ours\ndefault-bridge = "br0"\nbridges = ["br0", "dmz"]    # for running guests\n'
    assert host_policy(text) == HostPolicy("br0", ("br0", "dmz"))


@pytest.mark.parametrize("text", [b"", b"\n", b"# nothing\n", b"bridges = []\n", b'default-bridge = ""\n'])
def test_a_policy_that_says_nothing(text):
    assert host_policy(text) == NO_POLICY == HostPolicy("", ())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"\xff", "utf-8"),
        (b"default-bridge", "Expected '='"),
        (b'bridge = "br0"', "unknown key 'bridge'"),
        (b'"\\u001b[31m" = 1', r"unknown key '\\x1b\[31m'"),
        (b"[bridges]", "bridges"),
        (b"default-bridge = 1", "default_bridge"),
        (b'default-bridge = "a/b"', "default_bridge"),
        (b'default-bridge = "' + b"b" * 16 + b'"', "default_bridge"),
        (b'bridges = "br0"', "bridges: not a list"),
        (b'bridges = ["br0", 1]', "bridges"),
        (b'bridges = ["br0"]\nbridges = ["br1"]', "Cannot overwrite"),
        (b"bridges = [" + b'"b",' * 257 + b"]", "at most 256"),
        (b"#" * (LIMIT_BYTES + 1), "longer than"),
    ],
)
def test_what_is_no_policy(text, match):
    with pytest.raises(ConfigError, match=match) as caught:
        host_policy(text)
    assert caught.value.message.startswith("/etc/xenvm/policy.toml: ")


def test_an_unknown_key_is_told_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        host_policy(b"a = 1")
    assert caught.value.hint == "known are default-bridge, bridges, disk-directories, image-directories"


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes(content):
    try:
        found = host_policy(content)
    except ConfigError:
        return
    assert HostPolicy.from_body(found.as_body()) == found


def test_its_path_is_the_same_for_both():
    assert policyfile.HOST_POLICY == hostpolicy.PATH


# Opening


@pytest.fixture
def path(tmp_path, monkeypatch):
    made = tmp_path / "policy.toml"
    monkeypatch.setattr(policyfile, "HOST_POLICY", str(made))
    return made


def content(descriptor):
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_it_is_opened_for_the_parser(path):
    path.write_bytes(b"bridges = []")
    path.chmod(0o644)
    descriptor = policyfile.open_host_policy()
    assert not os.get_inheritable(descriptor)
    assert content(descriptor) == b"bridges = []"


def test_without_one_an_empty_one_is_read(path):
    assert content(policyfile.open_host_policy()) == b""


@pytest.mark.parametrize("what", ["group", "others", "owner", "directory", "fifo", "loop"])
def test_one_that_others_could_change_is_refused(path, what):
    if what in ("group", "others", "owner"):
        path.write_bytes(b"")
        path.chmod({"group": 0o664, "others": 0o646}.get(what, 0o644))
        if what == "owner":
            os.chown(path, 64123, 0)
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.symlink_to(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(XenvmError, match=str(path)):
        policyfile.open_host_policy()
    assert len(os.listdir("/proc/self/fd")) == before
