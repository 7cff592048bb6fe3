# SPDX-License-Identifier: GPL-2.0-or-later
"""The hotplug process: gives a running guest a device, takes one away, or looks at them. It holds xenstore alone.

Without a domain it looks at what an earlier one has left.

1. open the xenstore socket (as root);
2. become user xenvm-hotplug, without capabilities, files, sockets or new programs;
3. read one Job, do it, answer, exit.
"""

from xenvm.boundary.devices import Kind
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import NO_DOMAIN, Done, Job, Op
from xenvm.boundary.privileges import Role
from xenvm.errors import ProtocolError, WrongStateError, XenvmError
from xenvm.helpers import devices, serve, store, xenstored
from xenvm.helpers.exchange import Devices


def main() -> int:
    """Run one hotplug worker; return its exit status."""
    channel = serve.broker_channel()
    try:
        connection = xenstored.connect()
        channel.send(serve.drop(Role.HOTPLUG, frozenset({connection.fileno()})))
        received = serve.request(channel)
        if received is None:
            return 0
        job = received[0]
        if not isinstance(job, Job):
            raise ProtocolError("a hotplug worker answers jobs only")
        channel.send(_run(channel, store.Store(connection), job))
    except XenvmError as error:
        return serve.fail(channel, error)
    return 0


def _run(channel: Channel, connection: store.Store, job: Job) -> Done:
    text = ""
    if job.op is Op.PLUG:
        text = _plug(channel, connection, job)
    elif job.op is Op.UNPLUG:
        place = (job.kind, job.device)
        if place not in devices.listed(connection, job.uuid):
            name = devices.named(job.kind, job.device)
            raise WrongStateError(f"the guest has no {name}", hint="disk-list and nic-list show them")
        if job.disc and not devices.is_cdrom(connection, job.domid, job.device):
            name = devices.known_as(connection, job.uuid, place)
            raise WrongStateError(f"{name} is no disc in a CD drive", hint="disk-del takes a disk away")
        devices.unplug(connection, job.uuid, job.domid, [place], patience_s=float(job.timeout_s), force=job.force)
    elif job.op is Op.REBRIDGE:
        for vif in job.vifs:
            if (Kind.VIF, vif.id) not in devices.listed(connection, job.uuid):
                raise WrongStateError(f"the guest has no network card {vif.id}", hint="nic-list shows them")
        exchange = Devices(channel, connection, job)
        exchange.announce(job.domid)
        exchange.wait()
        devices.rebridge(connection, job.uuid, job.domid, job.vifs)
    elif job.op is Op.SETTLE:
        devices.settle(connection, job.uuid, job.domid)
    elif job.op is not Op.DEVICES:
        raise ProtocolError(f"{job.op} is no job of a hotplug worker")
    elif job.domid < 0:
        text = devices.leftover(connection, job.uuid)
    return Done(0, NO_DOMAIN, text, devices.look(connection, job.uuid, job.domid))


def _plug(channel: Channel, connection: store.Store, job: Job) -> str:
    exchange = Devices(channel, connection, job)
    drives = {(Kind.VBD, vbd.device): vbd.name for vbd in job.vbds if vbd.cdrom}
    discs = [place for place in devices.listed(connection, job.uuid) if place in drives]
    for place in discs:
        if not devices.is_cdrom(connection, job.domid, place[1]):
            raise WrongStateError(f"{drives[place]} is no CD drive, but a disk", hint="disk-del takes a disk away")
    if discs:  # a PV guest has no drive whose disc changes: the old disk goes, a new one comes
        devices.unplug(connection, job.uuid, job.domid, discs, patience_s=float(job.timeout_s), force=False)
    exchange.begin(job.domid)
    try:
        exchange.finish(job.domid)
    except BaseException:
        devices.remove(connection, job.uuid, job.domid, devices.places(job.vbds, job.vifs))
        raise
    if devices.connected(connection, job.domid, job.vbds, job.vifs):
        return "connected"
    return "plugged; the guest has not taken it yet"
