# SPDX-License-Identifier: GPL-2.0-or-later
"""`xenvm` with real brokers and real parsers on a machine without Xen: what fails, how, and that nothing stays behind.

Needs root, and a machine that is no Xen host.
"""

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import xenvm
from xenvm.broker import host as broker_host
from xenvm.broker.actlog import read
from xenvm.cli.xenvm import USAGE
from xenvm.errors import BusyError

ROOT = Path(xenvm.__file__).parent.parent
PROGRAM = "import sys; from xenvm.cli.xenvm import main; sys.exit(main())"
UUID = "11111111-2222-4333-8444-55555555{:04x}"
NOBODY = 64123
WAIT_S = 60


class Host:
    """A directory for command sockets, a config file with its kernel, and the program."""

    def __init__(self, path, log_directory):
        self.path, self.log_directory = path, log_directory
        self.sockets = path / "run"
        self.sockets.mkdir(mode=0o755)
        self.kernel, self.config = path / "kernel", path / "a.cfg"
        self.kernel.write_bytes(b"no kernel")
        self.uuid = UUID.format(os.getpid() & 0xFFFF)
        self.environment = {"XENVM_SOCKET_DIR": str(self.sockets), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        self.write()

    def write(self, *lines):
        """Write a good config file, with more lines after it."""
        good = (f"uuid = {self.uuid}", f"kernel = {self.kernel}", "memory = 64", "vcpus = 1")
        self.config.write_bytes(b"".join(b"%b\n" % (os.fsencode(line)) for line in (*good, *lines)))

    def run(self, *words, **options):
        """Run the program and return status, output and errors."""
        argv = [sys.executable, "-B", "-c", PROGRAM, *words]
        done = subprocess.run(argv, env=self.environment, capture_output=True, timeout=WAIT_S, check=False, **options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def start(self, *words, **options):
        return self.run(*words, str(self.config), **options)

    def acts(self):
        return list(read(f"{self.log_directory}/{self.uuid}.acts"))

    def processes(self):
        """Return the processes of this VM's monitor."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if any("_start.py" in word for word in words) and {self.uuid, str(self.config)} & set(words):
                    found.append(process)
        return found

    def nothing_stays(self):
        _, alive = psutil.wait_procs(self.processes(), timeout=WAIT_S)
        assert alive == []
        assert os.listdir(self.sockets) == []
        return True


@pytest.fixture
def host(users, log_directory):
    import tempfile  # noqa: PLC0415 - not tmp_path, which other users could not enter

    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        made = Host(Path(path), log_directory)
        yield made
        assert made.nothing_stays()
        for suffix in ("log", "acts"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{log_directory}/{made.uuid}.{suffix}")


# Usage


def test_help_and_version(host):
    assert host.run("--help") == (0, USAGE, "")
    assert host.run("--version") == (0, f"xenvm {xenvm.__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [(), ("a", "b"), ("--chekc", "a"), ("--check",), ("--check", "--foreground", "a"), ("--help", "a"), ("-", "a")],
    ids=" ".join,
)
def test_bad_usage(host, words):
    status, out, err = host.run(*words)
    assert (status, out) == (2, "")
    assert "xenvm --help" in err


# Checking


@pytest.mark.parametrize("uid", [0, NOBODY])
def test_a_good_file_is_fine(host, uid):
    assert host.start("--check", user=uid, group=uid, extra_groups=[]) == (0, f"{host.config}: fine\n", "")


def test_what_has_no_effect_here_is_warned_of_and_no_error(host):
    host.write("hvm = true", "oem-features = 1", "inject-sci = 1")
    status, out, err = host.start("--check")
    assert (status, out) == (0, f"{host.config}: fine\n")
    first, text, second, another, hint = err.splitlines()
    assert first.startswith(f"{host.config}:6: warning: `oem-features`: ")
    assert second.startswith(f"{host.config}:7: warning: `inject-sci`: ")
    assert (text, another) == ("    oem-features = 1", "    inject-sci = 1")
    assert hint.startswith("    hint: the command trigger")
    assert host.start()[0] == 1  # there is no Xen; the log has them for whoever reads it later
    log = Path(f"{host.log_directory}/{host.uuid}.log").read_text()
    assert log.startswith(err)


@pytest.mark.parametrize("uid", [0, NOBODY])
@pytest.mark.parametrize("option", ["--check", "--foreground", "start"])
def test_all_errors_come_at_once_with_file_and_line(host, uid, option):
    """The same list whoever asks and however; a missing kernel is an error like any other."""
    if uid and option != "--check":
        status, out, err = host.start(*([option] * (option != "start")), user=uid, group=uid, extra_groups=[])
        assert (status, out) == (8, "")
        assert "needs root" in err
        return
    host.kernel.unlink()
    host.write("vcpuss = 2", "no equals sign", "name = \x1b[31m", "on_crash = rebot")
    status, out, err = host.start(*([option] * (option != "start")), user=uid, group=uid, extra_groups=[])
    assert (status, out) == (6, "")
    assert re.findall(r"a\.cfg:(\d+): ", err) == ["2", "5", "6", "7", "8"]
    assert re.search(rf"a\.cfg:2: kernel: .*{host.kernel}", err)
    assert "did you mean `vcpus`?" in err
    assert "\x1b" not in err
    assert not os.path.exists(f"{host.log_directory}/{host.uuid}.acts")


@pytest.mark.parametrize("option", [(), ("--foreground",), ("--check",)], ids=str)
def test_every_file_of_a_disk_that_is_missing_is_an_error(host, option):
    image = host.path / "image"
    image.write_bytes(bytes(512))
    host.write(
        f"disk = {host.path}/none:file:xvda:w:disk:key-file={host.path}/key",
        f"disk = {host.path}/gone:qcow:xvdb:w:disk",
        f"disk = {host.path}:aio:xvdc:w:disk",
        f"disk = {image}:file:xvdd:w:disk",
        "disk = :file:xvde:r:cdrom",
    )
    status, out, err = host.start(*option)
    assert (status, out) == (6, "")
    assert re.findall(rf"a\.cfg:([5-9]): ([a-z-]+): {host.path}(/[a-z]+)?: ", err) == [
        *(("5", "disk", "/none"), ("5", "key-file", "/key"), ("6", "disk", "/gone"), ("7", "disk", "")),
    ]
    assert f"\n    disk = {host.path}/gone:qcow:xvdb:w:disk\n    hint: is the path right?" in err
    assert err.count("hint: ") == 4
    assert str(image) not in err


@pytest.mark.parametrize("option", [(), ("--check",)], ids=str)
def test_a_disk_of_type_phy_is_a_block_device(host, option):
    """Of two disks the second is none: told with its own line, alike by a check and by a start."""
    image = host.path / "image"
    image.write_bytes(bytes(512))
    host.write(f"disk = {image}:file:xvda:w:disk", f"disk = {host.kernel}:phy:xvdb:w:disk")
    status, out, err = host.start(*option)
    assert (status, out) == (6, "")
    assert err == (
        f"{host.config}:6: disk: {host.kernel}: not a block device\n    disk = {host.kernel}:phy:xvdb:w:disk\n"
        "    hint: the type of a file is file or aio; phy takes a device, as lsblk lists them\n"
    )


def test_a_check_looks_at_the_image_to_start_from(host):
    host.write(f"startup = restore {host.path}/image")
    status, out, err = host.start("--check")
    assert (status, out) == (6, "")
    assert err.startswith(f"{host.config}:5: startup: {host.path}/image: No such file or directory\n")
    (host.path / "image").write_bytes(b"x")
    assert host.start("--check") == (0, f"{host.config}: fine\n", "")


def test_who_may_not_read_a_file_is_told_that_a_start_may(host):
    host.kernel.chmod(0)
    status, _, err = host.start("--check", user=NOBODY, group=NOBODY, extra_groups=[])
    assert status == 6
    assert "kernel: " in err
    assert "hint: a start, by root, may open it" in err
    assert host.start("--check")[0] == 0


def test_a_card_without_a_bridge_to_join_ends_the_start(host):
    """The host has no such bridge: refused before anything is built, with what there is instead."""
    host.write("nic = bridge=xenvm-none")
    status, _, err = host.start()
    assert status == 1
    assert "network card 0: there is no bridge xenvm-none; this host has" in err
    assert "hint: ip link add xenvm-none type bridge makes one" in err
    assert host.nothing_stays()
    assert "job" not in {record["act"] for record in host.acts()}


@pytest.mark.parametrize("option", [(), ("--foreground",), ("--check",)], ids=str)
@pytest.mark.parametrize(
    "lines", [["name = \udcff\udcfe"], ["n\0"], ["\u00e4" * 900] * 100, ["x = \U0001f600"] * 20000]
)
def test_bytes_that_are_no_text_and_errors_without_end(host, option, lines):
    host.write(*lines)
    status, out, err = host.start(*option)
    assert (status, out) == (6, "")
    assert "a.cfg:5: " in err
    assert "Traceback" not in err
    assert len(err) < 200_000


def test_a_file_that_cannot_be_read(host):
    for option in ((), ("--check",), ("--foreground",)):
        status, out, err = host.run(*option, str(host.path / "none"))
        assert (status, out) == (6, "")
        assert "none: No such file" in err
    status, _, err = host.run("--check", str(host.path))
    assert status in (1, 6)
    assert "Traceback" not in err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_a_kernel_that_is_no_file_is_refused_without_waiting(host, kind):
    host.kernel.unlink()
    if kind == "directory":
        host.kernel.mkdir()
    elif kind == "fifo":
        os.mkfifo(host.kernel)
    else:
        os.mknod(host.kernel, 0o600 | 0o020000, os.makedev(1, 5))
    status, _, err = host.start()
    assert status == 6
    assert "a.cfg:2: kernel: " in err


# Starting


@pytest.mark.parametrize("option", [(), ("--foreground",)], ids=str)
def test_without_xen_it_says_so_and_leaves_nothing(host, option):
    status, out, err = host.start(*option)
    assert (status, out) == (1, "")
    assert "hypervisor interface" in err or "without support for the Xen of this host" in err
    assert "hint: " in err
    assert "Traceback" not in err
    assert host.nothing_stays()
    acts = host.acts()
    assert [record["act"] for record in acts][:3] == ["opened", "confined", "sealed"]
    assert {"job", "result", "closed"} <= {record["act"] for record in acts}
    assert next(record for record in acts if record["act"] == "job")["op"] == "start"


def test_it_can_be_tried_again_and_again(host):
    for _ in range(3):
        assert host.start()[0] == 1
        assert host.nothing_stays()
    assert [record["n"] for record in host.acts()] == list(range(1, len(host.acts()) + 1))


@pytest.mark.parametrize("option", [(), ("--foreground",)], ids=str)
def test_a_descriptor_more_from_whoever_starts_it_is_no_harm(host, option):
    readable, writable = os.pipe()
    given = [fcntl.fcntl(writable, fcntl.F_DUPFD, 20) for _ in range(4)]
    status, _, err = host.start(*option, pass_fds=given)
    assert (status, "Traceback" in err) == (1, False)
    for descriptor in (writable, *given):
        os.close(descriptor)
    assert select.select([readable], [], [], WAIT_S)[0]
    assert os.read(readable, 1) == b""
    os.close(readable)


def test_the_config_may_already_have_the_number_that_the_broker_reads(host):
    script = 'exec 3</dev/null; exec "$0" -B -c "$1" --foreground "$2"'
    argv = ["sh", "-c", script, sys.executable, PROGRAM, host.config]
    done = subprocess.run(argv, env=host.environment, capture_output=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert b"Xen" in done.stderr or b"hypervisor" in done.stderr


def test_a_second_monitor_of_a_vm_is_refused(host):
    lock = os.open(host.sockets / f"lock-{host.uuid}", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, b"4711\n")
    for option in ((), ("--foreground",)):
        status, out, err = host.start(*option)
        assert (status, out) == (9, "")
        assert f"another monitor (process 4711) serves {host.uuid}" in err
        assert f"xenvm-cmd {host.uuid} status" in err
    assert os.listdir(host.sockets) == [f"lock-{host.uuid}"]
    os.close(lock)
    assert host.start()[0] == 1


def test_a_lock_that_was_removed_while_it_was_taken_is_none(tmp_path, monkeypatch):
    """Its last holder has ended between our opening it and our locking it; the next monitor must not find it free."""
    held = broker_host.take_lock(str(tmp_path), UUID.format(1))
    ended, flock = [], fcntl.flock

    def the_other_ends_first(descriptor, how):
        if not ended:
            ended.append(broker_host.release_lock(str(tmp_path), UUID.format(1), held))
        flock(descriptor, how)

    monkeypatch.setattr(broker_host.fcntl, "flock", the_other_ends_first)
    ours = broker_host.take_lock(str(tmp_path), UUID.format(1))
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        broker_host.take_lock(str(tmp_path), UUID.format(1))
    broker_host.release_lock(str(tmp_path), UUID.format(1), ours)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_monitor_left_is_no_hindrance(host):
    (host.sockets / f"lock-{host.uuid}").write_text("4711\n")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(host.sockets / f"vm-{host.uuid}"))
    stale.close()
    status, _, err = host.start()
    assert status == 1
    assert "another monitor" not in err


def test_a_lock_that_is_a_symbolic_link_is_not_followed(host):
    target = host.path / "target"
    target.write_text("keep me")
    link = host.sockets / f"lock-{host.uuid}"
    link.symlink_to(target)
    status, _, err = host.start()
    assert status == 1
    assert "Traceback" not in err
    assert target.read_text() == "keep me"
    link.unlink()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_socket_directory_that_others_can_change_is_refused(host, mode):
    host.sockets.chmod(mode)
    status, _, err = host.start()
    assert status == 1
    assert "only root can change" in err


def test_a_socket_directory_of_another_user_or_none_is_refused(host):
    os.chown(host.sockets, NOBODY, 0)
    assert "only root can change" in host.start()[2]
    os.chown(host.sockets, 0, 0)
    host.environment["XENVM_SOCKET_DIR"] = str(host.path / "none")
    status, _, err = host.start()
    assert status == 1
    assert "does not exist" in err
    assert "install-host" in err


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_a_log_that_is_no_file_is_refused(host, kind):
    output = host.path / "output"
    if kind == "link":
        output.symlink_to(host.path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(output)
    else:
        output.mkdir()
    host.write(f"output = {output}")
    status, _, err = host.start()
    assert status == 1
    assert f"{output}" in err
    assert "Traceback" not in err
    assert not (host.path / "elsewhere").exists()


def test_a_stop_while_it_starts_leaves_nothing(host):
    """The kernel is a file that cannot be opened before the lock is held, so the signal comes at any time."""
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        argv = [sys.executable, "-B", "-c", PROGRAM, "--foreground", str(host.config)]
        with subprocess.Popen(argv, env=host.environment, stderr=subprocess.PIPE) as broker:
            with contextlib.suppress(subprocess.TimeoutExpired):
                broker.wait(delay)
            broker.send_signal(signal.SIGTERM)
            broker.communicate(timeout=WAIT_S)
        _, alive = psutil.wait_procs(host.processes(), timeout=WAIT_S)
        assert alive == []
        for name in os.listdir(host.sockets):  # killed before it could tidy up; the next one is not hindered
            assert name in (f"lock-{host.uuid}", f"vm-{host.uuid}")
    assert host.start()[0] == 1
