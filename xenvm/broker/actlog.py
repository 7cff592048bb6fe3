# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of privileged acts: one JSON object a line, each carrying the hash of the one before.

Changing, removing or inserting a record breaks the chain from there on, which `xenvm-audit verify` shows. It is
evidence against the helpers and the supervisor, who cannot write it; root on this host can of course write it anew.
Nothing in the file tells that records are missing at its end.
"""

from __future__ import annotations

import errno
import io
import os
import time

from xenvm import jsontext
from xenvm.errors import XenvmError

# These modules of CPython (3.12 renamed it) without the start time of hashlib and OpenSSL.
try:
    from _sha2 import sha256  # type: ignore[import-not-found]
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

GENESIS: Final = "0" * 64
SIZE_LIMIT_BYTES: Final = 16 << 20
TAIL_BYTES: Final = 16384


def _bytes(record: dict[str, object]) -> bytes:
    """Give the one way a record is written; its hash covers these bytes, without the hash itself."""
    return jsontext.dumps(record).encode("ascii")


def hexdigest(data: bytes) -> str:
    """Return the SHA-256."""
    digest: str = sha256(data).hexdigest()
    return digest


def _record(line: bytes) -> dict[str, object] | None:
    """Return what a line without its newline says; None unless it is, byte for byte, a record with a true hash."""
    try:
        record = jsontext.loads(line.decode("ascii"))
        if _bytes(record) != line:
            return None
        claimed = record.pop("hash")
        sound = (
            type(record["n"]) is int and isinstance(record["previous"], str) and hexdigest(_bytes(record)) == claimed
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record | {"hash": claimed} if sound else None


def _torn(remains: bytes) -> dict[str, object]:
    """Describe what stands where a record should be, for the record after it."""
    if not remains:
        return {"torn": 0}
    remains = remains.removesuffix(b"\n")
    return {"torn": len(remains), "torn_hash": hexdigest(remains)}


class ActLog:
    """An append-only file; each record is on the disk before the act it announces begins."""

    def __init__(self, path: str) -> None:
        """Open or make the log at `path`; one that has grown over 16 MiB becomes PATH.1 and the chain goes on.

        The record `opened` tells the length in bytes and the hash of what a power loss left of the last records.
        """
        self._number, self._previous = 0, GENESIS
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        remains, ended = self._find_end(self._descriptor)
        if self._number == 0 and os.path.exists(path + ".1"):  # noqa: PTH110 - the power went between the two files
            remains = self._end_of(path + ".1") + remains
        if not ended:
            self._write(b"\n")
        if os.fstat(self._descriptor).st_size > SIZE_LIMIT_BYTES:
            os.rename(path, path + ".1")  # noqa: PTH104 - pathlib costs 5 ms at each start
            os.close(self._descriptor)
            self._descriptor = os.open(path, flags, 0o600)
        self.append("opened", pid=os.getpid(), **_torn(remains))

    def _end_of(self, path: str) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return self._find_end(descriptor)[0]
        finally:
            os.close(descriptor)

    def _find_end(self, descriptor: int) -> tuple[bytes, bool]:
        """Take number and hash of the last whole record.

        Return what follows it, and whether the file ends with a newline. Nearly always the first look finds the
        record; only a damaged file is read further back.
        """
        size, taken = os.fstat(descriptor).st_size, TAIL_BYTES
        while True:
            tail = os.pread(descriptor, taken, max(0, size - taken))
            lines = io.BytesIO(tail).readlines()[0 if taken >= size else 1 :]
            for place in range(len(lines) - 1, -1, -1):
                record = _record(lines[place].removesuffix(b"\n"))
                if record is not None:
                    self._number, self._previous = int(str(record["n"])), str(record["hash"])
                    return b"".join(lines[place + 1 :]), tail.endswith(b"\n")
            if taken >= size:
                return tail, tail.endswith(b"\n") or not tail
            taken *= 4

    def append(self, act: str, **details: object) -> None:
        """Write one record and wait until it is on the disk; else XenvmError, and nothing of it stays."""
        record: dict[str, object] = {
            "n": self._number + 1,
            "time": round(time.time(), 3),
            "act": act,
            **details,
            "previous": self._previous,
        }
        record["hash"] = hexdigest(_bytes(record))
        self._write(_bytes(record) + b"\n")
        self._number, self._previous = self._number + 1, str(record["hash"])

    def _write(self, data: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, data) != len(data):
                os.ftruncate(self._descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise XenvmError(f"the act log cannot be written: {error.strerror}", hint="make room for it") from error


def read(*paths: str) -> Iterator[dict[str, object]]:
    """Yield the records of the log in the files `paths`, oldest file first, checking one chain through all of them.

    The chain must start at its first record, except in a file whose name ends in `.1`: those before it were rotated
    away. Raise XenvmError, naming file and line, where the chain breaks. What is no record is accepted only where the
    record after it tells length and hash of it, as a monitor does after a power loss.
    """
    number, previous = 0, "" if paths and paths[0].endswith(".1") else GENESIS
    broken, where = b"", ""
    for path in paths:
        with open(path, "rb") as lines:  # noqa: PTH123
            for place, line in enumerate(lines, 1):
                here = f"{path}:{place}"
                record = _record(line.removesuffix(b"\n")) if line.endswith(b"\n") else None
                if record is None:
                    broken, where = broken + line, where or here
                    continue
                if not previous and not broken:
                    pass  # what the first record found stood in a file that is gone
                elif record.get("act") == "opened":
                    if {name: record[name] for name in ("torn", "torn_hash") if name in record} != _torn(broken):
                        raise XenvmError(f"{where or here}: not what the monitor found here when it started")
                elif broken:
                    raise XenvmError(f"{where}: no true record, and no monitor reported that")
                if (record["previous"], record["n"]) != (previous, number + 1) and not _middle(record, previous):
                    raise XenvmError(f"{here}: the chain is broken before this record")
                number, previous = int(str(record["n"])), str(record["hash"])
                broken, where = b"", ""
                yield record
    if broken:
        raise XenvmError(f"{where}: no true record at the end", hint="normal only after a power loss; see the time")


def _middle(record: dict[str, object], previous: str) -> bool:
    """Tell whether a chain whose beginning was rotated away may start with this record."""
    return not previous and (record["n"] == 1) == (record["previous"] == GENESIS)
