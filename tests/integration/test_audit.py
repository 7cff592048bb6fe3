# SPDX-License-Identifier: GPL-2.0-or-later
"""The audit of real processes, confined by the real rows, and of processes that deviate in one respect. Needs root.

The monitor here consists of a broker and its children that do nothing but confine themselves and wait. What deviates
is a few lines of Python which such a process runs before or after it confines itself.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from xenvm._confine import lib
from xenvm.boundary import spawn
from xenvm.boundary.privileges import PRIVCMD, TABLE, Landlock, Role, markdown_table
from xenvm.broker.actlog import ActLog
from xenvm.cli import acts as acts_module
from xenvm.cli import audit as audit_module
from xenvm.cli import compare, live
from xenvm.cli.audit import Host, audit, expected, identity, main
from xenvm.cli.client import NoMonitorError
from xenvm.cli.live import Descriptor
from xenvm.errors import PermissionRefusedError, UsageError, XenvmError

UUID = "6f1d0a3e-52c7-4b0e-9a55-0d3c1b7e8f21"
OTHER = "6f1d0a3e-0000-4b0e-9a55-0d3c1b7e8f21"
WAIT_S = 30


def differences(row, process, proof, fits):
    """The properties in which a process differs from its row."""
    return [line for line in compare.lines(row, process, proof, fits) if line.differs]


# Nobody's: no process confined here needs an entry in /etc/passwd.
IDS = {
    "xenvm": (64017, 64018),
    "xenvm-watch": (64019, 64020),
    "xenvm-parse": (64021, 64022),
    "xenvm-build": (64023, 64024),
    "xenvm-hotplug": (64025, 64026),
    "xenvm-network": (64027, 64028),
    "xenvm-image": (64029, 64030),
    "xenvm-unpack": (64031, 64032),
    "xenvm-stream": (64033, 64034),
    "xenvm-qmp": (64035, 64036),
}
LANDLOCK = {"Landlock"} if lib.xenvm_landlock_abi() else set()

# Stands where _start.py stands in an installation; the audit knows processes by that name.
START = f"""
import sys
sys.path[:0] = {[str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]!r}
import ctypes, json, os, select, socket, subprocess, threading, time
import prctl
from xenvm.boundary import confine as module, spawn
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Hello
from xenvm.boundary.privileges import TABLE, Landlock, Role
from xenvm.broker import host
from xenvm.broker.actlog import ActLog
from xenvm.broker.children import Child

spawn._START = os.path.abspath(__file__)
here = os.path.dirname(spawn._START)
spec = json.load(open(here + "/spec.json"))
uuid, ids = spec["uuid"], spec["ids"]
role = Role(sys.argv[1])
row, keep = TABLE[role], set(TABLE[role].descriptors)
uid, gid = ids[row.user] if row.user else (None, None)
before, after = (compile(spec[when].get(role.value, ""), when, "exec") for when in ("before", "after"))
nothing = lambda *_, **__: None
hello = True

def connected(path, kind=socket.SOCK_STREAM):
    client = socket.socket(socket.AF_UNIX, kind)
    client.connect(path)
    keep.add(client.fileno())
    return client

def opened(path, flags=os.O_RDONLY):
    descriptor = os.open(path, flags)
    keep.add(descriptor)
    return descriptor

def child(role, argument=uuid):
    extra = {{Role.SUPERVISOR: {{4: listener.fileno(), 5: one.fileno()}}, Role.WATCHER: {{4: other.fileno()}},
             Role.PARSER: {{4: image, 5: image}}}}.get(role, {{}})
    more = ("unpack",) if role is Role.UNPACKER else ()
    children.append(Child(role, log, extra, argument, *more))

def hear(child):
    greeting = child.channel.receive(deadline_s={WAIT_S})
    if greeting and greeting[0].proof != "none":
        acts.append("confined", role=greeting[0].role, pid=greeting[0].pid, proof=greeting[0].proof)

