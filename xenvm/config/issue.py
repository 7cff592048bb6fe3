# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be said against a config file, and how it is shown."""

from __future__ import annotations

from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final


_SHOWN_LENGTH: Final = 160
_QUOTED_LENGTH: Final = 64
_NAME_LENGTH: Final = 4096  # PATH_MAX of linux/limits.h


class Issue(Record):
    """One error in a config file; `line` counts from 1, 0 stands for the file as a whole."""

    line: int
    key: str
    text: str
    message: str
    hint: str = ""


class ValueRefusedError(ValueError):
    """A value that its key does not take; `hint` says what would do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def visible(text: str, limit: int = _SHOWN_LENGTH) -> str:
    """Return `text` fit for a terminal: anything not printable escaped, and cut after `limit` characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def quoted(text: str) -> str:
    """Return a word of the file between back quotes, fit for a message."""
    return f"`{visible(text, _QUOTED_LENGTH)}`"


def suggestion(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean ...?" with the choice spelled most like `word`, or "" if none is close."""
    from difflib import get_close_matches  # noqa: PLC0415 - only needed once something is wrong

    if len(word) > _QUOTED_LENGTH:
        return ""  # a comparison costs the product of both lengths, and no choice is that long
    found = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"did you mean `{found[0]}`?" if found else ""


def format_issue(filename: str, issue: Issue) -> str:
    """Return the issue as shown to the user: where and what, the text of the line, what to try."""
    where = visible(filename, _NAME_LENGTH)
    lines = [f"{where}:{issue.line}: {issue.message}" if issue.line else f"{where}: {issue.message}"]
    if issue.text:
        lines.append(f"    {visible(issue.text)}")
    if issue.hint:
        lines.append(f"    hint: {issue.hint}")
    return "\n".join(lines)
