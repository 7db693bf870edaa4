"""What a device file is to the classes above it: the four calls of a driver, on a real Xen or in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from usermm._core import Memory

PAGE_BYTES = 4096
"""The page of the devices' ABI on x86-64 and of Xen's grant tables."""


Reference = tuple[int, int]
"""domid of the grantor, reference."""

UNCLEARABLE = "CLEAR_BYTE is set for it, and its byte cannot be cleared read-only: map it writable, or take it back"
"""Why mmap refuses, on a real Xen too: Linux' driver would fault in the kernel when it is unmapped (seen with 6.1)."""


class DeviceFile(Protocol):
    """An open device file. Every call raises DeviceError with the errno that the device would have set."""

    def ioctl(self, request: int, argument: bytearray | memoryview) -> int:
        """The device's ioctl; `argument` is read, and changed in place. ENOTTY, of evtchn ENOSYS: no such request."""

    def mmap(self, length: int, prot: int, flags: int, offset: int, kind: Any = Memory) -> Any:
        """Maps `length` bytes of the device at `offset` (both in whole pages), as an object of the class `kind`."""

    def fileno(self) -> int:
        """A descriptor to poll; a device that has nothing to say raises ArgumentError."""

    def close(self) -> None:
        """What is mapped stays mapped until it is unmapped, as after close(2). May be called again."""

    @property
    def closed(self) -> bool:
        """Whether close() was called."""


class GntallocFile(DeviceFile, Protocol):
    """The requests that every allocation makes, as calls: a local device spares itself the bytes."""

    def allocate(self, domid: int, flags: int, count: int, kind: Any) -> tuple[Any, int, Sequence[int]]:
        """ALLOC_GREF and mmap: the memory as an object of the class `kind`, the index, the references."""

    def alloc_gref(self, domid: int, flags: int, count: int) -> tuple[int, Sequence[int]]:
        """ALLOC_GREF: the index and the references."""

    def dealloc_gref(self, index: int, count: int) -> None:
        """DEALLOC_GREF."""

    def forget(self, index: int, count: int, parts: Any, *, wait: bool) -> None:
        """DEALLOC_GREF of what is not deallocated yet, `parts` of which (a local device's) are unmapped just now.

        Never fails; without `wait` it waits for no other thread.
        """


class GntdevFile(DeviceFile, Protocol):
    """The requests that every mapping makes, as calls."""

    def map(self, references: Sequence[Reference], *, writable: bool, kind: Any) -> tuple[Any, int]:
        """MAP_GRANT_REF and mmap: the memory as an object of the class `kind`, the index."""

    def map_grant_ref(self, references: Sequence[Reference]) -> int:
        """MAP_GRANT_REF: the index."""

    def unmap_grant_ref(self, index: int, count: int) -> None:
        """UNMAP_GRANT_REF."""
