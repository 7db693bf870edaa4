"""A registration cache over real memory: what is found again, what is not, and who holds what for how long."""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.arena import Arena
from support.caches import PAGE, Block, cache_over
from support.calls import refused_line
from support.threads import in_thread

import usermm
from usermm.monitors import calls
from usermm.registrars import Traits
from usermm.testing import Pin, ScriptedRegistrar

BUFFERS: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(5000),
    "memoryview": lambda: memoryview(bytearray(5000)),
    "a part of a memoryview": lambda: memoryview(bytearray(5000))[100:4000],
    "array.array": lambda: array.array("d", [0.0] * 700),
    "ctypes array": ctypes.c_char * 5000,
    "ctypes structure": type("S", (ctypes.Structure,), {"_fields_": [("x", ctypes.c_double * 9)]}),
    "mmap": lambda: mmap.mmap(-1, 2 * PAGE),
    "numpy": lambda: np.zeros(5000, np.uint8),
    "numpy of three dimensions": lambda: np.zeros((3, 40, 50)),
    "numpy in Fortran's order": lambda: np.zeros((30, 40), order="F"),
    "numpy of one item": lambda: np.zeros(()),
    "data_ptr() and nbytes": Block,
    "address and size": lambda: Block(3 * PAGE).part(7, 2 * PAGE),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_each_kind_of_buffer_is_registered_once(kind: str) -> None:
    buffer = BUFFERS[kind]()
    registrar = ScriptedRegistrar()
    with cache_over(registrar) as cache:
        with cache.get(buffer) as first, cache.get(buffer) as second:
            assert (first.handle, first.valid, second.handle, second.valid) == (1, True, 1, True)
            assert registrar.live == (Pin(1, first.address, first.length),)
            expected = usermm._core.buffer_range(buffer)
            assert (first.address, first.length) == expected
        now = cache.stats()
        assert (now.hits, now.misses, now.registrations, now.held, now.pinned) == (1, 1, 1, 0, 1)
        assert now.hit_rate == 0.5


def test_parts_of_a_registration_are_hits_and_anything_beyond_is_not() -> None:
    block = Block(4 * PAGE)
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(block.part(PAGE, 2 * PAGE))
        for offset, length, handle in (
            (PAGE, 1, 1),
            (3 * PAGE - 1, 1, 1),
            (PAGE + 5, 100, 1),
            (PAGE, 2 * PAGE, 1),
            (PAGE - 1, 2, 2),
            (3 * PAGE - 1, 2, 3),
            (0, 4 * PAGE, 4),
            (0, PAGE, 4),
        ):
            assert cache.get(block.part(offset, length)).handle == handle, (offset, length)


def test_views_of_one_memory_share_a_registration() -> None:
    whole = np.zeros((100, 100))
    with cache_over(ScriptedRegistrar()) as cache:
        views = (whole, whole[10:20], memoryview(whole), whole.reshape(-1), whole)
        assert {cache.get(view).handle for view in views} == {1}


# Letting go


def test_a_registration_that_was_released() -> None:
    registrar = ScriptedRegistrar()
    with cache_over(registrar) as cache:
        registration = cache.get(bytearray(5000))
        registration.release()
        registration.release()
        for name in ("handle", "address", "length", "__enter__"):
            with pytest.raises(ValueError, match=f"registration.{name}: it was released") as caught:
                getattr(registration, name)() if name == "__enter__" else getattr(registration, name)
            assert "\n" not in str(caught.value)
        assert not registration.valid
        assert repr(registration) == "<usermm.Registration, released>"
        assert cache.stats().held == 0
        assert registrar.live  # the cache keeps it for the next who asks


def test_a_with_block_may_release_before_its_end() -> None:
    with cache_over(ScriptedRegistrar()) as cache:
        with cache.get(bytearray(5000)) as registration:
            registration.release()
            assert cache.stats().held == 0
        assert cache.stats().held == 0


def test_each_get_is_a_holder_of_its_own() -> None:
    registrar, buffer = ScriptedRegistrar(), bytearray(5000)
    with cache_over(registrar) as cache:
        held = [cache.get(buffer) for _ in range(5)]
        assert len({id(each) for each in held}) == 5
        assert cache.evict(buffer) == 1
        for registration in held:
            assert registrar.pinned_bytes == 5000
            assert not registration.valid
            assert registration.handle == 1
            registration.release()
            registration.release()  # again does not count as another's
        assert registrar.pinned_bytes == 0


