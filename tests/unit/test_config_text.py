# SPDX-License-Identifier: GPL-2.0-or-later
"""From a config back to text: canonical files, values for `get`, the manual page."""

import subprocess
import sys
from pathlib import Path

import pytest

from xenvm.config.dump import dump, fields, value_text
from xenvm.config.keys import KEYS, REFUSED
from xenvm.config.parse import parse_text
from xenvm.config.reference import EXAMPLE_HVM, EXAMPLE_PV, reference_page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("text", [EXAMPLE_PV, EXAMPLE_HVM])
def test_published_examples_survive(text):
    config = parse_text(text, "a").accepted()
    assert parse_text(dump(config), "b").accepted() == config
    assert dump(parse_text(dump(config), "b").accepted()) == dump(config)


def test_canonical_file():
    text = (
        "memory = 0x40\nkernel = /k\nboot=\nhvm = yes\nvif = mac=00:16:3E:00:00:0A\non_restart = restart\n"
        "startup = restore-del  /a b\ntimeoffset = 3_600\ndisplay = vnc:port=1\nvpt-align = 0\n"
    )
    assert dump(parse_text(text, "a").accepted()) == (
        "startup = restore-del /a b\nhvm = true\nkernel = /k\nmemory = 64\nnic = id=0,mac=00:16:3e:00:00:0a\n"
        "display = vnc:port=5901\nboot =\nvpt-align = false\ntimeoffset = 3600\n"
    )


def test_fields_have_every_key():
    values = fields(parse_text(EXAMPLE_HVM, "a").accepted())
    assert list(values) == [key.name for key in KEYS]
    assert values["memory"] == "256"
    assert values["memory-max"] == ""
    assert values["startup"] == "started"
    assert values["acpi"] == "true"
    assert values["disk"].splitlines() == [
        "/dev/vg/testhvm:phy:hda:w:disk",
        "/var/opt/xen/iso_import/w2k3eesp2.iso:file:hdd:r:cdrom",
    ]


def test_no_text_for_a_stranger():
    with pytest.raises(TypeError):
        value_text(object())


def test_manual_is_up_to_date():
    assert (ROOT / "docs" / "xenvm.cfg.5.md").read_text(encoding="utf-8") == reference_page()


def test_manual_has_every_key():
    page = reference_page()
    for key in KEYS:
        assert f"#### `{key.name}`\n" in page
        assert all(f"`{synonym}`" in page for synonym in key.synonyms)
    for key in REFUSED:
        assert f"- `{key.name}`: " in page
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "KEYS", "REFUSED KEYS", "EXAMPLES", "EXIT STATUS"):
        assert f"\n## {heading}\n" in page
    assert max(len(line) for line in page.splitlines()) < 700


def test_manual_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "xenvm.config.reference"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == reference_page()


def test_parser_loads_nothing_heavy():
    probe = (
        "import sys, xenvm.config.parse, xenvm.config.dump\n"
        "print({'socket', 'subprocess', 'difflib', 'hashlib', 'asyncio', 'json', 'argparse', 'select'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
