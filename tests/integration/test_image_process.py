# SPDX-License-Identifier: GPL-2.0-or-later
"""The real image worker and a real qemu-storage-daemon: served bytes, and what the daemon may do. Needs root."""

import contextlib
import grp
import json
import os
import pwd
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import prctl
import pytest

from xenvm._confine import lib
from xenvm.boundary.confine import confine
from xenvm.boundary.messages import Failed, Hello
from xenvm.boundary.privileges import TABLE, Role
from xenvm.boundary.workers import Serve, Served
from xenvm.broker.children import Child
from xenvm.errors import XenvmError
from xenvm.helpers.image import server

WAIT_S = 60
MIB = 1 << 20
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
READ_ONLY = 2  # NBD_FLAG_READ_ONLY of linux/nbd.h
LOCKED = 'Failed to get "write" lock'


@pytest.fixture(scope="module", autouse=True)
def programs():
    for path, packages in ((server.PROGRAM, "qemu-system-common or qemu-utils"), ("/usr/bin/qemu-img", "qemu-utils")):
        if not os.access(path, os.X_OK):
            pytest.fail(f"{path} is absent: install the Debian package {packages}")


@pytest.fixture(scope="module")
def user():
    """The system user of the row, made where it is absent; its uid."""
    name = TABLE[Role.IMAGE].user
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name).pw_uid
    with contextlib.suppress(KeyError):
        grp.getgrnam(name)
        subprocess.run(["groupdel", name], check=True)
    shell = ["--no-create-home", "--home-dir", "/", "--shell", "/usr/sbin/nologin"]
    subprocess.run(["useradd", "--system", "--user-group", *shell, name], check=True)
    return pwd.getpwnam(name).pw_uid


def image(directory, form, options=(), size=16 * MIB):
    path = Path(directory) / f"image.{form}"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *options, path, str(size)], check=True)
    path.chmod(0o600)  # root's alone: the daemon could not open it
    return path


def sockets(directory):
    path = str(Path(directory) / "socket")
    listening, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(1)
    client.connect(path)
    os.unlink(path)
    client.settimeout(WAIT_S)
    return listening, client


class Session:
    """A worker that has served, its daemon, and the connection."""

    def __init__(self, directory, path, form, *, read_only=False, access=None):
        self.log = Path(directory) / "log"
        log = os.open(self.log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        listening, self.client = sockets(directory)
        descriptor = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) if access is None else access)
        child = Child(Role.IMAGE, log, {}, "-")
        os.close(log)
        self.worker = child.pid
        hello, _ = child.channel.receive(deadline_s=WAIT_S)
        assert isinstance(hello, Hello), hello
        self.proof = json.loads(hello.proof)
        child.channel.send(Serve(form, read_only, "xenvm-test"), [descriptor, listening.fileno(), self.client.fileno()])
        os.close(descriptor)
        listening.close()
        self.answer, _ = child.channel.receive(deadline_s=WAIT_S)
        self.pid = self.answer.pid if isinstance(self.answer, Served) else 0
        child.end(grace_ms=WAIT_S * 1000)
        self.how = child.how()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGKILL)
        self.client.close()

    def stop(self, number=signal.SIGTERM):
        if self.pid:
            kill(self.pid, number)
            gone(self.pid)
            self.pid = 0

    def ask(self, kind, offset=0, length=0, data=b""):
        self.client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length) + data)
        magic, error, handle = struct.unpack(">IIQ", self.take(16))
        assert (magic, handle) == (0x67446698, 7)
        return os.strerror(error) if error else self.take(length if kind == READ else 0)

    def take(self, length):
        data = b""
        while len(data) < length:
            piece = self.client.recv(length - len(data))
            assert piece, "the daemon ended the connection"
            data += piece
        return data


