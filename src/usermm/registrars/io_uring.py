"""Fixed buffers of an io_uring: the pages are pinned once, and requests name a slot of the ring's table.

A slot is used again only when the kernel has said that nothing uses what it held: each registration carries a tag,
which comes back as the user_data of a completion when the last request on the old buffer is done. Until then the old
pages are pinned, although the slot is empty. `usermm.uring.Ring` collects tags by itself; the completion loop of any
other ring hands them to `IoUring.completed`.

There is no lock, because `deregister` runs in deallocators: in any thread, also in one that is inside `register`. Each
step of the accounts is one operation on a dict or deque, which nothing can interrupt, and the kernel locks its table.
"""

from __future__ import annotations

import errno
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from usermm._uring_calls import (
    HasFileno,
    HasRingFd,
    RingDescriptor,
    checked,
    flush_overflow,
    register_sparse_table,
    require,
    table_slots,
    update_buffer,
)
from usermm.errors import ArgumentError, ArgumentTypeError, DeviceError, LimitError, WouldBlockError
from usermm.registrars.base import Overlap, Traits
from usermm.uapi import io_uring as abi

SLOTS: Final = 1024
"""In a table that the registrar makes, unless it is told. A slot costs 8 bytes of kernel memory."""

# A tag is this mark in bits 56 to 62, the registrar's number in 44 to 55, a serial number below. Pointers, small
# integers and liburing's own ~0 are no tags, and bit 63 is free for `usermm.uring.Ring`.
_MARK: Final = 0x5A << 56
_NUMBER_BIT: Final = 44
_NUMBERS: Final = 1 << 12

_U64: Final = (1 << 64) - 1

# What emptying a slot answers when ring or table are gone: then so is the registration.
_GONE: Final = (errno.EBADF, errno.ENXIO, errno.EOPNOTSUPP, errno.EINVAL)


class SqeFields(NamedTuple):
    """What a READ_FIXED or WRITE_FIXED entry says of its buffer, in the words of struct io_uring_sqe."""

    buf_index: int
    addr: int
    len: int


@dataclass(frozen=True, slots=True)
class FixedBuffer:
    """`length` bytes at `address` that are in `slot` of the ring's table."""

    slot: int
    address: int
    length: int
    tag: int = field(repr=False)
    """The user_data of the completion by which the kernel says that it has let go of the pages."""

    def part(self, address: int | None = None, length: int | None = None) -> SqeFields:
        """The fields for `length` bytes from `address` on: from the start, or to the end, where nothing is said.

        Raises ArgumentError when that is not inside the buffer.
        """
        end = self.address + self.length
        start = self.address if address is None else address
        require("address", start, self.address, end)
        size = end - start if length is None else length
        require("length", size, 0, end - start)
        return SqeFields(self.slot, start, size)


