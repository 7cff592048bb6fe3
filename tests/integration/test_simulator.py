# SPDX-License-Identifier: GPL-2.0-or-later
"""What only a simulated host shows: faults at an exact moment, hostile guests, floods, and how it is told from Xen."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from soak import memory_kib
from storewire import Wire
from vms import NOBODY, ROOT, SimulatedHost, json_of, kill, nothing_is_left, processes, run, until, vm  # noqa: F401

from xenvm.broker.actlog import read
from xenvm.errors import XenvmError
from xenvm.supervisor.control import CLIENTS_LIMIT, CLIENTS_PER_USER, REQUEST_LIMIT_BYTES

THOUSAND = 1000
ANSWERED_S = 1.0  # a command, whatever floods there are


@pytest.fixture(scope="module")
def host():
    made = SimulatedHost()
    yield made
    made.close()


@pytest.fixture(scope="module")
def root():
    """Descriptors and memory of processes that are not dumpable are shown to root alone; and root may be others too."""
    if os.geteuid():
        pytest.fail("this can be seen by root only: run the tests as root")


def builder_of(guest):
    """The builder that has a job."""
    return next((pid for pid, words in guest.host.processes().items() if "builder" in words and "-" not in words), 0)


def working(guest):
    """The builder of the running job, by the log of acts: it has greeted, and a job has no result yet."""
    records = list(read(str(guest.acts))) if guest.acts.exists() else []
    jobs = [record for record in records if record["act"] in ("job", "result")]
    greeted = [record["pid"] for record in records if record["act"] == "confined" and record["role"] == "builder"]
    return greeted[-1] if jobs and jobs[-1]["act"] == "job" and greeted else 0


# The start of a build, call by call: whichever the builder dies in, nothing stays; once the domain is whole, all does.
CALLS = ["info", "create", "prepare", "channel", "load"]


@pytest.mark.parametrize("call", CALLS)
def test_the_builder_dies_in_a_call_of_the_build(host, vm, call):  # noqa: F811
    host.slow(3000, [call])
    guest = vm()
    starting = guest.begin()
    until(lambda: working(guest), "a builder with a job", 30)
    time.sleep(0.5)
    kill(working(guest))
    host.slow(0)
    text = starting.communicate(timeout=60)[0]
    assert starting.returncode == 1, text
    assert "builder died of SIGKILL" in text
    until(lambda: guest.left() == [], f"nothing left of {guest.left()}", 10)
    guest.start()
    guest.up()


@pytest.mark.parametrize("call", ["unpause", "look"])
def test_the_builder_dies_when_the_domain_is_whole(host, vm, call):  # noqa: F811
    """It is ours, and runs or is let run: a start that ends so has succeeded."""
    host.slow(3000, [call])
    guest = vm()
    starting = guest.begin()
    if call == "look":
        until(lambda: guest.ticks(), "the guest runs", 30)
    until(lambda: b"built" in (host_record(host, guest) or b""), "the record says so", 10)
    kill(working(guest))
    host.slow(0)
    text = starting.communicate(timeout=60)[0]
    assert starting.returncode == 0, text
    assert guest.state == "running"
    guest.up()
    assert guest.boots() == 1


def host_record(host, guest):
    with Wire(host.store) as wire:
        return wire.value(f"/xenvm/{guest.uuid}/phase")


def test_two_starts_that_do_not_fit_together(host, vm):  # noqa: F811
    """Both find enough memory when they look; the one that comes late fails in words, and nothing of it is left."""
    host.slow(700, ["create"])
    guests = [vm(memory=160 << 10) for _ in range(2)]
    starting = [guest.begin() for guest in guests]
    texts = [one.communicate(timeout=60)[0] for one in starting]
    assert sorted(one.returncode for one in starting) == [0, 1], texts
    late = next(number for number, one in enumerate(starting) if one.returncode)
    assert f"{160 << 10} MiB of memory" in texts[late]
    until(lambda: guests[late].left() == [], "nothing is left of it", 10)
    assert guests[1 - late].state == "running"


# A start that somebody does not wait for


def test_a_start_that_is_interrupted_goes_on(host, vm):  # noqa: F811
    host.slow(1500, ["load"])
    guest = vm()
    starting = guest.begin()
    until(guest.socket.exists, "it is under way", 30)
    starting.send_signal(signal.SIGINT)
    text = starting.communicate(timeout=30)[0]
    assert starting.returncode == 130, text
    assert "the start goes on" in text
    assert "Traceback" not in text
    guest.until("running", 30)


def test_a_start_that_is_destroyed_is_no_success(host, vm):  # noqa: F811
    host.slow(5000, ["load"])
    guest = vm()
    starting = guest.begin()
    until(guest.socket.exists, "it is under way", 30)
    guest.cmd("destroy")
    text = starting.communicate(timeout=30)[0]
    assert starting.returncode == 3, text
    assert f"{guest.uuid}\n" in text
    assert "the guest does not run: destroyed while it was starting" in text
    assert guest.state == "shutdown"


# A guest that keeps its disk


def keeping(host, vm):  # noqa: F811
    disk = host.directory() / "a.img"
    disk.write_bytes(bytes(1 << 20))
    os.chmod(disk, 0o666)
    guest = vm(words="xenvm.keep=vbd", disk=f"{disk}:file:xvda:w:disk")
    guest.start()
    guest.up()
    return guest


def test_a_disk_that_is_kept_for_longer_than_one_worker_waits(host, vm):  # noqa: F811
    guest = keeping(host, vm)
    taking = guest.begin_cmd("disk-del", "xvda", "timeout=13")
    until(lambda: (guest.status()["busy"] or {}).get("command") == "disk-del", "it is under way", 10)
    assert "pause: busy with disk-del" in guest.cmd("pause", code=9).stderr
    text = taking.communicate(timeout=60)[0]
    assert (taking.returncode, "did not let go within" in text, "(of 13 s in all)" in text) == (7, True, True), text
    assert guest.cmd("disk-list").stdout.startswith("xvda")
    guest.cmd("disk-del", "xvda", "timeout=12", "force=true")
    assert guest.cmd("disk-list").stdout == ""
    guest.cmd("destroy")


def test_a_guest_that_reboots_while_it_keeps_a_disk(host, vm):  # noqa: F811
    guest = keeping(host, vm)
    first = guest.domid
    taking = guest.begin_cmd("disk-del", "xvda", "timeout=600")
    until(lambda: (guest.status()["busy"] or {}).get("command") == "disk-del", "it is under way", 10)
    host.machine.call("shutdown", domid=first, reason=1)
    until(lambda: (now := guest.status())["state"] == "running" and now["domid"] != first, "it runs anew", 40)
    text = taking.communicate(timeout=30)[0]
    assert (taking.returncode, "disk-del: the VM is rebooting" in text) == (5, True), text
    guest.cmd("destroy")


# Hostile guests, and floods


@pytest.mark.parametrize("words", ["xenvm.garbage=7", "xenvm.flood=200", "xenvm.garbage=3 xenvm.flood=100"])
def test_what_a_guest_writes_disturbs_nobody(host, vm, words):  # noqa: F811
    """Garbage in all of its nodes, more nodes than its quota, a console that never stops: commands take under 1 s.

    The quickest of three is looked at: a flood does not pause, what else this machine is doing does.
    """
    disk = host.directory() / "a.img"
    disk.write_bytes(bytes(1 << 20))
    os.chmod(disk, 0o666)
    guest = vm(words=words, tick_ms=50, disk=f"{disk}:file:xvda:w:disk", nic=f"bridge={host.bridge}")
    guest.start()
    guest.up()
    until(lambda: len(guest.ticks()) > 5, "it has begun")
    with guest.connect() as monitor:
        took = {}
        for method in 3 * ("status", "disk-list", "nic-list", "pause", "unpause"):
            begin = time.monotonic()
            monitor.call(method)
            took.setdefault(method, []).append(time.monotonic() - begin)
        assert max(map(min, took.values())) < ANSWERED_S, took
    guest.cmd("destroy")
    assert host.devices()["backends"] == []


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def private_kib(pid):
    return memory_kib(pid)[1]


def settled(guest):
    """The pid of the supervisor, how many descriptors it has when no client is there, and its memory."""
    guest.status()
    time.sleep(0.5)
    pid = guest.pids()["supervisor"]
    return pid, descriptors(pid), private_kib(pid)


@contextlib.contextmanager
def asking(guest):
    """Ask for the status all the while, as the administrator; none may fail, or take longer than it may."""
    took, answers, done = [], set(), threading.Event()

    def ask():
        while not done.is_set():
            begin = time.monotonic()
            try:
                answers.add(guest.state)
            except XenvmError as error:
                answers.add(error.message)
            took.append(time.monotonic() - begin)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert answers == {"running"}
    assert max(took) < ANSWERED_S


def connections(guest, count, body):
    """Connect so often, and send so much of a request each time."""
    made = [socket.socket(socket.AF_UNIX) for _ in range(count)]
    for one in made:
        one.connect(str(guest.socket))
        with contextlib.suppress(OSError):  # it was one too many, and has been closed
            one.send(body, socket.MSG_NOSIGNAL)
    return made


@contextlib.contextmanager
def connected(guest, count, body):
    """The same from a process of an ordinary user, which keeps them all open."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (2 * count, 2 * count))  # what is open here too counts
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            held = connections(guest, count, body)
            os.write(writable, str(len(held)).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writable)
    try:
        assert os.read(readable, 16) == str(count).encode()
        yield
    finally:
        os.close(readable)
        kill(child)
        os.waitpid(child, 0)


