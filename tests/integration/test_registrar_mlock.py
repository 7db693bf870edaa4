"""`usermm.registrars.Mlock` against the real kernel: what is locked at each moment, and never less or more."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import mmap
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.arena import Arena
from support.calls import refused_line
from support.pins import PAGE, status_bytes, unprivileged
from support.processes import in_child

from usermm.errors import ArgumentError, ArgumentTypeError, DeviceError, LimitError
from usermm.registrars import Mlock, Overlap
from usermm.registrars import mlock as module
from usermm.uapi import procfs

PAGES = 16
PROT_NONE = 0


def locked() -> int:
    return status_bytes("VmLck")


@pytest.fixture(autouse=True)
def nothing_stays_locked() -> Iterator[None]:
    if not can_lock():
        pytest.skip("RLIMIT_MEMLOCK is too small to lock 64 KiB; ulimit -l 1024 would run it")
    before = locked()
    yield
    gc.collect()
    assert locked() == before


def can_lock() -> bool:
    with contextlib.suppress(LimitError), contextlib.closing(Arena()) as arena:
        arena.mmap(arena.start, PAGES * PAGE)
        Mlock().deregister(Mlock().register(arena.start, PAGES * PAGE))
        return True
    return False


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Sixteen pages at its start, and nothing behind them."""
    arena = Arena()
    arena.mmap(arena.start, PAGES * PAGE)
    yield arena
    arena.close()


def is_locked(arena: Arena, page: int) -> bool:
    """The kernel refuses to discard locked pages."""
    try:
        arena.madvise(arena.start + page * PAGE, PAGE, mmap.MADV_DONTNEED)
    except OSError as error:
        assert error.errno == errno.EINVAL
        return True
    return False


def pages(arena: Arena) -> list[int]:
    return [page for page in range(PAGES) if is_locked(arena, page)]


# What is locked


def test_the_pages_that_a_range_touches_are_locked(arena: Arena) -> None:
    registrar = Mlock()
    handle = registrar.register(arena.start + 2 * PAGE - 1, 2)
    assert (handle.address, handle.length) == (arena.start + PAGE, 2 * PAGE)
    assert (pages(arena), locked()) == ([1, 2], 2 * PAGE)
    registrar.deregister(handle)
    assert (pages(arena), locked()) == ([], 0)


def test_what_it_says_of_itself() -> None:
    traits = Mlock().traits
    assert (traits.overlap, traits.granularity_bytes, traits.max_length_bytes) == (Overlap.ALLOWED, 4096, None)
    assert (traits.writes, traits.any_thread) == (False, True)


def test_a_shared_page_is_unlocked_by_the_last(arena: Arena) -> None:
    """The kernel alone would unlock page 1 with the first munlock; two registrars share the counts, too."""
    one, two = Mlock(), Mlock()
    left = one.register(arena.start, 2 * PAGE)
    right = two.register(arena.start + PAGE, 2 * PAGE)
    same = one.register(arena.start + PAGE, PAGE)
    assert pages(arena) == [0, 1, 2]
    one.deregister(left)
    assert pages(arena) == [1, 2]
    two.deregister(right)
    assert pages(arena) == [1]
    one.deregister(same)
    assert pages(arena) == []


@pytest.mark.parametrize("seed", range(5))
def test_any_overlaps_in_any_order(arena: Arena, seed: int) -> None:
    choose, registrar, held = random.Random(seed), Mlock(), []
    for _ in range(60):
        if held and choose.random() < 0.5:
            registrar.deregister(held.pop(choose.randrange(len(held)))[1])
        else:
            first = choose.randrange(PAGES)
            last = choose.randrange(first, PAGES)
            handle = registrar.register(arena.start + first * PAGE + 1, (last - first) * PAGE + 1)
            held.append((range(first, last + 1), handle))
        assert pages(arena) == sorted({page for range_, _ in held for page in range_})
    for _, handle in held:
        registrar.deregister(handle)
    assert module._locks().counts.steps == [(-1, 0)]


