# SPDX-License-Identifier: GPL-2.0-or-later
"""Saving a domain, step by step: ask the guest, write, and let it run again when anything fails.

Whoever loses this process in the middle resumes the domain (the job RESUME): that is right at any moment, and twice.
"""

from __future__ import annotations

import os
import time

from xenvm.boundary.messages import DomainState
from xenvm.context import suppress
from xenvm.errors import TimeoutExpiredError, WrongStateError, XenvmError
from xenvm.helpers import imagefile
from xenvm.helpers.builder import image, tree
from xenvm.helpers.builder.hypervisor import SHUTDOWN_SUSPEND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from xenvm.boundary.messages import Domain, Grants, Job
    from xenvm.helpers.builder.hypervisor import Hypervisor
    from xenvm.helpers.exchange import Devices
    from xenvm.helpers.store import Store

    Tell = Callable[[str, int, int], None]

POLL_S: Final = 0.02
TELL_PAUSE_S: Final = 0.5  # between two messages about how far it is
LATE_S: Final = 5.0  # for a guest that has acknowledged, when saving has failed by then, until it is suspended


class Saving:
    """One guest that is being saved."""

    def __init__(self, xen: Hypervisor, store: Store, job: Job, tell: Tell, broker: Devices) -> None:
        self._xen, self._store, self._job, self._tell, self._broker = xen, store, job, tell, broker
        self._asked = False
        self._told_s = 0.0

    def run(self, descriptor: int, domain: Domain, *, go_on: bool) -> str:
        """Write the image; return its length in bytes, and how it is compressed, if it is.

        `go_on` lets the guest run again, else it stays suspended. On any failure it runs on. An image that is to be
        compressed is written into a pipe; a process at its other end puts it on the disk.
        """
        if domain.state is not DomainState.RUNNING:
            raise WrongStateError(f"domain {domain.domid} is {domain.state}: a guest suspends only while it runs")
        compression = self._job.grants.image_compression
        if compression == "none":
            imagefile.check_space(descriptor, domain.memory_kib << 10)
        else:
            self._broker.packing()
        grants = self._as_built(domain.domid)
        try:
            head = self._xen.save_pv(domain.domid, descriptor, grants, self._suspend, self._frames)
            if go_on:
                self.resume()
                self._asked = False
            self._tell("finishing the image", 0, 0)
            if compression == "none":
                return str(image.finish(descriptor, head, self._xen.punch))
            os.close(descriptor)
            return f"{self._broker.packed()} {compression}"
        except BaseException:
            if self._asked:
                with suppress(XenvmError):  # the first failure is the one to tell; the next look resumes it
                    self._give_up()
            raise

    def _as_built(self, domid: int) -> Grants:
        """Return the grants with the memory and the vcpus that this domain has: the config may be a newer one."""
        kib = {}
        for name in ("static-max", "target"):
            path = f"{tree.domain_path(domid)}/memory/{name}"
            value = self._store.read(path) or b""
            if not value.isdigit():
                raise XenvmError(f"the node {path} does not say how much memory the guest has: nothing was saved")
            kib[name] = int(value)
        return self._job.grants.but(
            memory_mib=kib["target"] >> 10, memory_max_mib=kib["static-max"] >> 10, vcpus=self._xen.vcpus(domid)
        )

    def _suspend(self) -> None:
        """Ask the guest to suspend, and wait until it has."""
        self._tell("waiting for the guest to suspend", 0, 0)
        path = self._request_path
        self._asked = True
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
        self._tell("writing the image", 0, 0)

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
            self._tell("writing the image", done * image.PAGE_KIB, total * image.PAGE_KIB)

    def _give_up(self) -> None:
        """Let the guest run on; one that has taken the request just now is waited for, for a moment."""
        if tree.withdraw(self._store, self._job.domid) and self._look().state is not DomainState.SHUTDOWN:
            return
        end = time.monotonic() + LATE_S
        while self._look().state is DomainState.RUNNING and time.monotonic() < end:
            time.sleep(POLL_S)
        self.resume()

    def resume(self) -> None:
        """Wake the domain in place if it is suspended.

        Of one that runs xenstored is told too: whoever has woken it may have died before that.
        """
        domain = self._look()
        if domain.state is DomainState.SHUTDOWN and domain.reason == SHUTDOWN_SUSPEND:
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
