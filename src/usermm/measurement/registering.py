"""What a program pays that registers its buffer with the device for each use, and takes it back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from usermm.errors import DeviceError, from_errno
from usermm.measurement.harness import Effort, statement
from usermm.monitors import calls
from usermm.uapi import io_uring as abi
from usermm.uring import Ring

SIZES_BYTES: Final = (4 << 10, 64 << 10, 1 << 20)
IO_URING: Final = "io_uring, a fixed buffer"
MLOCK: Final = "mlock and munlock"

_TIMES = {4 << 10: 2_000, 64 << 10: 500, 1 << 20: 50}
"""Of a round, by size."""

# As a call costs least from Python; nothing here can wait for the interpreter's lock.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_libc.syscall.argtypes = [ctypes.c_long] * 5
_libc.syscall.restype = ctypes.c_long


class Registering:
    """Memory in use, and a ring. What cannot be done here has no subject, and a line in `notes`."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self.notes: list[str] = []
        with ExitStack() as stack:
            self._address = calls.map_memory(SIZES_BYTES[-1])
            stack.callback(calls.unmap, self._address, SIZES_BYTES[-1])
            calls.touch(self._address, SIZES_BYTES[-1])
            self._ring = None
            try:
                self._ring = stack.enter_context(Ring(1))
            except DeviceError as error:
                self.notes.append(f"{IO_URING} is missing: {error.strerror}")
            self._stack = stack.pop_all()

    def subjects(self) -> dict[tuple[str, int], Callable[[], float]]:
        """ns for a pair of calls, by the device's name and the size in bytes."""
        found = {}
        for size in SIZES_BYTES:
            for name, prepare in ((IO_URING, self._io_uring), (MLOCK, self._mlock)):
                try:
                    subject = prepare(size)
                except DeviceError as error:
                    self.notes.append(f"{name} of {size >> 10} KiB is missing: {error.strerror}")
                    continue
                if subject:
                    found[name, size] = subject
        return found

    def _io_uring(self, size: int) -> Callable[[], float] | None:
        if not self._ring:
            return None
        self._ring.update(0, self._address, size)  # it says why not
        self._ring.clear(0)
        arguments = abi.SYS_IO_URING_REGISTER, self._ring.fileno(), abi.IORING_REGISTER_BUFFERS_UPDATE
        full, empty = _Update(self._address, size), _Update(0, 0)
        names = {
            "call": _libc.syscall,
            "full": (*arguments, full.pointer, abi.RSRC_UPDATE2.size),
            "empty": (*arguments, empty.pointer, abi.RSRC_UPDATE2.size),
            "keep": (full, empty),
        }
        return statement("call(*full); call(*empty)", self._effort.operations(_TIMES[size]), names)

    def _mlock(self, size: int) -> Callable[[], float]:
        if _libc.mlock(self._address, size):
            number = ctypes.get_errno()
            raise from_errno(number, f"mlock: {os.strerror(number)}; raise ulimit -l")
        _libc.munlock(self._address, size)
        names = {"lock": _libc.mlock, "unlock": _libc.munlock, "address": self._address, "size": size}
        return statement("lock(address, size); unlock(address, size)", self._effort.operations(_TIMES[size]), names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


class _Update:
    """The argument of an update of slot 0, made once."""

    def __init__(self, address: int, length: int) -> None:
        self._vector = ctypes.create_string_buffer(abi.IOVEC.pack(address, length), abi.IOVEC.size)
        self._tag = ctypes.c_uint64(0)
        packed = abi.RSRC_UPDATE2.pack(0, 0, ctypes.addressof(self._vector), ctypes.addressof(self._tag), 1, 0)
        self._update = ctypes.create_string_buffer(packed, abi.RSRC_UPDATE2.size)
        self.pointer = ctypes.addressof(self._update)
