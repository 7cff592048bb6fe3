# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker process: `_start.py broker CONFIG-FILE SOCKET-DIRECTORY MODE NOTIFY`, started by `xenvm FILE` as root.

Descriptor 3 is a channel to whoever waits for the outcome (MODE background), 4 the opened config file. In MODE
foreground there is no 3: the outcome goes to standard error and, if NOTIFY names a socket, to the service manager.

1. cut the capabilities to the few that opening and starting need;
2. have the config parsed by a process without any privilege, and a first builder make itself ready beside it;
3. take the lock of the uuid, open log, act log and command socket, seal the grants;
4. serve until told to quit.
"""

import os
import sys

from xenvm.boundary.confine import confine
from xenvm.boundary.privileges import TABLE, Role
from xenvm.broker.children import Child
from xenvm.broker.policyfile import open_host_policy
from xenvm.errors import ExitCode, XenvmError

LAUNCHER, CONFIG, HOST_POLICY = 3, 4, 5


def main() -> int:
    """Run one monitor; return its exit status."""
    config_file, directory, mode, notify = sys.argv[2:6]
    background = mode == "background"
    os.umask(0o027)
    proof = confine(
        TABLE[Role.BROKER], uid=None, gid=None, keep=frozenset({LAUNCHER, CONFIG} if background else {CONFIG})
    )
    policy = open_host_policy()
    parser = Child(Role.PARSER, 2, {CONFIG: CONFIG, HOST_POLICY: policy}, config_file)
    os.close(CONFIG)
    os.close(policy)
    spare = Child(Role.BUILDER, 2, {}, "-")
    # Here and not above: the two start while this process imports what it needs itself.
    from xenvm.broker.service import Launcher, serve  # noqa: PLC0415

    launcher = Launcher(background=background, notify=notify)
    try:
        return serve(launcher, config_file, directory, proof.as_dict(), parser, spare)
    except XenvmError as error:
        launcher.tell(int(error.code), error.message + (f"\nhint: {error.hint}" if error.hint else ""))
        return int(error.code)
    except (OSError, MemoryError) as error:  # the guest runs on, and the next start takes over
        launcher.tell(int(ExitCode.FAILED), f"the monitor has ended: {error or 'no memory'}")
        raise
    finally:
        parser.end()
        spare.end()
