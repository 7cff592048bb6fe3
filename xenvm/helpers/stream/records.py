# SPDX-License-Identifier: GPL-2.0-or-later
"""A save image taken apart and checked, piece by piece. Reads through a function; no other input or output.

The form is that of docs/specs/libxl-migration-stream.pandoc and docs/specs/libxc-migration-stream.pandoc of Xen. What
is not understood is refused: libxenguest gets what has been checked, and nothing else.
"""

from __future__ import annotations

import struct

from xenvm import forms, jsontext
from xenvm.boundary.machine import STATE_LIMIT_BYTES
from xenvm.errors import XenvmError
from xenvm.helpers import saved
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Final

    Read = Callable[[int, int], bytes]  # length, offset; shorter only at the end of the file
    Piece = bytes | tuple[int, int]  # what has been read, or a range of the file: offset, length

CONFIG_LIMIT_BYTES: Final = 1 << 20  # xl's is some KiB
BODY_LIMIT_BYTES: Final = 16 << 20  # of records other than pages; 8 bytes for each 2 MiB of the guest are the largest
LIBXC: Final = struct.Struct(">QIIHHI")  # marker, identification, version, options, reserved
LIBXC_MARKER, LIBXC_IDENT, LIBXC_VERSION = 0xFFFFFFFFFFFFFFFF, 0x58454E46, 3
DOMAIN: Final = struct.Struct("<IHHII")  # type, page shift, reserved, Xen's version
PV, HVM = 1, 2
TYPES: Final = {False: "pv", True: "hvm"}
PAGE_SHIFT, PAGE_BYTES = 12, 4096
PAGES: Final = struct.Struct("<II")  # count, reserved; then the numbers of the page frames
PAGES_LIMIT: Final = 1024  # MAX_BATCH_SIZE, xg_sr_common.h
TYPE_SHIFT, FRAME_MASK = 60, (1 << 52) - 1
WITHOUT_DATA: Final = frozenset({13, 14, 15})  # XEN_DOMCTL_PFINFO_BROKEN, _XALLOC, _XTAB
WITH_DATA: Final = frozenset({*range(5), *range(9, 13)})  # no page table, a table of level 1 to 4; the same, pinned
OPTIONAL: Final = 1 << 31
PARAMS_HEAD_BYTES, PARAM_BYTES = 8, 16  # of a record of parameters: their count; index and value of each
CHUNK_BYTES: Final = 1 << 20
FRAMES_SLACK: Final = 1 << 23  # above a guest's memory, 32 GiB: what it maps may have numbers of its own there

# Types of records, xg_sr_stream_format.h, and how long each is: at least, at most, in steps of.
END, PAGE_DATA, PV_INFO, P2M_FRAMES, VCPU_BASIC, VCPU_EXTENDED, VCPU_XSAVE, SHARED_INFO, TSC_INFO = range(9)
HVM_CONTEXT, HVM_PARAMS = 9, 0xA
VCPU_MSRS, STATIC_DATA_END, CPUID_POLICY, MSR_POLICY = 0xC, 0x10, 0x11, 0x12
LENGTHS: Final = {
    END: (0, 0, 1),
    PV_INFO: (8, 8, 1),
    P2M_FRAMES: (16, BODY_LIMIT_BYTES, 8),
    VCPU_BASIC: (16, 16384, 1),
    VCPU_EXTENDED: (16, 4096, 1),
    VCPU_XSAVE: (8, 1 << 20, 1),
    SHARED_INFO: (4096, 4096, 1),
    TSC_INFO: (24, 24, 1),
    HVM_CONTEXT: (8, BODY_LIMIT_BYTES, 1),
    HVM_PARAMS: (8, 8 + 16 * 4096, 8),
    VCPU_MSRS: (8, 65536, 1),
    STATIC_DATA_END: (0, 0, 1),
    CPUID_POLICY: (24, 24 * 4096, 24),
    MSR_POLICY: (16, 16 * 4096, 16),
}
OF_A_VCPU: Final = frozenset({VCPU_BASIC, VCPU_EXTENDED, VCPU_XSAVE, VCPU_MSRS})
OF_BOTH: Final = {
    CPUID_POLICY: "the processor's features (Xen 4.14 and later write them)",
    STATIC_DATA_END: "the end of the static data",
    PAGE_DATA: "memory",
}
OF_PV: Final = {
    PV_INFO: "the guest's kind",
    P2M_FRAMES: "the map of the memory",
    SHARED_INFO: "the shared info page",
    VCPU_BASIC: "the state of a vcpu",
}
OF_HVM: Final = {HVM_CONTEXT: "the state of the machine", HVM_PARAMS: "the parameters of the machine"}
STRANGE: Final = {True: {*OF_PV, *OF_A_VCPU}, False: {*OF_HVM}}  # what the other type has
HVM_PAGES: Final = frozenset({0, *WITHOUT_DATA})
FRAMES_BELOW_4G: Final = 1 << 20  # of an HVM guest: what is not memory is there
QEMU_MAGIC: Final = b"QEVM"


