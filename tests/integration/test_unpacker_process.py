# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels unpacked by real unpacker processes, and what is kept of them."""

import bz2
import gzip
import hashlib
import lzma
import os
import select
import shutil
import struct
import subprocess

import pytest

from xenvm.boundary.machine import Machine
from xenvm.boundary.messages import Hello
from xenvm.broker import firmware, kernels
from xenvm.broker.kernels import Cache, Kernel, boot_id
from xenvm.errors import XenvmError

UUID = "11111111-2222-4333-8444-555555555555"
INNER = b"\x7fELF" + b"a kernel, " * 300_000 + os.urandom(70_000)
LONG_AGO = 1_000_000_000
SIZE = len(INNER)
MACHINE = Machine(
    *(True, True, True, True, False, -1, -1, -1, 0, 0, "", "none", "", 0, -1, "", "", (), (), (), ()),
    smbios=False,
    oem_types=(),
    slic=False,
)


def zstd(data):
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def bz_image(payload, *, version=0x020F, claim=None, sectors=1):
    header = bytearray(0x400)
    header[0x1F1] = sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, version)
    struct.pack_into("<II", header, 0x248, 1040 - 512 * (sectors + 1), len(payload) if claim is None else claim)
    return bytes(header) + bytes(16) + payload + b"what follows"


def lzma_alone(data, **options):
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 6, **options}]
    return lzma.compress(data, lzma.FORMAT_ALONE, filters=filters)


def sized(packed, size=SIZE):
    return packed + struct.pack("<I", size)


@pytest.fixture
def place(users, tmp_path, monkeypatch):
    """A directory for the cache, and a clock on which every file is old."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(kernels, "DIRECTORY", str(directory))
    monkeypatch.setattr(kernels, "Cache", lambda: Cache(str(directory)))
    monkeypatch.setattr(kernels, "SETTLED_NS", -(2**62))
    monkeypatch.setattr(kernels, "FREE_BYTES", 0)
    before = len(os.listdir("/proc/self/fd"))
    yield directory
    assert len(os.listdir("/proc/self/fd")) == before


def write(tmp_path, data, name="vmlinuz"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("why", ["mode", "owner", "file system", "room"])
def test_what_cannot_be_believed_is_unpacked_into_memory(place, tmp_path, monkeypatch, why):
    """Numbers of a file that somebody else could have set are no name for it; and others need room on the disk."""
    path = write(tmp_path, bz_image(gzip.compress(INNER)))
    if why == "mode":
        path.chmod(0o664)
    elif why == "owner":
        os.chown(path, 65534, 0)
    elif why == "file system":
        monkeypatch.setattr(kernels, "HOST_PATHS", ("/proc",))
    else:
        monkeypatch.setattr(kernels, "FREE_BYTES", 2**62)
    kernel, workers = made(path)
    assert (os.pread(kernel.ready[0], len(INNER), 0), workers) == (INNER, 1)
    assert kernel.keep() is False
    kernel.close()
    assert [*place.iterdir()] == []


def turn(kernel, take):
    """Wait for the worker's greeting, and let `take` have its answer."""
    child = kernel.child
    while True:
        ready, _, _ = select.select([child.channel.fileno()], [], [], 60)
        assert ready
        received = child.channel.receive_now()
        if received is None:
            kernel.gone()
            return
        if isinstance(received[0], Hello):
            assert child.greets(received[0])
            continue
        take(received[0])
        return


def made(path):
    """Return the kernel made ready from a file, and how many workers that took."""
    kernel, workers = Kernel(os.open(path, os.O_RDONLY), UUID, 2), 0
    try:
        while kernel.child:
            workers += 1
            turn(kernel, kernel.take)
    except BaseException:
        kernel.close()
        raise
    return kernel, workers


def content(kernel):
    return os.pread(kernel.ready[0], 1 << 30, 0)


