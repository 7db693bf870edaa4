"""Registrars that raise, return nonsense, change the memory they are given, or call back into the cache."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.caches import PAGE, Block, cache_over
from support.calls import refused_line
from support.processes import run_quietly

import usermm
from usermm import ClosedError, DeviceError, LimitError, RegistrationError
from usermm.registrars import Overlap, Traits
from usermm.testing import Pin, ScriptedRegistrar

Cache = usermm.RegistrationCache[object]

MERGED = Traits(overlap=Overlap.MERGED)
REFUSED = Traits(overlap=Overlap.REFUSED)


class TroubleError(Exception):
    pass


# Registrars that raise


@pytest.mark.parametrize("kind", [TroubleError, KeyboardInterrupt, SystemExit, GeneratorExit, LimitError, MemoryError])
@pytest.mark.parametrize("traits", [Traits(), MERGED, REFUSED], ids=["allowed", "merged", "refused"])
def test_what_register_raises_goes_to_the_caller_as_it_is(kind: type[BaseException], traits: Traits) -> None:
    registrar, block, error = ScriptedRegistrar(traits), Block(), kind("no")
    with cache_over(registrar) as cache:
        registrar.at_register(1, raises=error)
        with pytest.raises(type(error)) as caught:
            cache.get(block)
        assert caught.value is error
        now = cache.stats()
        assert (now.registrations, now.held, now.pinned, now.pinned_bytes, now.register_failures) == (0, 0, 0, 0, 1)
        assert usermm._core.counts()["regions"] == 0
        assert cache.get(block).handle == 1


def test_what_it_raises_after_its_work_is_taken_at_its_word() -> None:
    """The contract says that nothing is registered then; the cache must not take back what it was never given."""
    registrar, block = ScriptedRegistrar(), Block()
    registrar.at_register(1, raises_after=TroubleError())
    with usermm.RegistrationCache(registrar) as cache:
        with pytest.raises(TroubleError):
            cache.get(block)
        assert cache.stats().pinned == 0
        assert cache.get(block).handle == 2
    assert registrar.live == (Pin(1, block.address, PAGE),)
    assert registrar.violations == []


def test_a_failure_leaves_what_is_there() -> None:
    registrar, block = ScriptedRegistrar(), Block(4 * PAGE)
    with cache_over(registrar) as cache:
        kept = cache.get(block.part(0, PAGE))
        registrar.at_register(2, raises=TroubleError())
        with pytest.raises(TroubleError):
            cache.get(block)
        assert kept.valid
        assert cache.get(block.part(0, 5)).handle == 1
        kept.release()


_UNION = """
    import mmap
    import usermm
    from usermm.registrars import Overlap, Traits
    from usermm.testing import ScriptedRegistrar

    registrar = ScriptedRegistrar(Traits(overlap=Overlap.OVERLAP))
    memory = memoryview(mmap.mmap(-1, 4 * 4096))
    calls = []
    with usermm.RegistrationCache(registrar) as cache:
        cache.get(memory[:2 * 4096])
        registrar.at_register(None, raises=ERROR("no"), runs=lambda: calls.append(len(registrar.calls)))
        try:
            cache.get(memory[4096:])
        except ERROR as error:
            print(type(error).__name__, len(calls))
        assert cache.stats().pinned == 0
    registrar.check(empty=True)
