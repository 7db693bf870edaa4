"""Memory that stays in RAM: mlock(2), counted, because the kernel's locks do not nest.

One munlock undoes any number of mlocks, so pages that several registrations share must be unlocked by the last of them.
The counts are the process's, as the locks are: all `Mlock` objects share them. They are kept as steps, [(address, how
many registrations cover the bytes from here to the next step)], two for a registration that shares nothing.

Overlap is ALLOWED because counting makes it cost nothing. MERGED would need the counts as well (what somebody holds
stays registered under the union), and REFUSED would forbid to hold two small buffers of the same page.

`deregister` runs in deallocators: in any thread, also in one that is inside `register`. So it never waits: it puts the
range in a queue, which whoever has the lock empties, before letting go of it or right after.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import mmap
import os
import resource
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from usermm.errors import ArgumentError, ArgumentTypeError, DeviceError, LimitError, UnavailableError
from usermm.registrars.base import Overlap, Traits
from usermm.uapi import procfs

_MLOCK_ONFAULT: Final = 1  # <linux/mman.h>; since 4.4
_PAGE: Final = mmap.PAGESIZE
_LAST_PAGE: Final = (1 << 64) - _PAGE  # mapped nowhere, so that ends and lengths fit into 64 bits

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
if hasattr(_libc, "mlock2"):
    _libc.mlock2.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]

Range = tuple[int, int]
"""Start and end (exclusive) in bytes."""


@dataclass(frozen=True, slots=True)
class LockedMemory:
    """The pages that are locked: `length` bytes at `address`, both multiples of the page size."""

    address: int
    length: int
    serial: int = field(repr=False)


class Mlock:
    """Locks memory into RAM, faulting it in; with `onfault=True` each page is locked when it is first touched.

    What the program locks itself (mlock, mlockall) is not counted: a deregistration unlocks that, too.
    """

    def __init__(self, *, onfault: bool = False) -> None:
        self.traits = Traits(overlap=Overlap.ALLOWED, granularity_bytes=4096, writes=False)
        self.onfault = onfault
        if onfault and not hasattr(_libc, "mlock2"):
            raise UnavailableError(errno.ENOSYS, "Mlock: this libc has no mlock2: do without onfault=True")

    def register(self, address: int, length: int) -> LockedMemory:
        """Locks the pages that [address, address + length) touches.

        Raises LimitError (ENOMEM, EPERM: RLIMIT_MEMLOCK; EAGAIN: no memory for the pages), DeviceError with EFAULT
        (not mapped) or EDEADLK (called by a signal handler or finalizer in the middle of another registration of this
        thread), ArgumentError, ArgumentTypeError. After any of them nothing more is locked than before.
        """
        start, end = _pages(address, length)
        return _locks().register(start, end, self.onfault)

    def deregister(self, handle: LockedMemory) -> None:
        """Unlocks those pages that no other registration covers, now or when a call under way in another thread ends.

        Memory that is gone is no error. In a forked child a handle of the parent does nothing: the child has no locks.
        Raises ArgumentError for a handle that is not registered (any more).
        """
        if not isinstance(handle, LockedMemory):
            raise ArgumentTypeError(f"Mlock.deregister: pass what register returned, not {type(handle).__name__}")
        _locks().deregister(handle)

    def __repr__(self) -> str:
        return f"<usermm.registrars.Mlock{', on fault' if self.onfault else ''}>"


class PageCounts:
    """How many registrations cover each byte. A change is one assignment: there is no half of it."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = [(-1, 0)]  # with one before all addresses, so that each has a neighbour

    def change(self, start: int, end: int, by: int) -> list[Range]:
        """Adds `by` to [start, end); returns the parts of it that are covered by nobody now."""
        steps = self.steps
        first, last = bisect.bisect_left(steps, (start, -1)), bisect.bisect_left(steps, (end, -1))
        before = steps[first - 1][1]
        inside = steps[first:last]
        if not inside or inside[0][0] != start:
            inside.insert(0, (start, before))
        changed = [(at, count + by) for at, count in inside]
        after = steps[last][1] if last < len(steps) and steps[last][0] == end else inside[-1][1]
        ends = [at for at, _ in changed[1:]] + [end]
        uncovered = [(at, until) for (at, count), until in zip(changed, ends, strict=True) if count == 0]
        new = [*changed, (end, after)]
        counts_before = [before, *(count for _, count in changed)]
        rest = last + 1 if last < len(steps) and steps[last][0] == end else last
        steps[first:rest] = [step for step, count in zip(new, counts_before, strict=True) if step[1] != count]
        return uncovered


