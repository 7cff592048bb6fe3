# SPDX-License-Identifier: GPL-2.0-or-later
"""What `doctor` says of the host: things missing that the devices of guests need."""

from __future__ import annotations

import os

from xenvm.boundary.place import HERE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

RULES: Final = "60-xenvm.rules"
RULE_DIRECTORIES: Final = ("/etc/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d")
HELPER: Final = "/usr/libexec/xenvm/hotplug"
MODULES: Final = ("xen_blkback", "xen_netback", "loop", "nbd", "dm_crypt")


def of_host() -> list[str]:
    """Return what the host lacks, one sentence each with what to do."""
    if HERE.simulator:
        return []  # it has no modules to load, and plays udev itself
    found = []
    if not any(_is_file(f"{directory}/{RULES}") for directory in RULE_DIRECTORIES):
        found.append(f"udev: no rule {RULES}; scripts/install-host installs it")
    elif not _is_file(HELPER):
        found.append(f"udev: the rule is there, but not what it runs, {HELPER}; scripts/install-host installs it")
    if not os.path.exists("/run/udev/control"):  # noqa: PTH110 - pathlib costs 5 ms at each start
        found.append("udev: udevd does not run; a device that something else removes is not noticed at once")
    missing = [name for name in MODULES if not os.path.isdir(f"/sys/module/{name}")]  # noqa: PTH112
    if missing:
        found.append(f"modules not loaded: {', '.join(missing)}; modprobe loads them when a disk or card needs them")
    return found


def _is_file(path: str) -> bool:
    return os.path.isfile(path)  # noqa: PTH113
