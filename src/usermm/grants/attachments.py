"""The pools of other domains that this one is attached to, found by a reference."""

from __future__ import annotations

import threading

from usermm.grants.pools import GranteePool
from usermm.hypercalls.pools import BLOCK_BITS

_MOST = 256  # then the oldest goes; it is attached again if it is needed


class Attachments:
    """Any thread may call anything."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, int], GranteePool] = {}
        self._lock = threading.RLock()

    def find(self, domid: int, reference: int) -> GranteePool | None:
        """The pool that has this reference in its block."""
        return self._pools.get((domid, reference >> BLOCK_BITS))

    def add(self, domid: int, reference: int, pool: GranteePool) -> GranteePool:
        """Remembers `pool`, or returns the one that another thread attached meanwhile."""
        with self._lock:
            known = self._pools.setdefault((domid, reference >> BLOCK_BITS), pool)
            if known is not pool:
                pool.drop()
            elif len(self._pools) > _MOST:
                self._pools.pop(next(iter(self._pools))).drop()
            return known

    def drop_those_that_are_over(self) -> None:
        """They take memory, and count on quotas."""
        with self._lock:
            for key in [key for key, pool in self._pools.items() if pool.is_over]:
                self._pools.pop(key).drop()

    def close(self) -> None:
        """Drops them all."""
        with self._lock:
            while self._pools:
                self._pools.popitem()[1].drop()
