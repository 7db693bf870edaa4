"""Pages of other domains: mapping them through the hypervisor, and copying without mapping."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from usermm.errors import DeviceError, grant_refused
from usermm.grants.attachments import Attachments
from usermm.grants.files import PAGE_BYTES, Reference
from usermm.grants.pools import GranteePool
from usermm.grants.session import Refusal, Session
from usermm.grants.watching import WatchedMemory, Watching, file_of
from usermm.hypercalls import grants as layouts
from usermm.hypercalls.pools import POOL_UNMAPPED, page_of
from usermm.hypercalls.wire import Operation
from usermm.uapi.xen_gntdev import GrantStatus


class Segment(NamedTuple):
    """Pages of one extent, consecutive in its file, by an open file of their own."""

    handle: int
    descriptor: int
    page: int
    pages: int
    writable: bool
    """Whether the grant is; the descriptor is what was asked for."""
    isolated: bool


class ForeignMemory(WatchedMemory):
    """Mapped grants. `handles` name them to the hypervisor; each is (handle, pages), in the order of the pages.

    A single page can be of a pool: then its handle is the whole pool's.
    """

    handles: tuple[tuple[int, int], ...] = ()
    _pool: GranteePool | None = None
    _pool_page = 0
    _is_notified = False
    is_isolated = False
    """Whether neither side can reach the other's memory by other means: see Domain.is_isolated_from."""
    _session: Session | None = None

    def notify_on_unmap(self, page: int, offset_bytes: int, actions: int, port: int) -> None:
        """Sets, or with `actions` 0 takes back, what the hypervisor does once the page's mapping is gone."""
        assert self._session is not None
        self._is_notified = True
        if self._pool is not None:
            payload = layouts.GRANTEE_NOTIFY.pack(self._pool.handle, self._pool_page, offset_bytes, actions, port)
            self._session.call(Operation.GRANTEE_NOTIFY, payload)
            return
        for handle, pages in self.handles:
            if page < pages:
                payload = layouts.GRANTEE_NOTIFY.pack(handle, page, offset_bytes, actions, port)
                self._session.call(Operation.GRANTEE_NOTIFY, payload)
                return
            page -= pages
        raise AssertionError("a page outside the mapping")

    def _let_go(self, *, wait: bool) -> None:
        pool, self._pool = self._pool, None
        if self._session is None or self._session.is_inherited:  # the parent has it mapped
            return
        if pool is not None:
            pool.release(self._pool_page)
            if not self._is_notified:
                return
        operation, payload = Operation.UNMAPPED, b"".join(layouts.HANDLE.pack(handle) for handle, _ in self.handles)
        if pool is not None:
            operation, payload = Operation.POOL_UNMAPPED, POOL_UNMAPPED.pack(pool.handle, self._pool_page)
        if wait and self._is_notified:
            with contextlib.suppress(DeviceError):  # it is unmapped; who is gone does not carry out notifications
                self._session.call(operation, payload)
        else:
            self._session.tell(operation, payload)


_LAST_U16 = 0xFFFF
Kind = TypeVar("Kind", bound=ForeignMemory)


