# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table of keys: parser, defaults, checks, canonical text and the reference page all read it."""

from __future__ import annotations

from xenvm.config.device_keys import DEVICE_KEYS
from xenvm.config.guest_keys import BUILD_KEYS, LIFE_KEYS
from xenvm.config.key import REQUIRED, Group, Guests, Key
from xenvm.config.machine_keys import MACHINE_KEYS
from xenvm.config.refused import REFUSED, RefusedKey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final


__all__ = ["KEYS", "REFUSED", "REQUIRED", "Group", "Guests", "Key", "RefusedKey", "find", "refused", "spellings"]

KEYS: Final = (*LIFE_KEYS, *BUILD_KEYS, *DEVICE_KEYS, *MACHINE_KEYS)
"""All keys, in the order of the reference page and of canonical files."""

_BY_NAME: Final[Mapping[str, Key]] = {name: key for key in KEYS for name in (key.name, *key.synonyms)}
_REFUSED: Final[Mapping[str, RefusedKey]] = {key.name: key for key in REFUSED}


def find(name: str) -> Key | None:
    """Return the key of that name or synonym."""
    return _BY_NAME.get(name)


def refused(name: str) -> RefusedKey | None:
    """Return why a key of earlier xenvm is not taken, if it is one of those."""
    return _REFUSED.get(name)


def spellings() -> tuple[str, ...]:
    """Return every name and synonym that a file may use."""
    return tuple(_BY_NAME)
