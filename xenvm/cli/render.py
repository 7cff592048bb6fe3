# SPDX-License-Identifier: GPL-2.0-or-later
"""What xenvm-cmd prints: texts made safe for a terminal, tables, JSON lines, errors.

Texts come from monitors, which may be taken over: characters that steer a terminal or hide text are shown as escapes.
"""

from __future__ import annotations

import os
import sys

from xenvm import jsontext
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO


class OutputError(XenvmError):
    """Standard output cannot be written, so this error is for standard error."""


def plain(untrusted_text: str, keep: str = "\n\t") -> str:
    """Return the text with every character that is not printable, except those in `keep`, as a backslash escape."""
    if untrusted_text.isprintable():
        return untrusted_text
    return "".join(
        character if character in keep or character.isprintable() else _escape(ord(character))
        for character in untrusted_text
    )


def _escape(number: int) -> str:
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as lines with aligned columns; a cell never breaks its line."""
    cells = [[plain(cell, keep="") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "".join(line.rstrip() + "\n" for line in lines)


def json_line(value: object) -> str:
    """Return the value as one line of JSON in printable ASCII."""
    return jsontext.dumps_spaced(value).replace("\x7f", "\\u007f") + "\n"


def out(text: str) -> bool:
    """Print to standard output at once; False when nobody reads it any more. OutputError when it cannot be written."""
    return _write(sys.stdout, text)


def note(text: str) -> None:
    """Print one line to standard error; when that fails there is nobody to tell."""
    try:
        _write(sys.stderr, plain(text) + "\n")
    except OutputError:
        return


def error(failure: XenvmError, *, as_json: bool) -> None:
    """Print an error: two lines on standard error, or one JSON object on standard output."""
    if as_json and not isinstance(failure, OutputError):
        members = {"name": failure.code.name, "exit": int(failure.code)}
        try:
            out(json_line({"error": members | {"message": failure.message, "hint": failure.hint}}))
        except OutputError as unwritten:
            note(f"error: {unwritten.message}")
        return
    note(f"error: {failure.message}")
    if failure.hint:
        note(f"hint: {failure.hint}")


def _write(stream: TextIO | None, text: str) -> bool:
    if stream is None:  # the program was started with this descriptor closed
        return True
    try:
        stream.buffer.write(text.encode("utf-8", "backslashreplace"))
        stream.buffer.flush()
    except BrokenPipeError:
        _discard(stream)
        return False
    except OSError as failure:
        _discard(stream)
        raise OutputError(f"cannot write the output: {failure.strerror or failure}") from None
    return True


def _discard(stream: TextIO) -> None:
    """Send what is still in the stream's buffer nowhere, so that the flush at exit does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
