# SPDX-License-Identifier: GPL-2.0-or-later
"""Start one process of a monitor: `python3 -I -S _start.py ROLE [UUID]`.

-S leaves out the site module (a third of the start time, and every .pth file); so the two places that hold xenvm and
its dependencies are added here. The role is also how `ps` and the audit tell the processes apart.
"""

import os
import sys


def _package_directories() -> list[str]:
    """Return where xenvm is, and beside a Debian-style /usr/local installation also Debian's own packages."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - pathlib costs 5 ms
    major, minor = sys.version_info[:2]
    environment = os.path.dirname(os.path.dirname(sys.executable))  # noqa: PTH120
    candidates = (
        here,
        f"{environment}/lib/python{major}.{minor}/site-packages",
        f"/usr/local/lib/python{major}.{minor}/dist-packages",
        "/usr/lib/python3/dist-packages",
    )
    return [path for path in dict.fromkeys(candidates) if os.path.isdir(path)]  # noqa: PTH112


def _main() -> int:
    sys.path += _package_directories()  # behind the standard library, which is asked first then
    role = sys.argv[1] if len(sys.argv) > 1 else ""
    if role == "broker":
        from xenvm.broker.main import main  # noqa: PLC0415
    elif role == "supervisor":
        from xenvm.supervisor.main import main  # noqa: PLC0415
    elif role == "watcher":
        from xenvm.helpers.watcher.main import main  # noqa: PLC0415
    elif role == "builder":
        from xenvm.helpers.builder.main import main  # noqa: PLC0415
    elif role == "hotplug":
        from xenvm.helpers.hotplug.main import main  # noqa: PLC0415
    elif role == "network":
        from xenvm.helpers.network.main import main  # noqa: PLC0415
    elif role == "image":
        from xenvm.helpers.image.main import main  # noqa: PLC0415
    elif role == "storage":
        from xenvm.helpers.storage.main import main  # noqa: PLC0415
    elif role == "simulator":
        from xenvm.simulator.main import main  # noqa: PLC0415
    elif role == "unpacker":
        from xenvm.helpers.unpacker.main import main  # noqa: PLC0415
    elif role == "stream":
        from xenvm.helpers.stream.main import main  # noqa: PLC0415
    elif role == "devicemodel":
        from xenvm.helpers.devicemodel.main import main  # noqa: PLC0415
    elif role == "qmp":
        from xenvm.helpers.qmp.main import main  # noqa: PLC0415
    elif role == "parser":
        from xenvm.parser.main import main  # noqa: PLC0415
    else:
        sys.stderr.write("_start.py: the processes of xenvm start each other; use xenvm FILE\n")
        return 2
    return main()


def _last_words(error: Exception) -> str:
    """Return what the log gets of an error that has ended the process; "" where only a trace would tell enough."""
    from xenvm.errors import XenvmError  # noqa: PLC0415

    if isinstance(error, XenvmError):
        why = error.message
    elif isinstance(error, OSError | MemoryError):
        why = str(error) or "no memory"
    else:
        return ""
    return f"{' '.join(sys.argv[1:3])}: ended: {why}\n"


if __name__ == "__main__":
    try:
        status = _main()
    except Exception as error:
        words = _last_words(error)
        if not words:
            raise
        sys.stderr.write(words)
        status = 1
    sys.stderr.flush()
    os._exit(status)  # nothing is left to tidy up, and whoever waits for a helper waits for its end too
