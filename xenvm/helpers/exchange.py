# SPDX-License-Identifier: GPL-2.0-or-later
"""The talk of a helper with its broker about one job that plugs devices.

The helper makes the nodes and says so; the broker meanwhile opens disks and has interfaces bridged, and says when; the
helper then lets the backends go on.
"""

from __future__ import annotations

from xenvm.boundary.images import Image, Packed, Packing
from xenvm.boundary.messages import Created, Failed, Ready
from xenvm.errors import ExitCode, ProtocolError, TimeoutExpiredError, XenvmError
from xenvm.helpers import devices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.checks import Message
    from xenvm.boundary.devices import DeviceState, Vbd
    from xenvm.boundary.frames import Channel
    from xenvm.boundary.messages import Job
    from xenvm.helpers.store import Store

IMAGE_WAIT_S: Final = 86400.0  # the job's own deadline, which the broker keeps, is the one that counts


class Devices:
    """The devices of one job, and the image that it restores or has compressed."""

    def __init__(self, channel: Channel, store: Store, job: Job) -> None:
        self._channel, self._store, self._job = channel, store, job

    def begin(self, domid: int, earlier: tuple[DeviceState, ...] = ()) -> None:
        """Make the nodes for `domid`, and let the broker begin with its part.

        `earlier` are the devices of a domain that was before, which processes outside may still serve.
        """
        wanted = bool(self._job.vbds or self._job.vifs)
        if wanted:
            devices.write(self._store, self._job.uuid, domid, self._job.vbds, self._job.vifs)
        if wanted or earlier:
            self.announce(domid, earlier)

    def announce(self, domid: int, earlier: tuple[DeviceState, ...] = ()) -> None:
        """Tell the broker that the devices of `domid` are there for its part."""
        self._channel.send(Created(domid, earlier))

    def finish(self, domid: int) -> None:
        """Wait for the broker's part, then give the backends what they wait for; the guest may run after that."""
        if self._job.vbds or self._job.vifs:
            devices.connect(self._store, self._job.uuid, domid, self.wait(), self._job.vifs)

    def image(self) -> Image:
        """Wait until the image that is to be restored is checked; raise XenvmError with what is wrong with it."""
        message = self._of_image()
        if not isinstance(message, Image):
            raise ProtocolError("the broker did not say what the image is")
        return message

    def packing(self) -> None:
        """Wait until somebody will compress the image that is to be saved; raise XenvmError when nobody can."""
        if not isinstance(self._of_image(), Packing):
            raise ProtocolError("the broker did not say whether the image can be compressed")

    def packed(self) -> int:
        """Wait until the image is compressed and on the disk; return its length, or raise XenvmError why it is not."""
        message = self._of_image()
        if not isinstance(message, Packed):
            raise ProtocolError("the broker did not say what has become of the image")
        return message.length

    def _of_image(self) -> Message | None:
        received = self._channel.receive(deadline_s=IMAGE_WAIT_S)
        message = received[0] if received else None
        if isinstance(message, Failed):
            fault = message.fault
            raise XenvmError(fault.message, hint=fault.hint, code=ExitCode(fault.code))
        return message

    def wait(self) -> tuple[Vbd, ...]:
        """Wait for the broker's part and return the disks with their numbers; raise XenvmError with its reason."""
        try:
            received = self._channel.receive(deadline_s=self._job.timeout_s)
        except TimeoutExpiredError:
            names = ", ".join(f"{kind} {device}" for kind, device in devices.places(self._job.vbds, self._job.vifs))
            raise TimeoutExpiredError(
                f"{names}: disks were not opened or interfaces not bridged within {self._job.timeout_s} s",
                hint="the key device-timeout gives them more time; the monitor's log says what they wait for",
            ) from None
        message = received[0] if received else None
        if isinstance(message, Failed):
            fault = message.fault
            raise XenvmError(fault.message, hint=fault.hint, code=ExitCode(fault.code))
        if not isinstance(message, Ready):
            raise ProtocolError("the broker did not say whether the devices are ready")
        return message.vbds
