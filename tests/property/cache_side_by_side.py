"""Random steps for `usermm.RegistrationCache` on real memory and for `ModelCache` on a model of it.

What happens to the memory is what happens in side_by_side.py, with the same restrictions. Beyond that it changes while
the device registers, where a cache has to notice, but not while the device deregisters: a program's own callback that
unmaps what the cache is looking at finds it before the look or after it, and which of both is no promise.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from property.cache_pair import Asker, CachePair, Owner
from property.side_by_side import SideBySide, advices, picks
from support.arena import Arena

from usermm import LimitError
from usermm.registrars import Overlap, Traits
from usermm.testing import MADV_DONTNEED, PAGE_BYTES, AddressSpace, ModelCache, Range
from usermm.uapi import procfs

PAGES = 10
CHANGES = ("mmap", "munmap", "madvise")
ASKERS_MAX = 4
HELD_MAX = 5

pages = st.integers(1, PAGES)
lengths = st.integers(1, 4)
probes = st.sampled_from([None, None, True, False])
mostly = st.sampled_from([True, True, True, False])
offsets = st.sampled_from([0, 0, 1, 64, 500, 512, 4000])
edges = st.sampled_from([0, 0, 1, 500, 4096, -1, -512, -4096])
ranges = st.tuples(pages, offsets, lengths, offsets)
traits_of_devices = st.builds(
    Traits,
    overlap=st.sampled_from(Overlap),
    merge_adjacent=st.booleans(),
    granularity_bytes=st.sampled_from([1, 512, PAGE_BYTES]),
    max_length_bytes=st.sampled_from([None, None, 4 * PAGE_BYTES]),
)

Limits = dict[str, int | None]


def limits(few: int) -> st.SearchStrategy[Limits]:
    """None half of the time; otherwise a few pages, or registrations."""
    some_bytes = st.sampled_from([None, None, few * PAGE_BYTES, 2 * few * PAGE_BYTES])
    return st.fixed_dictionaries({"max_bytes": some_bytes, "max_count": st.sampled_from([None, None, few, few + 2])})


class CacheSideBySide(RuleBasedStateMachine):
    model_class = ModelCache

    @initialize(traits=traits_of_devices, limits=limits(3), budget=limits(4), cuts=st.sets(pages, max_size=3))
    def begin(self, traits: Traits, limits: Limits, budget: Limits, cuts: set[int]) -> None:
        """All pages are mapped at first, in up to four mappings."""
        self.arena = Arena()
        self.space = AddressSpace()
        self.pair = CachePair(self.space, traits, limits, budget, self.model_class)
        self.askers: list[Asker] = []
        for index, (page, next_page) in enumerate(itertools.pairwise(sorted({1, PAGES + 1} | cuts))):
            self.mmap(page, next_page - page, shared=index % 2 == 1)

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        if sys.exception() is None:  # after a failure there is nothing more to learn
            self.end()
        self.pair.abandon()
        self.arena.close()

    def end(self) -> None:
        """Closed caches refuse, and what is held stays until it is let go."""
        while self.askers:
            self.pair.forget(self.askers, 0)
        self.pair.close()
        self.pair.compare_devices()
        self.get_once(Asker(self.at(1), 1), None, kept=True)
        while self.pair.held:
            self.pair.release(self.pair.held[0])
        self.pair.compare_devices()
        assert not self.pair.devices[0].live

    # Memory. There is new memory in place of the old, most of the time.

    at, runs, part = SideBySide.at, SideBySide.runs, SideBySide.part

    @rule(page=pages, length=lengths, shared=st.booleans())
    def mmap(self, page: int, length: int, shared: bool) -> None:
        SideBySide.mmap(self, page, length, shared)

    @rule(page=pages, length=lengths, back=mostly)
    def munmap(self, page: int, length: int, back: bool) -> None:
        SideBySide.munmap(self, page, length)
        self.fill(back)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths, advice=advices)
    def madvise(self, pick: int, first: int, length: int, advice: int) -> None:
        SideBySide.madvise(self, pick, first, length, advice)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths, new_length=lengths, new_page=pages, keep=st.booleans(), back=mostly)
    def move(self, pick: int, first: int, length: int, new_length: int, back: bool, **others: Any) -> None:
        SideBySide.move(self, pick, first, length, new_length, **others)
        self.fill(back)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths, new_length=lengths, back=mostly)
    def resize(self, pick: int, first: int, length: int, new_length: int, back: bool) -> None:
        SideBySide.resize(self, pick, first, length, new_length)
        self.fill(back)

    def fill(self, back: bool) -> None:
        for page in range(1, PAGES + 1):
            if back and not self.space.is_mapped(self.at(page), self.at(page + 1)):
                SideBySide.mmap(self, page, 1, shared=False)

    def agree(self, call: str, *arguments: int) -> None:
        """Nothing is moved across the edge of a watch, which the kernel refuses: a cache takes off some that it had."""
        if call != "mremap" or is_one_mapping(arguments[0], arguments[0] + arguments[1]):
            SideBySide.agree(self, call, *arguments)

    # Calls

    @rule(asked=st.lists(ranges, min_size=1, max_size=4), probe=probes, kept=mostly)
    def get_bytes(self, asked: list[tuple[int, int, int, int]], probe: bool | None, kept: bool) -> None:
        for page, offset, length, less in asked:
            start = self.at(page) + offset
            self.get_once(Asker(start, self.at(page + length) - less - start), probe, kept)

    @rule(asked=st.lists(st.tuples(pages, lengths), min_size=1, max_size=4), probe=probes, kept=mostly)
    def get_pages(self, asked: list[tuple[int, int]], probe: bool | None, kept: bool) -> None:
        for page, length in asked:
            self.get_once(Owner(self.at(page), length * PAGE_BYTES), probe, kept)

    @precondition(lambda self: self.live())
    @rule(pick=picks, before=edges, after=edges, probe=probes, kept=mostly)
    def get_near(self, pick: int, before: int, after: int, probe: bool | None, kept: bool) -> None:
        """What is there, with less or more at both ends."""
        start, end = self.live()[pick % len(self.live())]
        self.get_once(Asker(start - before, end + after - (start - before)), probe, kept)

    def get_once(self, asker: Asker, probe: bool | None, kept: bool) -> None:
        """Every other object lives on for a while, if it was given something."""
        held = self.pair.get(asker, probe)
        remembered = held is not None and len(self.askers) < ASKERS_MAX
        if held and (kept or len(self.pair.held) > HELD_MAX):
            self.pair.release(held)
        self.askers.append(asker)
        del asker
        if not remembered:
            self.pair.forget(self.askers, -1)

    @precondition(lambda self: getattr(self, "askers", None))
    @rule(pick=picks, probe=probes, kept=mostly, by=st.sampled_from([0, 0, 0, 4096, -512]))
    def ask_again(self, pick: int, probe: bool | None, kept: bool, by: int) -> None:
        """The same object, sometimes with other memory."""
        asker = self.askers[pick % len(self.askers)]
        asker.address += by
        held = self.pair.get(asker, probe)
        if held and kept:
            self.pair.release(held)

    @precondition(lambda self: getattr(self, "askers", None))
    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        self.pair.forget(self.askers, pick % len(self.askers))

    @precondition(lambda self: hasattr(self, "pair") and self.pair.held)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        self.pair.release(self.pair.held[pick % len(self.pair.held)])

    @rule(page=pages, offset=offsets, length=lengths, pick=picks)
    def evict(self, page: int, offset: int, length: int, pick: int) -> None:
        """Some memory, or an object that asked."""
        asker = Asker(self.at(page) + offset, length * PAGE_BYTES)
        self.pair.evict([asker, *self.askers][pick % (1 + len(self.askers))])

    @rule(everything=st.booleans())
    def clear(self, everything: bool) -> None:
        """All of it, or what nobody asked for any more."""
        if everything:
            self.pair.clear()
        else:
            self.pair.expire(self.askers)

    @rule()
    def compare(self) -> None:
        self.pair.compare()

    # The device

    @rule(error=st.sampled_from([MemoryError, LimitError, KeyError]), times=st.integers(1, 3))
    def let_the_device_refuse(self, error: type[Exception], times: int) -> None:
        for number in range(1, 1 + times):
            for device in self.pair.devices:
                device.at_register(self.pair.registrations + number, raises=error)

    @rule(page=pages, length=lengths, what=st.sampled_from(CHANGES), times=st.sampled_from([1, 8]))
    def let_memory_change_meanwhile(self, page: int, length: int, what: str, times: int) -> None:
        """At the end of the registration: a device without room is asked first, or both would count as reasons."""
        for number in range(1, 1 + times):
            for device, memory in zip(self.pair.devices, (self.arena, self.space), strict=True):
                step = self.change(memory, what, self.at(page), length * PAGE_BYTES)
                device.at_register(self.pair.registrations + number, runs_after=step)

    def change(self, memory: Any, what: str, address: int, length: int) -> Callable[[], object]:
        if what == "munmap":
            return lambda: memory.munmap(address, length)
        if what == "madvise":
            return lambda: quietly(memory.madvise, address, length, MADV_DONTNEED)
        if memory is self.space:
            return lambda: self.space.mmap(length, address=address, fixed=True)
        return lambda: self.arena.mmap(address, length)

    # After each step

    @invariant()
    def same(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare_devices()

    def live(self) -> tuple[Range, ...]:
        return self.pair.model.live if hasattr(self, "pair") else ()


def is_one_mapping(start: int, end: int) -> bool:
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return len(procfs.overlapping(lines, start, end)) == 1


def quietly(call: Callable[..., object], *arguments: int) -> None:
    with contextlib.suppress(OSError):  # a hole
        call(*arguments)
