"""`ModelGntdev2007`: the first gntdev of a model domain, as its contract says (`seed2007`)."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

from usermm.errors import DeviceError, from_errno, grant_refused
from usermm.testing.grant_layouts import Argument, copy_in, is_shared, is_writable, pages_of, unknown
from usermm.testing.grant_machine import BadGrantError, ModelDomain
from usermm.testing.grant_memory import ModelMapping
from usermm.uapi import xen_gntdev as uapi
from usermm.uapi.xen_gntdev import PAGE_BYTES, SLOTS_2007

MOST_FILES = 128
"""That one domain has open at once."""


class State(enum.Enum):
    """INVALID -MAP_GRANT_REF-> NOT_YET_MAPPED -mmap-> MAPPED -munmap-> NOT_YET_MAPPED -UNMAP_GRANT_REF-> INVALID."""

    INVALID = "invalid"
    NOT_YET_MAPPED = "not yet mapped"
    MAPPED = "mapped"


@dataclass
class Slot:
    """One of the 128 of a file; `grant` (domid, reference) means something unless it is INVALID."""

    state: State = State.INVALID
    grant: tuple[int, int] = (0, 0)


class ModelGntdev2007:
    """One open file. The offset of slot k is k * 4096."""

    def __init__(self, domain: ModelDomain) -> None:
        if sum(isinstance(file, ModelGntdev2007) for file in domain.files) >= MOST_FILES:
            raise from_errno(errno.EMFILE, f"open(gntdev): {MOST_FILES} files are open: close one")
        self.closed = False
        self.slots = [Slot() for _ in range(SLOTS_2007)]
        self._free = list(reversed(range(SLOTS_2007)))
        """Last in, first out; slot 0 first."""
        self._next_fit: int = 0
        self._domain = domain
        self._mapped: dict[int, tuple[int, int]] = {}
        """Address of a mapping -> first slot, count."""
        domain.files.append(self)

    def ioctl(self, request: int, argument: Argument) -> int:
        """DeviceError: EBADF, EFAULT for a short argument, ENOTTY, and those of the calls below."""
        self._check_open()
        if request == uapi.MAP_GRANT_REF:
            count, pointer, _ = copy_in(argument, uapi.MAP_2007)
            index = self._map_grant_ref(count, pointer)
            uapi.MAP_2007.pack_into(argument, 0, count, pointer, index)
        elif request == uapi.UNMAP_GRANT_REF:
            self._unmap_grant_ref(*copy_in(argument, uapi.UNMAP_2007))
        elif request == uapi.GET_OFFSET_FOR_VADDR:
            address = copy_in(argument, uapi.OFFSET_2007)[0]
            uapi.OFFSET_2007.pack_into(argument, 0, address, *self._offset_of(address))
        else:
            raise unknown("gntdev of 2007", request)
        return 0

    def _map_grant_ref(self, count: int, pointer: int) -> int:
        """Takes one free slot, or a range of them. EINVAL: none asked for. ENOMEM: no room. EFAULT: bad pointer."""
        if count == 0:
            raise grant_refused(errno.EINVAL, "MAP_GRANT_REF(0): at least one")
        if count > SLOTS_2007:
            raise grant_refused(errno.ENOMEM, f"MAP_GRANT_REF({count}): a file has {SLOTS_2007} slots")
        records = self._domain.memory.read(pointer, count * uapi.REFERENCE.size)
        grants: list[tuple[int, int]] = list(uapi.REFERENCE.iter_unpack(records))
        first = self._find_room(count)
        for slot, grant in enumerate(grants, first):
            self._free.remove(slot)
            self.slots[slot] = Slot(State.NOT_YET_MAPPED, grant)
        if count > 1:
            self._next_fit = (first + count) % SLOTS_2007
        return first * PAGE_BYTES

    def _find_room(self, count: int) -> int:
        """A single grant: the slot freed last. More: the next range that fits, from where the last one ended."""
        if count == 1 and self._free:
            return self._free[-1]
        starts: list[int] = [*range(self._next_fit, SLOTS_2007), *range(self._next_fit)] if count > 1 else []
        for start in starts:
            run = self.slots[start : start + count]
            if len(run) == count and all(slot.state is State.INVALID for slot in run):
                return start
        raise grant_refused(errno.ENOMEM, f"MAP_GRANT_REF({count}): no room: unmap and free some")

    def _unmap_grant_ref(self, index: int, count: int) -> None:
        """Frees slots, over allocations if need be: all or none. The first offender decides on the errno.

        EBUSY: it is MAPPED. EINVAL: it is INVALID or no slot.
        """
        if not count:
            return
        first, rest = divmod(index, PAGE_BYTES)
        for slot in range(first, first + count):
            state = self.slots[slot].state if 0 <= slot < SLOTS_2007 and not rest else State.INVALID
            if state is State.MAPPED:
                raise grant_refused(errno.EBUSY, f"UNMAP_GRANT_REF: slot {slot} is mapped: munmap it first")
            if state is State.INVALID:
                raise grant_refused(errno.EINVAL, f"UNMAP_GRANT_REF: slot {slot} has no grant")
        for slot in range(first, first + count):
            self.slots[slot] = Slot()
            self._free.append(slot)

    def mmap(self, length: int, prot: int, flags: int, offset: int) -> ModelMapping:
        """Maps slots that are NOT_YET_MAPPED, part of an allocation or several. All or none.

        ENXIO: beyond the slots. EINVAL: a slot's state, a writable private mapping, an offset that is no page's.
        ENOMEM: a grant cannot be mapped.
        """
        self._check_open()
        writable = is_writable(prot)
        if not is_shared(flags, "mmap") and writable:
            raise grant_refused(errno.EINVAL, "mmap(gntdev): a writable mapping needs MAP_SHARED")
        first, rest = divmod(offset, PAGE_BYTES)
        count = pages_of(length)
        if rest:
            raise grant_refused(errno.EINVAL, f"mmap(gntdev): offset {offset:#x} is not a page's")
        if count <= 0 or first < 0 or first + count > SLOTS_2007:
            raise grant_refused(errno.ENXIO, f"mmap(gntdev): {count} pages at slot {first}: the file has {SLOTS_2007}")
        covered = self.slots[first : first + count]
        if any(slot.state is not State.NOT_YET_MAPPED for slot in covered):
            raise grant_refused(errno.EINVAL, f"mmap(gntdev): not all of {count} slots from {first} wait to be mapped")
        return self._map(first, covered, writable)

    def _map(self, first: int, covered: list[Slot], writable: bool) -> ModelMapping:
        def unmapped() -> None:
            del self._mapped[mapping.address]
            for slot in covered:
                slot.state = State.NOT_YET_MAPPED

        grants = [slot.grant for slot in covered]
        try:
            mapping = self._domain.machine.map(self._domain, grants, writable=writable, on_unmap=unmapped)
        except BadGrantError as error:
            raise _not_mappable(first + error.index, error) from error
        for slot in covered:
            slot.state = State.MAPPED
        self._mapped[mapping.address] = first, len(covered)
        return mapping

    def munmap(self, mapping: ModelMapping) -> None:
        """Also after the file was closed."""
        self._domain.memory.unmap(mapping)

    def _offset_of(self, address: int) -> tuple[int, int]:
        """Offset and page count of the mapping that starts at `address`. EFAULT: nothing is mapped. EINVAL: else."""
        mapping = self._domain.memory.at(address)
        if mapping is None:
            raise from_errno(errno.EFAULT, f"GET_OFFSET_FOR_VADDR({address:#x}): nothing is mapped there")
        if address not in self._mapped:
            raise grant_refused(errno.EINVAL, f"GET_OFFSET_FOR_VADDR({address:#x}): no mapping of this file begins")
        first, count = self._mapped[address]
        return first * PAGE_BYTES, count

    def close(self) -> None:
        """What is mapped stays mapped."""
        if not self.closed:
            self.closed = True
            self._domain.files.remove(self)

    def _check_open(self) -> None:
        if self.closed:
            raise from_errno(errno.EBADF, "gntdev: the file is closed: open another")


def _not_mappable(slot: int, error: BadGrantError) -> DeviceError:
    return grant_refused(errno.ENOMEM, f"mmap(gntdev): slot {slot}: {error.reason}")
