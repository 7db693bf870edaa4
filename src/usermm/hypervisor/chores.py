"""Work that may take long, done a millisecond at a time between the turns of the loop: nobody waits for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

_SLICE_NS = 1_000_000
_STEPS = 16
"""Between two looks at the clock: a step is a few microseconds."""


class Chores:
    """One after the other. `soon` has a function called in the loop's next turn; `failed` hears of a mistake in one."""

    def __init__(
        self, soon: Callable[[Callable[[], None]], object], failed: Callable[[Exception], object]
    ) -> None:
        self._soon = soon
        self._failed = failed
        self._is_closed = False
        self._waiting: deque[Iterator[None]] = deque()
        self._when_done: list[Callable[[], None]] = []
        self._is_due = False

    @property
    def is_busy(self) -> bool:
        """Whether something is left to do."""
        return bool(self._waiting)

    def add(self, steps: Iterator[None]) -> None:
        """Its first steps are done now, if nothing else waits; most chores have no others."""
        if self._is_closed:
            return
        self._waiting.append(steps)
        if not self._is_due:
            self._work()

    def when_done(self, call: Callable[[], None]) -> None:
        """Has it called once nothing is left to do."""
        self._when_done.append(call)

    def close(self) -> None:
        """Nothing is done any more."""
        self._is_closed = True
        self._waiting.clear()
        self._when_done.clear()

    def _work(self) -> None:
        self._is_due = False
        until = time.thread_time_ns() + _SLICE_NS
        while self._waiting:
            try:
                is_done = self._go_on(self._waiting[0], until)
            except Exception as error:  # a mistake of ours must not hold up the others
                self._failed(error)
                is_done = True
            if not is_done:
                self._is_due = True
                self._soon(self._work)
                return
            if self._waiting:
                self._waiting.popleft()
        calls, self._when_done = self._when_done, []
        for call in calls:
            call()

    @staticmethod
    def _go_on(steps: Iterator[None], until_ns: int) -> bool:
        """Whether it came to its end."""
        for number, _ in enumerate(steps):  # noqa: SIM110 - it is work, not a question
            if number % _STEPS == 0 and time.thread_time_ns() > until_ns:
                return False
        return True
