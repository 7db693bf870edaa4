"""Millions of mixed operations in eight threads while NumPy allocates and frees: never wrong, never stuck, never more.

USERMM_OPERATIONS sets how many; ten million with USERMM_STRESS=1.

What is true is known beforehand, by three kinds of memory: blocks above malloc(3)'s largest threshold, which free
always unmaps; blocks that nobody frees meanwhile, which may never be hit; and mappings freed by munmap with the
interpreter's lock released, so that their addresses are handed out to other threads at once.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import usermm
from usermm import _core

THREADS = 8
STRESS = os.environ.get("USERMM_STRESS") == "1"
OPERATIONS = int(os.environ.get("USERMM_OPERATIONS", "10000000" if STRESS else "1000000"))
MAPPED_BYTES = 33 << 20  # DEFAULT_MMAP_THRESHOLD_MAX is 32 MiB on 64 bits: always a mapping of its own
SMALL_BYTES = (64, 1000, 5000, 40_000)
LIMIT_S = 3600 if STRESS else 100
FIRST_SHARED_COOKIE = 1 << 40

_libc = ctypes.CDLL(None, use_errno=True)  # calls through CDLL release the interpreter's lock
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Shared:
    """What the threads have in common: one device, and which of its regions have had their memory freed."""

    def __init__(self, device: usermm.Ummunotify) -> None:
        self.device = device
        self.doomed: set[int] = set()
        self.read: list[int] = []
        self.early: list[int] = []
        self.busy = 0


class Worker:
    """One thread's part. Each step counts the operations it did and checks every answer it got."""

    def __init__(self, number: int, shared: Shared, share: int) -> None:
        self.random = random.Random(number)
        self.number = number
        self.shared = shared
        self.share = share
        self.operations = 0
        self.hits = 0
        self.serial = 0
        self.small: list[np.ndarray] = []
        self.device: usermm.Ummunotify
        self.still: usermm.Ummunotify
        self.still_seen = 0

    def run(self) -> None:
        kept = np.empty(MAPPED_BYTES, np.uint8)
        steps: list[Callable[[], int]] = [
            *[self.ask] * 6,
            *[self.allocate_and_free_small] * 4,
            *[self.register_small] * 4,
            self.free_array,
            self.shrink_array,
            self.unmap,
            self.unmap_shared,
            self.read_shared,
        ]
        with usermm.Ummunotify(1 + self.number % 2) as self.device, usermm.Ummunotify() as self.still:
            self.still.register(kept)
            self.still_seen = self.seen(self.still)
            while self.operations < self.share:
                self.operations += self.random.choice(steps)()
            self.small.clear()
            self.assert_still()

    def ask(self) -> int:
        """Nobody frees what the still device watches, whatever goes on beside it."""
        for _ in range(4):
            self.assert_still()
        return 8

    def assert_still(self) -> None:
        assert self.still.generation == self.still_seen, "hit while it was there"
        self.shared.busy += not self.still.check(self.still_seen)

    def seen(self, device: usermm.Ummunotify) -> int:
        """The generation after a registration, which should be the one before it."""
        first = device.generation
        if not device.check(first):
            if device.generation == first:
                self.shared.busy += 1  # documented: others unmapped without a pause for too long
            else:
                self.shared.early.append(-1)
        return device.generation

    def allocate_and_free_small(self) -> int:
        for length in SMALL_BYTES:
            self.small.append(np.zeros(length, np.uint8))
        if len(self.small) > 64:
            del self.small[: self.random.randrange(60)]
        return 8

    def register_small(self) -> int:
        """Blocks of the heap, whose neighbours come and go; their pages stay while they live."""
        array = np.ones(self.random.choice(SMALL_BYTES), np.uint8)
        cookies = [self.device.register(array), self.device.register(array)]
        seen = self.seen(self.device)
        self.small.append(np.ones(self.random.choice(SMALL_BYTES), np.uint8))
        assert cookies[0] != cookies[1]
        assert self.device.generation == seen, "hit while it was there"
        for cookie in cookies:
            self.device.unregister(cookie)
        return 8

    def expect(self, cookie: int, seen: int, start: int, end: int) -> None:
        """The memory of this region has just gone."""
        assert not self.device.check(seen, probe=False), "late in the thread that freed"
        assert not self.device.check(seen), "missed"
        events = self.device.read(timeout=0)
        [event] = [event for event in events if isinstance(event, usermm.Invalidation)]
        assert event.cookie == cookie
        assert start <= event.start < event.end <= end
        assert events[-1] == usermm.Last(events[-1].generation)
        assert events[-1].generation > seen
        self.device.unregister(cookie)
        self.hits += 1

    def free_array(self) -> int:
        array = np.empty(MAPPED_BYTES, np.uint8)
        start, length = _core.buffer_range(array)
        cookie = self.device.register(array)
        seen = self.seen(self.device)
        del array
        self.expect(cookie, seen, start, start + length)
        return 8

    def shrink_array(self) -> int:
        """realloc gives the tail back by mremap(2): only a region there is hit."""
        array = np.empty(MAPPED_BYTES + (2 << 20), np.uint8)
        start, length = _core.buffer_range(array)
        middle = start + MAPPED_BYTES + (1 << 20)
        tail = self.device.register_range(middle, start + length)
        head = self.still.register_range(start, start + (1 << 20))
        self.still_seen = self.seen(self.still)
        seen = self.seen(self.device)
        array.resize(MAPPED_BYTES, refcheck=False)
        self.expect(tail, seen, middle, start + length)
        self.assert_still()
        self.still.unregister(head)
        return 12

    def unmap(self) -> int:
        """Freed without the interpreter's lock, at addresses that another thread may get before this one goes on."""
        length = mmap.PAGESIZE * self.random.randrange(1, 64)
        start = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, _ANONYMOUS, -1, 0)
        cookie = self.device.register_range(start, start + length)
        seen = self.seen(self.device)
        assert _libc.munmap(start, length) == 0
        self.expect(cookie, seen, start, start + length)
        return 9

    def unmap_shared(self) -> int:
        """The same on the device of all: any thread may read the event, but only after the memory is doomed."""
        length = mmap.PAGESIZE
        start = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, _ANONYMOUS, -1, 0)
        self.serial += 1
        cookie = FIRST_SHARED_COOKIE * (1 + self.number) + self.serial
        device = self.shared.device
        device.register_range(start, start + length, cookie)
        seen = device.generation
        self.shared.doomed.add(cookie)
        assert _libc.munmap(start, length) == 0
        assert device.generation > seen
        assert not device.check(seen)
        device.unregister(cookie)
        return 7

    def read_shared(self) -> int:
        for event in self.shared.device.read(timeout=0):
            if isinstance(event, usermm.Invalidation):
                known = self.shared.read if event.cookie in self.shared.doomed else self.shared.early
                known.append(event.cookie)
        return 1


