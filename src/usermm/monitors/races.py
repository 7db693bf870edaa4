"""The two races between a change and the question whether anything changed, run for real.

Own thread: the call that unmaps returns before the monitor has applied the message. Other thread: the address
is free, and mapped again, before the message exists.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from typing import Final, Self

from usermm.monitors import calls
from usermm.monitors.base import OTHER_THREAD, OWN_THREAD, Device, RaceTrial
from usermm.monitors.calls import PAGE

TRIALS: Final = 3000
"""Of each kind: one to two seconds in all. An unprotected monitor is wrong in 0.4 % of them or more."""
_ATTEMPTS: Final = 100_000


def run_all(open_device: Callable[[], Device], trials: int = TRIALS) -> tuple[RaceTrial, ...]:
    """Both races, on a device each."""
    found = []
    for race in (own_thread, other_thread):
        device = open_device()
        try:
            found.append(race(device, trials))
        finally:
            device.close()
    return tuple(found)


def own_thread(device: Device, trials: int = TRIALS) -> RaceTrial:
    """Unmaps and asks at once, by the generation and by `check` in turn."""
    late = 0
    for trial in range(trials):
        start = calls.map_memory(PAGE)
        cookie = device.register_range(start, start + PAGE)
        seen = device.generation
        calls.unmap(start, PAGE)
        if trial % 2:
            late += device.generation == seen
        else:
            late += device.check(seen, probe=False)
        device.unregister(cookie)
    return RaceTrial(OWN_THREAD, trials, late)


def other_thread(device: Device, trials: int = TRIALS) -> RaceTrial:
    """Another thread unmaps; this one maps the address again and asks, in turn with and without the probe."""
    with _Unmapper() as unmapper:
        asked = [0, 0]
        stale = [0, 0]
        for trial in range(2 * trials):
            start = calls.map_memory(PAGE)
            cookie = device.register_range(start, start + PAGE)
            seen = device.generation
            unmapper.unmap(start)
            mapped_again = _map_again(start)
            if mapped_again:
                probe = trial % 2
                stale[probe] += device.check(seen, probe=bool(probe))
                asked[probe] += 1
            unmapper.wait()
            device.unregister(cookie)
            if mapped_again:
                calls.unmap(start, PAGE)
    return RaceTrial(OTHER_THREAD, asked[1], stale[1], stale[0], asked[0])


def _map_again(start: int) -> bool:
    """Maps the page as soon as it is free; False when something else of the process got the address."""
    for _ in range(_ATTEMPTS):
        try:
            return calls.map_memory(PAGE, at=start, flags=calls.MAP_FIXED_NOREPLACE) == start
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
    return False


class _Unmapper:
    """A thread that unmaps pages on demand."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="usermm-race", daemon=True)

    def _run(self) -> None:
        while (start := self._todo.get()) is not None:
            calls.unmap(start, PAGE)
            self._done.put(None)

    def unmap(self, start: int) -> None:
        self._todo.put(start)

    def wait(self) -> None:
        self._done.get()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._todo.put(None)
        self._thread.join()
