"""Two registration caches that answer the same question: which fixed buffer of the ring is this memory?

Registering a buffer with a device is slow, so programs keep the registration and look it up by address. The
key says nothing about *which memory* is at that address: once it was unmapped and mapped again, the look-up
finds a registration of pages that nobody can see any more. `ByHandCache` is such a program; `ExactCache` is
`usermm.RegistrationCache` in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from usermm import RegistrationCache
from usermm.demonstration.workbench import Buffer
from usermm.registrars import IoUring
from usermm.uring import Ring


class Cache(Protocol):
    """What both halves of the demo ask."""

    ring: Ring

    @property
    def hits(self) -> int: ...

    @property
    def registrations(self) -> int:
        """How many were made."""
        ...

    @property
    def forgotten(self) -> int:
        """How many were given up because their memory went."""
        ...

    def held(self, buffer: Buffer) -> AbstractContextManager[int]:
        """The slot of the ring that is this buffer, for the length of a with block."""
        ...


class ByHandCache:
    """``{(address, length): slot}`` over the fixed buffers of a ring; the least recently used makes room."""

    forgotten = 0  # nobody tells it

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.hits = 0
        self.registrations = 0
        self.slots: dict[tuple[int, int], int] = {}  # in the order of use, the latest last
        self.free = list(reversed(range(ring.slots)))

    @contextlib.contextmanager
    def held(self, buffer: Buffer) -> Iterator[int]:
        """As by `slot_for`. Nothing keeps the slot from being given to another buffer meanwhile."""
        yield self.slot_for(buffer.address, buffer.length)

    def slot_for(self, address: int, length: int) -> int:
        """The fixed buffer that is `length` bytes at `address`: a remembered one, or a new registration."""
        slot = self.slots.pop((address, length), None)
        if slot is None:
            slot = self.free_slot()
            self.ring.update(slot, address, length)
            self.registrations += 1
        else:
            self.hits += 1
        self.slots[address, length] = slot
        return slot

    def free_slot(self) -> int:
        """A slot without a registration; if none is left, that of the least recently used one."""
        if not self.free:
            slot = self.slots.pop(next(iter(self.slots)))
            self.ring.clear(slot)
            self.free.append(slot)
        return self.free.pop()


class ExactCache:
    """`usermm.RegistrationCache` over the same ring; when no slot is left, the least recently used makes room."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.cache = RegistrationCache(IoUring(ring))

    @contextlib.contextmanager
    def held(self, buffer: Buffer) -> Iterator[int]:
        """The look-up finds out by itself what went. The slot stays this buffer's until the block ends."""
        with self.cache.get(buffer.memory) as registration:
            yield registration.handle.slot

    @property
    def hits(self) -> int:
        """As the cache counts them."""
        return self.cache.stats().hits

    @property
    def registrations(self) -> int:
        """What the ring was asked for with success."""
        return self.cache.stats().registered

    @property
    def forgotten(self) -> int:
        """By whatever cause; here it is always munmap."""
        return self.cache.stats().invalidations

    def close(self) -> None:
        """Gives everything back to the ring, which has to be open still."""
        self.cache.close()
