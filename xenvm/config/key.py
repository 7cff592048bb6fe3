# SPDX-License-Identifier: GPL-2.0-or-later
"""What a row of the table of keys holds; the rows are in guest_keys, device_keys and machine_keys."""

from __future__ import annotations

from xenvm.choice import StrChoice
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.config.scalars import Parser


class Guests(StrChoice):
    """The guest types a key may be given for."""

    ANY = "any"
    PV = "pv"
    HVM = "hvm"

    def fit(self, *, hvm: bool) -> bool:
        """Tell whether a guest of this type takes the key."""
        return self is Guests.ANY or (self is Guests.HVM) == hvm


class Group(StrChoice):
    """The chapters of the reference page."""

    LIFE = "Identity and life cycle"
    BUILD = "Kernel, memory and processors"
    DEVICES = "Devices"
    MACHINE = "The virtual machine of an HVM guest"


class _Required:
    """The default of a key without one."""

    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


class Key(Record, kw_only=True):
    """One key: where its value goes in Config, what it takes, what it does."""

    name: str
    group: Group
    field: str
    parse: Parser
    value: str
    help: str
    applied: str
    default: object = None
    hvm_default: object = None
    synonyms: tuple[str, ...] = ()
    second_field: str = ""
    repeatable: bool = False
    blank_is_default: bool = False
    guests: Guests = Guests.ANY
    published: bool = False

    def default_for(self, *, hvm: bool) -> object:
        """Return the value of a key that the file does not give; REQUIRED if it must."""
        return self.hvm_default if hvm and self.hvm_default is not None else self.default


# Words that many rows share in their column `value`
SWITCH: Final = "true or false"
PATH: Final = "absolute path"
MAX_INT: Final = 2**31 - 1
