"""Whose turn it is: a user has a share of each round of the loop, however many domains it has and whatever they ask."""

from __future__ import annotations

import asyncio

SHARE_NS = 4_000_000
"""Of one round, for all connections of one user; what is begun is carried out."""
TURN_NS = 1_000_000
"""After this a connection lets the next one of its user have its turn."""


class Shares:
    """Who is turned away stays readable and so comes again in the next round: then before those who had their turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._spent_ns: dict[int, int] = {}
        self._waiting: dict[int, set[object]] = {}

    def may_go(self, who: object, uid: int) -> bool:
        """Whether `who`, a connection of the user `uid`, is served now."""
        waiting = self._waiting.get(uid)
        if self._spent_ns.get(uid, 0) >= SHARE_NS:
            self._waiting.setdefault(uid, set()).add(who)
            return False
        if waiting is None:
            return True
        if who not in waiting:
            return False
        self.forget(who, uid)
        return True

    def went(self, uid: int, spent_ns: int) -> None:
        """It was served, and took so long."""
        if not self._spent_ns:
            self._loop.call_soon(self._spent_ns.clear)  # runs first in the next round
        self._spent_ns[uid] = self._spent_ns.get(uid, 0) + spent_ns

    def forget(self, who: object, uid: int) -> None:
        """It does not wait any more."""
        waiting = self._waiting.get(uid)
        if waiting is not None:
            waiting.discard(who)
            if not waiting:
                del self._waiting[uid]
