"""A userfaultfd that is not usermm's, as another library, CRIU or a debugger would have on our memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Iterator

from usermm.uapi import userfaultfd as uapi

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def foreign_userfaultfd(start: int, end: int) -> Iterator[int]:
    """Owns [start, end) while the block runs. It serves no fault, so nothing may touch untouched pages there."""
    number = uapi.SYSTEM_CALL[os.uname().machine]
    descriptor = _libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | uapi.UFFD_USER_MODE_ONLY)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    try:
        fcntl.ioctl(descriptor, uapi.UFFDIO_API, bytearray(uapi.API.pack(uapi.UFFD_API, 0, 0)))
        request = bytearray(uapi.REGISTER.pack(start, end - start, uapi.UFFDIO_REGISTER_MODE_MISSING, 0))
        fcntl.ioctl(descriptor, uapi.UFFDIO_REGISTER, request)
        yield descriptor
    finally:
        os.close(descriptor)
