"""/dev/xen/gntalloc between Linux processes: pages of one's own that another domain may map.

The contract is that of Linux' drivers/xen/gntalloc.c as user space sees it: an allocation lives until it was
deallocated and the last of its pages is unmapped here; what the other domain has mapped lives on in it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap as _mmap
import os
from array import array
from collections.abc import Sequence

from usermm.errors import BadReferenceError, ClosedError, grant_refused
from usermm.grants.allocated import Allocated, Limit, left_of
from usermm.grants.alone import Alone, Rank
from usermm.grants.files import PAGE_BYTES
from usermm.grants.grantor_pools import GrantorPools
from usermm.grants.local_file import LocalFile, Requests
from usermm.grants.pools import GrantorPool
from usermm.grants.session import Session
from usermm.grants.watched_memory import WatchedMemory, file_of
from usermm.grants.watching import Watching
from usermm.hypercalls import grants as layouts
from usermm.hypercalls.pools import page_of
from usermm.hypercalls.wire import Operation
from usermm.uapi import xen_gntalloc as abi

Parts = tuple[tuple[Allocated, int, int], ...]
"""(allocation, its page, pages) each."""


class GrantedPages(WatchedMemory):
    """Pages of this domain's own, granted to another and mapped here."""

    is_isolated = False
    """Whether neither side can reach the other's memory by other means: see Domain.is_isolated_from."""
    _file: LocalGntalloc | None = None
    _parts: Parts = ()

    def _let_go(self, *, wait: bool) -> None:
        if self._file is not None:
            self._file.let_go(self._parts, wait=wait)