def test_the_last_reference_lets_go_in_whatever_thread() -> None:
    registrar, buffer = ScriptedRegistrar(), bytearray(5000)
    with cache_over(registrar) as cache:
        held = [cache.get(buffer), cache.get(buffer)]
        cache.clear()
        in_thread(held.pop)
        assert registrar.live
        in_thread(held.clear)
        assert not registrar.live
        assert registrar.calls[-1].thread != registrar.calls[0].thread


def test_a_registration_keeps_its_cache() -> None:
    registrar, buffer = ScriptedRegistrar(), bytearray(5000)
    cache = usermm.RegistrationCache(registrar)
    weak = weakref.ref(cache)
    cache.get(bytearray(100))
    registration = cache.get(buffer)
    del cache
    gc.collect()
    assert weak() is not None
    assert registration.valid
    assert len(registrar.live) == 2
    del registration
    assert weak() is None
    registrar.check(empty=True)


def test_a_handle_comes_back_once_and_is_then_forgotten() -> None:
    class Handle:
        pass

    class Registrar:
        traits = Traits()

        def __init__(self) -> None:
            self.taken_back: list[int] = []

        def register(self, _address: int, _length: int) -> Handle:
            handle = Handle()
            weak.append(weakref.ref(handle))
            return handle

        def deregister(self, handle: Handle) -> None:
            self.taken_back.append(id(handle))

    weak: list[Any] = []
    registrar, buffer = Registrar(), bytearray(5000)
    with usermm.RegistrationCache(registrar) as cache:
        registration = cache.get(buffer)
        identity = id(registration.handle)
        cache.evict(buffer)
        assert registration.handle is weak[0]()
        registration.release()
        assert (registrar.taken_back, weak[0]()) == ([identity], None)
        cache.get(buffer)
        identity = id(weak[1]())
    assert registrar.taken_back[1:] == [identity]
    assert weak[1]() is None


# Leaving the look-up


def _unmapped(arena: Arena, start: int) -> None:
    arena.munmap(start + PAGE, PAGE)
    arena.mmap(start + PAGE, PAGE)


def _replaced(arena: Arena, start: int) -> None:
    arena.mmap(start + PAGE, PAGE)


def _moved(arena: Arena, start: int) -> None:
    arena.mremap(start, 4 * PAGE, 4 * PAGE, calls.MREMAP_MAYMOVE | calls.MREMAP_FIXED, start + (1 << 20))
    arena.mmap(start, 4 * PAGE)


def _discarded(arena: Arena, start: int) -> None:
    arena.madvise(start + 3 * PAGE, PAGE, mmap.MADV_DONTNEED)


@pytest.mark.parametrize(
    ("change", "field"),
    [(_unmapped, "unmapped"), (_replaced, "unmapped"), (_moved, "remapped"), (_discarded, "discarded")],
)
@pytest.mark.parametrize("probe", [None, True, False])
def test_memory_that_went_is_registered_anew(change: Callable[[Arena, int], None], field: str, probe: Any) -> None:
    registrar = ScriptedRegistrar()
    with contextlib.closing(Arena()) as arena, cache_over(registrar, linger_s=None) as cache:
        start = arena.mmap(arena.start, 4 * PAGE)
        memory = _At(start, 4 * PAGE)
        with cache.get(memory, probe=probe) as before, cache.get(memory, probe=probe):
            change(arena, start)
            assert not before.valid
            assert before.handle == 1
            with cache.get(memory, probe=probe) as after:
                assert (after.handle, after.valid, before.valid) == (2, True, False)
            assert [pin.handle for pin in registrar.live] == [1, 2]
        assert [pin.handle for pin in registrar.live] == [2]
        assert getattr(cache.stats(), field) == cache.stats().invalidations == 1


class _At:
    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size


def test_a_neighbour_that_goes_does_not_matter() -> None:
    with contextlib.closing(Arena()) as arena, cache_over(ScriptedRegistrar()) as cache:
        start = arena.mmap(arena.start, 4 * PAGE)
        with cache.get(_At(start + PAGE, PAGE)) as registration:
            arena.munmap(start, PAGE)
            arena.munmap(start + 2 * PAGE, PAGE)
            assert registration.valid
        assert cache.get(_At(start + PAGE, PAGE)).handle == 1


