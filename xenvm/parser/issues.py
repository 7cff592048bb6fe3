# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to be said of a line of the file, with the line. No I/O."""

from __future__ import annotations

from xenvm.boundary.messages import ConfigIssue
from xenvm.config.issue import visible
from xenvm.config.parse import Line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    Lines = Mapping[str, tuple[Line, ...]]

TEXT_LIMIT: Final = 1000
NOWHERE: Final = Line(0, "")


def line_of(lines: Lines, field: str, index: int = 0) -> Line:
    """Return the line that gives a field its value, of a repeatable key the one with the value number `index`."""
    given = lines.get(field, ())
    return given[index] if index < len(given) else NOWHERE


def shown(line: Line) -> str:
    """Return the text of a line as it is shown to the user, fit for a frame."""
    return visible(line.text)[:TEXT_LIMIT]


def issue_at(line: Line, message: str, hint: str) -> ConfigIssue:
    """Return what is wrong with a line, and what to do about it."""
    return ConfigIssue(line.number, shown(line), message[:TEXT_LIMIT], hint[:TEXT_LIMIT])