class LocalGntalloc(LocalFile):
    """An open gntalloc file. Any thread may call anything."""

    _device = "gntalloc"

    def __init__(self, session: Session, watching: Watching, limit: Limit) -> None:
        super().__init__()
        self._session = session
        self._watching = watching
        self._limit = limit
        self._alone = Alone(Rank.FILE)
        self._pages: dict[int, Allocated] = {}
        self._next_page = 0
        self._pools = GrantorPools(session, watching)

    def _make_requests(self) -> Requests:
        return {
            abi.ALLOC_GREF: self._alloc_gref,
            abi.DEALLOC_GREF: self._dealloc_gref,
            abi.SET_UNMAP_NOTIFY: self._set_unmap_notify,
        }

    def mmap(
        self, length: int, prot: int, flags: int, offset: int, kind: type[GrantedPages] = GrantedPages
    ) -> GrantedPages:
        """Maps pages of one or several allocations that have consecutive indices.

        EINVAL: not MAP_SHARED, not at a page; ENOENT: an index that was not given out, or is deallocated.
        """
        pages = -(-length // PAGE_BYTES)  # as mmap(2) rounds
        page, misplaced = divmod(offset, PAGE_BYTES)
        if not flags & _mmap.MAP_SHARED or pages <= 0 or misplaced:
            text = f"gntalloc: mmap({length} bytes at {offset:#x}): map whole pages, one or more, with MAP_SHARED"
            raise grant_refused(errno.EINVAL, text)
        return self._alone.run("mmap", lambda: self._mmap(page, pages, bool(prot & _mmap.PROT_WRITE), kind))

    def _mmap(self, page: int, pages: int, writable: bool, kind: type[GrantedPages]) -> GrantedPages:
        self._check_usable("mmap")
        one = self._pages.get(page) if pages == 1 and writable else None
        if one is not None and one.pool is not None:
            return self._part_of_pool(one, one.pool, kind)
        parts = self._find(page * PAGE_BYTES, pages, errno.ENOENT, "mmap")
        with contextlib.ExitStack() as unneeded:
            runs = [self._run(unneeded, *part) for part in parts]
            memory = kind(runs, writable=writable, shared=True, inherit=True)
            files = frozenset(file_of(descriptor) for descriptor, _, _ in runs)
        for allocated, first, many in parts:
            for at in range(first, first + many):
                allocated.users[at] += 1
        memory._file, memory._parts = self, parts
        memory.is_isolated = all(allocated.is_isolated for allocated, _, _ in parts)
        memory.watch(self._watching, files)
        return memory

    def revoke(self, reference: int, count: int, memory: GrantedPages, page: int) -> None:
        """Ends `count` consecutive references of one allocation and takes the pages from whoever maps them.

        `memory` maps them here, from its page `page` on: it keeps the content. Raises BadReferenceError.
        """
        self._check_usable("revoke")
        self._session.check_free("revoke")
        self._alone.run("revoke", lambda: self._revoke(reference, count, memory, page))

    def _revoke(self, reference: int, count: int, memory: GrantedPages, page: int) -> None:
        for allocated, _, _ in memory._parts:
            if allocated.pool is not None:  # then it is one page, which is not the pool's any more, whatever fails now
                allocated.is_revoked = True
        memory.keep(page * PAGE_BYTES, count * PAGE_BYTES)
        self._session.call(Operation.REVOKE, layouts.RANGE.pack(reference, count, 0))

    def close(self) -> None:
        """Deallocates everything; what is mapped stays until it is unmapped."""
        self._closed = True
        if not self.is_inherited:
            self._alone.finish(self._close, wait=True)

    def _close(self) -> None:
        for allocated in list(dict.fromkeys(self._pages.values())):
            for page in list(left_of(allocated, self._pages)):
                self._remove(allocated, *page)
        self._pools.close()

    def let_go(self, parts: Parts, *, wait: bool) -> None:
        """They are no longer mapped. Never fails; without `wait` it does not wait for other threads."""
        if not self.is_inherited:
            self._alone.finish(lambda: self._drop_all(parts), wait=wait)

    def forget(self, index: int, count: int, parts: Parts, *, wait: bool) -> None:
        """DEALLOC_GREF of what is not deallocated yet, and let_go of `parts`. As that."""
        if not self.is_inherited:
            self._alone.finish(lambda: self._forget(index, count, parts), wait=wait)

    def _forget(self, index: int, count: int, parts: Parts) -> None:
        self._drop_all(parts)
        with contextlib.suppress(BadReferenceError, ClosedError):  # it was deallocated before
            self._dealloc(index, count)

    def _alloc_gref(self, argument: bytearray | memoryview) -> None:
        domid, flags, count, _ = abi.ALLOC.unpack_from(argument)
        call = f"gntalloc: ALLOC_GREF({count} pages for domain {domid})"
        room = memoryview(argument)[abi.ALLOC.size :]
        if not count:
            raise grant_refused(errno.EINVAL, f"{call}: pass a count above 0")
        if len(room) < count * abi.REFERENCE.size:
            raise grant_refused(errno.EFAULT, f"{call}: only {len(room)} bytes for references came")
        index, references = self.alloc_gref(domid, flags, count)
        abi.ALLOC.pack_into(argument, 0, domid, flags, count, index)
        room[: count * abi.REFERENCE.size] = memoryview(array("I", references)).cast("B")

    def alloc_gref(self, domid: int, flags: int, count: int) -> tuple[int, Sequence[int]]:
        """ALLOC_GREF. QuotaError (ENOSPC), PermissionDeniedError (EACCES), BadReferenceError (EINVAL)."""
        allocated = self._alone.run("ALLOC_GREF", lambda: self._alloc(domid, flags, count))
        return allocated.index, allocated.references

    def allocate(
        self, domid: int, flags: int, count: int, kind: type[GrantedPages]
    ) -> tuple[GrantedPages, int, Sequence[int]]:
        """ALLOC_GREF and mmap. Errors of both."""
        def allocate() -> tuple[GrantedPages, int, Sequence[int]]:
            allocated = self._alloc(domid, flags, count)
            try:
                if allocated.pool is not None:
                    memory = self._part_of_pool(allocated, allocated.pool, kind)
                else:
                    memory = self._mmap(allocated.first_page, count, True, kind)
            except BaseException:
                self._dealloc(allocated.index, count)
                raise
            return memory, allocated.index, allocated.references

        return self._alone.run("ALLOC_GREF", allocate)

    def _alloc(self, domid: int, flags: int, count: int) -> Allocated:
        self._check_usable("ALLOC_GREF")
        self._limit.take(count, domid)
        try:
            return self._allocate(domid, bool(flags & abi.WRITABLE), count)
        except BaseException:
            self._limit.give_back(count)
            raise

    def _part_of_pool(self, allocated: Allocated, pool: GrantorPool, kind: type[GrantedPages]) -> GrantedPages:
        """It is mapped already: no system call."""
        memory = kind.part(pool.memory, page_of(allocated.first_reference) * PAGE_BYTES, PAGE_BYTES)
        allocated.users[0] += 1
        memory._file, memory._parts = self, ((allocated, 0, 1),)
        memory._watching, memory._pool_mapping = self._watching, pool.memory
        memory.is_isolated = allocated.is_isolated
        return memory

    def _allocate(self, domid: int, writable: bool, count: int) -> Allocated:
        page = self._next_page
        granted = self._pools.grant(domid, writable) if count == 1 else None
        if granted is not None:
            pool, reference = granted
            allocated = Allocated(page, reference, 1, None, pool.is_isolated, [1], pool=pool)
        else:
            wanted = layouts.ALLOCATE_WANT_DESCRIPTOR | (layouts.ALLOCATE_WRITABLE if writable else 0)
            answer, descriptors = self._session.call(Operation.ALLOCATE, layouts.ALLOCATE.pack(domid, wanted, count))
            first, bits = layouts.ALLOCATED.unpack(answer)
            isolated = bool(bits & layouts.ISOLATED)
            allocated = Allocated(page, first, count, descriptors[0], isolated, [1] * count)
        self._next_page += count
        if count == 1:
            self._pages[page] = allocated
        else:
            self._pages.update(dict.fromkeys(range(page, page + count), allocated))
        return allocated

    def _dealloc_gref(self, argument: bytearray | memoryview) -> None:
        self.dealloc_gref(*abi.DEALLOC.unpack_from(argument))

    def dealloc_gref(self, index: int, count: int) -> None:
        """DEALLOC_GREF. BadReferenceError (EINVAL)."""
        self._alone.run("DEALLOC_GREF", lambda: self._dealloc(index, count))

    def _dealloc(self, index: int, count: int) -> None:
        self._check_usable("DEALLOC_GREF")
        for part in self._find(index, count, errno.EINVAL, "DEALLOC_GREF"):
            self._remove(*part)

    def _set_unmap_notify(self, argument: bytearray | memoryview) -> None:
        index, actions, port = abi.NOTIFY.unpack_from(argument)
        self._alone.run("SET_UNMAP_NOTIFY", lambda: self._notify(index, actions, port))

    def _notify(self, index: int, actions: int, port: int) -> None:
        ((allocated, page, _),) = self._find(index - index % PAGE_BYTES, 1, errno.ENOENT, "SET_UNMAP_NOTIFY")
        if actions & ~(abi.NOTIFY_CLEAR_BYTE | abi.NOTIFY_SEND_EVENT):
            call = f"gntalloc: SET_UNMAP_NOTIFY(index {index:#x}, action {actions}, port {port})"
            raise grant_refused(errno.EINVAL, f"{call}: actions are 1 CLEAR_BYTE and 2 SEND_EVENT")
        reference = allocated.first_reference + page
        payload = layouts.GRANTOR_NOTIFY.pack(reference, index % PAGE_BYTES, actions, port)
        self._session.call(Operation.GRANTOR_NOTIFY, payload)
        allocated.is_notified = True

    def _find(self, index: int, count: int, missing: int, call: str) -> Parts:
        """(allocation, its page, pages) for `count` pages from `index`, or the errno `missing`."""
        page, misplaced = divmod(index, PAGE_BYTES)
        if count == 1 and not misplaced and (one := self._pages.get(page)) is not None:
            return ((one, page - one.first_page, 1),)
        end, found = page + count, []
        there = count and not misplaced
        while there and page < end:
            allocated = self._pages.get(page)
            if allocated is None:
                there = False
                break
            pages = min(end, allocated.first_page + allocated.count) - page
            there = pages == 1 or all(at in self._pages for at in range(page + 1, page + pages))
            found.append((allocated, page - allocated.first_page, pages))
            page += pages
        if there:
            return tuple(found)
        text = f"gntalloc: {call}({count} pages at {index:#x}): not all of it was given out by ALLOC_GREF, or it was "
        raise grant_refused(missing, text + "deallocated")

    def _run(
        self, unneeded: contextlib.ExitStack, allocated: Allocated, page: int, pages: int
    ) -> tuple[int, int, int]:
        """What to map for pages of an allocation; `unneeded` closes what is not needed once it is."""
        descriptor, allocated.descriptor = allocated.descriptor, None
        if descriptor is None:
            asked = layouts.RANGE.pack(allocated.first_reference + page, pages, 0)
            answer, (descriptor,) = self._session.call(Operation.OPEN_OWN, asked)
            (page,) = layouts.OPENED.unpack(answer)
        unneeded.callback(os.close, descriptor)
        return descriptor, page * PAGE_BYTES, pages * PAGE_BYTES

    def _remove(self, allocated: Allocated, page: int, pages: int) -> None:
        first = allocated.first_page + page
        for at in range(first, first + pages):
            del self._pages[at]
        allocated.removed += pages
        if allocated.removed == allocated.count and allocated.descriptor is not None:
            os.close(allocated.descriptor)
            allocated.descriptor = None
        self._drop(allocated, page, pages)

    def _drop_all(self, parts: Parts) -> None:
        for part in parts:
            self._drop(*part)

    def _drop(self, allocated: Allocated, page: int, pages: int) -> None:
        """One user less of each; pages without any are no longer granted."""
        users = allocated.users
        if allocated.count == 1:
            users[0] -= 1
            if not users[0]:
                self._release(allocated, 0, 1)
            return
        first = None
        for at in range(page, page + pages):
            users[at] -= 1
            if not users[at] and first is None:
                first = at
            if first is not None and (users[at] or at == page + pages - 1):
                end = at if users[at] else at + 1
                self._release(allocated, first, end - first)
                first = None

    def _release(self, allocated: Allocated, page: int, pages: int) -> None:
        self._limit.give_back(pages)
        pool = allocated.pool
        if pool is None or allocated.is_notified:
            self._session.tell(Operation.RELEASE, layouts.RANGE.pack(allocated.first_reference + page, pages, 0))
        if pool is not None:
            self._pools.end(pool, allocated.first_reference, is_revoked=allocated.is_revoked)
