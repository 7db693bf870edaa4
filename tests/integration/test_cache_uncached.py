"""A cache where userfaultfd is forbidden, as in many containers: refused, or without memory of anything."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.caches import PAGE, Block, cache_over
from support.calls import refused_line
from support.filters import forbid_userfaultfd
from support.processes import in_child
from support.threads import Gate, running

import usermm
from usermm import LimitError, OverlapError, RegistrationError, UnavailableError
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar
from usermm.uapi.userfaultfd import SYSTEM_CALL

pytestmark = pytest.mark.skipif(
    os.uname().machine not in SYSTEM_CALL, reason="no system call numbers known here: add them to usermm.uapi"
)

Cache = usermm.RegistrationCache[object]


def behind_the_filter(function: Callable[[], Any]) -> Any:
    def child() -> Any:
        forbid_userfaultfd()
        return function()

    return in_child(child)


def uncached(registrar: ScriptedRegistrar, **options: Any) -> Any:
    return cache_over(registrar, fallback="uncached", **options)


def test_without_a_fallback_it_is_refused() -> None:
    def refused() -> str:
        registrar = ScriptedRegistrar()
        line = refused_line(lambda: usermm.RegistrationCache(registrar), UnavailableError)
        assert registrar.calls == []
        return line

    assert "usermm doctor" in behind_the_filter(refused)


def test_where_a_monitor_can_run_the_fallback_is_none() -> None:
    with uncached(ScriptedRegistrar()) as cache:
        assert not cache.uncached
        cache.get(bytearray(5000))


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name} {record.getMessage()}")


def test_it_warns_once_and_works() -> None:
    def work() -> Any:
        records = _Records()
        logging.getLogger().addHandler(records)
        registrar, block = ScriptedRegistrar(), Block()
        with uncached(registrar) as cache:
            assert cache.uncached
            for number in range(1, 6):
                with cache.get(block) as registration:
                    assert (registration.handle, registration.address) == (number, block.address)
                    assert [pin.handle for pin in registrar.live] == [number]
                assert registrar.live == ()
            now = cache.stats()
            assert (now.hits, now.misses, now.registrations, now.pinned, now.held) == (0, 5, 0, 0, 0)
            assert threading.active_count() == 1, "nothing needs upkeep"
            assert "no exact monitor can run here" in cache.explain(block)
            repr(cache)
        return records.lines

    [line] = behind_the_filter(work)
    assert line.startswith("WARNING usermm.cache every get registers anew, since nothing tells what went: ")
    assert "\n" not in line


def test_two_holders_have_two_registrations() -> None:
    def work() -> None:
        registrar, block = ScriptedRegistrar(), Block()
        with uncached(registrar) as cache:
            first, second = cache.get(block), cache.get(block)
            assert [pin.handle for pin in registrar.live] == [first.handle, second.handle] == [1, 2]
            assert cache.clear() == cache.evict(block) == cache.expire(1) == 0
            cache.close()
            assert len(registrar.live) == 2
            refused_line(lambda: cache.get(block), usermm.ClosedError)
            first.release()
            second.release()

    behind_the_filter(work)


def test_it_never_says_that_memory_is_still_the_same() -> None:
    """Nothing would tell it."""

    def work() -> bool:
        block = Block()
        with uncached(ScriptedRegistrar()) as cache, cache.get(block) as registration:
            return registration.valid

    assert behind_the_filter(work) is False


def test_limits_hold() -> None:
    def work() -> None:
        registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(3)]
        with uncached(registrar, max_count=2, max_bytes=3 * PAGE) as cache:
            held = [cache.get(block) for block in blocks[:2]]
            refused_line(lambda: cache.get(blocks[2]), LimitError)
            held.pop().release()
            refused_line(lambda: cache.get(Block(3 * PAGE)), LimitError)
            cache.get(blocks[2])
            held.clear()
        assert registrar.peak_count == 2

    behind_the_filter(work)


def test_overlaps_that_a_device_refuses() -> None:
    def work() -> None:
        registrar, block = ScriptedRegistrar(Traits(overlap=Overlap.REFUSED)), Block(4 * PAGE)
        with uncached(registrar) as cache:
            with cache.get(block.part(0, 2 * PAGE)):
                refused_line(lambda: cache.get(block), OverlapError)
                assert cache.get(block.part(2 * PAGE, PAGE)).length == PAGE
            assert cache.get(block).length == 4 * PAGE

    behind_the_filter(work)


def test_misbehaving_registrars() -> None:
    def work() -> None:
        registrar, block, other = ScriptedRegistrar(), Block(), Block()
        with uncached(registrar) as cache:
            registrar.at_register(1, raises=KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                cache.get(block)
            registrar.at_register(2, runs=lambda: cache.get(other))
            assert cache.get(block).handle == 2
            registrar.at_deregister(None, runs=cache.stats)
            cache.get(block)
            registrar.at_register(None, runs_after=cache.close)
            refused_line(lambda: cache.get(block), usermm.ClosedError)
            assert cache.stats().pinned == 0

    behind_the_filter(work)


def test_threads_do_not_wait_for_each_other() -> None:
    def work() -> None:
        registrar, block, gate = ScriptedRegistrar(), Block(), Gate()
        registrar.at_register(1, runs=gate)
        with uncached(registrar) as cache, running(lambda: cache.get(block)), gate:
            assert cache.get(block).handle == 1

    behind_the_filter(work)


def test_a_registrar_of_one_thread() -> None:
    def work() -> None:
        registrar, block = ScriptedRegistrar(Traits(any_thread=False)), Block()
        with uncached(registrar) as cache:
            held = [cache.get(block)]
            with running(lambda: refused_line(lambda: cache.get(block), RegistrationError)):
                pass
            with running(held.clear):
                pass
            assert len(registrar.live) == 1
            cache.get(block)
            assert registrar.live == ()

    behind_the_filter(work)


def test_a_child_of_an_uncached_process() -> None:
    def work() -> Any:
        registrar, block = ScriptedRegistrar(), Block()

        def child() -> Any:
            valid, handle = held.valid, cache.get(block).handle
            held.release()
            return valid, handle, [(call.name, call.handle) for call in registrar.calls]

        with uncached(registrar) as cache, cache.get(block) as held:
            return in_child(child), len(registrar.live)

    expected = [("register", 1), ("register", 2), ("deregister", 2)]
    assert behind_the_filter(work) == ((False, 2, expected), 1)


@pytest.fixture(autouse=True)
def _nothing_is_logged_here(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """All of it is in children."""
    yield
    assert caplog.records == []