def test_evict_takes_what_overlaps_and_clear_everything() -> None:
    block, registrar = Block(4 * PAGE), ScriptedRegistrar()
    with cache_over(registrar) as cache:
        parts = [block.part(page * PAGE, PAGE) for page in range(4)]
        held = [cache.get(part) for part in parts]
        assert cache.evict(block.part(PAGE - 1, 2)) == 2
        assert [registration.valid for registration in held] == [False, False, True, True]
        assert cache.evict(block.part(PAGE - 1, 2)) == 0
        assert cache.get(parts[0]).handle == 5
        assert cache.clear() == 3
        assert cache.clear() == 0
        assert [pin.handle for pin in registrar.live] == [1, 2, 3, 4]
        assert cache.stats().held == 4
        held.clear()


def test_evict_takes_any_buffer_that_says_where_it_is() -> None:
    """Also a read-only one, which this device could not be given."""
    writable = bytearray(5000)
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(writable)
        assert cache.evict(memoryview(writable).toreadonly()) == 1


# The end


def test_close_waits_for_holders_and_may_be_called_again() -> None:
    registrar, buffer = ScriptedRegistrar(), bytearray(5000)
    with cache_over(registrar) as cache:
        cache.get(bytearray(100))
        registration = cache.get(buffer)
        cache.close()
        cache.close()
        assert not registration.valid
        assert (registration.handle, registration.length) == (2, 5000)
        assert registrar.live == (Pin(2, registration.address, 5000),)
        registration.release()
        assert not registrar.live


@pytest.mark.parametrize("registered", [False, True])
def test_a_closed_cache_refuses(registered: bool) -> None:
    buffer = bytearray(5000)
    cache = usermm.RegistrationCache(ScriptedRegistrar())
    if registered:
        cache.get(buffer)
    cache.close()
    for probe in (None, True, False):
        line = refused_line(lambda probe=probe: cache.get(buffer, probe=probe), usermm.ClosedError)
        assert "the cache is closed: make a new one" in line
    for call in (lambda: cache.evict(buffer), cache.clear, cache.fileno, lambda: cache.expire(1)):
        refused_line(call, usermm.ClosedError)
    assert cache.stats().registrations == cache.stats().pinned == 0
    assert repr(cache) == "<usermm.RegistrationCache of 0 registrations, 0 bytes pinned>"


def test_a_dropped_cache_gives_everything_back() -> None:
    registrar = ScriptedRegistrar()
    cache = usermm.RegistrationCache(registrar)
    for _ in range(10):
        cache.get(bytearray(5000))
    del cache
    registrar.check(empty=True)
    assert len(registrar.calls) >= 2


# Which object asks


def _probes(cache: usermm.RegistrationCache[Any], buffer: object, probe: bool | None = None) -> int:
    """How many system calls a get made."""
    before = cache.stats().probes
    cache.get(buffer, probe=probe)
    return cache.stats().probes - before


def test_only_a_new_object_that_finds_something_asks_for_a_quiet_moment() -> None:
    """What is made for the call is of what is mapped now, whatever anybody is still unmapping."""
    array_, registrar = np.zeros(5000, np.uint8), ScriptedRegistrar()
    with cache_over(registrar) as cache:
        assert [_probes(cache, array_) for _ in range(4)] == [0, 0, 0, 0]
        view = memoryview(array_)
        assert [_probes(cache, view) for _ in range(3)] == [1, 0, 0]
        assert [_probes(cache, array_, True) for _ in range(3)] == [1, 1, 1]
        assert [_probes(cache, array_, False) for _ in range(3)] == [0, 0, 0]
        assert len(registrar.calls) == 1


def test_an_object_that_asked_without_probe_has_not_asked() -> None:
    with cache_over(ScriptedRegistrar()) as cache:
        view = memoryview(bytearray(5000))
        assert _probes(cache, view, False) == 0
        assert _probes(cache, view) == 1
        assert _probes(cache, view) == 0


def test_an_object_that_takes_no_weak_reference_asks_each_time() -> None:
    """Whether it still is the same object cannot be told."""
    with cache_over(ScriptedRegistrar()) as cache:
        buffer = bytearray(5000)
        assert [_probes(cache, buffer) for _ in range(3)] == [0, 1, 1]


