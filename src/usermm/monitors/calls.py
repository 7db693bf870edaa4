"""The system calls that change an address space, by ctypes, which releases the GIL around each.

Addresses and lengths are in bytes, multiples of the page size. Every function raises OSError with the call's
errno.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

PAGE: Final = mmap.PAGESIZE

MAP_FIXED: Final = 0x10
MAP_FIXED_NOREPLACE: Final = 0x100000
"""EEXIST instead of replacing what is mapped there (Linux 4.17)."""
MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4
"""Moves the pages and leaves the old mapping, empty (Linux 5.7)."""
MADV_DONTNEED: Final = 4
MADV_FREE: Final = 8
MADV_REMOVE: Final = 9
MADV_DONTNEED_LOCKED: Final = 24
"""As MADV_DONTNEED, for locked memory too (Linux 5.18)."""
MADV_GUARD_INSTALL: Final = 102
"""Discards pages and makes access to them fault (Linux 6.13)."""

_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str, result: type, *arguments: type) -> ctypes._NamedFuncPointer:
    function = getattr(_libc, name)
    function.restype = result
    function.argtypes = arguments
    return function  # type: ignore[no-any-return]


_address, _length, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_mmap = _function("mmap", _address, _address, _length, _int, _int, _int, ctypes.c_long)
_munmap = _function("munmap", _int, _address, _length)
_mremap = _function("mremap", _address, _address, _length, _length, _int, _address)
_madvise = _function("madvise", _int, _address, _length, _int)
_sbrk = _function("sbrk", _address, ctypes.c_ssize_t)
_remap_file_pages = _function("remap_file_pages", _int, _address, _length, _int, _length, _int)
_shmget = _function("shmget", _int, _int, _length, _int)
_shmat = _function("shmat", _address, _int, _address, _int)
_shmctl = _function("shmctl", _int, _int, _int, _address)
_IPC_RMID = 0
_SHM_REMAP = 0o40000


def _fail(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def map_memory(length: int, *, shared: bool = False, at: int | None = None, flags: int = 0) -> int:
    """mmap(2) of readable and writable anonymous memory; the address."""
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _mmap(at, length, protection, kind | mmap.MAP_ANONYMOUS | flags, -1, 0)
    if address == _MAP_FAILED:
        raise _fail("mmap")
    return int(address)


def map_free(address: int, length: int) -> bool:
    """As `map_memory` at an address that must be free; False when it is not. Quick: for loops that wait for it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    return bool(_mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address)


def unmap(address: int, length: int) -> None:
    """munmap(2)."""
    if _munmap(address, length) != 0:
        raise _fail("munmap")


def remap(address: int, old_length: int, new_length: int, flags: int, target: int = 0) -> int:
    """mremap(2); the new address."""
    moved = _mremap(address, old_length, new_length, flags, target)
    if moved == _MAP_FAILED:
        raise _fail("mremap")
    return int(moved)


def advise(address: int, length: int, advice: int) -> None:
    """madvise(2)."""
    if _madvise(address, length, advice) != 0:
        raise _fail("madvise")


def swap_pages(address: int, length: int, page: int) -> None:
    """remap_file_pages(2): shows the pages from number `page` on at `address`, which is in a shared mapping."""
    if _remap_file_pages(address, length, 0, page, 0) != 0:
        raise _fail("remap_file_pages")


def attach_over(address: int, length: int) -> None:
    """shmat(2) of a new System V segment over what is mapped there; the segment goes with its last mapping."""
    segment = _shmget(0, length, 0o600)
    if segment < 0:
        raise _fail("shmget")
    attached = _shmat(segment, address, _SHM_REMAP)
    error = _fail("shmat")
    _shmctl(segment, _IPC_RMID, None)
    if attached != address:
        raise error


def move_break(increment: int) -> int:
    """sbrk(3); where the heap ended before."""
    before = _sbrk(increment)
    if before == _MAP_FAILED:
        raise _fail("sbrk")
    return int(before or 0)


def touch(address: int, length: int) -> None:
    """Writes to every page, so that there is something to take away."""
    for page in range(address, address + length, PAGE):
        ctypes.c_char.from_address(page).value = b"x"