if role is Role.BROKER:
    launcher = socket.socket(fileno=3)
    lock = host.take_lock(here, uuid)
    listener = host.listen(here, uuid)
    log = os.open(spec["output"] or here + f"/{{uuid}}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    os.dup2(log, 1)
    os.dup2(log, 2)
    image = os.open(__file__, os.O_RDONLY)
    acts = ActLog(here + f"/{{uuid}}.acts")
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keep |= {{3, lock, listener.fileno(), log, image, acts._descriptor, one.fileno(), other.fileno()}}
    exec(before)
    proof = module.confine(row, uid=uid, gid=gid, keep=frozenset(keep))
    acts.append("confined", role="broker", pid=os.getpid(), proof=proof.as_dict())
    acts.append("sealed", grants={{"output": spec["output"]}})
    children = []
    roles = [each for each in Role if each not in (Role.BROKER, Role.SIMULATOR)]
    exec(after)
    for name in roles:
        child(name)
    for each in children:
        hear(each)
    launcher.send(b"ready")
    select.poll().poll()
channel = Channel.from_descriptor(3)
exec(before)
proof = module.confine(row, uid=uid, gid=gid, keep=frozenset(keep)).as_dict()
exec(after)
channel.send(Hello(role.value, os.getpid(), json.dumps(proof) if hello else "none"))
poll = select.poll()
poll.register(channel, select.POLLIN)
poll.poll()
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A deviation of these processes does not go away by waiting."""
    monkeypatch.setattr(audit_module, "STARTING_S", 0.0)
    monkeypatch.setattr(audit_module, "RESTART_S", 0.05)
    monkeypatch.setattr(audit_module, "AGAIN_S", 0.01)


def end(pid):
    """End a child, if it has not been already."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


ROLES = [role for role in Role if role is not Role.SIMULATOR]  # what a monitor is made of


class Monitor:
    def __init__(self, directory):
        self.directory = directory
        self.start = str(Path(directory, "_start.py"))
        self.spec = {"uuid": UUID, "ids": IDS, "output": "", "before": {}, "after": {}}
        Path(self.start).write_text(START)
        self.host = Host(directory, directory, self.identity, self.command)

    @staticmethod
    def identity(user):
        return (0, 0) if user is None else IDS[user]

    def command(self, role):
        return [sys.executable, "-I", "-S", "-B", self.start, role.value]

    @contextlib.contextmanager
    def running(self, before=None, after=None, output=""):
        spec = self.spec | {"output": output}
        for when, code in (("before", before or {}), ("after", after or {})):
            spec[when] = {role.value: textwrap.dedent(body) for role, body in code.items()}
        Path(self.directory, "spec.json").write_text(json.dumps(spec))
        ours, theirs = socket.socketpair()
        ours.settimeout(WAIT_S)
        errors = Path(self.directory, "errors")
        with errors.open("w") as stream, open(os.devnull) as null, theirs:
            descriptors = {0: null.fileno(), 1: stream.fileno(), 2: stream.fileno(), 3: theirs.fileno()}
            with mock.patch.object(spawn, "_START", self.start):
                broker = spawn.spawn(Role.BROKER, descriptors, "-", self.directory, "background", "")
        try:
            told = ours.recv(10)
            log = Path(self.directory, f"{UUID}.log")
            assert told == b"ready", errors.read_text() + (log.read_text() if log.exists() else "")
            yield broker
        finally:
            ours.close()
            end(broker)

    def differences(self):
        """Audit, and give the names of what differs by role."""
        found = audit(self.host, UUID)
        return {
            one.role or "monitor": {line.name for line in one.lines if line.differs} for one in found if one.differences
        }


@pytest.fixture
def monitor():
    # A short path: the address of a unix socket has room for 107 bytes.
    directory = tempfile.mkdtemp()
    yield Monitor(directory)
    shutil.rmtree(directory)


@pytest.fixture
def store(monitor):
    """A listener where xenstored's would be."""
    Path(monitor.directory, "xenstored").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{monitor.directory}/xenstored/socket")
        listener.listen()
        yield listener


# -- what fits ------------------------------------------------------------------------------------------------------


def test_processes_that_equal_their_rows_show_no_difference(monitor, store):
    connect = "connected(here + '/xenstored/socket')"
    before = dict.fromkeys((Role.WATCHER, Role.BUILDER, Role.HOTPLUG), connect)
    route = "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); keep.add(s.fileno())"
    with monitor.running(before=before | dict.fromkeys((Role.NETWORK, Role.STORAGE), route)):
        found = audit(monitor.host, UUID)
    assert {one.role for one in found} == set(ROLES)
    assert [(one.role, line) for one in found for line in one.lines if line.differs] == []
    names = {line.name for one in found for line in one.lines}
    assert {
        "program",
        "uid",
        "CapBnd",
        "filters",
        "limit NPROC",
        "descriptor 3",
        "hypervisor",
        "proof",
        "Landlock",
    } <= names


def test_the_log_may_be_elsewhere(monitor):
    with monitor.running(output=f"{monitor.directory}/elsewhere"):
        assert monitor.differences() == {}
        os.rename(f"{monitor.directory}/elsewhere", f"{monitor.directory}/elsewhere.1")
        assert monitor.differences() == {}
        os.unlink(f"{monitor.directory}/elsewhere.1")
        assert monitor.differences() == {}


def test_a_process_may_take_its_time_to_confine_itself(monitor, monkeypatch):
    late = "while sys.argv[2] == '-' and not os.path.exists(here + '/go'):\n    time.sleep(0.05)"
    code = "child(Role.BUILDER, '-'); late = children.pop()\nthreading.Thread(target=lambda: hear(late)).start()"
    with monitor.running(before={Role.BUILDER: late}, after={Role.BROKER: code}):
        assert {"uid", "proof"} <= monitor.differences()[Role.BUILDER]
        monkeypatch.setattr(audit_module, "STARTING_S", float(WAIT_S))
        threading.Timer(0.5, Path(monitor.directory, "go").touch).start()
        found = audit(monitor.host, UUID)  # the thread ends, too
    assert len(found) == len(ROLES) + 1
    assert sum(one.differences for one in found) == 0


def test_clients_of_the_monitor_are_no_difference(monitor):
    # The client has a name of its own, which shows as the peer of the accepted socket.
    accept = """
    listener = socket.socket(fileno=os.dup(4))
    select.select([listener], [], [])
    served = listener.accept()[0]
    served.send(b"served")
    """
    greet = "channel.send(Hello('supervisor', os.getpid(), json.dumps(proof)))"
    with (
        monitor.running(after={Role.SUPERVISOR: greet + textwrap.dedent(accept)}),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(WAIT_S)
        client.bind(f"{monitor.directory}/client")
        client.connect(f"{monitor.directory}/vm-{UUID}")
        assert client.recv(10) == b"served"
        assert monitor.differences() == {}


# -- one thing differs ----------------------------------------------------------------------------------------------

KEEP_CAPABILITY = """
row = row.but(capabilities=frozenset({"CAP_KILL"}))
prctl.set_keepcaps, keepcaps = (lambda _: keepcaps(1)), prctl.set_keepcaps
module._compare = module.probe_capabilities = nothing
module.probe_identity = lambda: ()
"""
DEVIATIONS = {
    "extra capability": (Role.WATCHER, KEEP_CAPABILITY, "", {"CapPrm", "CapEff", "CapBnd"}),
    "bounding set": (Role.SUPERVISOR, "module._cut_bounding = module._compare = nothing", "", {"CapBnd"}),
    "fewer capabilities": (
        Role.BROKER,
        "row = row.but(capabilities=row.capabilities - {'CAP_KILL'})",
        "",
        {"CapPrm", "CapEff", "CapBnd"},
    ),
    "uid": (Role.SUPERVISOR, "uid += 100", "", {"uid"}),
    "gid": (Role.BUILDER, "gid += 100", "", {"gid"}),
    "group": (
        Role.WATCHER,
        "os.setgroups, setgroups = (lambda _: setgroups([4])), os.setgroups\nmodule._compare = nothing",
        "",
        {"groups"},
    ),
    "inet socket": (Role.SUPERVISOR, "s = socket.socket(); keep.add(s.fileno())", "", {"socket families"}),
    "inet6 socket": (
        Role.WATCHER,
        "s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); keep.add(s.fileno())",
        "",
        {"socket families"},
    ),
    "netlink socket": (
        Role.BUILDER,
        "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); keep.add(s.fileno())",
        "",
        {"socket families"},
    ),
    "netlink socket of a hotplug worker": (
        Role.HOTPLUG,
        "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); keep.add(s.fileno())",
        "",
        {"socket families"},
    ),
    "inet socket of a network worker": (
        Role.NETWORK,
        "s = socket.socket(); keep.add(s.fileno())",
        "",
        {"socket families"},
    ),
    "xenstore of a network worker": (Role.NETWORK, "s = connected(here + '/xenstored/socket')", "", {"xenstored"}),
    "xenstore of an image worker": (Role.IMAGE, "s = connected(here + '/xenstored/socket')", "", {"xenstored"}),
    "xenstore of a storage worker": (Role.STORAGE, "s = connected(here + '/xenstored/socket')", "", {"xenstored"}),
    "a second capability": (
        Role.NETWORK,
        "row = row.but(capabilities=row.capabilities | {'CAP_SYS_ADMIN'})",
        "",
        {"CapPrm", "CapEff", "CapBnd"},
    ),
    "no landlock of an image worker": (Role.IMAGE, "row = row.but(landlock=Landlock.UNRESTRICTED)", "", LANDLOCK),
    "xenstore": (Role.SUPERVISOR, "s = connected(here + '/xenstored/socket')", "", {"xenstored"}),
    "xenstore of the broker": (Role.BROKER, "s = connected(here + '/xenstored/socket')", "", {"xenstored"}),
    "another server": (Role.WATCHER, "s = connected(here + '/vm-' + uuid)", "", {"other servers"}),
    "no seccomp filter": (
        Role.SUPERVISOR,
        "module._install_filter = nothing; module.probe_calls = lambda: ()",
        "",
        {"filters"},
    ),
    "another limit": (Role.WATCHER, "row = row.but(limits={**row.limits, 'NPROC': 5})", "", {"limit NPROC"}),
    "no limit": (
        Role.SUPERVISOR,
        "row = row.but(limits={n: v for n, v in row.limits.items() if n != 'FSIZE'})",
        "",
        {"limit FSIZE"},
    ),
    "a lower limit": (Role.SUPERVISOR, "row = row.but(limits={**row.limits, 'FSIZE': 1 << 20})", "", set()),
    "no landlock": (Role.WATCHER, "row = row.but(landlock=Landlock.UNRESTRICTED)", "", LANDLOCK),
    "a file": (Role.WATCHER, "opened('/etc/passwd')", "", {"other descriptors"}),
    "the act log": (
        Role.SUPERVISOR,
        "opened(here + '/' + uuid + '.acts', os.O_WRONLY)",
        "",
        {"other descriptors"},
    ),
    "a device": (Role.BUILDER, "opened('/dev/zero')", "", {"other descriptors"}),
    "a pipe": (Role.SUPERVISOR, "keep |= set(os.pipe())", "", {"other descriptors"}),
    "a directory": (Role.BUILDER, "opened('/')", "", {"other descriptors"}),
    "a terminal": (Role.WATCHER, "keep |= set(os.openpty()[1:])", "", {"other descriptors"}),
    "files where they may be": (Role.SUPERVISOR, "opened('/etc/passwd'); keep |= set(os.openpty()[1:])", "", set()),
    "a closed descriptor": (Role.SUPERVISOR, "", "os.close(5)", {"descriptor 5"}),
    "a descriptor of the wrong kind": (Role.WATCHER, "", "os.dup2(3, 0, inheritable=False)", {"descriptor 0"}),
    "a log that is not the log": (
        Role.WATCHER,
        "os.dup2(os.open(here + '/other.log', os.O_CREAT | os.O_WRONLY), 1)",
        "",
        {"descriptor 1"},
    ),
    "a thread": (
        Role.BROKER,
        "",
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        {"threads"},
    ),
    "no greeting": (Role.BUILDER, "", "hello = False", {"proof"}),
    "a lie": (Role.BUILDER, "", "proof['uid'] = 5", {"proof"}),
    "no probe of landlock": (
        Role.BUILDER,
        "",
        "proof['probes'].pop('open / under Landlock', 0)",
        LANDLOCK,
    ),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_exactly_the_deviation_is_reported(name, monitor, store):
    role, before, after, names = DEVIATIONS[name]
    with monitor.running(before={role: before}, after={role: after}):
        assert monitor.differences() == ({role: names} if names else {})


def test_what_serves_an_image_is_measured_by_the_row_it_inherits(monitor):
    """While its worker lives it is a child of the monitor; a program of others, it greets nobody."""
    start = "server = subprocess.Popen(['/usr/bin/qemu-storage-daemon'], close_fds=True)"
    for before, found in (("", {}), ("row = row.but(limits={'CORE': 0})", {Role.IMAGE: {"limit NOFILE"}})):
        with monitor.running(before={Role.IMAGE: before}, after={Role.IMAGE: start}):
            servers = [one for one in audit(monitor.host, UUID) if one.role is Role.IMAGE]
            differs = monitor.differences()
            pids = [one.process.pid for one in servers if one.process.program == audit_module.IMAGE_SERVER]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert (len(servers), len(pids), differs) == (2, 1, found)


def test_the_connection_to_a_served_image_belongs_to_those_who_pass_it_on(supervisor):
    row, process, proof, fits = supervisor
    served = Descriptor(40, "socket", "socket:[1]", "UNIX-STREAM", "", f"/run/xenvm/image-{UUID}-51712")
    held = process.but(descriptors=(*process.descriptors, served))
    assert [line.name for line in differences(row, held, proof, fits)] == ["other servers"]
    for role in (Role.BROKER, Role.IMAGE, Role.STORAGE):
        assert differences(row.but(role=role), held, proof.but(role=role.value), fits) == []
        other = process.but(descriptors=(*process.descriptors, served.but(peer=f"/run/xenvm/image-{OTHER}-51712")))
        assert [line.name for line in differences(row.but(role=role), other, proof.but(role=role.value), fits)] == [
            "other servers"
        ]


def test_a_connection_is_reported_when_xenstored_has_accepted_it_too(monitor, store):
    with monitor.running(before={Role.PARSER: "s = connected(here + '/xenstored/socket')"}), store.accept()[0]:
        found = {one.role: one.lines for one in audit(monitor.host, UUID)}[Role.PARSER]
    [line] = [line for line in found if line.name == "xenstored"]
    assert line.differs
    assert line.process.endswith(f" {monitor.directory}/xenstored/socket")


def test_a_broker_without_a_filter_shows_in_all(monitor):
    with monitor.running(before={Role.BROKER: "module._install_filter = module._compare = nothing"}):
        found = monitor.differences()
    assert found == {Role.BROKER: {"seccomp", "filters"}} | {
        role: {"filters"} for role in ROLES if role is not Role.BROKER
    }


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("roles.append(Role.WATCHER)", {"monitor": {"watcher"}}),
        ("roles.remove(Role.SUPERVISOR)", {"monitor": {"supervisor"}}),
        ("roles.remove(Role.BUILDER)", {}),
        ("s = subprocess.Popen(['/bin/sleep', '60'])", {"monitor": {"role"}}),
        ("roles.remove(Role.WATCHER); child(Role.WATCHER, 'another')", {Role.WATCHER: {"program"}}),
        ("child(Role.BUILDER, '-'); roles.remove(Role.BUILDER)", {}),
        (
            "spawn._START = __file__ = '/' + here + '/_start.py'",
            {role: {"program"} for role in ROLES if role is not Role.BROKER},
        ),
        (
            "acts._number += 1",
            {"monitor": {"act log"}}
            | {role: {"proof"} | LANDLOCK - {"Landlock"} for role in ROLES if role is not Role.BROKER},
        ),
    ],
)
def test_a_family_that_deviates(code, found, monitor):
    with monitor.running(after={Role.BROKER: code}):
        assert monitor.differences() == found


def test_filters_of_a_service_manager_do_not_stand_for_ones_own(monitor):
    twice = "prctl.set_no_new_privs(1)\nmodule._install_filter(row)"
    with monitor.running(before={Role.BROKER: twice}):
        assert monitor.differences() == {}
    none = "module._install_filter = nothing; module.probe_calls = lambda: ()"
    with monitor.running(before={Role.BROKER: twice, Role.WATCHER: none}):
        assert monitor.differences() == {Role.WATCHER: {"filters"}}


def test_the_holder_of_the_lock_is_a_broker(monitor):
    with Path(monitor.directory, f"lock-{UUID}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        [line] = audit(monitor.host, UUID)[0].lines
    assert (line.name, line.table, line.differs) == ("role", "broker", True)


def test_a_child_of_a_child_is_found(monitor):
    fork = "if os.fork() == 0:\n    os.execv('/bin/sleep', ['sleep', '60'])"
    with monitor.running(before={Role.WATCHER: fork}):
        assert monitor.differences()["monitor"] == {"role"}


# -- what no process here can be brought to -------------------------------------------------------------------------


@pytest.fixture
def supervisor(monitor):
    """A real supervisor: its row, what the kernel shows, its proof, and what is expected of it."""
    with monitor.running():
        [one] = [one for one in audit(monitor.host, UUID) if one.role is Role.SUPERVISOR]
        acts = acts_module.read_acts(f"{monitor.directory}/{UUID}.acts")
        row = TABLE[Role.SUPERVISOR]
        yield row, one.process, one.proof, expected(monitor.host, UUID, row, acts, 1)


@pytest.mark.parametrize("device", [PRIVCMD, "/dev/xen/hypercall"])
def test_only_a_builder_may_hold_the_hypervisor(supervisor, device):
    row, process, proof, fits = supervisor
    held = process.but(descriptors=(*process.descriptors, Descriptor(40, device, device)))
    assert [line.name for line in differences(row, held, proof, fits)] == ["hypervisor"]
    generous = row.but(extra_descriptors=row.extra_descriptors | {device})
    assert [line.name for line in differences(generous, held, proof, fits)] == ["hypervisor"]
    builder = row.but(role=Role.BUILDER, extra_descriptors=row.extra_descriptors | {device})
    assert [line.name for line in differences(builder, held, proof.but(role="builder"), fits)] == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"no_new_privs": False}, ["no_new_privs", "proof"]),
        ({"seccomp": 0}, ["seccomp", "proof"]),
        ({"uids": (64017, 64017, 0, 64017)}, ["uid"]),
        ({"gids": (64018, 64018, 64018, 0)}, ["gid"]),
        ({"capabilities": (1, 0, 0, 0, 0)}, ["CapInh", "proof"]),
        ({"capabilities": (0, 0, 0, 0, 1 << 21)}, ["CapAmb", "proof"]),
        ({"capabilities": (0, 0, 0, 1 << 63, 0)}, ["CapBnd", "proof"]),
    ],
)
def test_what_the_kernel_would_show(supervisor, changes, names):
    row, process, proof, fits = supervisor
    changed = process.but(status=process.status.but(**changes))
    assert [line.name for line in differences(row, changed, proof, fits)] == names