@pytest.mark.parametrize("seed", range(20))
def test_counts_of_pages_against_a_dictionary(seed: int) -> None:
    choose, counts, model, held = random.Random(seed), module.PageCounts(), [0] * 40, []
    for _ in range(200):
        if held and choose.random() < 0.5:
            (start, end), by = held.pop(choose.randrange(len(held))), -1
        else:
            start = choose.randrange(39)
            end, by = choose.randrange(start + 1, 40), +1
            held.append((start, end))
        uncovered = counts.change(start, end, by)
        for at in range(start, end):
            model[at] += by
        assert [at for part in uncovered for at in range(*part)] == [at for at in range(start, end) if not model[at]]
        steps = [*counts.steps, (40, 0)]
        assert [n for (at, n), (to, _) in itertools.pairwise(steps) for _ in range(max(at, 0), to)] == model
        assert all(one[1] != two[1] for one, two in itertools.pairwise(counts.steps)), "not minimal"


def test_memory_is_faulted_in_or_locked_on_fault(arena: Arena) -> None:
    for onfault, resident in ((True, 0), (False, 4 * PAGE)):
        registrar = Mlock(onfault=onfault)
        handle = registrar.register(arena.start, 4 * PAGE)
        assert pages(arena) == [0, 1, 2, 3]
        assert resident_bytes(arena.start) == resident
        registrar.deregister(handle)


def resident_bytes(address: int) -> int:
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as smaps:
        text = smaps.read().split(f"{address:x}-", 1)[1]
    return int(procfs.status(text.split("VmFlags")[0])["Rss"].split()[0]) * 1024


def test_read_only_memory_can_be_locked(arena: Arena) -> None:
    arena.mprotect(arena.start, PAGE, mmap.PROT_READ)
    registrar = Mlock()
    handle = registrar.register(arena.start, PAGE)
    assert pages(arena) == [0]
    registrar.deregister(handle)


# Memory that went


def test_memory_that_is_gone_is_no_error(arena: Arena) -> None:
    registrar = Mlock()
    handle = registrar.register(arena.start, 4 * PAGE)
    arena.munmap(arena.start, 4 * PAGE)
    registrar.deregister(handle)
    assert locked() == 0


def test_what_is_left_around_a_hole_is_unlocked(arena: Arena) -> None:
    """munlock(2) stops at the first hole."""
    registrar = Mlock()
    handle = registrar.register(arena.start, 8 * PAGE)
    for gone in (0, 3, 5):
        arena.munmap(arena.start + gone * PAGE, PAGE)
    assert locked() == 5 * PAGE
    registrar.deregister(handle)
    assert locked() == 0


def test_new_memory_at_a_counted_address_is_locked(arena: Arena) -> None:
    """The registration of the old memory is still held: its count must not pass for a lock."""
    registrar = Mlock()
    old = registrar.register(arena.start, 4 * PAGE)
    arena.mmap(arena.start, 4 * PAGE)
    assert locked() == 0
    new = registrar.register(arena.start + PAGE, 2 * PAGE)
    assert pages(arena) == [1, 2]
    registrar.deregister(old)
    assert pages(arena) == [1, 2]
    registrar.deregister(new)


# Refusals


def test_the_limit_of_an_unprivileged_process() -> None:
    def child() -> tuple[str, int, list[int], list[int]]:
        arena, registrar = Arena(), Mlock()
        arena.mmap(arena.start, PAGES * PAGE)
        first = registrar.register(arena.start, 3 * PAGE)
        line = refused_line(lambda: registrar.register(arena.start + 2 * PAGE, 3 * PAGE), LimitError, errno.ENOMEM)
        before = pages(arena)
        registrar.deregister(first)
        registrar.register(arena.start + 2 * PAGE, 3 * PAGE)
        return line, locked(), before, pages(arena)

    line, bytes_locked, before, after = unprivileged(child, 4 * PAGE)
    assert f"RLIMIT_MEMLOCK is {4 * PAGE} bytes" in line
    assert "ulimit -l" in line
    assert (before, after, bytes_locked) == ([0, 1, 2], [2, 3, 4], 3 * PAGE)