class Foreign:
    """What the domain `domid` may do with others' grants."""

    def __init__(self, session: Session, watching: Watching, domid: int) -> None:
        self.domid = domid
        self._session = session
        self._watching = watching
        self._attachments = Attachments()

    def close(self) -> None:
        """The domain ends: nothing more is mapped."""
        self._attachments.close()

    def map(self, references: Sequence[Reference], *, writable: bool, kind: type[Kind]) -> Kind:
        """All of them side by side, in this order, or none. Raises Refusal, LimitError (ENOMEM, EMFILE)."""
        segments: list[Segment] = []
        if len(references) == 1:
            pool, segments = self._look_up(*references[0], writable=writable)
            if pool is not None:
                return self._map_pooled(pool, page_of(references[0][1]), writable=writable, kind=kind)
        segments = segments or self.open(references, writable=writable)
        try:
            runs = [(part.descriptor, part.page * PAGE_BYTES, part.pages * PAGE_BYTES) for part in segments]
            # Private, so that a userfaultfd can watch it; a private mapping that is only read stays the file's page.
            memory = kind(runs, writable=writable, shared=writable, inherit=False)
            files = frozenset(file_of(part.descriptor) for part in segments)
        except BaseException:
            self.let_go(segments)
            raise
        _close(segments)
        memory._session = self._session
        memory.handles = tuple((part.handle, part.pages) for part in segments)
        memory.is_isolated = all(part.isolated for part in segments)
        memory.watch(self._watching, files)
        return memory

    def _look_up(self, domid: int, reference: int, *, writable: bool) -> tuple[GranteePool | None, list[Segment]]:
        """The pool that has the page, which is marked as mapped then; or what the hypervisor gave, if it gave
        something."""
        pool = self._attachments.find(domid, reference)
        segments: list[Segment] = []
        if pool is None:
            pool, segments = self._attach(domid, reference, writable=writable)
        else:
            self._session.check()
        if pool is None or (writable and not pool.writable):
            return None, segments
        if pool.hold(reference):
            return pool, []
        self._attachments.forget(domid, reference)  # ended, or its grantor is gone and the number is another's now
        return None, []

    def _attach(self, domid: int, reference: int, *, writable: bool) -> tuple[GranteePool | None, list[Segment]]:
        self._attachments.drop_those_that_are_over()
        answer, descriptors = self._request([(domid, reference, 1)], writable, layouts.MAP_ATTACH, 0)
        handle, _, _, bits = layouts.SEGMENT.unpack_from(answer, layouts.MAPPED.size)
        if not bits & layouts.ATTACHED:
            return None, _segments(answer, descriptors)
        isolated = bool(bits & layouts.ISOLATED)
        may_write = bool(bits & layouts.WRITABLE)
        pool = GranteePool(handle, descriptors, self._watching, writable=may_write, is_isolated=isolated)
        return self._attachments.add(domid, reference, pool), []

    def _map_pooled(self, pool: GranteePool, page: int, *, writable: bool, kind: type[Kind]) -> Kind:
        try:
            whole = pool.mapping(writable=writable)
            memory = kind.part(whole, page * PAGE_BYTES, PAGE_BYTES)
        except BaseException:
            pool.release(page)
            raise
        memory._session, memory._pool, memory._pool_page = self._session, pool, page
        memory.handles = ((pool.handle, 1),)
        memory.is_isolated = pool.is_isolated
        memory._watching, memory._pool_mapping = self._watching, whole
        return memory

    def open(self, references: Sequence[Reference], *, writable: bool) -> list[Segment]:
        """Descriptors for the pages, to be closed by the caller: all or none. Raises Refusal."""
        runs = list(_runs(references))
        found: list[Segment] = []
        done = 0
        try:
            while runs:
                part = _segments(*self._request(runs[: layouts.MOST_RUNS], writable, 0, done))
                found += part
                pages = sum(segment.pages for segment in part)
                done += pages
                runs = list(_without(runs, pages))
        except BaseException:
            self.let_go(found)
            raise
        return found

    def _request(
        self, runs: list[tuple[int, int, int]], writable: bool, flags: int, done: int
    ) -> tuple[bytes, list[int]]:
        flags |= layouts.MAP_WRITABLE if writable else 0
        at = done
        for domid, _, count in runs:
            if domid > _LAST_U16:  # the ABI has room for them, and nobody has such a number
                text = f"map(domain {domid}): there is no such domain: its number comes from the one who grants"
                raise Refusal(errno.EINVAL, GrantStatus.BAD_DOMAIN, at, text)
            at += count
        payload = layouts.MAP.pack(flags, 0, len(runs)) + b"".join(layouts.RUN.pack(*run) for run in runs)
        try:
            return self._session.request(Operation.MAP, payload)
        except Refusal as refusal:
            refusal.index += done
            raise

    def check_notification(self, offset_bytes: int, actions: int, port: int, call: str) -> None:
        """Raises BadReferenceError (EINVAL) in the name of `call` for what no mapping could be notified of."""
        try:
            payload = layouts.GRANTEE_NOTIFY.pack(0, 0, offset_bytes, actions, port)
            self._session.request(Operation.GRANTEE_NOTIFY, payload)
        except Refusal as refusal:
            raise grant_refused(refusal.errno, f"{call}: {refusal.reason}") from None

    def let_go(self, segments: list[Segment]) -> None:
        """Closes what open() gave."""
        _close(segments)
        if segments:
            handles = b"".join(layouts.HANDLE.pack(part.handle) for part in segments)
            self._session.tell(Operation.UNMAPPED, handles)


def _segments(answer: bytes, descriptors: list[int]) -> list[Segment]:
    parts = layouts.SEGMENT.iter_unpack(answer[layouts.MAPPED.size :])
    return [
        Segment(handle, descriptor, page, pages, bool(bits & layouts.WRITABLE), bool(bits & layouts.ISOLATED))
        for descriptor, (handle, page, pages, bits) in zip(descriptors, parts, strict=True)
    ]


def _close(segments: Iterable[Segment]) -> None:
    for part in segments:
        os.close(part.descriptor)


def _runs(references: Sequence[Reference]) -> Iterator[tuple[int, int, int]]:
    """(domid, first reference, count): consecutive references of one domain together."""
    start, count = references[0], 0
    for domid, reference in references:
        if (domid, reference) != (start[0], start[1] + count):
            yield *start, count
            start, count = (domid, reference), 0
        count += 1
    yield *start, count


def _without(runs: Iterable[tuple[int, int, int]], pages: int) -> Iterator[tuple[int, int, int]]:
    """The runs less the first `pages`."""
    for domid, first, count in runs:
        taken = min(pages, count)
        pages -= taken
        if taken < count:
            yield domid, first + taken, count - taken
