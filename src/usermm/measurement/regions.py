"""Memory to register, and the objects by which a program names it: NumPy arrays, or memoryviews where there is none."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
from types import TracebackType
from typing import Any, Final, Self

from usermm.errors import from_errno
from usermm.monitors import calls

REGION_BYTES: Final = 64 << 10
_MAP_NORESERVE: Final = 0x4000  # <asm-generic/mman-common.h>: nothing is ever written to most of this memory
_PROT_NONE: Final = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Regions:
    """`count` regions of REGION_BYTES, aligned to that. `buffers`: an object over each; `keys`: (address, length).

    They share one mapping, or have one each with `own_mappings`. What lies around them is inaccessible, so that the
    kernel merges nothing: the history of neighbours would be part of every figure. Raises LimitError (ENOMEM).
    """

    def __init__(self, count: int, *, own_mappings: bool = False) -> None:
        pitch = 2 * REGION_BYTES if own_mappings else REGION_BYTES
        self._mapped_bytes = (count + 2) * pitch
        try:
            self._mapped = calls.map_memory(self._mapped_bytes, flags=_MAP_NORESERVE)
        except OSError as error:
            what = f"mmap of {self._mapped_bytes >> 20} MiB for {count} regions"
            raise from_errno(error.errno or 0, f"{what}: {error.strerror}; raise ulimit -v") from None
        self.start = -(-(self._mapped + mmap.PAGESIZE) // REGION_BYTES) * REGION_BYTES
        self.end = self.start + (count - 1) * pitch + REGION_BYTES
        self.addresses = range(self.start, self.end, pitch)
        _make_inaccessible(self._mapped, self.start)
        _make_inaccessible(self.end, self._mapped + self._mapped_bytes)
        for address in self.addresses[1:] if own_mappings else ():
            _make_inaccessible(address - REGION_BYTES, address)
        whole = _buffer((ctypes.c_ubyte * (self.end - self.start)).from_address(self.start))
        self.buffers = [whole[at : at + REGION_BYTES] for at in range(0, self.end - self.start, pitch)]
        self.keys = [(address, len(buffer)) for address, buffer in zip(self.addresses, self.buffers, strict=True)]

    def touch(self) -> None:
        """Writes to every page, as to memory in use."""
        for address in self.addresses:
            ctypes.memset(address, 1, REGION_BYTES)

    def close(self) -> None:
        """Unmaps everything: the objects must not be looked into any more."""
        self.buffers.clear()
        if self._mapped_bytes:
            calls.unmap(self._mapped, self._mapped_bytes)
            self._mapped_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _make_inaccessible(start: int, end: int) -> None:
    if _libc.mprotect(start, end - start, _PROT_NONE):
        number = ctypes.get_errno()
        raise from_errno(number, f"mprotect of {end - start} bytes: {os.strerror(number)}; raise vm.max_map_count")


def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError:
        return None


def _buffer(memory: ctypes.Array[ctypes.c_ubyte]) -> Any:
    numpy = _numpy()
    return numpy.frombuffer(memory, numpy.uint8) if numpy else memoryview(memory).cast("B")


def kind() -> str:
    """What the buffers are, in words."""
    numpy = _numpy()
    return f"NumPy {numpy.__version__} arrays" if numpy else "memoryviews (NumPy is not installed)"


def address_code() -> str:
    """The expression for the address of `buffer`; `address_of` stands for the function of that name."""
    return 'buffer.__array_interface__["data"][0]' if _numpy() else "address_of(buffer)"


def address_of(buffer: Any) -> int:
    """Of a writable buffer, by ctypes: how it is done without NumPy."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
