# SPDX-License-Identifier: GPL-2.0-or-later
"""What the broker remembers of a VM's devices beyond the grants: those added while it runs, and its image servers."""

from __future__ import annotations

import os

from xenvm.boundary.devices import DISKS_LIMIT, DiskGrant, Kind, NicGrant, is_mac
from xenvm.broker import bridges
from xenvm.broker.host import open_in
from xenvm.broker.plugging import Wanted
from xenvm.broker.servers import end_server
from xenvm.context import suppress
from xenvm.errors import ExitCode, UsageError, XenvmError
from xenvm.model import same_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xenvm.boundary.devices import DeviceState, Vif
    from xenvm.boundary.images import Restore, Save
    from xenvm.boundary.messages import Grants, HostPolicy, Plug
    from xenvm.imageplace import Target


class Book:
    """Devices of one VM. What was added by command comes back after a restart, as long as the same monitor lives."""

    def __init__(self, policy: HostPolicy) -> None:
        self.policy = policy
        self._disks: dict[int, tuple[DiskGrant, int]] = {}
        self._nics: dict[int, NicGrant] = {}
        self._servers: dict[int, str] = {}
        self.known: set[tuple[Kind, int]] = set()
        """The devices that the domain was last seen to have."""
        self.saved = False
        """The guest is in an image, as far as is known; its domain may be gone."""

        self.image: Target | None = None
        """Where that image is, if the broker has named it: until the domain is gone it may have to be taken back."""

    def image_path(self, request: Save | Restore, grants: Grants) -> str:
        """Return the path of an image in a directory of the host's policy; raise XenvmError if it is not this VM's."""
        if request.directory >= len(self.policy.image_directories):
            raise XenvmError("the host's policy has no such directory", code=ExitCode.PERMISSION_REFUSED)
        path = f"{self.policy.image_directories[request.directory]}/{request.file}"
        if not request.file.startswith(grants.uuid):
            raise XenvmError(
                f"{path[:1000]}: in this directory a VM has images whose names begin with its uuid",
                hint=f"{grants.uuid}.img would be one",
                code=ExitCode.PERMISSION_REFUSED,
            )
        return path

    def runs_on(self) -> None:
        """Take back an image whose guest has run on: its name is again that of the older file, or of none."""
        if self.image:
            self.image.give_back()
            self.image.close()
            self.image = None

    def does_not_run(self) -> None:
        """Let go of the file that an image has replaced: the guest is in the image, and nowhere else."""
        if self.image:
            self.image.confirm()
            self.image.close()
            self.image = None

    def wanted(self, grants: Grants) -> Wanted:
        """Return what a new domain gets: the config's devices (without empty CD drives) and the added ones."""
        added = tuple(grant for grant, _ in self._disks.values())
        disks = tuple(grant for grant in grants.disks if grant.path and grant.device not in self._disks)
        nics = tuple(nic for nic in grants.nics if nic.id not in self._nics)
        vifs = bridges.choose((*nics, *self._nics.values()), self.policy.default_bridge)
        return Wanted((*disks, *added), vifs, {device: held for device, (_, held) in self._disks.items()})

    def plug(self, plug: Plug, grants: Grants, descriptors: list[int]) -> Wanted:
        """Return what a request to add a device means; raise XenvmError when it may not be.

        A file of a directory that the host's policy names is opened here, and put into `descriptors`.
        """
        named = plug.file != "" and plug.directory >= 0
        if len(plug.disks) + len(plug.nics) != 1 or len(descriptors) + named != len(plug.disks):
            raise UsageError("one device is added at a time, a disk with its descriptor")
        if plug.disks:
            disk = plug.disks[0]
            if disk.cipher:
                raise UsageError("an encrypted disk cannot be added while the guest runs: put it into the config file")
            self._check_place(disk, grants)
            if named:
                disk = disk.but(path=f"{self._directory(plug.directory)}/{plug.file}")
                descriptors.append(open_in(self._directory(plug.directory), plug.file, read_only=disk.read_only))
            return Wanted((disk,), (), {disk.device: descriptors[0]})
        self._check_address(plug.nics[0], grants)
        return Wanted((), (self.bridged(plug.nics[0], grants),), {})

    def _directory(self, number: int) -> str:
        if number >= len(self.policy.directories):
            raise XenvmError("the host's policy has no such directory", code=ExitCode.PERMISSION_REFUSED)
        return self.policy.directories[number]

    def _check_place(self, disk: DiskGrant, grants: Grants) -> None:
        """Refuse one disk too many, and one that a Linux guest cannot tell from another one."""
        known = {device: str(device) for kind, device in self.known if kind is Kind.VBD}
        known |= {grant.device: grant.name for grant in (*grants.disks, *(grant for grant, _ in self._disks.values()))}
        known.pop(disk.device, None)
        if len(known) >= DISKS_LIMIT:
            raise UsageError(f"disk {disk.name}: the guest has {DISKS_LIMIT} disks, which is the most it may have")
        for device, name in known.items():
            if same_disk(disk.device, device):
                raise UsageError(
                    f"disk {disk.name} is the same disk in the guest as {name}",
                    hint="use each letter once, with hd, sd or xvd",
                )

    def _check_address(self, nic: NicGrant, grants: Grants) -> None:
        for other in (*grants.nics, *self._nics.values()):
            if other.mac == nic.mac and other.id != nic.id:
                raise UsageError(f"network card {nic.id}: card {other.id} has the address {nic.mac}")

    def bridged(self, nic: NicGrant, grants: Grants) -> Vif:
        """Choose the bridge of a card that is added or moved: one that config or host policy names, or the only one."""
        vif = bridges.choose((nic,), self.policy.default_bridge)[0]
        there = bridges.bridges()
        allowed = {nic.bridge for nic in grants.nics} | {*self.policy.bridges, self.policy.default_bridge}
        allowed.update(there if len(there) == 1 else [])
        if nic.bridge and nic.bridge not in allowed:
            raise XenvmError(
                f"network card {nic.id}: the bridge {nic.bridge} is not open to this VM",
                hint="name it in a nic line of the config file, or under `bridges` in /etc/xenvm/policy.toml",
                code=ExitCode.PERMISSION_REFUSED,
            )
        return vif

    def added(self, wanted: Wanted) -> None:
        """Keep what was added: an open descriptor, for the next incarnation of the domain."""
        for grant in wanted.disks:
            self.removed(Kind.VBD, grant.device)  # a disc that was in the drive before
            self._disks[grant.device] = (grant, os.dup(wanted.handed[grant.device]))
        for vif in wanted.vifs:
            self._nics[vif.id] = NicGrant(vif.id, vif.bridge, vif.mac)

    def moved(self, vif: Vif, devices: tuple[DeviceState, ...]) -> None:
        """Keep to which bridge a card was moved: the guest's own reboot does not move it back."""
        for state in devices:
            if (state.kind, state.device) == (Kind.VIF, vif.id) and is_mac(state.detail):
                self._nics[vif.id] = NicGrant(vif.id, vif.bridge, state.detail)

    def removed(self, kind: Kind, device: int) -> None:
        """Forget a device that was taken away, and end what served it."""
        self._forget(kind, device)
        if kind is Kind.VBD:
            end_server(self._servers.pop(device, ""))

    @property
    def servers(self) -> frozenset[str]:
        """The image servers that serve disks of the domain."""
        return frozenset(self._servers.values())

    @property
    def disks(self) -> frozenset[int]:
        """The disks that the domain was last seen to have."""
        return frozenset(device for kind, device in self.known if kind is Kind.VBD)

    def seen(self, devices: tuple[DeviceState, ...]) -> None:
        """Learn which devices the domain has, all of them, and by which image servers; one without its disk ends."""
        self.known = {(state.kind, state.device) for state in devices}
        for device in self._servers.keys() - self.disks:
            end_server(self._servers.pop(device))
        for state in devices:
            if state.kind is Kind.VBD and state.server:
                self._servers[state.device] = state.server

    def domain_gone(self, *, for_good: bool) -> None:
        """End the image servers of a domain that is gone; `for_good` forgets what was added too."""
        for text in self._servers.values():
            end_server(text)
        self._servers.clear()
        self.known = set()
        if for_good:
            for device in [*self._disks]:
                self._forget(Kind.VBD, device)
            self._nics.clear()

    def _forget(self, kind: Kind, device: int) -> None:
        if kind is Kind.VIF:
            self._nics.pop(device, None)
            return
        _, held = self._disks.pop(device, (None, -1))
        if held >= 0:
            with suppress(OSError):
                os.close(held)
