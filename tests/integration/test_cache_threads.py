"""Many threads and one cache: nobody waits for another's registration without need, and nobody is given a stale one."""

from __future__ import annotations

import contextlib
import errno
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.caches import PAGE, Block, cache_over, eventually
from support.calls import refused_line
from support.threads import PATIENCE_S, Gate, alarm, in_thread, running

import usermm
from usermm import ClosedError, LimitError, OverlapError, RegistrationError
from usermm.monitors import calls
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar

REFUSED = Traits(overlap=Overlap.REFUSED)
ONE_THREAD = Traits(any_thread=False)


# Slow registrars


def test_others_go_on_while_one_registers() -> None:
    registrar, slow, quick, new = ScriptedRegistrar(), Block(), Block(), Block()
    gate = Gate()
    with cache_over(registrar) as cache:
        cache.get(quick)
        registrar.at_register(2, runs=gate)
        with running(lambda: cache.get(slow)), gate:
            for probe in (None, True, False) * 10:
                assert cache.get(quick, probe=probe).handle == 1
            assert cache.get(quick.part(5, 5)).handle == 1
            assert in_thread(lambda: cache.get(new).handle) == 2, "handles are given when the work is done"
            assert cache.evict(new) == 1
            assert cache.stats().registrations == 1
            assert cache.explain(slow).startswith("miss")
        assert cache.get(slow).handle == 3


def test_others_go_on_while_one_deregisters() -> None:
    registrar, slow, quick, new = ScriptedRegistrar(), Block(), Block(), Block()
    gate = Gate()
    with cache_over(registrar) as cache:
        cache.get(quick)
        cache.get(slow)
        registrar.at_deregister(1, runs=gate)
        with running(lambda: cache.evict(slow)), gate:
            assert cache.get(quick).handle == 1
            assert in_thread(lambda: cache.get(new).handle) == 3
            assert cache.get(slow).handle == 4, "this device does not mind"
        assert [pin.handle for pin in registrar.live] == [1, 3, 4]


@pytest.mark.parametrize("count", [2, 8])
def test_threads_that_miss_the_same_register_it_once(count: int) -> None:
    registrar, block, gate = ScriptedRegistrar(), Block(4 * PAGE), Gate()
    handles: list[object] = []

    def get(memory: object) -> None:
        handles.append(cache.get(memory).handle)

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=gate)
        parts = [block] + [block.part(number * 7, PAGE) for number in range(1, count)]
        first = threading.Thread(target=get, args=(block,))
        first.start()
        with gate:
            rest = [threading.Thread(target=get, args=(part,)) for part in parts[1:]]
            for thread in rest:
                thread.start()
            assert eventually(lambda: cache.stats().waits >= count - 1)
        for thread in [first, *rest]:
            thread.join(PATIENCE_S)
        assert handles == [1] * count
        assert len(registrar.calls) == 1


def test_who_waited_for_a_failure_tries_himself() -> None:
    registrar, block, gate = ScriptedRegistrar(), Block(), Gate()
    outcomes: list[object] = []

    def get() -> None:
        try:
            outcomes.append(cache.get(block).handle)
        except ValueError as error:
            outcomes.append(str(error))

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=gate, raises=ValueError("the first"))
        registrar.at_register(2, raises=ValueError("the second"))
        with running(get, get, get), gate:
            assert eventually(lambda: cache.stats().waits >= 2)
        assert sorted(outcomes, key=str) == [1, "the first", "the second"]
        assert cache.stats().pinned == 1


def test_who_waited_for_memory_that_went_registers_what_is_there() -> None:
    registrar, block, gate = ScriptedRegistrar(), Block(), Gate()
    handles: list[object] = []
    with cache_over(registrar) as cache:
        registrar.at_register(1, runs_after=gate)
        with running(*[lambda: handles.append(cache.get(block).handle)] * 2), gate:
            assert eventually(lambda: cache.stats().waits)
            block.discard()
        assert handles == [2, 2]
        assert [pin.handle for pin in registrar.live] == [2]


def test_a_device_that_refuses_overlaps_makes_the_next_wait() -> None:
    registrar, block, gate = ScriptedRegistrar(REFUSED), Block(4 * PAGE), Gate()

    def get_after() -> None:
        gate.entered.wait(PATIENCE_S)
        with contextlib.suppress(OverlapError):  # the other may still hold what it was given
            assert cache.get(block.part(PAGE, 3 * PAGE)).length == 4 * PAGE

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=gate)
        with running(lambda: cache.get(block.part(0, 2 * PAGE)), get_after), gate:
            assert eventually(lambda: cache.stats().waits)
            assert len(registrar.calls) == 1
        registrar.check()


def test_a_device_that_refuses_overlaps_is_not_given_what_it_is_just_giving_back() -> None:
    registrar, block, gate = ScriptedRegistrar(REFUSED), Block(), Gate()
    with cache_over(registrar) as cache:
        cache.get(block)
        registrar.at_deregister(1, runs=gate)
        with running(lambda: cache.evict(block)), gate, running(lambda: cache.get(block)):
            assert eventually(lambda: cache.stats().waits)
            assert len(registrar.calls) == 2
            gate.opened.set()
        registrar.check()
        assert [pin.handle for pin in registrar.live] == [2]


