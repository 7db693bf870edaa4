"""Three caches play the same random operations: usermm's on real memory, its reference model, and UCX's ucs_rcache.

UCX believes what it is told, so each change of the memory is told to it with the range of the call; ours hears of it
from the kernel. Ours merges overlaps, as UCX does. Compared is, for each get, which registration it gave (all three
number them from 1, so an equal number is an equal history of hits and misses) and what that covers; for each change,
which of the registrations that are held became invalid; and every few operations everything that is registered.

Every difference has a rule here, and none is wider than its reason; docs/differences-from-ucx.md has the reasons:

    LATE     UCX deregisters what was idle and lost its memory in the next get that misses, ours by the next call.
    HOLE     UCX registers memory that is not mapped if the device takes it; ours never asks the device for it.
    REFUSED  UCX logs an error for an empty range; ours raises ArgumentError.
"""

from __future__ import annotations

import collections
import errno
import json
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

from support.arena import Arena
from support.ucx_rcache import UcxCache, is_valid

import usermm
from usermm.registrars import Overlap, Traits
from usermm.testing import (
    MADV_DONTNEED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_BYTES,
    AddressSpace,
    ModelCache,
    Notification,
    Range,
)

PAGES = (24, 200)
"""Few: most of the memory is soon one registration. Many: most registrations are alone."""
BUFFERS = 120
HELD_MAX = 24
LOOK_EVERY = 100
STORY = 12
"""Operations that a failure tells of."""


