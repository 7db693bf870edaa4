"""Objects that own their memory: its registration goes just before they free it, if nobody needs it any more."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from support.caches import PAGE, Block, cache_over, eventually
from support.calls import refused_line
from support.processes import run_quietly
from support.threads import in_thread, running

import usermm
from usermm.registrars import Traits
from usermm.testing import ScriptedRegistrar

LENGTH = 1 << 18  # bytes; what is larger than 512 KiB is not taken off early
Cache = usermm.RegistrationCache[object]


def a_map() -> Any:
    """Which is unmapped before the callbacks of its weak references are called."""
    return mmap.mmap(-1, LENGTH)


class an_array(Block):  # noqa: N801
    """As NumPy's are: the memory is there while the callbacks are called."""

    base = None

    def __init__(self) -> None:
        self.kept = Block(LENGTH)
        self.address, self.nbytes, self.mapped = self.kept.address, LENGTH, False


OWNERS = pytest.mark.parametrize("make", [an_array, a_map])


def in_place(owner: Any) -> Any:
    """The same addresses, asked for by something that owns nothing and keeps nothing alive."""
    address, size = usermm._core.buffer_range(owner)
    return SimpleNamespace(address=address, size=size)


@OWNERS
def test_its_registration_goes_with_it(make: Callable[[], Any]) -> None:
    registrar = ScriptedRegistrar()
    with cache_over(registrar, linger_s=None) as cache:
        cache.upkeep_due = False  # nobody else gives anything back
        for number in range(1, 6):
            owner = make()
            assert [cache.get(owner).handle for _ in range(3)] == [number] * 3
            del owner
            cache.expire(0)
            assert not registrar.live


_NUMPY = """
    import ctypes
    import numpy as np
    import usermm
    from usermm.testing import ScriptedRegistrar

    ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: it stays at its first value
    registrar = ScriptedRegistrar()
    fillers = []  # of holes in the heap, which malloc takes before it maps anything

    def mapped():
        while (array := np.zeros(1 << 18, np.uint8)).__array_interface__["data"][0] % 4096 != 16:
            fillers.append(array)
        return array

    with usermm.RegistrationCache(registrar, linger_s=None) as cache:
        cache.upkeep_due = False
        for number in range(1, 6):
            owner = mapped()
            assert [cache.get(owner).handle for _ in range(3)] == [number] * 3
            del owner
            assert not registrar.live
        small = np.zeros(1 << 11, np.uint8)
        cache.get(small)
        del small
        print([pin.handle for pin in registrar.live], cache.stats().retirements, cache.stats().unmapped)
"""


def test_arrays_of_numpy(tmp_path: Path) -> None:
    """A small one is of the heap, where the registration stays true for the next who gets that memory."""
    assert run_quietly(_NUMPY, tmp_path) == "[6] 5 0\n"


@OWNERS
def test_what_is_held_stays_registered_and_is_not_valid(make: Callable[[], Any]) -> None:
    registrar = ScriptedRegistrar()
    with cache_over(registrar, linger_s=None) as cache:
        owner = make()
        registration = cache.get(owner)
        del owner
        assert not registration.valid
        assert len(registrar.live) == 1
        registration.release()
        assert not registrar.live


@OWNERS
def test_others_on_the_same_memory_are_told(make: Callable[[], Any]) -> None:
    """The watch on the pages is everybody's."""
    registrar, other = ScriptedRegistrar(), ScriptedRegistrar()
    with cache_over(registrar) as cache, cache_over(other) as second, usermm.Ummunotify() as device:
        for _ in range(5):
            owner = make()
            cache.get(owner)
            held = second.get(in_place(owner))
            cookie = device.register(owner)
            seen = device.generation
            del owner
            assert not held.valid
            assert not device.check(seen)
            device.unregister(cookie)
            held.release()


@OWNERS
def test_the_next_owner_of_the_address_is_watched(make: Callable[[], Any]) -> None:
    places = set()
    with cache_over(ScriptedRegistrar(), linger_s=None) as cache:
        for _ in range(20):
            owner = make()
            places.add(usermm._core.buffer_range(owner)[0])
            registration = cache.get(owner)
            part = in_place(owner)
            assert registration.valid
            registration.release()
            held = cache.get(part)
            del owner
            assert not held.valid
            held.release()
    assert len(places) < 20, "no address was used again: the test has tried nothing"


def test_a_view_that_dies_leaves_the_registration() -> None:
    registrar, array = ScriptedRegistrar(), np.zeros(LENGTH, np.uint8)
    with cache_over(registrar, linger_s=None) as cache:
        for view in (array[:], memoryview(array), np.frombuffer(array, np.uint8)):
            assert cache.get(view).handle == 1
        del view
        gc.collect()
        assert cache.get(array).handle == 1


def test_an_owner_that_dies_in_another_thread() -> None:
    registrar = ScriptedRegistrar(Traits(any_thread=False))
    with cache_over(registrar, linger_s=None) as cache:
        owners = [a_map(), an_array()]
        for owner in owners:
            cache.get(owner)
        del owner
        in_thread(owners.clear)
        assert len(registrar.live) == 2, "it is not that thread's to give back"
        cache.expire(0)
        registrar.check(empty=True)


def test_an_owner_in_a_cycle() -> None:
    registrar = ScriptedRegistrar()
    with cache_over(registrar, linger_s=None) as cache:
        cycle: list[Any] = [an_array(), a_map()]
        cycle.append(cycle)
        for owner in cycle[:2]:
            cache.get(owner)
        del cycle, owner
        gc.collect()
        assert eventually(lambda: not registrar.live)