def test_a_full_cache_waits_for_room_that_another_is_making() -> None:
    registrar, blocks, gate = ScriptedRegistrar(), [Block() for _ in range(2)], Gate()
    with cache_over(registrar, max_count=1) as cache:
        cache.get(blocks[0])
        registrar.at_deregister(1, runs=gate)
        with running(lambda: cache.evict(blocks[0])), gate, running(lambda: cache.get(blocks[1])):
            assert eventually(lambda: cache.stats().waits)
            gate.opened.set()
        assert (registrar.peak_count, cache.stats().registrations) == (1, 1)


# Interrupting who waits


def test_an_interrupt_ends_the_wait_for_another_thread() -> None:
    registrar, block, gate = ScriptedRegistrar(), Block(), Gate()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=gate)
        with running(lambda: cache.get(block)), gate:
            with alarm(interrupt, 0.1), pytest.raises(KeyboardInterrupt):
                cache.get(block)
            assert cache.stats().held == 0
        assert cache.get(block).handle == 1
        assert len(registrar.calls) == 1


def test_a_handler_that_returns_does_not_end_the_wait() -> None:
    registrar, block, other, gate = ScriptedRegistrar(), Block(), Block(), Gate()
    seen: list[object] = []

    def handler(*_: object) -> None:
        """Whose own use of the cache does not disturb who waits in it."""
        seen.append(cache.get(other).handle)
        cache.evict(other)
        if len(seen) == 3:
            gate.opened.set()

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=gate)
        with running(lambda: cache.get(block)), gate, alarm(handler, 0.05, 0.05):
            registration = cache.get(block)
        assert registration.valid
        registration.release()
        assert len(seen) >= 3


def test_an_interrupt_in_register_ends_it() -> None:
    registrar, block = ScriptedRegistrar(), Block()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=lambda: time.sleep(PATIENCE_S))
        with alarm(interrupt, 0.1), pytest.raises(KeyboardInterrupt):
            cache.get(block)
        assert cache.stats().pinned == 0
        assert cache.get(block).handle == 1


# Meanwhile, in another thread


@pytest.mark.parametrize("when", ["runs", "runs_after"])
def test_a_cache_that_is_closed_while_one_registers(when: str) -> None:
    registrar, block, gate = ScriptedRegistrar(), Block(), Gate()
    with cache_over(registrar) as cache:
        registrar.at_register(1, **{when: gate})
        get = [lambda: refused_line(lambda: cache.get(block), ClosedError, errno.EBADF)] * 2
        with running(*get), gate:
            assert eventually(lambda: cache.stats().waits)
            cache.close()
            assert len(registrar.calls) == 1
        registrar.check(empty=True)


def test_clear_does_not_reach_what_is_only_being_made() -> None:
    registrar, block, gate = ScriptedRegistrar(), Block(), Gate()
    with cache_over(registrar) as cache:
        registrar.at_register(1, runs_after=gate)
        with running(lambda: cache.get(block)), gate:
            assert cache.clear() == cache.evict(block) == 0
        assert cache.get(block).handle == 1


def test_one_registration_released_by_all() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar) as cache:
        for _ in range(50):
            kept, shared = cache.get(block), cache.get(block)
            with running(*[shared.release] * 6):
                pass
            assert kept.valid
            assert cache.stats().held == 1
            kept.release()
            assert cache.stats().held == 0
        assert len(registrar.calls) == 1


def test_a_dropped_cache_in_many_threads() -> None:
    block = Block()

    def drop() -> None:
        for _ in range(30):
            registrar = ScriptedRegistrar()
            cache = usermm.RegistrationCache(registrar)
            cache.get(block)
            registration = cache.get(block.part(5, 5))
            del cache
            assert registration.valid
            del registration
            registrar.check(empty=True)

    with running(*[drop] * 4):
        pass


# Registrars of one thread


def test_only_its_thread_registers_and_all_may_hit() -> None:
    registrar, blocks = ScriptedRegistrar(ONE_THREAD), [Block() for _ in range(4)]
    with cache_over(registrar, max_count=3) as cache:
        for block in blocks[:3]:
            cache.get(block)
        assert in_thread(lambda: cache.get(blocks[0]).handle) == 1
        line = in_thread(lambda: refused_line(lambda: cache.get(blocks[3]), RegistrationError, errno.EXDEV))
        assert "the one that made the cache: ask there" in line
        assert (cache.stats().registrations, cache.stats().evictions) == (3, 0), "a refusal changes nothing"


