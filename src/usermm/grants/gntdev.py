"""`Gntdev`: other domains' pages in this process, over the device's calls, wherever the device is."""

from __future__ import annotations

import itertools
import mmap as _mmap
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from usermm._core import Memory, buffer_range
from usermm.errors import ArgumentError, ArgumentTypeError, DeviceError
from usermm.grants.arguments import each_of, unsigned
from usermm.grants.device import Device
from usermm.grants.files import PAGE_BYTES, GntdevFile, Reference
from usermm.grants.local_gntdev import MappedGrants
from usermm.uapi import xen_gntdev as abi
from usermm.uapi.xen_gntdev import GrantStatus

Personality = Literal["mainline", "seed2007"]
_GRANTED_FIELDS = 3
_MORE = abi.MOST_GRANTS + 1  # than the device takes, which refuses them


class Mapping(MappedGrants):
    """Granted pages, mapped: a buffer, read-only unless asked otherwise and allowed.

    `references`: (domid, reference) of each page; `index`: where they are in the device file; `address`: of the first
    byte, in this process.

    close(), or the last reference's end, unmaps them and forgets the references.
    """

    _device: Gntdev | None = None
    index: int = -1
    """Where they are in the device file."""
    references: Sequence[Reference] = ()
    """(domid, reference) of each page."""


@dataclass(slots=True)
class Copy:
    """One segment of `Gntdev.copy`: `length` bytes, at most a page, from `source` to `destination`.

    Each is (domid, reference, offset in its page in bytes), or memory of this process: a buffer of at least `length`
    bytes, writable if it is the destination. One of the two is a grant.
    """

    source: object
    destination: object
    length: int


class Gntdev(Device[GntdevFile]):
    """An open gntdev file. Any thread may call anything."""

    def __init__(self, file: GntdevFile, personality: Personality = "mainline") -> None:
        super().__init__(file)
        self.personality: Personality = personality
        """Which device's contract: Linux' of today, or that of 2007."""

    def map(self, domid: int, references: int | Iterable[int], *, writable: bool = False) -> Mapping:
        """Maps pages that domain `domid` granted, side by side in this order: all or none.

        Raises BadReferenceError (EINVAL; of 2007 LimitError, ENOMEM) when one is not granted to this domain, has ended,
        or is read-only and `writable` is asked for; QuotaError and LimitError when something ran out.
        """
        numbers = references if hasattr(references, "__iter__") else (references,)
        return self.map_many([(domid, number) for number in itertools.islice(numbers, _MORE)], writable=writable)

    def map_many(self, references: Iterable[Reference], *, writable: bool = False) -> Mapping:
        """As `map`, for pages of several domains: (domid, reference) each."""
        wanted = _checked(itertools.islice(each_of(references, "gntdev: map_many"), _MORE))
        mapping: Mapping
        mapping, index = self._file.map(wanted, writable=writable, kind=Mapping)
        mapping._device, mapping.index, mapping.references = self, index, wanted
        return mapping

    def map_grant_ref(self, references: Sequence[Reference]) -> int:
        """MAP_GRANT_REF: the index to map them at. They are looked at when they are mapped, not now."""
        return self._file.map_grant_ref(_checked(each_of(references, "gntdev: map_grant_ref")))

    def mmap(
        self, index: int, count: int, prot: int = _mmap.PROT_READ, flags: int = _mmap.MAP_SHARED
    ) -> Memory:
        """Maps `count` pages at `index`; `prot` PROT_READ alone maps them read-only. Errors: see the personality."""
        length = unsigned(count, 32, "mmap: count") * PAGE_BYTES
        how = unsigned(prot, 31, "mmap: prot"), unsigned(flags, 31, "mmap: flags")
        memory: Memory = self._file.mmap(length, *how, unsigned(index, 63, "mmap: index"))
        return memory

    def unmap_grant_ref(self, index: int, count: int) -> None:
        """UNMAP_GRANT_REF: forgets what map_grant_ref gave. Of 2007 EBUSY while it is mapped."""
        where = unsigned(index, 63, "unmap_grant_ref: index")
        self._file.unmap_grant_ref(where, unsigned(count, 32, "unmap_grant_ref: count"))

    def get_offset_for_vaddr(self, address: int) -> tuple[int, int]:
        """GET_OFFSET_FOR_VADDR: (index, count of pages) of the mapping at `address`; of 2007 only of its first byte."""
        layout = abi.OFFSET if self.personality == "mainline" else abi.OFFSET_2007
        argument = bytearray(layout.pack(unsigned(address, 64, "get_offset_for_vaddr: address"), 0, 0))
        self._file.ioctl(abi.GET_OFFSET_FOR_VADDR, argument)
        _, index, count = layout.unpack_from(argument)
        return int(index), int(count)

    def set_unmap_notify(self, index: int, *, clear_byte: bool = False, port: int | None = None) -> None:
        """Once the mapping is gone, also by this process's death: clear the byte that `index` (a page's plus an offset
        within it) names, send an event through `port`, or both; neither takes it back."""
        action = abi.NOTIFY_CLEAR_BYTE * clear_byte | abi.NOTIFY_SEND_EVENT * (port is not None)
        where = unsigned(index, 64, "set_unmap_notify: index")
        through = unsigned(port or 0, 32, "set_unmap_notify: port")
        self._file.ioctl(abi.SET_UNMAP_NOTIFY, bytearray(abi.NOTIFY.pack(where, action, through)))

    def copy(self, segments: Iterable[Copy]) -> list[GrantStatus]:
        """Copies without mapping; the status of each segment, in order. Segments before a failing one are done.

        Raises BadReferenceError (EINVAL) when one has no grant at either end or crosses a page: then nothing is done.
        """
        wanted = list(each_of(segments, "gntdev: copy"))
        packed = bytearray(b"".join(_segment(each) for each in wanted))
        argument = bytearray(abi.COPY.pack(len(wanted), buffer_range(packed)[0] if packed else 0))
        self._file.ioctl(abi.GRANT_COPY, argument)
        return [GrantStatus(status) for *_, status in abi.SEGMENT.iter_unpack(packed)]

    def _forget(self, mapping: Mapping, *, wait: bool) -> None:  # noqa: ARG002 - no file of the device waits
        try:
            self._file.unmap_grant_ref(mapping.index, len(mapping.references))
        except DeviceError:
            return  # the file is closed, which forgets it


