"""Granted memory that knows what somebody else in this process did to its mapping, and never unmaps what is another's.

Where no userfaultfd watches it (a real Xen's pages; a process that may not have one) /proc/self/maps is looked at.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self

from usermm._core import Memory
from usermm.errors import ArgumentError, grant_refused
from usermm.grants.files import PAGE_BYTES
from usermm.grants.watching import Watching
from usermm.uapi import procfs

FileName = tuple[int, int]
"""st_dev and st_ino, by which /proc/self/maps names files too."""
_libc = ctypes.CDLL(None, use_errno=True)


def file_of(descriptor: int) -> FileName:
    """What the kernel calls the file that is open there."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


class Forgetful(Protocol):
    """A device that keeps account of what it made."""

    def _forget(self, memory: Any, /, *, wait: bool) -> None:
        """Without `wait` it never waits for another thread. Never fails."""


class WatchedMemory(Memory):
    """Granted memory that knows when it was unmapped behind its back."""

    _watching: Watching | None = None
    _cookie: int | None = None
    _is_whole = True
    _is_unsure = False
    """Whether something happened to it, and nobody could look yet."""
    _files: frozenset[FileName] = frozenset()
    """What it maps; none for a part of something that is mapped once."""
    _pool_mapping: PoolMapping | None = None
    """Of which this is a page: that one is watched, and unmapped in the end."""
    _device: Forgetful | None = None
    """Who is told when it is let go: the device that made it."""

    def watch(self, watching: Watching | None, files: frozenset[FileName]) -> None:
        """From here on `is_mapped` is exact. `files` are those that it maps."""
        self._watching = watching
        self._files = files
        self._watch()

    def _watch(self) -> None:
        start, end = self._range()
        if self._watching is not None and start != end:
            self._cookie = self._watching.add(self, start, end - start)

    @property
    def is_mapped(self) -> bool:
        """Whether any of it is still mapped where it was; exact for this thread's own calls (see Ummunotify)."""
        self._settle()
        start, _ = self._range()
        pool = self._pool_mapping
        return bool(start) and (pool is None or pool.has(start))

    def _settle(self) -> None:
        if self._watching is not None:
            self._watching.settle()
        if self._files and (self._is_unsure or self._cookie is None) and not self.closed:
            self.hit()

    def close(self) -> None:
        """Unmaps it. Raises BufferError while somebody has a buffer of it. May be called again.

        OSError (EMFILE): something was unmapped or mapped over, and no descriptor is free to see what is left.
        """
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        self._settle()
        if not self.closed:
            if self.exports:
                raise BufferError(f"close({len(self)} bytes): a view of it exists: release it first")
            if self._end():
                self._pool_mapping = None  # it is not kept mapped for an object that is closed
                self._let_go(wait=wait)
        self._tell_device(wait=wait)

    def _end(self) -> bool:
        """Whether this call unmapped it: of several threads, and of those who are told that it was hit, one does."""
        if self._is_whole and not self._is_unsure:
            self._unwatch(still_mapped=True)
            return self.unmap()
        pieces = list(self._pieces())
        ended = self.abandon()
        for start, end in pieces if ended else ():
            _libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(end - start))
        self._unwatch(still_mapped=False)
        return ended

    def _tell_device(self, *, wait: bool) -> None:
        device, self._device = self._device, None
        if device is not None:
            device._forget(self, wait=wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def keep(self, offset: int, length: int) -> None:
        """From here on these bytes are this process's own, at the same address; nobody else's memory any more.

        Raises LimitError (ENOMEM, EMFILE); then nothing was changed, or a part of what somebody tore.
        """
        if not self.is_mapped:
            return
        mapping = self if self._pool_mapping is None else self._pool_mapping
        first, end = self.address + offset, self.address + offset + length
        whole = [(first, end)] if self._is_whole else self._pieces()
        for start, stop in [(max(first, start), min(end, stop)) for start, stop in whole]:
            if start < stop:  # elsewhere somebody has mapped something else
                mapping._exchange(self, start, stop - start)

    def _exchange(self, part: WatchedMemory, start: int, length: int) -> None:
        """Bytes of `part`, which is this memory or a part of it, for a file of this process's own, known by its name
        as the others are."""
        try:
            file = os.memfd_create("usermm:kept", os.MFD_CLOEXEC)
        except OSError as error:
            text = f"revoke({length} bytes): {error.strerror}: close some descriptors (ulimit -n)"
            raise grant_refused(error.errno or 0, text) from None
        try:
            os.ftruncate(file, length)
            self._unwatch(still_mapped=True)
            self._files |= {file_of(file)}
            part.detach(start - part.address, length, file)
        finally:
            os.close(file)
            self._is_unsure = True  # what others did while it was not watched
            self._watch()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing() or (self.closed and self._device is None):
            return  # the end of the process unmaps it, and modules that would be needed are gone
        try:
            self._close(wait=False)
        except BufferError:  # a view of it ends in the same collection: the memory is unmapped with both
            self._unwatch(still_mapped=True)
            self._let_go(wait=False)
            self._tell_device(wait=False)

    def _let_go(self, *, wait: bool) -> None:
        """For subclasses: it is unmapped, by close() or by somebody else. Without `wait` nothing may wait or fail."""

    def _unwatch(self, *, still_mapped: bool) -> None:
        if self._watching is not None and self._cookie is not None:
            cookie, self._cookie = self._cookie, None
            self._watching.forget(cookie, still_mapped=still_mapped)

    def hit(self) -> None:
        """For who watches it: looks what is left of it."""
        self._is_unsure = True
        try:
            pieces = list(self._pieces())
        except OSError:  # no descriptor is free to look with: the next call looks
            return
        self._is_unsure = False
        self._leave(pieces)

    def _leave(self, pieces: list[tuple[int, int]]) -> None:
        """Only these are left."""
        if pieces or self.closed:
            self._is_whole = sum(end - start for start, end in pieces) >= len(self)
            return
        ended = self.abandon()
        self._unwatch(still_mapped=False)
        if ended:
            self._let_go(wait=False)

    def _range(self) -> tuple[int, int]:
        """Of addresses; empty once it is closed, by another thread maybe."""
        try:
            start = self.address
        except ArgumentError:
            return 0, 0
        return start, start + len(self)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """What is still a grant's at these addresses; other memory may be mapped there by now."""
        start, end = self._range()
        if start == end:
            return
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            found = procfs.overlapping(lines, start, end)
        for mapping in found:
            if (os.makedev(*mapping.device), mapping.inode) in self._files:
                yield max(start, mapping.start), min(end, mapping.end)


class PoolMapping(WatchedMemory):
    """All pages of a pool, mapped once: what is mapped of it later are parts."""

    _gone: frozenset[int] = frozenset()

    def has(self, address: int) -> bool:
        """Whether the page at `address` is still mapped."""
        self._settle()
        return address not in self._gone

    @property
    def is_torn(self) -> bool:
        """Whether somebody unmapped a page of it: new parts need a new mapping."""
        self._settle()
        return bool(self._gone)

    def _leave(self, pieces: list[tuple[int, int]]) -> None:
        there = {page for start, end in pieces for page in range(start, end, PAGE_BYTES)}
        self._gone = frozenset(range(*self._range(), PAGE_BYTES)) - there
        self._is_whole = not self._gone
