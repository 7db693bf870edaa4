"""``python -m benchmarks.register_worker REGIONS``: c/register.c from Python. Prints "new again" in ns a pair, loop included."""

from __future__ import annotations

import mmap
import random
import sys
import time

from benchmarks.devices import PAGE_BYTES, address_of
from usermm import Ummunotify

SPREAD = 4
"""One page in so many is registered, so that no two regions touch."""


class Scatter:
    """Pages inside one new mapping, in random order."""

    def __init__(self, count: int) -> None:
        self.memory = mmap.mmap(-1, count * SPREAD * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = address_of(self.memory)
        starts = [start + (index * SPREAD + 1) * PAGE_BYTES for index in range(count)]
        random.Random(count).shuffle(starts)
        self.ranges = [(start, start + PAGE_BYTES) for start in starts]


def pair_ns(device: Ummunotify, ranges: list[tuple[int, int]]) -> float:
    """Time of register_range and unregister of each range."""
    register, unregister = device.register_range, device.unregister
    before_ns = time.perf_counter_ns()
    for start, end in ranges:
        unregister(register(start, end))
    return (time.perf_counter_ns() - before_ns) / len(ranges)


def main() -> None:
    """Answers each line on stdin, a number of pairs, with one round."""
    others = Scatter(int(sys.argv[1]))
    with Ummunotify() as device:
        for start, end in others.ranges:
            device.register_range(start, end)
        for line in sys.stdin:
            pages = Scatter(int(line))
            new_ns, again_ns = pair_ns(device, pages.ranges), pair_ns(device, pages.ranges)
            print(f"{new_ns:.1f} {again_ns:.1f}", flush=True)
            pages.memory.close()


if __name__ == "__main__":
    main()
