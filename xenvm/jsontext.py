# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON, as strictly as all of xenvm wants it: no member twice, no NaN or infinity. Imports next to nothing.

`json` of the standard library is regular expressions around two functions written in C; importing it takes longer than
the bare interpreter does to start. Here are those two without the rest. They are not a documented interface, so that an
interpreter which lacks them, or has changed them, gets `json` itself: the answers are the same, as a test shows.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_BLANKS = " \t\n\r"  # RFC 8259


class _Rules:
    """What the scanner asks of a decoder."""

    strict = True  # no control characters in texts
    object_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def object_pairs_hook(pairs: list[tuple[str, object]]) -> dict[str, object]:
        """Refuse an object in which a member stands twice: readers would not agree on what it says."""
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("duplicate member")
        return made

    @staticmethod
    def parse_constant(_text: str) -> object:
        """Refuse NaN, Infinity and -Infinity, which are no JSON."""
        raise ValueError("not a number")


def _refuse(value: object) -> object:
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _native() -> tuple[Callable[[str], object], Callable[[object, str, str], str]]:
    """Return the C scanner and encoder, tried once: whatever is wrong with them is an exception here."""
    from _json import encode_basestring_ascii, make_encoder, make_scanner  # noqa: PLC0415

    scan = make_scanner(_Rules)  # type: ignore[arg-type] # typeshed takes its own class for that of the argument

    def read(text: str) -> object:
        trimmed = text.strip(_BLANKS)
        try:
            value, end = scan(trimmed, 0)
        # Of a malformed text it wants to raise json.decoder.JSONDecodeError, and says that this module is not loaded
        # (SystemError in Python 3.11) or that it cannot be (a confined process opens no file).
        except (StopIteration, SystemError, ImportError, OSError):
            raise ValueError("no JSON") from None
        if end != len(trimmed):
            raise ValueError("more than one JSON value")
        return value

    def write(value: object, between: str, after_name: str) -> str:
        encoder = make_encoder({}, _refuse, encode_basestring_ascii, None, after_name, between, False, False, False)
        return "".join(encoder(value, 0))

    if write(read(' {"a":[1,"\\u00e9",true,null]} '), ",", ":") != '{"a":[1,"\\u00e9",true,null]}':
        raise ValueError("another JSON")
    return read, write


def _standard() -> tuple[Callable[[str], object], Callable[[object, str, str], str]]:
    import json  # noqa: PLC0415 - only where the C functions are not as expected

    def read(text: str) -> object:
        return json.loads(
            text, object_pairs_hook=_Rules.object_pairs_hook, parse_constant=_Rules.parse_constant, strict=True
        )

    def write(value: object, between: str, after_name: str) -> str:
        return json.dumps(value, separators=(between, after_name), allow_nan=False)

    return read, write


try:
    _read, _write = _native()
except (ImportError, AttributeError, TypeError, ValueError):
    _read, _write = _standard()


def loads(text: str) -> Any:
    """Return the value that a JSON text stands for; raise ValueError (or RecursionError) when it is none."""
    return _read(text)


def dumps(value: object) -> str:
    """Return the shortest JSON text for a value of plain types, in ASCII; raise ValueError or TypeError for others."""
    return _write(value, ",", ":")


def dumps_spaced(value: object) -> str:
    """Return the JSON text with blanks after commas and colons, as json.dumps writes it, for people."""
    return _write(value, ", ", ": ")
