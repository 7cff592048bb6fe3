# SPDX-License-Identifier: GPL-2.0-or-later
"""Saving a domain, step by step: ask the guest, write, and let it run again when anything fails.

Whoever loses this process in the middle resumes the domain (the job RESUME): that is right at any moment, and twice.
"""

from __future__ import annotations

import os
import time

from xenvm.boundary.machine import STATE_LIMIT_BYTES, Wish
from xenvm.boundary.messages import DomainState
from xenvm.context import suppress
from xenvm.errors import ProtocolError, TimeoutExpiredError, WrongStateError, XenvmError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.builder import tree
from xenvm.helpers.builder.hypervisor import NOT_KNOWN, SHUTDOWN_SUSPEND, Hooks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from xenvm.boundary.messages import Domain, Grants, Job
    from xenvm.helpers.builder.hypervisor import Hypervisor
    from xenvm.helpers.exchange import Devices
    from xenvm.helpers.store import Store

    Tell = Callable[..., None]

PAGE_KIB: Final = 4
CHUNK_BYTES: Final = 1 << 20
POLL_S: Final = 0.02
TELL_PAUSE_S: Final = 0.5  # between two messages about how far it is
ROUNDS_LIMIT: Final = 5  # over the memory of a guest that still runs, and the pages that are few: as in libxenguest
FEW_PAGES: Final = 50
WRITTEN_LIMIT: Final = 1.5  # times the guest's memory, before it is suspended after all: an image has a largest size
LATE_S: Final = 5.0  # for a guest that has acknowledged, when saving has failed by then, until it is suspended


