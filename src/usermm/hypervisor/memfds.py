"""Memory as files: what the hypervisor owns, and what of it leaves the hypervisor."""

from __future__ import annotations

import ctypes
import fcntl
import os

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_OWNER_ONLY = 0o600
_libc = ctypes.CDLL(None, use_errno=True)


def sealed(name: str, pages: int) -> int:
    """A memfd of this size for good. Raises OSError (EMFILE, ENFILE, ENOMEM).

    Owned by the hypervisor and closed to everybody else, so that another user can reopen a read-only descriptor of it
    through /proc no wider than it is. Sealed against growing, and against shrinking: either side could take the memory
    from the other by a truncation, with SIGBUS. No seal can be added later.
    """
    memfd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(memfd, _OWNER_ONLY)
        os.ftruncate(memfd, pages * PAGE_BYTES)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(memfd)
        raise
    return memfd


def reopened(memfd: int, *, writable: bool) -> int:
    """Another open file of the same memory, as wide as a domain may have it. Raises OSError."""
    return os.open(f"/proc/self/fd/{memfd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)


def punch(memfd: int, page: int, pages: int) -> None:
    """Makes the pages a hole: whoever has them mapped reads zeros. Raises OSError."""
    start, length = ctypes.c_int64(page * PAGE_BYTES), ctypes.c_int64(pages * PAGE_BYTES)
    if _libc.fallocate(memfd, _KEEP_SIZE | _PUNCH_HOLE, start, length):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
