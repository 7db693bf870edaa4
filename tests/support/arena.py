"""Real memory at addresses that nobody else in the process is given, changed by libc's own calls.

The kernel hands out addresses near the stack, downwards, and the heap grows next to the program; the windows used here
are far from both, so what is unmapped in a window stays unmapped until the test says otherwise.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Iterator

PAGE_BYTES = 4096
WINDOW_BYTES = 1 << 26

_MAP_FIXED = 0x10
_MAP_FIXED_NOREPLACE = 0x100000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.sbrk.restype = ctypes.c_void_p
_libc.sbrk.argtypes = [ctypes.c_ssize_t]

_windows: Iterator[int] = itertools.count(0x0EAD_0000_0000, WINDOW_BYTES)


def _check(result: int | None, call: str) -> int:
    if result in (_FAILED, -1):
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result or 0


class Arena:
    """One window of addresses, empty at first. Lengths are in bytes; errors are OSError with the call's errno."""

    def __init__(self) -> None:
        self.start = next(_windows)

    def mmap(self, address: int, length: int, *, shared: bool = False, replace: bool = True) -> int:
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        flags = kind | mmap.MAP_ANONYMOUS | (_MAP_FIXED if replace else _MAP_FIXED_NOREPLACE)
        return _check(_libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0), "mmap")

    def munmap(self, address: int, length: int) -> None:
        _check(_libc.munmap(address, length), "munmap")

    def mremap(self, old: int, old_length: int, new_length: int, flags: int = 0, new: int = 0) -> int:
        return _check(_libc.mremap(old, old_length, new_length, flags, new), "mremap")

    def madvise(self, address: int, length: int, advice: int) -> None:
        _check(_libc.madvise(address, length, advice), "madvise")

    def mprotect(self, address: int, length: int, prot: int) -> None:
        _check(_libc.mprotect(address, length, prot), "mprotect")

    def close(self) -> None:
        self.munmap(self.start, WINDOW_BYTES)


def move_break(delta: int) -> int:
    """sbrk(3): the end of the heap before it was moved by `delta` bytes."""
    return _check(_libc.sbrk(delta), "sbrk")
