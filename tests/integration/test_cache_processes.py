"""Forked children: the cache is empty there, what is the parent's stays the parent's, and nobody waits for anybody."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.caches import PAGE, Block, cache_over, descriptor_of, eventually
from support.calls import refused_line
from support.processes import fork, in_child, run_quietly
from support.threads import Gate, running

import usermm
from usermm import MonitorFailedError
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar

Cache = usermm.RegistrationCache[object]
ALL_OVERLAPS = pytest.mark.parametrize("overlap", list(Overlap))


def names(registrar: ScriptedRegistrar) -> list[tuple[str, object]]:
    """What the registrar was asked, in this process and its ancestors."""
    return [(call.name, call.handle) for call in registrar.calls]


@ALL_OVERLAPS
@pytest.mark.parametrize("held", [False, True])
def test_a_child_begins_empty_and_makes_its_own(overlap: Overlap, held: bool) -> None:
    """Whatever the parent holds is in nobody's way: the child's device knows nothing of it."""
    registrar, block = ScriptedRegistrar(Traits(overlap=overlap)), Block()
    with cache_over(registrar, max_count=1) as cache:
        kept = [cache.get(block)] if held else [cache.get(block).release()]

        def child() -> Any:
            registrar.__init__(Traits(overlap=overlap))  # type: ignore[misc]  # the child's own device
            with cache.get(block) as mine, cache.get(block):
                valid = mine.valid
            now = cache.stats()
            return names(registrar), valid, now.registrations, now.pinned, now.misses, now.hits

        assert in_child(child) == ([("register", 1)], True, 1, 1, 1, 1)
        assert names(registrar) == [("register", 1)]
        assert cache.get(block).handle == 1
        kept.clear()


@pytest.mark.parametrize(
    "use",
    [
        lambda cache, _block, _held: cache.clear(),
        lambda cache, block, _held: cache.evict(block),
        lambda cache, _block, _held: cache.close(),
        lambda cache, _block, _held: cache.expire(0),
        lambda cache, block, _held: cache.get(block),
        lambda _cache, _block, held: held.clear(),
        lambda _cache, _block, held: held[0].release(),
        lambda _cache, block, _held: block.unmap(),
    ],
)
@pytest.mark.parametrize("first", [None, "get"])
def test_a_child_never_deregisters_what_is_the_parents(use: Callable[..., object], first: str | None) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block(), Block()]
    with cache_over(registrar) as cache:
        cache.get(blocks[0])
        held = [cache.get(blocks[1])]

        def child() -> Any:
            if first:
                cache.get(blocks[0])
            before = [name for name, handle in names(registrar) if handle == 3]
            use(cache, blocks[1], held)
            held.clear()
            cache.close()
            return before, [name for name, handle in names(registrar) if name == "deregister" and handle in (1, 2)]

        assert in_child(child) == (["register"] if first else [], [])
        assert held[0].valid
        assert (cache.get(blocks[0]).handle, cache.get(blocks[1]).handle) == (1, 2)
        held.clear()


def test_a_registration_of_the_parent_is_not_valid_in_a_child() -> None:
    block = Block()
    with cache_over(ScriptedRegistrar()) as cache, cache.get(block) as registration:
        assert in_child(lambda: (registration.valid, registration.handle, registration.valid)) == (False, 1, False)
        assert registration.valid


def test_also_in_a_child_that_can_open_no_device(tmp_path: Path) -> None:
    text = """
        import mmap, os, resource
        import usermm
        from support.processes import in_child
        from usermm.testing import ScriptedRegistrar

        block = mmap.mmap(-1, 4096)
        cache = usermm.RegistrationCache(ScriptedRegistrar())
        registration = cache.get(block)

        def child():
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, 1024))
            valid = registration.valid
            try:
                cache.get(block)
                refused = "accepted"
            except usermm.LimitError as error:
                refused = type(error).__name__
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
            return valid, refused, cache.get(block).handle, registration.valid

        print(in_child(child), registration.valid)
    """
    assert run_quietly(text, tmp_path) == "(False, 'LimitError', 2, False) True\n"


def test_a_child_is_told_so_by_every_report() -> None:
    """Before it has used the cache for anything."""
    block = Block()
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(block)
        assert in_child(lambda: cache.explain(block)).startswith("miss")
        assert in_child(lambda: cache.overlapping(0, 0)) == []
        assert in_child(lambda: cache.remembers(block)) is False
        assert in_child(lambda: (cache.stats().registrations, cache.stats().probes)) == (0, 0)
        assert in_child(lambda: repr(cache)) == "<usermm.RegistrationCache of 0 registrations, 0 bytes pinned>"


def test_a_child_does_not_believe_an_object_that_asked_in_the_parent() -> None:
    """The object lives on in the child, at the same address; the registration does not."""
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar) as cache:
        cache.get(block)
        assert in_child(lambda: [cache.get(block).handle for _ in range(3)]) == [2, 2, 2]


def test_a_childs_own_memory_is_watched() -> None:
    registrar, block = ScriptedRegistrar(), Block()

    def child() -> Any:
        handles = [cache.get(block).handle]
        block.discard()
        handles.append(cache.get(block).handle)
        block.unmap()
        return handles, eventually(lambda: not [pin for pin in registrar.live if pin.handle != 1])

    with cache_over(registrar) as cache:
        cache.get(block)
        assert in_child(child) == ([2, 3], True)
        assert cache.get(block).handle == 1


def test_the_parents_memory_is_not_the_childs() -> None:
    """What the child unmaps stays mapped here, and the other way round."""
    with cache_over(ScriptedRegistrar()) as cache:
        blocks = [Block(), Block()]
        for block in blocks:
            cache.get(block)
        in_child(blocks[0].unmap)
        assert cache.get(blocks[0]).handle == 1
        blocks[1].discard()
        assert cache.get(blocks[1]).handle == 3


def test_a_grandchild_begins_empty_too() -> None:
    registrar, block = ScriptedRegistrar(), Block()

    def child() -> Any:
        held = cache.get(block)
        answer = in_child(lambda: (held.valid, cache.get(block).handle, cache.stats().registered))
        return answer, held.valid, cache.get(block).handle

    with cache_over(registrar) as cache:
        cache.get(block)
        assert in_child(child) == ((False, 3, 1), True, 2)


def test_a_closed_cache_is_closed_in_the_child_too() -> None:
    cache = usermm.RegistrationCache(ScriptedRegistrar())
    block = Block()
    cache.get(block)
    cache.close()

    def child() -> str:
        try:
            cache.get(block)
        except usermm.ClosedError:
            return "closed"
        return "open"

    assert in_child(child) == "closed"


def test_a_registrar_of_one_thread_belongs_to_the_childs_first_one() -> None:
    registrar, block = ScriptedRegistrar(Traits(any_thread=False)), Block()
    with cache_over(registrar) as cache:
        cache.get(block)
        assert in_child(lambda: (cache.get(block).handle, cache.clear(), cache.stats().deregistered)) == (2, 1, 1)


# At any moment of the parent


@ALL_OVERLAPS
@pytest.mark.parametrize("when", ["runs", "runs_after"])
def test_a_fork_while_another_thread_registers(overlap: Overlap, when: str) -> None:
    """That thread does not exist in the child, and will never be done."""
    registrar, block, gate = ScriptedRegistrar(Traits(overlap=overlap)), Block(2 * PAGE), Gate()

    def child() -> Any:
        registrar.__init__(Traits(overlap=overlap))  # type: ignore[misc]
        return cache.get(block.part(0, PAGE)).length, cache.get(block).length, cache.stats().pinned

    with cache_over(registrar) as cache:
        registrar.at_register(1, **{when: gate})
        with running(lambda: cache.get(block)), gate:
            pinned = 2 if overlap is Overlap.ALLOWED else 1
            assert in_child(child) == (PAGE, 2 * PAGE, pinned)
        assert cache.get(block).handle == 1


@ALL_OVERLAPS
def test_a_fork_while_another_thread_deregisters(overlap: Overlap) -> None:
    registrar, block, gate = ScriptedRegistrar(Traits(overlap=overlap)), Block(), Gate()

    def child() -> Any:
        registrar.__init__(Traits(overlap=overlap))  # type: ignore[misc]
        return cache.get(block).handle, cache.stats().pinned, names(registrar)

    with cache_over(registrar, max_count=1) as cache:
        cache.get(block)
        registrar.at_deregister(1, runs=gate)
        with running(lambda: cache.evict(block)), gate:
            assert in_child(child) == (1, 1, [("register", 1)])


def test_a_fork_while_another_thread_waits() -> None:
    registrar, block, gate = ScriptedRegistrar(), Block(), Gate()
    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=gate)
        with running(*[lambda: cache.get(block)] * 3), gate:
            assert eventually(lambda: cache.stats().waits >= 2)
            assert in_child(lambda: cache.get(block).valid)


def test_a_fork_inside_register() -> None:
    """What the parent's device was given is not the child's; the child's own attempt begins anew."""
    registrar, block = ScriptedRegistrar(), Block()
    children = []

    def fork_once() -> None:
        if not children:
            children.append(fork())

    with cache_over(registrar) as cache:
        registrar.at_register(1, runs=fork_once)
        registration = cache.get(block)
        if children == [0]:
            code = 1
            try:
                code = 10 * registration.valid + len([call for call in registrar.calls if call.name == "register"])
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 12
        assert (registration.handle, registration.valid) == (1, True)
        registration.release()