class ImageError(XenvmError):
    """The file is not an image that can be restored here."""


class Facts(Record):
    """What an image says of its guest. `stream_at` is where the stream of libxenguest begins.

    `uuid` is "" when the image names none. `sealed_bytes` is -1 when xenvm did not write it; `checksum` is then
    meaningless.
    """

    memory_max_kib: int
    vcpus: int
    uuid: str
    streams_at: int
    stream_at: int
    sealed_bytes: int
    checksum: int


class Guest:
    """What the stream says while it is walked through, of a guest of such a size.

    Only the vcpus that were online have a state in it; vcpu 0 always has, since restoring begins with it. `end_at` is
    where the stream has ended.
    """

    def __init__(self, memory_max_kib: int, vcpus_limit: int, *, hvm: bool = False) -> None:
        self.hvm = hvm
        self.frames_limit = memory_max_kib * 1024 // PAGE_BYTES + (FRAMES_BELOW_4G if hvm else FRAMES_SLACK)
        self.end_at = 0
        self.vcpus_limit = vcpus_limit
        self.xen_major = self.xen_minor = 0
        self.vcpus: set[int] = set()
        self.seen: set[int] = set()
        self.last_frame = self.frames_limit - 1 if hvm else -1


def facts(read: Read, size: int, *, hvm: bool = False) -> Facts:
    """Check what stands before the stream of libxenguest; ImageError says what is wrong."""
    magic = read(len(saved.MAGIC), 0)
    if magic != saved.MAGIC:
        raise _foreign(magic, size)
    at = len(saved.MAGIC)
    order, mandatory, _optional, length = saved.HEADER.unpack(_exact(read, saved.HEADER.size, at))
    at += saved.HEADER.size
    if order != saved.BYTE_ORDER:
        raise ImageError("the image was written by a machine of another byte order")
    if mandatory != saved.JSON_CONFIG | saved.STREAM_V2:
        raise ImageError(
            f"the image has the mandatory flags {mandatory:#x}, known are {saved.JSON_CONFIG | saved.STREAM_V2:#x}",
            hint="it is of a Xen before 4.6, or of a newer one than this xenvm knows",
        )
    if not saved.WORD.size < length <= CONFIG_LIMIT_BYTES:
        raise ImageError(f"the config in the image has {length} bytes, at most {CONFIG_LIMIT_BYTES} are read")
    optional = _exact(read, length, at)
    (config_length,) = saved.WORD.unpack_from(optional)
    if config_length != length - saved.WORD.size or optional[-1]:
        raise ImageError("the config in the image has another length than its header says")
    streams_at = at + length
    ident, version, options = saved.LIBXL.unpack(_exact(read, saved.LIBXL.size, streams_at))
    if ident != saved.LIBXL_IDENT:
        raise ImageError("no stream of libxl follows the header of the image: it is damaged")
    if version != saved.LIBXL_VERSION or options:
        raise ImageError(
            f"the stream of libxl has version {version}, options {options:#x}; known is version {saved.LIBXL_VERSION}",
            hint="it is of another Xen release than this xenvm knows",
        )
    at = streams_at + saved.LIBXL.size
    if saved.RECORD.unpack(_exact(read, saved.RECORD.size, at)) != (saved.LIBXC_CONTEXT, 0):
        raise ImageError("the stream of libxl begins with another record than that of the memory: it is damaged")
    memory_max_kib, vcpus, uuid = _config(optional[saved.WORD.size : -1], TYPES[hvm])
    sealed_bytes, checksum = _seal(optional)
    return Facts(memory_max_kib, vcpus, uuid, streams_at, at + saved.RECORD.size, sealed_bytes, checksum)


