# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of keys, and for each key what it takes and what it refuses."""

import types
import typing

import pytest

from xenvm.config.keys import KEYS, REFUSED, REQUIRED, Guests, find, refused, spellings
from xenvm.config.parse import parse_text
from xenvm.config.schema import Config
from xenvm.model import (
    Action,
    AffinitySpec,
    BiosString,
    Compression,
    CpuidSpec,
    CryptSpec,
    DiskSpec,
    DiskType,
    DisplayKind,
    DisplaySpec,
    ExtraArgument,
    NicSpec,
    PciAddress,
    PciSpec,
    PlatformSpec,
    SerialKind,
    SerialSpec,
    StartupKind,
)

PV = "kernel = /boot/vmlinuz\nmemory = 64\n"
HVM = "hvm = true\nmemory = 256\n"
MASK = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1"
UUID = "00000000-0000-0000-0000-00000000abcd"

PUBLISHED = [
    "hvm",
    "startup",
    "debug",
    "uuid",
    "on_crash",
    "on_halt",
    "on_reboot",
    "kernel",
    "memory",
    "vcpus",
    "disk",
    "nic",
    "pci",
    "serial",
    "display",
    "cmdline",
    "initrd",
    "pae",
    "acpi",
    "apic",
    "nx",
    "smbios-pt",
    "smbios-oem-type-pt",
    "acpi-pt",
    "diskinfo-pt",
    "boot",
    "extra-hvm",
    "power-management",
    "oem-features",
    "timer-mode",
    "timeoffset",
    "pci-msitranslate",
    "pci-power-management",
    "inject-sci",
]
KEPT = [
    "name",
    "output",
    "no_mem_check",
    "memory-max",
    "videoram",
    "hap",
    "viridian",
    "hpet",
    "vpt-align",
    "cpuid",
    "cpus-affinity",
    "cores-per-socket",
    "platform",
    "bios-string",
]


def one(key, value, *, more=""):
    """Return the config of a file that sets `key`, for the guest type that takes it."""
    base = PV if find(key).guests is Guests.PV else HVM
    base = "".join(line + "\n" for line in base.splitlines() if line.partition(" ")[0] != key)
    return parse_text(f"{base}{more}{key} = {value}\n", "vm.cfg")


def disk(**changes):
    values = {"path": "/dev/vg/a", "type": DiskType.PHY, "virtpath": "xvda", "read_only": False, "cdrom": False}
    return DiskSpec(**{**values, **changes})