def kept(kernel):
    if kernel.keep():
        turn(kernel, kernel.kept)
    kernel.close()


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(lambda: bz_image(gzip.compress(INNER)), id="gzip"),
        pytest.param(lambda: bz_image(sized(lzma.compress(INNER))), id="xz"),
        pytest.param(lambda: bz_image(sized(lzma_alone(INNER))), id="lzma"),
        pytest.param(lambda: bz_image(sized(lzma_alone(INNER, dict_size=4096))), id="lzma of another window"),
        pytest.param(
            lambda: bz_image(gzip.compress(INNER), sectors=0), id="no sectors: that is where libxenguest looks"
        ),
        pytest.param(lambda: bz_image(sized(bz2.compress(INNER))), id="bzip2"),
        pytest.param(lambda: bz_image(sized(zstd(INNER))), id="zstd"),
        pytest.param(lambda: gzip.compress(INNER), id="a file packed by gzip"),
    ],
)
def test_each_compression(place, tmp_path, image):
    kernel, workers = made(write(tmp_path, image()))
    assert (content(kernel), workers) == (INNER, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(kernel.ready[0], b"x")
    kept(kernel)
    (entry,) = place.iterdir()
    assert entry.read_bytes() == INNER
    assert entry.name.split("-")[1:] == [hashlib.sha256(INNER).hexdigest(), boot_id()]
    assert (entry.stat().st_mode & 0o7777, entry.stat().st_uid) == (0o400, os.geteuid())
    kernel, workers = made(tmp_path / "vmlinuz")
    assert (content(kernel), workers, kernel.keep()) == (INNER, 0, False)
    kernel.close()


@pytest.mark.parametrize("image", [INNER, b"no kernel"])
def test_what_is_not_packed_is_handed_over_as_it_is(place, tmp_path, image):
    kernel, workers = made(write(tmp_path, image))
    assert content(kernel) == image
    assert workers == (image != INNER)
    assert not kernel.keep()
    kernel.close()
    assert [*place.iterdir()] == []


TWICE = "is no plain ELF file"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        pytest.param(lambda: gzip.compress(gzip.compress(INNER)), TWICE, id="gzip twice"),
        pytest.param(lambda: gzip.compress(bz_image(sized(lzma.compress(INNER)))), TWICE, id="a bzImage in gzip"),
        pytest.param(lambda: bz_image(sized(lzma.compress(bz_image(gzip.compress(INNER))))), TWICE, id="in a bzImage"),
        pytest.param(lambda: bz_image(sized(zstd(b"no kernel"), 9)), TWICE, id="something else"),
        pytest.param(lambda: gzip.compress(INNER[:0x202] + b"HdrS" + INNER), TWICE, id="ELF and bzImage at once"),
        pytest.param(lambda: bz_image(b"\x02\x21\x4c\x18 lz4"), "packed by lz4, which is not unpacked", id="lz4"),
        pytest.param(lambda: bz_image(b"\x89LZO\0\r\n\x1a\n"), "packed by lzo, which is not unpacked", id="lzo"),
        pytest.param(lambda: bz_image(b"something"), "packed in an unknown way", id="unknown"),
        pytest.param(lambda: bz_image(gzip.compress(INNER), version=0x0207), "2.7 of the boot protocol", id="old"),
    ],
)
def test_what_libxenguest_would_unpack_never_gets_there(place, tmp_path, image, words):
    """It would do so beside the hypervisor."""
    with pytest.raises(XenvmError, match=words) as caught:
        made(write(tmp_path, image()))
    assert caught.value.message.startswith("kernel: ")
    assert [*place.iterdir()] == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (lambda: bz_image(gzip.compress(INNER), claim=1 << 30), "ends before its payload"),
        (lambda: bz_image(gzip.compress(INNER)[:-3000]), "damaged"),
        (lambda: bz_image(sized(lzma.compress(INNER)[:-3000])), "damaged"),
        (lambda: bz_image(sized(lzma.compress(INNER)[:500] + b"\0" * 5000)), "damaged"),
        (lambda: bz_image(sized(bz2.compress(INNER)[:-50])), "damaged"),
        (lambda: bz_image(sized(zstd(INNER)[:-50])), "damaged"),
        (lambda: bz_image(sized(zstd(INNER), 1 << 31)), "damaged"),
        (lambda: bz_image(sized(zstd(INNER), 5000)), "damaged"),
        (lambda: b"", "0 bytes"),
    ],
)
def test_a_damaged_image_is_refused_and_leaves_nothing(place, tmp_path, image, words):
    with pytest.raises(XenvmError, match=words) as caught:
        made(write(tmp_path, image()))
    assert caught.value.message.startswith("kernel: ")
    assert [*place.iterdir()] == []


