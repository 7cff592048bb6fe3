# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything a file can get wrong besides a single value, and how it is told."""

import pytest

from xenvm.config.issue import Issue, format_issue
from xenvm.config.keys import KEYS, REFUSED, Guests
from xenvm.config.parse import MAX_FILE_BYTES, Line, parse_bytes, parse_text
from xenvm.config.reference import EXAMPLE_HVM, EXAMPLE_PV
from xenvm.errors import ConfigError, ExitCode

PV = "kernel = /boot/vmlinuz\nmemory = 64\n"
HVM = "hvm = true\nmemory = 256\n"
DISK = "disk = /dev/vg/{}:phy:{}:w:disk\n"


def issues(text):
    result = parse_text(text, "vm.cfg")
    assert (result.config is None) == bool(result.issues)
    return result.issues


def only(text):
    found = issues(text)
    assert len(found) == 1, found
    return found[0]


def test_published_pv_example():
    config = parse_text(EXAMPLE_PV, "pv.cfg").accepted()
    assert config.kernel == "/boot/vmlinuz-2.6.18-xenU"
    assert config.cmdline == "root=/dev/sda1 ro"
    assert config.memory_mib == 64
    assert config.disks[0].device_number == 2048
    assert config.nics[0].id == 0
    assert config.uuid == "00000000-0000-0000-0000-000000000001"


def test_published_hvm_example():
    config = parse_text(EXAMPLE_HVM, "hvm.cfg").accepted()
    assert config.hvm
    assert config.kernel is None
    assert [disk.virtpath for disk in config.disks] == ["hda", "hdd"]
    assert config.disks[1].cdrom
    assert config.boot == "dc"
    assert config.pae
    assert config.acpi
    assert config.apic


def test_published_nic_examples():
    text = PV + "nic = bridge=xen-br0,mac=ab:de:fe:dc:ba:ab\nnic = mac=ab:de:fe:dc:ba:ac\nnic =\n"
    assert [nic.id for nic in parse_text(text, "vm.cfg").accepted().nics] == [0, 1, 2]


def test_blanks_comments_and_equals_signs():
    text = " \t# comment = x\n\n\tmemory\t=\t64 \n  kernel=/boot/a#b=c\ncmdline = a = b\n"
    config = parse_text(text, "vm.cfg").accepted()
    assert (config.memory_mib, config.kernel, config.cmdline) == (64, "/boot/a#b=c", "a = b")


def test_all_errors_at_once_in_the_order_of_lines():
    found = issues("memroy = 64\nfoo\nvcpus = x\non_crash = halt\n")
    assert [issue.line for issue in found] == [1, 2, 3, 4, 0, 0]


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [("on_rebot", "on_reboot"), ("on-reboot", "on_reboot"), ("Memory", "memory"), ("viff", "vif"), ("bot", "boot")],
)
def test_unknown_key(spelled, meant):
    issue = only(f"{PV}{spelled} = x\n")
    assert issue == Issue(3, spelled, f"{spelled} = x", f"unknown key `{spelled}`", f"did you mean `{meant}`?")


def test_unknown_key_without_a_likeness():
    assert "xenvm.cfg(5)" in only(PV + "qqqqqqqq = x\n").hint
    assert "xenvm.cfg(5)" in only(PV + "m" * 1000 + " = x\n").hint


@pytest.mark.parametrize("refused", REFUSED, ids=lambda key: key.name)
def test_refused_keys(refused):
    issue = only(f"{PV}{refused.name} = x\n")
    assert refused.reason in issue.message
    assert issue.hint == refused.instead
    assert issue.key == refused.name


def test_line_without_equals():
    assert only(PV + "just text\n").hint == "write KEY = VALUE"
    issue = only(PV + "vcpus 2\n")
    assert (issue.line, issue.text, issue.hint) == (3, "vcpus 2", "write `vcpus = 2`")
    assert only(PV + "vcpus\n").hint == "write `vcpus = ...`"


def test_no_key_before_equals():
    assert "no key" in only(PV + "= 2\n").message


@pytest.mark.parametrize("second", ["on_reboot = destroy", "on_restart = destroy"])
def test_repeated_scalar_names_the_first_line(second):
    issue = only(f"{PV}on_reboot = destroy\n{second}\n")
    assert issue.line == 4
    assert "already set in line 3" in issue.message