class IoUring:
    """Registers memory in the fixed-buffer table of `ring`: a descriptor, or an object with `fileno()` or `ring_fd`.

    `slots` is how many entries to register as a table (1 to 16 384; default 1024), or the `range` of slots that are
    the registrar's in a table that is there already. With `usermm.uring.Ring`, which makes a table of its own, a
    number means its first slots, and nothing means all of them.

    With `wait_for_release=False` a slot is used again at once. The kernel never lets requests that are under way see
    the new buffer; what is lost is the count of pinned bytes, since the old ones may be pinned a little longer.

    `any_thread=False` is for rings with IORING_SETUP_SINGLE_ISSUER: both calls belong to the ring's thread then.

    Raises ArgumentError (no ring, slots that the table has not, a table whose free slots only you can name),
    ArgumentTypeError, ClosedError, UnavailableError (EPERM: seccomp), DeviceError with EINVAL (before Linux 5.19).
    """

    def __init__(
        self,
        ring: int | HasFileno | HasRingFd,
        slots: int | range | None = None,
        *,
        wait_for_release: bool = True,
        any_thread: bool = True,
    ) -> None:
        longest = abi.FIXED_BUFFER_MAX_BYTES
        self.traits = Traits(overlap=Overlap.ALLOWED, max_length_bytes=longest, any_thread=any_thread)
        self._ring = RingDescriptor(ring)
        self._released = getattr(ring, "released", None)
        self._waits = wait_for_release
        self.slots = _slots_of(self._ring.number(), slots, getattr(ring, "slots", None))
        _refuse_shared(self._ring, self.slots)
        # First in, first out: whoever keeps a handle too long finds an empty slot (EFAULT), not another's memory.
        self._free = deque(self.slots)
        self._live: dict[int, int] = {}  # tag -> slot
        self._waiting: dict[int, int | None] = {}  # the same, until the kernel posts the tag; None: the slot is free
        self._postponed: deque[tuple[int, int]] = deque()  # (tag, slot) that could not be emptied
        self.unclaimed: deque[int] = deque()
        """Tags from `Ring.released` that no registrar knows: those of your own `Ring.update`. Take them from here."""
        self._tags = _new_tags(self)

    def register(self, address: int, length: int) -> FixedBuffer:
        """Pins the pages of [address, address + length) and puts them in a slot.

        With `usermm.uring.Ring` this takes completions from the ring, so it belongs where the ring is used: in its
        thread, or under its lock.

        Raises LimitError (ENOSPC: every slot is taken; ENOMEM: RLIMIT_MEMLOCK, which all rings of a user share): then
        deregistering helps; WouldBlockError: slots wait for tags that only your loop can hand to `completed`;
        DeviceError with EFAULT (not mapped, not writable, or a shared mapping of a file) or EEXIST (a ring of another
        thread); ClosedError, ForkedError, ArgumentError, ArgumentTypeError.
        """
        require("address", address, 1, _U64)
        require("length", length, 1, min(abi.FIXED_BUFFER_MAX_BYTES, _U64 - address + 1))
        fd = self._ring.number()
        self._empty_postponed(fd)
        slot = self._free_slot(fd)
        tag = next(self._tags)
        try:
            result = update_buffer(fd, slot, address, length, tag if self._waits else 0)
            checked(f"IoUring.register of {length} bytes at {address:#x} (slot {slot})", result)
            buffer = FixedBuffer(slot, address, length, tag)
            self._live[tag] = slot
        except DeviceError:
            self._free.appendleft(slot)
            raise
        except BaseException:  # Ctrl-C: the kernel may have it or not, but no request can be using it
            self._live.pop(tag, None)
            if self._waits:
                self._waiting[tag] = None
            update_buffer(fd, slot, 0, 0, 0)
            self._free.appendleft(slot)
            raise
        return buffer

    def deregister(self, handle: FixedBuffer) -> None:
        """Empties the slot. The pages are unpinned now, or when the last request that uses them is done.

        Does nothing when the ring is closed, or in a forked child. Raises ArgumentError for a handle that is not
        registered (any more).
        """
        if not isinstance(handle, FixedBuffer):
            raise ArgumentTypeError(f"IoUring.deregister: pass what register returned, not {type(handle).__name__}")
        slot = self._live.pop(handle.tag, None)
        if slot is None:
            raise ArgumentError(f"IoUring.deregister: {handle} is not registered with this registrar (any more)")
        try:
            self._empty(self._ring.number(), handle.tag, slot)
        except DeviceError:
            return  # it is closed, which unpinned everything, or the parent's

    def completed(self, user_data: int) -> bool:
        """Call it with the user_data of every completion that is not yours: True if it was a registrar's tag."""
        if not isinstance(user_data, int):
            raise ArgumentTypeError(f"IoUring.completed: user_data is an integer, not {type(user_data).__name__}")
        number = (user_data ^ _MARK) >> _NUMBER_BIT
        registrar = _registrars.get(number) if 0 <= number < _NUMBERS else None
        return registrar is not None and registrar._take(user_data)

    @property
    def waiting(self) -> int:
        """How many slots are empty but wait for their tag: requests may still use what they held."""
        return sum(slot is not None for slot in list(self._waiting.values()))

    def __repr__(self) -> str:
        state = f"{len(self._live)} of {len(self.slots)} slots registered, {self.waiting} waiting"
        return f"<usermm.registrars.IoUring of {self._ring}: {state}>"

    def _take(self, tag: int) -> bool:
        if self._ring.is_parents():
            return False
        try:
            slot = self._waiting.pop(tag)
        except KeyError:
            return False
        if slot is not None:
            self._free.append(slot)
        return True

    def _free_slot(self, fd: int) -> int:
        if self._waiting:
            self._collect()
        while True:
            try:
                return self._free.popleft()
            except IndexError:
                # A burst of tags does not fit into the queue; the kernel keeps the rest until it is entered.
                if not self._waiting or flush_overflow(fd) < 0 or not self._collect():
                    break
        what = f"IoUring.register: none of {len(self.slots)} slots is free, {self.waiting} wait for their tag"
        if self._waits and not self._released and self._waiting:
            # Not a LimitError: the next slot comes from the user's loop, however many registrations a cache gives up.
            raise WouldBlockError(errno.EAGAIN, f"{what}: hand your loop's completions to completed(), then try again")
        raise LimitError(errno.ENOSPC, f"{what}: deregister some, or make a larger table (at most 16384 slots)")

    def _collect(self) -> bool:
        """Take the ring's tags; whether there were any."""
        tags = list(self._released()) if self._released else []
        for tag in tags:
            if not self.completed(tag):
                self.unclaimed.append(tag)
        return bool(tags)

    def _empty(self, fd: int, tag: int, slot: int) -> None:
        if self._waits:
            self._waiting[tag] = slot  # before the call: another thread may be handed the tag before it returns
        result = update_buffer(fd, slot, 0, 0, 0)
        if result >= 0 and not self._waits:
            self._free.append(slot)
        elif result < 0:
            self._waiting.pop(tag, None)
            if -result not in _GONE:  # the wrong thread for this ring, or (before 6.13) no memory: the next register
                self._postponed.append((tag, slot))

    def _empty_postponed(self, fd: int) -> None:
        for _ in range(len(self._postponed)):
            try:
                tag, slot = self._postponed.popleft()
            except IndexError:
                return
            self._empty(fd, tag, slot)


