# SPDX-License-Identifier: GPL-2.0-or-later
"""The builder process: the only one that ever holds the hypervisor. It serves one request and ends.

1. open the hypercall devices and the xenstore socket (as root);
2. become user xenvm-build, without capabilities, files, sockets or new programs;
3. read one Job, do it, answer, exit.
"""

from xenvm.boundary.frames import Channel
from xenvm.boundary.images import Progress
from xenvm.boundary.messages import NO_DOMAIN, Domain, Failed, Fault, Job
from xenvm.boundary.place import HERE
from xenvm.boundary.privileges import Role
from xenvm.errors import ExitCode, ProtocolError, XenvmError
from xenvm.helpers import exchange, serve, store, xenstored

REQUEST_WAIT_S = 3600.0  # a builder may be started before it is needed; it ends with its broker


def main() -> int:
    """Run one builder; return its exit status."""
    channel = serve.broker_channel()
    try:
        # Here and not above: without the libraries of this Xen release the import itself is the error to report.
        from xenvm.helpers.builder.jobs import Builder  # noqa: PLC0415

        if HERE.simulator:
            from xenvm.helpers.builder.simulated import Hypervisor  # noqa: PLC0415
        else:
            from xenvm.helpers.builder.xen import Hypervisor  # type: ignore[assignment] # noqa: PLC0415

        xen = Hypervisor()
        connection = xenstored.connect()
        hello = serve.drop(Role.BUILDER, xen.descriptors | {connection.fileno()})
        channel.send(hello)
    except XenvmError as error:
        return _fail(channel, error)
    received = channel.receive(deadline_s=REQUEST_WAIT_S)
    if received is None:
        return 0
    job, images = received
    if not isinstance(job, Job):
        raise ProtocolError("a builder answers jobs only")
    nodes = store.Store(connection)
    plugging = exchange.Devices(channel, nodes, job)
    builder = Builder(xen, nodes, plugging, lambda *told: channel.send(Progress(0, *told)))
    try:
        channel.send(builder.run(job, images))
    except XenvmError as error:
        return _fail(channel, error, builder.left)
    return 0


def _fail(channel: Channel, error: XenvmError, left: Domain = NO_DOMAIN) -> int:
    fault = Fault(int(error.code), error.message[:4000], error.hint[:1000])
    channel.send(Failed(0, fault, left))
    return int(ExitCode.FAILED)
