# SPDX-License-Identifier: GPL-2.0-or-later
"""What the processes of a living monitor hold, looked at from outside."""

import json
import os
import pwd
import re
import socket
import struct
import subprocess
from pathlib import Path

from conftest import kill, processes, run, until

PRIVCMD = ("/dev/xen/privcmd", "/dev/xen/hypercall")


def status_of(pid):
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def links(pid):
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue
    return found


def test_the_supervisor_holds_nothing(vm):
    guest = vm()
    guest.start()
    pids = guest.pids()
    uid = str(pwd.getpwnam("xenvm").pw_uid)
    status = status_of(pids["supervisor"])
    assert status["Uid"].split() == [uid] * 4
    assert status["Groups"].strip() == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"
    assert not [link for link in links(pids["supervisor"]) if link.startswith("/dev/xen")]
    peers = run("ss", "-xp").stdout
    assert peers.count("xenstored/socket") >= 1
    connected = [line for line in peers.splitlines() if f"pid={pids['supervisor']}," in line]
    assert connected
    xenstored_ends = set(re.findall(r"xenstored/socket (\d+)", peers))
    assert not [line for line in connected if line.split()[-2 if "users" in line else -1] in xenstored_ends]
    watcher = status_of(pids["watcher"])
    assert watcher["Uid"].split()[0] == str(pwd.getpwnam("xenvm-watch").pw_uid)
    assert int(watcher["CapEff"], 16) == 0


def test_only_builders_hold_the_hypervisor(vm):
    guest = vm()
    starting = guest.begin()
    holders = set()
    while starting.poll() is None:
        for pid, words in processes().items():
            try:
                if any(link in PRIVCMD for link in links(pid)):
                    holders.add(words[5])
            except OSError:
                continue
    assert starting.returncode == 0
    assert holders == {"builder"}
    until(lambda: "builder" not in guest.pids(), "the builder has ended")
    assert not [pid for pid in processes() if any(link in PRIVCMD for link in links(pid))]


def test_the_audit_finds_no_difference_and_would_find_one(vm):
    guest = vm()
    guest.start()
    guest.up()
    done = run("xenvm-audit", guest.uuid)
    assert done.returncode == 0, done.stdout + done.stderr
    verified = run("xenvm-audit", "verify", guest.uuid)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    acts = Path(f"/var/log/xenvm/{guest.uuid}.acts")
    whole = acts.read_bytes()
    acts.write_bytes(whole.replace(b'"op":"start"', b'"op":"query"', 1))
    try:
        assert run("xenvm-audit", "verify", guest.uuid).returncode == 1
    finally:
        acts.write_bytes(whole)
    run("prlimit", f"--pid={guest.pids()['supervisor']}", "--nofile=4096:4096")
    done = run("xenvm-audit", guest.uuid)
    assert done.returncode == 1
    assert "NOFILE" in done.stdout.upper()


def test_the_guest_may_write_only_its_own_nodes(vm):
    guest = vm()
    guest.start()
    domid = guest.domid
    tree = run("xenstore-ls", "-fp").stdout.splitlines()
    ours = [
        line
        for line in tree
        if line.startswith(
            (f"/local/domain/{domid}", f"/vm/{guest.uuid}", "/xenvm", f"/local/domain/0/backend/console/{domid}")
        )
    ]
    owned = set()
    for line in ours:
        path, entries = line.split(" = ")[0], re.findall(r"\(([^()]*)\)\s*$", line)[0]
        if entries.startswith(f"n{domid}"):
            owned.add(path.removeprefix(f"/local/domain/{domid}/"))
        if path.startswith("/xenvm/"):
            assert entries == "n0", line
    assert owned == {
        "device/suspend/event-channel",
        "control/shutdown",
        "control/feature-poweroff",
        "control/feature-reboot",
        "control/feature-suspend",
        "control/sysrq",
        "data",
        "drivers",
        "feature",
        "attr",
        "error",
        "console/backend-id",
    }


def test_an_old_client_is_answered(vm):
    guest = vm(startup="shutdown")
    guest.start()
    body = json.dumps({"jsonrpc": "2.0", "method": "get-status", "params": {}, "id": 7}).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"/run/xenvm/vm-{guest.uuid}")
        client.sendall(struct.pack(">I", len(body)) + body)
        answer = b""
        while piece := client.recv(4096):
            answer += piece
    assert json.loads(answer) == {"jsonrpc": "2.0", "result": "shutdown", "id": 7}


def test_rights_on_the_command_socket(vm):
    guest = vm(startup="shutdown")
    guest.start()
    for user, group, status_code, start_code in (
        ("nobody", "nogroup", 8, 8),
        ("nobody", "xenvm-read", 3, 8),
        ("nobody", "xenvm", 3, 0),
    ):
        as_user = ("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups")
        assert run(*as_user, "xenvm-cmd", guest.uuid, "status").returncode == status_code
        assert run(*as_user, "xenvm-cmd", guest.uuid, "start").returncode == start_code
    guest.cmd("destroy")


def test_foreground_tells_the_service_manager(vm, tmp_path):
    guest = vm(startup="shutdown")
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(60)
        monitor = subprocess.Popen(
            ["xenvm", "--foreground", str(guest.file)], env={**os.environ, "NOTIFY_SOCKET": str(path)}
        )
        assert manager.recv(64) == b"READY=1"
        assert guest.broker() == monitor.pid
        kill(monitor.pid, 15)
        assert monitor.wait(timeout=30) == 0
