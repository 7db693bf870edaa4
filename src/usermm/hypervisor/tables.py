"""A domain's grant table: which reference names which page, and what the domain uses of its quotas."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from usermm.hypercalls.pools import BLOCK, block_of
from usermm.hypervisor.calls import Refused
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

    def take(self, count: int, table: Table) -> int:
        """The first of `count` consecutive numbers that are free in `table`.

        Raises Refused (ENOSPC): nowhere are so many free.
        """
        return self._take(count, 1, table)

    def take_block(self, table: Table) -> int:
        """The first number of a block for a pool."""
        return self._take(BLOCK, BLOCK, table)

    def _take(self, count: int, alignment: int, table: Table) -> int:
        rounds = 0
        while rounds < 3:  # the first one may begin anywhere
            self._next += -self._next % alignment
            if self._next + count > _SEQUENCE_LIMIT:
                self._next = FIRST_REFERENCE
                rounds += 1
                continue
            first = self._base + self._next
            clash = table.last_used(first, count)
            if clash is None:
                self._next += count
                return first
            self._next = clash - self._base + 1
        raise Refused(errno.ENOSPC, f"{count} consecutive references: so many are not free: release some")


@dataclass(slots=True)
class Table:
    """What a domain granted and has mapped, in this connection."""

    references: dict[int, Extent] = field(default_factory=dict)
    pools: dict[int, Extent] = field(default_factory=dict)
    """By the block of their references (`hypercalls.pools`)."""
    extents: set[int] = field(default_factory=set)
    """The watch numbers of its extents that are not gone yet."""
    holds: set[int] = field(default_factory=set)
    """The handles of what it was given and still has."""
    granted_pages: int = 0
    mapped_pages: int = 0

    def extent_of(self, reference: int) -> Extent | None:
        """What a live reference names a page of."""
        pooled = self.pools.get(block_of(reference))
        if pooled is None:
            return self.references.get(reference)
        return pooled if pooled.pool is not None and pooled.pool.grants(reference) else None

    def last_used(self, first: int, count: int) -> int | None:
        """The last number of [first, first + count) that is in use, or is of a pool's block."""
        for number in range(first + count - 1, first - 1, -1):
            block = block_of(number)
            if block in self.pools:
                return (block + 1) * BLOCK - 1
            if number in self.references:
                return number
        return None

    def find(self, first: int, count: int) -> Extent | None:
        """The extent of which all of [first, first + count) are live references."""
        extent = self.extent_of(first)
        if extent is None or count == 1:
            return extent
        if extent.pool is not None or first + count > extent.first_reference + extent.count:
            return None
        if extent.live == extent.count:
            return extent
        found = self.references
        return extent if all(found.get(number) is extent for number in range(first, first + count)) else None

    def find_any(self, first: int, count: int) -> Extent | None:
        """The extent that has all of [first, first + count), of which at least one is a live reference."""
        if count > self.granted_pages:  # which count as long as one of an extent is live
            return None
        live = (self.references.get(number) for number in range(first, first + count))
        found = next((extent for extent in live if extent is not None), None)
        if found is None or first < found.first_reference or first + count > found.first_reference + found.count:
            return None
        return found
