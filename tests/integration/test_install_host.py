# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/install-host in a root directory of its own: what it makes, that once more changes nothing, what it leaves.

The root has the programs of this machine, mounted read-only in a namespace that ends with the script; what is written
stays in the directory. Processes of this machine are not seen from there, and no module is loaded. Needs root.
"""

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent.parent
TOOLS = (
    *("sh", "cat", "chgrp", "cut", "dirname", "getent", "grep", "groupadd", "groupdel", "id", "install", "python3"),
    *("rm", "rmdir", "tr", "useradd", "userdel", "xargs"),
)
SYSTEMD = ("systemd-sysusers", "systemd-tmpfiles")
WAYS = ["shadow", *(["systemd"] if shutil.which(SYSTEMD[0]) else [])]  # what makes users and directories
LINES = (SOURCE / "scripts/xenvm.sysusers").read_text().splitlines()
USERS = [line.split()[1] for line in LINES if line.startswith("u ")]
GROUPS = [*USERS, *(line.split()[1] for line in LINES if line.startswith("g "))]
MODULES = [line for line in (SOURCE / "scripts/xenvm.modules").read_text().splitlines() if not line.startswith("#")]
MOUNTED = [
    *(f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64", "share") if os.path.isdir(f"/usr/{name}")),
    "dev",
]
LINKS = [name for name in ("bin", "sbin", "lib", "lib64") if os.path.islink(f"/{name}")]  # as on every recent Debian
INSIDE = f"""\
set -eu
root=$1 source=$2
shift 2
mount --make-rprivate /
for name in {" ".join(MOUNTED)}; do
    mount --bind "/$name" "$root/$name"
    mount -o remount,bind,ro "$root/$name"