"""


@pytest.mark.parametrize(("error", "tries"), [("ValueError", 2), ("MemoryError", 1), ("KeyboardInterrupt", 1)])
@pytest.mark.parametrize("overlap", ["MERGED", "REFUSED"])
def test_a_union_that_is_refused_is_tried_alone_once(tmp_path: Any, overlap: str, error: str, tries: int) -> None:
    """It was tried for ever, and Ctrl-C was taken for a refusal. MemoryError: there was nobody left to give up."""
    text = _UNION.replace("OVERLAP)", f"{overlap})").replace("ERROR", error)
    assert run_quietly(text, tmp_path, timeout_s=10) == f"{error} {tries}\n"


def test_a_union_that_is_refused_is_registered_alone() -> None:
    registrar, block = ScriptedRegistrar(MERGED), Block(4 * PAGE)
    with cache_over(registrar) as cache:
        cache.get(block.part(0, 2 * PAGE))
        registrar.at_register(2, raises=TroubleError())
        with cache.get(block.part(PAGE, 2 * PAGE)) as registration:
            assert (registration.address, registration.length) == (block.address + PAGE, 2 * PAGE)
        assert cache.stats().register_failures == 1


# Registrars that return nonsense


class Hostile:
    """Whoever looks at it too closely is punished."""

    def _refuse(self, *_: object) -> Any:
        raise AssertionError("nobody asked the handle anything")

    __eq__ = __bool__ = __len__ = __iter__ = __getattr__ = __call__ = __index__ = _refuse
    __hash__ = None  # type: ignore[assignment]


HANDLES: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "0": int,
    "a list": list,
    "NotImplemented": lambda: NotImplemented,
    "an exception": TroubleError,
    "a class": lambda: type,
    "hostile": Hostile,
}


@pytest.mark.parametrize("name", HANDLES)
def test_a_handle_can_be_anything(name: str) -> None:
    handle, returned = HANDLES[name](), []

    class Registrar:
        traits = Traits()

        def register(self, _address: int, _length: int) -> object:
            return handle

        def deregister(self, back: object) -> None:
            returned.append(back)

    block = Block()
    with usermm.RegistrationCache(Registrar()) as cache:
        with cache.get(block) as registration:
            assert registration.handle is handle
        cache.stats()
        repr(cache)
    assert len(returned) == 1
    assert returned[0] is handle


@pytest.mark.parametrize("broken", [lambda: 1, lambda _self, _address: 1, bytearray])
def test_a_register_that_cannot_be_called(broken: Any) -> None:
    registrar: Any = type("Registrar", (), {"traits": Traits(), "register": broken, "deregister": lambda *_: None})()
    with usermm.RegistrationCache(registrar) as cache:
        with pytest.raises(TypeError):
            cache.get(Block())
        assert cache.stats().pinned == 0


# Registrars that change the memory they are given


def test_memory_that_is_freed_while_it_is_registered() -> None:
    registrar, block = ScriptedRegistrar(), Block(2 * PAGE)
    with cache_over(registrar) as cache:
        registrar.at_register(1, runs_after=block.unmap)
        line = refused_line(lambda: cache.get(block), DeviceError, errno.EFAULT)
        assert "nothing is mapped at" in line
        assert (cache.stats().retries, cache.stats().pinned) == (1, 0)


def test_memory_that_is_exchanged_while_it_is_registered() -> None:
    """What the device was given is not what is there now: it is given back, and the new memory registered."""
    registrar, block = ScriptedRegistrar(), Block(2 * PAGE)

    def exchange() -> None:
        block.unmap()
        block.map_again()

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs_after=exchange)
        registrar.at_register(2, runs=block.discard)  # before its work, but after the watch: nobody knows what it saw
        with cache.get(block) as registration:
            assert (registration.handle, registration.valid) == (3, True)
            assert [pin.handle for pin in registrar.live] == [3]
        assert cache.stats().retries == 2


def test_memory_that_goes_on_changing() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar) as cache:
        registrar.at_register(None, runs_after=block.discard)
        line = refused_line(lambda: cache.get(block), RegistrationError, errno.EAGAIN)
        assert "went on changing while it was registered" in line
        assert [call.name for call in registrar.calls] == ["register", "deregister"] * 8
        registrar.at_register(None)
        assert cache.get(block).handle == 9


def test_memory_that_is_freed_while_it_is_deregistered() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar) as cache:
        cache.get(block)
        registrar.at_deregister(1, runs=block.unmap)
        assert cache.evict(block) == 1
        block.map_again()
        assert cache.get(block).handle == 2


# Registrars that call the cache

ANSWERS: dict[str, str] = {
    "get the same": "RegistrationError",
    "get a part": "RegistrationError",
    "get other": "held",
    "get what is there": "held",
    "evict the same": "int",
    "evict other": "int",
    "clear": "int",
    "stats": "Statistics",
    "explain": "str",
    "remembers": "bool",
    "overlapping": "list",
    "expire": "int",
    "close": "NoneType",
}


class Bench:
    """A block that a registrar is about to be given, another one, one that is there, and what the cache answers."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.same, self.other, self.there = Block(2 * PAGE), Block(), Block()
        self.answers: list[str] = []
        cache.get(self.there)

    def call(self, name: str) -> Any:
        cache, memory = self.cache, {"the same": self.same, "other": self.other, "what is there": self.there}
        verb, _, noun = name.partition(" ")
        if noun == "a part":
            return cache.get(self.same.part(5, 10))
        if noun:
            return getattr(cache, verb)(memory[noun])
        arguments = {"explain": (self.same,), "remembers": (self.same,), "overlapping": (0, 0), "expire": (1,)}
        return getattr(cache, verb)(*arguments.get(verb, ()))

    def note(self, name: str) -> None:
        try:
            answer = self.call(name)
            self.answers.append("held" if isinstance(answer, usermm.Registration) else type(answer).__name__)
        except usermm.UsermmError as error:
            self.answers.append(type(error).__name__)


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("when", ["runs", "runs_after"])
@pytest.mark.parametrize("traits", [Traits(), MERGED, REFUSED], ids=["allowed", "merged", "refused"])
def test_a_call_from_register(name: str, when: str, traits: Traits) -> None:
    registrar = ScriptedRegistrar(traits)
    with cache_over(registrar) as cache:
        bench = Bench(cache)
        registrar.at_register(2, **{when: lambda: bench.note(name)})
        if name == "close":
            refused_line(lambda: cache.get(bench.same), ClosedError)
        else:
            with cache.get(bench.same) as registration:
                assert (registration.address, registration.valid) == (bench.same.address, True)
        assert bench.answers == [ANSWERS[name]]
        assert cache.stats().held == 0
        assert cache.stats().pinned == len(registrar.live)


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("when", ["runs", "runs_after"])
@pytest.mark.parametrize("traits", [Traits(), MERGED, REFUSED], ids=["allowed", "merged", "refused"])
def test_a_call_from_deregister(name: str, when: str, traits: Traits) -> None:
    """Only a device that refuses overlaps cannot be given again what it is just giving back."""
    registrar = ScriptedRegistrar(traits)
    same = "RegistrationError" if traits is REFUSED else "held"
    with cache_over(registrar) as cache:
        bench = Bench(cache)
        cache.get(bench.same)
        registrar.at_deregister(1, **{when: lambda: bench.note(name)})
        assert cache.evict(bench.same) == 1
        assert bench.answers == [same if name in ("get the same", "get a part") else ANSWERS[name]]
        registrar.check()
        assert cache.stats().pinned == len(registrar.live)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_call_from_deregister_while_the_cache_is_closed(name: str) -> None:
    registrar = ScriptedRegistrar()
    with cache_over(registrar) as cache:
        bench = Bench(cache)
        registrar.at_deregister(1, runs=lambda: bench.note(name))
        cache.close()
        closed = name.partition(" ")[0] in ("get", "evict", "clear", "expire")
        assert bench.answers == ["ClosedError" if closed else ANSWERS[name]]


