"""The pools of one gntalloc file: which one the next single page comes from, and when they end."""

from __future__ import annotations

from usermm.errors import GrantError
from usermm.grants.pools import GrantorPool
from usermm.grants.session import Session
from usermm.grants.watching import Watching
from usermm.hypercalls import grants as layouts
from usermm.hypercalls import pools as pool_layouts
from usermm.hypercalls.wire import Operation

_Key = tuple[int, bool]
_MOST_KEYS = 256  # grantees and modes that are remembered


class GrantorPools:
    """The file's lock guards it. Who grants one page to somebody twice will do so again: then a pool is made."""

    def __init__(self, session: Session, watching: Watching) -> None:
        self._session = session
        self._watching = watching
        self._pools: dict[_Key, list[GrantorPool]] = {}
        self._is_closed = False

    def grant(self, domid: int, writable: bool) -> tuple[GrantorPool, int] | None:
        """A page of zeros, by its pool and its reference; None: the hypervisor has to be asked for one.

        Raises HypervisorGoneError, ForkedError.
        """
        key = domid, writable
        pools = self._pools.get(key)
        if pools is None:
            if len(self._pools) >= _MOST_KEYS:
                self._forget_idle()
            self._pools[key] = []
            return None
        self._session.check()
        for pool in reversed(pools):
            reference = pool.grant()
            if reference is not None:
                return pool, reference
        made = self._make(key)
        if made is None or (reference := made.grant()) is None:
            return None
        return made, reference

    def end(self, pool: GrantorPool, reference: int, *, is_revoked: bool) -> None:
        """The reference is granted no longer. A pool of a closed file, of a domain that went, or that is used up, ends
        with its last."""
        if is_revoked:
            pool.lose(reference)
        else:
            pool.end(reference)
        if not pool.granted and (self._is_closed or pool.is_used_up or pool.is_closed):
            for pools in self._pools.values():
                if pool in pools:
                    pools.remove(pool)
            self._release(pool)

    def close(self) -> None:
        """The file is closed: pools end once nothing of them is granted."""
        self._is_closed = True
        self._forget_idle()

    def _make(self, key: _Key) -> GrantorPool | None:
        domid, writable = key
        flags = layouts.ALLOCATE_WRITABLE if writable else 0
        try:
            answer, descriptors = self._session.call(Operation.POOL, pool_layouts.POOL.pack(domid, flags))
        except GrantError:  # no room for a pool; there may be for one page
            return None
        first, bits = pool_layouts.POOL_MADE.unpack(answer)
        try:
            pool = GrantorPool(first, descriptors, self._watching, is_isolated=bool(bits & layouts.ISOLATED))
        except BaseException:
            self._session.tell(Operation.RELEASE, layouts.RANGE.pack(first, pool_layouts.BLOCK, 0))
            raise
        self._pools[key].append(pool)
        return pool

    def _forget_idle(self) -> None:
        for key, pools in list(self._pools.items()):
            for pool in [pool for pool in pools if not pool.granted]:
                pools.remove(pool)
                self._release(pool)
            if not pools:
                del self._pools[key]

    def _release(self, pool: GrantorPool) -> None:
        self._session.tell(Operation.RELEASE, layouts.RANGE.pack(*pool.references, 0))
        pool.close()
