# SPDX-License-Identifier: GPL-2.0-or-later
"""The libxenguest part of save and restore: a suspended domain to a descriptor, a stream into an empty domain.

libxenguest calls back to have the guest suspended, to ask before each round over the memory of one that still runs, and
to tell how far it is. One transfer at a time in a process.
"""

from __future__ import annotations

from xenvm.errors import XenvmError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.builder.hypervisor import NOT_KNOWN, HypervisorError, Rings
from xenvm.helpers.builder.xen import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.messages import Grants
    from xenvm.helpers.builder.hypervisor import Channels, Hooks
    from xenvm.helpers.builder.xen import Hypervisor

SUSPENDED, NOT_SUSPENDED = 1, 0  # what the suspend callback returns (xenguest.h): the inverse of what is usual
FAILED: Final = -1  # of the callback about the device model


class _Transfer:
    """What the callbacks of the running transfer do, and what went wrong in them."""

    def __init__(self) -> None:
        self.hooks: Hooks | None = None
        self.failure: XenvmError | None = None


_running: Final = _Transfer()


@ffi.def_extern(onerror=lambda *_: NOT_SUSPENDED)  # type: ignore[misc]
def xenvm_suspend(_data: object) -> int:
    """Have the guest suspended; an exception cannot pass through the library, so it is kept."""
    if _running.hooks is None:
        return NOT_SUSPENDED
    try:
        _running.hooks.suspend()
    except XenvmError as failure:
        _running.failure = failure
        return NOT_SUSPENDED
    return SUSPENDED


@ffi.def_extern()  # type: ignore[misc]
def xenvm_frames(done: int, total: int) -> None:
    """Pass on how many page frames are done."""
    if _running.hooks:
        _running.hooks.frames(done, total)


@ffi.def_extern(onerror=lambda *_: FAILED)  # type: ignore[misc]
def xenvm_track(_domid: int, enable: int, _data: object) -> int:
    """Have the device model note what it writes to, or not any more."""
    try:
        if _running.hooks:
            _running.hooks.track(bool(enable))
    except XenvmError as failure:
        _running.failure = _running.failure or failure
        return FAILED
    return 0


@ffi.def_extern(onerror=lambda *_: lib.XGS_POLICY_ABORT)  # type: ignore[misc]
def xenvm_round(number: int, written: int, dirty: int) -> int:
    """Say whether there is to be another round while the guest runs."""
    known = dirty if dirty >= 0 else NOT_KNOWN
    if _running.hooks and not _running.hooks.go_on(number, written, known):
        return int(lib.XGS_POLICY_STOP_AND_COPY)
    return int(lib.XGS_POLICY_CONTINUE_PRECOPY)


def save(xen: Hypervisor, domid: int, pipe: int, grants: Grants, hooks: Hooks, *, live: bool) -> None:
    """Write the image of a running domain, up to the state of its device model, if it has one.

    Raise XenvmError with the reason. The domain is left as it is then, suspended or not: resuming is the caller's.
    """
    callbacks = ffi.new("struct save_callbacks *")
    callbacks.suspend = lib.xenvm_suspend
    callbacks.switch_qemu_logdirty = lib.xenvm_track
    lib.xenvm_ask_rounds(callbacks, lib.xenvm_round)
    _running.hooks, _running.failure = hooks, None
    imagefile.write(pipe, saved.head(grants))
    lib.xenvm_tell_frames(lib.xenvm_frames)
    lib.xenvm_clear_error()
    try:
        result = lib.xc_domain_save(
            xen.handle, pipe, domid, lib.XCFLAGS_LIVE if live else 0, callbacks, lib.XC_STREAM_PLAIN, -1
        )
        number = ffi.errno
    finally:
        lib.xenvm_tell_frames(ffi.NULL)
        _running.hooks = None
    if _running.failure:
        raise _running.failure
    if result < 0:
        raise HypervisorError(f"writing the image: {xen.reason(number)}")


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