def _foreign(magic: bytes, size: int) -> ImageError:
    if magic.startswith((b"XenSavedDomain", b"XenSavedDomv2")):
        return ImageError(
            "the image is one of the old xenvm or of XenServer, whose form today's Xen does not read",
            hint="restore it with the toolstack that wrote it",
        )
    if saved.MAGIC.startswith(magic):
        return ImageError(f"the image ends after {size} bytes: it is cut off")
    return ImageError("the file is no save image: it does not begin as `xl save` and xenvm write them")


def cut_off(facts: Facts, size: int) -> ImageError:
    """Return what to say of an image that has another length than its seal says."""
    return ImageError(f"the image has {size} bytes of {facts.sealed_bytes}: it is cut off or damaged")


def _config(untrusted_text: bytes, wanted: str) -> tuple[int, int, str]:
    """Return memory, vcpus and uuid of a guest's config (libxl_domain_config as JSON)."""
    try:
        untrusted = jsontext.loads(untrusted_text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ImageError("the config in the image is not JSON: it is damaged") from None
    create = untrusted.get("c_info") if isinstance(untrusted, dict) else None
    build = untrusted.get("b_info") if isinstance(untrusted, dict) else None
    if not isinstance(create, dict) or not isinstance(build, dict):
        raise ImageError("the config in the image says nothing of a guest")
    kind = create.get("type", "")
    if kind != wanted:
        shown = kind if isinstance(kind, str) and kind in ("pv", "hvm", "pvh") else "unknown"
        raise ImageError(f"the image is of a guest of the type {shown}, this VM is {wanted}")
    memory_kib, vcpus = build.get("max_memkb"), build.get("max_vcpus", 1)
    if type(memory_kib) is not int or not 0 < memory_kib <= 2**42:
        raise ImageError("the config in the image does not say how much memory the guest has")
    if type(vcpus) is not int or not 0 < vcpus <= 8192:
        raise ImageError("the config in the image does not say how many vcpus the guest has")
    uuid = create.get("uuid", "")
    if not isinstance(uuid, str) or (uuid and not forms.uuid(uuid.lower())):
        raise ImageError("the config in the image names its guest by no uuid: it is damaged")
    return memory_kib, vcpus, uuid.lower()


def _seal(optional: bytes) -> tuple[int, int]:
    untrusted_seal = optional[-len(saved.UNSEALED) - len(b"}\0") : -len(b"}\0")]
    try:
        sealed_bytes, checksum = (int(untrusted_seal[at : at + size], 16) for at, size in saved.SEAL_NUMBERS)
    except ValueError:
        return -1, 0
    if untrusted_seal != saved.seal(sealed_bytes, checksum):
        return -1, 0
    if not sealed_bytes:
        raise ImageError("the image was never finished: writing it was interrupted")
    return sealed_bytes, checksum


def pieces(read: Read, at: int, guest: Guest) -> Iterator[Piece]:
    """Yield the stream of libxenguest from offset `at` on, in pieces that are checked.

    `guest` is filled meanwhile. A piece that is a range of the file is the contents of pages.
    """
    head = _exact(read, LIBXC.size, at)
    marker, ident, version, options, _r1, _r2 = LIBXC.unpack(head)
    if marker != LIBXC_MARKER or ident != LIBXC_IDENT:
        raise ImageError("the stream of the memory has no beginning: the image is damaged")
    if version != LIBXC_VERSION or options:
        raise ImageError(
            f"the stream of the memory has version {version}, options {options:#x}; known is version {LIBXC_VERSION}",
            hint="it is of another Xen release than this xenvm knows",
        )
    domain = _exact(read, DOMAIN.size, at + LIBXC.size)
    kind, page_shift, _r3, guest.xen_major, guest.xen_minor = DOMAIN.unpack(domain)
    if kind != (HVM if guest.hvm else PV):
        shown = {PV: "pv", HVM: "hvm"}.get(kind, "unknown")
        raise ImageError(f"the memory in the image is of a guest of the type {shown}, this VM is {TYPES[guest.hvm]}")
    if page_shift != PAGE_SHIFT or guest.xen_major > 0xFFFF or guest.xen_minor > 0xFFFF:
        raise ImageError("the stream of the memory has a damaged header")
    yield head + domain
    at += LIBXC.size + DOMAIN.size
    while True:
        header = _exact(read, saved.RECORD.size, at)
        record, length = saved.RECORD.unpack(header)
        body_at, padded = at + len(header), -(-length // 8) * 8
        if record == PAGE_DATA:
            yield from _page_data(read, header, body_at, length, guest)
        else:
            _check_length(record, length)
            body = _exact(read, padded, body_at)
            if not record & OPTIONAL:
                _check_body(record, body, length, guest)
            yield header + body
        guest.seen.add(record)
        at = body_at + padded
        if record == END:
            break
    guest.end_at = at
    for needed, name in (OF_BOTH | (OF_HVM if guest.hvm else OF_PV)).items():
        if needed not in guest.seen:
            raise ImageError(f"the stream of the memory lacks {name}")
    if not guest.hvm and 0 not in guest.vcpus:
        raise ImageError("the stream of the memory lacks the state of vcpu 0")


def rest(read: Read, guest: Guest, keep: Callable[[bytes], None]) -> None:
    """Check what follows the stream; `keep` gets, piece by piece, the state that a device model begins with."""
    at = guest.end_at
    if guest.hvm:
        kind, length = saved.RECORD.unpack(_exact(read, saved.RECORD.size, at))
        if kind == saved.EMULATOR_NODES:
            raise ImageError(
                "the image has nodes of a device model that is older than those of this host",
                hint="it is of another Xen release than this xenvm knows",
            )
        if kind != saved.EMULATOR_STATE:
            raise ImageError("the image lacks the state of the device model")
        body_at = at + saved.RECORD.size
        if not saved.EMULATOR.size + len(QEMU_MAGIC) <= length <= saved.EMULATOR.size + STATE_LIMIT_BYTES:
            raise ImageError(f"the state of the device model has {length} bytes: the image is damaged")
        if saved.EMULATOR.unpack(_exact(read, saved.EMULATOR.size, body_at)) != saved.QEMU:
            raise ImageError("the state is of another device model than QEMU")
        at = body_at + saved.EMULATOR.size
        end = body_at + length
        if _exact(read, len(QEMU_MAGIC), at) != QEMU_MAGIC:
            raise ImageError("the state of the device model has no beginning: the image is damaged")
        while at < end:
            content = _exact(read, min(end - at, CHUNK_BYTES), at)
            keep(content)
            at += len(content)
        if any(_exact(read, -length % 8, at)):
            raise ImageError("the state of the device model is followed by more than zeros: the image is damaged")
        at += -length % 8
    if _exact(read, saved.RECORD.size, at) != saved.TAIL:
        raise ImageError("something else follows than the end of the image: it is damaged")
    if read(1, at + len(saved.TAIL)):
        raise ImageError("something follows the end of the image: it is damaged")


def _check_length(record: int, length: int) -> None:
    if record & OPTIONAL:
        if length > BODY_LIMIT_BYTES:
            raise ImageError(f"a record of the type {record:#x} has {length} bytes: the image is damaged")
        return
    least, most, step = LENGTHS.get(record, (0, -1, 1))
    if most < 0:
        raise ImageError(
            f"the stream of the memory has a record of the unknown type {record:#x}",
            hint="the image is damaged, or of a newer Xen than this xenvm knows",
        )
    if not least <= length <= most or length % step:
        raise ImageError(f"a record of the type {record:#x} has {length} bytes: the image is damaged")


def _check_body(record: int, body: bytes, length: int, guest: Guest) -> None:
    """Check what of a record can be checked without Xen, and that it comes when it may."""
    if record in STRANGE[guest.hvm]:
        raise ImageError(f"a record of the type {record:#x} is not of this type of guest: the image is damaged")
    if record in (PV_INFO, CPUID_POLICY, MSR_POLICY, STATIC_DATA_END):
        if guest.seen & {P2M_FRAMES, PAGE_DATA} or record in guest.seen:
            raise ImageError(f"a record of the type {record:#x} comes at the wrong place: the image is damaged")
    elif record != END and not {STATIC_DATA_END, *(() if guest.hvm else (PV_INFO,))} <= guest.seen:
        raise ImageError(f"a record of the type {record:#x} comes too early: the image is damaged")
    if any(body[length:]):
        raise ImageError(f"a record of the type {record:#x} is followed by more than zeros: the image is damaged")
    if record == PV_INFO:
        width, levels = body[0], body[1]
        if (width, levels) != (8, 4) or any(body[2:]):
            raise ImageError("the image is of a PV guest that is not a 64-bit one", hint="such a guest cannot run here")
    elif record == P2M_FRAMES:
        first, guest.last_frame = struct.unpack_from("<II", body)
        per_frame = PAGE_BYTES // 8
        if first > guest.last_frame or length != 8 + 8 * (guest.last_frame // per_frame - first // per_frame + 1):
            raise ImageError("the map of the memory has another length than it says: the image is damaged")
        if guest.last_frame >= guest.frames_limit:
            raise ImageError(
                f"the map of the memory has {guest.last_frame + 1} frames, and a guest of this size at most "
                f"{guest.frames_limit}: the image is damaged"
            )
    elif record == HVM_PARAMS:
        count, reserved = struct.unpack_from("<II", body)
        if reserved or length != PARAMS_HEAD_BYTES + PARAM_BYTES * count:
            raise ImageError("the parameters of the machine have another length than they say: the image is damaged")
    elif record in OF_A_VCPU:
        number, reserved = struct.unpack_from("<II", body)
        if number >= guest.vcpus_limit or reserved:
            raise ImageError("the image has the state of other vcpus than its config says: it is damaged")
        if record == VCPU_BASIC:
            guest.vcpus.add(number)


def _page_data(read: Read, header: bytes, at: int, length: int, guest: Guest) -> Iterator[Piece]:
    if (STATIC_DATA_END if guest.hvm else P2M_FRAMES) not in guest.seen:
        raise ImageError("memory comes before its map: the image is damaged")
    counts = _exact(read, PAGES.size, at)
    count, reserved = PAGES.unpack(counts)
    if not 0 < count <= PAGES_LIMIT or reserved:
        raise ImageError(f"a record of pages says that it has {count}: the image is damaged")
    numbers = _exact(read, 8 * count, at + PAGES.size)
    full = 0
    for (number,) in struct.iter_unpack("<Q", numbers):
        kind, frame = number >> TYPE_SHIFT, number & FRAME_MASK
        if kind in WITH_DATA:
            full += 1
        if kind not in (HVM_PAGES if guest.hvm else WITH_DATA | WITHOUT_DATA):
            raise ImageError(f"a page has the impossible type {kind}: the image is damaged")
        if frame > guest.last_frame or (number & ~(0xF << TYPE_SHIFT)) != frame:
            raise ImageError(f"a page has the number {frame}, the last one is {guest.last_frame}: the image is damaged")
    begin = at + PAGES.size + len(numbers)
    if length != PAGES.size + len(numbers) + full * PAGE_BYTES:
        raise ImageError(f"a record of {full} pages has {length} bytes: the image is damaged")
    if full:
        _exact(read, 1, begin + full * PAGE_BYTES - 1)
    yield header + counts + numbers
    if full:
        yield (begin, full * PAGE_BYTES)


def _exact(read: Read, length: int, at: int) -> bytes:
    content = read(length, at)
    if len(content) != length:
        raise ImageError(f"the image ends after {at + len(content)} bytes: it is cut off")
    return content