def test_small_print(supervisor):
    row, process, proof, fits = supervisor
    assert differences(row, process, proof, fits) == []
    assert differences(row, process.but(filters=None), proof, fits) == []
    assert [x.name for x in differences(row, process.but(program="/bin/sh"), proof, fits)] == ["program"]
    assert [x.name for x in differences(row, process.but(arguments=()), proof, fits)] == ["program"]
    elsewhere = Descriptor(40, "socket", "socket:[1]", "UNIX", "", live.UNKNOWN_PEER)
    assert [
        x.name for x in differences(row, process.but(descriptors=(*process.descriptors, elsewhere)), proof, fits)
    ] == ["other servers"]
    unlimited = {**process.limits, "CORE": -1}
    assert [x.process for x in differences(row, process.but(limits=unlimited), proof, fits)] == ["unlimited"]
    free = row.but(landlock=Landlock.UNRESTRICTED)
    assert {x.name for x in differences(free, process, proof, fits)} == LANDLOCK


def test_capabilities_have_their_names(supervisor):
    row, process, proof, fits = supervisor
    held = process.but(status=process.status.but(capabilities=(0, 0, 0, 0b100111 | 1 << 63, 0)))
    [bounding, _] = differences(row, held, proof, fits)
    assert (bounding.name, bounding.table) == ("CapBnd", "none")
    assert bounding.process == "CAP_63 CHOWN DAC_OVERRIDE DAC_READ_SEARCH KILL"


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100000, '{"capabilities": 5}', 7, None, {"role": "x"}])
def test_a_proof_that_is_none(text):
    assert acts_module.proof_of(text) is None


