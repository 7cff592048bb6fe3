# SPDX-License-Identifier: GPL-2.0-or-later
"""Compressed kernel images: found in a bzImage or a gzip file, and decompressed from one descriptor to another.

Whatever is in an image, the process that runs this has nothing to lose but these two descriptors. Places and meaning of
the fields: Linux Documentation/arch/x86/boot.rst (setup_sects, header, version, payload_offset, payload_length). Which
part of an image is the kernel is read as libxenguest does (xg_dom_bzimageloader.c).
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import os
import struct
import zlib

from xenvm._unpack import ffi, lib
from xenvm.errors import XenvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Final

IMAGE_LIMIT_BYTES: Final = 1 << 30  # of a kernel, compressed or not; what libxenguest takes too
CHUNK_BYTES: Final = 1 << 20
MEMORY_LIMIT_BYTES: Final = 256 << 20  # for the dictionary of an xz stream
HEADER_BYTES: Final = 0x250
SIZE_BYTES: Final = 4  # the unpacked size, which the kernel's build appends to every payload but gzip's own trailer
VERSION_WITH_PAYLOAD: Final = 0x0208
ELF: Final = b"\x7fELF"
MAGIC_AT: Final = 0x202
MAGIC: Final = b"HdrS"
LEFT_PACKED: Final = {b"\x02\x21": "lz4", b"\x89LZO": "lzo"}


def payload(image: memoryview) -> memoryview | None:
    """Return the compressed kernel in a bzImage; None when this is none, XenvmError when its numbers make no sense."""
    if len(image) < HEADER_BYTES or bytes(image[MAGIC_AT : MAGIC_AT + len(MAGIC)]) != MAGIC:
        return None
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < VERSION_WITH_PAYLOAD:
        raise XenvmError(f"the kernel has version {version >> 8}.{version & 255} of the boot protocol, Xen needs 2.8")
    start, length = struct.unpack_from("<II", image, 0x248)
    start += (image[0x1F1] + 1) * 512
    if length < 2 * SIZE_BYTES or start + length > len(image):
        raise XenvmError("the image ends before its payload does", hint="is the file whole?")
    return image[start : start + length]


def unpack(source: int, output: int) -> int:
    """Write the ELF file in `source` to `output` and return its size; 0 when `source` is nothing that is compressed.

    Raise XenvmError for one that is damaged or too large, compressed in another way, or not an ELF file inside.
    """
    size = os.fstat(source).st_size
    if not 0 < size <= IMAGE_LIMIT_BYTES:
        raise XenvmError(f"the image has {size} bytes", hint=f"from 1 to {IMAGE_LIMIT_BYTES} are accepted")
    image = memoryview(mmap.mmap(source, size, mmap.MAP_PRIVATE, mmap.PROT_READ))
    inner = payload(image)
    packed = image if inner is None else inner
    kind = next((magic for magic in _UNPACKERS if bytes(packed[: len(magic)]) == magic), b"")
    if inner is None and kind != GZIP:  # of whole files libxenguest knows gzip alone
        return 0
    if not kind:
        raise _unknown(packed)
    announced = 0
    if kind != GZIP:
        (announced,) = struct.unpack("<I", packed[-SIZE_BYTES:])
        packed = packed[:-SIZE_BYTES]
    try:
        unpacked_bytes = _UNPACKERS[kind](packed, announced, output)
        head = os.pread(output, MAGIC_AT + len(MAGIC), 0)
    except (lzma.LZMAError, zlib.error, ValueError, EOFError) as error:
        raise XenvmError(f"the image is damaged: {error}") from error
    except OSError as error:
        raise XenvmError(f"the unpacked image cannot be written: {error.strerror or error}") from error
    if not head.startswith(ELF) or head[MAGIC_AT:] == MAGIC:
        raise XenvmError("what is packed in the image is no plain ELF file", hint="a kernel is packed once")
    return unpacked_bytes


def _unknown(packed: memoryview) -> XenvmError:
    how = next((name for magic, name in LEFT_PACKED.items() if bytes(packed[: len(magic)]) == magic), "")
    if bytes(packed[: len(ZSTD)]) == ZSTD:
        return XenvmError("the kernel is packed by zstd, which this host cannot unpack", hint="apt install libzstd1")
    return XenvmError(
        f"the kernel is packed by {how}, which is not unpacked here"
        if how
        else "the kernel is packed in an unknown way",
        hint="name one that is packed by gzip, xz, lzma, bzip2 or zstd, as Debian's are, or one that is not packed: "
        "scripts/extract-vmlinux of Linux gets it out",
    )


def _write(pieces: Iterator[bytes], output: int) -> int:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > IMAGE_LIMIT_BYTES:
            raise XenvmError(f"the image unpacks to more than {IMAGE_LIMIT_BYTES} bytes")
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(output, rest) :]
    return size


def _gunzip(packed: memoryview, _announced: int, output: int) -> int:
    def pieces() -> Iterator[bytes]:
        stream, rest = zlib.decompressobj(16 + zlib.MAX_WBITS), bytes(packed)
        while not stream.eof:
            piece = stream.decompress(rest, CHUNK_BYTES)
            rest = stream.unconsumed_tail
            if not piece and not rest and not stream.eof:
                raise EOFError("it ends too early")
            yield piece

    return _write(pieces(), output)


def _streamed(stream: lzma.LZMADecompressor | bz2.BZ2Decompressor, packed: memoryview, output: int) -> int:
    def pieces() -> Iterator[bytes]:
        rest = bytes(packed)
        while not stream.eof:
            piece = stream.decompress(rest, CHUNK_BYTES)
            rest = b""
            if not piece and stream.needs_input and not stream.eof:
                raise EOFError("it ends too early")
            yield piece

    return _write(pieces(), output)


def _unxz(packed: memoryview, _announced: int, output: int) -> int:
    return _streamed(lzma.LZMADecompressor(memlimit=MEMORY_LIMIT_BYTES), packed, output)


def _bunzip(packed: memoryview, _announced: int, output: int) -> int:
    return _streamed(bz2.BZ2Decompressor(), packed, output)


def _unzstd(packed: memoryview, announced: int, output: int) -> int:
    """One call decompresses all: into the output itself, which is made as large as was announced."""
    if not 0 < announced <= IMAGE_LIMIT_BYTES:
        raise ValueError(f"it claims to unpack to {announced} bytes")
    os.ftruncate(output, announced)
    with mmap.mmap(output, announced) as room:
        size: int = lib.xenvm_zstd(
            ffi.from_buffer(room, require_writable=True), announced, ffi.from_buffer(packed), len(packed)
        )
    if size != announced:
        raise ValueError("zstd cannot read it, or it has another size than it says")
    return size


GZIP: Final = b"\x1f\x8b"
ZSTD: Final = b"\x28\xb5\x2f\xfd"
# The first bytes, by which libxenguest tells them apart too.
_UNPACKERS: Final[dict[bytes, Callable[[memoryview, int, int], int]]] = {
    GZIP: _gunzip,
    b"\xfd7zXZ": _unxz,
    b"\x5d\x00": _unxz,  # the older lzma format
    b"BZh": _bunzip,
    ZSTD: _unzstd,
}


def prepare() -> None:
    """Load what is not loaded yet, while the process still may; without libzstd its images are refused."""
    if lib.xenvm_zstd_load():
        del _UNPACKERS[ZSTD]
