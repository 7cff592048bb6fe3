# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a builder loads into a domain, mapped, and of a kind that libxenguest takes as it is.

libxenguest unpacks what it finds packed: a whole file by gzip, or the payload of a bzImage, for which it looks before
it looks for an ELF file (xc_dom_kernel_mem and xc_dom_find_loader, xg_dom_core.c and xg_dom_bzimageloader.c). Here that
would be beside the hypervisor, so only what is neither goes there.
"""

from __future__ import annotations

import mmap
import os

from xenvm.helpers.builder.hypervisor import HypervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

LIMIT_BYTES: Final = 1 << 30  # of a file; also libxenguest's own default for a kernel
ELF: Final = b"\x7fELF"
HEADER_AT: Final = 0x202  # of a bzImage: Linux Documentation/arch/x86/boot.rst
HEADER: Final = b"HdrS"
HEAD_BYTES: Final = HEADER_AT + len(HEADER)
GZIP: Final = b"\x1f\x8b"
TRAILER_BYTES: Final = 4  # at the end of a gzip file: how long it is unpacked
GUNZIP_SLACK_BYTES: Final = 16  # what xc_dom_check_gzip adds to that


def mapped(descriptor: int, what: str) -> mmap.mmap:
    """Map a file; raise HypervisorError when it is empty or too large.

    The pages with its first and its last bytes are copies: whoever owns the file could change it after it was checked.
    """
    size = os.fstat(descriptor).st_size
    if not 0 < size <= LIMIT_BYTES:
        raise HypervisorError(f"the {what} has {size} bytes", hint=f"from 1 to {LIMIT_BYTES} are accepted")
    image = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    for part in (slice(0, HEAD_BYTES), slice(max(0, size - TRAILER_BYTES), size)):
        image[part] = image[part]  # the kernel copies a page of a private mapping when it is written to
    return image


def check_elf(image: mmap.mmap, what: str, hint: str) -> None:
    """Raise HypervisorError for a kernel or firmware that libxenguest would unpack."""
    head = image[:HEAD_BYTES]
    if not head.startswith(ELF) or head[HEADER_AT:] == HEADER:
        raise HypervisorError(f"the {what} is no plain ELF file", hint=hint)


def check_initrd(image: mmap.mmap) -> None:
    """Raise HypervisorError for an initrd that libxenguest would unpack though the limit is what it has packed.

    Until Xen 4.20 xc_dom_build_module unpacks what is packed by gzip, but not what says that it is longer unpacked than
    the limit, while the file itself is not.
    """
    size = len(image)
    claimed = int.from_bytes(image[max(0, size - TRAILER_BYTES) :], "little")
    if image[: len(GZIP)] == GZIP and claimed + GUNZIP_SLACK_BYTES <= size:
        raise HypervisorError(
            f"the initrd has {size} bytes, and its end says that they unpack to {claimed}",
            hint="pack it by gzip in one piece, or by xz or zstd: this Xen would unpack it beside the hypervisor",
        )
