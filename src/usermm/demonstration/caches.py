"""The same registration cache twice: as it is often written by hand, and with notifications.

Registering a buffer with a device is slow, so programs keep the registration and look it up by address. The
key says nothing about *which memory* is at that address: once it was unmapped and mapped again, the look-up
finds a registration of pages that nobody can see any more. `NotifiedCache` is `ByHandCache` and the lines
that are missing in it.
"""

from __future__ import annotations

from usermm import Invalidation, Ummunotify
from usermm.uring import Ring


class ByHandCache:
    """``{(address, length): slot}`` over the fixed buffers of a ring; the least recently used makes room."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.hits = 0
        self.registrations = 0
        self.slots: dict[tuple[int, int], int] = {}  # in the order of use, the latest last
        self.free = list(reversed(range(ring.slots)))

    def slot_for(self, address: int, length: int) -> int:
        """The fixed buffer that is `length` bytes at `address`: a remembered one, or a new registration."""
        self.forget_what_went()
        slot = self.slots.pop((address, length), None)
        if slot is None:
            slot = self.free_slot()
            self.register(slot, address, length)
            self.registrations += 1
        else:
            self.hits += 1
        self.slots[address, length] = slot
        return slot

    def forget_what_went(self) -> int:
        """Forget the registrations whose memory went away; return how many. By hand nobody knows: none."""
        return 0

    def register(self, slot: int, address: int, length: int) -> None:
        """Give the memory to the device."""
        self.ring.update(slot, address, length)

    def free_slot(self) -> int:
        """A slot without a registration; if none is left, that of the least recently used one."""
        if not self.free:
            self.forget(next(iter(self.slots.values())))
        return self.free.pop()

    def forget(self, slot: int) -> None:
        """Take the registration back from the device, which unpins its pages."""
        self.slots = {key: other for key, other in self.slots.items() if other != slot}
        self.ring.clear(slot)
        self.free.append(slot)


class NotifiedCache(ByHandCache):
    """The same, but told when memory goes away: a region's cookie is its slot."""

    def __init__(self, ring: Ring, device: Ummunotify) -> None:
        super().__init__(ring)
        self.device = device
        self.seen = device.generation

    def forget_what_went(self) -> int:
        """One comparison when nothing happened; otherwise forget what the events name."""
        if self.device.check(self.seen):
            return 0
        self.seen = self.device.generation  # before reading: what happens from here on moves it again
        gone = self.read_cookies()
        for slot in gone:
            self.forget(slot)
        return len(gone)

    def register(self, slot: int, address: int, length: int) -> None:
        """Watch first, register then, and look again: memory that went in between was watched already."""
        self.device.register_range(address, address + length, cookie=slot)
        super().register(slot, address, length)
        if self.forget_what_went() and slot in self.free:  # it was this one that went: once more
            self.free.remove(slot)
            self.register(slot, address, length)

    def forget(self, slot: int) -> None:
        """An event does not end the watch, and a registration that makes room was still watched."""
        self.device.unregister(slot)
        super().forget(slot)

    def read_cookies(self) -> set[int]:
        """The cookies of all events that are waiting; more than 128 take more than one read."""
        cookies: set[int] = set()
        while events := self.device.read(timeout=0):
            cookies.update(event.cookie for event in events if isinstance(event, Invalidation))
        return cookies