def test_a_socket_of_another_network_name_space_has_an_unknown_peer(monitor):
    code = "one, other = socket.socketpair(); print(1, flush=True); input()"
    unshare = "import ctypes; assert ctypes.CDLL(None).unshare(0x40000000) == 0; import socket; "
    child = subprocess.Popen([sys.executable, "-c", unshare + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        peers = [d.peer for d in live.look(child.pid).descriptors if d.kind == "socket"]
    finally:
        child.communicate(b"\n", timeout=WAIT_S)
    assert peers == [live.UNKNOWN_PEER] * 2


def test_abstract_names_are_shown():
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(f"\0xenvm-test-{os.getpid()}")
        server.listen()
        client.connect(server.getsockname())
        names = {d.number: (d.name, d.peer) for d in live.look(os.getpid()).descriptors if d.kind == "socket"}
    assert (f"@xenvm-test-{os.getpid()}", "") in names.values()
    assert ("", f"@xenvm-test-{os.getpid()}") in names.values()


def test_a_process_that_has_ended_is_gone():
    child = subprocess.Popen(["/bin/true"])
    while Path(f"/proc/{child.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    with pytest.raises(live.GoneError):
        live.look(child.pid)
    child.wait()
    with pytest.raises(live.GoneError):
        live.look(child.pid)
    with pytest.raises(live.GoneError):
        live.processes(child.pid)


# -- which monitor --------------------------------------------------------------------------------------------------


def test_a_lock_that_nobody_holds_is_no_monitor(tmp_path):
    with pytest.raises(NoMonitorError):
        live.find_broker(str(tmp_path), UUID)
    lock = tmp_path / f"lock-{UUID}"
    lock.write_text(f"{os.getpid()}\n")
    with pytest.raises(NoMonitorError):
        live.find_broker(str(tmp_path), UUID)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert live.find_broker(str(tmp_path), UUID) == os.getpid()


def test_a_lock_without_a_number_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "PID_WAIT_S", 0.1)
    with (tmp_path / f"lock-{UUID}").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(XenvmError, match="names no process"):
            live.find_broker(str(tmp_path), UUID)


def test_a_prefix_stands_for_one_monitor(tmp_path):
    for uuid in (UUID, OTHER):
        (tmp_path / f"lock-{uuid}").touch()
    assert live.find_uuid(str(tmp_path), "6F1D0A3E-5") == UUID
    assert live.find_uuid(str(tmp_path), UUID.upper()) == UUID
    with pytest.raises(UsageError) as several:
        live.find_uuid(str(tmp_path), "6f1d")
    assert several.value.hint == f"give one of: {OTHER} {UUID}"
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(NoMonitorError):
            live.find_uuid(str(directory), "7")


def test_a_user_that_is_missing_is_told():
    assert identity(None) == (0, 0)
    assert identity("daemon") == (1, 1)
    with pytest.raises(XenvmError, match="the user nobody-of-this-name does not exist"):
        identity("nobody-of-this-name")


def test_a_monitor_that_ends_meanwhile_is_none(monitor, monkeypatch):
    with monitor.running() as broker:
        monkeypatch.setattr(audit_module, "read_acts", lambda _: end(broker))
        with pytest.raises(NoMonitorError):
            audit(monitor.host, UUID)


def test_only_root_may_look(monkeypatch, tmp_path):
    monkeypatch.setattr(audit_module.os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionRefusedError):
        audit(Host(str(tmp_path)), UUID)


# -- the program ----------------------------------------------------------------------------------------------------


def test_the_program_prints_row_and_process_side_by_side(monitor, capfd):
    with monitor.running(before={Role.WATCHER: "uid += 100"}):
        assert main(["6f1d", "-v"], monitor.host) == 1
        text = capfd.readouterr().out
        assert main([UUID, "--json"], monitor.host) == 1
        told = json.loads(capfd.readouterr().out)
    rows = [line.split() for line in text.splitlines()]
    assert ["uid", "64019", "(xenvm-watch)", "64119", "DIFFERS"] in rows
    assert ["tried", "execve", "EPERM"] in rows
    assert rows[-1] == [str(len(ROLES)), "processes,", "1", "differences"]
    assert (told["uuid"], told["processes"], told["differences"]) == (UUID, len(ROLES), 1)
    [differing] = [p for one in told["audited"] for p in one["properties"] if p["differs"]]
    assert differing == {"name": "uid", "table": "64019 (xenvm-watch)", "process": "64119", "differs": True}


def test_the_program_is_content_with_what_fits(monitor, capfd):
    with monitor.running():
        assert main([UUID], monitor.host) == 0
        assert capfd.readouterr().out.endswith(f"{len(ROLES)} processes, 0 differences\n")
    assert main([UUID], monitor.host) == 4
    assert "no monitor runs" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["a", "b"], ["verify", "a", "b"], ["table", "a"], ["--wrong"], [""], ["--json", "a", "b"]]
)
def test_a_wrong_command_line_is_refused(words, capfd):
    assert main(words) == 2
    assert "hint" in "".join(capfd.readouterr())