def test_what_was_given_up_does_not_count_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deregistration was left to another thread, and a registration came before that thread was back."""

    def child() -> list[int]:
        arena, registrar = Arena(), Mlock()
        arena.mmap(arena.start, PAGES * PAGE)
        first = register(registrar, arena, 0, 3)
        with monkeypatch.context() as patched:
            patched.setattr(module._Locks, "settle", lambda _self: None)
            registrar.deregister(first)
        register(registrar, arena, 8, 3)
        return pages(arena)

    assert unprivileged(child, 4 * PAGE) == [8, 9, 10]


def test_no_limit_at_all_for_the_unprivileged() -> None:
    def child() -> str:
        arena = Arena()
        arena.mmap(arena.start, PAGE)
        return refused_line(lambda: Mlock().register(arena.start, PAGE), LimitError, errno.EPERM)

    assert "RLIMIT_MEMLOCK is 0 bytes" in unprivileged(child, 0)


def test_unusable_memory_is_not_a_matter_of_limits(arena: Arena) -> None:
    """mlock(2) says ENOMEM, too, but nothing that a cache could give up would help. What it had locked is unlocked."""
    registrar = Mlock()
    arena.munmap(arena.start + 2 * PAGE, PAGE)
    arena.mprotect(arena.start + 5 * PAGE, PAGE, PROT_NONE)
    for first, count, word in ((0, 4, "not mapped"), (PAGES, 1, "not mapped"), (4, 3, "PROT_NONE")):
        line = refused_line(lambda f=first, n=count: register(registrar, arena, f, n), DeviceError, errno.EFAULT)
        assert word in line
        assert locked() == 0


def test_a_failed_registration_leaves_the_locks_of_others(arena: Arena) -> None:
    registrar = Mlock()
    handle = register(registrar, arena, PAGES - 2, 1)
    refused_line(lambda: register(registrar, arena, PAGES - 4, 5), DeviceError, errno.EFAULT)
    assert pages(arena) == [PAGES - 2]
    registrar.deregister(handle)


def register(registrar: Mlock, arena: Arena, first: int, count: int) -> module.LockedMemory:
    return registrar.register(arena.start + first * PAGE, count * PAGE)


def test_bad_arguments(arena: Arena) -> None:
    registrar = Mlock()
    for address, length in ((-1, 1), (arena.start, 0), (arena.start, -1), (0, 1 << 64), ((1 << 64) - 1, 1)):
        line = refused_line(lambda a=address, n=length: registrar.register(a, n), ArgumentError)
        assert "pass a buffer's range" in line
    refused_line(lambda: registrar.register(1, (1 << 64) - 5000), DeviceError)
    for address, length in (("x", 1), (arena.start, 1.5), (None, 1)):
        assert "must be an integer" in refused_line(
            lambda a=address, n=length: registrar.register(a, n), ArgumentTypeError
        )
    assert "not int" in refused_line(lambda: registrar.deregister(arena.start), ArgumentTypeError)  # type: ignore[arg-type]


def test_a_handle_is_taken_once(arena: Arena) -> None:
    registrar = Mlock()
    handle, other = register(registrar, arena, 0, 2), register(registrar, arena, 0, 2)
    registrar.deregister(handle)
    assert "(any more)" in refused_line(lambda: registrar.deregister(handle), ArgumentError)
    assert pages(arena) == [0, 1]
    registrar.deregister(other)


# Forks, threads, interruptions


def test_a_forked_child_begins_without_locks(arena: Arena) -> None:
    registrar = Mlock()
    handle = register(registrar, arena, 0, 4)

    def child() -> tuple[list[int], list[int], list[int]]:
        before = pages(arena)
        own = register(registrar, arena, 1, 2)
        registrar.deregister(handle)
        during = pages(arena)
        registrar.deregister(own)
        return before, during, pages(arena)

    assert in_child(child) == ([], [1, 2], [])
    assert pages(arena) == [0, 1, 2, 3]
    registrar.deregister(handle)


def test_a_child_of_a_busy_parent_does_not_wait_for_ever(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_inside(arena, monkeypatch) as registrar:
        assert in_child(lambda: register(registrar, arena, 4, 1).length) == PAGE


@contextlib.contextmanager
def one_inside(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mlock]:
    """Another thread is in the middle of a registration of page 0 as long as the block runs."""
    registrar, inside, go_on, real = Mlock(), threading.Event(), threading.Event(), module._libc.mlock

    def slow(address: int, length: int) -> Any:
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait(20)
        return real(address, length)

    monkeypatch.setattr(module._libc, "mlock", slow)
    thread = threading.Thread(target=lambda: registrar.deregister(register(registrar, arena, 0, 1)))
    thread.start()
    assert inside.wait(20)
    try:
        yield registrar
    finally:
        go_on.set()
        thread.join()


def test_deregister_never_waits(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that is inside does it instead, before it is done."""
    handle = register(Mlock(), arena, 2, 1)
    with one_inside(arena, monkeypatch) as registrar:
        registrar.deregister(handle)
        assert pages(arena) == [2]
    assert pages(arena) == []


