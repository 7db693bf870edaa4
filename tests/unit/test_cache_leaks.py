"""Every method of the cache and of its registrations, called thousands of times: nothing may grow.

The lists are checked against what there is, so a new method without a check fails the test.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
from support.caches import PAGE, Block, eventually
from support.growth import check_no_growth

import usermm
from usermm import _core
from usermm.registrars import Overlap, Traits

Cache = usermm.RegistrationCache[Any]


class Device:
    """Keeps no account, which would grow; room for one, twenty, or none."""

    def __init__(self, **traits: Any) -> None:
        self.traits = Traits(**traits)
        self.fails = False

    def register(self, address: int, length: int) -> object:
        if self.fails:
            raise ValueError("no")
        return (address, length)

    def deregister(self, handle: object) -> None:
        assert isinstance(handle, tuple)


_BLOCKS: Final = [Block() for _ in range(4)]
_ARRAY: Final = np.zeros(5000, np.uint8)
_BYTEARRAY: Final = bytearray(5000)
_TENSOR: Final = SimpleNamespace(
    data_ptr=lambda: _BLOCKS[0].address, nbytes=PAGE, is_contiguous=lambda: True, device=SimpleNamespace(type="cpu")
)
TIMES: Final = 1000
_GAPS: Final = np.zeros((8, 8))[:, ::2]
_round: Final = itertools.count()


def _next() -> Block:
    return _BLOCKS[next(_round) % 4]


def _lose(cache: Cache) -> None:
    block = _next()
    registration = cache.get(block)
    block.discard()
    assert not registration.valid


def _lose_idle(cache: Cache) -> None:
    block = _next()
    cache.get(block)
    block.unmap()
    block.map_again()


def _evict_held(cache: Cache) -> None:
    registration = cache.get(_ARRAY)
    assert cache.evict(_ARRAY) == 1
    registration.release()


def _new_object(cache: Cache) -> None:
    cache.get(memoryview(_ARRAY)[:100])


def _with(_: Cache) -> None:
    with usermm.RegistrationCache(Device()) as cache:
        cache.upkeep_due = False
        cache.get(_ARRAY)


def _drop(_: Cache) -> None:
    cache = usermm.RegistrationCache(Device())
    cache.upkeep_due = False
    cache.get(_ARRAY)
    held = cache.get(_BYTEARRAY)
    del cache
    assert held.valid


def _cycle(_: Cache) -> None:
    cache: Any = usermm.RegistrationCache(Device())
    cache.upkeep_due = False
    cache.get(_ARRAY)
    cache.me = cache
    cache.close()
    cache.me = None


def _merge(_: Cache) -> None:
    block = _BLOCKS[0]
    _MERGING.get(block.part(0, 2000))
    with _MERGING.get(block.part(1000, 2000)) as registration:
        assert registration.length == 3000
    _MERGING.clear()


def _expire(cache: Cache) -> None:
    _new_object(cache)
    cache.expire(1)


_MERGING: Cache
_CLOSED: Cache
_FULL: Cache
_FAILING: Cache


@pytest.fixture(scope="module", autouse=True)
def _caches() -> Iterator[None]:
    global _MERGING, _CLOSED, _FULL, _FAILING  # noqa: PLW0603
    _MERGING = usermm.RegistrationCache(Device(overlap=Overlap.MERGED))
    _CLOSED, _FULL = usermm.RegistrationCache(Device()), usermm.RegistrationCache(Device(), max_count=1)
    _FAILING = usermm.RegistrationCache(Device())
    _FAILING.registrar.fails = True
    _CLOSED.close()
    for cache in (_MERGING, _FULL):
        cache.upkeep_due = False
    held = _FULL.get(_BLOCKS[0])
    yield
    held.release()
    for cache in (_MERGING, _FULL, _FAILING):
        cache.close()


SUCCESSES: Final[dict[str, Callable[[Cache], Any]]] = {
    "get": lambda cache: cache.get(_ARRAY),
    "get, always asking": lambda cache: cache.get(_ARRAY, probe=True),
    "get, never asking": lambda cache: cache.get(_ARRAY, probe=False),
    "get of what takes no weak reference": lambda cache: cache.get(_BYTEARRAY),
    "get of a tensor": lambda cache: cache.get(_TENSOR),
    "get of new objects": _new_object,
    "get of what was lost while held": _lose,
    "get of what was lost while idle": _lose_idle,
    "get of unions": _merge,
    "evict": lambda cache: (cache.get(_ARRAY), cache.evict(_ARRAY)),
    "evict what is held": _evict_held,
    "clear": lambda cache: (cache.get(_ARRAY), cache.get(_BYTEARRAY), cache.clear()),
    "expire": _expire,
    "explain": lambda cache: cache.explain(_ARRAY),
    "stats": lambda cache: cache.stats(),
    "counts": lambda cache: cache.counts(),
    "overlapping": lambda cache: cache.overlapping(0, 0),
    "remembers": lambda cache: cache.remembers(_ARRAY),
    "memory_of": lambda cache: cache.memory_of(_ARRAY),
    "fileno": lambda cache: cache.fileno(),
    "upkeep_due": lambda cache: cache.upkeep_due,
    "close": _cycle,
    "__new__": _drop,
    "__enter__": _with,
    "__exit__": _with,
    "__repr__": repr,
    "handle": lambda cache: cache.get(_ARRAY).handle,
    "address": lambda cache: cache.get(_ARRAY).address,
    "length": lambda cache: cache.get(_ARRAY).length,
    "valid": lambda cache: cache.get(_ARRAY).valid,
    "release": lambda cache: cache.get(_ARRAY).release(),
    "registration.__enter__": lambda cache: cache.get(_ARRAY).__enter__().__exit__(None, None, None),
    "registration.__exit__": lambda cache: cache.get(_ARRAY).__exit__(None, None, None),
    "registration.__repr__": lambda cache: repr(cache.get(_ARRAY)),
}


def _released(cache: Cache) -> usermm.Registration:
    registration = cache.get(_ARRAY)
    registration.release()
    return registration


ERRORS: Final[dict[str, Callable[[Cache], Any]]] = {
    "get wrong type": lambda cache: cache.get("text"),
    "get gaps": lambda cache: cache.get(_GAPS),
    "get read-only": lambda cache: cache.get(bytes(100)),
    "get empty": lambda cache: cache.get(bytearray()),
    "get hole": lambda cache: cache.get(SimpleNamespace(address=4096, size=4096)),
    "get arguments": lambda cache: cache.get(_ARRAY, bogus=1),
    "get full": lambda _: _FULL.get(_ARRAY),
    "get refused by the device": lambda _: _FAILING.get(_ARRAY),
    "get when closed": lambda _: _CLOSED.get(_ARRAY),
    "evict wrong type": lambda cache: cache.evict(5),
    "evict when closed": lambda _: _CLOSED.evict(_ARRAY),
    "clear when closed": lambda _: _CLOSED.clear(),
    "expire type": lambda cache: cache.expire("x"),
    "expire when closed": lambda _: _CLOSED.expire(1),
    "explain wrong type": lambda cache: cache.explain(5),
    "explain when closed": lambda _: _CLOSED.explain(_ARRAY),
    "overlapping arguments": lambda cache: cache.overlapping(1),
    "overlapping type": lambda cache: cache.overlapping("x", 1),
    "remembers type": lambda cache: cache.remembers(5),
    "memory_of read-only": lambda cache: cache.memory_of(bytes(100)),
    "fileno when closed": lambda _: _CLOSED.fileno(),
    "upkeep_due type": lambda cache: setattr(cache, "upkeep_due", "x"),
    "__new__ no registrar": lambda _: usermm.RegistrationCache(None),  # type: ignore[arg-type]
    "__new__ limit": lambda _: usermm.RegistrationCache(Device(), max_bytes=-1),
    "__new__ of the core": lambda _: _core.Cache(
        print, print, overlap=7, merge_adjacent=False, one_thread=False, granularity=3, max_length=0,
        writes=True, max_bytes=0, max_count=0, uncached=False, watch_flags=0,
    ),
    "handle when released": lambda cache: _released(cache).handle,
    "address when released": lambda cache: _released(cache).address,
    "length when released": lambda cache: _released(cache).length,
    "registration.__enter__ when released": lambda cache: _released(cache).__enter__(),
}  # fmt: skip
CANNOT_FAIL: Final = {
    "close", "stats", "counts", "valid", "release", "__enter__", "__exit__", "__repr__",
    "registration.__exit__", "registration.__repr__",
}  # fmt: skip


@pytest.mark.parametrize("name", SUCCESSES)
def test_success_leaks_nothing(name: str) -> None:
    with usermm.RegistrationCache(Device(), linger_s=None) as cache:
        cache.upkeep_due = False
        cache.get(_ARRAY)
        check_no_growth(lambda: SUCCESSES[name](cache), TIMES)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaks_nothing(name: str) -> None:
    with usermm.RegistrationCache(Device(), linger_s=None) as cache:
        cache.upkeep_due = False

        def call() -> None:
            try:
                ERRORS[name](cache)
            except (usermm.UsermmError, TypeError, ValueError):
                return
            raise AssertionError("accepted")

        check_no_growth(call, TIMES)


def test_upkeep_leaks_nothing() -> None:
    """With each cache a thread and a descriptor start and end."""

    def use() -> None:
        with usermm.RegistrationCache(Device(), linger_s=None) as cache:
            cache.get(_ARRAY)

    def settle() -> None:
        assert eventually(lambda: len(os.listdir("/proc/self/task")) == before)

    before = len(os.listdir("/proc/self/task"))
    check_no_growth(use, times=300, settle=settle)


def test_memory_that_comes_and_goes_leaves_nothing() -> None:
    """Objects, addresses and registrations that are new each time."""
    with usermm.RegistrationCache(Device(), linger_s=None, max_count=100) as cache:
        cache.upkeep_due = False

        def use() -> None:
            block = mmap.mmap(-1, PAGE * (next(_round) % 7 + 1))
            with cache.get(block):
                pass
            block.close()

        check_no_growth(use)


def _methods() -> set[str]:
    own = {*vars(usermm.RegistrationCache), *vars(_core.Cache), *vars(usermm.Registration)}
    special = {"__new__", "__enter__", "__exit__", "__repr__"}
    of_registrations = {f"registration.{name}" for name in ("__enter__", "__exit__", "__repr__")}
    return {name for name in own if not name.startswith("_")} | special | of_registrations


def _listed(calls: dict[str, Any]) -> set[str]:
    return {name.replace(",", "").split()[0] for name in calls}


def test_every_method_is_in_the_lists() -> None:
    assert _listed(SUCCESSES) == _methods()
    assert _listed(ERRORS) == _methods() - CANNOT_FAIL
