# SPDX-License-Identifier: GPL-2.0-or-later

"""Build script of `xenvm._unpack`: zstd, which Python has from 3.14 on.

libzstd is looked up when it is needed and not linked: libxenguest depends on it, so that each Xen host has it, and its
headers are not needed to build this. ZSTD_decompress and ZSTD_isError are of its stable interface (zstd.h).
"""

from cffi import FFI

CDEF = """
/* Load the library; 0, or -1 where there is none. Before a process confines itself: it maps code. */
int xenvm_zstd_load(void);
/* Decompress one or more whole frames into `room` bytes; the bytes written, or -1. */
int64_t xenvm_zstd(void *to, uint64_t room, const void *from, uint64_t length);
"""

SOURCE = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stddef.h>

static size_t (*decompress)(void *, size_t, const void *, size_t);
static unsigned (*is_error)(size_t);

int xenvm_zstd_load(void)
{
    void *library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return -1;
    *(void **)&decompress = dlsym(library, "ZSTD_decompress");
    *(void **)&is_error = dlsym(library, "ZSTD_isError");
    return decompress && is_error ? 0 : -1;
}

int64_t xenvm_zstd(void *to, uint64_t room, const void *from, uint64_t length)
{
    size_t result;
    if (!decompress || !is_error)
        return -1;
    result = decompress(to, room, from, length);
    return is_error(result) ? -1 : (int64_t)result;
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("xenvm._unpack", SOURCE, libraries=["dl"])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
