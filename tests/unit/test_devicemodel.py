# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine of an HVM guest from its config to QEMU's command line."""

import pytest

from xenvm.boundary.machine import EMULATED_NICS, Drive, Launch, Launched, Machine, NicModel, Setting, Tap
from xenvm.boundary.privileges import Role
from xenvm.config.parse import parse_bytes
from xenvm.helpers.devicemodel import main as worker
from xenvm.helpers.devicemodel.argv import Descriptors, command
from xenvm.parser.machine import EXTRA_LIMIT, HINTS, UNABLE
from xenvm.parser.main import answer

PLAIN = Machine(
    pae=True,
    acpi=True,
    apic=True,
    nx=True,
    viridian=False,
    hpet=-1,
    vpt_align=-1,
    timer_mode=-1,
    timeoffset_s=0,
    videoram_mib=8,
    boot="dc",
    serial="pty",
    serial_host="",
    serial_port=0,
    vnc_port=0,
    vnc_host="127.0.0.1",
    keymap="en-us",
    nic_models=(NicModel(0, "e1000"),),
    platform=(),
    bios_strings=(),
    extra=(Setting("device", "virtio-rng-pci"), Setting("no-fd-bootchk", "")),
    smbios=False,
    oem_types=(),
    slic=False,
)
UUID = "11111111-2222-4333-8444-555555555555"
LAUNCH = Launch(
    domid=7,
    name="web",
    uuid=UUID,
    vcpus=2,
    memory_mib=256,
    machine=PLAIN,
    drives=(
        Drive(768, "hda", cdrom=False, block=True, descriptors=2),
        Drive(5632, "hdc", cdrom=True, block=False, descriptors=0),
        Drive(5696, "hdd", cdrom=True, block=False, descriptors=1),
        Drive(2048, "sda", cdrom=False, block=True, descriptors=1),
    ),
    taps=(Tap(0, "00:16:3e:aa:bb:cc", "e1000"),),
    incoming=False,
)
NUMBERS = Descriptors(3, 10, -1, ((4, 5), (), (6,), (7,)), (8,), -1)
COMMON = """\
/usr/libexec/xen-qemu-system-i386
-xen-domid 7 -xen-domid-restrict -no-shutdown -S
-chardev socket,id=qmp,fd=3,server=on,wait=off -mon chardev=qmp,mode=control
-chardev socket,id=saving,fd=10,server=on,wait=off -mon chardev=saving,mode=control
-nodefaults -no-user-config -name web -uuid 11111111-2222-4333-8444-555555555555
-display none -vnc none -k en-us
-chardev pty,id=serial0 -serial chardev:serial0
-device cirrus-vga,vgamem_mb=8
-boot order=dc
-usb -device usb-tablet
-smp 2,maxcpus=2
-netdev tap,id=net0,fd=8 -device e1000,id=nic0,netdev=net0,mac=00:16:3e:aa:bb:cc
-machine xenfv,suppress-vmdesc=on
-m 248
-add-fd fd=4,set=768 -add-fd fd=5,set=768
-drive if=ide,index=0,media=disk,format=raw,cache=none,file.driver=host_device,file.filename=/dev/fdset/768,\
file.locking=off
-drive if=none,id=ide-5632,media=cdrom,readonly=on
-device ide-cd,id=ide-5632,drive=ide-5632,bus=ide.1,unit=0
-add-fd fd=6,set=5696
-drive if=none,id=ide-5696,media=cdrom,readonly=on,format=raw,cache=writeback,file.driver=file,\
file.filename=/dev/fdset/5696,file.locking=off
-device ide-cd,id=ide-5696,drive=ide-5696,bus=ide.1,unit=1
-add-fd fd=7,set=2048
-device lsi53c895a,id=scsi0
-drive if=none,id=scsi-2048,format=raw,cache=none,file.driver=host_device,file.filename=/dev/fdset/2048,\
file.locking=off,readonly=on
-device scsi-hd,drive=scsi-2048,bus=scsi0.0,scsi-id=0
CONFINEMENT
-device virtio-rng-pci -no-fd-bootchk
"""
CONFINEMENT = {
    7: "-chroot /var/lib/xenvm/empty -runas 1900000007:1900000007",
    10: "-run-with chroot=/var/lib/xenvm/empty,user=1900000007:1900000007",
}


