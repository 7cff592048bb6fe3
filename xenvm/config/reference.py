# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual page xenvm.cfg(5), made from the table of keys.

`python -m xenvm.config.reference > docs/xenvm.cfg.5.md` writes it anew.
"""

from collections.abc import Iterator
from typing import Final

from xenvm.config.dump import value_text
from xenvm.config.keys import KEYS, REFUSED, REQUIRED, Group, Guests, Key
from xenvm.config.parse import MAX_FILE_BYTES
from xenvm.errors import ExitCode

EXAMPLE_PV: Final = """\
uuid = 00000000-0000-0000-0000-000000000001
hvm = false
kernel = /boot/vmlinuz-2.6.18-xenU
cmdline = root=/dev/sda1 ro
memory = 64
disk = /dev/vg/test:phy:sda:w:disk
vif =
"""

EXAMPLE_HVM: Final = """\
uuid = 00000000-0000-0000-0000-000000000002
hvm = true
memory = 256
disk = /dev/vg/testhvm:phy:hda:w:disk
disk = /var/opt/xen/iso_import/w2k3eesp2.iso:file:hdd:r:cdrom
boot = dc
pae = true
acpi = true
apic = true
"""

_OPENING: Final = f"""\
<!-- Generated from the table of keys: edit xenvm/config, then run python -m xenvm.config.reference. -->
# xenvm.cfg(5)

## NAME

xenvm.cfg - configuration of one virtual machine

## SYNOPSIS

    KEY = VALUE
    # comment

    xenvm --check FILE

## DESCRIPTION

A config file describes one VM for xenvm(8). It is UTF-8 text of at most {MAX_FILE_BYTES // 1024} KiB.
Its lines end in LF. Blanks and tabs around a line, a key and a value do not count. Empty lines are skipped, and so are
lines whose first character is `#`; a `#` further on belongs to the value, as does every `=` after the first. There are
no quotes, continuations or sections.

Each line sets one key. A key may be given once, unless it is marked "may be repeated"; those add up in the order of
the lines. Switches are `true`, `yes`, `y`, `1` or `false`, `no`, `n`, `0`, in any case. Numbers are decimal, or begin
with `0x`, `0o` or `0b`; `_` may part their digits. Paths begin with `/`. Values hold printable characters only.

Nothing is ignored. An unknown key, a line without `=`, a value out of range, a key for the other guest type, two disks
on one target: each is an error with its line, all errors of a file are shown at once, and no VM is started.

## KEYS
"""

_CLOSING: Final = f"""\
## EXAMPLES

A PV guest with one LVM volume and one network card:

{{pv}}
An HVM guest that installs Windows from an ISO image:

{{hvm}}
## EXIT STATUS

`xenvm` and `xenvm --check` end with {ExitCode.CONFIG_REFUSED.value} when the file is refused,
`xenvm --check` with {ExitCode.DONE.value} when it is fine.

## SEE ALSO

xenvm(8), xenvm-cmd(1)
"""


def reference_page() -> str:
    """Return the whole page in Markdown."""
    return "\n".join([_OPENING, *_keys(), *_refused(), _closing()])


def _keys() -> Iterator[str]:
    for group in Group:
        yield f"### {group}\n"
        for key in KEYS:
            if key.group is group:
                yield from _key(key)


def _key(key: Key) -> Iterator[str]:
    yield f"#### `{key.name}`\n"
    yield f"{key.help}\n"
    yield f"- Value: {key.value}"
    if not key.repeatable:
        yield f"- Default: {_default(key)}"
    if key.repeatable:
        yield "- May be repeated"
    if key.synonyms:
        yield f"- Also spelled: {', '.join(f'`{name}`' for name in key.synonyms)}"
    if key.guests is not Guests.ANY:
        yield f"- Guests: {key.guests.upper()} only"
    yield f"- Applied to: {key.applied}\n"


def _default(key: Key) -> str:
    if key.default is REQUIRED:
        return "none, the key must be given"
    plain = value_text(key.default)
    if key.hvm_default is not None:
        return f"`{value_text(key.hvm_default)}` with hvm, otherwise `{plain}`"
    return f"`{plain}`" if plain else "not set"


def _refused() -> Iterator[str]:
    yield "## REFUSED KEYS\n"
    yield "Earlier versions of xenvm took these keys; this one refuses a file that has them.\n"
    for key in REFUSED:
        yield f"- `{key.name}`: {key.reason}" + (f"; {key.instead}." if key.instead else ".")
    yield ""


def _closing() -> str:
    return _CLOSING.format(pv=_indented(EXAMPLE_PV), hvm=_indented(EXAMPLE_HVM))


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


if __name__ == "__main__":
    print(reference_page(), end="")