def _checked(references: Iterable[Reference]) -> tuple[Reference, ...]:
    """As ints, whatever kind of numbers they are."""
    packed = []
    for reference in references:
        try:
            packed.append(abi.REFERENCE.pack(*reference))
        except (TypeError, struct.error):
            text = f"gntdev: map({reference!r:.60}): references are pairs of u32: (domid, reference)"
            raise ArgumentError(text) from None
    return tuple(abi.REFERENCE.iter_unpack(b"".join(packed)))


def _segment(wanted: Copy) -> bytes:
    if not isinstance(wanted, Copy):
        raise ArgumentTypeError(f"gntdev: copy: segments are Copy(source, destination, length), not {type(wanted)!r}")
    length = unsigned(wanted.length, 16, "gntdev: copy: length")
    flags, ends = 0, []
    for bit, end in ((abi.COPY_SOURCE_GRANTED, wanted.source), (abi.COPY_DEST_GRANTED, wanted.destination)):
        if isinstance(end, tuple):
            flags |= bit
            ends.append(_granted(end))
        else:
            ends.append(abi.COPY_LOCAL.pack(_address(end, length, writable=bit == abi.COPY_DEST_GRANTED)))
    return abi.SEGMENT.pack(*ends, length, flags, 0)


def _granted(end: tuple[int, ...]) -> bytes:
    if len(end) != _GRANTED_FIELDS:
        raise ArgumentError(f"gntdev: copy: {end!r:.60}: a grant is (domid, reference, offset in its page)")
    domid, reference, offset = end
    return abi.COPY_GRANTED.pack(
        unsigned(reference, 32, "gntdev: copy: reference"),
        unsigned(offset, 16, "gntdev: copy: offset"),
        unsigned(domid, 16, "gntdev: copy: domid"),
    )


def _address(buffer: object, length: int, *, writable: bool) -> int:
    address, size = buffer_range(buffer)
    if size < length or (writable and memoryview(buffer).readonly):  # type: ignore[arg-type] # it was a buffer above
        kind = "writable buffer" if writable else "buffer"
        raise ArgumentError(f"gntdev: copy: a {kind} of {length} bytes at least is needed, not {buffer!r:.60}")
    return address
