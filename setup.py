# SPDX-License-Identifier: GPL-2.0-or-later
"""The extension modules; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup

modules = ["native/confine.py:ffibuilder", "native/unpack.py:ffibuilder"]
# Bound to the installed headers of one Xen release; without them xenvm installs, and says so when a guest is to start.
if Path("/usr/include/xenctrl.h").exists() and Path("native/xen.py").exists():
    modules.append("native/xen.py:ffibuilder")

# As it is: of a console script, pip would write a wrapper that takes longer to start than all that xenvm-cmd does.
setup(cffi_modules=modules, data_files=[("bin", ["scripts/bin/xenvm-cmd"])])
