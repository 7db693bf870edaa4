"""``python -m benchmarks.register_worker REGIONS``: the first three columns of c/register.c, from Python."""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
import time

from benchmarks.devices import PAGE_BYTES, address_of
from usermm import Ummunotify

SPREAD = 4
"""One page in so many is registered, so that no two regions touch."""
LARGEST_BATCH = 1000
_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Scatter:
    """Pages inside one new mapping, in random order. Inaccessible pages keep it from merging with neighbours."""

    def __init__(self, count: int, touched: bool) -> None:
        pages = count * SPREAD
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        first = address_of(self.memory) + PAGE_BYTES
        for guard in (first - PAGE_BYTES, first + pages * PAGE_BYTES):
            assert _libc.mprotect(guard, PAGE_BYTES, 0) == 0
        indices = [index * SPREAD + 1 for index in range(count)]
        for index in indices if touched else ():
            self.memory[(index + 1) * PAGE_BYTES] = 1
        random.Random(count).shuffle(indices)
        self.ranges = [(first + index * PAGE_BYTES, first + (index + 1) * PAGE_BYTES) for index in indices]


def pairs_ns(device: Ummunotify, ranges: list[tuple[int, int]]) -> int:
    """Time of register_range and unregister of each range."""
    register, unregister = device.register_range, device.unregister
    before_ns = time.perf_counter_ns()
    for start, end in ranges:
        unregister(register(start, end))
    return time.perf_counter_ns() - before_ns


def measure(device: Ummunotify, count: int) -> list[int]:
    """In batches of many sizes, as in C."""
    sums_ns = [0, 0, 0]
    left = count
    while left:
        batch = min(left, random.randrange(LARGEST_BATCH // 2, LARGEST_BATCH))
        left -= batch
        used, untouched = Scatter(batch, touched=True), Scatter(batch, touched=False)
        for index, pages in enumerate((used, untouched, used)):
            sums_ns[index] += pairs_ns(device, pages.ranges)
        used.memory.close()
        untouched.memory.close()
    return sums_ns


def main() -> None:
    """Answers each line on stdin, a number of pairs, with one round."""
    others = Scatter(int(sys.argv[1]), touched=False)
    with Ummunotify() as device:
        for start, end in others.ranges:
            device.register_range(start, end)
        for line in sys.stdin:
            count = int(line)
            print(*(f"{sum_ns / count:.1f}" for sum_ns in measure(device, count)), flush=True)


if __name__ == "__main__":
    main()
