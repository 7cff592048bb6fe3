# SPDX-License-Identifier: GPL-2.0-or-later

"""Build script of `xenvm._unpack`: zstd, which Python has from 3.14 on.

libzstd is looked up when it is needed and not linked: libxenguest depends on it, so that each Xen host has it, and its
headers are not needed to build this. All that is used is of its stable interface (zstd.h of 1.4.0 and later).
"""

from cffi import FFI

CDEF = """
/* Load the library; 0, or -1 where there is none. Before a process confines itself: it maps code. */
int xenvm_zstd_load(void);
/* Decompress one or more whole frames into `room` bytes; the bytes written, or -1. */
int64_t xenvm_zstd(void *to, uint64_t room, const void *from, uint64_t length);

/* A state for decompressing pieces of frames that need no larger window than 2 to the power `window_log` bytes, or for
   compressing pieces into one frame; NULL when there is no memory for it. It lives as long as the process. */
void *xenvm_zstd_decoder(int window_log);
void *xenvm_zstd_encoder(int level);
/* Take as much as there is room for, and add to what was written and used. Decompressing: 0 when a frame is complete,
   1 within one. Compressing, with `end` to finish the frame: 0 when all is written, 1 when more room is needed.
   -1 for an error. */
int xenvm_zstd_decode(void *state, void *to, size_t room, size_t *written,
                      const void *from, size_t length, size_t *used);
int xenvm_zstd_encode(void *state, void *to, size_t room, size_t *written,
                      const void *from, size_t length, size_t *used, int end);
"""

SOURCE = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stddef.h>

/* zstd.h: ZSTD_inBuffer, ZSTD_outBuffer; the numbers of parameters and directives are part of its stable interface. */
struct input { const void *from; size_t length, at; };
struct output { void *to; size_t room, at; };
enum { WINDOW_LOG_MAX = 100, LEVEL = 100, CHECKSUM = 201, CONTINUE = 0, END = 2 };

static size_t (*decompress)(void *, size_t, const void *, size_t);
static unsigned (*is_error)(size_t);
static void *(*make_decoder)(void), *(*make_encoder)(void);
static size_t (*set_decoder)(void *, int, int), (*set_encoder)(void *, int, int);
static size_t (*decode)(void *, struct output *, struct input *);
static size_t (*encode)(void *, struct output *, struct input *, int);

int xenvm_zstd_load(void)
{
    void *library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return -1;
    *(void **)&decompress = dlsym(library, "ZSTD_decompress");
    *(void **)&is_error = dlsym(library, "ZSTD_isError");
    *(void **)&make_decoder = dlsym(library, "ZSTD_createDCtx");
    *(void **)&make_encoder = dlsym(library, "ZSTD_createCCtx");
    *(void **)&set_decoder = dlsym(library, "ZSTD_DCtx_setParameter");
    *(void **)&set_encoder = dlsym(library, "ZSTD_CCtx_setParameter");
    *(void **)&decode = dlsym(library, "ZSTD_decompressStream");
    *(void **)&encode = dlsym(library, "ZSTD_compressStream2");
    return decompress && is_error && make_decoder && make_encoder && set_decoder && set_encoder && decode && encode
        ? 0 : -1;
}

int64_t xenvm_zstd(void *to, uint64_t room, const void *from, uint64_t length)
{
    size_t result;
    if (!decompress || !is_error)
        return -1;
    result = decompress(to, room, from, length);
    return is_error(result) ? -1 : (int64_t)result;
}

void *xenvm_zstd_decoder(int window_log)
{
    void *state = make_decoder ? make_decoder() : NULL;
    return state && !is_error(set_decoder(state, WINDOW_LOG_MAX, window_log)) ? state : NULL;
}

void *xenvm_zstd_encoder(int level)
{
    void *state = make_encoder ? make_encoder() : NULL;
    if (!state || is_error(set_encoder(state, LEVEL, level)) || is_error(set_encoder(state, CHECKSUM, 1)))
        return NULL;
    return state;
}

static int step(size_t result, size_t *written, const struct output *output, size_t *used, const struct input *input)
{
    *written = output->at;
    *used = input->at;
    return is_error(result) ? -1 : result != 0;
}

int xenvm_zstd_decode(void *state, void *to, size_t room, size_t *written,
                      const void *from, size_t length, size_t *used)
{
    struct output output = { to, room, *written };
    struct input input = { from, length, *used };
    return step(decode(state, &output, &input), written, &output, used, &input);
}

int xenvm_zstd_encode(void *state, void *to, size_t room, size_t *written,
                      const void *from, size_t length, size_t *used, int end)
{
    struct output output = { to, room, *written };
    struct input input = { from, length, *used };
    return step(encode(state, &output, &input, end ? END : CONTINUE), written, &output, used, &input);
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("xenvm._unpack", SOURCE, libraries=["dl"])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
