# SPDX-License-Identifier: GPL-2.0-or-later
"""The builder process: the only one that ever holds the hypervisor. It serves one request and ends.

1. open the hypercall devices and the xenstore socket (as root);
2. become user xenvm-build, without capabilities, files, sockets or new programs;
3. read one Job, do it, answer, exit.
"""

from xenvm.boundary.images import Progress
from xenvm.boundary.messages import Job
from xenvm.boundary.place import HERE
from xenvm.boundary.privileges import Role
from xenvm.errors import ProtocolError, XenvmError
from xenvm.helpers import exchange, serve, store, xenstored


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
        return serve.fail(channel, error)
    received = serve.request(channel)
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
        return serve.fail(channel, error, builder.left)
    return 0
