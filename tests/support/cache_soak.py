"""A long run of a shared cache beside threads that unmap, forks, and arrays that come and go; prints JSON.

    PYTHONPATH=src:tests python -m support.cache_soak soak.so LOOKUPS [THREADS]

Two caches are asked. One is of blocks, which native threads unmap without the interpreter's lock while a Python thread
maps the same address again; what the device was given is told from what is mapped now by stamps in the pages. The other
is of NumPy arrays of all sizes, from the heap and mapped, pinned by an io_uring; there the page frames are compared.
Every single answer is: see native/ledger.h. What goes wrong is counted, for a test to judge.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import random
import signal
import statistics
import sys
import threading
import time
from typing import Any

import numpy as np

import usermm
from support.processes import fork
from support.soak_library import Arrays, Blocks, load, violations
from usermm import _core
from usermm.uring import Ring

BLOCKS_BYTES, BLOCKS_COUNT = 5 << 20, 90
ARRAYS_BYTES, ARRAYS_COUNT = 40 << 20, 400
ARRAYS_PER_THREAD = 24
LOOKS_PER_CHANGE = 80
FORKS, LOOKS_PER_FORK = 40, 250_000
CHILDS_LIMIT_S = 60

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_HUGE_BYTES = 9 << 19  # NumPy asks for huge pages from 4 MiB on


def frames_are_visible() -> bool:
    """Page frame numbers read as 0 without CAP_SYS_ADMIN."""
    page = np.ones(mmap.PAGESIZE, np.uint8)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(page.ctypes.data // mmap.PAGESIZE * 8)
        return int.from_bytes(pagemap.read(8), "little") & ((1 << 55) - 1) != 0


class Soak:
    """The caches, the threads and what they have in common."""

    def __init__(self, library: ctypes.PyDLL, looks: int, threads: int, ring: Ring | None) -> None:
        self.library, self.looks, self.threads = library, looks, threads
        self.forks = max(FORKS, looks // LOOKS_PER_FORK)
        self.blocks = usermm.RegistrationCache(Blocks(library), max_bytes=BLOCKS_BYTES, max_count=BLOCKS_COUNT)
        self.arrays = None
        if ring is not None:
            device = Arrays(library, ring)
            self.arrays = usermm.RegistrationCache(device, max_bytes=ARRAYS_BYTES, max_count=ARRAYS_COUNT)
        self.accounts = [library.soak_account(of_arrays).contents for of_arrays in (0, 1)]
        self.accounts[0].max_bytes, self.accounts[0].max_count = BLOCKS_BYTES, BLOCKS_COUNT
        self.accounts[1].max_bytes, self.accounts[1].max_count = ARRAYS_BYTES, ARRAYS_COUNT
        self.errors: list[BaseException] = []
        self.children = 0
        self.resident: list[int] = []

    def done(self) -> int:
        return sum(account.looks for account in self.accounts)

    def run(self) -> None:
        """Until as many look-ups are done; forks and measures meanwhile."""
        workers = [threading.Thread(target=self.work, args=(number,)) for number in range(self.threads)]
        for worker in workers:
            worker.start()
        for part in range(self.forks):
            while self.done() < self.looks * part // self.forks and not self.errors:
                time.sleep(0.001)
            self.resident.append(_resident_bytes())
            self.children += self.fork_works()
        for worker in workers:
            worker.join()

    def work(self, number: int) -> None:
        try:
            self.steps(random.Random(number))
        except BaseException as error:
            self.errors.append(error)

    def steps(self, rng: random.Random) -> None:
        library, get, evict = self.library, self.blocks.get, self.blocks.evict
        ours: list[np.ndarray] = []
        of_arrays = LOOKS_PER_CHANGE // 2 if self.arrays is not None else 0
        while self.done() < self.looks and not self.errors:
            library.soak_change(get, evict)
            library.soak_blocks(get, LOOKS_PER_CHANGE - 2 - of_arrays)
            if self.arrays is not None:
                self.churn(rng, ours)
                library.soak_arrays(self.arrays.get, ours, of_arrays)

    def churn(self, rng: random.Random, ours: list[np.ndarray]) -> None:
        """Sometimes an array comes or goes: of the heap below 128 KiB, a mapping of its own above."""
        if len(ours) < ARRAYS_PER_THREAD and (not ours or rng.random() < 0.25):
            length = _HUGE_BYTES if rng.random() < 0.01 else int(2 ** rng.uniform(6, 21))
            ours.append(np.empty(length, np.uint8))
            if rng.random() < 0.1:
                ours.append(ours[-1][rng.randrange(length // 2) :])
        elif rng.random() < 0.3:
            del ours[rng.randrange(len(ours))]

    def fork_works(self) -> bool:
        """A child finds the cache empty, uses it, and takes nothing back that is its parent's."""
        parent = os.getpid()
        child = fork()
        if child == 0:
            status = 1
            try:
                status = self.in_child(parent)
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1] == 0

    def in_child(self, parent: int) -> int:
        signal.alarm(CHILDS_LIMIT_S)
        library = self.library
        before = library.soak_live_of(parent)
        library.soak_in_child()
        seen = self.accounts[0].looks
        library.soak_blocks(self.blocks.get, 300)
        registered = self.blocks.stats().registered
        self.blocks.close()
        library.soak_let_go()
        unharmed = library.soak_live_of(parent) == before and library.soak_live_of(os.getpid()) == 0
        return 0 if unharmed and registered and self.accounts[0].looks > seen and not violations(library)[0] else 1

    def close(self) -> dict[str, Any]:
        """The end of all; what was seen."""
        gc.collect()
        self.library.soak_let_go()
        caches = [cache for cache in (self.blocks, self.arrays) if cache is not None]
        stats = [cache.stats() for cache in caches]
        for cache in caches:
            cache.close()
        self.library.soak_stop()
        blocks, arrays = self.accounts
        work = self.library.soak_work().contents
        count, first = violations(self.library)
        return {
            "blocks": {"looks": blocks.looks, "stale": blocks.stale, "most_bytes": blocks.most_bytes},
            "arrays": {"looks": arrays.looks, "stale": arrays.stale, "most_bytes": arrays.most_bytes},
            "left": blocks.live + arrays.live,
            "invalidations": sum(stat.invalidations for stat in stats),
            "evictions": sum(stat.evictions for stat in stats),
            "retries": sum(stat.retries for stat in stats),
            "registered": sum(stat.registered for stat in stats),
            "changes": work.changes,
            "given": work.given,
            "disturbances": work.disturbances,
            "violations": count,
            "first_violation": first,
            "forks": self.forks,
            "children": self.children,
            "errors": [repr(error) for error in self.errors],
            "resident_growth": _growth(self.resident),
        }


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def _growth(resident: list[int]) -> int:
    """From the second quarter of the run to the last one."""
    quarter = len(resident) // 4
    return int(statistics.median(resident[-quarter:]) - statistics.median(resident[quarter : 2 * quarter]))


def _tune_malloc() -> None:
    """Fixed thresholds: above it always a mapping, and the heap shrinks often."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    libc.mallopt(_M_TRIM_THRESHOLD, 64 << 10)


def main(path: str, looks: int, threads: int = 8) -> None:
    sys.setswitchinterval(0.0005)
    _tune_malloc()
    library = load(path)
    if library.soak_start():
        raise SystemExit("cache_soak: the addresses of the blocks are taken")
    ring = None
    if frames_are_visible():
        try:
            ring = Ring(ARRAYS_COUNT)
        except usermm.UnavailableError as error:
            print(f"cache_soak: arrays are left out: {error}", file=sys.stderr)
    began = time.monotonic()
    soak = Soak(library, looks, threads, ring)
    soak.run()
    seconds = time.monotonic() - began
    seen = soak.close() | {"seconds": round(seconds, 2), "core": _core.counts(), "frames": ring is not None}
    if ring is not None:
        ring.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], *[int(argument) for argument in sys.argv[2:]])