@pytest.mark.parametrize(
    "call",
    [
        lambda cache, block: cache.get(block),
        lambda cache, block: cache.evict(block),
        lambda cache, _block: cache.clear(),
        lambda cache, _block: cache.expire(0),
        lambda cache, _block: cache.close(),
    ],
)
def test_what_others_let_go_waits_for_its_thread(call: Callable[[Any, Block], object]) -> None:
    registrar, blocks, other = ScriptedRegistrar(ONE_THREAD), [Block() for _ in range(3)], Block()
    with cache_over(registrar) as cache:
        held = [cache.get(block) for block in blocks]
        cache.clear()
        in_thread(lambda: [registration.release() for registration in held])
        assert len(registrar.live) == 3
        call(cache, other)
        assert [pin.address for pin in registrar.live] in ([], [other.address])
        registrar.check()


def test_what_others_evict_and_close_waits_too() -> None:
    registrar, blocks = ScriptedRegistrar(ONE_THREAD), [Block() for _ in range(3)]
    with cache_over(registrar) as cache:
        for block in blocks:
            cache.get(block)
        assert in_thread(lambda: cache.evict(blocks[0])) == 1
        in_thread(cache.close)
        assert len(registrar.live) == 3
        refused_line(lambda: cache.get(blocks[0]), ClosedError)
        cache.close()
        registrar.check(empty=True)


def test_memory_that_waits_for_its_thread_counts() -> None:
    registrar, blocks = ScriptedRegistrar(ONE_THREAD), [Block() for _ in range(2)]
    with cache_over(registrar, max_count=1) as cache:
        cache.get(blocks[0])
        in_thread(cache.clear)
        assert (cache.stats().pinned, cache.stats().registrations) == (1, 0)
        assert cache.get(blocks[1]).handle == 2
        assert registrar.peak_count == 1


def test_a_cache_that_is_dropped_in_another_thread_says_so() -> None:
    """Nobody can deregister then; the handles must not leak, and it must not go unnoticed."""

    class Handle:
        pass

    registrar, block, handle = ScriptedRegistrar(ONE_THREAD), Block(), Handle()
    registrar.at_register(1, returns=handle)
    caches = [usermm.RegistrationCache(registrar)]
    caches[0].get(block)
    before = sys.getrefcount(handle)
    with pytest.warns(ResourceWarning, match=r"1 registrations stay with the device; close\(\) it there"):
        in_thread(caches.clear)
    assert sys.getrefcount(handle) == before - 1
    assert len(registrar.live) == 1
    registrar.check()


# Churn


def test_no_thread_is_ever_given_a_stale_registration() -> None:
    """Each thread maps pages where others have just unmapped theirs. The registrar notes whose pages it was given."""
    owners: dict[int, int] = {}

    class Registrar:
        traits = Traits()

        def register(self, address: int, length: int) -> tuple[int, ...]:
            return tuple(owners.get(page, 0) for page in range(address, address + length, PAGE))

        def deregister(self, _handle: object) -> None:
            pass

    def churn(seed: int) -> None:
        dice = random.Random(seed)
        for number in range(250):
            mark = seed << 32 | number + 1
            block = Block(PAGE * dice.randint(1, 3))
            pages = range(block.address, block.address + block.nbytes, PAGE)
            owners.update(dict.fromkeys(pages, mark))
            for probe in dice.sample([None, True, None, None], dice.randint(1, 4)):
                with cache.get(block, probe=probe) as registration:
                    offset = (block.address - registration.address) // PAGE
                    if set(registration.handle[offset : offset + len(pages)]) != {mark}:
                        wrong.append((mark, registration.handle))
            block.unmap()

    wrong: list[object] = []
    with usermm.RegistrationCache(Registrar(), max_count=20) as cache:
        with running(*[lambda seed=seed: churn(seed) for seed in range(1, 7)]):
            pass
        assert wrong == []
        assert cache.stats().misses >= 1500
        assert cache.stats().held == 0


@pytest.mark.parametrize("overlap", list(Overlap))
def test_everything_at_once(overlap: Overlap) -> None:
    registrar = ScriptedRegistrar(Traits(overlap=overlap, granularity_bytes=64), max_bytes=40 * PAGE)
    block, arrays = Block(64 * PAGE), [np.zeros(3000, np.uint8) for _ in range(10)]
    refusals = (OverlapError, LimitError, RegistrationError)

    def work(seed: int) -> None:
        dice, held = random.Random(seed), []
        for _ in range(200):
            first = dice.randrange(60 * PAGE)
            memory = dice.choice([block.part(first, dice.randrange(1, 4 * PAGE)), dice.choice(arrays)])
            action = dice.randrange(10)
            with contextlib.suppress(*refusals):
                if action < 6:
                    held.append(cache.get(memory))
                elif action == 6:
                    cache.evict(memory)
                elif action == 7:
                    calls.advise(block.address + first // PAGE * PAGE, PAGE, calls.MADV_DONTNEED)
                elif action == 8:
                    cache.explain(memory)
                    cache.expire(dice.randrange(3))
            del held[: dice.randrange(3)]

    with cache_over(registrar, max_bytes=30 * PAGE, max_count=8, linger_s=0.02) as cache:
        with running(*[lambda seed=seed: work(seed) for seed in range(6)]):
            pass
        assert cache.stats().held == 0
        assert registrar.peak_bytes <= 30 * PAGE
        assert registrar.peak_count <= 8
        registrar.check()
