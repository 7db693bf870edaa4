"""The two races between a change and the question whether anything changed, run for real.

Own thread: the call that unmaps returns before the monitor has applied the message. Other thread: the address
is free, and mapped again, before the message exists.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, Self

from usermm.monitors import calls
from usermm.monitors.base import OTHER_THREAD, OWN_THREAD, Device, RaceTrial
from usermm.monitors.calls import PAGE

TRIALS: Final = 2000
"""Of each kind: one to three seconds in all."""

# How wide the window of the second race is depends on which thread gets which core, which differs from run to run and
# from one build of Python to the next. Several shapes together have met it hundreds of times in every run; one alone
# sometimes not at all, and a quiet machine and a single page hardly ever.
_SHAPES: Final = ((64, 1), (64, 2), (256, 1), (16, 2))
"""Pages that the other thread unmaps at once, which keep its call in the kernel for longer; threads that make noise."""
_SWITCH_INTERVAL_S: Final = 1e-5
_BUDGET_S: Final = 10.0
"""On a busy machine a race ends after this time with fewer trials."""
_PLACE: Final = 1 << 36
"""Far from where the kernel and malloc put memory, so that no other thread is given the address that came free."""


def run_all(open_device: Callable[[], Device], trials: int = TRIALS) -> tuple[RaceTrial, ...]:
    """Both races, while other threads keep the monitor busy with a device of their own."""
    device, other = open_device(), open_device()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        with _Noise(other, 1):
            own = own_thread(device, trials)
        rounds = []
        for pages, noises in _SHAPES:
            with _Noise(other, noises):
                rounds.append(other_thread(device, trials // len(_SHAPES), pages))
        return own, _sum(rounds)
    finally:
        sys.setswitchinterval(interval_s)
        device.close()
        other.close()


def _sum(rounds: list[RaceTrial]) -> RaceTrial:
    return RaceTrial(
        rounds[0].name,
        sum(found.trials for found in rounds),
        sum(found.wrong for found in rounds),
        sum(found.wrong_unprotected for found in rounds),
        sum(found.trials_unprotected for found in rounds),
    )


def own_thread(device: Device, trials: int = TRIALS) -> RaceTrial:
    """Unmaps and asks at once: in turn by the generation, by `check`, and by a plain load of the mapped page."""
    page = device.mmap().cast("Q")
    questions: tuple[Callable[[int], bool], ...] = (
        lambda seen: device.generation == seen,
        lambda seen: device.check(seen, probe=False),
        lambda seen: page[0] == seen,
    )
    asked = wrong = 0
    deadline_s = time.monotonic() + _BUDGET_S
    while asked < trials and time.monotonic() < deadline_s:
        start = calls.map_memory(PAGE)
        cookie = device.register_range(start, start + PAGE)
        seen = device.generation
        question = questions[asked % len(questions)]
        calls.unmap(start, PAGE)
        wrong += question(seen)
        asked += 1
        device.unregister(cookie)
    return RaceTrial(OWN_THREAD, asked, wrong, 0, 0)


def other_thread(device: Device, trials: int = TRIALS, pages: int = 64) -> RaceTrial:
    """Another thread unmaps; this one maps the address again and asks, in turn with and without the probe."""
    length = pages * PAGE
    asked, stale = [0, 0], [0, 0]
    deadline_s = time.monotonic() + _BUDGET_S / len(_SHAPES)
    with _Unmapper(length) as unmapper:
        for trial in range(2 * trials):
            if time.monotonic() > deadline_s:
                break
            start = calls.map_memory(length, at=_PLACE)
            calls.touch(start, length)
            cookie = device.register_range(start, start + length)
            seen = device.generation
            unmapper.unmap(start)
            mapped_again = _map_again(start, unmapper)
            if mapped_again:
                probe = trial % 2
                stale[probe] += device.check(seen, probe=bool(probe))
                asked[probe] += 1
            unmapper.wait()
            device.unregister(cookie)
            if mapped_again:
                calls.unmap(start, PAGE)
    return RaceTrial(OTHER_THREAD, asked[1], stale[1], stale[0], asked[0])


def _map_again(start: int, unmapper: _Unmapper) -> bool:
    """Maps the page as soon as it is free; False when somebody else got it after all."""
    while not unmapper.done:
        if calls.map_free(start, PAGE):
            return True
    return calls.map_free(start, PAGE)


class _Unmapper:
    """A thread that unmaps `length` bytes at each address it is told."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.done = False
        self._thread = threading.Thread(target=self._run, name="usermm-race", daemon=True)

    def _run(self) -> None:
        while (start := self._todo.get()) is not None:
            calls.unmap(start, self._length)
            self.done = True
            self._done.put(None)

    def unmap(self, start: int) -> None:
        self.done = False
        self._todo.put(start)

    def wait(self) -> None:
        self._done.get()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._todo.put(None)
        self._thread.join()


class _Noise:
    """Threads that map, watch and unmap as fast as they can."""

    def __init__(self, device: Device, count: int) -> None:
        self._device = device
        self._stop = False
        self._threads = [threading.Thread(target=self._run, name="usermm-noise", daemon=True) for _ in range(count)]

    def _run(self) -> None:
        while not self._stop:
            start = calls.map_memory(PAGE)
            cookie = self._device.register_range(start, start + PAGE)
            calls.unmap(start, PAGE)
            self._device.unregister(cookie)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()