def test_a_bomb_is_refused(place, tmp_path):
    bomb = zstd(b"\0" * (1 << 20)) * 1100
    with pytest.raises(XenvmError, match="damaged|died"):
        made(write(tmp_path, bz_image(sized(bomb, 1 << 30))))
    assert [*place.iterdir()] == []


def test_a_changed_file_is_another_kernel(place, tmp_path):
    path = write(tmp_path, bz_image(gzip.compress(INNER)))
    kept(made(path)[0])
    other = b"\x7fELF, another"
    path.write_bytes(bz_image(gzip.compress(other)))
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    kernel, workers = made(path)
    assert (content(kernel), workers) == (other, 1)
    kept(kernel)
    assert len([*place.iterdir()]) == 2


def test_a_young_file_is_not_kept(place, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SETTLED_NS", 10**12)
    kernel, _ = made(write(tmp_path, bz_image(gzip.compress(INNER))))
    assert not kernel.keep()
    kernel.close()
    assert [*place.iterdir()] == []


def test_an_entry_of_an_earlier_boot_is_summed_first(place, tmp_path):
    path = write(tmp_path, bz_image(gzip.compress(INNER)))
    kept(made(path)[0])
    (entry,) = place.iterdir()
    words = entry.name.split("-")
    entry.rename(place / "-".join((*words[:2], "0" * 32)))
    kernel, workers = made(path)
    assert (content(kernel), workers, kernel.keep()) == (INNER, 1, False)
    kernel.close()
    assert [one.name for one in place.iterdir()] == [entry.name]


def test_a_damaged_entry_of_an_earlier_boot_is_made_again(place, tmp_path):
    path = write(tmp_path, bz_image(gzip.compress(INNER)))
    kept(made(path)[0])
    (entry,) = place.iterdir()
    words = entry.name.split("-")
    entry.unlink()
    entry = place / "-".join((*words[:2], "0" * 32))
    entry.write_bytes(INNER[:-1] + b"?")
    entry.chmod(0o400)
    kernel, workers = made(path)
    assert (content(kernel), workers) == (INNER, 2)
    kept(kernel)
    assert [one.name for one in place.iterdir()] == ["-".join((*words[:2], boot_id()))]


@pytest.mark.parametrize("harm", ["mode", "owner", "link", "symlink", "empty"])
def test_what_is_no_entry_of_ours_is_removed(place, tmp_path, harm):
    path = write(tmp_path, bz_image(gzip.compress(INNER)))
    kept(made(path)[0])
    (entry,) = place.iterdir()
    if harm == "mode":
        entry.chmod(0o644)
    elif harm == "owner":
        os.chown(entry, 12345, 0)
    elif harm == "link":
        os.link(entry, tmp_path / "second")
    else:
        entry.unlink()
        entry.symlink_to(path) if harm == "symlink" else entry.touch(0o400)
    kernel, workers = made(path)
    assert (content(kernel), workers) == (INNER, 1)
    kept(kernel)
    assert made_again(path) == 0


def made_again(path):
    kernel, workers = made(path)
    kernel.close()
    return workers


@pytest.mark.parametrize("harm", ["missing", "writable", "another's", "a file"])
def test_without_a_cache_the_start_works(place, tmp_path, harm):
    if harm == "missing":
        place.rmdir()
    elif harm == "writable":
        place.chmod(0o770)
    elif harm == "another's":
        os.chown(place, 12345, 0)
    else:
        place.rmdir()
        place.touch()
    path = write(tmp_path, bz_image(gzip.compress(INNER)))
    kernel, workers = made(path)
    assert (content(kernel), workers, kernel.keep()) == (INNER, 1, False)
    kernel.close()


@pytest.mark.parametrize("packed", [gzip.compress, lambda data: sized(zstd(data))])
def test_a_full_disk(place, tmp_path, packed):
    shutil.rmtree(place)
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "full", place], check=True)
    try:
        kernel, workers = made(write(tmp_path, bz_image(packed(INNER))))
        assert (content(kernel), workers, kernel.keep()) == (INNER, 2, False)
        kernel.close()
        assert [*place.iterdir()] == []
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_oldest_entries_go(place, tmp_path):
    for number in range(kernels.ENTRIES_LIMIT + 1):
        kept(made(write(tmp_path, gzip.compress(b"\x7fELF %d" % number), f"kernel-{number}"))[0])
        for entry in place.iterdir():
            os.utime(entry, ns=(0, entry.stat().st_mtime_ns - 10**9))
    assert len([*place.iterdir()]) == kernels.ENTRIES_LIMIT
    assert b"\x7fELF 0" not in [entry.read_bytes() for entry in place.iterdir()]


