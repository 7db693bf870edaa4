"""`Gntalloc`: pages of one's own for another domain, over the device's calls, wherever the device is."""

from __future__ import annotations

import errno
import itertools
import mmap as _mmap
import weakref
from collections.abc import Iterable, Iterator, Sequence

from usermm._core import Memory
from usermm.errors import ArgumentError, BadReferenceError, grant_refused
from usermm.grants.alone import Alone, Rank
from usermm.grants.arguments import unsigned
from usermm.grants.device import Device
from usermm.grants.files import PAGE_BYTES, GntallocFile
from usermm.grants.local_gntalloc import GrantedPages, LocalGntalloc
from usermm.uapi import xen_gntalloc as abi


class Allocation(GrantedPages):
    """Pages that another domain may map: a writable buffer of this domain's. Keep it as long as they are to be granted.

    `domid`: who may map them; `references`: one for each page, which that one has to be told; `grantee_writes`: whether
    it may write; `index`: where they are in the device file.

    close(), or the last reference's end, unmaps and deallocates them: what the other domain has mapped stays there.
    """

    _device: Gntalloc | None = None
    domid: int = -1
    """Who may map them."""
    index: int = -1
    """Where they are in the device file."""
    references: Sequence[int] = ()
    """One for each page: what the other domain has to be told."""
    grantee_writes = False
    """Whether the other domain may write."""

    def _close(self, *, wait: bool) -> None:
        device, file = self._device, self._file
        try:
            super()._close(wait=wait)
        except BufferError:  # of somebody's view, or of revoke(), which has one for a moment: then it is waited for
            if not wait or device is None or file is None or file.is_inherited or device._alone.refuses:
                raise
            device._alone.run("close", lambda: super(Allocation, self)._close(wait=True))

    def _let_go(self, *, wait: bool) -> None:
        if not wait or self._device is None:  # else it is close(), which has the device forget all of it at once
            super()._let_go(wait=wait)

    def revoke(self) -> None:
        """Takes all pages back, whoever maps them; this domain keeps what is in them at the same address.

        Nobody maps them again, and who has them mapped reads zeros. What other threads write during the call can be
        lost. May be called again. Raises HypervisorGoneError: nothing was taken back; should it end during the call,
        the others may keep the pages as they were, while these here are this domain's own.
        """
        if self._device is not None and self.references:
            self._device._take_back(self, 0, len(self.references))


