# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents and the code say the same. `python tests/unit/test_documents.py` writes the generated parts anew."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from xenvm import __version__
from xenvm.boundary import frames, privileges
from xenvm.boundary.messages import KINDS
from xenvm.broker.phases import PERMITS
from xenvm.errors import ExitCode
from xenvm.supervisor import machine
from xenvm.supervisor.commands import COMMANDS
from xenvm.supervisor.states import State

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODULES = sorted((ROOT / "xenvm").rglob("*.py"))
LONGEST_MODULE = 600
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}
STATES_HEAD = """\
<!-- SPDX-License-Identifier: GPL-2.0-or-later -->
<!-- Generated from xenvm.supervisor.machine: edit that, then run python tests/unit/test_documents.py. -->
# States

What a VM can be, what can happen to it, and what the supervisor then asks of the broker. A command without a row for
the present state is refused; anything else without a row is no news. `status` prints the state.

"""


def kill_list():
    names, lines, line = sorted(privileges.KILL_LIST), [], "   "
    for name in names:
        if len(line) + len(name) > 110:
            lines.append(line)
            line = "   "
        line += f" {name}"
    return "\n".join([*lines, line]) + "\n"


def messages():
    rows = ["| kind | message | fields | descriptors |", "|---|---|---|---|"]
    for kind, message in sorted(KINDS.items()):
        rows.append(f"| {kind} | {message.__name__} | {', '.join(message.CHECKS)} | {message.DESCRIPTORS} |")
    return "\n".join(rows) + "\n"


def permits():
    rows = ["| op | phases | a minute | seconds |", "|---|---|---|---|"]
    for op, permit in PERMITS.items():
        phases = sorted(phase.value for phase in permit.phases)
        every = len(phases) == len({phase for one in PERMITS.values() for phase in one.phases})
        rows.append(
            f"| `{op}` | {'any' if every else ', '.join(phases)} | {permit.per_minute} | {permit.deadline_s:g} |"
        )
    return "\n".join(rows) + "\n"


GENERATED = {
    ("SECURITY.md", "privileges"): privileges.markdown_table,
    ("SECURITY.md", "kill list"): lambda: "\n" + kill_list() + "\n",
    ("docs/xenvm-protocol.7.md", "messages"): messages,
    ("docs/xenvm-protocol.7.md", "permits"): permits,
}


def parts(text, marker):
    before, begin, rest = text.partition(f"<!-- {marker}: begin -->\n")
    inside, end, after = rest.partition(f"<!-- {marker}: end -->")
    assert begin, marker
    assert end, marker
    return before + begin, inside, end + after


def write_generated():
    for (name, marker), made in GENERATED.items():
        path = ROOT / name
        before, _inside, after = parts(path.read_text(), marker)
        path.write_text(before + made() + after)
    (ROOT / "docs/states.md").write_text(STATES_HEAD + machine.markdown_table())