def test_a_deregister_that_fails_there_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    registrar, owner = ScriptedRegistrar(), an_array()
    registrar.at_deregister(1, raises_after=ValueError("stuck"))
    with cache_over(registrar, linger_s=None) as cache:
        cache.get(owner)
        try:
            raise KeyError("on its way")
        except KeyError:
            del owner
        assert eventually(lambda: not registrar.live)
        assert [record.name for record in caplog.records] == ["usermm.cache"]
        caplog.clear()


def test_a_deregister_that_calls_the_cache_there() -> None:
    registrar, kept = ScriptedRegistrar(), an_array()
    with cache_over(registrar, linger_s=None) as cache:
        cache.get(kept)
        for call in (cache.clear, lambda: cache.get(kept), gc.collect, cache.close):
            owner = an_array()
            cache.get(owner)
            registrar.at_deregister(None, runs=call)
            del owner
            registrar.at_deregister(None)
            assert cache.stats().held == 0


_DROPPED = """
    import weakref
    import numpy as np
    import usermm
    from usermm.testing import ScriptedRegistrar

    living = np.zeros(1 << 18, np.uint8)
    for _ in range(20):
        caches = [usermm.RegistrationCache(ScriptedRegistrar(), linger_s=None)]
        owner = np.zeros(1 << 18, np.uint8)
        caches[0].get(owner)

        def drop(_):
            caches.clear()
            caches.append(usermm.RegistrationCache(ScriptedRegistrar(), linger_s=None))
            caches[0].get(living)

        weak = weakref.ref(owner, drop)
        del owner
        assert caches[0].stats().registrations == 1
        assert caches[0].get(living).handle == 1
    print("alive")
"""


def test_a_cache_that_goes_in_a_callback_of_the_same_death(tmp_path: Path) -> None:
    """All callbacks of an object's weak references are collected before the first is called."""
    assert run_quietly(_DROPPED, tmp_path) == "alive\n"


class Strange:
    """Looks as if it might own memory that it does not."""

    def __init__(self, array: Any, base: Callable[[], object]) -> None:
        self.array, self._base = array, base
        self.nbytes = array.nbytes

    def data_ptr(self) -> int:
        return int(self.array.data_ptr())

    @property
    def base(self) -> object:
        return self._base()


def _raise(error: BaseException) -> Any:
    raise error


def test_objects_with_a_base_of_their_own() -> None:
    registrar, array = ScriptedRegistrar(), an_array()
    with cache_over(registrar, linger_s=None) as cache:
        bases: list[Callable[[], object]] = [
            lambda: None,
            lambda: array,
            lambda: _raise(ValueError("no")),
            lambda: _raise(AttributeError("no")),
            lambda: cache.get(array),
            cache.clear,
            gc.collect,
        ]
        for base in bases:
            cache.clear()
            strange = Strange(array, base)
            with cache.get(strange) as registration:
                assert registration.address == array.address
            del strange
            with cache.get(array) as registration:
                assert registration.valid
        assert cache.stats().held == 0
        strange = Strange(array, cache.close)
        cache.clear()
        with cache.get(strange) as registration:
            assert not registration.valid
        refused_line(lambda: cache.get(strange), usermm.ClosedError)


def test_an_interrupt_in_a_base_is_kept() -> None:
    registrar, array = ScriptedRegistrar(), an_array()
    with cache_over(registrar, linger_s=None) as cache:
        strange = Strange(array, lambda: _raise(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache.get(strange)
        assert cache.stats().held == 0


class Phoenix(an_array):
    """Comes back from its own death."""

    graves: ClassVar[list[Any]] = []

    def __del__(self) -> None:
        self.graves.append(self)


def test_an_owner_that_is_resurrected() -> None:
    with cache_over(ScriptedRegistrar(), linger_s=None) as cache:
        phoenix = Phoenix()
        cache.get(phoenix)
        weak = weakref.ref(phoenix)
        del phoenix
        phoenix = Phoenix.graves.pop()
        with cache.get(phoenix) as registration:
            assert (registration.handle, registration.valid) == (1, True)
            assert weak() is phoenix
        held = cache.get(in_place(phoenix))
        del phoenix  # nobody finalizes it twice
        assert not held.valid
        held.release()


def test_no_owner_is_ever_given_a_stale_registration() -> None:
    """As in test_cache_threads.py, with arrays and mappings that die and are made anew in the same places."""
    owners: dict[int, int] = {}

    class Registrar:
        traits = Traits()

        def register(self, address: int, length: int) -> set[int]:
            return {owners.get(page, 0) for page in range(address & -PAGE, address + length - PAGE, PAGE)}

        def deregister(self, _handle: object) -> None:
            pass

    def churn(seed: int) -> None:
        for number in range(150):
            mark = seed << 32 | number + 1
            owner = (an_array if number % 2 else a_map)()
            address, length = usermm._core.buffer_range(owner)
            owners.update(dict.fromkeys(range(address & -PAGE, address + length, PAGE), mark))
            for probe in (None, None, True)[: number % 4]:
                with cache.get(owner, probe=probe) as registration:
                    if registration.handle != {mark}:
                        wrong.append((mark, registration.handle))
            del owner

    wrong: list[object] = []
    with usermm.RegistrationCache(Registrar(), linger_s=None) as cache:
        with running(*[lambda seed=seed: churn(seed) for seed in range(1, 7)]):
            pass
        assert wrong == []
