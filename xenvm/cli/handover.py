# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk for a running guest: opened here, with the rights of whoever runs xenvm-cmd, and handed to the monitor."""

from __future__ import annotations

import os

from xenvm.errors import UsageError, XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

FORM = "PATH:TYPE:DEVICE:MODE:DEVTYPE"


def opened(command: str, given: Mapping[str, str]) -> tuple[dict[str, str], int | None]:
    """Return the parameters of the request, and an open descriptor of the disk.

    That is None for one that the caller may not open: the monitor says whether the host's policy lets it be added. The
    config file's form of a disk is taken apart first. UsageError when a part is missing, XenvmError when the disk
    cannot be opened.
    """
    params = dict(given)
    if "spec" in params:
        params = _apart(params.pop("spec")) | params
    path = params.get("path", "")
    if not path:
        raise UsageError(f"{command}: path= is missing", hint=f"or give the disk as {FORM}")
    cdrom = command == "cd-insert" or params.get("devtype") == "cdrom"
    mode = params.get("mode", "r" if cdrom else "w")
    if mode not in ("r", "w"):
        raise UsageError(f"{command}: mode={mode} is neither r nor w")
    if command != "cd-insert":  # it has no such parameter: a disc is read
        params["mode"] = mode
    params["path"] = os.path.abspath(path)  # noqa: PTH100 - pathlib costs start time
    access = os.O_RDONLY if mode == "r" else os.O_RDWR
    try:
        return params, os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except PermissionError:
        return params, None
    except OSError as error:
        raise XenvmError(f"{command}: cannot open {path}: {error.strerror}") from error


def _apart(spec: str) -> dict[str, str]:
    fields = [field.strip(" ") for field in spec.split(":")]
    if len(fields) < 5:
        raise UsageError(f"a disk has five fields, here are {len(fields)}", hint=f"the form is {FORM}")
    path, kind, device, mode, devtype, *options = fields
    params = {"path": path, "type": kind, "device": device, "mode": mode, "devtype": devtype}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key in params:
            raise UsageError(f"not an option of the form key=value: {option}")
        params[key] = value
    return params
