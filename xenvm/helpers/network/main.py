# SPDX-License-Identifier: GPL-2.0-or-later
"""The network process: puts the backend interfaces of one domain into their bridges. It knows nothing of xenstore.

1. open a socket for interface requests (as root);
2. become user xenvm-network, which keeps NET_ADMIN alone;
3. read one Join, wait for the interfaces, join them, answer, exit.
"""

import time

from xenvm.boundary.devices import Vif
from xenvm.boundary.messages import NO_DOMAIN, Done
from xenvm.boundary.place import HERE
from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Join
from xenvm.errors import ProtocolError, TimeoutExpiredError, XenvmError
from xenvm.helpers import serve

if HERE.simulator:
    from xenvm.helpers.network import simulated as link
else:
    from xenvm.helpers.network import link  # type: ignore[no-redef]

KERNEL_WAIT_S = 5.0
POLL_S = 0.01
# The dom0 side of every card: the highest address, since a bridge takes the lowest of its ports' (Xen's vif-bridge).
BACKEND_MAC = bytes.fromhex("feffffffffff")


def main() -> int:
    """Run one network worker; return its exit status."""
    channel = serve.broker_channel()
    route = link.connect(KERNEL_WAIT_S)
    try:
        channel.send(serve.drop(Role.NETWORK, frozenset({route.fileno()})))
        received = serve.request(channel)
        if received is None:
            return 0
        message, taps = received
        if not isinstance(message, Join) or len(taps) > len(message.vifs):
            raise ProtocolError("a network worker joins interfaces only")
        end = time.monotonic() + message.timeout_s
        for vif, tap in zip(message.vifs, taps, strict=False):  # first, since it needs no waiting
            _attach(tap, message.domid, vif)
            _join(route, f"vif{message.domid}.{vif.id}-emu", vif, end, message.timeout_s)
        for vif in message.vifs:
            _join(route, f"vif{message.domid}.{vif.id}", vif, end, message.timeout_s)
        for vif in message.vifs[len(taps) :]:  # a card that moves may have an emulated one, which goes along
            if link.find(route, f"vif{message.domid}.{vif.id}-emu"):
                _join(route, f"vif{message.domid}.{vif.id}-emu", vif, end, message.timeout_s)
        channel.send(Done(0, NO_DOMAIN, ""))
    except XenvmError as error:
        return serve.fail(channel, error)
    return 0


def _attach(tap: int, domid: int, vif: Vif) -> None:
    """Make the interface of an emulated card: it lives as long as the descriptor, which the device model gets."""
    try:
        link.attach(tap, f"vif{domid}.{vif.id}-emu")
    except OSError as error:
        raise XenvmError(f"network card {vif.id}: cannot make a tap: {error.strerror}") from error


def _join(route: link.Route, name: str, vif: Vif, end: float, patience_s: float) -> None:
    """Put one interface into its card's bridge, out of another one if need be; safe to do again."""
    try:
        while (port := link.find(route, name)) is None:
            if time.monotonic() >= end:
                raise TimeoutExpiredError(
                    f"network card {vif.id}: the kernel made no interface {name} within {patience_s:g} s",
                    hint="is the module xen-netback loaded in dom0? see its kernel log (dmesg)",
                )
            time.sleep(POLL_S)
        bridge = link.find(route, vif.bridge)
        if bridge is None or bridge.kind != "bridge":
            raise XenvmError(
                f"network card {vif.id}: {vif.bridge} is no bridge", hint=f"ip link add {vif.bridge} type bridge"
            )
        link.join(route, port, bridge, BACKEND_MAC)
    except OSError as error:
        raise XenvmError(
            f"network card {vif.id}: {name} cannot join {vif.bridge}: {error.strerror or error}"
        ) from error