def test_repeated_after_a_bad_line():
    found = issues(PV + "vcpus = x\nvcpus = 1\n")
    assert [issue.line for issue in found] == [3, 4]


@pytest.mark.parametrize("key", [key.name for key in KEYS if key.guests is Guests.HVM])
def test_hvm_keys_do_not_fit_pv(key):
    found = issues(f"{PV}{key} = 1\n")
    assert any("for HVM guests" in issue.message and issue.line == 3 and issue.key == key for issue in found)


@pytest.mark.parametrize("line", ["initrd = /boot/i", "initrd =", "cmdline = ro"])
def test_pv_keys_do_not_fit_hvm(line):
    assert "for PV guests" in only(f"{HVM}{line}\n").message


def test_parts_of_values_that_do_not_fit_pv():
    assert "no serial port" in only(PV + "serial = tcp:1.2.3.4:5\n").message
    assert not issues(PV + "serial = pty\n")
    assert "no emulated" in only(PV + "nic = model=e1000\n").message


def test_guest_type_is_not_guessed_from_a_bad_line():
    assert only("hvm = maybe\nmemory = 64\nboot = cd\ninitrd = /i\n").line == 1


def test_missing_keys():
    assert [(issue.line, issue.key) for issue in issues("")] == [(0, "memory"), (0, "kernel")]
    assert [(issue.line, issue.key) for issue in issues("hvm = true\n")] == [(0, "memory")]
    issue = only("memory = 64\nkernel =\n")
    assert (issue.line, issue.key) == (2, "kernel")
    assert not issues(HVM + "kernel =\n")


def test_a_bad_value_is_not_reported_as_missing():
    assert [issue.key for issue in issues("memory = x\nkernel = y\n")] == ["memory", "kernel"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("xvda", "xvda", "already taken in line 3"),
        ("xvda", "51712", "already taken in line 3"),
        ("sda", "xvda", "same disk in the guest as sda in line 3"),
        ("xvdb", "sdb1", "same disk"),
        ("hda", "xvda", "same disk"),
        ("xvda", "xvda1", "overlap"),
        ("sda2", "sda", "overlap"),
    ],
)
def test_two_disks_on_one_target(first, second, message):
    issue = only(PV + DISK.format("a", first) + DISK.format("b", second))
    assert issue.line == 4
    assert message in issue.message


@pytest.mark.parametrize(("first", "second"), [("xvda", "xvdb"), ("sda1", "sda2"), ("sda", "xvdb"), ("256", "257")])
def test_disks_beside_each_other(first, second):
    assert not issues(PV + DISK.format("a", first) + DISK.format("b", second))


def test_at_most_64_disks():
    disks = "".join(DISK.format(number, f"d{number}p0") for number in range(64))
    assert not issues(PV + disks)
    issue = only(PV + disks + DISK.format("x", "d64p0"))
    assert issue.line == 67
    assert "at most 64 disks" in issue.message


def test_nic_ids_are_the_lowest_free_in_file_order():
    text = PV + "nic = bridge=a\nnic = id=0\nnic = bridge=b\nnic = id=2\nnic = bridge=c\n"
    nics = parse_text(text, "vm.cfg").accepted().nics
    assert [(nic.id, nic.bridge) for nic in nics] == [(1, "a"), (0, None), (3, "b"), (2, None), (4, "c")]


def test_nic_ids_are_unique():
    issue = only(PV + "nic = id=3\nvif = id=3\n")
    assert issue.line == 4
    assert "id 3 is already set in line 3" in issue.message


def test_at_most_32_nics():
    assert not issues(PV + "nic =\n" * 32)
    assert "at most 32" in only(PV + "nic =\n" * 33).message


def test_macs_are_unique():
    assert "already set" in only(PV + "nic = mac=00:16:3e:0:0:1\n".replace("0:0:1", "00:00:0A") * 2).message
    uuid = "uuid = 00000000-0000-0000-0000-000000000001\n"
    issue = only(PV + uuid + "nic =\nnic = mac=4e:1c:b4:98:ed:0a\n")
    assert issue.line == 4
    assert "derived from the uuid" in issue.message