def test_deregister_in_the_middle_of_register(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    registrar = Mlock()
    old = register(registrar, arena, 0, 2)
    inside(monkeypatch, lambda: registrar.deregister(old))
    new = register(registrar, arena, 1, 2)
    assert pages(arena) == [1, 2]
    registrar.deregister(new)


def test_register_in_the_middle_of_register_is_refused(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    registrar, lines = Mlock(), []
    inside(
        monkeypatch,
        lambda: lines.append(refused_line(lambda: register(registrar, arena, 5, 1), DeviceError, errno.EDEADLK)),
    )
    handle = register(registrar, arena, 1, 1)
    assert "call it later" in lines[0]
    assert pages(arena) == [1]
    registrar.deregister(handle)


@pytest.mark.parametrize("done", [True, False], ids=["after the call", "before the call"])
def test_an_interrupted_registration_leaves_nothing(arena: Arena, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    registrar = Mlock()

    def interrupt() -> None:
        raise KeyboardInterrupt

    inside(monkeypatch, interrupt, after=done)
    with pytest.raises(KeyboardInterrupt):
        register(registrar, arena, 0, 2)
    assert locked() == 0
    registrar.deregister(register(registrar, arena, 0, 2))


def inside(monkeypatch: pytest.MonkeyPatch, function: Callable[[], None], *, after: bool = True) -> None:
    """The next call of mlock(2) runs `function` as well, as a finalizer or a signal handler would."""
    real = module._libc.mlock

    def once(address: int, length: int) -> Any:
        monkeypatch.setattr(module._libc, "mlock", real)
        result = real(address, length) if after else 0
        function()
        return result

    monkeypatch.setattr(module._libc, "mlock", once)


def test_deregister_from_finalizers_anywhere(arena: Arena) -> None:
    registrar, taken_back = Mlock(), []

    class Owner:
        def __init__(self, page: int) -> None:
            self.itself = self
            self.handle = register(registrar, arena, page, 2)

        def __del__(self) -> None:
            registrar.deregister(self.handle)
            taken_back.append(self.handle)

    thresholds = gc.get_threshold()
    gc.freeze()  # everything older is out of the way, so that collections are complete and quick
    gc.collect()
    gc.set_threshold(1, 1, 1)
    try:
        for number in range(300):
            Owner(number % (PAGES - 1))
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        gc.collect()
    assert len(taken_back) == 300
    assert pages(arena) == []


def test_many_threads_share_pages(arena: Arena) -> None:
    registrar, failures = Mlock(), []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(300):
            first = choose.randrange(PAGES - 4)
            handle = register(registrar, arena, first, choose.randrange(1, 5))
            if not is_locked(arena, first):
                failures.append(first)
            registrar.deregister(handle)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pages(arena) == []
    assert module._locks().counts.steps == [(-1, 0)]