def _slots_of(fd: int, wanted: int | range | None, rings_own: int | None) -> range:
    """The slots to use; a table is registered where there is none."""
    if update_buffer(fd, 0, 0, 1, 0) == -errno.EOPNOTSUPP:  # it changes nothing in any case
        raise ArgumentError(f"IoUring: descriptor {fd} is not an io_uring: pass that of a ring")
    if isinstance(wanted, range):
        return _existing_slots(fd, wanted)
    number = SLOTS if wanted is None else wanted
    require("slots", number, 1, abi.IORING_MAX_REG_BUFFERS)
    result = register_sparse_table(fd, number)
    if result == -errno.EBUSY:
        if rings_own is None:
            cure = "say which slots are free for this, slots=range(first, end)"
            raise ArgumentError(f"IoUring: the ring (descriptor {fd}) has a table already: {cure}")
        return _existing_slots(fd, range(rings_own if wanted is None else number))
    checked(f"IoUring: register a table of {number} fixed buffers", result)
    return range(number)


def _existing_slots(fd: int, wanted: range) -> range:
    there = table_slots(fd)
    if not wanted or wanted[0] < 0 or wanted.step < 0 or wanted[-1] >= there:
        raise ArgumentError(f"IoUring: slots is {wanted}, but the table has slots 0 to {there - 1}: name some of these")
    return wanted


def _refuse_shared(ring: RingDescriptor, slots: range) -> None:
    """Two registrars would put their buffers into each other's slots."""
    for other in [reference() for reference in _registrars.valuerefs()]:
        if other and other._ring.is_same(ring) and not set(slots).isdisjoint(other.slots):
            raise ArgumentError(f"IoUring: some of {slots} are another registrar's ({other}): use it, or other slots")


_registrars: WeakValueDictionary[int, IoUring] = WeakValueDictionary()
_numbers = itertools.cycle(range(_NUMBERS))


def _new_tags(registrar: IoUring) -> itertools.count[int]:
    """Tags that are unique in this process: a number of its own for the registrar, and a serial number."""
    if len(_registrars) == _NUMBERS:
        raise LimitError(errno.ENOSPC, f"IoUring: this process has {_NUMBERS} registrars: make fewer")
    number = next(number for number in _numbers if number not in _registrars)
    _registrars[number] = registrar
    return itertools.count(_MARK | number << _NUMBER_BIT)
