# SPDX-License-Identifier: GPL-2.0-or-later
"""The libxenguest part of save and restore: a suspended domain to a descriptor, a stream into an empty domain.

libxenguest calls back to have the guest suspended, and to tell how far it is. One transfer at a time in a process.
"""

from __future__ import annotations

from xenvm.errors import XenvmError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.builder.hypervisor import HypervisorError, Rings
from xenvm.helpers.builder.xen import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from xenvm.boundary.messages import Grants
    from xenvm.helpers.builder.hypervisor import Channels, Frames
    from xenvm.helpers.builder.xen import Hypervisor

SUSPENDED, NOT_SUSPENDED = 1, 0  # what the suspend callback returns (xenguest.h): the inverse of what is usual


class _Transfer:
    """What the callbacks of the running transfer do, and what went wrong in them."""

    def __init__(self) -> None:
        self.suspend: Callable[[], None] = lambda: None
        self.frames: Frames = lambda _done, _total: None
        self.failure: XenvmError | None = None


_running: Final = _Transfer()


@ffi.def_extern(onerror=lambda *_: NOT_SUSPENDED)  # type: ignore[misc]
def xenvm_suspend(_data: object) -> int:
    """Have the guest suspended; an exception cannot pass through the library, so it is kept."""
    try:
        _running.suspend()
    except XenvmError as failure:
        _running.failure = failure
        return NOT_SUSPENDED
    return SUSPENDED


@ffi.def_extern()  # type: ignore[misc]
def xenvm_frames(done: int, total: int) -> None:
    """Pass on how many page frames are done."""
    _running.frames(done, total)


def save(
    xen: Hypervisor, domid: int, image: int, grants: Grants, suspend: Callable[[], None], frames: Frames
) -> saved.Head:
    """Write the whole image of a running domain; `suspend` has the guest suspended and raises when it does not.

    Raise XenvmError with the reason. The domain is left as it is then, suspended or not: resuming is the caller's.
    """
    head = saved.head(grants)
    callbacks = ffi.new("struct save_callbacks *")
    callbacks.suspend = lib.xenvm_suspend
    _running.suspend, _running.frames, _running.failure = suspend, frames, None
    imagefile.write(image, head.content)
    lib.xenvm_tell_frames(lib.xenvm_frames)
    lib.xenvm_clear_error()
    try:
        result = lib.xc_domain_save(xen.handle, image, domid, 0, callbacks, lib.XC_STREAM_PLAIN, -1)
        number = ffi.errno
    finally:
        lib.xenvm_tell_frames(ffi.NULL)
    if _running.failure:
        raise _running.failure
    if result < 0:
        raise HypervisorError(f"writing the image: {xen.reason(number)}", hint=imagefile.hint(number))
    imagefile.write(image, saved.TAIL)
    return head


def restore(xen: Hypervisor, domid: int, stream: int, channels: Channels) -> Rings:
    """Fill an empty domain from the stream of libxenguest; raise HypervisorError with the reason."""
    callbacks = ffi.new("struct restore_callbacks *")
    store, console = ffi.new("unsigned long *"), ffi.new("unsigned long *")
    lib.xenvm_clear_error()
    result = lib.xc_domain_restore(
        xen.handle,
        stream,
        domid,
        channels.store_port,
        store,
        channels.store_domid,
        channels.console_port,
        console,
        channels.console_domid,
        lib.XC_STREAM_PLAIN,
        callbacks,
        -1,
    )
    xen.check(result, "reading the image")
    return Rings(store_frame=int(store[0]), console_frame=int(console[0]))
