# SPDX-License-Identifier: GPL-2.0-or-later
"""What the parser makes of a file for the broker: grants and policy, or a list of errors that always fits a frame."""

import pytest

from xenvm.boundary.devices import DiskGrant, NicGrant
from xenvm.boundary.frames import decode, encode
from xenvm.boundary.messages import FileNeed, HostPolicy
from xenvm.config.parse import parse_bytes
from xenvm.model import derived_mac
from xenvm.parser.hostpolicy import NO_POLICY
from xenvm.parser.main import HINTS, ISSUES_LIMIT, UNABLE, answer

FRESH = "99999999-0000-4000-8000-000000000000"
UUID = "11111111-2222-4333-8444-555555555555"
GOOD = b"kernel = /boot/k\nmemory = 64\nvcpus = 2\n"


def parsed(text):
    """Parse, and send the answer through a frame as the real process does."""
    made = answer(parse_bytes(text, "a.cfg"), FRESH)
    assert decode(encode(made)) == made
    return made


def messages(text):
    found = parsed(text)
    assert (found.grants, found.policy, found.fields) == ((), (), {})
    return [(issue.line, issue.message) for issue in found.issues]


def test_a_good_file_becomes_grants_and_policy():
    found = parsed(GOOD + b"initrd = /boot/i\nname = web\ncmdline = root=/dev/ram0\non_crash = preserve\n")
    assert found.issues == ()
    (grants,), (policy,) = found.grants, found.policy
    assert (grants.uuid, grants.name, found.uuid_given) == (FRESH, "web", False)
    assert (grants.kernel, grants.initrd, grants.cmdline) == ("/boot/k", "/boot/i", "root=/dev/ram0")
    assert (grants.memory_mib, grants.memory_max_mib, grants.vcpus) == (64, 64, 2)
    assert (policy.startup, policy.on_halt, policy.on_reboot, policy.on_crash) == (
        *("started", "destroy", "reboot", "preserve"),
    )
    assert found.files == (
        FileNeed("kernel", 1, "/boot/k", "file", "kernel = /boot/k"),
        FileNeed("initrd", 4, "/boot/i", "file", "initrd = /boot/i"),
    )
    assert found.fields["memory"] == "64"
    assert (grants.disks, grants.nics, grants.device_timeout_s, policy.device_timeout_s) == ((), (), 40, 40)
    assert found.host == NO_POLICY


def test_disks_and_cards_become_grants():
    found = parsed(
        GOOD
        + f"uuid = {UUID}\ndevice-timeout = 9\n".encode()
        + b"disk = /dev/vg/a:phy:sda:w:disk\ndisk = /a.iso:file:xvdb:r:cdrom:share=true\n"
        + b"disk = /s:aio:xvdc:w:disk:cipher=aes-cbc-essiv:key-size=128:key-file=/key\ndisk = :file:xvdd:r:cdrom\n"
        + b"nic =\nnic = bridge=br0,mac=00:16:3E:00:00:0A,id=5\n"
    )
    assert found.issues == ()
    (grants,), (policy,) = found.grants, found.policy
    assert grants.disks == (
        DiskGrant(2048, "sda", "phy", "/dev/vg/a", False, False, False, "", 0, ""),
        DiskGrant(51728, "xvdb", "file", "/a.iso", True, True, True, "", 0, ""),
        DiskGrant(51744, "xvdc", "aio", "/s", False, False, False, "aes-cbc-essiv", 128, "/key"),
        DiskGrant(51760, "xvdd", "file", "", True, True, False, "", 0, ""),
    )
    assert grants.nics == (NicGrant(0, "", derived_mac(0, None, UUID)), NicGrant(5, "br0", "00:16:3e:00:00:0a"))
    assert (grants.device_timeout_s, policy.device_timeout_s) == (9, 9)


def test_a_derived_address_follows_the_fresh_uuid():
    """Without a uuid in the file the address is that of the uuid the VM gets, not of no uuid."""
    assert parsed(GOOD + b"nic =\n").grants[0].nics[0].mac == derived_mac(0, None, FRESH)


def test_every_file_of_a_disk_must_be_there():
    """A block device for phy alone; a drive without a disc names none. Each has the line that names it."""
    lines = b"disk = /dev/vg/a:phy:sda:w:disk\ndisk = :file:sdf:r:cdrom\ndisk = /b:file:sdb:w:disk:key-file=/k\n"
    lines += b"disk = /c:aio:sdc:w:disk\ndisk = /d:qcow:sdd:w:disk\ndisk = /e:vhd:sde:r:disk\n"
    found = parsed(GOOD + lines)
    texts = dict(enumerate((GOOD + lines).decode().splitlines(), 1))
    assert [(need.key, need.path, need.kind, need.line) for need in found.files] == [
        ("kernel", "/boot/k", "file", 1),
        ("disk", "/dev/vg/a", "block", 4),
        ("disk", "/b", "either", 6),
        ("key-file", "/k", "file", 6),
        ("disk", "/c", "either", 7),
        ("disk", "/d", "either", 8),
        ("disk", "/e", "either", 9),
    ]
    assert [need.text for need in found.files] == [texts[need.line] for need in found.files]


def test_a_disk_is_told_with_its_own_line_beside_one_that_is_not_understood():
    found = parsed(GOOD + b"disk = /a:fil:sda:w:disk\ndisk = /b:file:sdb:w:disk\n")
    assert [issue.line for issue in found.issues] == [4]
    assert [(need.path, need.line, need.text) for need in found.files][1:] == [
        ("/b", 5, "disk = /b:file:sdb:w:disk"),
    ]


