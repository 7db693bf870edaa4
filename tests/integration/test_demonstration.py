"""The parts of `usermm.demonstration` that ``usermm demo`` rarely or never reaches."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import pytest

from usermm import UnavailableError
from usermm.demonstration import slow_motion
from usermm.demonstration.caches import ByHandCache, Cache, ExactCache
from usermm.demonstration.churn import ALIVE, steps
from usermm.demonstration.record import Happening, Moment
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


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        ring = Ring(4)
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    with ring:
        yield ring
    assert pinned_bytes() == 0


@pytest.fixture
def exact(ring: Ring) -> Iterator[ExactCache]:
    try:
        cache = ExactCache(ring)
    except UnavailableError as error:
        pytest.skip(f"needs userfaultfd: {error.strerror}")
    with contextlib.closing(cache):
        yield cache


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


def look_up(cache: Cache, buffer: Buffer) -> int:
    with cache.held(buffer) as slot:
        return slot


@pytest.mark.parametrize("kind", [ByHandCache, ExactCache])
def test_the_least_recently_used_makes_room(
    ring: Ring, exact: ExactCache, buffers: list[Buffer], kind: type[Cache]
) -> None:
    cache: Cache = exact if kind is ExactCache else ByHandCache(ring)
    for buffer in buffers[:4]:
        look_up(cache, buffer)
    look_up(cache, buffers[0])
    assert (cache.registrations, cache.hits) == (4, 1)
    look_up(cache, buffers[4])  # in the place of number 1
    assert pinned_bytes() == 4 * LENGTH
    look_up(cache, buffers[0])
    assert (cache.registrations, cache.hits) == (5, 2)
    look_up(cache, buffers[1])
    assert (cache.registrations, cache.hits) == (6, 2)


def test_only_what_went_is_forgotten(exact: ExactCache, buffers: list[Buffer]) -> None:
    slots = [look_up(exact, buffer) for buffer in buffers[:3]]
    buffers[0].close()
    buffers[2].memory.madvise(mmap.MADV_DONTNEED, 0, mmap.PAGESIZE)
    assert look_up(exact, buffers[1]) == slots[1]
    assert look_up(exact, buffers[2]) != slots[2]
    assert exact.forgotten == 2
    assert pinned_bytes() == 2 * LENGTH


def test_by_hand_nothing_is_forgotten(ring: Ring, buffers: list[Buffer]) -> None:
    cache = ByHandCache(ring)
    look_up(cache, buffers[0])
    buffers[0].close()
    look_up(cache, buffers[1])
    assert cache.forgotten == 0
    assert pinned_bytes() == 2 * LENGTH


def played(cache: Cache) -> dict[Happening, Moment]:
    """The last moment of each kind."""
    with KnownFile(None, 1) as file:
        return {moment.happening: moment for moment in slow_motion.play(cache, file, LENGTH)}


def test_slow_motion_shows_the_hazard(ring: Ring) -> None:
    moments = played(ByHandCache(ring))
    if Happening.MAPPED_AGAIN not in moments:
        pytest.skip("the kernel gave another address")
    assert moments[Happening.NOT_NOTED].pinned_bytes == LENGTH
    assert moments[Happening.MAPPED_AGAIN].buffer == slow_motion.OLD_BYTES.decode()
    assert moments[Happening.HIT].slot == 0
    assert moments[Happening.READ].transferred == LENGTH
    assert moments[Happening.READ].buffer == slow_motion.OLD_BYTES.decode() != moments[Happening.READ].expected


def test_slow_motion_shows_the_cure(exact: ExactCache) -> None:
    moments = played(exact)
    assert Happening.HIT not in moments
    assert Happening.NOTED in moments
    assert moments[Happening.REGISTERED].forgotten == 1
    assert moments[Happening.READ].transferred == LENGTH
    assert moments[Happening.READ].pinned_bytes == LENGTH
    assert moments[Happening.READ].buffer == moments[Happening.READ].expected


def test_buffers_are_as_large_as_the_limit_allows() -> None:
    try:
        length = largest_buffer(4)
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    assert length <= 1 << 20
    assert length % mmap.PAGESIZE == 0
    assert pinned_bytes() == 0