def test_an_object_that_moved_asks_again() -> None:
    block = Block(2 * PAGE)
    part = block.part(0, PAGE)
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(block)
        assert [_probes(cache, part) for _ in range(2)] == [1, 0]
        part.address += PAGE
        assert [_probes(cache, part) for _ in range(2)] == [1, 0]
        part.size -= 1
        assert [_probes(cache, part) for _ in range(2)] == [1, 0]


def test_another_object_in_the_place_of_a_dead_one_asks_again() -> None:
    """The allocator gives the next view the address of the last one."""
    memory, places = bytearray(5000), []
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(memory)
        for _ in range(20):
            view = memoryview(memory)
            places.append(id(view))
            assert [_probes(cache, view) for _ in range(2)] == [1, 0]
            del view
    assert len(set(places)) < 20, "no address was used again: the test has tried nothing"


def test_thousands_of_objects_are_remembered_and_forgotten() -> None:
    memory = Block()
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(memory)
        for _ in range(3):
            parts = [memory.part(0, PAGE) for _ in range(3000)]
            assert sum(_probes(cache, part) for part in parts) == 3000
            assert sum(_probes(cache, part) for part in parts) < 300  # a few share a place in the table
            del parts


def test_objects_of_one_moment_pay_for_themselves_only() -> None:
    """A place in the table that was given to several in vain lets some pass; who asks twice is remembered soon."""
    memory = bytearray(5000)
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(memory)
        for _ in range(100):
            assert _probes(cache, memoryview(memory)) == 1
        kept = memoryview(memory)
        assert sum(_probes(cache, kept) for _ in range(40)) <= 20
        assert _probes(cache, kept) == 0


def test_what_was_evicted_is_not_found_through_its_object() -> None:
    array_ = np.zeros(5000, np.uint8)
    with cache_over(ScriptedRegistrar()) as cache:
        with cache.get(array_) as held:
            cache.evict(array_)
            assert cache.get(array_).handle == 2
            assert held.handle == 1
        cache.clear()
        assert cache.get(array_).handle == 3


# Classes


def test_subclasses_may_have_constructors_and_attributes_of_their_own() -> None:
    class Named(usermm.RegistrationCache[object]):
        def __init__(self, registrar: ScriptedRegistrar, **options: Any) -> None:
            self.name = f"{registrar.max_bytes} {options}"

        def get(self, buffer: object, /, **options: Any) -> usermm.Registration:
            self.name += "."
            return super().get(buffer, **options)

    registrar = ScriptedRegistrar()
    with Named(registrar, max_count=1) as cache:
        for _ in range(3):
            cache.get(bytearray(5000))
        assert cache.name == "None {'max_count': 1}..."
        assert cache.stats().pinned == 1
        assert cache.registrar is registrar
    registrar.check(empty=True)


def test_a_subclass_that_does_not_call_up_loses_nothing() -> None:
    class Silent(usermm.RegistrationCache[object]):
        def close(self) -> None:
            pass

    registrar = ScriptedRegistrar()
    with Silent(registrar) as cache:
        cache.get(bytearray(5000))
    assert registrar.live
    del cache
    registrar.check(empty=True)


def test_a_subclass_may_define_equality() -> None:
    class Equal(usermm.RegistrationCache[object]):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        __hash__ = None  # type: ignore[assignment]

    with Equal(ScriptedRegistrar()) as cache:
        cache.get(bytearray(5000))


def test_a_registration_is_made_by_a_cache_only() -> None:
    with pytest.raises(TypeError):
        usermm.Registration()
    with pytest.raises(TypeError):
        type("Mine", (usermm.Registration,), {})
    with cache_over(ScriptedRegistrar()) as cache, pytest.raises(AttributeError):
        cache.get(bytearray(5000)).handle = 5  # type: ignore[misc]


def test_two_caches_have_nothing_in_common() -> None:
    first, second, array_ = ScriptedRegistrar(), ScriptedRegistrar(), np.zeros(5000, np.uint8)
    with cache_over(first) as one, cache_over(second) as other:
        one.get(array_)
        assert other.stats().pinned == 0
        held = other.get(array_)
        one.clear()
        assert held.valid
        assert (len(first.live), len(second.live)) == (0, 1)
        held.release()


def test_two_caches_of_one_registrar_and_one_memory() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar) as one, usermm.RegistrationCache(registrar) as other:
        assert (one.get(block).handle, other.get(block).handle) == (1, 2)
        block.discard()
        assert (one.get(block).handle, other.get(block).handle) == (3, 4)
