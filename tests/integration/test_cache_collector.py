"""The garbage collector at bad moments: finalizers that call the cache, caches in cycles, objects seen half made."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches import PAGE, Block, cache_over
from support.processes import run_quietly

import usermm
from usermm.registrars import Traits
from usermm.testing import ScriptedRegistrar

Cache = usermm.RegistrationCache[object]


class Garbage:
    """Does something to a cache when the collector finds it."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action, self.me = action, self

    def __del__(self) -> None:
        self.action()


@pytest.fixture(autouse=True)
def _young_heap() -> Iterator[None]:
    """What is there before is nothing the collector looks at, so that it can run thousands of times."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    yield
    gc.set_threshold(*before)
    gc.enable()
    gc.unfreeze()


def interrupted(number: int, action: Callable[[], object], call: Callable[[], object]) -> None:
    """`call` while the collector finds garbage that does `action`: at about its `number`-th allocation."""
    gc.disable()
    gc.collect(0)
    Garbage(action)
    gc.set_threshold(number + 1)
    gc.enable()
    try:
        call()
    finally:
        gc.set_threshold(700)
        gc.collect(0)


MOMENTS = 12


ACTIONS: dict[str, Callable[[Cache, list[Block]], object]] = {
    "get": lambda cache, blocks: cache.get(blocks[0]),
    "get a part": lambda cache, blocks: cache.get(blocks[-1].part(5, 5)),
    "evict": lambda cache, blocks: cache.evict(blocks[-1]),
    "clear": lambda cache, _blocks: cache.clear(),
    "expire": lambda cache, _blocks: cache.expire(1),
    "discard": lambda _cache, blocks: blocks[-1].discard(),
    "explain": lambda cache, blocks: cache.explain(blocks[0]),
}
CALLS: dict[str, Callable[[Cache, Block], object]] = {
    "get": lambda cache, block: cache.get(block).address,
    "get with probe": lambda cache, block: cache.get(block, probe=True).address,
    "get a new object": lambda cache, block: cache.get(block.part(0, 9)).address,
    "evict": lambda cache, block: cache.evict(block),
    "explain": lambda cache, block: cache.explain(block),
    "stats": lambda cache, _block: cache.stats(),
    "repr": lambda cache, block: repr(cache.get(block)),
    "overlapping": lambda cache, _block: cache.overlapping(0, 0),
    "clear": lambda cache, _block: cache.clear(),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_a_finalizer_may_call_the_cache_at_any_moment(action: str, call: str) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(10)]
    with cache_over(registrar, max_count=8) as cache:
        for number in range(MOMENTS):
            for block in (blocks[0], blocks[5], blocks[9]):
                act, ask = partial(ACTIONS[action], cache, blocks), partial(CALLS[call], cache, block)
                interrupted(number, act, ask)
        assert cache.stats().held == 0
        assert cache.stats().pinned == len(registrar.live)


def test_a_finalizer_may_close_the_cache_in_the_middle_of_a_get() -> None:
    block = Block()
    for number in range(MOMENTS):
        with cache_over(ScriptedRegistrar()) as cache:

            def get(cache: Cache = cache) -> None:
                with contextlib.suppress(usermm.ClosedError):
                    for _ in range(5):
                        cache.get(block)

            interrupted(number, cache.close, get)


def test_a_list_of_registrations_is_of_one_moment() -> None:
    """Its rows are allocated, which starts the collector, which may change the cache under the walk."""
    blocks = sorted((Block() for _ in range(100)), key=lambda block: block.address)
    for number in range(MOMENTS):
        with cache_over(ScriptedRegistrar()) as cache:
            for block in blocks:
                cache.get(block)
            found: list[Any] = []
            interrupted(number, cache.clear, lambda cache=cache, found=found: found.extend(cache.overlapping(0, 0)))
            assert [row[3] for row in found] in ([], list(range(1, 101)))


def test_a_handle_lives_while_it_describes_itself() -> None:
    """One of its items releases the registration in the middle of that."""
    inside, freed = [False], []

    class Handle(list):  # type: ignore[type-arg]
        def __repr__(self) -> str:
            inside[0] = True
            text = super().__repr__()
            inside[0] = False
            return text

        def __del__(self) -> None:
            freed.append("inside" if inside[0] else "after")

    class Item:
        def __repr__(self) -> str:
            registration.release()
            return "item"

    class Registrar:
        traits = Traits()

        def register(self, _address: int, _length: int) -> Handle:
            return Handle([Item() for _ in range(3)])

        def deregister(self, _handle: Handle) -> None:
            pass

    block = Block()
    with usermm.RegistrationCache(Registrar()) as cache:
        registration = cache.get(block)
        cache.evict(block)
        assert "[item, item, item]" in repr(registration)
    assert freed == ["after"]


_VALID = """
    import ctypes, gc, mmap
    import usermm
    from usermm.testing import ScriptedRegistrar

    registrar = ScriptedRegistrar()
    cache = usermm.RegistrationCache(registrar)
    kept, gone = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    registration = cache.get(kept)
    cache.get(gone)

    def release():
        registration.release()
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        for size in range(64, 1024, 16):
            for _ in range(20):
                ctypes.memset(libc.malloc(ctypes.c_size_t(size)), 0x41, size)

    registrar.at_deregister(1, runs=release)
    del cache
    gone.close()
    print(registration.valid)
    registrar.check(empty=True)
