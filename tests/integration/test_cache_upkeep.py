"""What a cache gives back when nobody asks it any more, and when.

No time is measured: where something must stay, a control that had the same time must have gone.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import select
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.caches import PAGE, Block, cache_over, eventually
from support.calls import refused_line
from support.threads import Gate, in_thread

import usermm
from usermm import ArgumentError, ArgumentTypeError
from usermm.monitors import calls
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar

LINGER_S = 0.05
Cache = usermm.RegistrationCache[object]


def empty(registrar: ScriptedRegistrar) -> bool:
    """Without asking the cache anything."""
    return eventually(lambda: not registrar.live)


def upkeeps() -> int:
    return sum(thread.name == "usermm cache upkeep" for thread in threading.enumerate())


# Memory that went


def _move(block: Block) -> None:
    moved = calls.remap(block.address, block.nbytes, block.nbytes, calls.MREMAP_MAYMOVE | 2, block.address + (1 << 30))
    calls.unmap(moved, block.nbytes)
    block.mapped = False


@pytest.mark.parametrize("change", [Block.unmap, Block.discard, _move])
@pytest.mark.parametrize("linger_s", [None, 1000])
def test_memory_that_went_is_given_back_without_a_call(change: Callable[[Block], None], linger_s: float | None) -> None:
    registrar, block, kept = ScriptedRegistrar(), Block(), Block()
    with cache_over(registrar, linger_s=linger_s) as cache:
        cache.get(kept)
        for handle in (2, 3):
            assert cache.get(block).handle == handle
            change(block)
            assert eventually(lambda: [pin.handle for pin in registrar.live] == [1])
            if not block.mapped:
                block.map_again()


def test_buffers_of_all_kinds_that_their_owners_free() -> None:
    registrar = ScriptedRegistrar()
    with cache_over(registrar, linger_s=None) as cache:
        array = np.zeros(33 << 20, np.uint8)  # malloc(3) makes a mapping of its own for it
        mapped = mmap.mmap(-1, 1 << 20)
        cache.get(array)
        cache.get(mapped)
        assert len(registrar.live) == 2
        del array
        mapped.close()
        assert empty(registrar)


def test_a_crowd_that_goes_at_once() -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(500)]
    with cache_over(registrar, linger_s=None) as cache:
        for block in blocks:
            cache.get(block)
        for block in blocks:
            block.unmap()
        assert empty(registrar)
        assert cache.stats().unmapped == 500


def test_what_is_held_goes_when_it_is_let_go() -> None:
    registrar, block, control = ScriptedRegistrar(), Block(), Block()
    with cache_over(registrar, linger_s=None) as cache:
        held = cache.get(block)
        cache.get(control)
        block.unmap()
        control.unmap()
        assert eventually(lambda: [pin.handle for pin in registrar.live] == [1])
        held.release()
        assert not registrar.live


# Memory that nobody asks for


def _pass_time(cache: Cache, registrar: ScriptedRegistrar, times: int = 3) -> None:
    """As long as it takes until one that nobody wants has gone, several times."""
    for _ in range(times):
        with cache.get(memoryview(mmap.mmap(-1, PAGE))) as control:
            handle = control.handle
        del control
        assert eventually(lambda handle=handle: handle not in [pin.handle for pin in registrar.live])


def test_what_nobody_wants_is_given_back_without_a_call() -> None:
    registrar, memory = ScriptedRegistrar(), np.zeros(5000)
    with cache_over(registrar, linger_s=LINGER_S) as cache:
        cache.get(memory[:100])
        cache.get(memory[200:], probe=True)
        cache.get(memory, probe=False)
        assert len(registrar.live) == 3
        assert empty(registrar)
        assert cache.stats().expirations == 3


def test_what_a_living_object_asked_for_stays() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar, linger_s=LINGER_S) as cache:
        part = block.part(0, 100)
        cache.get(part)
        _pass_time(cache, registrar)
        assert [pin.handle for pin in registrar.live] == [1]
        del part
        assert empty(registrar)


def test_what_is_held_stays() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar, linger_s=LINGER_S) as cache:
        held = cache.get(block.part(0, 100))
        _pass_time(cache, registrar)
        assert held.valid
        held.release()
        assert empty(registrar)


def test_without_an_end_everything_stays() -> None:
    registrar, other, block = ScriptedRegistrar(), ScriptedRegistrar(), Block()
    with cache_over(registrar, linger_s=None) as cache, cache_over(other, linger_s=LINGER_S) as short:
        cache.get(block.part(0, 100))
        _pass_time(short, other)
        assert len(registrar.live) == 1


def test_what_is_asked_for_again_and_again_stays() -> None:
    """By objects that are new each time."""
    registrar, memory, control = ScriptedRegistrar(), bytearray(5000), Block()
    with cache_over(registrar, linger_s=1) as cache:
        cache.get(memoryview(memory))
        cache.get(control.part(0, 100))
        assert eventually(lambda: cache.get(memoryview(memory)).handle == 1 and len(registrar.live) == 1)


# The same by hand: expire is what the upkeep calls


def test_ages() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar, linger_s=None) as cache:
        for ages in (1, 2, 8):
            cache.get(block.part(0, 100))
            assert [cache.expire(ages) for _ in range(ages + 1)] == [0] * ages + [1]


def test_ages_of_what_is_used_held_or_wanted() -> None:
    registrar, memory = ScriptedRegistrar(), Block(8 * PAGE)
    with cache_over(registrar, linger_s=None) as cache:
        living = memory.part(0, PAGE)
        cache.get(living)  # 1
        held = cache.get(memory.part(PAGE, PAGE))  # 2
        buffer = bytearray(5000)  # takes no weak reference, so nobody knows that it lives
        cache.get(buffer)  # 3
        for _ in range(5):
            cache.expire(1)
            assert cache.get(memory.part(2 * PAGE, PAGE)).handle == 4
        assert [pin.handle for pin in registrar.live] == [1, 2, 4]
        living.address += 4 * PAGE  # the object is another place's now
        cache.get(living)
        for _ in range(3):
            cache.expire(1)
        assert [pin.handle for pin in registrar.live] == [2, 5]
        held.release()


def test_an_object_that_lived_at_the_last_look_counts_from_its_death() -> None:
    """Its last get may be long ago; it wanted the memory until now."""
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar, linger_s=None) as cache:
        part = block.part(0, 100)
        cache.get(part)
        for _ in range(5):
            cache.expire(2)
        del part
        assert [cache.expire(2) for _ in range(4)] == [0, 0, 0, 1]


@pytest.mark.parametrize(("ages", "kind"), [(9, ArgumentError), (1 << 32, ArgumentError), (-1, ArgumentError),
                                            (1 << 70, ArgumentError), ("x", ArgumentTypeError)])  # fmt: skip
def test_ages_that_do_not_exist(ages: Any, kind: type[usermm.UsermmError]) -> None:
    with cache_over(ScriptedRegistrar(), linger_s=None) as cache:
        cache.get(bytearray(5000))
        refused_line(lambda: cache.expire(ages), kind)
        assert cache.stats().registrations == 1


def test_the_descriptor_is_readable_from_the_first_loss_on() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar, linger_s=None) as cache:
        cache.upkeep_due = False  # no thread: it would read it first
        descriptor = os.dup(cache.fileno())
        for _ in range(3):
            assert select.select([descriptor], [], [], 0)[0] == []
            cache.get(block)
            for _ in range(100):
                block.discard()
                cache.get(block)
            assert select.select([descriptor], [], [], 0)[0] == [descriptor]
            cache.expire(0)
        cache.close()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(5000)[0][1] & select.POLLHUP
        os.close(descriptor)


# The thread


def test_there_is_one_from_the_first_registration_to_the_end() -> None:
    block = Block()
    for end in (lambda cache: cache.close(), lambda _: None):
        cache = usermm.RegistrationCache(ScriptedRegistrar())
        assert upkeeps() == 0
        for _ in range(3):
            cache.get(block)
            cache.clear()
        assert upkeeps() == 1
        end(cache)
        del cache
        assert eventually(lambda: upkeeps() == 0)


def test_it_keeps_no_cache_alive() -> None:
    cache = usermm.RegistrationCache(ScriptedRegistrar(), linger_s=LINGER_S)
    weak = weakref.ref(cache)
    cache.get(Block())
    del cache
    gc.collect()
    assert eventually(lambda: weak() is None)


def test_a_cache_whose_last_reference_is_the_threads() -> None:
    """It is in the middle of a deregistration then, and frees the cache when it is done."""
    registrar, blocks, gate = ScriptedRegistrar(), [Block(), Block()], Gate()
    cache = usermm.RegistrationCache(registrar, linger_s=None)
    for block in blocks:
        cache.get(block)
    registrar.at_deregister(1, runs=gate)
    blocks[0].unmap()
    with gate:
        weak = weakref.ref(cache)
        del cache
        assert weak() is not None
    assert empty(registrar)
    assert eventually(lambda: upkeeps() == 0)
    assert {call.thread for call in registrar.calls if call.name == "deregister"} != {threading.get_ident()}


@pytest.mark.parametrize("name", ["close", "clear"])
def test_a_deregister_that_calls_the_cache_from_the_thread(name: str) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(3)]
    with cache_over(registrar, linger_s=None) as cache:
        for block in blocks:
            cache.get(block)
        registrar.at_deregister(1, runs=getattr(cache, name))
        blocks[1].unmap()
        assert empty(registrar)
        registrar.check()


def test_it_goes_on_after_a_deregister_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block(), Block()]
    registrar.at_deregister(1, raises_after=ValueError("stuck"))
    with cache_over(registrar, linger_s=None) as cache:
        for block in blocks:
            cache.get(block)
            block.unmap()
            assert empty(registrar)
        assert [(record.name, record.levelno) for record in caplog.records] == [("usermm.cache", logging.ERROR)]
        caplog.clear()


def test_a_slow_deregister_in_it_keeps_nobody_waiting() -> None:
    registrar, block, other, gate = ScriptedRegistrar(), Block(), Block(), Gate()
    with cache_over(registrar, linger_s=None) as cache:
        cache.get(block)
        cache.get(other)
        registrar.at_deregister(1, runs=gate)
        block.unmap()
        with gate:
            block.map_again()
            assert cache.get(block).handle == 3
            assert cache.get(other).handle == 2
            assert cache.stats().pinned == 3
        assert eventually(lambda: cache.stats().pinned == 2)


def test_a_registrar_of_another_thread_is_left_to_it() -> None:
    registrar, block, other = ScriptedRegistrar(Traits(any_thread=False)), Block(), Block()
    with cache_over(registrar, linger_s=LINGER_S) as cache:
        cache.get(block)
        cache.get(other.part(0, 100))
        block.unmap()
        assert eventually(lambda: in_thread(lambda: cache.stats().registrations == 0))
        assert len(registrar.live) == 2
        cache.get(other)
        assert [pin.handle for pin in registrar.live] == [3]
        registrar.check()


def test_what_a_device_refuses_to_share_is_free_once_it_was_given_back() -> None:
    registrar, block = ScriptedRegistrar(Traits(overlap=Overlap.REFUSED)), Block()
    with cache_over(registrar, linger_s=LINGER_S) as cache:
        for _ in range(5):
            cache.get(block.part(0, 100))
            block.discard()
            with cache.get(block) as registration:
                assert registration.valid
        registrar.check()


def test_without_a_thread_a_cache_says_so_once_and_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    registrar, block = ScriptedRegistrar(), Block()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with cache_over(registrar) as cache:
        for _ in range(3):
            cache.get(block)
            cache.clear()
        [record] = caplog.records
        assert record.getMessage() == (
            "nothing gives memory back but further calls of get: can't start new thread"
        )
        cache.get(block)
        block.discard()
        assert cache.get(block).handle == 5
        caplog.clear()


def test_an_interrupt_while_the_thread_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the get, and leaves nothing: what was registered is there, held by nobody."""

    def interrupt(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    registrar, block = ScriptedRegistrar(), Block()
    monkeypatch.setattr(threading.Thread, "start", interrupt)
    with cache_over(registrar) as cache:
        with pytest.raises(KeyboardInterrupt):
            cache.get(block)
        assert (cache.stats().held, cache.stats().registrations) == (0, 1)
        monkeypatch.undo()
        assert cache.get(block).handle == 1