def test_the_image_to_start_from_must_be_there():
    found = parsed(GOOD + b"startup = restore-del /srv/i\n")
    assert found.files[1:] == (FileNeed("startup", 4, "/srv/i", "image", "startup = restore-del /srv/i"),)


def test_lines_too_long_for_a_frame_are_left_out_of_what_is_no_error_yet():
    """64 disks with all that a line can say make an answer without their texts, not an error."""
    texts = [
        f"disk = /{number:040}:file:{letter}:w:disk:cipher=aes-xts-plain64:key-size=512:key-file=/{number:040}"
        for number, letter in enumerate(
            f"xvd{chr(97 + i // 26 - 1) if i > 25 else ''}{chr(97 + i % 26)}" for i in range(64)
        )
    ]
    found = parsed(GOOD + "\n".join(texts).encode() + b"\n")
    assert len(found.files) == 129
    assert {need.text for need in found.files} == {""}


def test_the_hosts_policy_comes_along():
    host = HostPolicy("br0", ("br0", "dmz"))
    made = answer(parse_bytes(GOOD, "a.cfg"), FRESH, host)
    assert decode(encode(made)).host == host


def test_a_given_uuid_is_kept_and_serves_as_the_name():
    found = parsed(GOOD + f"uuid = {UUID}\n".encode())
    assert (found.grants[0].uuid, found.grants[0].name, found.uuid_given) == (UUID, UUID, True)


def test_all_errors_come_at_once_with_their_lines():
    assert [line for line, _ in messages(b"kernel = /k\nmemry = 64\nvcpus = many\nno equals sign\n")] == [2, 3, 4, 0]


def test_files_of_a_bad_config_are_named_too():
    found = parsed(b"kernel = /boot/k\nvcpus = many\n")
    assert found.issues
    assert found.files == (FileNeed("kernel", 1, "/boot/k", "file", "kernel = /boot/k"),)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"pci = 0,0000:00:1b.0", "pci"),
        (b"cores-per-socket = 2", "cores_per_socket"),
        (b"display = vnc", "display"),
    ],
)
def test_what_this_version_cannot_do_is_refused_with_its_line(line, field):
    assert set(UNABLE) == {"pci", "display", "cores_per_socket"}
    issues = parsed(GOOD + line + b"\n").issues
    assert (4, f"this version of xenvm {UNABLE[field]}") in [(issue.line, issue.message) for issue in issues]
    assert all((issue.text, issue.hint) == (line.decode(), HINTS[field]) for issue in issues)


def test_each_line_of_a_key_is_refused():
    found = messages(GOOD + b"pci = 0,0000:00:1b.0\npci = 1,0000:00:1b.1\n")
    assert [line for line, _ in found] == [4, 5]


@pytest.mark.parametrize(
    "line",
    [b"\0", b"name = a\0b", b"\xff\xfe = 1", b"name = \xff", b"cmdline = \xed\xa0\x80", "\U0001f600".encode() * 4000],
    ids=repr,
)
def test_bytes_that_are_no_text_are_an_error_with_a_line(line):
    found = messages(GOOD + line + b"\n")
    assert found
    assert found[0][0] == 4


def test_hundreds_of_errors_are_cut_to_what_a_frame_holds():
    found = messages(b"".join(b"no such key %d\n" % number for number in range(1000)))
    assert len(found) <= ISSUES_LIMIT + 1
    assert found[0][0] == 1
    left_out = 1001 - (len(found) - 1)  # the missing kernel is an error too
    assert found[-1][1].startswith(f"and {left_out}"[:5])
    assert "more errors" in found[-1][1]


@pytest.mark.parametrize("line", ["\u00e4" * 900, "key = " + "\U0001f600" * 400, "x" * 1000, "\u0085" * 1000])
def test_hundreds_of_long_errors_are_cut_too(line):
    found = messages(f"{line}\n".encode() * 60)
    assert 10 < len(found) <= 62
    assert found[0][0] == 1
    assert found[-1][0] == 0


def test_every_line_about_the_processor_counts():
    found = parsed(
        GOOD + f"cpuid = 1:eax={'1' * 32}\ncpuid = 7+0:ebx={'0' * 32}\ncpuid = 0xd:ecx={'1' * 32}\n".encode()
    )
    assert found.issues == ()
    assert [rule.leaf for rule in found.grants[0].cpuid] == [1, 7, 0xD]


@pytest.mark.parametrize("count", [1, 60, 120, 160, 200, 240])
def test_grants_that_no_frame_holds_are_refused(count):
    """Between what certainly fits and what certainly does not, there is an answer at each length."""
    lines = "".join(f"cpuid = 0x{number:x}:eax={'1' * 32},ebx={'0' * 32}\n" for number in range(count))
    found = parsed(GOOD + lines.encode())
    assert bool(found.grants) != bool(found.issues)
    assert (count > 100) or found.grants[0].cpuid[count - 1].leaf == count - 1


def test_a_long_answer_is_still_an_answer():
    found = parsed(b"kernel = /" + b"k" * 4094 + b"\nmemory = 64\ncmdline = " + b"x" * 1000 + b"\n")
    assert found.issues == ()
    assert len(found.grants[0].kernel) == len(found.files[0].path) == 4095


@pytest.mark.parametrize("size", [0, 1, 262144, 262145, 1 << 20])
def test_a_file_of_any_size_has_an_answer(size):
    assert messages(b"#" * size)