GOOD = [
    ("uuid", UUID.upper(), UUID),
    ("uuid", "", None),
    ("name", "web-1.example_a+b", "web-1.example_a+b"),
    ("name", "", None),
    ("startup", "started", StartupKind.STARTED),
    ("startup", "start", StartupKind.STARTED),
    ("startup", "paused", StartupKind.PAUSED),
    ("startup", "shutdown", StartupKind.SHUTDOWN),
    ("startup", "poweroff", StartupKind.SHUTDOWN),
    ("startup", "restore /save/a file", StartupKind.RESTORE),
    ("startup", "restore-del  /save/a", StartupKind.RESTORE_DELETE),
    ("on_halt", "preserve", Action.PRESERVE),
    ("on_reboot", "destroy", Action.DESTROY),
    ("on_restart", "preserve", Action.PRESERVE),
    ("on_crash", "reboot", Action.REBOOT),
    ("on_crash", "restart", Action.REBOOT),
    ("shutdown-timeout", "1", 1),
    ("shutdown-timeout", "86400", 86400),
    ("device-timeout", "1", 1),
    ("device-timeout", "86400", 86400),
    ("image-compression", "none", Compression.NONE),
    ("image-compression", "zstd", Compression.ZSTD),
    ("debug", "Yes", True),
    ("output", "/var/log/vm.log", "/var/log/vm.log"),
    ("no_mem_check", "1", True),
    ("hvm", "Y", True),
    ("kernel", "/usr/lib/xen/boot/hvmloader", "/usr/lib/xen/boot/hvmloader"),
    ("kernel", "", None),
    ("initrd", "/boot/initrd.img", "/boot/initrd.img"),
    ("initrd", "", None),
    ("cmdline", "root=/dev/sda1 ro # x = y", "root=/dev/sda1 ro # x = y"),
    ("cmdline", "x" * 1023, "x" * 1023),
    ("cmdline", "", ""),
    ("memory", "0x100", 256),
    ("memory", "1_024", 1024),
    ("memory-max", "512", 512),
    ("videoram", "16", 16),
    ("vcpus", "128", 128),
    ("cores-per-socket", "1", 1),
    ("cpus-affinity", "0:3, 1,2", (AffinitySpec(vcpu=0, cpus=(1, 2, 3)),)),
    ("cpuid", f"0x80000001:edx={MASK}", (CpuidSpec(leaf=0x80000001, edx=MASK),)),
    ("cpuid", f"7+0:ebx={MASK},ecx={MASK}", (CpuidSpec(leaf=7, subleaf=0, ebx=MASK, ecx=MASK),)),
    ("disk", "/dev/vg/a:phy:xvda:w:disk", (disk(),)),
    (
        "disk",
        "/a.iso:file:hdd:r:cdrom:",
        (disk(path="/a.iso", type="file", virtpath="hdd", read_only=True, cdrom=True),),
    ),
    ("disk", ":file:hdc:r:cdrom", (disk(path="", type="file", virtpath="hdc", read_only=True, cdrom=True),)),
    ("disk", "/dev/vg/a:phy:xvda:w:disk:none:backend-domid=0", (disk(),)),
    ("disk", "/dev/vg/a:phy:xvda:w:disk:key-file=/k", (disk(crypt=CryptSpec(key_file="/k")),)),
    (
        "disk",
        "/dev/vg/a:phy:xvda:w:disk:cipher=aes-xts-plain64:key-size=512:key-file=/k",
        (disk(crypt=CryptSpec(key_file="/k", cipher="aes-xts-plain64", key_size_bits=512)),),
    ),
    ("disk", "/dev/vg/a:phy:xvda:w:disk:share=true", (disk(share=True),)),
    ("disk", "/dev/vg/a:phy:xvda:w:disk:share=no", (disk(),)),
    (
        "disk",
        "/dev/vg/a:phy:xvda:w:disk:share=1:key-file=/k",
        (disk(crypt=CryptSpec(key_file="/k"), share=True),),
    ),
    ("diskinfo-pt", "true", True),
    ("nic", "", (NicSpec(id=0),)),
    ("vif", "", (NicSpec(id=0),)),
    ("nic", "bridge=xen-br0,mac=AB:de:fe:dc:ba:ab", (NicSpec(id=0, bridge="xen-br0", mac="ab:de:fe:dc:ba:ab"),)),
    ("nic", "id=31,model=e1000,backend-domid=0", (NicSpec(id=31, model="e1000"),)),
    ("pci", "0,0000:00:1b.0", (PciSpec(group=0, address=PciAddress(0, 0, 0x1B, 0)),)),
    (
        "pci",
        "1,bind,0000:02:00.0,msitranslate=0,power_mgmt=1,guest_slot=5",
        (
            PciSpec(
                group=1, bind=True, address=PciAddress(0, 2, 0, 0), msitranslate=False, power_mgmt=True, guest_slot=5
            ),
        ),
    ),
    ("pci", "0,0:0:2.0,vdevfn=16", (PciSpec(group=0, address=PciAddress(0, 0, 2, 0), vdevfn=16),)),
    ("pci-msitranslate", "0", False),
    ("pci-power-management", "0", False),
    ("serial", "", SerialSpec(kind=SerialKind.PTY)),
    ("serial", "none", SerialSpec(kind=SerialKind.NONE)),
    ("serial", "/dev/ttyS0", SerialSpec(kind=SerialKind.DEVICE, path="/dev/ttyS0")),
    ("serial", "tcp:1.2.3.4:1234", SerialSpec(kind=SerialKind.TCP, host="1.2.3.4", port=1234)),
    ("display", "none", DisplaySpec(kind=DisplayKind.NONE)),
    ("display", "vnc", DisplaySpec(kind=DisplayKind.VNC)),
    ("display", "vnc:use-port-unused,keymap=de", DisplaySpec(kind=DisplayKind.VNC, keymap="de")),
    ("display", "vnc:listen=0.0.0.0", DisplaySpec(kind=DisplayKind.VNC, listen="0.0.0.0")),
    ("display", "vnc:password-file=/etc/p", DisplaySpec(kind=DisplayKind.VNC, password_file="/etc/p")),
    ("display", "vnc:port=1", DisplaySpec(kind=DisplayKind.VNC, vnc_port=5901)),
    ("display", "vnc:port=5999", DisplaySpec(kind=DisplayKind.VNC, vnc_port=5999)),
    ("display", "sdl", DisplaySpec(kind=DisplayKind.SDL)),
    ("display", "intel", DisplaySpec(kind=DisplayKind.INTEL)),
    ("boot", "dc", "dc"),
    ("boot", "", ""),
    *((key, "true", True) for key in ("pae", "acpi", "apic", "nx", "hap", "viridian", "smbios-pt", "acpi-pt")),
    ("hpet", "1", True),
    ("hpet", "", None),
    ("vpt-align", "0", False),
    ("timer-mode", "3", 3),
    ("timer-mode", "", None),
    ("timeoffset", "-3600", -3600),
    ("time-offset", "7200", 7200),
    ("timeoffset", "", 0),
    ("smbios-oem-type-pt", "128, 255", (128, 255)),
    ("smbios-oem-types-pt", "130", (130,)),
    ("smbios-oem-type-pt", "", ()),
    ("power-management", "2", 2),
    ("oem-features", "7", 7),
    ("inject-sci", "1", 1),
    ("platform", "acpi_s3=0", (PlatformSpec(key="acpi_s3", value="0"),)),
    ("platform", "generation-id", (PlatformSpec(key="generation-id", value=""),)),
    ("bios-string", "oem-99=a = b", (BiosString(key="oem-99", value="a = b"),)),
    ("extra-hvm", "device=e1000,netdev=n0", (ExtraArgument(key="device", value="e1000,netdev=n0"),)),
    ("extra-hvm", "usb", (ExtraArgument(key="usb"),)),
    ("extra-hvm", "append=", (ExtraArgument(key="append", value=""),)),
]

