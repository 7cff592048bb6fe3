# SPDX-License-Identifier: GPL-2.0-or-later
"""What an HVM guest starts with: firmware loader and BIOS, and what it may see of the host's own tables.

The tables are read by an unpacker, which picks what is on its list and checks it; here they are only opened.
"""

from __future__ import annotations

import os

from xenvm.boundary.messages import Failed
from xenvm.boundary.workers import Tables, Unpacked
from xenvm.broker import host
from xenvm.broker.making import Making
from xenvm.errors import ExitCode, ProtocolError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Final

    from xenvm.boundary.machine import Machine
    from xenvm.broker.making import Step, Steps

SMBIOS: Final = "/sys/firmware/dmi/tables/DMI"
ACPI: Final = ("/sys/firmware/acpi/tables/SLIC", "/sys/firmware/acpi/tables/MSDM")


class Firmware(Making):
    """The firmware of one start. `ready` are loader, BIOS, then as they are wanted SMBIOS's and ACPI's tables."""

    WHAT: ClassVar = "firmware"

    def __init__(self, images: list[int], machine: Machine, uuid: str, log: int) -> None:
        """Take over `images`, loader and BIOS; raise XenvmError when the host has not what is wanted of it."""
        self._open, self._machine = images, machine
        super().__init__(uuid, log)

    def _prepare(self) -> Steps:
        ready = [*self._open]
        if self._machine.smbios:
            ready.append((yield from self._picked("smbios-pt", (SMBIOS,), smbios=True)))
        if self._machine.slic:
            ready.append((yield from self._picked("acpi-pt", ACPI, smbios=False)))
        return ready

    def _picked(self, key: str, paths: tuple[str, ...], *, smbios: bool) -> Step:
        handed = [os.memfd_create("tables", os.MFD_CLOEXEC)]
        try:
            handed += self._tables(key, paths)
            answer = yield self._ask(Tables(smbios, self._machine.oem_types), *handed)
            if isinstance(answer, Failed):
                fault = answer.fault
                raise XenvmError(f"{key}: {fault.message}", hint=fault.hint, code=ExitCode(fault.code))
            if not isinstance(answer, Unpacked):
                raise ProtocolError("an unpacker answered with something else")
            readable = os.open(f"/proc/self/fd/{handed[0]}", os.O_RDONLY | os.O_CLOEXEC)  # whoever wrote it has ended
        finally:
            host.close_all(handed)
        self._open.append(readable)
        return readable

    def _tables(self, key: str, paths: tuple[str, ...]) -> list[int]:
        opened = []
        for path in paths:
            try:
                opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
            except FileNotFoundError:
                continue
            except OSError as error:
                host.close_all(opened)
                raise XenvmError(f"{key}: cannot open {path}: {error.strerror}") from error
        if not opened:
            raise XenvmError(f"{key}: this host has no such table: {' or '.join(paths)}", hint="leave the key out")
        return opened

    def _forget(self) -> None:
        host.close_all(self._open)
        self._open.clear()
