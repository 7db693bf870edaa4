"""native/soak.c and the devices of cache_soak.py, whose ledger is in it."""

from __future__ import annotations

import ctypes
from typing import Any

from usermm.registrars import IoUring
from usermm.registrars.base import Traits
from usermm.uring import Ring


class Account(ctypes.Structure):
    """struct account of native/ledger.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("max_bytes", "max_count", "live", "live_bytes", "most_bytes", "looks", "stale")
    ]


class Work(ctypes.Structure):
    """struct work of native/soak.c."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("changes", "given", "disturbances")]


def load(path: str) -> ctypes.PyDLL:
    library = ctypes.PyDLL(path)
    library.soak_registrar.restype = ctypes.py_object
    library.soak_account.restype = ctypes.POINTER(Account)
    library.soak_work.restype = ctypes.POINTER(Work)
    library.soak_violations.restype = ctypes.c_char_p
    library.soak_live_of.restype = library.soak_note_array.restype = ctypes.c_uint64
    library.soak_note_array.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.soak_forget_array.argtypes = [ctypes.c_uint64]
    library.soak_change.argtypes = [ctypes.py_object, ctypes.py_object]
    library.soak_blocks.argtypes = [ctypes.py_object, ctypes.c_uint]
    library.soak_arrays.argtypes = [ctypes.py_object, ctypes.py_object, ctypes.c_uint]
    return library


class Blocks:
    """A device for the blocks: all of it is in C."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self.traits = Traits()
        self.register, self.deregister = library.soak_registrar()


class Arrays:
    """An io_uring, and the frames of the pages that it has pinned."""

    def __init__(self, library: ctypes.PyDLL, ring: Ring) -> None:
        self.inner = IoUring(ring, wait_for_release=False)  # no request is ever under way
        self.traits = self.inner.traits
        self.library = library
        self.buffers: dict[int, Any] = {}

    def register(self, address: int, length: int) -> int:
        buffer = self.inner.register(address, length)
        handle = int(self.library.soak_note_array(address, length))
        self.buffers[handle] = buffer
        return handle

    def deregister(self, handle: int) -> None:
        self.library.soak_forget_array(handle)
        self.inner.deregister(self.buffers.pop(handle))


def violations(library: ctypes.PyDLL) -> tuple[int, str]:
    count = ctypes.c_uint64()
    first = library.soak_violations(ctypes.byref(count))
    return count.value, first.decode()