def text_of(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize(("name", "marker"), GENERATED, ids=lambda value: value.replace(" ", "-"))
def test_a_generated_part_is_what_the_code_says(name, marker):
    assert parts(text_of(name), marker)[1] == GENERATED[name, marker]()


def test_the_table_of_states_is_what_the_code_says():
    assert text_of("docs/states.md") == STATES_HEAD + machine.markdown_table()
    assert all(f"| {state} |" in text_of("docs/states.md") for state in State)


def tracked():
    """Every text file of the project; without git, those in the places that hold them."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = [name for name in listed.stdout.split("\0") if name]
    if not names:
        places = ("xenvm", "native", "scripts", "tests", "docs")
        found = [path for place in places for path in (ROOT / place).rglob("*")] + list(ROOT.glob("*.*"))
        names = [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
    paths = [ROOT / name for name in names]
    return sorted(path for path in paths if path.is_file() and path.suffix not in (".so", ".pyc"))


def is_code(path):
    return path.suffix in (".py", ".pyi") or path.read_bytes().startswith(b"#!")


def test_every_code_file_has_its_spdx_line_first():
    missing = []
    for path in tracked():
        if is_code(path):
            lines = path.read_text().splitlines()
            place = 1 if lines and lines[0].startswith("#!") else 0
            if lines[place : place + 1] != ["# SPDX-License-Identifier: GPL-2.0-or-later"]:
                missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_every_document_has_its_licence_or_its_origin_first():
    for path in DOCUMENTS:
        first = path.read_text().splitlines()[0]
        assert first == "<!-- SPDX-License-Identifier: GPL-2.0-or-later -->" or first.startswith("<!-- Generated"), path


def test_the_licence_is_the_whole_gpl_2():
    text = text_of("LICENSE")
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 2, June 1991" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = { text = "GPL-2.0-or-later" }' in text_of("pyproject.toml")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if "://" not in link and not link.startswith("#"):
            assert (path.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_script_a_document_names_exists(path):
    for name in set(re.findall(r"\bscripts/[a-z-]+(?:\.[a-z]+)?(?:/[a-z-]+)?", path.read_text())):
        assert (ROOT / name).exists(), name


def manual_rows(name):
    return dict(re.findall(r"^\| (\d) \| `([A-Z_]+)` \|", text_of(name), re.MULTILINE))


@pytest.mark.parametrize("name", ["docs/xenvm.8.md", "docs/xenvm-cmd.1.md"])
def test_every_exit_status_is_in_the_manual(name):
    assert manual_rows(name) == {str(int(code)): code.name for code in ExitCode}


def test_the_error_names_of_the_protocol_are_exit_statuses():
    named = re.findall(r"^\| `([A-Z_]+)` \| (\d) \|", text_of("docs/xenvm-protocol.7.md"), re.MULTILINE)
    assert named
    assert all(ExitCode[name] == int(number) for name, number in named)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_manual(name):
    page = text_of("docs/xenvm-cmd.1.md")
    page += "| `commit" if name == "commit" else ""  # what xenvm-cmd says in the middle of a suspend
    spelled = {"console-log": "console [--log]"}.get(name, name)
    assert f"| `{spelled}" in page
    assert f"`{name}`" in text_of("docs/xenvm-protocol.7.md")


def test_the_commands_of_the_readers_are_in_the_protocol():
    row = re.search(r"^\| group `xenvm-read` \| (.*) \|$", text_of("docs/xenvm-protocol.7.md"), re.MULTILINE)
    assert re.findall(r"`([a-z-]+)`", row[1]) == [name for name, command in COMMANDS.items() if command.reading]


def test_the_frame_of_the_protocol_is_the_one_in_the_code():
    page = text_of("docs/xenvm-protocol.7.md")
    assert f"`{frames.MAGIC.decode()}`" in page
    assert f"| version, {frames.VERSION} |" in page
    assert str(frames.BODY_LIMIT_BYTES) in page
    assert frames.HEADER.size == 4 + 1 + 1 + 2 + 4


def test_the_example_request_of_the_protocol_has_the_length_it_says():
    example = re.search(r"^    ((?:[0-9a-f]{2} ){4})(\{.*\})$", text_of("docs/xenvm-protocol.7.md"), re.MULTILINE)
    assert int(example[1].replace(" ", ""), 16) == len(example[2])


def test_the_readme_names_both_commands():
    readme = text_of("README.md")
    assert "scripts/demo" in readme
    assert "scripts/test" in readme


def test_the_news_begin_with_this_version():
    assert re.findall(r"^## (\S+)", text_of("NEWS.md"), re.MULTILINE)[0] == __version__


# In pieces, so that this file does not find itself.
UNWANTED = (
    "TO" + "DO",
    "FIX" + "ME",
    "XX" + "X",
    "pypi" + ".org",
    "files.python" + "hosted",
    "npm" + "js.",
    "deb." + "debian.org",
    "docker" + ".io",
    "/wo" + "rk/",
)


def test_nothing_unfinished_and_no_registry_is_named():
    found = []
    for path in tracked():
        if path.name == "LICENSE":
            continue
        words = set(re.findall(r"[\w./-]+", path.read_text(errors="replace")))
        found += [
            (str(path.relative_to(ROOT)), bad)
            for bad in UNWANTED
            if any(word == bad if bad.isalpha() else bad in word for word in words)
        ]
    assert not found


# The import linter sees compiled modules only as imports of the package, so who has which is checked here.
COMPILED = {
    "_xen": {"xenvm/helpers/builder/xen.py"},
    "_confine": {"xenvm/boundary/confine.py", "xenvm/boundary/proof.py"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_module_is_imported_only_where_it_belongs(name):
    users = {
        str(path.relative_to(ROOT)) for path in MODULES if any(module == f"xenvm.{name}" for module in imported(path))
    }
    assert users == COMPILED[name]


def test_eval_and_exec_appear_nowhere():
    for path in MODULES:
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, path


@pytest.mark.parametrize("name", ["docs/weaknesses.md", "ARCHITECTURE.md"])
def test_every_test_that_a_document_names_exists(name):
    named = re.findall(r"`(test_\w+)`", (ROOT / name).read_text())
    assert len(named) > 10
    assert [word for word in named if word not in TESTS] == []


def test_every_known_weakness_has_a_test():
    text = (ROOT / "docs/weaknesses.md").read_text()
    rows = re.findall(r"^\| (W\d+) \|[^|]+\|[^|]+\| (`test_\w+`[^|]*) \|$", text, re.MULTILINE)
    assert [number for number, _ in rows] == [f"W{number}" for number in range(1, 33)]


def test_no_process_names_a_file_in_tmp():
    """There anybody could have put a link in its place."""
    assert [path.name for path in MODULES if re.search(r"[\"'](/var)?/tmp\b", path.read_text())] == []


if __name__ == "__main__":
    write_generated()
