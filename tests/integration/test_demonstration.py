"""The parts of `usermm.demonstration` that ``usermm demo`` rarely or never reaches."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

from usermm import Ummunotify, UnavailableError
from usermm.demonstration import slow_motion
from usermm.demonstration.caches import ByHandCache, NotifiedCache
from usermm.demonstration.churn import ALIVE, steps
from usermm.demonstration.record import Happening
from usermm.demonstration.workbench import (
    FILE_BYTES,
    SECTOR_BYTES,
    Buffer,
    KnownFile,
    largest_buffer,
    pinned_bytes,
)
from usermm.uring import Ring

LENGTH = 16 * mmap.PAGESIZE


class RingThatLosesMemory(Ring):
    """While the first registration is under way, the memory is discarded, as by another thread."""

    victim: Buffer | None = None

    def update(self, slot: int, address: int, length: int, tag: int = 0) -> None:
        super().update(slot, address, length, tag)
        victim, self.victim = self.victim, None
        if victim is not None:
            victim.memory.madvise(mmap.MADV_DONTNEED)


@pytest.fixture
def ring() -> Iterator[RingThatLosesMemory]:
    try:
        ring = RingThatLosesMemory(4)
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    with ring:
        yield ring
    assert pinned_bytes() == 0


@pytest.fixture
def device() -> Iterator[Ummunotify]:
    try:
        device = Ummunotify()
    except UnavailableError as error:
        pytest.skip(f"needs userfaultfd: {error.strerror}")
    with device:
        yield device


@pytest.fixture
def buffers() -> Iterator[list[Buffer]]:
    buffers = [Buffer(LENGTH) for _ in range(6)]
    yield buffers
    for buffer in buffers:
        buffer.close()


def test_the_sequence_is_the_same_for_both_halves() -> None:
    first, again, other = (list(steps(seed, 500, 1 << 20)) for seed in (7, 7, 8))
    assert first == again != other
    assert len({step.sector for step in first}) == len(first)
    assert {step.place for step in first} == set(range(ALIVE))


def test_reads_stay_inside_the_file_and_repeat_only_after_all_others() -> None:
    sectors = [step.sector for step in steps(1, 20000, 1 << 20)]
    span = (FILE_BYTES - (1 << 20)) // SECTOR_BYTES + 1
    assert max(sectors) == span - 1
    assert len(set(sectors[:span])) == span


def test_memory_that_goes_while_it_is_registered_is_registered_again(
    ring: RingThatLosesMemory, device: Ummunotify, buffers: list[Buffer]
) -> None:
    """Watch, register, look again: without the last step the slot would hold pages that are gone already."""
    cache, buffer = NotifiedCache(ring, device), buffers[0]
    buffer.memory[:1] = b"x"
    ring.victim = buffer
    with KnownFile(None, 1) as file:
        slot = cache.slot_for(buffer.address, LENGTH)
        assert ring.read_fixed(file.fileno(), slot, buffer.address, LENGTH, 5 * SECTOR_BYTES) == LENGTH
        assert file.matches(buffer, 5)
    assert pinned_bytes() == LENGTH
    assert len(cache.free) + len(cache.slots) == ring.slots


@pytest.mark.parametrize("notified", [False, True])
def test_the_least_recently_used_makes_room(
    ring: RingThatLosesMemory, device: Ummunotify, buffers: list[Buffer], notified: bool
) -> None:
    cache = NotifiedCache(ring, device) if notified else ByHandCache(ring)
    for buffer in buffers[:4]:
        cache.slot_for(buffer.address, LENGTH)
    cache.slot_for(buffers[0].address, LENGTH)
    assert (cache.registrations, cache.hits) == (4, 1)
    cache.slot_for(buffers[4].address, LENGTH)  # in the place of number 1
    assert pinned_bytes() == 4 * LENGTH
    cache.slot_for(buffers[0].address, LENGTH)
    assert (cache.registrations, cache.hits) == (5, 2)
    cache.slot_for(buffers[1].address, LENGTH)
    assert (cache.registrations, cache.hits) == (6, 2)


def test_only_what_went_is_forgotten(
    ring: RingThatLosesMemory, device: Ummunotify, buffers: list[Buffer]
) -> None:
    cache = NotifiedCache(ring, device)
    for buffer in buffers[:3]:
        cache.slot_for(buffer.address, LENGTH)
    assert cache.forget_what_went() == 0
    buffers[0].close()
    buffers[2].memory.madvise(mmap.MADV_DONTNEED, 0, mmap.PAGESIZE)
    assert cache.forget_what_went() == 2
    assert pinned_bytes() == LENGTH
    assert list(cache.slots) == [(buffers[1].address, LENGTH)]


def test_slow_motion_measures_each_moment(ring: RingThatLosesMemory, device: Ummunotify) -> None:
    with KnownFile(None, 1) as file:
        by_hand = {moment.happening: moment for moment in slow_motion.play(ByHandCache(ring), file, LENGTH)}
        ring.clear(0)
        told = {
            moment.happening: moment for moment in slow_motion.play(NotifiedCache(ring, device), file, LENGTH)
        }
    if Happening.MAPPED_AGAIN not in by_hand or Happening.MAPPED_AGAIN not in told:
        pytest.skip("the kernel gave another address")
    assert by_hand[Happening.UNMAPPED].pinned_bytes == LENGTH
    assert by_hand[Happening.HIT].slot == 0
    assert by_hand[Happening.READ].transferred == LENGTH
    assert by_hand[Happening.READ].buffer != by_hand[Happening.READ].expected
    assert told[Happening.NOTIFIED].forgotten == 1
    assert told[Happening.NOTIFIED].pinned_bytes == 0
    assert told[Happening.READ].buffer == told[Happening.READ].expected


def test_buffers_are_as_large_as_the_limit_allows() -> None:
    try:
        length = largest_buffer(4)
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    assert length <= 1 << 20
    assert length % mmap.PAGESIZE == 0
    assert pinned_bytes() == 0