def test_a_deregister_that_takes_the_whole_cache_down() -> None:
    """A chain as deep as the cache is wide: each deregistration evicts the next."""
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(60)]
    with cache_over(registrar) as cache:
        for block in blocks:
            cache.get(block)
        rest = iter(blocks[1:])
        registrar.at_deregister(None, runs=lambda: [cache.evict(block) for block in [next(rest, blocks[0])]])
        cache.evict(blocks[0])
        registrar.check(empty=True)


def test_a_registrar_may_hold_buffers_of_its_own() -> None:
    """As one does whose device needs a descriptor in registered memory for each registration."""
    registrar = ScriptedRegistrar()
    with cache_over(registrar) as cache:
        descriptors = [Block() for _ in range(5)]
        kept: list[usermm.Registration] = []
        for number, descriptor in enumerate(descriptors):
            registrar.at_register(2 * number + 1, runs=lambda descriptor=descriptor: kept.append(cache.get(descriptor)))
        blocks = [Block() for _ in range(5)]
        for block in blocks:
            cache.get(block)
        assert len(kept) == 5
        assert cache.stats().held == 5
        registrar.at_deregister(None, runs=lambda: kept.pop().release() if kept else None)
        cache.clear()
        assert kept == []


def test_a_full_device_whose_deregister_registers_the_same() -> None:
    """The next look at the cache is a hit, with the device's error still on its way: it was a SystemError."""
    registrar, first, second = ScriptedRegistrar(max_count=1), Block(), Block()
    with cache_over(registrar) as cache:
        cache.get(first)
        registrar.at_deregister(1, runs_after=lambda: cache.get(second))
        with cache.get(second) as registration:
            assert registration.valid
        assert len(registrar.live) == 1