class Gntalloc(Device[GntallocFile]):
    """An open gntalloc file; closing it deallocates everything. Any thread may call anything."""

    def __init__(self, file: GntallocFile) -> None:
        super().__init__(file)
        self._alone = Alone(Rank.DEVICE)
        self._allocations: dict[int, weakref.ref[Allocation]] = {}

    def allocate(self, domid: int, count: int = 1, *, writable: bool = False) -> Allocation:
        """`count` zeroed pages that domain `domid` may map, read-only unless `writable`; writable here in any case.

        The domain need not be there yet. Raises QuotaError (ENOSPC) when the device's limit or a quota of the
        hypervisor is used up, PermissionDeniedError (EACCES) when its policy says no.
        """
        if type(domid) is not int or type(count) is not int or not (0 <= domid < 1 << 16 and 0 <= count < 1 << 24):
            domid, count = unsigned(domid, 16, "allocate: domid"), unsigned(count, 24, "allocate: count")
        flags = abi.WRITABLE if writable else 0
        memory: Allocation
        memory, index, references = self._file.allocate(domid, flags, count, Allocation)
        memory.domid, memory.index, memory.references, memory.grantee_writes = domid, index, references, writable
        memory._device = self
        found = weakref.ref(memory)
        for reference in references:
            self._allocations[reference] = found
        return memory

    def revoke(self, reference: int) -> None:
        """Takes one page back: whoever has mapped it reads zeros from now on, nobody maps it again.

        This domain keeps what is in it, at the same address, in memory of its own. What other threads write to the page
        during the call can be lost. Raises BadReferenceError (EINVAL) for a reference that allocate() of this file did
        not give, or that ended.
        """
        reference = unsigned(reference, 32, "revoke: reference")
        allocation = self._allocations.get(reference, lambda: None)()
        if allocation is None:
            raise grant_refused(errno.EINVAL, f"revoke(reference {reference}): this file granted no such page")
        self._take_back(allocation, allocation.references.index(reference), 1)

    def alloc_gref(self, domid: int, flags: int, count: int) -> tuple[int, Sequence[int]]:
        """ALLOC_GREF: the index to map them at, and the references. `flags` 1: the other domain may write."""
        domid, flags = unsigned(domid, 16, "alloc_gref: domid"), unsigned(flags, 16, "alloc_gref: flags")
        return self._file.alloc_gref(domid, flags, unsigned(count, 24, "alloc_gref: count"))

    def dealloc_gref(self, index: int, count: int) -> None:
        """DEALLOC_GREF: what is mapped, here or there, stays until it is unmapped. BadReferenceError (EINVAL)."""
        self._file.dealloc_gref(unsigned(index, 64, "dealloc_gref: index"), unsigned(count, 32, "dealloc_gref: count"))

    def mmap(
        self,
        index: int,
        count: int,
        prot: int = _mmap.PROT_READ | _mmap.PROT_WRITE,
        flags: int = _mmap.MAP_SHARED,
    ) -> Memory:
        """Maps `count` pages at `index`. BadReferenceError: ENOENT an index that was not given, EINVAL other flags."""
        length = unsigned(count, 32, "mmap: count") * PAGE_BYTES
        how = unsigned(prot, 31, "mmap: prot"), unsigned(flags, 31, "mmap: flags")
        memory: Memory = self._file.mmap(length, *how, unsigned(index, 63, "mmap: index"))
        return memory

    def set_unmap_notify(self, index: int, *, clear_byte: bool = False, port: int | None = None) -> None:
        """Once the page at `index` is released, also by this domain's death: clear the byte that `index` (a page's plus
        an offset within it) names, send an event through `port`, or both; neither takes it back."""
        action = abi.NOTIFY_CLEAR_BYTE * clear_byte | abi.NOTIFY_SEND_EVENT * (port is not None)
        where = unsigned(index, 64, "set_unmap_notify: index")
        through = unsigned(port or 0, 32, "set_unmap_notify: port")
        self._file.ioctl(abi.SET_UNMAP_NOTIFY, bytearray(abi.NOTIFY.pack(where, action, through)))

    def _take_back(self, allocation: Allocation, page: int, pages: int) -> None:
        file = self._file
        if not isinstance(file, LocalGntalloc):
            text = "a real Xen has no such call: end the grant by close(), which waits for the other domain"
            raise grant_refused(errno.EOPNOTSUPP, f"gntalloc: revoke: {text}")
        self._alone.run("revoke", lambda: self._take_back_live(file, allocation, page, pages))

    def _take_back_live(self, file: LocalGntalloc, allocation: Allocation, page: int, pages: int) -> None:
        live = [number for number in allocation.references[page : page + pages] if number in self._allocations]
        for run in _consecutive(live):
            try:
                file.revoke(run[0], len(run), allocation, run[0] - allocation.references[0])
            except (ArgumentError, BadReferenceError):
                if allocation.closed:  # by another thread meanwhile: nobody has more of it than it had
                    return
                raise
            for number in run:
                self._allocations.pop(number, None)

    def _forget(self, allocation: Allocation, *, wait: bool) -> None:
        for number in allocation.references:
            self._allocations.pop(number, None)
        parts = allocation._parts if wait else ()
        self._file.forget(allocation.index, len(allocation.references), parts, wait=wait)


def _consecutive(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Ascending numbers, in as few runs as they have."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda each: each[1] - each[0]):
        yield [number for _, number in run]

