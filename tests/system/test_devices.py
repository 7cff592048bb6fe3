# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks and network cards of PV guests on real backends."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from conftest import INITRD, KERNEL, devices, json_of, kill, processes, run, until

MIB = 1 << 20
BLOCK = (bytes(range(251)) * 4178)[: MIB - 8]
PATTERN = b"".join(b"%08d" % number + BLOCK for number in range(64))  # 64 MiB, each MiB another one
DISK = 72 * MIB


@pytest.fixture
def block(image):
    """A block device on this host, as a logical volume would be."""
    made = []

    def make(name, **options):
        path = image(name, **options)
        made.append(run("losetup", "--find", "--show", str(path)).stdout.strip())
        return made[-1]

    yield make
    for device in made:
        run("losetup", "--detach", device)


def quiet(vm, **settings):
    """A guest whose console is for commands."""
    return vm(tick_ms=100000, **settings)


def held(guest):
    """The broker's descriptors, without the two that each helper which waits ready costs it; once they stay the same."""

    def count():
        helpers = guest.pids().keys() & {"builder", "hotplug", "network"}
        return len(os.listdir(f"/proc/{guest.broker()}/fd")) - 2 * len(helpers)

    def settled():
        first = count()
        time.sleep(1)
        return first if count() == first else 0

    return until(settled, "the broker's descriptors stay the same")


def rows(guest, command="disk-list"):
    return json_of(guest.cmd("--json", command))


def test_the_published_example_with_disk_and_card(vm, block, bridge):
    """A block device as sda (xvda to a Linux guest) with a file system, and one card: mounted, written, pinged, all gone."""
    device = block("root.img", size=24 * MIB)
    assert run("mke2fs", "-q", "-t", "ext4", device).returncode == 0
    guest = quiet(vm, disk=f"{device}:phy:sda:w:disk", vif=f"id=0,bridge={bridge}")
    guest.start()
    guest.up()
    guest.shell(
        "mkdir /mnt && mount -t ext4 /dev/xvda /mnt && echo written by the guest >/mnt/file && cp /bin/busybox /mnt"
    )
    assert "written by the guest" in guest.shell("chroot /mnt /busybox cat /file && umount /mnt")  # it is its root
    guest.shell("ip addr add 10.77.0.2/24 dev eth0 && ip link set eth0 up")
    guest.shell("ping -c 2 -w 20 10.77.0.1")
    assert run("busybox", "ping", "-c", "2", "-w", "20", "10.77.0.2").returncode == 0
    (disk,), (card,) = rows(guest), rows(guest, "nic-list")
    assert (disk["name"], disk["backend"], disk["source"]) == ("sda", "connected", f"phy:{device}")
    assert (card["backend"], card["bridge"]) == ("connected", bridge)
    # the next incarnation has them again
    guest.cmd("restart", "timeout=100")
    guest.up(boots=2)
    said = guest.shell("mkdir /mnt; mount -t ext4 /dev/xvda /mnt && cat /mnt/file && umount /mnt")
    assert "written by the guest" in said
    guest.cmd("shutdown", "timeout=100")
    until(lambda: devices()["backends"] == [], "the kernel let go of the devices")
    assert run("dumpe2fs", "-h", device).returncode == 0


def copy_and_try(guest):
    """Have the guest copy its second disk, for reading only, to its first one, and try to write to the second."""
    guest.start()
    guest.up()
    guest.shell("dd if=/dev/xvdb of=/dev/xvda bs=1M count=64 conv=fsync")
    guest.shell("dd if=/dev/zero of=/dev/xvdb bs=512 count=1", code=1)


@pytest.mark.parametrize("kind", ["file", pytest.param("aio", marks=pytest.mark.long)])
def test_files_through_loop_devices(vm, image, kind):
    """What the guest writes is in the file; a read-only disk takes no writes; the loop device goes by itself."""
    written, fixed = image("disk.img", size=DISK), image("fixed.img", content=PATTERN)
    guest = quiet(vm, disk=[f"{written}:{kind}:xvda:w:disk", f"{fixed}:{kind}:xvdb:r:disk"])
    copy_and_try(guest)
    assert len(devices()["loops"]) == 2
    guest.cmd("shutdown", "timeout=100")
    until(lambda: devices()["loops"] == [], "the loop devices have gone")
    assert written.read_bytes()[: len(PATTERN)] == PATTERN
    assert fixed.read_bytes()[: len(PATTERN)] == PATTERN


