"""`AddressSpace`: what a process does with its memory, without doing it, and what a monitor hears of it.

Addresses and lengths are in bytes, pages have 4096. There is no content: nothing can be read or written through a model
address. Calls take the system calls' arguments and fail with their errno (`usermm.errors.DeviceError` and subclasses).
A call that fails reports nothing and changes nothing, except madvise, which goes on until it cannot.
"""

from __future__ import annotations

import errno
import mmap as _mmap

from usermm.errors import from_errno
from usermm.testing.mappings import PAGE_BYTES, Mapping, Mappings, page_ceiling, page_floor
from usermm.testing.notifications import Cause, Flavour, Listener, Notification

MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4

MADV_DONTNEED = 4
MADV_FREE = 8
MADV_REMOVE = 9
MADV_DONTNEED_LOCKED = 24

_DISCARDING = {MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTNEED_LOCKED}
_HEAP_START = 0x5555_0000_0000
_MMAP_START = 0x7F00_0000_0000
_ADDRESS_LIMIT = 0x7FFF_FFFF_F000


class AddressSpace:
    """One process's memory. Listeners are called before the operation returns, in the order of the kernel's reports.

    Free addresses are handed out lowest first, so an address that was unmapped comes back at once: the case that
    breaks a registration cache.
    """

    def __init__(self, flavour: Flavour = Flavour.USERFAULTFD) -> None:
        self.flavour = flavour
        self._mappings = Mappings()
        self._listeners: list[Listener] = []
        self._break = _HEAP_START

    # Who listens, and to what

    def subscribe(self, listener: Listener) -> None:
        """Calls `listener` with every `Notification` from now on."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    def watch(self, start: int, end: int) -> None:
        """Watches what is mapped in [start, end) now, in whole pages. An MMU notifier watches everything anyway."""
        if self.flavour is Flavour.MMU_NOTIFIER:
            return
        low, high = page_floor(start), page_ceiling(end)
        if any(not mapping.watched for mapping in self._mappings.crossing(low, high)):
            for mapping in self._mappings.cut_out(low, high):
                mapping.watched = True

    def is_mapped(self, start: int, end: int) -> bool:
        """True if every byte of [start, end) is mapped."""
        return self._mappings.covers(start, end)

    def mappings(self) -> tuple[Mapping, ...]:
        """The mappings, ascending. Neighbours are never merged; a kernel may merge them."""
        return tuple(self._mappings)

    # The system calls

    def mmap(
        self,
        length: int,
        *,
        address: int = 0,
        fixed: bool = False,
        noreplace: bool = False,
        shared: bool = False,
        prot: int = _mmap.PROT_READ | _mmap.PROT_WRITE,
    ) -> int:
        """mmap(2) of anonymous memory; `fixed` is MAP_FIXED, with `noreplace` MAP_FIXED_NOREPLACE.

        EINVAL: length 0, or a fixed address that is not a page's. EEXIST: noreplace, and something is there.
        """
        size = page_ceiling(length)
        if length <= 0 or ((fixed or noreplace) and address % PAGE_BYTES):
            raise from_errno(errno.EINVAL, f"mmap: length {length} at {address:#x} is not a range of pages")
        start = address if fixed or noreplace else self._free_address(page_floor(address), size)
        if noreplace and not self._mappings.is_free(start, start + size):
            raise from_errno(errno.EEXIST, f"mmap: something is mapped in [{start:#x}, {start + size:#x}) already")
        self._replace(start, start + size)
        self._mappings.add(Mapping(start, start + size, shared, prot))
        return start

    def munmap(self, address: int, length: int) -> None:
        """munmap(2): one notification for the whole call, with the call's own range. EINVAL: see mmap."""
        if length <= 0 or address % PAGE_BYTES:
            raise from_errno(errno.EINVAL, f"munmap: length {length} at {address:#x} is not a range of pages")
        self._replace(address, page_ceiling(address + length))

    def mremap(self, old: int, old_length: int, new_length: int, flags: int = 0, new: int = 0) -> int:
        """mremap(2) with MREMAP_MAYMOVE, MREMAP_FIXED and MREMAP_DONTUNMAP; returns the address.

        EINVAL: flags that do not go together, lengths of 0 (copying a shared mapping is not modelled), addresses that
        are not a page's, an overlap. EFAULT: the old range is not inside one mapping. ENOMEM: it must move and may not.
        """
        old_length, new_length = page_ceiling(old_length), page_ceiling(new_length)
        self._check_mremap(old, old_length, new_length, flags, new)
        source = self._mappings.at(old)
        if source is None or old + old_length > source.end:
            raise from_errno(errno.EFAULT, f"mremap: [{old:#x}, {old + old_length:#x}) is not inside one mapping")
        if flags & (MREMAP_FIXED | MREMAP_DONTUNMAP):
            target = new if flags & MREMAP_FIXED else self._free_address(page_floor(new), new_length)
            return self._move(old, old_length, new_length, target, keep=bool(flags & MREMAP_DONTUNMAP))
        if new_length <= old_length:
            self._replace(old + new_length, old + old_length)
            return old
        if source.end == old + old_length and self._mappings.is_free(source.end, old + new_length):
            source.end = old + new_length
            return old
        if not flags & MREMAP_MAYMOVE:
            raise from_errno(errno.ENOMEM, f"mremap: no room to grow at {old:#x} and no MREMAP_MAYMOVE")
        return self._move(old, old_length, new_length, self._free_address(0, new_length), keep=False)

    def madvise(self, address: int, length: int, advice: int) -> None:
        """madvise(2). DONTNEED, DONTNEED_LOCKED, FREE and REMOVE report once for each mapping; any other advice never.

        EINVAL: the address is not a page's, FREE of a shared mapping, REMOVE of a private one. ENOMEM: a hole, told
        after the rest has been done.
        """
        start, end = address, page_ceiling(address + length)
        if address % PAGE_BYTES or length < 0:
            raise from_errno(errno.EINVAL, f"madvise: length {length} at {address:#x} is not a range of pages")
        for mapping in self._mappings.crossing(start, end) if advice in _DISCARDING else ():
            fits = mapping.shared if advice == MADV_REMOVE else not mapping.shared or advice != MADV_FREE
            # The kernel tells userfaultfd of a FREE before it finds that the mapping is shared (seen on Linux 6.18).
            if fits or (advice == MADV_FREE and self.flavour is Flavour.USERFAULTFD):
                self._report_if([mapping], max(start, mapping.start), min(end, mapping.end), Cause.DISCARD)
            if not fits:
                raise from_errno(errno.EINVAL, f"madvise: {advice} does not fit the mapping at {mapping.start:#x}")
        if not self._mappings.covers(start, end):
            raise from_errno(errno.ENOMEM, f"madvise: [{start:#x}, {end:#x}) has a hole")

    def mprotect(self, address: int, length: int, prot: int) -> None:
        """mprotect(2): an MMU notifier reports it, though it invalidates nothing; userfaultfd does not."""
        end = page_ceiling(address + length)
        if address % PAGE_BYTES:
            raise from_errno(errno.EINVAL, f"mprotect: {address:#x} is not a page's address")
        if not self._mappings.covers(address, end):
            raise from_errno(errno.ENOMEM, f"mprotect: [{address:#x}, {end:#x}) has a hole")
        for mapping in self._mappings.cut_out(address, end):
            if mapping.prot != prot:
                mapping.prot = prot
                self._report_to_mmu_notifier(mapping, Cause.PROTECT)

    def brk(self, address: int = 0) -> int:
        """brk(2) as the kernel has it: moves the end of the heap if it can, and returns where it is now."""
        if not _HEAP_START <= address < _MMAP_START:
            return self._break
        old_end, new_end = page_ceiling(self._break), page_ceiling(address)
        if new_end > old_end:
            if not self._mappings.is_free(old_end, new_end):
                return self._break
            self._mappings.add(Mapping(old_end, new_end))
        self._break = address
        self._replace(new_end, old_end)
        return self._break

    def fork(self) -> AddressSpace:
        """fork(2): the child's space. Nobody listens to it and nothing in it is watched.

        An MMU notifier of the parent reports each private mapping (its pages become copy-on-write).
        """
        child = AddressSpace(self.flavour)
        child._break = self._break
        for mapping in self._mappings:
            child._mappings.add(Mapping(mapping.start, mapping.end, mapping.shared, mapping.prot))
        for mapping in self.mappings():
            if not mapping.shared:
                self._report_to_mmu_notifier(mapping, Cause.FORK)
        return child

    # How they do it

    def _check_mremap(self, old: int, old_length: int, new_length: int, flags: int, new: int) -> None:
        fixed, moves = flags & MREMAP_FIXED, flags & MREMAP_MAYMOVE
        overlap = fixed and new < old + old_length and old < new + new_length
        bad_flags = (flags & ~7) or (fixed and not moves) or (flags & MREMAP_DONTUNMAP and not moves)
        bad_size = old_length <= 0 or new_length <= 0 or (flags & MREMAP_DONTUNMAP and old_length != new_length)
        if bad_flags or bad_size or overlap or old % PAGE_BYTES or (fixed and new % PAGE_BYTES):
            raise from_errno(errno.EINVAL, f"mremap: {old:#x} {old_length} {new_length} {flags} {new:#x} do not fit")

    def _move(self, old: int, old_length: int, new_length: int, target: int, *, keep: bool) -> int:
        """Reports: what the target covered, the move, a tail that was cut off, the old place."""
        moved_length = min(old_length, new_length)
        self._replace(target, target + new_length)
        tail = self._take(old + moved_length, old + old_length)
        source = self._mappings.cut_out(old, old + moved_length)
        first = source[0]
        self._mappings.add(Mapping(target, target + new_length, first.shared, first.prot, first.watched))
        move = Notification(old, old + moved_length, Cause.REMAP)
        unmap = Notification(old, old + moved_length, Cause.UNMAP)
        old_place = [] if keep else [unmap]
        if not keep:
            self._mappings.remove(old, old + moved_length)
        if self._is_heard(source):
            # userfaultfd tells of the move first, and of all unmapping at the end.
            told = [move, *tail] if self.flavour is Flavour.USERFAULTFD else [*tail, move]
            self._report(*told, *old_place)
        return target

    def _take(self, start: int, end: int) -> list[Notification]:
        """Unmaps [start, end) and says what there is to report: one notification if a mapping was heard."""
        if start >= end:
            return []
        crossed = self._mappings.crossing(start, end)
        self._mappings.remove(start, end)
        return [Notification(start, end, Cause.UNMAP)] if self._is_heard(crossed) else []

    def _replace(self, start: int, end: int) -> None:
        self._report(*self._take(start, end))

    def _is_heard(self, crossed: list[Mapping]) -> bool:
        return any(self.flavour is Flavour.MMU_NOTIFIER or mapping.watched for mapping in crossed)

    def _report_if(self, crossed: list[Mapping], start: int, end: int, cause: Cause) -> None:
        if self._is_heard(crossed):
            self._report(Notification(start, end, cause))

    def _report_to_mmu_notifier(self, mapping: Mapping, cause: Cause) -> None:
        if self.flavour is Flavour.MMU_NOTIFIER:
            self._report(Notification(mapping.start, mapping.end, cause))

    def _report(self, *notifications: Notification) -> None:
        for notification in notifications:
            for listener in tuple(self._listeners):
                listener(notification)

    def _free_address(self, wanted: int, size: int) -> int:
        if wanted and self._mappings.is_free(wanted, wanted + size):
            return wanted
        start = _MMAP_START
        for mapping in self._mappings.crossing(_MMAP_START, _ADDRESS_LIMIT):
            if start + size <= mapping.start:
                break
            start = mapping.end
        return start
