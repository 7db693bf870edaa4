"""The reference model against two other formulations: a log that is asked questions, and a table of single pages."""

from __future__ import annotations

import os

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from property.history import History, Notified, Registered, Unregistered
from property.page_table import PageTable

from usermm import DeviceError
from usermm.testing import (
    MADV_DONTNEED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_BYTES,
    AddressSpace,
    Flavour,
    ModelDevice,
    Notification,
)
from usermm.uapi import ummunot, ummunotify

PAGES = 16
BASE = 0x4000_0000

pages = st.integers(0, PAGES - 1)
lengths = st.integers(1, 6)
offsets = st.integers(0, PAGES * PAGE_BYTES)
cookies = st.integers(0, 5)
counts = st.sampled_from([0, 31, 32, 64, 95, 4096, 10000])


class DeviceAgainstHistory(RuleBasedStateMachine):
    """Notifications of any range, straight into the device: no address space in between, so any order can come."""

    model_class = ModelDevice

    @initialize(abi=st.sampled_from([1, 2]))
    def open(self, abi: int) -> None:
        self.space = AddressSpace(Flavour.MMU_NOTIFIER)
        self.space.mmap(PAGES * PAGE_BYTES, address=BASE, fixed=True)
        self.device = self.model_class(self.space, abi, flags=os.O_RDONLY | os.O_NONBLOCK)
        self.history = History(abi)

    @rule(cookie=cookies, start=offsets, end=offsets)
    def register(self, cookie: int, start: int, end: int) -> None:
        if self.device.abi == 2:
            request, argument = ummunotify.REGISTER_REGION, ummunotify.REGISTER.pack(start, end, cookie, 0, 0)
        else:
            request, argument = ummunot.REGISTER_REGION, ummunot.REGISTER.pack(1, 0, start, end, cookie)
        known = cookie in self.history.live()
        assert refuses(lambda: self.device.ioctl(request, argument)) == known
        if not known:
            self.history.log.append(Registered(cookie, start, end))

    @rule(cookie=cookies, page=pages, length=lengths)
    def register_pages(self, cookie: int, page: int, length: int) -> None:
        self.register(cookie, page * PAGE_BYTES, (page + length) * PAGE_BYTES)

    @rule(cookie=cookies)
    def unregister(self, cookie: int) -> None:
        known = cookie in self.history.live()
        assert refuses(lambda: self.device.unregister(cookie)) == (not known)
        if known:
            self.history.log.append(Unregistered(cookie))

    @rule(page=pages, length=lengths)
    def notify(self, page: int, length: int) -> None:
        start, end = page * PAGE_BYTES, (page + length) * PAGE_BYTES
        self.space.mmap(end - start, address=start, fixed=True)
        self.space.munmap(start, end - start)
        self.history.log.append(Notified(start, end))

    @rule(count=counts)
    def read(self, count: int) -> None:
        if not self.history.readable():
            assert refuses(lambda: self.device.read_bytes(count))
            return
        got = [unpacked(*fields) for fields in ummunotify.EVENT.iter_unpack(self.device.read_bytes(count))]
        assert got == self.history.read(min(count, 4096) // 32)

    @precondition(lambda self: hasattr(self, "device"))
    @invariant()
    def agree(self) -> None:
        assert self.device.generation == self.history.generation()
        assert self.device.readable == self.history.readable()
        assert ummunotify.GENERATION.unpack_from(self.device.mmap())[0] == self.history.generation()


class SpaceAgainstPages(RuleBasedStateMachine):
    """Operations on the address space against a table that knows single pages only."""

    @initialize(flavour=st.sampled_from(Flavour))
    def begin(self, flavour: Flavour) -> None:
        self.space = AddressSpace(flavour)
        self.table = PageTable(everything=flavour is Flavour.MMU_NOTIFIER)
        self.heard: list[Notification] = []
        self.space.subscribe(self.heard.append)

    @rule(page=pages, length=lengths, shared=st.booleans())
    def mmap(self, page: int, length: int, shared: bool) -> None:
        self.space.mmap(length * PAGE_BYTES, address=address(page), fixed=True, shared=shared)
        self.table.map(page, page + length)

    @rule(page=pages, length=lengths)
    def munmap(self, page: int, length: int) -> None:
        self.space.munmap(address(page), length * PAGE_BYTES)
        self.table.unmap(page, page + length)

    @rule(page=pages, length=lengths)
    def watch(self, page: int, length: int) -> None:
        self.space.watch(address(page) + 1, address(page + length) - 1)
        self.table.watch(page, page + length)

    @rule(page=pages, length=lengths, new_length=lengths, new_page=pages, keep=st.booleans())
    def mremap(self, page: int, length: int, new_length: int, new_page: int, keep: bool) -> None:
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if keep else 0)
        fits = self.table.same_mapping(page, page + length) and not (keep and length != new_length)
        fits = fits and not (new_page < page + length and page < new_page + new_length)
        arguments = address(page), length * PAGE_BYTES, new_length * PAGE_BYTES, flags, address(new_page)
        assert refuses(lambda: self.space.mremap(*arguments)) == (not fits)
        if fits:
            self.table.move(page, page + length, new_page, new_page + new_length, keep)

    @rule(page=pages, length=lengths, new_length=lengths)
    def resize(self, page: int, length: int, new_length: int) -> None:
        fits = self.table.can_resize(page, page + length, page + new_length)
        arguments = address(page), length * PAGE_BYTES, new_length * PAGE_BYTES
        assert refuses(lambda: self.space.mremap(*arguments)) == (not fits)
        if fits:
            self.table.resize(page, page + length, page + new_length)

    @rule(page=pages, length=lengths)
    def discard(self, page: int, length: int) -> None:
        whole = self.table.is_mapped(page, page + length)
        assert refuses(lambda: self.space.madvise(address(page), length * PAGE_BYTES, MADV_DONTNEED)) == (not whole)
        self.table.discard(page, page + length)

    @rule()
    def fork(self) -> None:
        before = len(self.heard)
        child = self.space.fork()
        child.munmap(address(0), 2 * PAGES * PAGE_BYTES)
        assert all(each.cause.value == "fork" for each in self.heard[before:])
        del self.heard[before:]

    @precondition(lambda self: hasattr(self, "space"))
    @invariant()
    def agree(self) -> None:
        told = [((each.start - BASE) // PAGE_BYTES, (each.end - BASE) // PAGE_BYTES) for each in self.heard]
        assert told == self.table.told
        for page in range(2 * PAGES):
            assert self.space.is_mapped(address(page), address(page + 1)) == self.table.is_mapped(page, page + 1)


def address(page: int) -> int:
    return BASE + page * PAGE_BYTES


def unpacked(kind: int, flags: int, start: int, end: int, cookie: int) -> tuple[int, ...]:
    return (cookie,) if kind == ummunotify.EVENT_TYPE_LAST else (cookie, start, end, flags == 1)


def refuses(call: object) -> bool:
    try:
        call()  # type: ignore[operator]
    except DeviceError:
        return True
    return False