BAD = [
    ("uuid", "1", "is no uuid"),
    ("uuid", "00000000-0000-0000-0000-000000000000", "nil uuid"),
    ("name", "a/b", "no VM name"),
    ("name", "x" * 65, "no VM name"),
    ("name", "Domain-0", "dom0"),
    ("startup", "restore", "needs a file"),
    ("startup", "restore save", "not absolute"),
    ("startup", "paused /x", "no meaning"),
    ("startup", "running", "is not one of"),
    ("startup", "", "is not one of"),
    ("on_halt", "halt", "is not one of"),
    ("on_reboot", "", "is not one of"),
    ("on_crash", "Destroy", "is not one of"),
    ("shutdown-timeout", "0", "out of range"),
    ("shutdown-timeout", "86401", "out of range"),
    ("device-timeout", "0", "out of range"),
    ("device-timeout", "86401", "out of range"),
    ("device-timeout", "40s", "not a whole number"),
    ("image-compression", "gzip", "is not one of"),
    ("image-compression", "", "is not one of"),
    ("debug", "on", "neither true nor false"),
    ("debug", "", "neither true nor false"),
    ("output", "log", "not absolute"),
    ("no_mem_check", "2", "neither true nor false"),
    ("hvm", "kernel", "neither true nor false"),
    ("kernel", "vmlinuz", "not absolute"),
    ("kernel", "/" + "x" * 4096, "longer than"),
    ("initrd", "initrd", "not absolute"),
    ("cmdline", "x" * 1024, "1024 bytes"),
    ("cmdline", "\u00e4" * 512, "1024 bytes"),
    ("memory", "0", "out of range"),
    ("memory", "-1", "out of range"),
    ("memory", "16777217", "out of range"),
    ("memory", "64M", "not a whole number"),
    ("memory", "064", "not a whole number"),
    ("memory", "0x_", "not a whole number"),
    ("memory", "9" * 5000, "not a whole number"),
    ("memory", "\u0663", "not a whole number"),
    ("memory", "", "not a whole number"),
    ("memory-max", "128", "less than `memory`"),
    ("videoram", "256", "leave nothing"),
    ("videoram", "0", "out of range"),
    ("vcpus", "0", "out of range"),
    ("vcpus", "513", "out of range"),
    ("vcpus", "129", "at most 128"),
    ("cores-per-socket", "2", "do not divide"),
    ("cpus-affinity", "0", "virtual CPU and host CPUs"),
    ("cpus-affinity", "0:", "not a whole number"),
    ("cpus-affinity", "0:1,1", "named twice"),
    ("cpus-affinity", "0:4096", "out of range"),
    ("cpus-affinity", "1:0", "no virtual CPU 1"),
    ("cpuid", "1", "a leaf and masks"),
    ("cpuid", f"1:exx={MASK}", "REGISTER=MASK"),
    ("cpuid", "1:eax=0xff", "no mask"),
    ("cpuid", f"1:eax={MASK},eax={MASK}", "given twice"),
    ("cpuid", f"0xffffffff:eax={MASK}", "out of range"),
    ("cpuid", f"1+:eax={MASK}", "not a whole number"),
    ("disk", "", "five fields"),
    ("disk", "/a:phy:xvda:w", "five fields"),
    ("disk", "a:phy:xvda:w:disk", "not absolute"),
    ("disk", ":phy:xvda:w:disk", "not absolute"),
    ("disk", "/a:vdi:xvda:w:disk", "storage daemon"),
    ("disk", "/a:qcow2:xvda:w:disk", "no disk type"),
    ("disk", "/a:phy:hde:w:disk", "out of range"),
    ("disk", "/a:phy:vda:w:disk", "no virtual disk name"),
    ("disk", "/a:phy:xvda:rw:disk", "no mode"),
    ("disk", "/a:phy:xvda:w:floppy", "no device type"),
    ("disk", "/a:phy:xvda:w:cdrom", "cannot be written"),
    ("disk", "/a:phy:xvda:w:disk:temporary", "snapshot mode"),
    ("disk", "/a:phy:xvda:w:disk:nothing", "KEY=VALUE"),
    ("disk", "/a:phy:xvda:w:disk:keyfile=/k", "unknown option"),
    ("disk", "/a:phy:xvda:w:disk:cipher=aes", "without `key-file`"),
    ("disk", "/a:phy:xvda:w:disk:key-file=k", "not absolute"),
    ("disk", "/a:phy:xvda:w:disk:key-file=/k:key-file=/l", "given twice"),
    ("disk", "/a:phy:xvda:w:disk:key-file=/k:key-size=9", "out of range"),
    ("disk", "/a:phy:xvda:w:disk:key-file=/k:key-size=257", "multiple of 8"),
    ("disk", "/a:phy:xvda:w:disk:key-file=/k:cipher=a b", "no cipher"),
    ("disk", "/a:vhd:xvda:w:disk:key-file=/k", "cannot be encrypted"),
    ("disk", "/a:phy:xvda:w:disk:key-dir=/k", "refused"),
    ("disk", "/a:phy:xvda:w:disk:backend-domid=1", "only be 0"),
    ("disk", "/a:phy:xvda:w:disk:share=perhaps", "neither true nor false"),
    ("disk", "/a:phy:xvda:w:disk:share", "KEY=VALUE"),
    ("disk", "/a:phy:xvda:w:disk:share=true:share=true", "given twice"),
    ("diskinfo-pt", "x", "neither true nor false"),
    ("nic", "br0", "KEY=VALUE"),
    ("nic", ",", "KEY=VALUE"),
    ("nic", "brdige=br0", "unknown option"),
    ("nic", "bridge=", "no bridge name"),
    ("nic", "bridge=a/b", "no bridge name"),
    ("nic", "bridge=br\u00e4", "no bridge name"),
    ("nic", "bridge=abcdefghijklmnop", "no bridge name"),
    ("nic", "mac=random", "no MAC address"),
    ("nic", "mac=00:16:3e:00:00:0", "no MAC address"),
    ("nic", "id=32", "out of range"),
    ("nic", "id=x", "not a whole number"),
    ("nic", "id=1,id=2", "given twice"),
    ("nic", "model=ne3000", "no model"),
    ("nic", "network=/net/1", "refused"),
    ("nic", "wireless=true", "refused"),
    ("nic", "backend-domid=2", "only be 0"),
    ("pci", "", "an id and an address"),
    ("pci", "0,bind", "an id and an address"),
    ("pci", "0,00:1b.0", "no PCI address"),
    ("pci", "0,0000:00:20.0", "no PCI address"),
    ("pci", "0,0000:00:1b.8", "no PCI address"),
    ("pci", "x,0000:00:1b.0", "not a whole number"),
    ("pci", "0,0000:00:1b.0,permissive=1", "unknown option"),
    ("pci", "0,0000:00:1b.0,msitranslate=2", "neither true nor false"),
    ("pci", "0,0000:00:1b.0,guest_slot=32", "out of range"),
    ("pci", "0,0000:00:1b.0,guest_slot=1,vdevfn=8", "both place"),
    ("pci-msitranslate", "2", "neither true nor false"),
    ("pci-power-management", "2", "neither true nor false"),
    ("serial", "pyt", "no place"),
    ("serial", "tcp:host:1", "no IPv4"),
    ("serial", "tcp:1.2.3.256:1", "no IPv4"),
    ("serial", "tcp:1.2.3:1", "no IPv4"),
    ("serial", "tcp:1.2.3.4", "not a whole number"),
    ("serial", "tcp:1.2.3.4:0", "out of range"),
    ("serial", "tcp:1.2.3.4:1,server=on", "not a whole number"),
    ("display", "", "no display"),
    ("display", "vcn", "no display"),
    ("display", "sdl:x", "no options"),
    ("display", "vnc:password=x", "unknown option"),
    ("display", "vnc:port=100", "no VNC port"),
    ("display", "vnc:port=65536", "no VNC port"),
    ("display", "vnc:port=1,use-port-unused", "contradict"),
    ("display", "vnc:use-port-unused,use-port-unused", "given twice"),
    ("display", "vnc:keymap=../de", "no keymap"),
    ("boot", "x", "no boot device"),
    ("boot", "cc", "named twice"),
    *((key, "2", "neither") for key in ("pae", "acpi", "apic", "nx", "hap", "viridian", "smbios-pt", "acpi-pt")),
    ("hpet", "2", "neither true nor false"),
    ("vpt-align", "2", "neither true nor false"),
    ("timer-mode", "4", "out of range"),
    ("timeoffset", "UTC+1", "not a whole number"),
    ("smbios-oem-type-pt", "127", "out of range"),
    ("smbios-oem-type-pt", "128,128", "named twice"),
    ("smbios-oem-type-pt", "128,", "not a whole number"),
    ("power-management", "3", "out of range"),
    ("oem-features", "-1", "out of range"),
    ("inject-sci", "x", "not a whole number"),
    ("platform", "a/b=1", "no name"),
    ("platform", "acpi=1", "follows from the key"),
    ("platform", "device-model=x", "by xenvm itself"),
    ("platform", "a=" + "x" * 1025, "longer than"),
    ("bios-string", "oem-100=x", "no bios string"),
    ("bios-string", "bios-vendor", "a name and a text"),
    ("bios-string", "bios-vendro=x", "no bios string"),
    ("extra-hvm", "-device=x", "starts with a dash"),
    ("extra-hvm", "a b=x", "no option name"),
    ("extra-hvm", "", "no option name"),
]


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_good_values(key, text, value):
    result = one(key, text)
    assert not result.report()
    assert getattr(result.config, find(key).field) == value


