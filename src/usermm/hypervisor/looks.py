"""When the locks are asked: after a closing, and again.

The kernel says that a file is closed before it drops the file's locks, so the lock of a hold that is going can still be
there at the first look. It is not there long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from usermm.hypervisor.holding import Holding

_AGAIN_SECONDS = (0.005, 0.2)
_PAUSE_SECONDS = 0.005
"""Between two parts of a look that takes long: a sixth of the time at most."""


class Looks:
    """One timer for each delay, whatever happens meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop, holding: Holding) -> None:
        self._loop = loop
        self._holding = holding
        self._again: dict[float, set[int]] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._is_looking_on = False
        holding.when_broken_off = self._go_on_soon
        loop.add_reader(holding.closings.fileno(), self._closed)

    def close(self) -> None:
        """No more looks."""
        self._loop.remove_reader(self._holding.closings.fileno())
        for timer in self._timers:
            timer.cancel()

    def _closed(self) -> None:
        watches = self._holding.closings.take()
        self._holding.look(watches)
        for delay in _AGAIN_SECONDS:
            waiting = self._again.get(delay)
            if waiting is None:
                self._again[delay] = set(watches)
                self._later(delay, self._look_again, delay)
            else:
                waiting |= watches

    def _look_again(self, delay: float) -> None:
        self._holding.look(self._again.pop(delay))

    def _go_on_soon(self) -> None:
        """With looks that were broken off, if there are any."""
        if not self._is_looking_on and self._holding.is_looking:
            self._is_looking_on = True
            self._later(_PAUSE_SECONDS, self._look_on)

    def _look_on(self) -> None:
        self._is_looking_on = False
        self._holding.look_on()
        self._go_on_soon()

    def _later(self, delay: float, call: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            self._timers.discard(timer)
            call(*arguments)

        timer = self._loop.call_later(delay, run)
        self._timers.add(timer)
