"""Mapped grants of others: what the hypervisor is told when they are let go."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from usermm.grants.pools import GranteePool
from usermm.grants.session import Session
from usermm.grants.watched_memory import WatchedMemory
from usermm.hypercalls import grants as layouts
from usermm.hypercalls.pools import POOL_UNMAPPED
from usermm.hypercalls.wire import LONGEST_REQUEST_BYTES, REQUEST, Operation

_MOST_HANDLES = (LONGEST_REQUEST_BYTES - REQUEST.size) // layouts.HANDLE.size


def packed_handles(handles: Iterable[int]) -> Iterator[bytes]:
    """As many as one message takes, each time."""
    rest = iter(handles)
    while payload := b"".join(map(layouts.HANDLE.pack, itertools.islice(rest, _MOST_HANDLES))):
        yield payload


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

    @property
    def is_mapped(self) -> bool:
        """Whether any of it is still mapped where it was; a forked child has none of it."""
        return not (self._session is not None and self._session.is_inherited) and super().is_mapped

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
        if pool is not None:
            self._tell(Operation.POOL_UNMAPPED, POOL_UNMAPPED.pack(pool.handle, self._pool_page), wait)
            return
        for payload in packed_handles(handle for handle, _ in self.handles):
            self._tell(Operation.UNMAPPED, payload, wait)

    def _tell(self, operation: Operation, payload: bytes, wait: bool) -> None:
        assert self._session is not None
        if wait and self._is_notified:  # on return the notification was carried out
            self._session.say(operation, payload)
        else:
            self._session.tell(operation, payload)