done
mount --bind "$source" "$root/src"
mount -o remount,bind,ro "$root/src"
mount -t proc none "$root/proc"
exec chroot "$root" /usr/bin/env -i PATH=/tools /src/scripts/install-host "$@"
"""
MODPROBE = '#!/bin/sh\necho "$*" >>/tools/loaded\n'
ACCOUNTS = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "group": "root:x:0:\n",
    "shadow": "root:*:19000:0:99999:7:::\n",
    "gshadow": "root:*::\n",
}
FILES = {
    "etc/systemd/system/xenvm@.service": "scripts/xenvm@.service",
    "etc/sysusers.d/xenvm.conf": "scripts/xenvm.sysusers",
    "etc/tmpfiles.d/xenvm.conf": "scripts/xenvm.tmpfiles",
    "etc/modules-load.d/xenvm.conf": "scripts/xenvm.modules",
    "etc/modprobe.d/xenvm.conf": "scripts/xenvm.modprobe",
    "etc/udev/rules.d/60-xenvm.rules": "udev/60-xenvm.rules",
    "usr/libexec/xenvm/hotplug": "scripts/xenvm.hotplug",
}


class Root:
    """A root directory with the least that the script needs, as on a fresh host."""

    def __init__(self, path, way):
        self.path = path
        for name in (*MOUNTED, "usr/libexec", "src", "proc", "etc", "tools"):
            (path / name).mkdir(parents=True)
        for name in LINKS:
            (path / name).symlink_to(f"usr/{name}")
        for name in ("login.defs", "nsswitch.conf", "pam.d"):
            copy = shutil.copytree if os.path.isdir(f"/etc/{name}") else shutil.copy
            copy(f"/etc/{name}", path / "etc" / name)
        for name, text in ACCOUNTS.items():
            (path / "etc" / name).write_text(text)
        for name in (*TOOLS, *(SYSTEMD if way == "systemd" else ())):
            places = [place for place in (f"/usr/bin/{name}", f"/usr/sbin/{name}") if os.path.exists(place)]
            (path / "tools" / name).symlink_to(places[0])
        (path / "tools/modprobe").write_text(MODPROBE)
        (path / "tools/modprobe").chmod(0o755)

    def run(self, *words, code=0):
        """Run the script in the root, alone with what it starts; return what it says."""
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", INSIDE, "inside"]
        argv += [str(self.path), str(SOURCE), *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def all(self):
        """Return everything there is, but backups and locks of the accounts: path -> kind and mode, owner, content."""
        found = {}
        for path in self.path.rglob("*"):
            name = str(path.relative_to(self.path))
            if not name.startswith("tools/") and not name.endswith(("-", ".lock")):
                status = path.lstat()
                content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
                found[name] = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, content)
        return found

    def names(self, database):
        lines = (self.path / "etc" / database).read_text().splitlines()
        return {line.split(":")[0]: line.split(":") for line in lines}


@pytest.fixture(params=WAYS)
def root(request):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        os.chmod(path, 0o755)
        yield Root(Path(path), request.param)


def test_it_makes_what_a_host_needs_and_once_more_changes_nothing(root):
    root.run()
    passwd, group = root.names("passwd"), root.names("group")
    assert (set(passwd), set(group)) == ({"root", *USERS}, {"root", *GROUPS})
    assert passwd["xenvm-qemu"][2] == "1900000000"
    assert len({passwd[user][2] for user in USERS}) == len(USERS)
    for user in USERS:
        assert (passwd[user][3], passwd[user][6]) == (group[user][2], "/usr/sbin/nologin")
        assert root.names("shadow")[user][1].startswith("!")
    made, log = root.all(), int(group["xenvm"][2])
    for name, source in FILES.items():
        mode = "-rwxr-xr-x" if name.endswith("hotplug") else "-rw-r--r--"
        assert made[name][:3] == (mode, 0, 0)
        assert (root.path / name).read_bytes() == (SOURCE / source).read_bytes()
    for name, mode, gid in (
        ("run/xenvm", "drwxr-xr-x", 0),
        ("run/xenvm/looks", "-rw-------", 0),
        ("var/log/xenvm", "drwxr-s---", log),
        ("var/lib/xenvm", "drwxr-xr-x", 0),
        ("var/lib/xenvm/empty", "dr-xr-xr-x", 0),
        ("var/cache/xenvm", "drwx------", 0),
        ("etc/xenvm", "drwxr-xr-x", 0),
    ):
        assert made[name][:3] == (mode, 0, gid), name
    assert (root.path / "tools/loaded").read_text().splitlines() == [f"-q {name}" for name in MODULES]
    root.run()
    assert root.all() == made


def test_what_it_made_goes_and_what_others_made_stays(root):
    """Logs are evidence; their group is gone, whose number may be given to another. Once more there is nothing to do."""
    before = {name: what for name, what in root.all().items() if not name.startswith("etc/")}
    accounts = {name: (root.path / "etc" / name).read_text() for name in ACCOUNTS}
    root.run()
    gid = int(root.names("group")["xenvm"][2])
    log = root.path / "var/log/xenvm/web.log"
    log.write_text("a log")
    os.chown(log, 0, gid)
    (root.path / "etc/xenvm/web.cfg").write_text("memory = 64")
    for _ in range(2):
        root.run("--uninstall")
        left = root.all()
        assert {name: (root.path / "etc" / name).read_text() for name in ACCOUNTS} == accounts
        assert left["var/log/xenvm/web.log"][1:3] == left["var/log/xenvm"][1:3] == (0, 0)
        assert (root.path / "etc/xenvm/web.cfg").read_text() == "memory = 64"
        assert [name for name in left if "xenvm" in name and not name.startswith(("var/log/xenvm", "etc/xenvm"))] == []
        assert before.items() <= left.items()
    root.run()
    assert (root.path / "etc/xenvm/web.cfg").read_text() == "memory = 64"
    assert (root.path / "run/xenvm/looks").exists()


def test_nothing_of_it_stays_where_there_are_no_logs_and_configs(root):
    root.run()
    root.run("--uninstall")
    assert [name for name in root.all() if "xenvm" in name] == []


def test_it_does_not_go_while_a_monitor_is_alive(root):
    """By its socket, which accepts a connection: a file that is left over does not count."""
    root.run()
    alive, dead = root.path / "run/xenvm/vm-alive", root.path / "run/xenvm/vm-dead"
    with socket.socket(socket.AF_UNIX) as gone, socket.socket(socket.AF_UNIX) as monitor:
        gone.bind(str(dead))
        gone.close()
        monitor.bind(str(alive))
        monitor.listen()
        made = root.all()
        said = root.run("--uninstall", code=1)
        assert "these monitors are alive:\n/run/xenvm/vm-alive\n" in said
        assert "vm-dead" not in said
        assert "--force" in said
        assert root.all() == made
        root.run("--uninstall", "--force")
    assert not (root.path / "run/xenvm").exists()
    assert set(root.names("passwd")) == {"root"}


@pytest.mark.parametrize("words", [("--force",), ("--unistall",), ("x",)], ids=" ".join)
def test_wrong_usage_does_nothing(root, words):
    before = root.all()
    assert "Usage: scripts/install-host" in root.run(*words, code=2)
    assert root.all() == before
