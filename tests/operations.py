# SPDX-License-Identifier: GPL-2.0-or-later
"""The operations of the fault matrix: how each begins, and what must be so however it has ended."""

import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from types import MappingProxyType

from vms import MIB, Vm, until


class Operation(ABC):
    """One operation, on a VM of its own. `alive` is whether the guest that was there must live through any fault."""

    name = ""
    alive = True
    settings = MappingProxyType({})
    without_store = False
    taken_over = False  # by another monitor, which has started what was off

    def __init__(self, host, folder):
        self.host, self.folder = host, Path(folder)
        self.file, self.disk = self.folder / "guest.img", self.folder / "disk.img"
        self.disk.write_bytes(bytes(MIB))
        self.disk.chmod(0o666)
        words = "xenvm.boot_ms=1 xenvm.obey_ms=1"
        settings = {"nic": f"bridge={host.bridge}", "on_reboot": "reboot", **self.settings}
        self.vm = Vm(host, folder, words=words, **{key: self._text(value) for key, value in settings.items()})

    def _text(self, value):
        return value.format(folder=self.folder) if isinstance(value, str) else value

    def prepare(self):
        """Bring the VM to where the operation begins."""
        self.vm.start()
        self.vm.up()

    def again(self):  # noqa: B027 - not all have such a step
        """The same for a guest that is there already."""

    @abstractmethod
    def begin(self):
        """Begin the operation; return the process of the client."""

    def mend(self, state, code):
        """Bring a VM in a lasting state back to a running guest, by what an administrator would do."""
        assert state in ("running", "shutdown", "suspended"), state
        if state == "running":
            return
        assert not self.alive, f"the guest was lost: {self.vm.status()}"
        self.vm.ask("start")

    def checks(self, certain):  # noqa: B027 - not all have such a step
        """What else must be so in the end; `certain` is whether the client could learn what has become of the guest."""


class Build(Operation):
    name, alive = "build", False
    settings = MappingProxyType({"disk": "{folder}/disk.img:file:xvda:w:disk"})

    def prepare(self):
        pass

    def begin(self):
        return self.vm.begin()


class Adopt(Operation):
    name = "adopt"

    def prepare(self):
        super().prepare()
        self.again()

    def again(self):
        self.vm.ask("quit")
        until(lambda: not self.vm.lock.exists(), "the monitor has ended")

    def begin(self):
        return self.vm.begin()


class Attach(Operation):
    name = "attach"

    def begin(self):
        return self.vm.begin_cmd("disk-add", f"{self.disk}:file:xvdb:w:disk")

    def mend(self, state, code):
        super().mend(state, code)
        listed = self.vm.ask("disk-list").text
        if code == 0:
            assert "xvdb" in listed, listed
        if "xvdb" not in listed:
            done = self.host.run("xenvm-cmd", self.vm.uuid, "disk-add", f"{self.disk}:file:xvdb:w:disk")
            assert done.returncode == 0, done.stderr
        self.vm.ask("disk-del", device="xvdb")


class Plug(Operation):
    name = "attach card"

    def begin(self):
        return self.vm.begin_cmd("nic-add", "id=3")

    def mend(self, state, code):
        super().mend(state, code)
        listed = self.vm.ask("nic-list").text
        if not re.search(r"^3\b", listed, re.MULTILINE):
            assert code != 0, listed
            self.vm.ask("nic-add", id="3")
        self.vm.ask("nic-del", id="3")


class Detach(Operation):
    name = "detach"
    settings = MappingProxyType({"disk": "{folder}/disk.img:file:xvda:w:disk"})

    def begin(self):
        return self.vm.begin_cmd("disk-del", "xvda")

    def mend(self, state, code):
        super().mend(state, code)
        if "xvda" in self.vm.ask("disk-list").text:
            assert code != 0
            self.vm.ask("disk-del", device="xvda")
        assert "xvda" not in self.vm.ask("disk-list").text


class Pause(Operation):
    name = "pause"

    def begin(self):
        return self.vm.begin_cmd("pause")

    def mend(self, state, code):
        if state in ("paused", "created"):
            self.vm.ask("unpause")
        else:
            super().mend(state, code)


class Checkpoint(Operation):
    name = "checkpoint"

    def begin(self):
        self.file.write_text("older")
        self.file.chmod(0o666)
        return self.vm.begin_cmd("checkpoint", str(self.file), "timeout=3")

    def mend(self, state, code):
        super().mend(state, code)
        whole = self.file.stat().st_size > MIB
        assert whole or code != 0
        assert whole or self.file.read_text() == "older"

    def checks(self, certain):
        names = {path.name for path in self.folder.iterdir() if path.suffix != ".cfg"}
        if not certain:  # nobody was left who knew whether the guest runs on: then the older file is kept, and told of
            names = {name for name in names if not name.endswith(".before")}
        assert names == {"disk.img", "guest.img"}, names


class Save(Checkpoint):
    """The guest is either in a whole image, or lives on."""

    name, alive = "save", False

    def begin(self):
        self.file.write_text("older")
        self.file.chmod(0o666)
        return self.vm.begin_cmd("suspend", str(self.file), "timeout=3")

    def mend(self, state, code):
        if state == "running":
            Checkpoint.mend(self, state, 1)
            assert self.file.stat().st_size > MIB or self.vm.boots() == 1, "the guest was lost"
            return
        assert state in ("suspended", "shutdown"), state
        assert self.file.stat().st_size > MIB
        done = self.host.run("xenvm-cmd", self.vm.uuid, "restore", str(self.file))
        assert done.returncode == 0, done.stderr


class Restore(Checkpoint):
    name, alive = "restore", False

    def prepare(self):
        super().prepare()
        done = self.host.run("xenvm-cmd", self.vm.uuid, "suspend", str(self.file))
        assert done.returncode == 0, done.stderr
        self.vm.write(startup="shutdown")

    def begin(self):
        return self.vm.begin_cmd("restore", str(self.file))

    def mend(self, state, code):
        if state == "running":
            return
        assert code != 0
        done = self.host.run("xenvm-cmd", self.vm.uuid, "restore", str(self.file))
        assert done.returncode == 0, done.stderr


class Destroy(Operation):
    name, alive = "destroy", False

    def begin(self):
        return self.vm.begin_cmd("destroy")

    def mend(self, state, code):
        assert state != "running" or code != 0 or self.taken_over
        super().mend(state, code)


class Restart(Operation):
    """The command that cuts a guest off and builds it anew: the user is told when it fails, and the VM is off then."""

    name, alive = "restart", False

    def begin(self):
        return self.vm.begin_cmd("restart", "force=true")


class Reboot(Operation):
    """The guest's own: nobody is there who could be told, so it has to come back."""

    name = "reboot"

    def mend(self, state, code):
        if state == "shutdown" and "xenstored" in self.vm.status()["reason"] and self.without_store:
            self.alive = False  # without xenstored nothing can be built, and the status says so
        super().mend(state, code)

    def begin(self):
        waiting = self.vm.begin_cmd("wait", "state=rebooting", "timeout=20")
        until(lambda: self.vm.ask("status"), "it waits")
        with self.vm.connect(60) as monitor:
            terminal = monitor.call("console").take_descriptor()
        os.write(terminal, b"reboot\n" if self.host.simulated else b"reboot -f\n")
        os.close(terminal)
        return waiting


OPERATIONS = {
    kind.name: kind
    for kind in (
        *(Build, Adopt, Pause, Attach, Plug, Detach, Checkpoint, Save, Restore),
        *(Destroy, Restart, Reboot),
    )
}
