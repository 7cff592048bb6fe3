# SPDX-License-Identifier: GPL-2.0-or-later
"""The extension modules; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup

modules = ["native/confine.py:ffibuilder"]
# The hypervisor's library is bound to the installed headers; without them xenvm has the simulator only.
if Path("/usr/include/xenctrl.h").exists() and Path("native/xen.py").exists():
    modules.append("native/xen.py:ffibuilder")

setup(cffi_modules=modules)
