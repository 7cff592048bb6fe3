# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of real processes need on the host; made where it is absent, as scripts/install-host would."""

import grp
import os
import pwd
import subprocess

import pytest

USERS = (
    *("xenvm", "xenvm-watch", "xenvm-build", "xenvm-parse"),
    *("xenvm-hotplug", "xenvm-network", "xenvm-image", "xenvm-unpack", "xenvm-stream", "xenvm-qmp"),
)
READ_GROUP = "xenvm-read"
LOG_DIRECTORY = "/var/log/xenvm"


def pytest_configure(config):
    """How long one example takes says how busy the machine is, and nothing of the code."""
    if config.pluginmanager.hasplugin("hypothesispytest"):  # not in dom0 of the lab, where no test needs it
        import hypothesis  # noqa: PLC0415

        hypothesis.settings.register_profile("xenvm", deadline=None)
        hypothesis.settings.load_profile("xenvm")


def _known(database, name):
    try:
        database(name)
    except KeyError:
        return False
    return True


@pytest.fixture(scope="session")
def users():
    """The system users and groups of scripts/xenvm.sysusers; their gids by name."""
    for group in (*USERS, READ_GROUP):
        if not _known(grp.getgrnam, group):
            subprocess.run(["groupadd", "--system", group], check=True)
    for user in USERS:
        if not _known(pwd.getpwnam, user):
            shell = ["--no-create-home", "--home-dir", "/", "--shell", "/usr/sbin/nologin"]
            subprocess.run(["useradd", "--system", "--gid", user, *shell, user], check=True)
    return {name: grp.getgrnam(name).gr_gid for name in (*USERS, READ_GROUP)}


@pytest.fixture(scope="session")
def log_directory(users):
    """The directory of scripts/xenvm.tmpfiles for logs."""
    if not os.path.isdir(LOG_DIRECTORY):
        os.mkdir(LOG_DIRECTORY, 0o750)
        os.chown(LOG_DIRECTORY, 0, users["xenvm"])
    return LOG_DIRECTORY
