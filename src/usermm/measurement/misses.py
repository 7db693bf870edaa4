"""A miss, and the first look-up after memory was unmapped, over a device that does nothing."""

from __future__ import annotations

import ctypes
import enum
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

from usermm import RegistrationCache
from usermm.measurement.caches import FinalizeCache, NoDevice
from usermm.measurement.harness import Effort, walk
from usermm.measurement.regions import REGION_BYTES, Regions
from usermm.measurement.ucx import UcxCache
from usermm.monitors import calls

OTHERS: Final = 1_000
"""Regions that are registered meanwhile."""

_BATCH: Final = 250
_MISSES, _UNMAPS = 2_000, 500
"""Of a round."""


class Memory(enum.Enum):
    """What is asked for: the kernel's part of a miss depends on it. All pages are in use."""

    SEEN = "a mapping of its own, watched before"
    OWN = "a mapping of its own, new"
    PART = "part of a new mapping"


class Misses:
    """The sides with OTHERS regions each, of memory that they share."""

    def __init__(self, effort: Effort, ucx: UcxCache | None) -> None:
        self._misses, self._unmaps = effort.operations(_MISSES), effort.operations(_UNMAPS)
        self._dice = random.Random(OTHERS)
        self._ucx = ucx
        self._finalizing = FinalizeCache(NoDevice())
        with ExitStack() as stack:
            self._others = stack.enter_context(Regions(OTHERS))
            self._cache = stack.enter_context(RegistrationCache(NoDevice()))
            for buffer in self._others.buffers:
                self._cache.get(buffer)
                self._finalizing.get(buffer)
            if ucx:
                walk(ucx.CODE, self._others.keys, ucx.names())()
                stack.callback(ucx.invalidate, self._others.start, self._others.end - self._others.start)
            self._stack = stack.pop_all()

    def ours(self, memory: Memory) -> Callable[[], float]:
        """ns for a get of such memory that nobody asked for before, or that was evicted."""

        def batch_ns(regions: Regions) -> float:
            if memory is Memory.SEEN:
                for buffer in regions.buffers:
                    self._cache.get(buffer)
                    self._cache.evict(buffer)
            taken_ns = self._walk_ns("cache.get(buffer)", regions.buffers, {"cache": self._cache})
            for buffer in regions.buffers:
                self._cache.evict(buffer)
            return taken_ns

        return lambda: self._miss_ns(batch_ns, own_mappings=memory is not Memory.PART)

    def finalizing(self) -> Callable[[], float]:
        """The same of the cache by weak references."""
        names = {"f": self._finalizing.get}
        return lambda: self._miss_ns(lambda regions: self._walk_ns("f(buffer)", regions.buffers, names))

    def ucx(self, ucx: UcxCache) -> Callable[[], float]:
        """The same of UCX. It deregisters what it has lost in the next get that misses: not in one that is timed."""
        spare = self._others.keys[0]

        def batch_ns(regions: Regions) -> float:
            taken_ns = self._walk_ns(ucx.CODE, regions.keys, ucx.names())
            ucx.invalidate(regions.start, regions.end - regions.start)
            ucx.invalidate(*spare)
            ucx.look_up(spare)
            return taken_ns

        return lambda: self._miss_ns(batch_ns)

    def after_unmap(self, *, same: bool) -> Callable[[], float]:
        """Median ns of the first get after a munmap: of memory that was mapped there since, or of another region."""
        buffers = self._others.buffers
        return lambda: self._after_unmap_ns(buffers, self._cache.get, lambda _: None, same)

    def ucx_after_unmap(self, ucx: UcxCache, *, same: bool) -> Callable[[], float]:
        """The same of UCX, which is told by us."""
        keys = self._others.keys
        return lambda: self._after_unmap_ns(keys, ucx.look_up, lambda index: ucx.invalidate(*keys[index]), same)

    def clock(self) -> Callable[[], float]:
        """Median ns between two readings, which are part of `after_unmap`."""
        return lambda: statistics.median(_timed_ns(_nothing, None) for _ in range(self._unmaps))

    def _walk_ns(self, code: str, items: list[Any], names: dict[str, Any]) -> float:
        order = self._dice.sample(items, len(items))
        return walk(code, order, names)() * len(order)

    def _miss_ns(self, batch_ns: Callable[[Regions], float], *, own_mappings: bool = False) -> float:
        taken_ns, left = 0.0, self._misses
        while left:
            batch = min(left, _BATCH)
            left -= batch
            with Regions(batch, own_mappings=own_mappings) as regions:
                regions.touch()
                taken_ns += batch_ns(regions)
        return taken_ns / self._misses

    def _after_unmap_ns(
        self, items: list[Any], look_up: Callable[[Any], object], tell: Callable[[int], None], same: bool
    ) -> float:
        times_ns = []
        for _ in range(self._unmaps):
            gone, other = self._dice.sample(range(OTHERS), 2)
            address = self._others.addresses[gone]
            ctypes.memset(address, 1, 1)
            tell(gone)
            calls.unmap(address, REGION_BYTES)
            if same:
                assert calls.map_free(address, REGION_BYTES)
            times_ns.append(_timed_ns(look_up, items[gone if same else other]))
            if not same:
                assert calls.map_free(address, REGION_BYTES)
                look_up(items[gone])
        return statistics.median(times_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _timed_ns(call: Callable[[Any], object], argument: Any) -> int:
    clock = time.perf_counter_ns
    before_ns = clock()
    call(argument)
    return clock() - before_ns


def _nothing(_: object) -> None: ...