@pytest.mark.parametrize(
    "line",
    [
        "pci = 0,0000:00:1b.0",
        "cpuid = 1:eax=" + "x" * 32,
        "cpus-affinity = 0:1",
        "platform = a=b",
        "bios-string = oem-1=b",
    ],
)
def test_things_given_twice(line):
    assert "already set in line 3" in only(HVM + f"{line}\n" * 2).message


def test_arguments_of_the_device_model_may_repeat():
    assert not issues(HVM + "extra-hvm = device=a\n" * 2)


def test_vcpus_that_are_in_error_raise_no_further_ones():
    assert only(HVM + "vcpus = x\ncores-per-socket = 7\n").line == 3


@pytest.mark.parametrize("char", ["\0", "\x1b", "\x7f", "\x85", "\t", "\u00a0", "\u2028", "\u202e"])
def test_control_characters(char):
    issue = only(f"{PV}name = a{char}b\n")
    assert f"U+{ord(char):04X}" in issue.message
    assert char not in format_issue("vm.cfg", issue)
    assert char not in parse_text(f"{PV}na{char}me = b\n", "x").report()
    assert char not in parse_text(f"{PV}na{char}me\n", "x").report()


def test_line_ends_of_windows_are_told_once():
    result = parse_text((PV + "vcpus = x\n").replace("\n", "\r\n"), "vm.cfg")
    assert [issue.line for issue in result.issues] == [1, 3]
    assert "ends in CR LF, as do 2 more" in result.issues[0].message
    assert result.partial["memory_mib"] == 64


def test_byte_order_mark():
    assert "byte order mark" in only("\ufeff" + PV).message


def test_other_encodings():
    result = parse_bytes(PV.encode() + b"# caf\xe9\nname = \xff\n", "vm.cfg")
    assert [issue.line for issue in result.issues] == [3, 4, 4]
    assert all("UTF-8" in issue.message for issue in result.issues[:2])
    result.report().encode()
    assert parse_bytes(PV.encode() + "# caf\u00e9\n".encode(), "vm.cfg").config


def test_large_files():
    text = PV + "#" * (MAX_FILE_BYTES - len(PV))
    assert not issues(text)
    assert "larger than 256 KiB" in only(text + "#").message
    assert "larger than 256 KiB" in only(PV + "#" + "\u00e4" * (MAX_FILE_BYTES // 2)).message
    assert parse_bytes(text.encode() + b"\xff", "vm.cfg").config is None


def test_a_file_of_nonsense_takes_no_time():
    assert len(issues("".join(f"memor{number} = 1\n" for number in range(10_000)))) == 10_002


def test_partial_and_lines():
    result = parse_text("memory = 64\nvcpus = x\ndisk = y\nnic =\nnic = id=0\nstartup = restore /f\n", "vm.cfg")
    assert result.config is None
    assert result.partial["memory_mib"] == 64
    assert [nic.id for nic in result.partial["nics"]] == [1, 0]
    assert result.partial["startup_file"] == "/f"
    assert "vcpus" not in result.partial
    assert result.lines == {
        "memory_mib": (Line(1, "memory = 64"),),
        "vcpus": (),
        "disks": (),
        "nics": (Line(4, "nic ="), Line(5, "nic = id=0")),
        "startup": (Line(6, "startup = restore /f"),),
    }


def test_format():
    issue = Issue(3, "on_rebot", "on_rebot = x", "unknown key `on_rebot`", "did you mean `on_reboot`?")
    assert format_issue("vm.cfg", issue) == (
        "vm.cfg:3: unknown key `on_rebot`\n    on_rebot = x\n    hint: did you mean `on_reboot`?"
    )
    assert format_issue("vm.cfg", Issue(0, "memory", "", "`memory` is missing")) == "vm.cfg: `memory` is missing"
    assert "\x1b" not in format_issue("a\x1b[2J", Issue(1, "", "\x1b", "m"))
    assert len(format_issue("vm.cfg", Issue(1, "", "x" * 5000, "m"))) < 300


def test_accepted_raises_with_everything():
    with pytest.raises(ConfigError) as caught:
        parse_text("memory = x\n", "vm.cfg").accepted()
    assert caught.value.code is ExitCode.CONFIG_REFUSED
    assert "vm.cfg:1:" in caught.value.message
    assert "`kernel` is missing" in caught.value.message
