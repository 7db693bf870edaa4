"""Pages of other domains: mapping them through the hypervisor, and copying without mapping."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from usermm.errors import LimitError, grant_refused
from usermm.grants.attachments import Attachments
from usermm.grants.files import PAGE_BYTES, Reference
from usermm.grants.foreign_memory import ForeignMemory, packed_handles
from usermm.grants.pools import GranteePool
from usermm.grants.session import Refusal, Session
from usermm.grants.watched_memory import FileName, file_of
from usermm.grants.watching import Watching
from usermm.hypercalls import grants as layouts
from usermm.hypercalls.pools import page_of
from usermm.hypercalls.wire import MOST_DESCRIPTORS, Operation
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
            memory = None if pool is None else self._map_pooled(pool, references[0][1], writable=writable, kind=kind)
            if memory is not None:
                return memory
        batches = iter([segments]) if segments else self._batches(references, writable=writable)
        return self._map_batches(batches, len(references) * PAGE_BYTES, writable=writable, kind=kind)

    def _map_batches(
        self, batches: Iterator[list[Segment]], length: int, *, writable: bool, kind: type[Kind]
    ) -> Kind:
        """Descriptors are closed as soon as their pages are mapped: a process may have few, and grants many."""
        memory: Kind | None = None
        done: list[Segment] = []
        files: set[FileName] = set()
        at = 0
        try:
            for segments in batches:
                done += segments
                try:
                    runs = [(part.descriptor, part.page * PAGE_BYTES, part.pages * PAGE_BYTES) for part in segments]
                    if memory is None:
                        # Private, so that a userfaultfd can watch it; one that is only read stays the file's pages.
                        memory = kind(runs, writable=writable, shared=writable, inherit=False, length=length)
                    else:
                        memory.fill(at, runs)
                    files.update(file_of(part.descriptor) for part in segments)
                finally:
                    _close(segments)
                at += sum(part.pages for part in segments) * PAGE_BYTES
        except BaseException:
            if memory is not None:
                memory.unmap()
            self._let_go(done)
            raise
        assert memory is not None, "there is at least one reference"
        memory._session = self._session
        memory.handles = tuple((part.handle, part.pages) for part in done)
        memory.is_isolated = all(part.isolated for part in done)
        memory.watch(self._watching, frozenset(files))
        return memory

    def _look_up(self, domid: int, reference: int, *, writable: bool) -> tuple[GranteePool | None, list[Segment]]:
        """The pool that has the page, which is marked as mapped then; or what the hypervisor gave, if it gave
        something."""
        pool = self._attachments.find(domid, reference)
        segments: list[Segment] = []
        if pool is not None and not pool.is_over:
            self._session.check()
        else:  # an ended one's number can be another domain's by now
            pool, segments = self._attach(domid, reference, writable=writable)
        if pool is None or (writable and not pool.writable):
            return None, segments
        return (pool, []) if pool.hold(reference) else (None, [])  # then the hypervisor says why

    def _attach(self, domid: int, reference: int, *, writable: bool) -> tuple[GranteePool | None, list[Segment]]:
        self._attachments.drop_those_that_are_over()
        answer, descriptors = self._request([(domid, reference, 1)], writable, layouts.MAP_ATTACH, 0)
        handle, _, _, bits = layouts.SEGMENT.unpack_from(answer, layouts.MAPPED.size)
        if not bits & layouts.ATTACHED:
            return None, _segments(answer, descriptors)
        isolated = bool(bits & layouts.ISOLATED)
        may_write = bool(bits & layouts.WRITABLE)
        try:
            pool = GranteePool(handle, descriptors, self._watching, writable=may_write, is_isolated=isolated)
        except BaseException:
            self._session.tell(Operation.UNMAPPED, layouts.HANDLE.pack(handle))
            raise
        return self._attachments.add(domid, reference, pool), []

    def _map_pooled(self, pool: GranteePool, reference: int, *, writable: bool, kind: type[Kind]) -> Kind | None:
        """None: the pool was dropped meanwhile."""
        page = page_of(reference)
        try:
            whole = pool.mapping(writable=writable)
            memory = None if whole is None else kind.part(whole, page * PAGE_BYTES, PAGE_BYTES)
        except BaseException:
            pool.release(page)
            raise
        if memory is None:
            pool.release(page)
            return None
        memory._session, memory._pool, memory._pool_page = self._session, pool, page
        memory.handles = ((pool.handle, 1),)
        memory.is_isolated = pool.is_isolated
        memory._watching, memory._pool_mapping = self._watching, whole
        return memory

    @contextlib.contextmanager
    def page(self, domid: int, reference: int, *, writable: bool) -> Iterator[Segment]:
        """One page by a descriptor. Raises Refusal."""
        segments = next(self._batches([(domid, reference)], writable=writable))
        try:
            yield segments[0]
        finally:
            _close(segments)
            self._let_go(segments)

    def _batches(self, references: Sequence[Reference], *, writable: bool) -> Iterator[list[Segment]]:
        """What they name, as much at a time as a reply has; its descriptors are the caller's. Raises Refusal.

        Where there is no room for the descriptors of a whole reply, less is asked for at a time.
        """
        runs = list(_runs(references))
        done, most = 0, len(references)
        while runs:
            try:
                part = _segments(*self._request(_first(runs, most)[: layouts.MOST_RUNS], writable, 0, done))
            except LimitError:
                if most == 1:
                    raise
                most = max(1, min(most, MOST_DESCRIPTORS) // 4)
                continue
            pages = sum(segment.pages for segment in part)
            done += pages
            runs = list(_without(runs, pages))
            yield part

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

    def _let_go(self, segments: list[Segment]) -> None:
        for payload in packed_handles(segment.handle for segment in segments):
            self._session.tell(Operation.UNMAPPED, payload)


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


def _first(runs: list[tuple[int, int, int]], pages: int) -> list[tuple[int, int, int]]:
    """The first `pages` of the runs."""
    found = []
    for domid, first, count in runs:
        if pages <= 0:
            break
        found.append((domid, first, min(pages, count)))
        pages -= count
    return found


def _without(runs: Iterable[tuple[int, int, int]], pages: int) -> Iterator[tuple[int, int, int]]:
    """The runs less the first `pages`."""
    for domid, first, count in runs:
        taken = min(pages, count)
        pages -= taken
        if taken < count:
            yield domid, first + taken, count - taken
