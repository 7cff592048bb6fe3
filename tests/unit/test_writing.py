# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images: written through a pipe, with holes or compressed, unpacked on the way back; what is refused of them."""

import contextlib
import errno
import json
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import zlib

import pytest
from saveimages import PAGE, config, image, libxc, pages, parts

from xenvm import jsontext
from xenvm.boundary.frames import Channel
from xenvm.boundary.images import Image, Room, Write, Writing, Written
from xenvm.errors import ExitCode, ProtocolError, WrongStateError, XenvmError
from xenvm.helpers import imagefile, saved
from xenvm.helpers.stream import main as stream
from xenvm.helpers.stream import source, writing, zstd

MEMORY_KIB = 131072
MANY = {f"more{number}": pages(list(range(1024)), [PAGE, bytes(4096)] * 512) for number in range(8)}


@pytest.fixture(autouse=True)
def _library():
    zstd.load()


def large():
    made = parts()
    return libxc(
        {**{name: made[name] for name in list(made)[:6]}, **MANY, **{name: made[name] for name in list(made)[6:]}}
    )


def unsealed(stream=None):
    """An image as a builder writes it, before there is a seal."""
    text = jsontext.dumps(config()).encode()[:-1] + b"," + saved.UNSEALED + b"}"
    return image(stream, text=text)


def packed(content, limit_bytes=1 << 30, compression="zstd"):
    """Return what comes of it."""
    readable, writable = os.pipe()

    def write():
        with contextlib.suppress(BrokenPipeError), os.fdopen(writable, "wb", buffering=0) as pipe:
            pipe.write(content)

    with tempfile.TemporaryFile() as file:
        writer = threading.Thread(target=write)
        writer.start()
        try:
            length = writing.write(readable, file.fileno(), writing.prepare(file.fileno(), compression), limit_bytes)
        finally:
            os.close(readable)
            writer.join()
        file.seek(0)
        whole = file.read()
    assert length == len(whole)
    return whole


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_more_than_anybody_would_unpack_is_not_written(compression):
    """A guest that writes to all of its memory while it is saved live: it runs on."""
    content = unsealed()
    assert packed(content, len(content), compression)
    with pytest.raises(XenvmError, match="more than 0 MiB: too much"):
        packed(content, len(content) - 1, compression)


def unpacked(content):
    """Return what the program zstd makes of it."""
    if not shutil.which("zstd"):
        pytest.fail("the tests need the program zstd")
    return subprocess.run(["zstd", "-d", "-q"], input=content, capture_output=True, check=True, timeout=60).stdout


def frame(content, level=1, *options):
    """Return what the program zstd makes of it."""
    words = ["zstd", "-q", f"-{level}", *options]
    return subprocess.run(words, input=content, capture_output=True, check=True, timeout=60).stdout


def inspect(content, memory_kib=MEMORY_KIB):
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return stream.inspect(file.fileno(), memory_kib)


def fed(content):
    readable, writable = os.pipe()
    got = []

    def read():
        with os.fdopen(readable, "rb") as pipe:
            got.append(pipe.read())

    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        told, at = stream.inspect(file.fileno(), MEMORY_KIB)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            stream.feed(file.fileno(), writable, at, told)
        finally:
            os.close(writable)
            reader.join()
    return got[0]


@pytest.mark.parametrize("stream_of", [libxc, large])
def test_what_is_packed_unpacks_to_a_sealed_image_and_is_read_as_that(stream_of):
    whole = packed(unsealed(stream_of()))
    plain = unpacked(whole)
    at = plain.index(b"LibxlFmt")
    assert plain.replace(saved.seal(len(plain), zlib.crc32(plain[at:])), saved.UNSEALED) == unsealed(stream_of())
    assert inspect(plain)[0] == inspect(whole)[0] == Image(MEMORY_KIB, 1, 4, 17, "")
    assert fed(whole) == stream_of()
    assert len(whole) < len(plain)


@pytest.mark.parametrize("size", [1, 1000, 128 << 10, (128 << 10) + 1, 300000, 1 << 20])
def test_the_frame_of_the_head_shows_it_as_it_is(size):
    content = os.urandom(size)
    at = max(0, size - 80)
    made, place = zstd.raw_frame(content, at, min(78, size))
    assert unpacked(made) == content
    assert made[place : place + min(78, size)] == content[at : at + min(78, size)]


@pytest.mark.parametrize("options", [(1,), (19,), (3, "--no-check"), (1, "--long=23")])
def test_what_the_program_has_compressed_is_read(options):
    assert fed(frame(image(large(), sealed=True), *options)) == large()
    two = image(large(), sealed=True)
    assert fed(frame(two[:5000]) + frame(two[5000:])) == large()


