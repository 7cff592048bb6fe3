# SPDX-License-Identifier: GPL-2.0-or-later
"""/etc/xenvm/policy.toml: what an administrator allows all VMs of a host, and its defaults.

default-bridge = "br0"
bridges = ["br0", "dmz"]    # those a card may be added to or moved to while a guest runs
disk-directories = ["/srv/discs"]    # those whose files may be added as disks by clients who cannot open them
image-directories = ["/srv/images"]    # those in which clients who cannot write there may have save images
"""

from __future__ import annotations

import os

from xenvm.boundary.messages import HostPolicy
from xenvm.errors import ConfigError, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

PATH: Final = "/etc/xenvm/policy.toml"
LIMIT_BYTES: Final = 16 * 1024
NO_POLICY: Final = HostPolicy("", ())
_KEYS: Final = {
    "default-bridge": "default_bridge",
    "bridges": "bridges",
    "disk-directories": "directories",
    "image-directories": "image_directories",
}


def prepare(descriptor: int) -> None:
    """Load what reading a policy needs, if there is one: once confined, a process can load nothing more."""
    if os.fstat(descriptor).st_size:
        import tomllib  # noqa: F401, PLC0415 - a tenth of a parser's start, for the few hosts that have a policy


def host_policy(untrusted_file: bytes) -> HostPolicy:
    """Return the policy in a file; raise ConfigError for anything in it that is not one."""
    if not untrusted_file:
        return NO_POLICY
    if len(untrusted_file) > LIMIT_BYTES:
        raise ConfigError(f"{PATH}: longer than {LIMIT_BYTES} bytes")
    import tomllib  # noqa: PLC0415 - loaded by prepare

    try:
        found = tomllib.loads(untrusted_file.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{PATH}: {error}") from error
    unknown = sorted(found.keys() - _KEYS.keys())
    if unknown:
        raise ConfigError(f"{PATH}: unknown key {unknown[0]!a}", hint=f"known are {', '.join(_KEYS)}")
    try:
        return HostPolicy.from_body(NO_POLICY.as_body() | {_KEYS[key]: value for key, value in found.items()})
    except ProtocolError as error:
        raise ConfigError(f"{PATH}: {error.message}") from error