def test_a_fork_inside_deregister() -> None:
    registrar, blocks = ScriptedRegistrar(), [Block(), Block()]
    answers = []
    with cache_over(registrar) as cache:
        for block in blocks:
            cache.get(block)
        registrar.at_deregister(1, runs=lambda: answers.append(in_child(lambda: cache.get(blocks[1]).handle)))
        cache.clear()
        assert answers == [3]
        registrar.check(empty=True)


@pytest.mark.parametrize("linger_s", [None, 0.05])
def test_the_parent_can_close_while_a_child_lives(linger_s: float | None) -> None:
    """The child has copies of the descriptors by which the upkeep learns of it."""
    read_end, write_end = os.pipe()
    cache = usermm.RegistrationCache(ScriptedRegistrar(), linger_s=linger_s)
    cache.get(Block())
    assert _upkeeps() == 1
    child = fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    try:
        cache.close()
        assert eventually(lambda: _upkeeps() == 0)
    finally:
        os.close(read_end)
        os.close(write_end)
        os.waitpid(child, 0)


def _upkeeps() -> int:
    return sum(thread.name == "usermm cache upkeep" for thread in threading.enumerate())


def test_a_child_has_no_descriptor_for_each_of_the_parents_caches() -> None:
    """It may close them, or use them, but what belongs to the parent's threads is nobody's there."""
    caches = [usermm.RegistrationCache(ScriptedRegistrar()) for _ in range(20)]
    for cache in caches:
        cache.get(Block())

    def child() -> int:
        for cache in caches:
            cache.close()
        return sum(os.readlink(f"/proc/self/fd/{name}").startswith("pipe:") for name in _numbers())

    before = sum(os.readlink(f"/proc/self/fd/{name}").startswith("pipe:") for name in _numbers())
    assert in_child(child) <= before - 3 * 20 + 2
    for cache in caches:
        cache.close()


