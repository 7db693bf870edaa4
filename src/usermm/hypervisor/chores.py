"""Work that may take long, done a millisecond at a time between the turns of the loop: nobody waits for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

_SLICE_NS = 1_000_000
_STEPS = 16
"""Between two looks at the clock: a step is a few microseconds."""


class Chores:
    """One after the other. `soon` has a function called in the loop's next turn."""

    def __init__(self, soon: Callable[[Callable[[], None]], object]) -> None:
        self._soon = soon
        self._waiting: deque[Iterator[None]] = deque()
        self._when_done: list[Callable[[], None]] = []
        self._is_due = False

    @property
    def is_busy(self) -> bool:
        """Whether something is left to do."""
        return bool(self._waiting)

    def add(self, steps: Iterator[None]) -> None:
        """Its first steps are done now, if nothing else waits; most chores have no others."""
        self._waiting.append(steps)
        if not self._is_due:
            self._work()

    def when_done(self, call: Callable[[], None]) -> None:
        """Has it called once nothing is left to do."""
        self._when_done.append(call)

    def drop(self) -> None:
        """Nothing of it is done any more."""
        self._waiting.clear()
        self._when_done.clear()

    def _work(self) -> None:
        self._is_due = False
        until = time.thread_time_ns() + _SLICE_NS
        while self._waiting:
            steps = self._waiting[0]
            for number, _ in enumerate(steps):
                if number % _STEPS == 0 and time.thread_time_ns() > until:
                    self._is_due = True
                    self._soon(self._work)
                    return
            self._waiting.popleft()
        calls, self._when_done = self._when_done, []
        for call in calls:
            call()