def test_a_worker_that_dies(place, tmp_path):
    """Once, and it is tried again in memory; twice, and the start fails."""
    kernel = Kernel(os.open(write(tmp_path, bz_image(gzip.compress(INNER))), os.O_RDONLY), UUID, 2)
    os.kill(kernel.child.pid, 9)
    turn(kernel, kernel.take)
    os.kill(kernel.child.pid, 9)
    with pytest.raises(XenvmError, match="unpacker worker died of SIGKILL without an answer"):
        turn(kernel, kernel.take)
    kernel.close()
    kernel.close()
    assert [*place.iterdir()] == []


def test_two_at_once(place, tmp_path):
    path = write(tmp_path, bz_image(gzip.compress(INNER)))
    first, second = made(path)[0], made(path)[0]
    kept(first)
    kept(second)
    assert len([*place.iterdir()]) == 1


def test_the_hosts_tables_are_picked_by_a_worker(users, tmp_path, monkeypatch):
    """And a host without them is an error that names the key."""
    table, licence = tmp_path / "DMI", tmp_path / "SLIC"
    table.write_bytes(b"\x01\x04\x00\x00QEMU\0\0" + b"\x7f\x04\x00\x00\0\0")
    body = bytearray(b"SLIC" + struct.pack("<I", 40) + bytes(28) + b"key!")
    body[9] = -sum(body) % 256
    licence.write_bytes(body)
    monkeypatch.setattr(firmware, "SMBIOS", str(table))
    monkeypatch.setattr(firmware, "ACPI", (str(licence), str(tmp_path / "MSDM")))
    machine = MACHINE.but(smbios=True, slic=True)
    images = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
    made = firmware.Firmware(images, machine, "test", 2)
    while made.child:
        message, _ = made.child.channel.receive(deadline_s=60)
        if not isinstance(message, Hello):
            made.take(message)
    assert [os.pread(one, 1000, 0) for one in made.ready[2:]] == [
        struct.pack("<I", 10) + table.read_bytes()[:10],
        licence.read_bytes(),
    ]
    made.close()
    licence.unlink()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(XenvmError, match="acpi-pt: this host has no such table: .*SLIC or .*MSDM"):
        firmware.Firmware([], MACHINE.but(slic=True), "test", 2)
    assert len(os.listdir("/proc/self/fd")) == len(before)

    def full(_name, _flags):
        raise OSError(24, "Too many open files")

    licence.write_bytes(body)
    monkeypatch.setattr(firmware.os, "memfd_create", full)
    with pytest.raises(XenvmError, match="firmware: Too many open files"):
        firmware.Firmware([], MACHINE.but(slic=True), "test", 2)
    assert len(os.listdir("/proc/self/fd")) == len(before)
