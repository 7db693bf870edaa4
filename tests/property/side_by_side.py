"""The model and the real thing, step by step: one operation goes to both, and both must say the same.

The model is the userfaultfd flavour, since that is what the in-process device stands on. What a kernel may do one
way or the other is left out by construction:

- The kernel merges neighbouring mappings when it can (whether it can depends on which pages were ever touched, and on
  reverse-mapping structures that nobody sees), and MADV_DONTNEED is one notification for each mapping crossed. So a
  discard stays inside one run that the model never cut: a kernel's mapping is one such run or several, never a part.
- mremap needs its old range inside one mapping (Linux 6.17 lifted that for some): the same restriction.
- Where the kernel chooses the address: every mapping and every move here has a fixed one.
- Watches end with the last device of the process: one more device stays open all the time.
"""

from __future__ import annotations

import itertools
import mmap
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from property.pair import ODD_CALLS, Pair, outcome, readable
from support.arena import Arena

import usermm
from usermm.testing import (
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_REMOVE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_BYTES,
    AddressSpace,
    Mapping,
)
from usermm.uapi import ummunot, ummunotify

PAGES = 12
DEVICES_MAX = 3

versions = st.sampled_from([1, 2, 2])
pages = st.integers(1, PAGES)
lengths = st.integers(1, 8)
cookies = st.integers(0, 5)
counts = st.sampled_from([32, 64, 32, 96, 4096, 31, 0, 10000])
protections = st.sampled_from([mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE])
advices = st.sampled_from([MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTNEED_LOCKED, 3, 20])
picks = st.integers(0, 1000)