@pytest.mark.long
def test_block_devices(vm, block):
    """What the guest writes is on the device; one for reading only takes no writes, of root in the guest neither."""
    written, fixed = block("written.img", size=DISK), block("fixed.img", content=PATTERN)
    guest = quiet(vm, disk=[f"{written}:phy:xvda:w:disk", f"{fixed}:phy:xvdb:r:disk"])
    copy_and_try(guest)
    guest.cmd("shutdown", "timeout=100")
    until(lambda: devices()["backends"] == [], "the kernel let go of the devices")
    for device in (written, fixed):
        with Path(device).open("rb") as content:
            assert content.read(len(PATTERN)) == PATTERN


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("qcow", "qcow2"),
        pytest.param("qcow", "qcow", marks=pytest.mark.long),
        pytest.param("vhd", "vpc", marks=pytest.mark.long),
    ],
)
def test_image_formats_are_served_without_privilege(vm, image, kind, form):
    """What the guest writes is in the image; a read-only one takes no writes; nothing of the server stays."""
    written, fixed, raw = image("disk.img"), image("fixed.img"), image("raw.img", content=PATTERN)
    for path in (written, fixed):
        path.unlink()
    assert run("qemu-img", "create", "-q", "-f", form, str(written), str(DISK)).returncode == 0
    assert run("qemu-img", "convert", "-O", form, str(raw), str(fixed)).returncode == 0
    guest = quiet(vm, disk=[f"{written}:{kind}:xvda:w:disk", f"{fixed}:{kind}:xvdb:r:disk"])
    guest.start()
    guest.up()
    assert len(devices()["nbds"]) == 2
    assert servers() == 2
    audited = run("xenvm-audit", "--json", guest.uuid)
    assert audited.returncode == 0, audited.stdout
    assert [one["role"] for one in json_of(audited)["audited"]].count("image") == 2  # nobody's children, and yet seen
    guest.shell(
        "dd if=/dev/xvdb of=/dev/xvda bs=1M count=64 conv=fsync", patience_s=900
    )  # QEMU writes qcow 1 in small steps
    guest.shell("dd if=/dev/zero of=/dev/xvdb bs=512 count=1", code=1)
    guest.cmd("restart", "timeout=100")
    guest.up(boots=2)
    guest.cmd("shutdown", "timeout=100")
    until(lambda: devices()["nbds"] == [] and servers() == 0, "devices and servers have gone")
    for path in (written, fixed):
        assert run("qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(raw)).returncode == 0
        assert raw.read_bytes()[: len(PATTERN)] == PATTERN


@pytest.mark.long
def test_what_dead_workers_left_is_named_and_removed(vm, image):
    """A mapping, and an image server whose broker died before it had noted it: doctor, and the next monitor.

    Alike when the VM is off.
    """
    stored = image("disk.qcow2")
    stored.unlink()
    assert run("qemu-img", "create", "-q", "-f", "qcow2", str(stored), str(16 * MIB)).returncode == 0
    guest = quiet(vm)
    guest.start()
    guest.up()

    def leave(device):
        name = f"xenvm-{guest.uuid}-{device}"
        assert run("dmsetup", "create", name, "--table", "0 8 zero").returncode == 0
        words = ["/usr/bin/qemu-storage-daemon", "--blockdev", "driver=null-co,node-name=image"]
        words += ["--nbd-server", "addr.type=unix,addr.path=/tmp/xenvm-test-stray"]
        words += ["--export", f'{{"type":"nbd","id":"{name}","node-name":"image","name":""}}']
        subprocess.Popen(words, user="xenvm-image", stderr=subprocess.DEVNULL)
        until(lambda: servers() == 1, "a stray server")

    before = devices()
    leave(51776)
    said = guest.cmd("doctor", code=1).stdout
    assert f"mapping xenvm-{guest.uuid}-51776: no disk uses it" in said
    assert re.search(r"image server \d+: no disk uses it", said)
    guest.cmd("doctor", "clean=true")
    assert (devices(), servers()) == (before, 0)
    assert guest.cmd("doctor").stdout == ""
    leave(51776)
    kill(guest.broker())
    until(lambda: not processes(), "its processes have ended")
    guest.start()
    until(lambda: (devices(), servers()) == (before, 0), "the next monitor has removed it")
    guest.cmd("destroy")
    leave(51776)
    said = guest.cmd("doctor", code=1).stdout
    assert f"mapping xenvm-{guest.uuid}-51776: no disk uses it" in said
    assert re.search(r"image server \d+: no disk uses it", said)
    assert guest.cmd("doctor", "clean").stdout == ""
    assert (devices(), servers()) == (before, 0)


def servers():
    return int(run("pgrep", "-c", "-f", "qemu-storage-daemon").stdout)


@pytest.mark.parametrize("kind", ["phy", pytest.param("file", marks=pytest.mark.long)])
def test_an_encrypted_disk(vm, image, block, kind):
    """The backing store holds no plain text, and opens with cryptsetup by hand."""
    key = image("key", size=0, content=os.urandom(32))
    store = image("store.img") if kind == "file" else block("store.img")
    guest = quiet(vm, disk=f"{store}:{kind}:xvda:w:disk:cipher=aes-xts-plain64:key-size=256:key-file={key}")
    guest.start()
    guest.up()
    guest.shell("yes PLAINTEXT | head -c 1048576 | dd of=/dev/xvda bs=1M conv=fsync")
    assert key.read_bytes().hex() not in run("sh", "-c", "cat /proc/*/cmdline /var/log/xenvm/*; xenstore-ls").stdout
    guest.cmd("shutdown", "timeout=100")
    until(lambda: devices()["dms"] == [], "the mapping has gone")
    run("sync")
    with open(store, "rb") as stored:
        assert b"PLAINTEXT" not in stored.read(MIB)
    opened = run(
        *("cryptsetup", "open", "--type", "plain", "--cipher", "aes-xts-plain64", "--key-size", "256"),
        *("--key-file", str(key), str(store), "xenvm-test-plain"),
    )
    assert opened.returncode == 0, opened.stderr
    try:
        with open("/dev/mapper/xenvm-test-plain", "rb") as plain:
            assert plain.read(MIB) == (b"PLAINTEXT\n" * MIB)[:MIB]
    finally:
        run("cryptsetup", "close", "xenvm-test-plain")


@pytest.mark.long
def test_a_disc_is_changed(vm, image):
    """A PV guest sees another read-only disk."""
    one, two = image("one.iso", content=b"one" * 1000), image("two.iso", content=b"two" * 1000)
    guest = quiet(vm, disk=":file:xvdd:r:cdrom")
    guest.start()
    guest.up()
    assert rows(guest) == []
    for disc, text in ((one, "one"), (two, "two")):
        guest.cmd("cd-insert", "device=xvdd", f"path={disc}")
        assert guest.shell("head -c 6 /dev/xvdd").strip().endswith(text * 2)
    guest.cmd("cd-eject", "xvdd")
    assert rows(guest) == []


def test_hot_add_and_remove_leave_nothing(vm, image, bridge):
    """A disk and a card come and go under a guest that reads another disk all the time; all counts stay the same.

    XENVM_TEST_TURNS says how often, three times by default. Linux 6.1 loses 1 MiB for each card that goes, with xl too:
    hence the memory.
    """
    first = image("first.img", content=PATTERN)
    guest = quiet(vm, memory=256, disk=f"{image('busy.img')}:file:xvda:r:disk")
    guest.start()
    guest.up()
    guest.shell("(while dd if=/dev/xvda of=/dev/null bs=64k iflag=direct 2>/dev/null; do true; done) & true")
    before, counts = devices(), held(guest)
    for turn in range(int(os.environ.get("XENVM_TEST_TURNS", "3"))):
        guest.cmd("disk-add", f"{first}:file:xvdc:w:disk")
        guest.cmd("nic-add")
        if not turn % 10:  # each looks at all devices anew
            assert [row["backend"] for row in rows(guest)] == ["connected"] * 2, turn
        guest.cmd("nic-del", "0")
        guest.cmd("disk-del", "xvdc")
    assert [row["name"] for row in [*rows(guest), *rows(guest, "nic-list")]] == ["xvda"]
    assert devices() == before
    assert held(guest) == counts


@pytest.mark.long
def test_a_user_adds_disks_of_directories_that_the_policy_opens(vm, image):
    """Root's files, by a member of the group xenvm who may not open them: those of one directory, and no others."""
    ours, elsewhere = image("a.img", content=b"ours"), Path("/root/xenvm-test.img")
    ours.chmod(0o600)
    elsewhere.write_bytes(bytes(512))
    policy = Path("/etc/xenvm/policy.toml")
    policy.write_text(f'disk-directories = ["{ours.parent}"]\n')
    as_user = ("setpriv", "--reuid=nobody", "--regid=xenvm", "--clear-groups", "xenvm-cmd")
    try:
        guest = quiet(vm)
        guest.start()
        guest.up()
        refused = run(*as_user, guest.uuid, "disk-add", f"{elsewhere}:file:xvdc:w:disk")
        assert (refused.returncode, "disk-directories" in refused.stderr) == (8, True)
        added = run(*as_user, guest.uuid, "disk-add", f"{ours}:file:xvdc:w:disk")
        assert added.returncode == 0, added.stderr
        assert guest.shell("head -c 4 /dev/xvdc").strip().endswith("ours")
        assert str(ours) in Path(f"/var/log/xenvm/{guest.uuid}.acts").read_text()
    finally:
        policy.unlink()
        elsewhere.unlink()


@pytest.mark.long
def test_a_disk_in_use_is_refused(vm, image, block):
    """Another guest, a mount and a foreign loop device all count; share=true says that it is meant."""
    shared, mounted = image("shared.img"), block("mounted.img", size=24 * MIB)
    first = quiet(vm, disk=f"{shared}:file:xvda:w:disk")
    first.start()
    second = quiet(vm, disk=f"{shared}:file:xvda:w:disk")
    refused = second.start(code=9)
    assert "in use by another guest" in refused.stderr
    assert "share=true" in refused.stderr
    assert second.left() == []
    run("mke2fs", "-q", mounted)
    where = shared.parent / "mnt"
    where.mkdir()
    assert run("mount", mounted, str(where)).returncode == 0
    try:
        second.write(disk=f"{mounted}:phy:xvda:w:disk")
        assert "mounted" in second.start(code=9).stderr
        second.write(disk=f"{mounted}:phy:xvda:r:disk")
        assert f"mounted read-write on this host, at {where}" in second.start(code=9).stderr
    finally:
        run("umount", str(where))
    second.write(disk=f"{shared}:file:xvda:w:disk:share=true")
    first.write(disk=f"{shared}:file:xvda:w:disk:share=true")
    first.cmd("read-config")
    first.cmd("destroy")
    first.cmd("start")
    second.start()
    assert rows(second)[0]["source"] == f"file:{shared}"


def test_wrong_devices_are_refused_before_anything_is_built(vm, image, tmp_path):
    guest = quiet(vm, disk=f"{tmp_path}/none.img:file:xvda:w:disk")
    assert "No such file" in guest.start(code=6).stderr
    guest.write(disk=f"{image('a.img')}:phy:xvda:w:disk")
    assert "not a block device" in guest.start(code=6).stderr
    guest.write(disk=f"{image('odd.img', size=1000)}:file:xvda:w:disk")
    assert "multiple of 512" in guest.start(code=1).stderr
    guest.write(disk=[], nic="bridge=nowhere")
    assert "no bridge nowhere" in guest.start(code=1).stderr
    assert guest.left() == []


@pytest.mark.long
def test_a_card_moves_only_to_bridges_that_are_open_to_it(vm, bridge):
    run("ip", "link", "add", "xenvmbr1", "type", "bridge")
    try:
        guest = quiet(vm, nic=[f"id=0,bridge={bridge}"])
        guest.start()
        refused = guest.cmd("nic-network-switch", "0", "bridge=xenvmbr1", code=8)
        assert "not open to this VM" in refused.stderr
        assert "policy.toml" in refused.stderr
        guest.write(nic=[f"id=0,bridge={bridge}", "id=1,bridge=xenvmbr1"])
        guest.cmd("read-config")
        guest.cmd("nic-network-switch", "0", "bridge=xenvmbr1")
        assert rows(guest, "nic-list")[0]["bridge"] == "xenvmbr1"
        port = os.readlink(f"/sys/class/net/vif{guest.domid}.0/master")
        assert port.endswith("/xenvmbr1")
        guest.cmd("destroy")
        without = guest.write(nic="") or guest.start(code=9)  # its monitor still lives
        assert "another monitor" in without.stderr
        guest.cmd("read-config")
        assert "several bridges" in guest.cmd("start", code=1).stderr
    finally:
        run("ip", "link", "delete", "xenvmbr1")


@pytest.mark.long
def test_adopted_devices_go_on(vm, image, bridge):
    """After kill -9 of the monitor its devices are there, can be listed, and are removed with the guest."""
    guest = quiet(vm, disk=f"{image('a.img')}:file:xvda:w:disk", nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    os.kill(guest.broker(), 9)
    until(lambda: not processes(), "its processes have ended")
    guest.start()
    assert [row["backend"] for row in rows(guest)] == ["connected"]
    guest.shell("dd if=/dev/xvda of=/dev/null bs=1M count=1")
    guest.cmd("disk-del", "xvda")
    guest.cmd("nic-del", "0")
    assert devices()["backends"] == []


def test_a_hostile_guest_keeps_nothing(vm, image, bridge):
    """Garbage in every frontend node the guest may write: destroy still removes exactly ours, within its deadline."""
    guest = quiet(vm, disk=f"{image('a.img')}:file:xvda:w:disk", nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    domid = guest.domid
    for node, value in {
        "vbd/51712/backend": "/local/domain/0/backend/vbd/0/0",
        "vbd/51712/backend-id": "7",
        "vbd/51712/state": "garbage",
        "vbd/51712/ring-ref": "x" * 2000,
        "vif/0/backend": "/vm",
        "vif/0/state": "99",
    }.items():
        # as the guest would: these nodes are its own (the lab's guest has no xenstore client)
        run("xenstore-write", f"/local/domain/{domid}/device/{node}", value)
    assert all(row["frontend"] == "none" for row in rows(guest))
    guest.cmd("destroy")
    assert devices()["backends"] == []


@pytest.mark.long
def test_a_guest_that_does_not_let_go(vm, image, bridge):
    """A paused guest answers nothing: exit 7 and the device stays; with force it goes."""
    guest = quiet(vm, disk=f"{image('a.img')}:file:xvda:w:disk", nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    guest.cmd("pause")
    for command, device in (("disk-del", "xvda"), ("nic-del", "0")):
        refused = guest.cmd(command, device, "timeout=1", code=7)
        assert "did not let go within 1 s" in refused.stderr
        assert "force=true" in refused.stderr
        guest.cmd(command, device, "timeout=1", "force=true")
    assert devices()["backends"] == []
    guest.cmd("unpause")


@pytest.mark.parametrize("victim", ["broker", pytest.param("hotplug", marks=pytest.mark.long)])
def test_kill_9_in_the_middle_of_a_plug(vm, image, victim):
    """Whatever moment it dies at: the next command, or the next monitor, finds the disk whole or not at all."""
    disk = image("a.img")
    guest = quiet(vm)
    guest.start()
    guest.up()
    before = devices()
    for delay_s in (0.0, 0.05, 0.2):
        adding = subprocess.Popen(
            ["xenvm-cmd", guest.uuid, "disk-add", f"{disk}:file:xvdc:w:disk"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        worker = until(lambda one=adding: worker_of(guest, "hotplug") or one.poll() is not None, "a hotplug worker")
        time.sleep(delay_s)
        kill(guest.broker() if victim == "broker" else worker)
        adding.wait(timeout=120)
        if victim == "broker":
            until(lambda: not processes(), "its processes have ended")
            guest.start()
        until(lambda: guest.cmd("disk-list") and guest.cmd("doctor", code=0), "nothing is left half")
        if rows(guest):
            assert rows(guest)[0]["backend"] == "connected"
            guest.cmd("disk-del", "xvdc")
        assert devices() == before, delay_s
    guest.cmd("disk-add", f"{disk}:file:xvdc:w:disk")


def worker_of(guest, role):
    return next((pid for pid, words in processes().items() if role in words and guest.uuid in words), 0)


@pytest.mark.long
def test_without_udevd(vm, image, bridge):
    """The monitor does all by itself; doctor says what is missing."""
    guest = quiet(vm, nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    run("pkill", "-9", "udevd")
    until(lambda: run("pgrep", "udevd").stdout == "", "udevd has died")
    os.unlink("/run/udev/control")
    try:
        guest.cmd("disk-add", f"{image('a.img')}:file:xvdc:w:disk")
        assert "udevd does not run" in guest.cmd("doctor", code=1).stdout
        guest.cmd("nic-del", "0")
        guest.cmd("nic-add")
        assert [row["backend"] for row in [*rows(guest), *rows(guest, "nic-list")]] == ["connected"] * 2
        guest.cmd("destroy")
    finally:
        run("/lib/systemd/systemd-udevd", "--daemon")
    guest.cmd("start")
    guest.cmd("doctor")


@pytest.mark.long
def test_a_device_that_something_else_removes(vm, image, bridge):
    """udev tells the monitor, which removes the rest; late events of what is gone do no harm."""
    guest = quiet(vm, nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    domid = guest.domid
    run("xenstore-rm", f"/local/domain/0/backend/vif/{domid}/0")
    until(lambda: rows(guest, "nic-list") == [], "the card is off the list")
    event = {**os.environ, "ACTION": "remove", "XENBUS_PATH": f"backend/vif/{domid}/0", "SEQNUM": "1"}
    for _ in range(5):
        assert run("/usr/libexec/xenvm/hotplug", env=event).returncode == 0
    guest.cmd("nic-add")
    assert rows(guest, "nic-list")[0]["backend"] == "connected"


def test_beside_a_guest_of_xl(vm, image, bridge):
    """Both attach and detach; neither touches what is the other's."""
    ours, theirs = image("ours.img"), image("theirs.img")
    guest = quiet(vm, disk=f"{ours}:file:xvda:w:disk", nic=f"bridge={bridge}")
    guest.start()
    guest.up()
    config = guest.file.with_suffix(".xl")
    config.write_text(
        f"name = 'beside'\ntype = 'pv'\nkernel = '{KERNEL}'\nramdisk = '{INITRD}'\nmemory = 128\nvcpus = 1\n"
        f"cmdline = 'console=hvc0 xenvm.tick_ms=1000000'\ndisk = ['{theirs},raw,xvda,w']\nvif = ['bridge={bridge}']\n"
    )
    log = Path("/var/log/xen/console/guest-beside.log")
    log.unlink(missing_ok=True)
    done = run("xl", "create", "-q", str(config))
    assert done.returncode == 0, done.stderr
    try:
        until(lambda: log.exists() and "GUEST-UP" in log.read_text(errors="replace"), "xl's guest is up")
        guest.cmd("disk-add", f"{image('more.img')}:file:xvdb:w:disk")
        assert run("xl", "block-attach", "beside", f"{image('other.img')},raw,xvdb,w").returncode == 0
        assert run("xl", "block-detach", "beside", "xvdb").returncode == 0
        guest.cmd("disk-del", "xvdb")
        guest.cmd("destroy")
        assert [name.split("-")[0] for name in devices()["backends"]] == ["vbd", "vif"]
        assert run("xl", "network-list", "beside").stdout.count("\n") == 2
        assert "in use" in quiet(vm, disk=f"{theirs}:file:xvda:w:disk").start(code=9).stderr
        served = image("served.qcow2")  # by a QEMU, which takes no lock, under a name that is a link
        served.unlink()
        assert run("qemu-img", "create", "-q", "-f", "qcow2", str(served), str(16 * MIB)).returncode == 0
        link = served.parent / "link.qcow2"
        link.symlink_to(served)
        attached = run("xl", "block-attach", "beside", f"{served},qcow2,xvdc,w")
        assert attached.returncode == 0, attached.stderr
        for path in (served, link):
            refused = quiet(vm, disk=f"{path}:qcow:xvda:w:disk").start(code=9).stderr
            assert f"qcow:{path} is in use by domain" in refused
            assert "/backend/qdisk/" in refused
    finally:
        run("xl", "destroy", "beside")
        until(lambda: devices()["backends"] == [], "xl's devices have gone")
        run("xenstore-rm", "/libxl")
