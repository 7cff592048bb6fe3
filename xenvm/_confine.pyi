# SPDX-License-Identifier: GPL-2.0-or-later
# The part of the compiled module that is used; its functions are described in native/confine.py.

from collections.abc import Sequence
from typing import Protocol

class _Instructions(Protocol):
    def __len__(self) -> int: ...

class _FFI:
    def new(self, kind: str, values: Sequence[tuple[int, int, int, int]], /) -> _Instructions: ...

class _Lib:
    BPF_LD: int
    BPF_W: int
    BPF_ABS: int
    BPF_JMP: int
    BPF_JEQ: int
    BPF_JGE: int
    BPF_JSET: int
    BPF_K: int
    BPF_RET: int
    BPF_MAXINSNS: int
    AUDIT_ARCH_X86_64: int
    X32_SYSCALL_BIT: int
    SECCOMP_RET_KILL_PROCESS: int
    SECCOMP_RET_ERRNO: int
    SECCOMP_RET_ALLOW: int
    OFFSET_NR: int
    OFFSET_ARCH: int
    OFFSET_ARGS: int

    def xenvm_syscall_number(self, name: bytes, /) -> int: ...
    def xenvm_syscall(self, number: int, a: int, b: int, c: int, d: int, e: int, f: int, /) -> int: ...
    def xenvm_close_range(self, first: int, last: int, /) -> int: ...
    def xenvm_set_capabilities(self, mask: int, /) -> int: ...
    def xenvm_drop_bounding(self, capability: int, /) -> int: ...
    def xenvm_clear_ambient(self) -> int: ...
    def xenvm_landlock_abi(self) -> int: ...
    def xenvm_landlock_deny_all(self, abi: int, /) -> int: ...
    def xenvm_install_filter(self, instructions: _Instructions, count: int, /) -> int: ...

ffi: _FFI
lib: _Lib
