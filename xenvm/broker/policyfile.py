# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening the host's policy file for the parser. Light, since the broker does it before it imports anything else."""

from __future__ import annotations

import os
import stat

from xenvm.boundary.place import HERE
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

HOST_POLICY: Final = HERE.policy


def open_host_policy() -> int:
    """Open the host's policy file, which only root may have written; an empty file in its place when there is none."""
    try:
        descriptor = os.open(HOST_POLICY, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return os.memfd_create("policy", os.MFD_CLOEXEC)
    except OSError as error:
        raise XenvmError(f"{HOST_POLICY}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(descriptor)
        raise XenvmError(f"{HOST_POLICY} is not a file that only root can change", hint="chown root, chmod 0644")
    return descriptor
