# SPDX-License-Identifier: GPL-2.0-or-later
"""What each process loads: privileged ones nothing that parses, runs programs or starts threads."""

import subprocess
import sys
from pathlib import Path

import pytest

import xenvm
from xenvm.boundary.privileges import Role
from xenvm.boundary.spawn import command

START = Path(xenvm.__file__).parent / "_start.py"
ROOT = START.parent.parent

# As _start.py does, up to the call of main; then everything that main imports later.
PROBE = """
import sys
start = {"__name__": "probe", "__file__": sys.argv[1]}
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), start)
sys.path += start["_package_directories"]()
for name in sys.argv[2:]:
    try:
        __import__(name)
    except Exception as error:
        if "support for the Xen of this host" not in str(error):
            raise
print(" ".join(sys.modules))
"""
MODULES = {
    Role.BROKER: ["xenvm.broker.main", "xenvm.broker.service"],
    Role.SUPERVISOR: ["xenvm.supervisor.main"],
    Role.WATCHER: ["xenvm.helpers.watcher.main"],
    Role.PARSER: ["xenvm.parser.main"],
    Role.BUILDER: ["xenvm.helpers.builder.main", "xenvm.helpers.builder.xen", "xenvm.helpers.builder.jobs"],
    Role.HOTPLUG: ["xenvm.helpers.hotplug.main"],
    Role.NETWORK: ["xenvm.helpers.network.main"],
    Role.IMAGE: ["xenvm.helpers.image.main"],
    Role.STORAGE: ["xenvm.helpers.storage.main"],
    Role.SIMULATOR: ["xenvm.simulator.main"],
    Role.UNPACKER: ["xenvm.helpers.unpacker.main", "xenvm.helpers.unpacker.formats"],
    Role.STREAM: ["xenvm.helpers.stream.main"],
    Role.DEVICEMODEL: ["xenvm.helpers.devicemodel.main"],
    Role.QMP: ["xenvm.helpers.qmp.main"],
}
HEAVY = {
    "argparse",
    "asyncio",
    "subprocess",
    "multiprocessing",
    "pickle",
    "ctypes",
    "cffi",
    "pycparser",
    "psutil",
    "site",
}
HEAVY |= {"dataclasses", "inspect", "pathlib", "tempfile", "shutil", "http", "urllib", "ssl"}
# What only costs time: each of these takes a tenth to a half of the start of the bare interpreter.
SLOW = {"enum", "re", "json", "socket", "selectors", "signal", "collections", "functools", "contextlib", "types"}
SLOW |= {"typing", "hashlib", "uuid", "operator", "weakref", "copy", "platform"}
FORBIDDEN = {
    Role.BROKER: HEAVY
    | {"pyxs", "threading", "logging", "xenvm.config", "xenvm.helpers", "xenvm.supervisor", "xenvm._xen"},
    Role.SUPERVISOR: HEAVY | {"pyxs", "threading", "logging", "xenvm.config", "xenvm.broker", "xenvm._xen"},
    Role.WATCHER: HEAVY
    | {"pyxs", "threading", "logging", "xenvm.config", "xenvm.broker", "xenvm.supervisor", "xenvm._xen"},
    Role.PARSER: HEAVY | {"pyxs", "threading", "logging", "xenvm.broker", "xenvm.supervisor", "xenvm._xen"},
    # pyxs itself imports threading; the Router of helpers.store keeps it from starting one.
    Role.BUILDER: HEAVY | {"logging", "xenvm.config", "xenvm.broker", "xenvm.supervisor"},
    Role.HOTPLUG: HEAVY | {"logging", "xenvm.config", "xenvm.broker", "xenvm.supervisor", "xenvm._xen"},
    **dict.fromkeys(
        (Role.NETWORK, Role.IMAGE, Role.STORAGE, Role.UNPACKER, Role.STREAM, Role.DEVICEMODEL, Role.QMP),
        HEAVY | {"pyxs", "threading", "logging", "xenvm.config", "xenvm.broker", "xenvm.supervisor", "xenvm._xen"},
    ),
}
# No process of a monitor of Xen's loads anything of the simulator, and that has nothing of the monitors.
FORBIDDEN = {role: names | {"xenvm.simulator"} for role, names in FORBIDDEN.items()}
FORBIDDEN[Role.SIMULATOR] = {"subprocess", "multiprocessing", "pickle", "ctypes", "pyxs", "threading"} | {
    *("xenvm.config", "xenvm.broker", "xenvm.supervisor", "xenvm.helpers", "xenvm._xen"),
}
# What only one helper has use for; the others do not even load it.
OWN = {
    "xenvm.helpers.builder": {Role.BUILDER},
    "xenvm.helpers.watcher": {Role.WATCHER},
    "xenvm.helpers.hotplug": {Role.HOTPLUG},
    "xenvm.helpers.network": {Role.NETWORK},
    "xenvm.helpers.image": {Role.IMAGE},
    "xenvm.helpers.storage": {Role.STORAGE},
    "xenvm.helpers.unpacker": {Role.UNPACKER},
    "xenvm._unpack": {Role.UNPACKER, Role.STREAM},
    "lzma": {Role.UNPACKER},
    "zlib": {Role.UNPACKER, Role.STREAM},
    "xenvm.helpers.stream": {Role.STREAM},
    "xenvm.helpers.devicemodel": {Role.DEVICEMODEL},
    "xenvm.helpers.qmp": {Role.QMP},
    "xenvm.helpers.devices": {Role.BUILDER, Role.HOTPLUG},
    "xenvm.helpers.exchange": {Role.BUILDER, Role.HOTPLUG},
    "xenvm.helpers.store": {Role.BUILDER, Role.HOTPLUG},
}


def loaded(role):
    """Return the names of all modules in a fresh interpreter that is about to be this process."""
    interpreter = command(role)
    assert interpreter[1:4] == ["-I", "-S", "-B"]
    assert interpreter[4:] == [str(START), role.value]
    probe = [*interpreter[:4], "-c", PROBE, str(START), *MODULES[role]]
    done = subprocess.run(probe, env={}, capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


# The parser has its patterns (re) and suggestions (difflib); pyxs imports what it likes, and two helpers speak through it.
@pytest.mark.parametrize(
    "role", sorted(set(Role) - {Role.PARSER, Role.BUILDER, Role.HOTPLUG, Role.UNPACKER, Role.SIMULATOR})
)
def test_what_would_only_cost_start_time(role):
    assert loaded(role) & SLOW == set()


@pytest.mark.parametrize("role", Role)
def test_what_a_process_must_not_load(role):
    names = loaded(role)
    assert set(MODULES[role]) <= names or role is Role.BUILDER
    assert MODULES[role][0] in names
    tops = names | {name.split(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}
    assert tops & FORBIDDEN[role] == set()


def test_the_builder_has_threading_from_pyxs_alone():
    source = ["-c", "import sys; sys.path[1:1] = sys.argv[1:]; import pyxs; print('threading' in sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-I", *source, *sys.path], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True\n"
    ours = (path.read_text() for path in (ROOT / "xenvm").rglob("*.py"))
    assert not [text for text in ours if "import threading" in text]


def test_each_helper_has_its_own_code_alone():
    names = {role: loaded(role) for role in Role if role is not Role.SIMULATOR}  # which is no helper
    assert {module: {role for role in names if module in names[role]} for module in OWN} == OWN


def test_the_start_script_refuses_a_role_that_is_none():
    for words in ([], ["root"], ["broker "]):
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(START), *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert "use xenvm FILE" in done.stderr
