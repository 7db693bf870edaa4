"""What a cache that keeps no exact order of use promises of who makes room.

The real one is a clock: registrations wait in the order in which they were made or last looked at, and one that was
asked for since then is put back once before it goes. Seen from outside:

    What was asked for again since the last time that room was looked for goes only if everything that stays, idle,
    was asked for again since it was made.

So one that nobody ever asked for again goes before one that is in use, however old that is. Which of several in use
goes is not promised.
"""

from __future__ import annotations


class Recency:
    """Handles and the times of their hits. Time moves with each event."""

    def __init__(self) -> None:
        self._now = 0
        self._swept = 0
        self._hits: dict[object, int] = {}

    def hit(self, handle: object) -> None:
        self._now += 1
        self._hits[handle] = self._now

    def sweep(self) -> None:
        """The cache has looked at all."""
        self._now += 1
        self._swept = self._now

    def check(self, evicted: set[object], idle: set[object]) -> None:
        """`evicted` went to make room in one call, `idle` stayed although nobody holds it."""
        if not evicted:
            return
        unused = [handle for handle in idle if handle not in self._hits]
        used = [handle for handle in evicted if self._hits.get(handle, 0) > self._swept]
        assert not (used and unused), f"{used} made room, and were in use; {unused} were not"
        self.sweep()