class Saving:
    """One guest that is being saved."""

    def __init__(self, xen: Hypervisor, store: Store, job: Job, tell: Tell, broker: Devices) -> None:
        self._xen, self._store, self._job, self._tell, self._broker = xen, store, job, tell, broker
        self._asked = False
        self._machine = bool(tree.read_model(store, job.uuid)[0])
        """Whether it has a device model: the config may be a newer one."""
        self._told_s = self._stopped_s = self._writing_s = self._looked_s = 0.0
        self._memory_kib = 0
        self._round, self._round_s = 0, 0.0
        self._dirty = self._dirty_s = NOT_KNOWN
        """Pages that the guest has written to while the last round was written, and how many in a second."""
        self._first = 0  # what libxenguest counts for the first round: also frames that are not memory

    def run(self, descriptors: list[int], domain: Domain, *, go_on: bool) -> str:
        """Write the image; return what there is to say of it: its length, how long the guest stood still.

        `descriptors` are a pipe and, of an HVM guest, the file with the state of its device model. `go_on` lets the
        guest run again, else it stays suspended. On any failure it runs on. A process at the other end of the pipe puts
        the image on the disk.
        """
        if domain.state is not DomainState.RUNNING:
            raise WrongStateError(f"domain {domain.domid} is {domain.state}: a guest suspends only while it runs")
        if bool(self._job.grants.machine) is not self._machine:
            raise WrongStateError(
                "the config file is of another type of guest than the one that runs: nobody could restore its image",
                hint="the key hvm must be what it was when the guest was started",
            )
        self._memory_kib, pipe = domain.memory_kib, descriptors[0]
        grants = self._as_built(domain.domid)
        self._broker.room(domain.memory_kib)
        hooks = Hooks(self._suspend, self._frames, self._track, self._another)
        try:
            self._xen.save(domain.domid, pipe, grants, hooks, live=self._job.live)
            for state in descriptors[1:]:
                _append_state(pipe, state)
            imagefile.write(pipe, saved.TAIL)
            if go_on:
                self.resume()
                self._asked = False
            still_ms = round((time.monotonic() - self._stopped_s) * 1000)
            self._tell("finishing the image", 0, 0)
            os.close(pipe)
            told = f"image_bytes={self._broker.written()}"
            if (compression := self._job.grants.image_compression) != "none":
                told += f" image_compression={compression}"
            return f"{told} still_ms={still_ms}" + (f" rounds={self._round}" if self._job.live else "")
        except BaseException:
            if self._asked:
                with suppress(XenvmError):  # the first failure is the one to tell; the next look resumes it
                    self._give_up()
            raise

    def _as_built(self, domid: int) -> Grants:
        """Return the grants with the memory and the vcpus that this domain has: the config may be a newer one."""
        kib = {}
        for name in ("static-max", "target", "videoram"):
            path = f"{tree.domain_path(domid)}/memory/{name}"
            value = self._store.read(path) or b""
            if not value.isdigit():
                raise XenvmError(f"the node {path} does not say how much memory the guest has: nothing was saved")
            kib[name] = int(value)
        return self._job.grants.but(
            memory_mib=(kib["target"] + kib["videoram"]) >> 10,
            memory_max_mib=kib["static-max"] >> 10,
            vcpus=self._xen.vcpus(domid),
        )

    def _suspend(self) -> None:
        """Ask the guest to suspend, and wait until it has; then its device model stands still and says its state.

        An HVM guest without PV drivers, or one that sleeps, is suspended without a word.
        """
        self._tell("waiting for the guest to suspend", 0, 0)
        path, domid = self._request_path, self._job.domid
        self._asked, self._stopped_s = True, time.monotonic()
        if self._machine and not (self._xen.has_drivers(domid) and self._xen.sleep_state(domid) == 0):
            self._xen.suspend(domid)
        else:
            self._store.write(path, "suspend")
        end = time.monotonic() + self._job.timeout_s
        while (domain := self._look()).state is not DomainState.SHUTDOWN:
            if domain.state in (DomainState.ABSENT, DomainState.DYING):
                raise WrongStateError(f"domain {self._job.domid} is gone")
            if time.monotonic() >= end:
                raise TimeoutExpiredError(
                    f"the guest did not suspend within {self._job.timeout_s} s and runs on", hint=self._why_not()
                )
            time.sleep(POLL_S)
        if domain.reason != SHUTDOWN_SUSPEND:
            raise WrongStateError("the guest ended instead of suspending")
        self._wish(Wish.SAVE)
        self._tell("writing the image", 0, 0)
        self._writing_s = time.monotonic()

    def _why_not(self) -> str:
        home = tree.domain_path(self._job.domid)
        if self._store.read(f"{home}/control/feature-suspend") != b"1":  # its own word, so no more than a hint
            return "it has not said that it can (control/feature-suspend): is it still booting, or paused?"
        if self._store.read(self._request_path) == b"suspend":
            return "it has not taken the request (control/shutdown): is it paused, or very busy? timeout=S waits longer"
        return "it took the request and then failed; its console says why. timeout=S waits longer"

    def _frames(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= TELL_PAUSE_S:
            self._told_s = now_s
            kib = (done * PAGE_KIB, total * PAGE_KIB)
            runs = self._job.live and not self._asked
            rate_kib_s = round(kib[0] / max(now_s - (self._round_s if runs else self._writing_s), POLL_S))
            if runs:
                dirty = (self._dirty, rate_kib_s, self._dirty_s)
                self._tell("writing the memory of the running guest", *kib, self._round + 1, *dirty)
            else:
                self._tell("writing the image", *kib, 0, NOT_KNOWN, rate_kib_s)

    def _wish(self, wish: Wish) -> None:
        """Have the device model do something, if there is one."""
        if self._machine:
            self._broker.model(wish)

    def _track(self, enable: bool) -> None:
        self._wish(Wish.TRACK if enable else Wish.UNTRACK)

    def _another(self, rounds: int, written: int, dirty: int) -> bool:
        """Tell whether to go once more over the memory of the running guest, after so many rounds."""
        if rounds != self._round or not self._round_s:
            self._round, self._round_s = rounds, time.monotonic()
        self._first = written if rounds == 1 and not self._first else self._first
        if dirty != NOT_KNOWN:
            now_s = time.monotonic()
            if rounds:  # before that it is all there is
                self._dirty, self._dirty_s = dirty, round(dirty / max(now_s - self._looked_s, POLL_S))
            self._looked_s = now_s
        pages = self._memory_kib / PAGE_KIB
        beyond = rounds > 0 and pages + written - self._first >= WRITTEN_LIMIT * pages
        few = rounds > 0 and NOT_KNOWN < dirty < FEW_PAGES
        return rounds < ROUNDS_LIMIT and not beyond and not few

    def _give_up(self) -> None:
        """Let the guest run on; one that has taken the request just now is waited for, for a moment."""
        if tree.withdraw(self._store, self._job.domid) and self._look().state is not DomainState.SHUTDOWN:
            return
        end = time.monotonic() + LATE_S
        while self._look().state is DomainState.RUNNING and time.monotonic() < end:
            time.sleep(POLL_S)
        self.resume()

    def settle(self) -> None:
        """End what a builder has left that has died over saving: the tracking of a live guest's memory, and sleep."""
        if self._machine:
            self._xen.stop_tracking(self._job.domid)
            if self._look().state is not DomainState.SHUTDOWN:
                with suppress(XenvmError):  # a device model that is not there tracks nothing
                    self._wish(Wish.RUN)
        self.resume()

    def resume(self) -> None:
        """Wake the domain in place if it is suspended, its device model before it.

        Of one that runs xenstored is told too: whoever has woken it may have died before that.
        """
        domain = self._look()
        if domain.state is DomainState.SHUTDOWN and domain.reason == SHUTDOWN_SUSPEND:
            self._wish(Wish.RUN)
            self._xen.resume(domain.domid)
        elif domain.state not in (DomainState.RUNNING, DomainState.PAUSED):
            return
        self._store.resume(domain.domid)

    def _look(self) -> Domain:
        domain = self._xen.look(self._job.domid, self._job.uuid)
        if domain is None:
            raise XenvmError(f"domain {self._job.domid} is gone")
        return domain

    @property
    def _request_path(self) -> str:
        return f"{tree.domain_path(self._job.domid)}/control/shutdown"


def _append_state(pipe: int, state: int) -> None:
    """Write what a device model has said of its state into the image; it is not looked at."""
    size = os.fstat(state).st_size
    if not 0 < size <= STATE_LIMIT_BYTES:
        raise ProtocolError(f"device model: it wrote a state of {size} bytes")
    imagefile.write(pipe, saved.emulator_head(size))
    left, at = size, 0
    while left and (content := os.pread(state, min(left, CHUNK_BYTES), at)):
        imagefile.write(pipe, content)
        at, left = at + len(content), left - len(content)
    imagefile.write(pipe, saved.padding(saved.EMULATOR.size + size))
    if left:
        raise ProtocolError("device model: its state has become shorter")