def test_a_thousand_clients_that_come_and_go(host, vm, root):  # noqa: F811
    """Connected, half a request, gone: the monitor answers others meanwhile, and keeps nothing of them."""
    guest = vm()
    guest.start()
    pid, idle, idle_kib = settled(guest)
    with asking(guest):
        for number in range(THOUSAND):
            for client in connections(guest, 1, b"\0\0\0\x40{" if number % 2 else b""):
                client.close()
    until(lambda: descriptors(pid) == idle, "nothing stays open", 10)
    assert private_kib(pid) - idle_kib < 1024
    assert guest.pids()["supervisor"] == pid


def test_a_thousand_clients_that_stay(host, vm, root):  # noqa: F811
    """A thousand connections of one user, and of root all that others do not need, each with a request that is almost as
    long as one can be and does not end: as many are served as may be, none is waited for, and a second crowd costs
    nothing more."""
    guest = vm()
    guest.start()
    pid, idle, idle_kib = settled(guest)
    body = REQUEST_LIMIT_BYTES.to_bytes(4, "big") + b" " * (REQUEST_LIMIT_BYTES - 1)
    number = CLIENTS_LIMIT - CLIENTS_PER_USER - 8  # whoever asks comes again before it is noticed that he has gone
    afterwards = []
    for last in (False, True):
        with connected(guest, THOUSAND, body):
            ours = connections(guest, number, body)
            with asking(guest):
                until(lambda: descriptors(pid) >= idle + CLIENTS_PER_USER + number, "they are served", 5)
                until(lambda: private_kib(pid) - idle_kib > number * 32, "they are read from", 5)
                assert descriptors(pid) <= idle + CLIENTS_LIMIT
                assert private_kib(pid) - idle_kib < CLIENTS_LIMIT * 2 * (REQUEST_LIMIT_BYTES >> 10)
                if last:
                    until(lambda: descriptors(pid) <= idle + 8, "what never ends was given up", 20)
            for one in ours:
                one.close()
        until(lambda: descriptors(pid) == idle, "nothing stays open", 10)
        afterwards.append(private_kib(pid))
    assert afterwards[0] - idle_kib < 8192
    assert afterwards[1] - afterwards[0] < 1024
    assert guest.pids()["supervisor"] == pid