"""


def test_a_cache_lives_while_a_registration_is_asked_whether_it_is_valid(tmp_path: Path) -> None:
    """The question finds another one lost, whose deregistration releases the one that was asked."""
    assert run_quietly(_VALID, tmp_path) == "False\n"


# Caches in cycles


class Keeper(ScriptedRegistrar):
    """A registrar with an attribute that makes a cycle."""

    cache: object


def test_a_cache_and_its_registrar_in_a_cycle() -> None:
    """Everything must be given back before the collector takes the registrar's attributes away."""
    block = Block()
    for order in range(2):
        account: list[Any] = []
        weak = _make_cycle(account, block, order)
        gc.collect()
        assert weak() is None
        assert account == ["register", "deregister"]


def _make_cycle(account: list[Any], block: Block, order: int) -> weakref.ref[Any]:
    class Registrar:
        traits = Traits()

        def __init__(self) -> None:
            self.account = account

        def register(self, _address: int, _length: int) -> int:
            self.account.append("register")
            return 1

        def deregister(self, _handle: int) -> None:
            self.account.append("deregister")

    registrar: Any = Registrar()
    early: list[Any] = []
    cache = usermm.RegistrationCache(registrar)
    if order:
        registrar.early = early  # older than the cache
        early.append(cache)
    else:
        registrar.late = [cache]
    cache.get(block)
    return weakref.ref(cache)


def test_a_handle_that_refers_to_its_cache() -> None:
    class Handle:
        pass

    class Registrar:
        traits = Traits()

        def register(self, _address: int, _length: int) -> Handle:
            handle = Handle()
            handle.cache = weak()  # type: ignore[attr-defined]
            return handle

        def deregister(self, handle: Handle) -> None:
            returned.append(type(handle.cache).__name__)  # type: ignore[attr-defined]

    returned: list[str] = []
    cache = usermm.RegistrationCache(Registrar())
    weak = weakref.ref(cache)
    cache.get(Block())
    cache.get(Block())
    del cache
    gc.collect()
    assert weak() is None
    assert returned == ["RegistrationCache"] * 2


def test_a_registrar_that_keeps_a_registration() -> None:
    """Of a descriptor table of its own, say. More often than once, since the memory of registrations is used again."""
    block = Block()
    for _ in range(5):
        account: list[Any] = []
        weak = _make_keeping_registrar(account, block)
        gc.collect()
        assert weak() is None
        assert account == ["register", "deregister"]


def _make_keeping_registrar(account: list[Any], block: Block) -> weakref.ref[Any]:
    class Registrar:
        traits = Traits()

        def __init__(self) -> None:
            self.account = account

        def register(self, _address: int, _length: int) -> int:
            self.account.append("register")
            return 1

        def deregister(self, _handle: int) -> None:
            self.account.append("deregister")

    registrar: Any = Registrar()
    cache = usermm.RegistrationCache(registrar)
    registrar.kept = cache.get(block)
    return weakref.ref(cache)


