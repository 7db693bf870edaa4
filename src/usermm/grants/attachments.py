"""The pools of other domains that this one is attached to, found by a reference."""

from __future__ import annotations

import collections
import threading

from usermm.grants.pools import GranteePool
from usermm.hypercalls.pools import block_of

_MOST = 256  # then the one that was not used for longest goes; it is attached again if it is needed


class Attachments:
    """Any thread may call anything."""

    def __init__(self) -> None:
        self._pools: collections.OrderedDict[tuple[int, int], GranteePool] = collections.OrderedDict()
        self._lock = threading.RLock()

    def find(self, domid: int, reference: int) -> GranteePool | None:
        """The pool that has this reference in its block."""
        key = domid, block_of(reference)
        with self._lock:
            pool = self._pools.get(key)
            if pool is not None:
                self._pools.move_to_end(key)
            return pool

    def add(self, domid: int, reference: int, pool: GranteePool) -> GranteePool:
        """Remembers `pool`, or returns the one that another thread attached meanwhile."""
        with self._lock:
            known = self._pools.setdefault((domid, block_of(reference)), pool)
            if known is not pool:
                pool.drop()
            elif len(self._pools) > _MOST:
                self._pools.popitem(last=False)[1].drop()
            return known

    def forget(self, domid: int, reference: int) -> None:
        """It is not what it was: whoever asks next is attached anew."""
        with self._lock:
            pool = self._pools.pop((domid, block_of(reference)), None)
            if pool is not None:
                pool.drop()

    def close(self) -> None:
        """Drops them all."""
        with self._lock:
            while self._pools:
                self._pools.popitem()[1].drop()
