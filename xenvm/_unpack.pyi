# SPDX-License-Identifier: GPL-2.0-or-later
# The part of the compiled module that is used; its functions are described in native/unpack.py.

import mmap
from typing import Any

class _FFI:
    def from_buffer(self, buffer: mmap.mmap | memoryview, require_writable: bool = False) -> Any: ...

class _Lib:
    def xenvm_zstd_load(self) -> int: ...
    def xenvm_zstd(self, to: Any, room: int, source: Any, length: int, /) -> int: ...

ffi: _FFI
lib: _Lib