@pytest.mark.parametrize("major", CONFINEMENT)
def test_the_whole_command_line(major):
    words = COMMON.replace("CONFINEMENT", CONFINEMENT[major]).split()
    assert command(LAUNCH, NUMBERS, 1900000007, major) == words


def options(major, launch=LAUNCH, numbers=NUMBERS, **changes):
    return " ".join(command(launch.but(machine=PLAIN.but(**changes)), numbers, 5, major))


@pytest.mark.parametrize(("major", "words"), [(7, " -no-acpi "), (10, "xenfv,suppress-vmdesc=on,acpi=off ")])
def test_without_acpi(major, words):
    assert words in options(major, acpi=False)


def test_without_display_there_is_no_card_and_no_tablet():
    text = options(7, vnc_port=-1, videoram_mib=0)
    assert "vga" not in text.lower().replace("suppress-vmdesc", "")
    assert "usb" not in text
    assert "-m 256 " in text
    assert "-device VGA,vgamem_mb=64 " in options(7, videoram_mib=64)


def test_the_serial_port_leads_elsewhere():
    assert "serial" not in options(7, serial="none")
    numbers = NUMBERS.but(serial=9)
    assert "-chardev socket,id=serial0,fd=9 -serial chardev:serial0" in options(7, numbers=numbers, serial="tcp")


def test_no_card_is_said():
    assert "-nic none" in options(10, LAUNCH.but(taps=()), NUMBERS.but(taps=()))


def test_it_begins_with_a_state_that_it_is_handed():
    assert "-incoming" not in options(10)
    assert "-incoming defer " in options(10, LAUNCH.but(incoming=True), NUMBERS.but(incoming=9))


GOOD = b"""\
uuid = 11111111-2222-4333-8444-555555555555
hvm = true
memory = 256
"""


def parsed(lines=b""):
    return answer(parse_bytes(GOOD + lines, "x.cfg"), UUID)


def test_the_published_example_of_an_hvm_guest():
    lines = b"""\
vcpus = 1
pae = true
acpi = true
apic = true
nic =
disk = /dev/vg/test:phy:hda:w:disk
disk = /srv/cd.iso:file:hdd:r:cdrom
boot = dc
display = vnc:use-port-unused,keymap=de,listen=10.0.0.1
serial = tcp:127.0.0.1:4555
"""
    (grants,) = parsed(lines).grants
    (one,) = grants.machine
    assert (one.pae, one.acpi, one.apic, one.nx) == (True, True, True, False)
    assert (one.vnc_port, one.keymap, one.videoram_mib, one.boot) == (0, "de", 8, "dc")
    assert one.vnc_host == "10.0.0.1"
    assert (one.serial, one.serial_host, one.serial_port) == ("tcp", "127.0.0.1", 4555)
    assert Machine.from_body(one.as_body()) == one
    assert grants.kernel == ""


def test_a_pv_guest_has_no_machine():
    result = parse_bytes(b"kernel = /boot/k\nmemory = 64\n", "x.cfg")
    assert answer(result, UUID).grants[0].machine == ()


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"diskinfo-pt = true", "diskinfo_pt"),
        (b"hap = false", "hap"),
        (b"memory-max = 512", "memory_max_mib"),
        (b"serial = /dev/ttyS0", "serial"),
        (b"display = sdl", "display"),
        (b"display = intel", "display"),
        (b"display = vnc:password-file=/etc/p", "password_file"),
        (b"videoram = 12", "videoram_mib"),
    ],
)
def test_what_an_hvm_guest_does_not_get_is_refused_with_its_line(line, field):
    result = parsed(line + b"\n")
    assert not result.grants
    issues = [(issue.line, issue.message, issue.text, issue.hint) for issue in result.issues]
    assert (4, f"this version of xenvm {UNABLE[field]}", line.decode(), HINTS[field]) in issues
    assert HINTS[field]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"disk = /a:file:hda:r:disk", "always writable"),
        (b"disk = /a:file:xvda:r:cdrom", "hda to hdd"),
        (b"disk = /a:vhd:hdc:r:cdrom", "a file or device as it is"),
        (b"disk = /a:qcow:hdc:r:cdrom", "a file or device as it is"),
        (b"disk = /a:file:hdc:r:cdrom:cipher=aes-xts-plain64:key-size=256:key-file=/k", "a file or device as it is"),
        (b"disk = /a:file:sdh:w:disk", "sda to sdg"),
        (b"disk = /a:file:hda1:w:disk", "whole disks"),
    ],
)
def test_a_disk_that_cannot_be_emulated_is_refused(line, why):
    """It is the second of two, and told with its own line."""
    (issue,) = parsed(b"disk = /b:file:xvdz:w:disk\n" + line + b"\n").issues
    assert (issue.line, issue.text) == (5, line.decode())
    assert why in issue.message
    assert issue.hint


