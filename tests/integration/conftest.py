# SPDX-License-Identifier: GPL-2.0-or-later
"""The package compiled before its processes are started, as it is when it is installed.

They write no bytecode themselves (-B), so each of the hundreds that these tests start would compile it anew.
"""

import compileall
from pathlib import Path

import pytest

import xenvm


@pytest.fixture(scope="session", autouse=True)
def compiled():
    compileall.compile_dir(Path(xenvm.__file__).parent, quiet=1)