class _Locks:
    """The locks of one process."""

    def __init__(self) -> None:
        self.first_serial = next(_serials)  # smaller ones are handles of the process that this one was forked from
        self.counts = PageCounts()
        self.live: dict[int, Range] = {}  # serial -> range
        self.given_up: deque[Range] = deque()
        # Reentrant, so that a thread never waits for itself; `busy` tells it that it is inside already.
        self.mutex = threading.RLock()
        self.busy = False

    def register(self, start: int, end: int, onfault: bool) -> LockedMemory:
        try:
            with self.mutex:
                if self.busy:
                    raise DeviceError(errno.EDEADLK, f"{_call(start, end)}: {_REENTERED}")
                self.busy = True
                try:
                    self.unlock_given_up()  # first, so that it does not count against the limit
                    self.lock(start, end, onfault)
                    handle = LockedMemory(start, end - start, next(_serials))
                    self.live[handle.serial] = start, end
                finally:
                    self.busy = False
        finally:
            self.settle()
        return handle

    def deregister(self, handle: LockedMemory) -> None:
        locked = self.live.pop(handle.serial, None)
        if locked:
            self.given_up.append(locked)
            self.settle()
        elif handle.serial > self.first_serial:
            raise ArgumentError(f"Mlock.deregister: {handle} is not registered (any more)")

    def settle(self) -> None:
        """Unlock what was given up, unless somebody has the mutex: whoever that is looks here after releasing it."""
        while self.given_up and self.mutex.acquire(blocking=False):
            try:
                if self.busy:
                    return
                self.busy = True
                try:
                    self.unlock_given_up()
                finally:
                    self.busy = False
            finally:
                self.mutex.release()

    def unlock_given_up(self) -> None:
        while self.given_up:
            self.uncover(*self.given_up.popleft())

    def uncover(self, start: int, end: int) -> None:
        for uncovered in self.counts.change(start, end, -1):
            _munlock(*uncovered)

    def lock(self, start: int, end: int, onfault: bool) -> None:
        """All of it, also what is counted: that count can be of memory that was unmapped, and this is other memory."""
        self.counts.change(start, end, +1)
        try:
            failed = _libc.mlock2(start, end - start, _MLOCK_ONFAULT) if onfault else _libc.mlock(start, end - start)
            if failed:
                raise _refused(ctypes.get_errno(), start, end)
        except BaseException:
            self.uncover(start, end)  # mlock keeps what it did before it met the error
            raise


_REENTERED: Final = "in the middle of another one of this thread (by a signal handler or a finalizer): call it later"

_serials = itertools.count(1)
_processes: dict[int, _Locks] = {}


def _locks() -> _Locks:
    """This process's; a forked child begins with none, as the kernel has it."""
    pid = os.getpid()
    return _processes.get(pid) or _processes.setdefault(pid, _Locks())


def _pages(address: int, length: int) -> Range:
    """The pages that [address, address + length) touches."""
    for name, value in (("address", address), ("length", length)):
        if not isinstance(value, int):
            raise ArgumentTypeError(f"Mlock.register: {name} must be an integer, not {type(value).__name__}")
    if address < 0 or length < 1 or address + length > _LAST_PAGE:
        raise ArgumentError(f"Mlock.register: {length} bytes at {address:#x} are no memory: pass a buffer's range")
    return address // _PAGE * _PAGE, -(-(address + length) // _PAGE) * _PAGE


def _call(start: int, end: int) -> str:
    return f"Mlock.register of {end - start} bytes at {start:#x}"


def _munlock(start: int, end: int) -> None:
    """munlock(2) stops at the first hole, so when part of the memory is gone each mapping is unlocked by itself."""
    if _libc.munlock(start, end - start) == 0:
        return
    for mapping in _mappings(start, end) or ():
        first, last = max(start, mapping.start), min(end, mapping.end)
        _libc.munlock(first, last - first)


def _mappings(start: int, end: int) -> list[procfs.Mapping] | None:
    """What is mapped there; None when that cannot be asked, because no descriptor is left."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape", newline="\n") as maps:
            return procfs.overlapping(maps, start, end)
    except OSError:
        return None


def _refused(number: int, start: int, end: int) -> DeviceError:
    """mlock(2) says ENOMEM for three things; only the limit is helped by unlocking something."""
    call = f"{_call(start, end)}: {os.strerror(number)}"
    mapped = _mappings(start, end)
    if mapped is not None and _bytes_within(mapped, start, end) < end - start:
        return DeviceError(errno.EFAULT, f"{call}; part of it is not mapped: pass memory of this process")
    if any(mapping.permissions.startswith("--") for mapping in mapped or ()):
        return DeviceError(errno.EFAULT, f"{call}; part of it is PROT_NONE: make it readable, or leave that part out")
    if number == errno.EAGAIN:
        return LimitError(number, f"{call}; no memory was left for the pages: free some")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    allowed = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
    cure = "lock less, or raise it (ulimit -l; in a service LimitMEMLOCK=; CAP_IPC_LOCK is above it)"
    kind = LimitError if number in (errno.ENOMEM, errno.EPERM) else DeviceError
    return kind(number, f"{call}; RLIMIT_MEMLOCK is {allowed}: {cure}")


def _bytes_within(mappings: list[procfs.Mapping], start: int, end: int) -> int:
    return sum(min(end, mapping.end) - max(start, mapping.start) for mapping in mappings)
