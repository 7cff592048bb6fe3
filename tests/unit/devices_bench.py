# SPDX-License-Identifier: GPL-2.0-or-later
"""A broker whose VM has devices, with disks, servers and children played by the test."""

import os
import stat

import broker_bench
from children import FakeChild

from xenvm.boundary.devices import DeviceState, DiskGrant, Kind, NicGrant
from xenvm.boundary.messages import (
    Plug,
)
from xenvm.broker import book, disks, plugging

DISK = DiskGrant(51712, "xvda", "phy", "/dev/vg/a", False, False, False, "", 0, "")
MORE = DiskGrant(51728, "xvdb", "phy", "/home/me/b", False, False, False, "", 0, "")
NIC = NicGrant(0, "br0", "00:16:3e:00:00:01")
SEEN = DeviceState(Kind.VBD, 51712, "xvda", 4, 4, False, "phy:/dev/vg/a", "", "")
ADDED = DeviceState(Kind.VBD, 51728, "xvdb", 4, 4, False, "phy:/home/me/b", "", "4711 99")
CARD = DeviceState(Kind.VIF, 0, "0", 4, 4, False, NIC.mac, "br0", "")


def bench(monkeypatch, tmp_path):
    """Disks are block devices of no driver; `opened` are the names of those that were opened, in order."""
    block = tmp_path / "block"
    os.mknod(block, 0o600 | stat.S_IFBLK, os.makedev(7, 63))
    ended = []
    for made in broker_bench.bench(monkeypatch, tmp_path):
        made.opened, made.refuse, made.ended, made.block = [], {}, ended, block

        def open_disk(grant, handed=-1, made=made):
            made.opened.append(grant.name)
            if handed >= 0:
                os.close(handed)
            if grant.name in made.refuse:
                raise made.refuse[grant.name]
            return os.open(block, os.O_PATH)

        monkeypatch.setattr(disks, "open_disk", open_disk)
        for module in (plugging, book):
            monkeypatch.setattr(module, "end_server", lambda text: ended.append(text) if text else None)
        yield made
        made.broker._book.domain_gone(for_good=True)  # else the end of the process does it


def devices_of(bench, *, disks=(), nics=()):
    """Give the VM devices by its config."""
    bench.grants = bench.broker._grants = bench.grants.but(disks=disks, nics=nics)
    return bench


def workers(role):
    return [child for child in FakeChild.made if child.role is role and child.pidfd >= 0]


def said(child):
    message, descriptors = child.there.receive(deadline_s=5)
    for descriptor in descriptors:
        os.close(descriptor)
    return message


def tell(bench, child, message, descriptors=()):
    child.there.send(message, descriptors)
    bench.turn()


def plug(bench, handed=True, sequence=9, **what):
    """Ask for one more disk, as a supervisor does; return the job of the worker."""
    descriptor = os.open(bench.block, os.O_PATH)
    bench.send(Plug(sequence, (MORE.but(**what),), ()), [descriptor] * handed)
    os.close(descriptor)