def kill(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    return False


def gone(pid):
    end = time.monotonic() + WAIT_S
    while alive(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


def daemons():
    """All living daemons of the row's user."""
    found = subprocess.run(["pgrep", "-u", TABLE[Role.IMAGE].user], capture_output=True, text=True, check=False)
    return {int(word) for word in found.stdout.split() if alive(int(word))}


def raw(path, form):
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", path, f"{path}.raw"], check=True)
    return Path(f"{path}.raw").read_bytes()


FORMATS = [
    ("qcow", "qcow", ()),
    ("qcow", "qcow2", ()),
    ("qcow", "qcow2", ("-o", "compat=0.10")),
    ("vhd", "vpc", ("-o", "force_size=on")),
    ("vhd", "vpc", ("-o", "subformat=fixed,force_size=on")),
]


@pytest.mark.parametrize(("kind", "form", "options"), FORMATS)
def test_bytes_go_in_and_out(kind, form, options, user, tmp_path):
    path = image(tmp_path, form, options)
    pattern = bytes(range(256)) * 256
    with Session(tmp_path, path, kind) as session:
        assert isinstance(session.answer, Served), session.answer
        assert (session.answer.size_bytes, session.answer.flags & READ_ONLY) == (16 * MIB, 0)
        assert session.how == "ended with status 0"
        assert session.ask(WRITE, 5 * MIB + 512, len(pattern), pattern) == b""
        assert session.ask(WRITE, 16 * MIB - 512, 512, pattern[:512]) == b""
        assert session.ask(FLUSH) == b""
        assert session.ask(READ, 5 * MIB, 1024) == bytes(512) + pattern[:512]
        session.stop()
    expected = bytearray(16 * MIB)
    expected[5 * MIB + 512 : 5 * MIB + 512 + len(pattern)] = pattern
    expected[-512:] = pattern[:512]
    assert raw(path, form) == expected
    with Session(tmp_path, path, kind, read_only=True) as session:
        assert session.answer.flags & READ_ONLY
        assert session.ask(READ, 5 * MIB + 512, 512) == pattern[:512]
        assert session.ask(WRITE, 0, 512, bytes(512)) != b""
        before = path.read_bytes()
        session.stop()
    assert path.read_bytes() == before
    assert session.log.read_text() == ""


def test_the_daemon_inherits_the_confinement(user, tmp_path):
    path = image(tmp_path, "qcow2")
    with Session(tmp_path, path, "qcow") as session:
        assert isinstance(session.answer, Served), session.answer
        proof = session.proof
        assert (proof["uid"], proof["landlock_abi"]) == (user, lib.xenvm_landlock_abi())
        shown = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{session.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert shown["Uid"].split() == [str(user)] * 4
        assert set(shown["Gid"].split()) == {str(proof["gid"])}
        assert shown["Groups"].split() == []
        assert [int(shown[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0] * 5
        assert (shown["NoNewPrivs"], shown["Seccomp"], shown["Seccomp_filters"]) == ("1", "2", "2")
        assert os.getpgid(session.pid) == os.getsid(session.pid) == session.pid
        assert os.stat(f"/proc/{session.pid}").st_uid == user
        limits = Path(f"/proc/{session.pid}/limits").read_text()
        assert [line.split()[-3:-1] for line in limits.splitlines() if line.startswith("Max open files")] == [
            ["64", "64"]
        ]
        assert Path(f"/proc/{session.pid}/environ").read_bytes() == b""
        links = {int(entry.name): os.readlink(entry) for entry in Path(f"/proc/{session.pid}/fd").iterdir()}
        assert [number for number, link in links.items() if link.startswith("/")] == [
            0,
            1,
            *(number for number, link in links.items() if link == str(path)),
        ]
        (held,) = (number for number, link in links.items() if link == str(path))
        flags = int(Path(f"/proc/{session.pid}/fdinfo/{held}").read_text().split("flags:")[1].split()[0], 8)
        assert flags & os.O_DIRECT
        # 2 what it said at the start, 3 the listener, and one connection; the worker's channel is not among them
        assert sum(link.startswith("socket:") for link in links.values()) == 3
        assert "seccomp" not in " ".join(links.values())


def test_the_daemon_outlives_the_worker_and_ends_when_told(user, tmp_path):
    path = image(tmp_path, "qcow2")
    with Session(tmp_path, path, "qcow") as session:
        pid = session.pid
        assert not alive(session.worker)
        assert alive(pid)
        assert session.ask(READ, 0, 512) == bytes(512)
        kill(pid, signal.SIGTERM)
        gone(pid)
    checked = subprocess.run(["qemu-img", "check", "-q", path], check=False)
    assert checked.returncode == 0


def test_the_daemon_stays_when_its_client_goes(user, tmp_path):
    # The device may be taken from the guest before the server is ended.
    with Session(tmp_path, image(tmp_path, "qcow2"), "qcow") as session:
        session.client.close()
        time.sleep(0.2)
        assert alive(session.pid)


def test_an_image_on_a_block_device(user, tmp_path):
    path = image(tmp_path, "qcow2")
    os.truncate(path, 32 * MIB)  # a device cannot grow
    done = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    device = done.stdout.strip()
    try:
        with Session(tmp_path, device, "qcow") as session:
            assert isinstance(session.answer, Served), session.answer
            assert session.ask(WRITE, 0, 512, b"b" * 512) == b""
            assert session.ask(FLUSH) == b""
            session.stop()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert raw(path, "qcow2")[:513] == b"b" * 512 + b"\0"


def with_bytes(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def backed(path):
    with_bytes(path, 8, struct.pack(">QI", 512, 11))
    with_bytes(path, 512, b"/etc/shadow")


REFUSED = [
    ("vhd", lambda _: None, {}, "is of type vhd, but its image is a qcow image of version 3"),
    ("qcow", backed, {}, "backing file"),
    ("qcow", lambda path: with_bytes(path, 0, bytes(512)), {}, "of no format known here"),
    ("qcow", lambda path: os.truncate(path, 100), {}, "shorter than 512"),
    ("qcow", lambda path: with_bytes(path, 24, b"\xff" * 8), {}, "does not serve the image, it ended with status 1: "),
    ("qcow", lambda _: None, {"access": os.O_RDONLY}, "not open for reading and writing"),
    ("qcow", lambda _: None, {"access": os.O_RDWR, "read_only": True}, "not open for reading only"),
]


@pytest.mark.parametrize(("kind", "spoil", "options", "message"), REFUSED)
def test_what_is_refused_leaves_nothing(kind, spoil, options, message, user, tmp_path):
    path = image(tmp_path, "qcow2")
    spoil(path)
    before = daemons()
    with Session(tmp_path, path, kind, **options) as session:
        assert isinstance(session.answer, Failed), session.answer
        assert message in session.answer.fault.message
        assert session.answer.fault.message.isprintable()
        assert session.how == "ended with status 1"
    assert daemons() <= before


def test_an_image_is_served_to_one_writer(user, tmp_path):
    path = image(tmp_path, "qcow2")
    with Session(tmp_path, path, "qcow") as first:
        assert isinstance(first.answer, Served), first.answer
        before = daemons()
        with Session(tmp_path, path, "qcow") as second:
            assert isinstance(second.answer, Failed)
            assert LOCKED in second.answer.fault.message
        assert daemons() == before
    with Session(tmp_path, path, "qcow") as third:
        assert isinstance(third.answer, Served), third.answer


def test_a_worker_without_a_request_ends_with_its_broker(user, tmp_path):
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    child = Child(Role.IMAGE, log, {}, "-")
    os.close(log)
    child.channel.receive(deadline_s=WAIT_S)
    child.channel.close()
    child.end(grace_ms=WAIT_S * 1000)
    assert child.how() == "ended with status 0"


def test_a_client_that_is_not_connected(user, tmp_path):
    path = image(tmp_path, "qcow2")
    before = daemons()
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    child = Child(Role.IMAGE, log, {}, "-")
    os.close(log)
    child.channel.receive(deadline_s=WAIT_S)
    listening, client = sockets(tmp_path)
    stranger, other = socket.socketpair()
    other.close()
    descriptor = os.open(path, os.O_RDWR)
    child.channel.send(Serve("qcow", False, "xenvm-test"), [descriptor, listening.fileno(), stranger.fileno()])
    os.close(descriptor)
    answer, _ = child.channel.receive(deadline_s=WAIT_S)
    child.end(grace_ms=WAIT_S * 1000)
    assert isinstance(answer, Failed)
    assert "NBD: the server ended the connection" in answer.fault.message
    assert daemons() <= before
    for one in (listening, client, stranger):
        one.close()


def test_it_serves_below_the_brokers_filter_too(user, tmp_path):
    """A daemon of a monitor inherits the broker's filter besides, which must not end it."""
    path = image(tmp_path, "qcow2")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            confine(TABLE[Role.BROKER], uid=None, gid=None, keep=frozenset({writing}))
            with Session(tmp_path, path, "qcow") as session:
                said = "" if isinstance(session.answer, Served) else session.answer.fault.message
                os.write(writing, said.encode() or b"served")
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    said = os.read(reading, 4096)
    os.close(reading)
    assert said == b"served"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_the_program_the_error_names_the_package(tmp_path, monkeypatch):
    path = image(tmp_path, "qcow2")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # what it installs for an open with O_DIRECT must not stay in this process
        try:
            prctl.set_no_new_privs(1)
            monkeypatch.setattr(server, "PROGRAM", "/no/such/program")
            server.Server(os.open(path, os.O_RDWR), "qcow2", "xenvm-test", 0, read_only=False)
        except XenvmError as error:
            os.write(writing, f"{error.message} | {error.hint}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 4096).decode()
    os.close(reading)
    os.waitpid(child, 0)
    assert said.startswith("cannot run /no/such/program: No such file or directory | apt install qemu-utils")
