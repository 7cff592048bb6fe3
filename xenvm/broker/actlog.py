# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of privileged acts: one JSON object a line, each carrying the hash of the one before.

Changing, removing or inserting a record breaks the chain from there on, which `xenvm-audit verify` shows. It is
evidence against the helpers and the supervisor, who cannot write it; root on this host can of course write it anew.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from typing import Final

from xenvm.errors import XenvmError

GENESIS: Final = "0" * 64
SIZE_LIMIT_BYTES: Final = 16 << 20
TAIL_BYTES: Final = 16384


def _digest(record: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


class ActLog:
    """An append-only file; each record is on the disk before the act it announces begins."""

    def __init__(self, path: str) -> None:
        """Open or make the log at `path`; one that has grown over 16 MiB becomes PATH.1 and the chain goes on."""
        self._number, self._previous = 0, GENESIS
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        torn = self._find_end()
        if os.fstat(self._descriptor).st_size > SIZE_LIMIT_BYTES:
            os.rename(path, path + ".1")  # noqa: PTH104 - pathlib costs 5 ms at each start
            os.close(self._descriptor)
            self._descriptor = os.open(path, flags, 0o600)
        elif torn:
            os.write(self._descriptor, b"\n")
        self.append("opened", pid=os.getpid(), torn=torn)

    def _find_end(self) -> int:
        """Take number and hash of the last whole record; return the bytes of a torn one after it."""
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES))
        whole, _, rest = tail.rpartition(b"\n")
        for line in reversed(whole.split(b"\n")):
            try:
                record = json.loads(line)
                self._number, self._previous = int(record["n"]), str(record["hash"])
            except (ValueError, KeyError, TypeError):
                continue
            break
        return len(rest)

    def append(self, act: str, **details: object) -> None:
        """Write one record and wait until it is on the disk."""
        record: dict[str, object] = {
            "n": self._number + 1,
            "time": round(time.time(), 3),
            "act": act,
            **details,
            "previous": self._previous,
        }
        record["hash"] = _digest(record)
        os.write(self._descriptor, json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n")
        os.fdatasync(self._descriptor)
        self._number, self._previous = self._number + 1, str(record["hash"])


def read(path: str) -> Iterator[dict[str, object]]:
    """Yield the records of the log at `path`, checking the chain; raise XenvmError at the first line that breaks it.

    A torn line is accepted only where the next record says that it found one, as a monitor does after a power loss.
    """
    number, previous, torn = 0, "", 0
    with open(path, encoding="ascii", errors="replace") as lines:  # noqa: PTH123
        for place, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                claimed = record.pop("hash")
                fits = _digest(record) == claimed
                told = record["previous"], record["n"]
            except (ValueError, KeyError, TypeError, AttributeError):
                if torn:
                    raise XenvmError(f"{path}:{place}: two broken records in a row") from None
                torn = len(line.rstrip("\n"))
                continue
            if not fits:
                raise XenvmError(f"{path}:{place}: the record does not match its hash")
            if place > 1 and told != (previous, number + 1) and previous:
                raise XenvmError(f"{path}:{place}: the chain is broken before this record")
            if torn and record.get("torn") != torn:
                raise XenvmError(f"{path}:{place - 1}: a broken record that no monitor reported")
            number, previous, torn = record["n"], claimed, 0
            yield record | {"hash": claimed}
    if torn:
        raise XenvmError(f"{path}: the last record is broken", hint="normal only after a power loss; see the time")