class SideBySide(RuleBasedStateMachine):
    @initialize(abis=st.lists(versions, min_size=1, max_size=DEVICES_MAX), cuts=st.sets(pages, max_size=3))
    def begin(self, abis: list[int], cuts: set[int]) -> None:
        """All pages are mapped at first, in up to four mappings, and there are devices: most steps hit something."""
        self.arena = Arena()
        self.space = AddressSpace()
        self.keeper = usermm.Ummunotify()
        self.pairs = [Pair(self.space, abi) for abi in abis]
        bounds = sorted({1, PAGES + 1} | cuts)
        for index, (page, next_page) in enumerate(itertools.pairwise(bounds)):
            self.mmap(page, next_page - page, shared=index % 2 == 1)

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            for pair in self.pairs:
                pair.agree(lambda device: device.close())
            self.arena.close()
            self.keeper.close()

    # Devices

    @rule(pick=st.integers(0, 9), abi=versions)
    def reopen(self, pick: int, abi: int) -> None:
        """Closes a device and opens another, or only the second; what is closed answers EBADF."""
        if pick < len(self.pairs):
            pair = self.pairs.pop(pick)
            pair.agree(lambda device: device.close())
            pair.agree(lambda device: device.generation)
        if len(self.pairs) < DEVICES_MAX:
            self.pairs.append(Pair(self.space, abi))

    @rule(pick=picks, cookie=cookies, page=pages, length=lengths)
    def register_pages(self, pick: int, cookie: int, page: int, length: int) -> None:
        self._register(pick, cookie, self.at(page), self.at(page + length))

    @rule(pick=picks, cookie=cookies, page=pages, offset=st.integers(0, PAGE_BYTES), length=st.integers(-9000, 20000))
    def register_bytes(self, pick: int, cookie: int, page: int, offset: int, length: int) -> None:
        """Unaligned, empty and reversed ranges too."""
        start = self.at(page) + offset
        self._register(pick, cookie, start, start + length)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, cookie=cookies, run=picks, first=picks, length=lengths)
    def register_range(self, pick: int, cookie: int, **where: int) -> None:
        """The Python method, which refuses holes; inside a mapping it refuses nothing but a known cookie."""
        start, end = self.part(where["run"], where["first"], where["length"])
        pair = self.pair(pick)
        if pair.agree(lambda device: device.register_range(start, end, cookie)) == cookie:
            pair.cookies.append(cookie)

    def _register(self, pick: int, cookie: int, start: int, end: int) -> None:
        pair = self.pair(pick)
        if pair.abi == 2:
            request, argument = ummunotify.REGISTER_REGION, ummunotify.REGISTER.pack(start, end, cookie, 7, 9)
        else:
            request, argument = ummunot.REGISTER_REGION, ummunot.REGISTER.pack(1, 7, start, end, cookie)
        if pair.agree(lambda device: device.ioctl(request, argument)) == 0:
            pair.cookies.append(cookie)

    @precondition(lambda self: any(pair.cookies for pair in self.pairs))
    @rule(pick=picks, which=picks)
    def unregister(self, pick: int, which: int) -> None:
        """One that is there; ODD_CALLS has others."""
        able = [pair for pair in self.pairs if pair.cookies]
        pair = able[pick % len(able)]
        cookie = pair.cookies.pop(which % len(pair.cookies))
        request = ummunotify.UNREGISTER_REGION if pair.abi == 2 else ummunot.UNREGISTER_REGION
        assert pair.agree(lambda device: device.ioctl(request, ummunotify.COOKIE.pack(cookie))) == 0

    @rule(pick=picks, count=counts)
    def read_bytes(self, pick: int, count: int) -> None:
        self.pair(pick).agree(lambda device: device.read_bytes(count))

    @rule(pick=picks)
    def read(self, pick: int) -> None:
        self.pair(pick).agree(lambda device: device.read(timeout=0))

    @rule(pick=picks, odd=st.sampled_from(range(len(ODD_CALLS))))
    def odd_call(self, pick: int, odd: int) -> None:
        """What is seldom done, or not done twice, or done wrongly."""
        self.pair(pick).agree(lambda device: ODD_CALLS[odd](device, self.arena.start))

    # Memory

    @rule(page=pages, length=lengths, shared=st.booleans())
    def mmap(self, page: int, length: int, shared: bool) -> None:
        self.arena.mmap(self.at(page), length * PAGE_BYTES, shared=shared)
        self.space.mmap(length * PAGE_BYTES, address=self.at(page), fixed=True, shared=shared)

    @rule(page=pages, length=lengths)
    def munmap(self, page: int, length: int) -> None:
        self.arena.munmap(self.at(page), length * PAGE_BYTES)
        self.space.munmap(self.at(page), length * PAGE_BYTES)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths)
    def discard(self, pick: int, first: int, length: int) -> None:
        start, end = self.part(pick, first, length)
        self.agree("madvise", start, end - start, MADV_DONTNEED)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths, advice=advices)
    def madvise(self, pick: int, first: int, length: int, advice: int) -> None:
        start, end = self.part(pick, first, length)
        self.agree("madvise", start, end - start, advice)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths, prot=protections)
    def mprotect(self, pick: int, first: int, length: int, prot: int) -> None:
        start, end = self.part(pick, first, length)
        self.agree("mprotect", start, end - start, prot)

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths, new_length=lengths, new_page=pages, keep=st.booleans())
    def move(self, pick: int, first: int, length: int, new_length: int, **others: Any) -> None:
        start, end = self.part(pick, first, length)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if others["keep"] else 0)
        self.agree("mremap", start, end - start, new_length * PAGE_BYTES, flags, self.at(others["new_page"]))

    @precondition(lambda self: self.runs())
    @rule(pick=picks, first=picks, length=lengths, new_length=lengths)
    def resize(self, pick: int, first: int, length: int, new_length: int) -> None:
        start, end = self.part(pick, first, length)
        self.agree("mremap", start, end - start, new_length * PAGE_BYTES)

    def agree(self, call: str, *arguments: int) -> None:
        real, model = (outcome(getattr(memory, call), *arguments) for memory in (self.arena, self.space))
        assert real == model, f"{call}: real {real}, model {model}"

    # After each step

    @invariant()
    def same(self) -> None:
        for pair in getattr(self, "pairs", ()):
            generation = pair.agree(lambda device: device.generation)
            pair.agree(readable)
            for seen in pair.seen[-2:]:
                assert pair.agree(lambda device, seen=seen: device.check(seen)) == (seen == generation)
                pair.agree(lambda device, seen=seen: device.check(seen, probe=False))
            pair.seen.append(int(str(generation)))

    # Helpers

    def at(self, page: int) -> int:
        return self.arena.start + page * PAGE_BYTES

    def pair(self, pick: int) -> Pair:
        return self.pairs[pick % len(self.pairs)]

    def runs(self) -> tuple[Mapping, ...]:
        return self.space.mappings() if hasattr(self, "space") else ()

    def part(self, pick: int, first: int, length: int) -> tuple[int, int]:
        """Some pages inside one run that the model never cut."""
        run = self.runs()[pick % len(self.runs())]
        start = run.start + first % ((run.end - run.start) // PAGE_BYTES) * PAGE_BYTES
        return start, min(run.end, start + length * PAGE_BYTES)
