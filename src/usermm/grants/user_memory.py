"""Memory of this process by address, as a driver reaches its caller's: a bad address is EFAULT, not a crash."""

from __future__ import annotations

import ctypes
import errno
import os

from usermm.errors import grant_refused

_LARGE_BYTES = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))  # struct iovec


def read(address: int, length: int, call: str) -> bytes:
    """`length` bytes at `address`. Raises GrantError (EFAULT) in the name of `call`."""
    if length > _LARGE_BYTES:  # whatever a caller made up: there is no memory for it before it is known to be there
        _transfer(_libc.process_vm_readv, ctypes.create_string_buffer(1), address + length - 1, 1, call)
    data = ctypes.create_string_buffer(length)
    _transfer(_libc.process_vm_readv, data, address, length, call)
    return data.raw


def write(address: int, data: bytes, call: str) -> None:
    """The other direction."""
    _transfer(_libc.process_vm_writev, ctypes.create_string_buffer(data, len(data)), address, len(data), call)


def _transfer(function: object, data: object, address: int, length: int, call: str) -> None:
    """process_vm_readv(2), process_vm_writev(2) on this process itself."""
    if not length:
        return
    mine = _Vector(ctypes.cast(data, ctypes.c_void_p).value, length)  # type: ignore[arg-type] # a ctypes array
    other = _Vector(address & (1 << 64) - 1, length)
    done = function(os.getpid(), ctypes.byref(mine), 1, ctypes.byref(other), 1, 0)  # type: ignore[operator]
    if done != length:
        text = f"{call}: {address:#x}+{length} is no memory of this process for that: pass a buffer's address"
        raise grant_refused(errno.EFAULT, text)
