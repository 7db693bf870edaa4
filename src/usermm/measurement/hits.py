"""A hit: the memory is registered, and a program asks for it again. Ours beside a dict, weak references and UCX."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

from usermm import RegistrationCache
from usermm.measurement.caches import FinalizeCache, NoDevice
from usermm.measurement.harness import Effort, Rounds, differences, walk
from usermm.measurement.regions import Regions, address_code, address_of
from usermm.measurement.ucx import UcxCache

HIT: Final = "cache.get(buffer), the same object"
BOUND: Final = "get(buffer), the same object"
UNPROBED: Final = "cache.get(buffer, probe=False)"
PROBED: Final = "cache.get(buffer, probe=True)"
VIEW: Final = "cache.get(buffer[:]), a new object"
PART: Final = "cache.get(buffer[4096:]), a new object"
DICT: Final = "dict, key ready made"
DICT_SAME_KEY: Final = "dict, the stored key itself"
DICT_OF_BUFFER: Final = "dict, key made of the buffer"
FINALIZE: Final = "weakref.finalize"
UCX: Final = "UCX 1.22 by ctypes, address ready made"
LOOP: Final = "pass"
NEW_VIEW: Final = "buffer[:]"
NEW_PART: Final = "buffer[4096:]"

OURS: Final = (HIT, UNPROBED, PROBED, VIEW, PART)
BY_HAND: Final = (DICT, DICT_OF_BUFFER, FINALIZE)

_FAST, _SLOW = 100_000, 10_000
"""Look-ups of a round: of rows below and above a few hundred ns."""


class Hits:
    """`count` regions that all sides have registered; look-ups choose among them at random."""

    def __init__(self, count: int, effort: Effort, ucx: UcxCache | None) -> None:
        self._count = count
        self._few = effort.operations(_SLOW)
        self._ucx = ucx
        chosen = random.Random(count).choices(range(count), k=effort.operations(_FAST))
        with ExitStack() as stack:
            regions = stack.enter_context(Regions(count))
            self._cache = stack.enter_context(RegistrationCache(NoDevice()))
            self._finalizing = FinalizeCache(NoDevice())
            for buffer in regions.buffers:
                self._cache.get(buffer)
                self._finalizing.get(buffer)
            if ucx:
                walk(ucx.CODE, regions.keys, ucx.names())()
                stack.callback(ucx.invalidate, regions.start, regions.end - regions.start)
            self._handles = {key: object() for key in regions.keys}
            equal_keys = [(address + 0, length + 0) for address, length in regions.keys]
            self._buffers = [regions.buffers[index] for index in chosen]
            self._equal_keys = [equal_keys[index] for index in chosen]
            self._stored_keys = [regions.keys[index] for index in chosen]
            stack.callback(self._buffers.clear)
            self._stack = stack.pop_all()

    def subjects(self) -> dict[str, Callable[[], float]]:
        """ns for each row. The loop is included, and in the rows with a new object the making of it."""
        ours = {"cache": self._cache, "get": self._cache.get}
        by_hand = {"d": self._handles, "address_of": address_of, "f": self._finalizing.get}
        few = self._buffers[: self._few]
        subjects = {
            LOOP: _walk("pass", self._buffers, {}),
            HIT: _walk("cache.get(buffer)", self._buffers, ours),
            BOUND: _walk("get(buffer)", self._buffers, ours),
            DICT: _walk("d[buffer]", self._equal_keys, by_hand),
            DICT_SAME_KEY: _walk("d[buffer]", self._stored_keys, by_hand),
            FINALIZE: _walk("f(buffer)", self._buffers, by_hand),
            UNPROBED: _walk("cache.get(buffer, probe=False)", self._buffers, ours),
            PROBED: _walk("cache.get(buffer, probe=True)", few, ours),
            VIEW: _walk("cache.get(buffer[:])", few, ours),
            NEW_VIEW: _walk("buffer[:]", few, {}),
            PART: _walk("cache.get(buffer[4096:])", few, ours),
            NEW_PART: _walk("buffer[4096:]", few, {}),
            DICT_OF_BUFFER: _walk(f"d[{address_code()}, buffer.nbytes]", few, by_hand),
        }
        if self._ucx:
            subjects[UCX] = _walk(self._ucx.CODE, self._equal_keys[: self._few], self._ucx.names())
        return subjects

    def notes(self) -> list[str]:
        """What went wrong: a miss must not pass for a hit."""
        missed = self._cache.stats().misses - self._count
        return [f"Of the look-ups in {self._count:,} regions {missed:,} missed."] if missed else []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _walk(code: str, items: Sequence[Any], names: Mapping[str, Any]) -> Callable[[], float]:
    """In this thread's CPU time: no row ever waits, and what else runs on this machine does not count."""
    return walk(code, items, names, time.thread_time)


def net(values: Mapping[str, Rounds]) -> dict[str, Rounds]:
    """Without the loop, and without the making of new objects."""
    making = {VIEW: NEW_VIEW, PART: NEW_PART}
    return {name: differences(rounds, values[making.get(name, LOOP)]) for name, rounds in values.items()}
