# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands from standard input, one a line, over one connection: no process for each."""

from __future__ import annotations

import sys

from xenvm.errors import ExitCode, UsageError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[[list[str]], ExitCode]

LINE_LIMIT_BYTES = 64 * 1024


def words_of(line: str) -> list[str]:
    """Return the words of a line as a shell would part them, without expanding anything; none of a comment."""
    if line.lstrip().startswith("#"):
        return []
    if not set(line) & set("\"'\\"):
        return line.split()
    import shlex  # noqa: PLC0415 - most lines do without, and it brings `re`

    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"cannot be parted into words: {error}") from None


def run(each: Run) -> ExitCode:
    """Do each line as it comes; return the first exit status that is not 0. An error ends the batch.

    XenvmError names the number of its line.
    """
    code, number = ExitCode.DONE, 0
    source = sys.stdin.buffer if sys.stdin else None
    while source and (untrusted_line := source.readline(LINE_LIMIT_BYTES)):
        number += 1
        try:
            if len(untrusted_line) == LINE_LIMIT_BYTES:
                raise UsageError(f"longer than {LINE_LIMIT_BYTES} bytes")
            words = words_of(untrusted_line.decode("utf-8", "surrogateescape"))
            result = each(words) if words else ExitCode.DONE
        except XenvmError as failure:
            failure.message = f"line {number}: {failure.message}"
            raise
        code = code or result
    return code