def refusal(content, memory_kib=MEMORY_KIB):
    with pytest.raises(XenvmError) as caught:
        inspect(content, memory_kib)
    assert caught.value.message.isprintable()
    return caught.value.message


def test_cut_off_or_damaged():
    whole = packed(unsealed(large()))
    for length in (4, 5, 100, len(whole) // 2, len(whole) - 1):
        assert refusal(whole[:length]) == f"the compressed image ends after {length} bytes: it is cut off"
    for at in range(600, len(whole), len(whole) // 50):
        changed = bytearray(whole)
        changed[at] ^= 0x55
        assert refusal(bytes(changed))
    assert "zstd cannot read it" in refusal(whole + b"x" * 20)
    assert "follows the end" in refusal(whole + frame(b"more"))
    never = frame(unsealed())
    assert "never finished" in refusal(never)


def test_a_small_file_that_unpacks_without_end_is_given_up_soon():
    bomb = pages(list(range(1024)), [bytes(4096)] * 1024)
    head = image(large())
    end = head.index(pages([7], [PAGE]))
    content = frame(head[:end]) + frame(bomb * 16) * 40
    assert len(content) < 2 << 20
    before = peak_kib()
    words = refusal(content)
    assert f"unpacks to more than {stream.limit_bytes(MEMORY_KIB) >> 20} MiB" in words
    assert peak_kib() - before < 64 << 10


def test_of_what_does_not_begin_as_an_image_no_more_is_unpacked():
    content = frame(bytes(64 << 20)) * 16
    before = peak_kib()
    assert "no save image" in refusal(content)
    assert peak_kib() - before < 32 << 10


def peak_kib():
    import resource  # noqa: PLC0415

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_window_that_would_take_much_memory_is_refused():
    # a frame by hand: a window of 2 GiB, a raw block
    content = image()
    window = zstd.MAGIC + b"\x00" + bytes([21 << 3]) + (len(content) << 3 | 1).to_bytes(3, "little") + content
    assert "zstd cannot read it" in refusal(window)


def test_the_image_of_a_guest_of_another_size_is_not_unpacked():
    with pytest.raises(WrongStateError) as caught:
        inspect(packed(unsealed()), MEMORY_KIB * 2)
    assert "128 MiB of memory, this VM has 256 MiB" in caught.value.message
    assert caught.value.code is ExitCode.WRONG_STATE


@pytest.mark.parametrize("larger_kib", [0, 1024])
def test_a_guest_that_is_larger_than_a_newer_config_may_have_an_image_of_its_own_size(monkeypatch, larger_kib):
    monkeypatch.setattr(stream, "SLACK_BYTES", 0)
    content = unsealed() + bytes(1 << 20)
    channel, broker = Channel.pair()
    readable, writable = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(writable, "wb", buffering=0).write(content))
    with tempfile.TemporaryFile() as file, contextlib.closing(channel), contextlib.closing(broker):
        broker.send(Room(4 + larger_kib))
        writer.start()
        try:
            if larger_kib:
                assert stream.write(channel, Write(4, "none"), file.fileno(), readable) == 0
                assert [broker.receive(deadline_s=5)[0] for _ in "ab"] == [Writing(), Written(len(content))]
            else:
                with pytest.raises(XenvmError, match="too much for this guest"):
                    stream.write(channel, Write(4, "none"), file.fileno(), readable)
        finally:
            while os.read(readable, 65536):
                pass
            writer.join()
            os.close(readable)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_builder_that_ends_early_leaves_nothing_that_is_taken_for_whole(compression):
    with pytest.raises(ProtocolError):
        packed(unsealed()[:40], compression=compression)
    assert "ends after" in refusal(packed(unsealed()[:-20], compression=compression))
    with pytest.raises(ProtocolError, match="without a seal"):
        packed(image(text=b"x" * 200), compression=compression)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_file_that_comes_with_another_place_is_written_from_its_beginning(compression):
    with tempfile.TemporaryFile() as file:
        os.lseek(file.fileno(), 8192, os.SEEK_SET)
        readable, writable = os.pipe()
        os.write(writable, unsealed())
        os.close(writable)
        writing.write(readable, file.fileno(), writing.prepare(file.fileno(), compression), 1 << 30)
        os.close(readable)
        assert stream.inspect(file.fileno(), MEMORY_KIB)[0] == Image(MEMORY_KIB, 1, 4, 17, "")


def test_without_the_library_it_is_said_which_package_is_missing(monkeypatch):
    monkeypatch.setattr(zstd._Loaded, "library", False)
    with tempfile.TemporaryFile() as file, pytest.raises(XenvmError) as caught:
        writing.prepare(file.fileno(), "zstd")
    assert "libzstd1" in caught.value.hint
    assert "libzstd.so.1" in refusal(frame(image()))


@pytest.mark.parametrize(("compression", "share"), [("none", 1), ("zstd", 4)])
def test_without_room_nothing_is_begun(compression, share):
    with tempfile.TemporaryFile() as file:
        form, status = writing.prepare(file.fileno(), compression), os.fstatvfs(file.fileno())
        free_kib = status.f_bavail * status.f_frsize >> 10
        writing.check_space(file.fileno(), form, (free_kib - (64 << 10)) * share)
        with pytest.raises(XenvmError, match="are free"):
            writing.check_space(file.fileno(), form, (free_kib + (64 << 10)) * share)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(
    ("step", "number", "hint"),
    [("pwrite", errno.ENOSPC, "make room"), ("pwrite", errno.EIO, ""), ("fsync", errno.EIO, "")],
)
def test_a_disk_that_takes_no_more_is_told(monkeypatch, compression, step, number, hint):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(XenvmError) as caught:
        packed(unsealed(large()), compression=compression)
    assert caught.value.message == f"writing the image: {os.strerror(number)}"
    assert caught.value.hint.startswith(hint)


# As it is, with holes


def blocks(content, piece_bytes=1 << 20):
    """Return what becomes of an image written as it is, and how many bytes of the disk it takes."""
    readable, writable = os.pipe()

    def write():
        with os.fdopen(writable, "wb", buffering=0) as pipe:
            for at in range(0, len(content), piece_bytes):
                pipe.write(content[at : at + piece_bytes])

    with tempfile.TemporaryFile() as file:
        writer = threading.Thread(target=write)
        writer.start()
        length = writing.write(readable, file.fileno(), writing.prepare(file.fileno(), "none"), 1 << 40)
        writer.join()
        os.close(readable)
        file.seek(0)
        whole = file.read()
        assert length == len(whole)
        return whole, os.fstat(file.fileno()).st_blocks * 512


@pytest.mark.parametrize("piece_bytes", [1 << 20, 65536, 4099])
def test_what_is_written_as_it_is_is_the_same_but_for_the_seal(piece_bytes):
    content = unsealed(large())
    whole, _ = blocks(content, piece_bytes)
    at = whole.index(b"LibxlFmt")
    seal = saved.seal(len(whole), zlib.crc32(whole[at:]))
    assert whole.replace(seal, saved.UNSEALED) == content
    assert inspect(whole)[0] == Image(MEMORY_KIB, 1, 4, 17, "")


@pytest.mark.parametrize("tail", [b"", b"x", bytes(4096), bytes(5000), b"x" + bytes(3 << 20), bytes(3 << 20) + b"x"])
@pytest.mark.parametrize("zeros", [0, 4095, 8191, (1 << 20) - 1, 5 << 20])
def test_whole_pages_of_the_file_that_are_zero_take_no_room(zeros, tail):
    begin = unsealed()
    streams_at = begin.index(b"LibxlFmt")
    data = os.urandom(1 << 20)
    content = begin[:streams_at] + data + bytes(zeros) + data + tail
    whole, used = blocks(content)
    assert whole[streams_at:] == content[streams_at:]
    pages = [whole[at : at + 4096] for at in range(0, len(whole), 4096)]
    full = sum(any(page) or len(page) < 4096 for page in pages)
    assert used <= (full + 4) * 4096  # and a block or two in which the file system notes where they are


def test_the_seal_takes_the_place_of_the_empty_one_though_a_name_looks_like_it():
    text = jsontext.dumps(config(name=saved.UNSEALED.decode())).encode()[:-1] + b"," + saved.UNSEALED + b"}"
    content = image(text=text)
    whole, _ = blocks(content)
    (length,) = struct.unpack_from("<I", whole, 48)
    told = json.loads(whole[52 : 52 + length - 1])
    assert told["xenvm"] == {"bytes": f"{len(whole):016x}", "crc32": f"{zlib.crc32(whole[52 + length :]):08x}"}
    assert told["name"] == saved.UNSEALED.decode()


def test_a_disk_that_is_full():
    full = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(XenvmError) as caught:
            imagefile.write(full, b"x")
    finally:
        os.close(full)
    assert "No space left" in caught.value.message
    assert "make room" in caught.value.hint


def test_reading_backwards_is_refused():
    with tempfile.TemporaryFile() as file:
        file.write(frame(bytes(64 << 20)))
        file.flush()
        found = source.of(file.fileno())
        found.limit_bytes = 1 << 30
        assert found.read(10, 40 << 20) == bytes(10)
        with pytest.raises(XenvmError, match="backwards"):
            found.read(10, 0)
