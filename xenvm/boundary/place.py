# SPDX-License-Identifier: GPL-2.0-or-later
"""Which host a process serves: this machine's Xen, or a simulated host in a directory.

A process learns it from the last two words of its own command line, `--simulator DIRECTORY`, and from nothing else: no
environment, no config file and no command can turn one into the other, and `ps` shows it. Without them it is Xen's.
"""

from __future__ import annotations

import sys

from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

OPTION: Final = "--simulator"
MARK: Final = "simulator"
"""The file in a socket directory that makes it a simulated host's; Xen's monitors refuse such a directory."""

LOOKS: Final = "looks"
"""The file beside the locks in which brokers say what a look at the whole host has shown."""


class Place(Record):
    """Where things are; `simulator` is the directory of a simulated host, "" stands for Xen's."""

    simulator: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What follows the arguments of each process that is to serve this host."""
        return (OPTION, self.simulator) if self.simulator else ()

    @property
    def sysfs(self) -> str:
        """The kernel's view of devices: backends, interfaces, bridges."""
        return f"{self.simulator}/sys" if self.simulator else "/sys"

    @property
    def stores(self) -> tuple[str, ...]:
        """The paths that xenstored may listen on."""
        if self.simulator:
            return (f"{self.simulator}/xenstored/socket",)
        return ("/run/xenstored/socket", "/var/run/xenstored/socket")

    @property
    def machine(self) -> str:
        """The socket that stands for the hypercall devices and the kernel of a simulated host."""
        return f"{self.simulator}/xenstored/machine"

    @property
    def logs(self) -> str:
        """The directory of the monitors' logs."""
        return f"{self.simulator}/log" if self.simulator else "/var/log/xenvm"

    @property
    def console_logs(self) -> str:
        """The directory where what guests print is logged."""
        return f"{self.simulator}/console" if self.simulator else "/var/log/xen/console"

    @property
    def policy(self) -> str:
        """The host's policy file."""
        return f"{self.simulator}/policy.toml" if self.simulator else "/etc/xenvm/policy.toml"


def of(words: Sequence[str]) -> Place:
    """Return the place that a command line names."""
    return Place(words[-1]) if len(words) > 3 and words[-2] == OPTION else Place()


HERE: Final = of(sys.argv)