@pytest.mark.parametrize("slotted", [False, True])
def test_a_class_that_refers_to_its_cache(slotted: bool) -> None:
    """The cache remembers a type that has asked, so as to ask it less."""
    registrar, block = ScriptedRegistrar(), Block()
    weak = _asked_by_a_class_of_its_own(registrar, block, slotted)
    gc.collect()
    assert weak() is None
    registrar.check(empty=True)


def _asked_by_a_class_of_its_own(registrar: ScriptedRegistrar, block: Block, slotted: bool) -> weakref.ref[Any]:
    cache = usermm.RegistrationCache(registrar)
    kind: Any = type("Slotted", (), {"__slots__": ("address", "size")}) if slotted else type("Sub", (bytearray,), {})
    kind.cache = cache
    asking = kind() if slotted else kind(5000)
    if slotted:
        asking.address, asking.size = block.address, PAGE
    cache.get(asking)
    return weakref.ref(cache)


def test_a_finalizer_of_a_subclass_may_close_it() -> None:
    class Closing(usermm.RegistrationCache[object]):
        def __del__(self) -> None:
            self.close()

    for cyclic in (False, True):
        registrar, block = ScriptedRegistrar(), Block()
        cache: Any = Closing(registrar)
        cache.get(block)
        if cyclic:
            cache.me = cache
        del cache
        gc.collect()
        registrar.check(empty=True)


_HALF_MADE = """
    import contextlib, gc, os, resource, sys
    import usermm
    from usermm import _core
    from usermm.testing import ScriptedRegistrar

    class Closing(usermm.RegistrationCache):
        def __del__(self):
            self.close()
            self.stats()

    def look(*_):
        for found in gc.get_objects():
            if isinstance(found, _core.Cache):
                found.counts()
                with contextlib.suppress(usermm.ClosedError):
                    found.clear()

    lowest = os.dup(0)
    os.close(lowest)
    for room in range(8):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, 1024))
        sys.setprofile(look)
        try:
            Closing(ScriptedRegistrar())
            print("made")
        except usermm.LimitError:
            print("refused")
        finally:
            sys.setprofile(None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    assert _core.counts()["devices"] == 0
"""


def test_a_cache_that_cannot_be_opened_is_never_seen(tmp_path: Path) -> None:
    """Neither by its own __del__ nor by a profiler that walks the collector's objects."""
    assert set(run_quietly(_HALF_MADE, tmp_path).split()) == {"made", "refused"}


# Asking objects


def test_objects_whose_finalizer_asks_again() -> None:
    """A dying object is no longer remembered, and what it is given in its last moment is let go."""
    registrar = ScriptedRegistrar()

    class Asking:
        def __init__(self, block: Block) -> None:
            self.block, self.nbytes = block, PAGE

        def data_ptr(self) -> int:
            return self.block.address

        def __del__(self) -> None:
            cache.get(self)
            cache.get(self, probe=True)

    blocks = [Block(), Block()]
    with cache_over(registrar) as cache:
        for cyclic in (False, True):
            asking: Any = Asking(blocks[cyclic])
            cache.get(asking)
            if cyclic:
                asking.me = asking
            del asking
            gc.collect()
        assert cache.stats().held == 0
        assert cache.clear() == 2


def test_a_resurrected_object_is_the_same_object() -> None:
    graves = []

    class Phoenix(Block):
        def __del__(self) -> None:
            graves.append(self)

    with cache_over(ScriptedRegistrar()) as cache:
        phoenix = Phoenix()
        cache.get(phoenix)
        place = id(phoenix)
        del phoenix
        [phoenix] = graves
        assert id(phoenix) == place
        for _ in range(2):
            assert cache.get(phoenix).handle == 1
        phoenix.unmap()
        phoenix.map_again()
        assert cache.get(phoenix).handle == 2
        Block.__del__(phoenix)


def test_collected_askers_free_their_places() -> None:
    array = np.zeros(5000, np.uint8)
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(array)
        for _ in range(50):
            views = [memoryview(array) for _ in range(50)]
            for view in views:
                cache.get(view)
            cycle: list[Any] = [*views]
            cycle.append(cycle)
            del views, view, cycle
            gc.collect()
        assert cache.stats().registrations == 1
        assert cache.stats().probes == 2500
