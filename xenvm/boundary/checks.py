# SPDX-License-Identifier: GPL-2.0-or-later
"""What a field of a message may hold, and the records that are checked field by field. No I/O.

A message is a record; CHECKS says for each field what is acceptable. An unknown or missing field, a wrong type or a
value out of range is a ProtocolError.
"""

from __future__ import annotations

from xenvm import forms
from xenvm.errors import ProtocolError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, ClassVar, Final, Self

    from xenvm.choice import StrChoice
    from xenvm.forms import Form

    Check = Callable[[object], Any]

INT32_MAX: Final = 2**31 - 1
NAME: Final = forms.of(forms.LETTERS | forms.DIGITS | frozenset("._+-"), 1, 64)

DIRECTORIES_LIMIT: Final = 16  # of each kind that a host's policy opens


def is_file_name(text: str) -> bool:
    """Tell whether a text may be the name of a file, or is empty."""
    return text not in (".", "..") and "/" not in text


def is_directory(text: str) -> bool:
    """Tell whether a text is an absolute path without empty, `.` and `..` parts."""
    root, *parts = text.split("/")
    return not root and bool(parts) and all(part and is_file_name(part) for part in parts)


def number(low: int, high: int) -> Check:
    """Accept an integer from `low` to `high`; a boolean is not an integer."""

    def check(untrusted: object) -> int:
        if type(untrusted) is not int or not low <= untrusted <= high:
            raise ProtocolError(f"not a number from {low} to {high}")
        return untrusted

    return check


def string(limit: int, form: Form | None = None) -> Check:
    """Accept a string of at most `limit` characters that has the `form`, a function of xenvm.forms.

    NUL, and halves of surrogate pairs, which cannot be encoded, are not among them.
    """

    def check(untrusted: object) -> str:
        if not isinstance(untrusted, str) or len(untrusted) > limit or not _is_text(untrusted):
            raise ProtocolError(f"not a text of at most {limit} characters")
        if form is not None and not form(untrusted):
            raise ProtocolError("text has another form")
        return untrusted

    return check


def _is_text(untrusted: str) -> bool:
    if "\0" in untrusted:
        return False
    if untrusted.isascii():
        return True
    try:
        untrusted.encode()
    except UnicodeEncodeError:
        return False
    return True


def flag(untrusted: object) -> bool:
    """Accept true or false."""
    if not isinstance(untrusted, bool):
        raise ProtocolError("not a boolean")
    return untrusted


def choice(kind: type[StrChoice]) -> Check:
    """Accept a member of a string enumeration by value."""

    def check(untrusted: object) -> StrChoice:
        if not isinstance(untrusted, str):
            raise ProtocolError("not a choice")
        try:
            return kind(untrusted)
        except ValueError as error:
            raise ProtocolError(f"not a {kind.__name__}") from error

    return check


def array(item: Check, limit: int) -> Check:
    """Accept a list of at most `limit` items and return it as a tuple."""

    def check(untrusted: object) -> tuple[Any, ...]:
        if not isinstance(untrusted, list | tuple) or len(untrusted) > limit:
            raise ProtocolError(f"not a list of at most {limit}")
        return tuple(item(untrusted_item) for untrusted_item in untrusted)

    return check


def table(key: Check, value: Check, limit: int) -> Check:
    """Accept an object of at most `limit` members."""

    def check(untrusted: object) -> dict[str, Any]:
        if not isinstance(untrusted, dict) or len(untrusted) > limit:
            raise ProtocolError(f"not an object of at most {limit} members")
        return {key(untrusted_key): value(untrusted_value) for untrusted_key, untrusted_value in untrusted.items()}

    return check


class Checked(Record):
    """A record whose every field has a check; nested ones appear as objects in a body."""

    CHECKS: ClassVar[Mapping[str, Check]]

    @classmethod
    def from_body(cls, untrusted_body: object) -> Self:
        """Return the record in `untrusted_body`, or raise ProtocolError naming the first field that is wrong."""
        if not isinstance(untrusted_body, dict) or untrusted_body.keys() != cls.CHECKS.keys():
            raise ProtocolError(f"{cls.__name__}: fields are not {', '.join(cls.CHECKS)}")
        checked: dict[str, Any] = {}
        for name, check in cls.CHECKS.items():
            try:
                checked[name] = check(untrusted_body[name])
            except ProtocolError as error:
                raise ProtocolError(f"{cls.__name__}.{name}: {error.message}") from error
        return cls(**checked)

    def as_body(self) -> dict[str, object]:
        """Return the JSON form."""
        return {name: _plain(getattr(self, name)) for name in self.FIELDS}


def _plain(value: object) -> object:
    if isinstance(value, Checked):
        return value.as_body()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class Message(Checked):
    """A record that travels in a frame of its own; DESCRIPTORS is how many may come with it."""

    KIND: ClassVar[int]
    DESCRIPTORS: ClassVar[int] = 0
