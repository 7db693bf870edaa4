"""The devices' requests as calls with arguments, over a file that has only their bytes: a real Xen's, or of 2007."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any, Protocol

from usermm._core import buffer_range
from usermm.errors import DeviceError
from usermm.grants.files import PAGE_BYTES, GntallocFile, GntdevFile, Reference
from usermm.uapi import xen_gntalloc, xen_gntdev


class _File(Protocol):
    def ioctl(self, request: int, argument: bytearray | memoryview, /) -> int: ...


class PackedGntalloc:
    """ALLOC_GREF and DEALLOC_GREF, and what is always done after the first."""

    def alloc_gref(self: _File, domid: int, flags: int, count: int) -> tuple[int, Sequence[int]]:
        """The index and the references."""
        layout = xen_gntalloc.ALLOC
        references = count * xen_gntalloc.REFERENCE.size
        argument = bytearray(layout.pack(domid, flags, count, 0) + bytes(max(references, 8)))
        self.ioctl(xen_gntalloc.ALLOC_GREF, argument)
        _, _, _, index = layout.unpack_from(argument)
        return index, memoryview(argument)[layout.size : layout.size + references].cast("I").tolist()

    def allocate(self: GntallocFile, domid: int, flags: int, count: int, kind: Any) -> tuple[Any, int, Sequence[int]]:
        """ALLOC_GREF and mmap(2): the memory, its index, the references."""
        index, references = self.alloc_gref(domid, flags, count)
        try:
            prot = mmap.PROT_READ | mmap.PROT_WRITE
            return self.mmap(count * PAGE_BYTES, prot, mmap.MAP_SHARED, index, kind), index, references
        except BaseException:
            self.dealloc_gref(index, count)
            raise

    def dealloc_gref(self: _File, index: int, count: int) -> None:
        """Whole pages of allocations."""
        self.ioctl(xen_gntalloc.DEALLOC_GREF, bytearray(xen_gntalloc.DEALLOC.pack(index, count)))


    def forget(self: GntallocFile, index: int, count: int, parts: Any, *, wait: bool) -> None:  # noqa: ARG002 - none
        """DEALLOC_GREF of what is not deallocated yet. Never fails."""
        with contextlib.suppress(DeviceError):  # the file was closed, which deallocates
            self.dealloc_gref(index, count)


class _Mapping:
    """What is always done after MAP_GRANT_REF."""

    def map(self: GntdevFile, references: Sequence[Reference], *, writable: bool, kind: Any) -> tuple[Any, int]:
        """MAP_GRANT_REF and mmap(2): the memory, its index."""
        index = self.map_grant_ref(references)
        try:
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            return self.mmap(len(references) * PAGE_BYTES, prot, mmap.MAP_SHARED, index, kind), index
        except BaseException:
            self.unmap_grant_ref(index, len(references))
            raise


class PackedGntdev(_Mapping):
    """MAP_GRANT_REF and UNMAP_GRANT_REF of Linux today."""

    def map_grant_ref(self: _File, references: Sequence[Reference]) -> int:
        """The index."""
        packed = b"".join(xen_gntdev.REFERENCE.pack(*reference) for reference in references)
        argument = bytearray(xen_gntdev.MAP.pack(len(references), 0) + packed.ljust(xen_gntdev.REFERENCE.size, b"\0"))
        self.ioctl(xen_gntdev.MAP_GRANT_REF, argument)
        return int(xen_gntdev.MAP.unpack_from(argument)[1])

    def unmap_grant_ref(self: _File, index: int, count: int) -> None:
        """What one MAP_GRANT_REF gave."""
        self.ioctl(xen_gntdev.UNMAP_GRANT_REF, bytearray(xen_gntdev.UNMAP.pack(index, count)))


class PackedGntdev2007(_Mapping):
    """The same of 2007, whose references are behind a pointer."""

    def map_grant_ref(self: _File, references: Sequence[Reference]) -> int:
        """The index: a slot's number times the page size."""
        packed = b"".join(xen_gntdev.REFERENCE.pack(*reference) for reference in references)
        memory = bytearray(packed or b"\0")  # read through its address during the call
        argument = bytearray(xen_gntdev.MAP_2007.pack(len(references), buffer_range(memory)[0], 0))
        self.ioctl(xen_gntdev.MAP_GRANT_REF, argument)
        return int(xen_gntdev.MAP_2007.unpack_from(argument)[2])

    def unmap_grant_ref(self: _File, index: int, count: int) -> None:
        """Any slots that are not mapped."""
        self.ioctl(xen_gntdev.UNMAP_GRANT_REF, bytearray(xen_gntdev.UNMAP_2007.pack(index, count)))