def _run_all(workers: list[Worker], limit_s: float) -> None:
    failures: list[BaseException] = []

    def run(worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as error:
            failures.append(error)
            for other in workers:
                other.share = 0

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    until = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs, or the machine is too slow"


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def _round(operations: int, limit_s: float, early: list[int]) -> list[Worker]:
    with usermm.Ummunotify() as device:
        shared = Shared(device)
        workers = [Worker(number, shared, operations // THREADS) for number in range(THREADS)]
        _run_all(workers, limit_s)
        workers[0].read_shared()
        early.extend(shared.early)
        assert shared.busy <= operations // 1000, "checks that could not tell"
        assert device.read(timeout=0) == []
        assert _core.counts()["regions"] == 0
        assert _core.counts()["devices"] == 1
    return workers


@pytest.mark.timeout(LIMIT_S + 60)
def test_numpy_churn_in_eight_threads() -> None:
    early: list[int] = []  # cookies whose event was there before their memory was freed
    _round(OPERATIONS // 10, LIMIT_S, early)  # arenas, caches and thread stacks are there from now on
    gc.collect()
    before = _resident_bytes()
    threads = len(os.listdir("/proc/self/task"))
    descriptors = len(os.listdir("/proc/self/fd"))
    workers = _round(OPERATIONS, LIMIT_S, early)
    done, hits = sum(worker.operations for worker in workers), sum(worker.hits for worker in workers)
    del workers
    gc.collect()
    assert done >= OPERATIONS
    assert hits > OPERATIONS // 1000
    assert len(os.listdir("/proc/self/task")) == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert _resident_bytes() - before < 32 << 20
    # Allowed, seldom: beside steady changes a registration waits 10 ms for a quiet moment, and then goes on without.
    assert len(early) <= OPERATIONS // 10_000