def test_all_floods_at_once(host, vm, root):  # noqa: F811
    """The guest fills console and xenstore, udev tells of thousands of devices, nobody reads the events: a status takes
    less than a second all the while, and the memory of the monitor stays what it is."""
    guest = vm(words="xenvm.flood=100", tick_ms=40, nic=f"bridge={host.bridge}")
    guest.start()
    guest.up()
    lazy = [guest.connect() for _ in range(20)]
    for one in lazy:
        one.send("events", {})
    pids = {role: pid for role, pid in guest.pids().items() if role in ("broker", "supervisor", "watcher")}
    guest.ask("pause")
    guest.ask("unpause")
    before = {role: private_kib(pid) for role, pid in pids.items()}
    done = threading.Event()
    sent = []

    def tell():
        event = f"remove backend/vif/{guest.domid}/7 1".encode("ascii")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as told:
            while not done.is_set():
                try:
                    sent.append(told.sendto(event, str(host.sockets / f"domid-{guest.domid}")))
                except OSError:
                    time.sleep(0.001)  # the queue is full, as it is for the host's udev then

    telling = threading.Thread(target=tell)
    telling.start()
    try:
        with asking(guest):
            time.sleep(5)
    finally:
        done.set()
        telling.join()
    assert len(sent) > 1000
    assert guest.pids().items() >= pids.items()
    for role, pid in pids.items():
        assert private_kib(pid) < before[role] + 2048, role
    for one in lazy:
        one.close()


