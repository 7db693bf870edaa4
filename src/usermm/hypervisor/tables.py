"""A domain's grant table: which reference names which page, and what the domain uses of its quotas."""

from __future__ import annotations

from dataclasses import dataclass, field

from usermm.hypervisor.extents import Extent
from usermm.uapi.xen_gntalloc import FIRST_REFERENCE

_SEQUENCE_BITS = 20
_SEQUENCE_LIMIT = 1 << _SEQUENCE_BITS

MOST_PAGES = _SEQUENCE_LIMIT - FIRST_REFERENCE
"""Of one allocation, whatever the quotas say."""


class References:
    """The numbers of one domain's references: an incarnation's tag above, a sequence that goes round below.

    A number names something else only after a million others, and never what another incarnation of the hypervisor
    gave it to: the tag differs.
    """

    __slots__ = ("_base", "_next")

    def __init__(self, incarnation_tag: int) -> None:
        self._base = incarnation_tag << _SEQUENCE_BITS
        self._next = FIRST_REFERENCE

    def take(self, count: int, used: dict[int, Extent]) -> int:
        """The first of `count` consecutive numbers that are not in `used`.

        At most 2**15 numbers are in use at a time (the quota on grant frames), so a gap is found within as many steps.
        """
        while True:
            if self._next + count > _SEQUENCE_LIMIT:
                self._next = FIRST_REFERENCE
            first = self._base + self._next
            clash = next((number for number in range(first + count - 1, first - 1, -1) if number in used), None)
            if clash is None:
                self._next += count
                return first
            self._next = clash - self._base + 1


@dataclass(slots=True)
class Table:
    """What a domain granted and has mapped, in this connection."""

    references: dict[int, Extent] = field(default_factory=dict)
    extents: set[int] = field(default_factory=set)
    """The watch numbers of its extents that are not gone yet."""
    holds: set[int] = field(default_factory=set)
    """The handles of what it was given and still has."""
    granted_pages: int = 0
    mapped_pages: int = 0

    def find(self, first: int, count: int) -> Extent | None:
        """The extent of which all of [first, first + count) are live references."""
        extent = self.references.get(first)
        if extent is None or first + count > extent.first_reference + extent.count:
            return None
        if extent.live == extent.count:
            return extent
        found = self.references
        return extent if all(found.get(number) is extent for number in range(first, first + count)) else None

    def find_any(self, first: int, count: int) -> Extent | None:
        """The extent that has all of [first, first + count), of which at least one is a live reference."""
        if count > MOST_PAGES:
            return None
        live = (self.references.get(number) for number in range(first, first + count))
        found = next((extent for extent in live if extent is not None), None)
        if found is None or first < found.first_reference or first + count > found.first_reference + found.count:
            return None
        return found
