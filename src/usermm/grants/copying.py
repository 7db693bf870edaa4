"""GRANT_COPY: between granted pages and this process's memory, without mapping them.

The bytes go by pread(2) and pwrite(2) on the extent's descriptor: the page need not be mapped, and what its grantor
revoked reads as zeros.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass

from usermm.errors import grant_refused
from usermm.grants import user_memory
from usermm.grants.files import PAGE_BYTES
from usermm.grants.foreign import Foreign, Segment
from usermm.grants.session import Refusal
from usermm.hypercalls.wire import DOMID_SELF
from usermm.uapi import xen_gntdev as abi
from usermm.uapi.xen_gntdev import GrantStatus

_MOST_OPEN = 64
_BOTH = abi.COPY_SOURCE_GRANTED | abi.COPY_DEST_GRANTED


@dataclass(frozen=True, slots=True)
class _Place:
    """One end of a segment: granted memory (domid, reference, offset in its page) or an address of this process."""

    granted: bool
    domid: int
    reference: int
    offset_or_address: int


class _CopyError(Exception):
    def __init__(self, status: GrantStatus) -> None:
        super().__init__(status)
        self.status = status


def copy_segments(foreign: Foreign, segments: bytearray, call: str) -> None:
    """Carries out the segments in order and writes each one's status into it.

    Of an empty one nothing is looked at, and it is okay. Raises BadReferenceError (EINVAL) for a segment that is no
    copy between domains or crosses a page, before anything is copied; GrantError (EFAULT) for an address that is not
    this process's, where those before it are done.
    """
    parsed = [_parse(fields, call) for fields in abi.SEGMENT.iter_unpack(segments)]
    with _Pages(foreign) as pages:
        for number, (source, destination, length, flags) in enumerate(parsed):
            at = number * abi.SEGMENT.size
            try:
                if length:
                    _write(pages, destination, _read(pages, source, length, call), call)
                status = GrantStatus.OKAY
            except _CopyError as failed:
                status = failed.status
            raw_source, raw_destination, *_ = abi.SEGMENT.unpack_from(segments, at)
            abi.SEGMENT.pack_into(segments, at, raw_source, raw_destination, length, flags, status)


def _parse(fields: tuple[bytes, bytes, int, int, int], call: str) -> tuple[_Place, _Place, int, int]:
    source, destination, length, flags, _ = fields
    places = _place(source, flags & abi.COPY_SOURCE_GRANTED), _place(destination, flags & abi.COPY_DEST_GRANTED)
    if not flags & _BOTH:  # others mean nothing
        raise grant_refused(errno.EINVAL, f"{call}: flags {flags:#x}: one end at least is a grant (1 source, 2 dest)")
    for place in places:
        if place.granted and place.offset_or_address + length > PAGE_BYTES:
            text = f"{call}: {length} bytes from byte {place.offset_or_address} cross the page: split the segment"
            raise grant_refused(errno.EINVAL, text)
    return *places, length, flags


def _place(raw: bytes, granted: int) -> _Place:
    if granted:
        reference, offset, domid = abi.COPY_GRANTED.unpack(raw)
        return _Place(True, domid, reference, offset)
    (address,) = abi.COPY_LOCAL.unpack(raw)
    return _Place(False, 0, 0, address)


class _Pages:
    """Descriptors of the pages that this call needs: those of the last few are kept."""

    def __init__(self, foreign: Foreign) -> None:
        self._foreign = foreign
        self._open: dict[tuple[int, int, bool], tuple[Segment, contextlib.ExitStack]] = {}

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *exception: object) -> None:
        while self._open:
            self._open.popitem()[1][1].close()

    def at(self, place: _Place, *, writable: bool) -> tuple[int, int]:
        """(descriptor, offset in bytes in its file) of the place."""
        domid = self._foreign.domid if place.domid == DOMID_SELF else place.domid
        key = domid, place.reference, writable
        found = self._open.pop(key, None)
        if found is None:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)))[1].close()  # the one that was used longest ago
            found = self._opened(*key)
        self._open[key] = found
        return found[0].descriptor, found[0].page * PAGE_BYTES + place.offset_or_address

    def _opened(self, domid: int, reference: int, writable: bool) -> tuple[Segment, contextlib.ExitStack]:
        end = contextlib.ExitStack()
        try:
            return end.enter_context(self._foreign.page(domid, reference, writable=writable)), end
        except Refusal as refusal:
            raise _CopyError(GrantStatus(refusal.status or GrantStatus.GENERAL_ERROR)) from None


def _read(pages: _Pages, place: _Place, length: int, call: str) -> bytes:
    if not place.granted:
        return user_memory.read(place.offset_or_address, length, call)
    descriptor, offset = pages.at(place, writable=False)
    data = os.pread(descriptor, length, offset)
    if len(data) != length:  # no extent of ours ends before; another kind of file could
        raise _CopyError(GrantStatus.GENERAL_ERROR)
    return data


def _write(pages: _Pages, place: _Place, data: bytes, call: str) -> None:
    if not place.granted:
        user_memory.write(place.offset_or_address, data, call)
        return
    descriptor, offset = pages.at(place, writable=True)
    try:
        os.pwrite(descriptor, data, offset)
    except OSError:
        raise _CopyError(GrantStatus.GENERAL_ERROR) from None