# How it is told from Xen


def test_it_is_said_at_the_start_what_is_not_in_force(host, vm):  # noqa: F811
    guest = vm()
    done = run(*host.program("xenvm", str(guest.file)), **host.options())
    assert done.returncode == 0
    assert "no Xen, no guest code is run" in done.stderr
    assert "not in force: users of their own and capabilities" in done.stderr
    proofs = [record for record in read(str(guest.acts)) if record["act"] == "confined"]
    for record in proofs:
        proof = json.loads(record["proof"]) if isinstance(record["proof"], str) else record["proof"]
        assert proof["no_new_privs"] is True
        assert proof["seccomp"] == 2
        assert proof["capabilities"]["CapEff"] == "0"
        assert proof["identity_changed"] is False
    for words in processes(str(host.sockets)).values():
        assert "--simulator" in words


def test_root_gets_no_simulated_host(root, tmp_path):
    code = "import sys; from xenvm.cli.xenvm import main; sys.exit(main())"
    config = tmp_path / "a.cfg"
    config.write_text("memory = 64\n")
    environment = {"XENVM_SOCKET_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = run(sys.executable, "-B", "-c", code, "--simulator", str(config), env=environment)
    assert done.returncode == 8
    assert "not for root" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.cfg"]


def test_monitors_of_xen_refuse_its_directory(host, vm, root):  # noqa: F811
    """Each kind keeps to its own directories, so that no uuid has two monitors that do not know of each other."""
    guest = vm()
    code = "import sys; from xenvm.cli.xenvm import main; sys.exit(main())"
    environment = {**host.options()["env"], "XENVM_SOCKET_DIR": str(host.sockets)}
    done = run(sys.executable, "-B", "-c", code, str(guest.file), env=environment)
    assert done.returncode == 1
    assert "not a directory that only root can change" in done.stderr
    options = host.options()
    options["env"] = {**options["env"], "XENVM_SOCKET_DIR": "/run/xenvm"}
    done = run(*host.program("xenvm", str(guest.file)), **options)
    assert done.returncode == 1
    assert "for the monitors of Xen's guests" in done.stderr


def test_neither_config_nor_command_nor_environment_leads_to_it(host, vm):  # noqa: F811
    guest = vm(simulator="true")
    assert "simulator" in guest.start(code=6).stderr
    guest = vm()
    code = "import sys; from xenvm.cli.xenvm import main; sys.exit(main())"
    options = host.options()
    options["env"] = {**options["env"], "XENVM_SIMULATOR": "1"}
    done = run(sys.executable, "-B", "-c", code, str(guest.file), **options)
    assert done.returncode == 8
    assert "needs root" in done.stderr
    guest.start()
    refused = guest.cmd("simulator", code=2).stderr
    assert "simulator" in refused


def test_what_needs_a_real_kernel_is_refused(host, vm):  # noqa: F811
    disk = host.directory() / "a.qcow2"
    disk.write_bytes(b"QFI\xfb" + bytes(1 << 16))
    os.chmod(disk, 0o666)
    guest = vm(disk=f"{disk}:qcow:xvda:w:disk")
    assert "a simulated host has neither nbd nor dm-crypt" in guest.start(code=1).stderr
    until(lambda: guest.left() == [], "nothing is left", 10)


def test_the_host_ends_when_nobody_needs_it_any_more(tmp_path_factory):
    made = SimulatedHost()
    try:
        made.machine.close()
        assert made.process.wait(timeout=30) == 0
        assert sorted(path.name for path in made.sockets.iterdir()) == ["console", "log"]
    finally:
        made.close()


def test_many_first_starts_at_once_make_one_host():
    """Some of them find a host that is just being made, or one that is just ending: all of them serve in the end."""
    code = (
        "import sys; from xenvm.cli import simulator; place = simulator.prepare();"
        "from xenvm.simulator.client import Machine;"
        "print(Machine(place.machine).call('list'), open(place.simulator + '/simulator').read())"
    )
    host = SimulatedHost()
    directory = host.directory()
    environment = {"XENVM_SOCKET_DIR": str(directory), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    words = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    try:
        for _ in range(3):
            starting = [subprocess.Popen([sys.executable, "-c", code], **words, **host._user()) for _ in range(8)]
            told = {one.communicate(timeout=60) for one in starting}
            assert {one.returncode for one in starting} == {0}, told
            assert len({out for out, _ in told}) == 1, told  # the same host
            pid = int(next(iter(told))[0].split()[-1])
            os.kill(pid, signal.SIGTERM)  # and without waiting for its end, the next
    finally:
        until(lambda: not (directory / "simulator").exists(), "it has ended", 30)
        host.close()


def test_foreground_and_a_second_start(host, vm):  # noqa: F811
    guest = vm()
    running = subprocess.Popen(
        host.program("xenvm", "--foreground", str(guest.file)), stderr=subprocess.DEVNULL, **host.options()
    )
    until(lambda: guest.socket.exists() and guest.state == "running", "it runs", 30)
    assert guest.start(code=9).returncode == 9
    assert json_of(guest.cmd("--json", "status"))["state"] == "running"
    guest.cmd("quit")
    assert running.wait(timeout=30) == 0
    guest.start()  # adopts
    assert guest.boots() == 1


def test_the_audit_knows_a_simulated_host(host, vm, root):  # noqa: F811
    """For root every process fits its row, apart from what is said to be not in force. Others are refused."""
    guest = vm()
    guest.start()
    guest.cmd("pause")
    guest.cmd("unpause")
    done = host.run("xenvm-audit", guest.uuid)
    assert done.returncode == 8  # it was not root that asked
    options = {**host.options(), "user": 0, "group": 0}
    done = run(*host.program("xenvm-audit", guest.uuid), **options)
    assert done.stdout.startswith(f"simulated host in {host.sockets}: one user for all processes, no capabilities\n")
    assert done.returncode == 0, done.stdout
    assert "0 differences" in done.stdout
    assert host.run("xenvm-audit", "verify", guest.uuid).returncode == 0


def test_a_killed_monitor_leaves_no_socket_for_good(host, vm):  # noqa: F811
    """Its domain is gone when the next one starts, so that nobody could know which number the socket was named by."""
    guest = vm()
    guest.start()
    domid = guest.domid
    assert (host.sockets / f"domid-{domid}").exists()
    kill(guest.broker())
    until(lambda: not host.processes(), "its processes have ended", 20)
    host.destroy(domid)
    guest.write(startup="shutdown")
    guest.start()
    assert not (host.sockets / f"domid-{domid}").exists()
