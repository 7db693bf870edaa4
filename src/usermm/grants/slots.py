"""The slot table of a gntdev file of 2007: which of its 128 slots are taken, by what, and whether they are mapped.

Only bookkeeping: it maps nothing and asks nobody. Every method does all that it says, or raises and changes nothing.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Sequence
from dataclasses import dataclass

from usermm.errors import grant_refused
from usermm.uapi.xen_gntdev import SLOTS_2007

Reference = tuple[int, int]
"""domid of the grantor, reference."""


class State(enum.Enum):
    """INVALID -take-> NOT_YET_MAPPED -map-> MAPPED -unmapped-> NOT_YET_MAPPED -free-> INVALID."""

    INVALID = "invalid"
    NOT_YET_MAPPED = "not yet mapped"
    MAPPED = "mapped"


@dataclass(slots=True)
class _Slot:
    state: State = State.INVALID
    reference: Reference = (0, 0)


class Slots:
    """A table in which all slots are INVALID. Its caller sees to it that one call at a time is inside."""

    def __init__(self) -> None:
        self._slots = [_Slot() for _ in range(SLOTS_2007)]
        self._free = list(range(SLOTS_2007 - 1, -1, -1))
        """The INVALID ones: the last is the next that a single grant gets. Never the only place that says so."""
        self._next_fit = 0

    def state(self, slot: int) -> State:
        """Of slot 0 to 127."""
        return self._slots[slot].state

    def take(self, references: Sequence[Reference], call: str) -> int:
        """Takes a slot for each reference and returns the first: they are consecutive.

        A single one gets the slot that was freed last, of a new table slot 0. Several get the first range that fits,
        searched for from the end of the range before, with wrap-around; a range itself does not wrap.
        Raises QuotaError (ENOMEM) in the name of `call`.
        """
        first = self._room(len(references), call)
        for slot, reference in enumerate(references, first):
            self._free.remove(slot)
            self._slots[slot] = _Slot(State.NOT_YET_MAPPED, reference)
        if len(references) > 1:
            self._next_fit = (first + len(references)) % SLOTS_2007
        return first

    def _room(self, count: int, call: str) -> int:
        if count == 1 and self._free:
            return self._free[-1]
        if 1 < count <= len(self._free):
            first = self._range(self._next_fit, SLOTS_2007, count)
            if first is None:  # a range may also begin before the old end and reach beyond it
                first = self._range(0, min(self._next_fit + count - 1, SLOTS_2007), count)
            if first is not None:
                return first
        text = f"{call}: {len(self._free)} of {SLOTS_2007} slots are free, and no {count} side by side: free some"
        raise grant_refused(errno.ENOMEM, text)

    def _range(self, start: int, end: int, count: int) -> int | None:
        """The first `count` INVALID slots side by side in [start, end)."""
        found = 0
        for slot in range(start, end):
            found = found + 1 if self._slots[slot].state is State.INVALID else 0
            if found == count:
                return slot - count + 1
        return None

    def free(self, first: int, count: int, call: str) -> None:
        """Makes [first, first + count) INVALID, whoever took them together.

        Raises in the name of `call`, for the first slot that cannot be freed: GrantError (EBUSY) if it is MAPPED,
        BadReferenceError (EINVAL) if it is INVALID or there is no such slot. Nothing is freed then.
        """
        for slot in range(first, first + count):
            if not 0 <= slot < SLOTS_2007:
                raise grant_refused(errno.EINVAL, f"{call}: slot {slot} is none of {SLOTS_2007}")
            state = self._slots[slot].state
            if state is State.MAPPED:
                raise grant_refused(errno.EBUSY, f"{call}: slot {slot} is mapped: unmap it first")
            if state is State.INVALID:
                raise grant_refused(errno.EINVAL, f"{call}: slot {slot} has no grant")
        for slot in range(first, first + count):
            self._slots[slot] = _Slot()
            self._free.append(slot)

    def map(self, first: int, count: int, call: str) -> list[Reference]:
        """Makes [first, first + count) MAPPED and returns what is to be mapped.

        Raises in the name of `call`: GrantError (ENXIO) beyond the table or for no slots at all, BadReferenceError
        (EINVAL) unless all are NOT_YET_MAPPED.
        """
        if count <= 0 or first < 0 or first + count > SLOTS_2007:
            raise grant_refused(errno.ENXIO, f"{call}: {count} pages from slot {first} on: the file has {SLOTS_2007}")
        covered = self._slots[first : first + count]
        for number, slot in enumerate(covered, first):
            if slot.state is not State.NOT_YET_MAPPED:
                text = f"{call}: slot {number} is {slot.state.value}: map what MAP_GRANT_REF gave, and once at a time"
                raise grant_refused(errno.EINVAL, text)
        for slot in covered:
            slot.state = State.MAPPED
        return [slot.reference for slot in covered]

    def unmapped(self, first: int, count: int) -> None:
        """The mapping of these slots is gone, or was not made after all: they are NOT_YET_MAPPED again."""
        for slot in self._slots[first : first + count]:
            assert slot.state is State.MAPPED
            slot.state = State.NOT_YET_MAPPED