def _numbers() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]


def test_a_program_that_closes_every_descriptor(tmp_path: Path) -> None:
    """As a daemon does. The monitor has failed then; nothing is said twice, and no stranger's file is closed."""
    text = """
        import mmap, os, threading, time
        import usermm
        from usermm.testing import ScriptedRegistrar
        registrar = ScriptedRegistrar()
        cache = usermm.RegistrationCache(registrar, linger_s=0.05)
        block, held = mmap.mmap(-1, 4096), None
        cache.get(block)
        registration = cache.get(block)
        os.closerange(3, 256)
        mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        for probe in (True, None, False):
            try:
                cache.get(bytearray(5000), probe=probe)
                print("accepted")
            except usermm.MonitorFailedError as error:
                print("failed", str(error).count(chr(10)))
        print(registration.valid, cache.stats().registrations)
        registration.release()
        print(registrar.live)
        until = time.monotonic() + 10
        while threading.active_count() > 1 and time.monotonic() < until:
            time.sleep(0.01)
        cache.close()
        print(threading.active_count(), [os.fstat(number).st_mode != 0 for number in mine].count(True))
        with usermm.RegistrationCache(registrar) as fresh:
            print(fresh.get(block).valid)
    """
    assert run_quietly(text, tmp_path) == "failed 0\n" * 3 + "False 0\n()\n1 20\nTrue\n"


def test_a_monitor_that_fails_is_believed_in_nothing() -> None:
    """In a child, since descriptors of a monitor that lost one are left alone for good."""
    in_child(_lose_the_monitor)


def _lose_the_monitor() -> None:
    registrar, blocks = ScriptedRegistrar(), [Block(), Block()]
    with cache_over(registrar) as cache:
        cache.get(blocks[0])
        held = cache.get(blocks[1])
        os.close(descriptor_of("anon_inode:[userfaultfd]"))
        for probe in (True, None, False):
            line = refused_line(lambda probe=probe: cache.get(blocks[0].part(0, 9), probe=probe), MonitorFailedError)
            assert "nothing is remembered" in line
        for call in (cache.get, cache.evict, cache.explain):
            refused_line(lambda call=call: call(blocks[0]), MonitorFailedError)
        refused_line(cache.clear, MonitorFailedError)
        assert not held.valid
        assert [pin.handle for pin in registrar.live] == [2]
        held.release()
        registrar.check(empty=True)
        refused_line(lambda: usermm.RegistrationCache(registrar), MonitorFailedError)
    with cache_over(registrar) as cache:
        assert cache.get(blocks[0]).valid