def test_what_there_is_too_much_of_is_refused_with_the_first_line_that_is():
    cards = parsed(b"nic =\n" * (EMULATED_NICS + 2)).issues
    assert [(issue.line, issue.text) for issue in cards] == [(4 + EMULATED_NICS, "nic =")]
    extra = parsed(b"extra-hvm = a\n" * (EXTRA_LIMIT + 2)).issues
    assert [(issue.line, issue.text) for issue in extra] == [(4 + EXTRA_LIMIT, "extra-hvm = a")]


@pytest.mark.parametrize(
    ("line", "field", "value", "why"),
    [
        (b"power-management = 1", "power_management", 1, "`power-management`: published as `xen_extended_power_mgmt`"),
        (b"oem-features = 7", "oem_features", 7, "`oem-features`: published as `oem_features`"),
        (b"inject-sci = 1", "inject_sci", 1, "`inject-sci`: published as `inject-sci`"),
        (b"pci-msitranslate = 0", "", 0, "`pci-msitranslate`: no effect"),
        (b"pci-power-management = 0", "", 0, "`pci-power-management`: no effect"),
    ],
)
def test_what_a_stock_device_model_does_not_do_is_warned_of_with_its_line(line, field, value, why):
    result = parsed(line + b"\n")
    (made,), (warning,) = result.grants[0].machine, result.warnings
    assert warning.line == 4
    assert warning.message.startswith(f"warning: {why}")
    settings = {name: getattr(made, name) for name in ("power_management", "oem_features", "inject_sci")}
    assert settings == dict.fromkeys(settings, 0) | ({field: value} if field else {})


@pytest.mark.parametrize(
    "line",
    [b"power-management = 2", b"power-management = 0", b"oem-features = 0", b"inject-sci = 0", b"pci-msitranslate = 1"],
)
def test_what_asks_for_nothing_special_is_not_warned_of(line):
    result = parsed(line + b"\n")
    assert (len(result.grants), result.warnings) == (1, ())


def test_all_warnings_come_at_once_and_none_beside_errors():
    lines = b"power-management = 1\noem-features = 1\ninject-sci = 1\npci-msitranslate = 0\npci-power-management = 0\n"
    assert sorted(warning.line for warning in parsed(lines).warnings) == [4, 5, 6, 7, 8]
    refused = parsed(lines + b"hap = false\n")
    assert (len(refused.issues), refused.warnings) == (1, ())


def test_the_worker_gives_root_up_for_good_when_qemu_has_started(monkeypatch):
    """Not before, since QEMU inherits it; and so that it still ends with its broker."""
    done = []

    class Qemu:
        pid = 77

        def __init__(self, *_):
            done.append("started")

        def take_up(self):
            done.append("up")
            return ""

    class Channel:
        def send(self, message):
            done.append(message)

        def receive(self, *, deadline_s):
            assert deadline_s
            return LAUNCH, []

    monkeypatch.setattr(worker.serve, "broker_channel", Channel)
    monkeypatch.setattr(worker.serve, "drop", lambda _role, _keep: "hello")
    monkeypatch.setattr(worker, "_first_uid", lambda: 64000)
    monkeypatch.setattr(worker, "major_version", lambda: 7)
    monkeypatch.setattr(worker, "Qemu", Qemu)
    monkeypatch.setattr(worker, "become", lambda row, uid: done.append((row.role, uid)))
    assert worker.main() == 0
    assert done == [
        "hello",
        "started",
        Launched(77, up=False, tty=""),
        (Role.DEVICEMODEL, 64000),
        "up",
        Launched(77, up=True, tty=""),
    ]