def test_what_needs_no_monitor(capfd, tmp_path, monkeypatch):
    assert main(["table"]) == 0
    assert capfd.readouterr().out == markdown_table()
    assert main(["--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: xenvm-audit")
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("xenvm-audit ")
    monkeypatch.setenv("XENVM_SOCKET_DIR", str(tmp_path))
    assert main(["abc"]) == 4


def test_verify_prints_the_head(tmp_path, capfd):
    host = Host(str(tmp_path), str(tmp_path))
    for uuid in (UUID, OTHER):
        ActLog(f"{tmp_path}/{uuid}.acts").append("job", op="find")
    with Path(f"{tmp_path}/{OTHER}.acts").open("a") as log:
        log.write('{"n"')
    ActLog(f"{tmp_path}/{OTHER}.acts")
    assert main(["verify"], host) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/{OTHER}.acts: 3 records, 20")
    assert ", 1 power losses, head " in first
    head = json.loads(Path(f"{tmp_path}/{UUID}.acts").read_text().splitlines()[-1])["hash"]
    assert second.endswith(f"Z, head {head}")
    assert main(["verify", UUID.upper(), "--json"], host) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["records"], told["head"], told["power_losses"]) == (2, head, 0)


def test_verify_names_the_break(tmp_path, capfd):
    host = Host(str(tmp_path), str(tmp_path))
    path = tmp_path / f"{UUID}.acts"
    log = ActLog(str(path))
    log.append("job")
    log.append("result")
    path.write_text(path.read_text().replace("job", "jab"))
    assert main(["verify", str(path)], host) == 1
    assert capfd.readouterr().out == f"{path}:2: no true record, and no monitor reported that\n"
    assert main(["verify", "--json"], host) == 1
    assert json.loads(capfd.readouterr().out)["error"].startswith(f"{path}:2: ")
    assert main(["verify", OTHER], host) == 1
    assert "No such file" in capfd.readouterr().out
    assert main(["verify"], Host("/", str(tmp_path / "none"))) == 1


def test_verify_reads_both_files_of_a_log(tmp_path, capfd):
    host = Host(str(tmp_path), str(tmp_path))
    path = tmp_path / f"{UUID}.acts"
    ActLog(str(path)).append("job")
    lines = path.read_text().splitlines(keepends=True)
    Path(f"{path}.1").write_text(lines[0])
    path.write_text(lines[1])
    assert main(["verify", UUID], host) == 0
    assert ": 2 records, " in capfd.readouterr().out
    Path(f"{path}.1").unlink()
    assert main(["verify", UUID], host) == 1
    path.rename(f"{path}.1")
    assert main(["verify"], host) == 1  # the present file is missing
    assert main(["verify", f"{path}.1"], host) == 0