class Buffer:
    """Memory by address and size. It takes a weak reference, so a cache may remember that it asked."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size


class Device:
    """Gives out 1, 2, 3, ... and knows what it has."""

    def __init__(self, granularity: int) -> None:
        self.traits = Traits(overlap=Overlap.MERGED, granularity_bytes=granularity)
        self.registered = 0
        self.live: dict[int, Range] = {}

    def register(self, address: int, length: int) -> int:
        self.registered += 1
        self.live[self.registered] = Range(address, address + length)
        return self.registered

    def deregister(self, handle: int) -> None:
        del self.live[handle]


class Held(NamedTuple):
    ours: Any
    model: Any
    ucx: Any


class HardOfHearing(UcxCache):
    """Misses one change in thirty: the mistake that a comparison has to find."""

    told = 0

    def invalidate(self, address: int, length: int) -> None:
        self.told += 1
        if self.told % 30:
            super().invalidate(address, length)


class ThreeCaches:
    def __init__(self, ucx: UcxCache, granularity: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.pages = PAGES[seed % len(PAGES)]
        self.arena = Arena()
        self.space = AddressSpace()
        self.space.subscribe(self._count_late)
        self.devices = Device(granularity), Device(granularity)
        self.ours = usermm.RegistrationCache(self.devices[0], linger_s=None)
        self.ours.upkeep_due = False  # no thread that deregisters by itself
        self.model = ModelCache(self.space, self.devices[1])
        self.ucx = ucx
        self.held: list[Held] = []
        self.late = 0
        """How many UCX has not deregistered yet: LATE."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.story: collections.deque[tuple[object, ...]] = collections.deque(maxlen=STORY)
        self.change("map", 0, self.pages)
        self.buffers = [self._buffer() for _ in range(BUFFERS)]

    def run(self, operations: int) -> dict[str, int]:
        steps = [self.get, self.get, self.get, self.release, self.get_and_release, self.get_and_release]
        for number in range(operations):
            if self.random.random() < 0.07:
                self.lose()
            else:
                self.random.choice(steps)()
            if number % LOOK_EVERY == 0:
                self.look()
        self.look()
        return dict(self.counts)

    def close(self) -> None:
        while self.held:
            self.release()
        self.look()
        self.ours.close()
        self.model.close()
        self.ucx.close()
        assert not self.devices[0].live
        assert not self.devices[1].live
        self.arena.close()

    # Operations

    def get(self) -> None:
        buffer = self._some_buffer()
        wanted = Range(buffer.address, buffer.address + buffer.size)
        self.story.append(("get", *wanted))
        if not self.space.is_mapped(*wanted):
            self._check_hole(buffer)
            return
        before = self.ucx.registered
        ours = self.ours.get(buffer, probe=self.random.choice((None, False, False, True)))
        model = self.model.get(buffer.address, buffer.size)
        ucx = self.ucx.get(buffer.address, buffer.size)
        region = ucx.contents
        given = [
            (ours.handle, ours.address, ours.address + ours.length),
            (model.handle, model.address, model.address + model.length),
            (region.handle, region.start, region.end),
        ]
        self._require(given[0] == given[1] == given[2], f"get: ours, the model, UCX: {given}")
        if self.ucx.registered > before:
            self.late = 0
        self.held.append(Held(ours, model, ucx))
        self.counts["hits" if model.outcome.hit else "misses"] += 1
        self.counts["merged"] += len(model.outcome.merged)
        if len(self.held) > HELD_MAX:
            self.release()

    def release(self) -> None:
        if self.held:
            self._release(self.random.randrange(len(self.held)))

    def get_and_release(self) -> None:
        before = len(self.held)
        self.get()
        if len(self.held) > before:
            self._release(-1)

    def lose(self) -> None:
        what = self.random.choice(("map", "map", "discard", "unmap", "move"))
        page, pages = self.random.randrange(self.pages), self.random.choice((1, 1, 1, 2, 3, 8))
        pages = min(pages, self.pages - page)
        self.change(what, page, pages)
        if self.random.random() < 0.5:
            self._fill()
        self._compare_held()
        if self.random.random() < 0.3:
            self.look()

    def change(self, what: str, page: int, pages: int) -> None:
        """Of the real memory, of the model's, and UCX is told."""
        self.story.append((what, page, pages))
        start, length = self.arena.start + page * PAGE_BYTES, pages * PAGE_BYTES
        if what == "map":
            self.arena.mmap(start, length)
            self.space.mmap(length, address=start, fixed=True)
        elif what == "unmap":
            self.arena.munmap(start, length)
            self.space.munmap(start, length)
        elif what == "discard" and self.space.is_mapped(start, start + length):
            self.arena.madvise(start, length, MADV_DONTNEED)
            self.space.madvise(start, length, MADV_DONTNEED)
        elif what == "move" and self.space.is_mapped(start, start + PAGE_BYTES):
            length = PAGE_BYTES  # more can be several mappings, which mremap refuses
            target = self.arena.start + self.random.randrange(self.pages) * PAGE_BYTES
            if target == start:
                return
            arguments = start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, target
            self.arena.mremap(*arguments)
            self.space.mremap(*arguments)
            self.ucx.invalidate(target, length)
        else:
            return
        self.counts["changes"] += 1
        self.ucx.invalidate(start, length)

    # Comparing

    def look(self) -> None:
        """All that is registered, in the look-up and out of it."""
        self.ours.stats()  # applies what was invalidated
        self.model.settle()
        self._require(self.devices[0].live == self.devices[1].live, "what is registered: ours and the model")
        rows = tuple((start, start + length) for start, length, _, _ in self.ours.overlapping(0, 0))
        self._require(rows == self.model.live, "the look-up: ours and the model")
        self._require(self.devices[0].registered == self.ucx.registered, "how many were ever registered")
        here, theirs = len(self.devices[0].live), self.ucx.live
        self._require(theirs == here + self.late, f"registered: ours {here}, UCX {theirs}, of these late {self.late}")
        self.counts["looks"] += 1
        self.counts["late"] += self.late > 0

    def _compare_held(self) -> None:
        """Which of the held ones were invalidated."""
        for held in self.held:
            valid = held.ours.valid, held.model.valid, is_valid(held.ucx)
            self._require(valid[0] == valid[1] == valid[2], f"valid {held.model.handle}: ours, the model, UCX: {valid}")
            self.counts["held and invalid"] += not valid[0]
        if self.held:
            self.model.settle()  # as asking ours did

    def _check_hole(self, buffer: Buffer) -> None:
        """HOLE: UCX is not asked, since it would remember it. Ours refuses, and gives up nothing for it."""
        for call in (self.ours.get, lambda each: self.model.get(each.address, each.size)):
            try:
                call(buffer)
            except usermm.DeviceError as error:
                self._require(error.errno == errno.EFAULT, f"a hole: {error}")
            else:
                self._require(False, "a hole was registered")
        self.counts["holes"] += 1

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise AssertionError(f"{what}\nafter {list(self.story)}")

    # Small things

    def _count_late(self, notification: Notification) -> None:
        """LATE: those that nobody holds wait for UCX's next miss."""
        gone = Range(notification.start, notification.end)
        held = {held.model.handle for held in self.held}
        live = set(self.model.live)
        hit = [handle for handle, each in self.devices[1].live.items() if each in live and each.overlaps(gone)]
        self.late += sum(handle not in held for handle in hit)
        self.counts["invalidated"] += len(hit)

    def _release(self, which: int) -> None:
        held = self.held.pop(which)
        self.story.append(("release", held.model.handle))
        held.ours.release()
        held.model.release()
        self.ucx.put(held.ucx)

    def _fill(self) -> None:
        bounds = [(each.start, each.end) for each in self.space.mappings()]
        ends = [self.arena.start, *(end for _, end in bounds)]
        starts = [*(start for start, _ in bounds), self.arena.start + self.pages * PAGE_BYTES]
        for hole, end in zip(ends, starts, strict=True):
            if hole < end:
                self.change("map", (hole - self.arena.start) // PAGE_BYTES, (end - hole) // PAGE_BYTES)

    def _buffer(self) -> Buffer:
        size = self.random.choice((1, 17, 100, 4096, 4096, 5000, 8192, 20000))
        size = self.random.randint(1, size) if self.random.random() < 0.3 else size
        offset = self.random.randrange(self.pages * PAGE_BYTES - size)
        return Buffer(self.arena.start + (offset & -PAGE_BYTES if self.random.random() < 0.3 else offset), size)

    def _some_buffer(self) -> Buffer:
        """One that was asked for before, a part of it, or another one."""
        kind = self.random.random()
        if kind < 0.2:
            return self._buffer()
        buffer = self.random.choice(self.buffers)
        if kind < 0.4:
            offset = self.random.randrange(buffer.size)
            return Buffer(buffer.address + offset, self.random.randint(1, buffer.size - offset))
        return buffer


def main() -> None:
    """Arguments: the shared object, granularity in bytes, seed, operations, and `deaf`. Prints what was counted."""
    shared_object, granularity, seed, operations, *deaf = sys.argv[1:]
    ucx = (HardOfHearing if deaf else UcxCache)(Path(shared_object), int(granularity))
    caches = ThreeCaches(ucx, int(granularity), int(seed))
    counts = caches.run(int(operations))
    caches.close()
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
