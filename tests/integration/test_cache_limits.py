"""How much is registered at once, who makes room for whom, and registrations that share bytes."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from support.caches import PAGE, Block, cache_over
from support.calls import refused_line

import usermm
from usermm import LimitError, OverlapError
from usermm.monitors import calls
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar

MERGED = Traits(overlap=Overlap.MERGED)
REFUSED = Traits(overlap=Overlap.REFUSED)
Cache = usermm.RegistrationCache[object]


def rows(cache: Cache, block: Block) -> list[tuple[int, int]]:
    """What is in the look-up, in pages of the block: first and end."""
    found = cache.overlapping(block.address, block.nbytes)
    return [((row[0] - block.address) // PAGE, (row[0] + row[1] - block.address) // PAGE) for row in found]


def pins(registrar: ScriptedRegistrar, block: Block) -> list[tuple[int, int]]:
    """The same for what is registered with the device."""
    return sorted(
        ((pin.address - block.address) // PAGE, (pin.address + pin.length - block.address) // PAGE)
        for pin in registrar.live
    )


def pages(block: Block, first: int, end: int) -> Any:
    return block.part(first * PAGE, (end - first) * PAGE)


# The cache's limits


@pytest.mark.parametrize("limit", [{"max_count": 3}, {"max_bytes": 3 * PAGE}, {"max_bytes": 4 * PAGE - 1}])
def test_never_more_than_the_limit(limit: dict[str, int]) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(10)]
    with cache_over(registrar, **limit) as cache:
        for block in blocks * 3:
            with cache.get(block) as registration:
                assert (registration.address, registration.valid) == (block.address, True)
        assert (registrar.peak_count, registrar.peak_bytes) == (3, 3 * PAGE)
        now = cache.stats()
        assert (now.pinned, now.evictions, now.pinned_bytes_max) == (3, 27, 3 * PAGE)


def test_room_is_made_before_the_new_one_comes() -> None:
    """The device itself has no more than that."""
    registrar, blocks = ScriptedRegistrar(max_count=2, max_bytes=2 * PAGE), [Block() for _ in range(5)]
    with cache_over(registrar, max_count=2, max_bytes=2 * PAGE) as cache:
        for block in blocks:
            cache.get(block)
        assert cache.stats().register_failures == 0


def test_the_least_recently_used_makes_room() -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(5)]
    with cache_over(registrar, max_count=4) as cache:
        for block in blocks[:4]:
            cache.get(block)
        cache.get(blocks[0])
        cache.get(blocks[4])  # in the place of 1
        assert [pin.handle for pin in registrar.live] == [1, 3, 4, 5]


def test_several_make_room_for_a_large_one() -> None:
    registrar, block = ScriptedRegistrar(), Block(16 * PAGE)
    with cache_over(registrar, max_bytes=8 * PAGE) as cache:
        for page in range(8):
            cache.get(pages(block, page, page + 1))
        with cache.get(pages(block, 8, 14)):
            assert registrar.pinned_bytes == 8 * PAGE
        assert (registrar.peak_bytes, cache.stats().evictions) == (8 * PAGE, 6)


def test_what_is_held_makes_no_room() -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(4)]
    with cache_over(registrar, max_count=3) as cache:
        held = [cache.get(block) for block in blocks[:3]]
        line = refused_line(lambda: cache.get(blocks[3]), LimitError, errno.EDQUOT)
        assert "the cache is full (max_count 3) and everything in it is held: release some" in line
        assert all(registration.valid for registration in held)
        assert cache.get(blocks[0]).handle == 1, "hits are always possible"
        held.pop(1).release()
        assert cache.get(blocks[3]).handle == 4
        assert [pin.handle for pin in registrar.live] == [1, 3, 4]
        held.clear()


@pytest.mark.parametrize("limit", [{"max_count": 2}, {"max_bytes": 2 * PAGE}])
def test_what_is_dead_and_held_still_counts(limit: dict[str, int]) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(3)]
    with cache_over(registrar, **limit) as cache:
        first, second = cache.get(blocks[0]), cache.get(blocks[1])
        blocks[0].discard()
        cache.evict(blocks[1])
        assert not first.valid
        refused_line(lambda: cache.get(blocks[2]), LimitError)
        first.release()
        assert cache.get(blocks[2]).handle == 3
        second.release()
        assert (registrar.peak_count, cache.stats().held) == (2, 0)


def test_a_registration_under_way_counts() -> None:
    registrar, blocks, lines = ScriptedRegistrar(), [Block(), Block()], []
    with cache_over(registrar, max_count=1) as cache:
        registrar.at_register(1, runs=lambda: lines.append(refused_line(lambda: cache.get(blocks[1]), LimitError)))
        cache.get(blocks[0])
        assert len(lines) == 1
        assert registrar.peak_count == 1


def test_what_fits_exactly() -> None:
    block = Block(4 * PAGE)
    with cache_over(ScriptedRegistrar(Traits(max_length_bytes=4 * PAGE)), max_bytes=4 * PAGE, max_count=1) as cache:
        assert cache.get(block).length == 4 * PAGE
        assert cache.get(pages(block, 0, 2)).length == 4 * PAGE


def test_rounding_counts_too() -> None:
    """200 bytes across a border are two pages; a message must not say that others are in the way."""
    registrar, block = ScriptedRegistrar(Traits(granularity_bytes=PAGE)), Block(4 * PAGE)
    with cache_over(registrar, max_bytes=PAGE) as cache:
        assert cache.get(block.part(100, 200)).length == PAGE
        line = refused_line(lambda: cache.get(block.part(PAGE - 100, 200)), LimitError)
        assert "everything in it is held" not in line
        assert f"max_bytes, {PAGE}" in line
        assert cache.stats().registrations == 1


# The device's limits


@pytest.mark.parametrize("error", [LimitError(errno.ENOMEM, "full"), MemoryError("full")])
def test_a_device_without_room_is_given_some(error: Exception) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(4)]
    with cache_over(registrar) as cache:
        for block in blocks[:3]:
            cache.get(block)
        held = cache.get(blocks[2])
        for number in (4, 5):
            registrar.at_register(number, raises=error)
        with cache.get(blocks[3]) as registration:
            assert registration.valid
        assert [pin.handle for pin in registrar.live] == [3, 4]
        now = cache.stats()
        assert (now.evictions, now.register_failures, now.registered) == (2, 2, 4)
        held.release()


@pytest.mark.parametrize("error", [LimitError(errno.ENOMEM, "full"), MemoryError("full")])
def test_a_device_without_room_when_nothing_is_left_to_give(error: Exception) -> None:
    registrar, blocks = ScriptedRegistrar(), [Block() for _ in range(4)]
    with cache_over(registrar) as cache:
        for block in blocks[:2]:
            cache.get(block)
        held = cache.get(blocks[2])
        registrar.at_register(None, raises=error)
        with pytest.raises(type(error)) as caught:
            cache.get(blocks[3])
        assert caught.value is error
        assert held.valid
        assert [pin.handle for pin in registrar.live] == [3]
        held.release()


def test_a_small_device_behind_a_cache_without_limits() -> None:
    registrar, blocks = ScriptedRegistrar(max_count=4, max_bytes=20 * PAGE), [Block(PAGE * n) for n in range(1, 8)]
    with cache_over(registrar) as cache:
        for block in blocks * 3:
            cache.get(block)
        assert registrar.peak_count <= 4
        assert registrar.peak_bytes <= 20 * PAGE


# Registrations that share bytes


def test_overlaps_that_are_allowed_lie_beside_each_other() -> None:
    registrar, block = ScriptedRegistrar(), Block(8 * PAGE)
    with cache_over(registrar) as cache:
        for first, end in ((0, 4), (2, 6), (3, 8)):
            cache.get(pages(block, first, end))
        assert pins(registrar, block) == [(0, 4), (2, 6), (3, 8)]
        assert cache.stats().merges == 0


@pytest.mark.parametrize("traits", [MERGED, REFUSED], ids=["merged", "refused"])
def test_overlaps_become_one(traits: Traits) -> None:
    registrar, block = ScriptedRegistrar(traits), Block(16 * PAGE)
    with cache_over(registrar) as cache:
        for first, end in ((0, 2), (4, 6), (8, 10)):
            cache.get(pages(block, first, end))
        with cache.get(pages(block, 1, 5)) as registration:  # two of them
            assert (registration.address, registration.length) == (block.address, 6 * PAGE)
        assert pins(registrar, block) == rows(cache, block) == [(0, 6), (8, 10)]
        assert cache.stats().merges == 2
        cache.get(pages(block, 6, 8))  # it touches both, and that is nothing to this device
        assert pins(registrar, block) == [(0, 6), (6, 8), (8, 10)]
        assert cache.get(pages(block, 0, 10)).length == 10 * PAGE
        assert pins(registrar, block) == [(0, 10)]
        assert [call.name for call in registrar.calls[-4:]] == ["deregister"] * 3 + ["register"]


@pytest.mark.parametrize("overlap", [Overlap.MERGED, Overlap.REFUSED])
def test_neighbours_become_one(overlap: Overlap) -> None:
    registrar, block = ScriptedRegistrar(Traits(overlap=overlap, merge_adjacent=True)), Block(16 * PAGE)
    with cache_over(registrar) as cache:
        for page in (0, 2, 4, 1):
            cache.get(pages(block, page, page + 1))
        assert pins(registrar, block) == [(0, 3), (4, 5)]
        cache.get(pages(block, 3, 4))
        assert pins(registrar, block) == rows(cache, block) == [(0, 5)]


def test_a_held_one_stays_beside_the_union() -> None:
    registrar, block = ScriptedRegistrar(MERGED), Block(8 * PAGE)
    with cache_over(registrar) as cache:
        held = cache.get(pages(block, 0, 4))
        with cache.get(pages(block, 2, 6)) as union:
            assert (union.address, union.length) == (block.address, 6 * PAGE)
            assert (held.valid, held.length) == (False, 4 * PAGE)
            assert pins(registrar, block) == [(0, 4), (0, 6)]
        held.release()
        assert pins(registrar, block) == [(0, 6)]


@pytest.mark.parametrize("gone", ["held", "evicted", "lost"])
def test_a_held_one_that_overlaps_is_in_the_way_of_a_device_that_refuses(gone: str) -> None:
    registrar, block = ScriptedRegistrar(REFUSED), Block(8 * PAGE)
    with cache_over(registrar) as cache:
        held = cache.get(pages(block, 0, 4))
        cache.get(pages(block, 5, 7))
        if gone == "evicted":
            cache.evict(pages(block, 0, 4))
        if gone == "lost":
            calls.advise(block.address, PAGE, calls.MADV_DONTNEED)
        line = refused_line(lambda: cache.get(pages(block, 3, 6)), OverlapError, errno.EADDRINUSE)
        assert "overlaps a registration that is held: release that first" in line
        assert held.valid == (gone == "held")
        assert pins(registrar, block) == [(0, 4), (5, 7)]
        assert cache.get(pages(block, 5, 7)).handle == 2
        held.release()
        assert cache.get(pages(block, 3, 6)).valid
        registrar.check()


def test_a_held_neighbour_stays_as_it_is() -> None:
    traits = Traits(overlap=Overlap.REFUSED, merge_adjacent=True)
    registrar, block = ScriptedRegistrar(traits), Block(8 * PAGE)
    with cache_over(registrar) as cache, cache.get(pages(block, 0, 2)) as held:
        cache.get(pages(block, 4, 6))
        cache.get(pages(block, 2, 4))
        assert pins(registrar, block) == [(0, 2), (2, 6)]
        assert held.valid


@pytest.mark.parametrize("traits", [MERGED, REFUSED], ids=["merged", "refused"])
def test_a_union_that_would_not_fit(traits: Traits) -> None:
    registrar, block = ScriptedRegistrar(traits), Block(8 * PAGE)
    with cache_over(registrar, max_bytes=5 * PAGE) as cache:
        cache.get(pages(block, 0, 4))
        with cache.get(pages(block, 3, 6)) as registration:
            assert (registration.address, registration.length) == (block.address + 3 * PAGE, 3 * PAGE)
        assert pins(registrar, block) == [(3, 6)]
        assert registrar.peak_bytes <= 5 * PAGE


def test_a_union_longer_than_the_device_takes() -> None:
    registrar, block = ScriptedRegistrar(Traits(overlap=Overlap.MERGED, max_length_bytes=4 * PAGE)), Block(8 * PAGE)
    with cache_over(registrar) as cache:
        cache.get(pages(block, 0, 3))
        assert cache.get(pages(block, 2, 5)).length == 3 * PAGE
        assert cache.get(pages(block, 4, 6)).length == 4 * PAGE
        registrar.check()


def test_a_union_of_which_a_part_is_gone() -> None:
    """What was unmapped has left the look-up, and is not joined."""
    registrar, block = ScriptedRegistrar(MERGED), Block(8 * PAGE)
    with cache_over(registrar) as cache:
        cache.get(pages(block, 0, 4))
        calls.unmap(block.address, PAGE)
        assert cache.get(pages(block, 3, 6)).length == 3 * PAGE
        calls.map_free(block.address, PAGE)


@pytest.mark.parametrize("granularity", [64, 512, PAGE])
@pytest.mark.parametrize("overlap", list(Overlap))
def test_ranges_are_rounded_outwards(granularity: int, overlap: Overlap) -> None:
    registrar, block = ScriptedRegistrar(Traits(overlap=overlap, granularity_bytes=granularity)), Block(4 * PAGE)
    with cache_over(registrar) as cache:
        for offset, length in ((1, 1), (PAGE - 1, 2), (2 * PAGE - granularity, granularity), (17, 3 * PAGE)):
            start, end = block.address + offset, block.address + offset + length
            with cache.get(block.part(offset, length)) as registration:
                assert registration.address <= start
                assert end <= registration.address + registration.length
                assert registration.address % granularity == registration.length % granularity == 0
                assert overlap is not Overlap.ALLOWED or registration.length < length + 2 * granularity
        registrar.check()


def test_small_buffers_of_one_page_share_a_registration() -> None:
    registrar = ScriptedRegistrar(Traits(overlap=Overlap.REFUSED, granularity_bytes=PAGE))
    memory = np.zeros(3 * PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    with cache_over(registrar) as cache:
        small = [memory[start + at : start + at + 100] for at in range(0, PAGE, 100) if at + 100 <= PAGE]
        held = [cache.get(each) for each in small]
        assert {registration.handle for registration in held} == {1}
        assert registrar.pinned_bytes == PAGE
        held.clear()


def test_overlaps_at_random_keep_the_contract() -> None:
    """The registrar complains of every overlap that it refuses, of double returns, and of ranges not rounded."""
    random = np.random.default_rng(5)
    block = Block(32 * PAGE)
    for traits in (MERGED, REFUSED, Traits(overlap=Overlap.REFUSED, merge_adjacent=True, granularity_bytes=PAGE)):
        registrar, held = ScriptedRegistrar(traits), []
        with cache_over(registrar, max_bytes=20 * PAGE, max_count=6) as cache:
            for _ in range(600):
                first, length = (int(number) for number in random.integers(1, 20 * PAGE, 2))
                part = block.part(first % (28 * PAGE), length % (4 * PAGE) + 1)
                try:
                    held.append(cache.get(part))
                    assert held[-1].address <= part.address
                    assert part.address + part.size <= held[-1].address + held[-1].length
                except (OverlapError, LimitError):
                    held.clear()
                if first % 3:
                    held[: first % 5] = []
                if first % 37 == 0:
                    calls.advise(block.address + first // PAGE * PAGE, PAGE, 4)
            held.clear()
            assert cache.stats().pinned == len(registrar.live)
            assert registrar.peak_bytes <= 20 * PAGE
            assert registrar.peak_count <= 6
            registrar.check()
