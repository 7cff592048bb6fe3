# SPDX-License-Identifier: GPL-2.0-or-later
"""The forms of short texts: functions that tell whether a text has one. Imports nothing.

Regular expressions would say some of it in fewer words, but importing `re` takes longer than the bare interpreter does
to start, and each process of a monitor would do it to check ten short texts.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Form = Callable[[str], bool]

DIGITS = frozenset("0123456789")
HEX_DIGITS = DIGITS | frozenset("abcdef")
LOWER = frozenset("abcdefghijklmnopqrstuvwxyz")
TRUE = frozenset({"true", "yes", "y", "1"})
FALSE = frozenset({"false", "no", "n", "0"})
"""The words of a switch, in the config file and in commands; in any case."""
LETTERS = LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def of(characters: frozenset[str], least: int, most: int) -> Form:
    """Return the form of texts of `least` to `most` of these characters."""
    return lambda text: least <= len(text) <= most and characters.issuperset(text)


def one_of(*words: str) -> Form:
    """Return the form that these words alone have."""
    return frozenset(words).__contains__


def grouped(separator: str, characters: frozenset[str], *lengths: int) -> Form:
    """Return the form of groups of characters, of these lengths, with a separator between them."""

    def check(text: str) -> bool:
        groups = text.split(separator)
        return [len(group) for group in groups] == [*lengths] and all(map(characters.issuperset, groups))

    return check


def number(most_digits: int, *, zero: bool = True) -> Form:
    """Return the form of a decimal number without leading zeros, of at most so many digits."""

    def check(text: str) -> bool:
        plain = 0 < len(text) <= most_digits and DIGITS.issuperset(text)
        return plain and (text[0] != "0" or (zero and text == "0"))

    return check


def printable(text: str) -> bool:
    """Tell whether a text has printable ASCII characters and blanks only."""
    return text.isascii() and text.isprintable()


uuid = grouped("-", HEX_DIGITS, 8, 4, 4, 4, 12)
"""The canonical form: hexadecimal digits in lower case."""