def test_a_deregister_that_asks_for_room_in_a_full_cache() -> None:
    """It would wait for its own end."""
    registrar, first, second, third = ScriptedRegistrar(), Block(), Block(), Block()
    with cache_over(registrar, max_count=1) as cache:
        cache.get(first)
        lines = []
        registrar.at_deregister(
            1, runs=lambda: lines.append(refused_line(lambda: cache.get(third), RegistrationError, errno.EDEADLK))
        )
        with cache.get(second) as registration:
            assert registration.valid
        assert len(lines) == 1
        assert registrar.peak_count == 1


# Registrars that fail to take back


@contextlib.contextmanager
def _unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: found.append(each.exc_value))
    yield found
    monkeypatch.undo()


def test_what_deregister_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    registrar, block = ScriptedRegistrar(), Block()
    registrar.at_deregister(1, raises=TroubleError("stuck"))
    with usermm.RegistrationCache(registrar) as cache:
        cache.get(block)
        assert cache.evict(block) == 1
        [record] = caplog.records
        assert (record.name, record.levelno) == ("usermm.cache", logging.ERROR)
        assert record.getMessage() == (
            "ScriptedRegistrar.deregister(1) failed: the device may still use that memory"
        )
        assert record.exc_info is not None
        assert str(record.exc_info[1]) == "stuck"
        assert (cache.stats().pinned, cache.stats().deregistered) == (0, 1)
        assert cache.get(block).handle == 2
    assert [pin.handle for pin in registrar.live] == [1]


def test_each_way_to_deregister_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    blocks = [Block() for _ in range(3)]

    def dropped(cache: Cache) -> None:
        del cache

    for end in (lambda cache: cache.clear(), lambda cache: cache.close(), dropped):
        registrar = ScriptedRegistrar()
        registrar.at_deregister(None, raises_after=TroubleError())
        cache = usermm.RegistrationCache(registrar)
        for block in blocks:
            cache.get(block)
        held = [cache.get(block) for block in blocks]
        held.pop().release()
        held.clear()
        end(cache)
        del cache
        registrar.check(empty=True)
        assert len(caplog.records) == 3
        caplog.clear()  # the tracebacks hold frames, and those the cache


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_deregister_is_printed(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """It may be in a deallocator, which cannot raise."""
    registrar, block = ScriptedRegistrar(), Block()
    registrar.at_deregister(1, raises_after=error)
    with cache_over(registrar) as cache, _unraisable(monkeypatch) as found:
        cache.get(block)
        assert cache.evict(block) == 1
        assert [type(each) for each in found] == [error]
        assert cache.stats().pinned == 0


def test_a_log_that_fails_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            raise TroubleError("the log is full")

    registrar, block, handler = ScriptedRegistrar(), Block(), Handler()
    registrar.at_deregister(1, raises_after=ValueError())
    logger = logging.getLogger("usermm.cache")
    logger.addHandler(handler)
    try:
        with cache_over(registrar) as cache, _unraisable(monkeypatch) as found:
            cache.get(block)
            cache.clear()
            assert [str(each) for each in found] == ["the log is full"]
            assert cache.stats().pinned == 0
    finally:
        logger.removeHandler(handler)


def test_a_deregistration_leaves_an_exception_on_its_way_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Registrations go when frames unwind."""
    registrar, array = ScriptedRegistrar(), np.zeros(5000)
    registrar.at_deregister(None, raises=ValueError("another"))

    def fail(*_: object) -> None:
        raise TroubleError("the first")

    def work(cache: Cache) -> None:
        fail(cache.get(array), cache.evict(array), fail())  # the registration is on the stack that is cleared

    with usermm.RegistrationCache(registrar) as cache:
        with pytest.raises(TroubleError, match="the first") as caught:
            work(cache)
        assert caught.value.__context__ is None
    assert len(caplog.records) == 1
