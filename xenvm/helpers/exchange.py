# SPDX-License-Identifier: GPL-2.0-or-later
"""The talk of a helper with its broker about one job that plugs devices.

The helper makes the nodes and says so; the broker meanwhile opens disks and has interfaces bridged, and says when; the
helper then lets the backends go on.
"""

from __future__ import annotations

from xenvm.boundary.devices import Kind
from xenvm.boundary.images import Image, Room, Sync, Writing, Written
from xenvm.boundary.machine import EndModel, Granted, Loaded, Wish, Wished
from xenvm.boundary.messages import Created, Failed, Ready
from xenvm.errors import ExitCode, ProtocolError, TimeoutExpiredError, XenvmError
from xenvm.helpers import devices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.devices import DeviceState, Vbd
    from xenvm.boundary.frames import Channel
    from xenvm.boundary.machine import ModelState
    from xenvm.boundary.messages import Job
    from xenvm.helpers.store import Store

IMAGE_WAIT_S: Final = 86400.0  # the job's own deadline, which the broker keeps, is the one that counts
MODEL_START_WAIT_S: Final = 90.0  # QEMU's own 60 seconds (what xl gives it), and the way there
MODEL_END_WAIT_S: Final = 20.0  # longer than the broker waits for QEMU to end
WISH_WAIT_S: Final = 60.0  # longer than the qmp worker waits for QEMU


class Devices:
    """The devices of one job, and the image that it restores or saves."""

    def __init__(self, channel: Channel, store: Store, job: Job) -> None:
        self._channel, self._store, self._job = channel, store, job

    def begin(self, domid: int, earlier: tuple[DeviceState, ...] = ()) -> None:
        """Make the nodes for `domid`, and let the broker begin with its part.

        `earlier` are the devices of a domain that was before, which processes outside may still serve.
        """
        wanted = bool(self._job.vbds or self._job.vifs)
        if wanted:
            devices.write(self._store, self._job.uuid, domid, self._job.vbds, self._job.vifs)
        if wanted or earlier or self._job.grants.machine:
            self.announce(domid, earlier)

    def announce(self, domid: int, earlier: tuple[DeviceState, ...] = ()) -> None:
        """Tell the broker that the devices of `domid` are there for its part."""
        self._channel.send(Created(domid, earlier))

    def finish(self, domid: int) -> ModelState | None:
        """Wait for the broker's part, then give the backends what they wait for; the guest may run after that.

        Return the device model, which runs by then, of a guest that has one.
        """
        if self._job.grants.machine:
            self._channel.send(Loaded(domid))
        elif not self._job.vbds and not self._job.vifs:
            return None
        ready = self._ready(domid)
        devices.connect(self._store, self._job.uuid, domid, ready.vbds, self._job.vifs)
        return ready.models[0] if ready.models else None

    def release(self, domid: int, server: str) -> None:
        """Have the broker end the device model of a domain that is about to go; raise XenvmError when it does not.

        Without a `server` it is not known which process that is, and the broker looks for it.
        """
        self._channel.send(EndModel(domid, server))
        while (received := self._channel.receive(deadline_s=MODEL_END_WAIT_S)) is not None:
            if isinstance(received[0], Ready) and not received[0].vbds and not received[0].models:
                return
        raise ProtocolError("the broker did not end the device model")

    def model(self, wish: Wish) -> None:
        """Have the guest's device model do something; raise XenvmError with the reason."""
        self._channel.send(Wished(wish))
        if not isinstance(self._answer(WISH_WAIT_S), Granted):
            raise ProtocolError(f"the broker did not say whether the device model did {wish}")

    def image(self) -> Image:
        """Wait until the image that is to be restored is checked; raise XenvmError with what is wrong with it."""
        message = self._answer(IMAGE_WAIT_S)
        if not isinstance(message, Image):
            raise ProtocolError("the broker did not say what the image is")
        return message

    def room(self, memory_kib: int) -> None:
        """Ask for room for the image of a guest with so much memory; raise XenvmError when nobody can write it."""
        self._channel.send(Room(memory_kib))
        if not isinstance(self._answer(IMAGE_WAIT_S), Writing):
            raise ProtocolError("the broker did not say whether the image can be written")

    def written(self) -> int:
        """Wait until the image is on the disk; return its length, or raise XenvmError why it is not."""
        self._channel.send(Sync())
        message = self._answer(IMAGE_WAIT_S)
        if not isinstance(message, Written):
            raise ProtocolError("the broker did not say what has become of the image")
        return message.length

    def _answer(self, deadline_s: float) -> Message | None:
        """Return what the broker says next, None when it has ended; what it says that failed is raised."""
        received = self._channel.receive(deadline_s=deadline_s)
        message = received[0] if received else None
        if isinstance(message, Failed):
            fault = message.fault
            raise XenvmError(fault.message, hint=fault.hint, code=ExitCode(fault.code))
        return message

    def wait(self) -> tuple[Vbd, ...]:
        """Wait for the broker's part and return the disks with their numbers; raise XenvmError with its reason."""
        return self._ready(self._job.domid).vbds

    def _ready(self, domid: int) -> Ready:
        patience_s = self._job.timeout_s + (MODEL_START_WAIT_S if self._job.grants.machine else 0)
        try:
            message = self._answer(patience_s)
        except TimeoutExpiredError:
            disks, cards = self._job.vbds, self._job.vifs
            names = [devices.named(Kind.VBD, vbd.name) for vbd in disks] + [
                devices.named(Kind.VIF, vif.id) for vif in cards
            ]
            nodes = [f"{devices.backend_path(Kind.VBD, domid, vbd.device)}/physical-device" for vbd in disks]
            nodes += [f"{devices.INTERFACES}/vif{domid}.{vif.id}/master" for vif in cards]
            without = f" (nothing in {', '.join(nodes)})" if nodes else ""
            raise TimeoutExpiredError(
                f"{', '.join(names) or 'device model'}: disks were not opened or interfaces not bridged within "
                f"{patience_s:g} s{without}",
                hint="the key device-timeout gives them more time; the monitor's log may say more",
            ) from None
        if not isinstance(message, Ready):
            raise ProtocolError("the broker did not say whether the devices are ready")
        return message