@pytest.mark.parametrize(("key", "text", "message"), BAD)
def test_bad_values(key, text, message):
    result = one(key, text)
    assert result.config is None
    last = result.filename and [issue for issue in result.issues if issue.key == find(key).name]
    assert last
    assert message in last[0].message
    assert last[0].line > 0
    assert last[0].text.startswith(key)
    assert find(key).field in result.lines


def test_every_key_has_samples():
    assert {find(key).name for key, _, _ in GOOD} == {key.name for key in KEYS}
    assert {find(key).name for key, _, _ in BAD} == {key.name for key in KEYS}


def test_file_of_restore():
    assert one("startup", "restore /save/a file").config.startup_file == "/save/a file"
    assert one("startup", "restore-del /b").config.startup_file == "/b"
    assert one("startup", "paused").config.startup_file is None


def test_keys_are_those_published_and_those_kept():
    assert {key.name for key in KEYS if key.published} == set(PUBLISHED)
    assert {key.name for key in KEYS if not key.published} == {
        *KEPT,
        *("shutdown-timeout", "device-timeout", "image-compression"),
    }


def test_each_field_has_one_key():
    of_keys = [name for key in KEYS for name in (key.field, key.second_field) if name]
    assert sorted(of_keys) == sorted(Config.FIELDS)


