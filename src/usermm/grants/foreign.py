"""Pages of other domains: mapping them through the hypervisor, and copying without mapping."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from usermm.errors import grant_refused
from usermm.grants.files import PAGE_BYTES
from usermm.grants.session import Refusal, Session
from usermm.grants.watching import WatchedMemory, Watching
from usermm.hypercalls import grants as layouts
from usermm.hypercalls.wire import Operation

Reference = tuple[int, int]
"""domid of the grantor, reference."""


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
    """Mapped grants. `handles` name them to the hypervisor; each is (handle, pages), in the order of the pages."""

    handles: tuple[tuple[int, int], ...] = ()
    is_isolated = False
    """Whether neither side can reach the other's memory by other means: see Domain.is_isolated_from."""
    _session: Session | None = None

    def notify_on_unmap(self, page: int, offset_bytes: int, actions: int, port: int) -> None:
        """Sets, or with `actions` 0 takes back, what the hypervisor does once the page's mapping is gone."""
        assert self._session is not None
        for handle, pages in self.handles:
            if page < pages:
                payload = layouts.GRANTEE_NOTIFY.pack(handle, page, offset_bytes, actions, port)
                self._session.call(Operation.GRANTEE_NOTIFY, payload)
                return
            page -= pages
        raise AssertionError("a page outside the mapping")

    def _let_go(self) -> None:
        if self._session is not None:
            handles = b"".join(layouts.HANDLE.pack(handle) for handle, _ in self.handles)
            self._session.tell(Operation.UNMAPPED, handles)


Kind = TypeVar("Kind", bound=ForeignMemory)


class Foreign:
    """What a domain may do with others' grants."""

    def __init__(self, session: Session, watching: Watching) -> None:
        self._session = session
        self._watching = watching

    def map(self, references: Sequence[Reference], *, writable: bool, kind: type[Kind]) -> Kind:
        """All of them side by side, in this order, or none. Raises Refusal, LimitError (ENOMEM, EMFILE)."""
        segments = self.open(references, writable=writable)
        try:
            runs = [(part.descriptor, part.page * PAGE_BYTES, part.pages * PAGE_BYTES) for part in segments]
            # Private, so that a userfaultfd can watch it; a private mapping that is only read stays the file's page.
            memory = kind(runs, writable=writable, shared=writable, inherit=False)
            inodes = frozenset(os.fstat(part.descriptor).st_ino for part in segments)
        except BaseException:
            self.let_go(segments)
            raise
        _close(segments)
        memory._session = self._session
        memory.handles = tuple((part.handle, part.pages) for part in segments)
        memory.is_isolated = all(part.isolated for part in segments)
        memory.watch(self._watching, inodes)
        return memory

    def open(self, references: Sequence[Reference], *, writable: bool) -> list[Segment]:
        """Descriptors for the pages, to be closed by the caller: all or none. Raises Refusal."""
        runs = list(_runs(references))
        found: list[Segment] = []
        done = 0
        try:
            while runs:
                part = self._ask(runs[: layouts.MOST_RUNS], writable, done)
                found += part
                pages = sum(segment.pages for segment in part)
                done += pages
                runs = list(_without(runs, pages))
        except BaseException:
            self.let_go(found)
            raise
        return found

    def _ask(self, runs: list[tuple[int, int, int]], writable: bool, done: int) -> list[Segment]:
        flags = layouts.MAP_WRITABLE if writable else 0
        payload = layouts.MAP.pack(flags, 0, len(runs)) + b"".join(layouts.RUN.pack(*run) for run in runs)
        try:
            answer, descriptors = self._session.request(Operation.MAP, payload)
        except Refusal as refusal:
            refusal.index += done
            raise
        parts = layouts.SEGMENT.iter_unpack(answer[layouts.MAPPED.size :])
        return [
            Segment(handle, descriptor, page, pages, bool(bits & layouts.WRITABLE), bool(bits & layouts.ISOLATED))
            for descriptor, (handle, page, pages, bits) in zip(descriptors, parts, strict=True)
        ]

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
