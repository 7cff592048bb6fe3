# SPDX-License-Identifier: GPL-2.0-or-later
"""parse(dump(c)) == c for every config, and no text at all makes the parser raise."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xenvm.boundary.frames import decode, encode
from xenvm.config.dump import dump, fields
from xenvm.config.issue import format_issue
from xenvm.config.keys import KEYS, REFUSED, find, spellings
from xenvm.config.parse import parse_bytes, parse_text
from xenvm.config.tuning import BIOS_STRINGS
from xenvm.model import (
    Action,
    AffinitySpec,
    BiosString,
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
    Uuid,
)
from xenvm.parser.main import answer

# Property tests measure nothing: a loaded machine is no failure
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PLAIN = parse_text("kernel = /k\nmemory = 64\n", "base").accepted()
VIRTUAL = parse_text("hvm = true\nmemory = 64\n", "base").accepted()

printable = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=40)
line = printable.map(lambda text: text.strip(" "))
path = line.map(lambda text: "/" + text)
field_path = path.filter(lambda text: ":" not in text)
mask = st.text("01xsk", min_size=32, max_size=32)
word = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
uuid = st.uuids().map(lambda value: Uuid(str(value))).filter(lambda text: text.strip("0-"))
mac = st.lists(st.integers(0, 255), min_size=6, max_size=6).map(lambda octets: ":".join(f"{o:02x}" for o in octets))
interface = st.from_regex(r"[a-z0-9_.-]{1,15}", fullmatch=True).filter(lambda name: name not in {".", ".."})
virtpath = st.sampled_from(["hd{}", "sd{}", "xvd{}"]).flatmap(
    lambda form: st.sampled_from("abcd" if form == "hd{}" else "abcdefghijklmnop").map(form.format)
)
crypt = st.none() | st.builds(
    CryptSpec,
    key_file=field_path,
    cipher=st.sampled_from(["aes-xts-plain", "serpent-cbc-essiv"]),
    key_size_bits=st.integers(8, 512).map(lambda number: number * 8),
)


@st.composite
def disk(draw):
    kind, cdrom = draw(st.sampled_from(list(DiskType))), draw(st.booleans())
    return DiskSpec(
        path="" if cdrom and draw(st.booleans()) else draw(field_path),
        type=kind,
        virtpath=draw(virtpath),
        read_only=cdrom or draw(st.booleans()),
        cdrom=cdrom,
        crypt=draw(crypt) if kind in {"phy", "file", "aio"} else None,
        share=draw(st.booleans()),
    )


def nics(model):
    spec = st.builds(
        NicSpec, id=st.integers(0, 31), bridge=st.none() | interface, mac=st.none() | mac, model=st.none() | model
    )
    unique = st.lists(spec, max_size=4, unique_by=(lambda nic: nic.id, lambda nic: nic.mac or str(nic.id)))
    return unique.map(tuple)


@st.composite
def pci(draw):
    place = draw(st.sampled_from([{}, {"guest_slot": draw(st.integers(0, 31))}, {"vdevfn": draw(st.integers(0, 255))}]))
    numbers = [draw(st.integers(0, high)) for high in (0xFFFF, 0xFF, 31, 7)]
    switch = st.none() | st.booleans()
    return PciSpec(
        group=draw(st.integers(0, 255)),
        address=PciAddress(*numbers),
        bind=draw(st.booleans()),
        msitranslate=draw(switch),
        power_mgmt=draw(switch),
        **place,
    )


display = st.sampled_from([kind for kind in DisplayKind if kind != "vnc"]).map(
    lambda kind: DisplaySpec(kind=kind)
) | st.builds(
    DisplaySpec,
    kind=st.just(DisplayKind.VNC),
    vnc_port=st.none() | st.integers(5900, 65535),
    listen=st.none() | st.just("10.0.0.1"),
    password_file=st.none() | st.just("/etc/xenvm/vnc"),
    keymap=st.none() | st.sampled_from(["de", "en-us"]),
)
serial = (
    st.sampled_from([SerialKind.PTY, SerialKind.NONE]).map(lambda kind: SerialSpec(kind=kind))
    | st.builds(SerialSpec, kind=st.just(SerialKind.DEVICE), path=path.map(lambda text: "/dev" + text))
    | st.builds(
        SerialSpec,
        kind=st.just(SerialKind.TCP),
        host=st.ip_addresses(v=4).map(str),
        port=st.integers(1, 65535),
    )
)
cpuid = st.builds(
    CpuidSpec,
    leaf=st.integers(0, 0xFFFFFFFE),
    subleaf=st.none() | st.integers(0, 0xFFFFFFFE),
    eax=mask,
    ebx=st.none() | mask,
    ecx=st.none() | mask,
    edx=st.none() | mask,
)


def tuples(spec, identity, size=3):
    return st.lists(spec, max_size=size, unique_by=identity).map(tuple)


@st.composite
def common(draw, base):
    memory, vcpus = draw(st.integers(2, 4096)), draw(st.integers(1, 16))
    kind = draw(st.sampled_from(list(StartupKind)))
    cpus = st.lists(st.integers(0, 4095), min_size=1, max_size=4, unique=True).map(lambda found: tuple(sorted(found)))
    return base.but(
        uuid=draw(st.none() | uuid),
        name=draw(st.none() | word),
        startup=kind,
        startup_file=draw(path) if kind.startswith("restore") else None,
        on_halt=draw(st.sampled_from(list(Action))),
        on_reboot=draw(st.sampled_from(list(Action))),
        on_crash=draw(st.sampled_from(list(Action))),
        shutdown_timeout_s=draw(st.integers(1, 86400)),
        device_timeout_s=draw(st.integers(1, 86400)),
        debug=draw(st.booleans()),
        output=draw(st.none() | path),
        no_mem_check=draw(st.booleans()),
        kernel=draw(path),
        memory_mib=memory,
        memory_max_mib=draw(st.none() | st.integers(memory, 8192)),
        vcpus=vcpus,
        cores_per_socket=draw(st.sampled_from([None, 1, vcpus])),
        cpus_affinity=draw(
            tuples(st.builds(AffinitySpec, vcpu=st.integers(0, vcpus - 1), cpus=cpus), lambda spec: spec.vcpu)
        ),
        cpuid=draw(tuples(cpuid, lambda spec: (spec.leaf, spec.subleaf))),
        disks=draw(tuples(disk(), lambda spec: spec.virtpath[-1])),
        pci=draw(tuples(pci(), lambda spec: spec.address)),
        display=draw(display),
    )


@st.composite
def paravirtual(draw):
    return draw(common(PLAIN)).but(initrd=draw(st.none() | path), cmdline=draw(line), nics=draw(nics(st.nothing())))


@st.composite
def virtual(draw):
    base = draw(common(VIRTUAL))
    switches = [
        "diskinfo_pt",
        "pci_msitranslate",
        "pci_power_management",
        "pae",
        "acpi",
        "apic",
        "nx",
        "hap",
        "viridian",
        "smbios_pt",
        "acpi_pt",
    ]
    numbers = st.integers(0, 2**31 - 1)
    bios = st.builds(BiosString, key=st.sampled_from([*BIOS_STRINGS, "oem-1", "oem-99"]), value=line.filter(bool))
    node = st.builds(PlatformSpec, key=word.map(lambda text: "x" + text), value=line)
    return base.but(
        kernel=draw(st.none() | path),
        videoram_mib=draw(st.none() | st.integers(1, min(512, base.memory_mib - 1))),
        nics=draw(nics(st.sampled_from(["e1000", "rtl8139"]))),
        serial=draw(serial),
        boot="".join(draw(st.lists(st.sampled_from("acdn"), unique=True))),
        **{name: draw(st.booleans()) for name in switches},
        hpet=draw(st.none() | st.booleans()),
        vpt_align=draw(st.none() | st.booleans()),
        timer_mode=draw(st.none() | st.integers(0, 3)),
        timeoffset_s=draw(st.integers(1 - 2**31, 2**31 - 1)),
        smbios_oem_types=tuple(draw(st.lists(st.integers(128, 255), max_size=4, unique=True))),
        power_management=draw(st.integers(0, 2)),
        oem_features=draw(numbers),
        inject_sci=draw(numbers),
        platform=draw(tuples(node, lambda spec: spec.key)),
        bios_strings=draw(tuples(bios, lambda spec: spec.key)),
        extra_hvm=tuple(draw(st.lists(st.builds(ExtraArgument, key=word, value=st.none() | line), max_size=3))),
    )


@unhurried
@given(paravirtual() | virtual())
def test_canonical_text_gives_the_config_back(config):
    text = dump(config)
    result = parse_text(text, "canonical")
    assert not result.report()
    assert result.config == config
    assert parse_bytes(text.encode(), "canonical").config == config
    assert dump(result.config) == text


@unhurried
@given(paravirtual() | virtual())
def test_fields_are_what_a_file_would_have(config):
    values = fields(config)
    lines = [
        f"{name} = {value}"
        for name, text in values.items()
        if find(name).guests.fit(hvm=config.hvm)
        for value in (text.split("\n") if text or not find(name).repeatable else [])
    ]
    assert parse_text("\n".join(lines), "fields").config == config


@unhurried
@given(paravirtual())
def test_what_the_parser_accepts_passes_every_check_of_the_broker(config):
    """No config is accepted whose answer the broker would refuse: it could not say what is wrong with it."""
    made = answer(parse_text(dump(config), "canonical"), "99999999-0000-4000-8000-000000000000")
    assert decode(encode(made)) == made
    if made.grants:
        grants = made.grants[0]
        assert [(disk.device, disk.path, disk.share) for disk in grants.disks] == [
            (disk.device_number, disk.path, disk.share) for disk in config.disks
        ]
        assert [(nic.id, nic.bridge) for nic in grants.nics] == [(nic.id, nic.bridge or "") for nic in config.nics]


def check(result):
    assert (result.config is None) == bool(result.issues)
    for issue in result.issues:
        shown = format_issue(result.filename, issue)
        shown.encode()
        assert shown.replace("\n", "").isprintable()
    if result.config is not None:
        assert parse_text(dump(result.config), "canonical").config == result.config


@unhurried
@given(st.text(st.characters()))
def test_any_text(text):
    check(parse_text(text, text))


@unhurried
@given(st.binary())
def test_any_bytes(data):
    check(parse_bytes(data, "vm.cfg"))


names = st.sampled_from([*spellings(), *(key.name for key in REFUSED)])
scraps = st.lists(
    st.sampled_from(
        [
            *"0123456789:,=+. -/_kvrw",
            "/dev/a",
            "phy",
            "xvda",
            "disk",
            "cdrom",
            "vnc",
            "tcp",
            "true",
            "restore",
            "port",
            "bind",
            "0000:00:1b.0",
            "1.2.3.4",
            "id=",
            "mac=",
            "key-file=",
            "eax=",
            "x" * 32,
            "\u0663",
            "\ud800",
            "\r",
        ]
    ),
    max_size=9,
).map("".join)
file = st.lists(st.tuples(names, scraps | printable | st.text(st.characters())), max_size=12)


@unhurried
@given(file)
def test_any_values_of_known_keys(pairs):
    check(parse_text("".join(f"{name} = {value}\n" for name, value in pairs), "vm.cfg"))


@unhurried
@given(st.sampled_from(KEYS), st.text(st.characters()))
def test_a_good_file_with_one_odd_line(key, value):
    for base in ("kernel = /k\nmemory = 64\n", "hvm = true\nmemory = 64\n"):
        check(parse_text(f"{base}{key.name} = {value}\n", "vm.cfg"))