def test_names_are_unique():
    assert len(spellings()) == sum(1 + len(key.synonyms) for key in KEYS)
    assert not {key.name for key in REFUSED} & set(spellings())
    assert len({key.name for key in REFUSED}) == len(REFUSED)
    assert find("vif") is find("nic")
    assert find("nested") is None
    assert refused("nested").reason
    assert refused("memory") is None


def fits(value, hint):
    if isinstance(hint, typing.NewType):
        return isinstance(value, hint.__supertype__)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint


@pytest.mark.parametrize("text", [PV, HVM])
def test_defaults_fit_the_types_of_their_fields(text):
    config = parse_text(text, "vm.cfg").accepted()
    for name, hint in typing.get_type_hints(Config).items():
        assert fits(getattr(config, name), hint), name


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_values_fit_the_types_of_their_fields(key, text, value):
    field = find(key).field
    assert fits(getattr(one(key, text).accepted(), field), typing.get_type_hints(Config)[field])


def test_defaults():
    config = parse_text(PV, "vm.cfg").accepted()
    assert (config.on_halt, config.on_reboot, config.on_crash) == (Action.DESTROY, Action.REBOOT, Action.DESTROY)
    assert config.startup is StartupKind.STARTED
    assert config.uuid is None
    assert config.name is None
    assert config.hvm is False
    assert config.vcpus == 1
    assert config.shutdown_timeout_s == 60
    assert config.device_timeout_s == 40
    assert config.display.kind is DisplayKind.NONE
    assert config.boot == "cd"
    assert parse_text(HVM, "vm.cfg").accepted().display == DisplaySpec(kind=DisplayKind.VNC)
    assert [key.name for key in KEYS if key.default is REQUIRED] == ["memory"]
    assert repr(REQUIRED) == "required"
