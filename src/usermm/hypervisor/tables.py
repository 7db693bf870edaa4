"""A domain's grant table: which reference names which page, and what the domain uses of its quotas."""

from __future__ import annotations

import bisect
import errno
from dataclasses import dataclass, field

from usermm.hypercalls.pools import BLOCK, block_of
from usermm.hypervisor.calls import Refused
from usermm.hypervisor.extents import Extent
from usermm.uapi.xen_gntalloc import FIRST_REFERENCE

_SEQUENCE_BITS = 20
_SEQUENCE_LIMIT = 1 << _SEQUENCE_BITS
_MOST_PASSED = 1 << 15
"""Allocations that a search for numbers passes, a few milliseconds; as many as the default quota allows."""

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

        Raises Refused (ENOSPC): nowhere are so many free, or not behind the next thousands of allocations; then the
        next call goes on from there.
        """
        return self._take(count, 1, table)

    def take_block(self, table: Table) -> int:
        """The first number of a block for a pool."""
        return self._take(BLOCK, BLOCK, table)

    def _take(self, count: int, alignment: int, table: Table) -> int:
        rounds, passed = 0, 0
        while rounds < 3 and passed < _MOST_PASSED:  # the first round may begin anywhere
            self._next += -self._next % alignment
            if self._next + count > _SEQUENCE_LIMIT:
                self._next = FIRST_REFERENCE
                rounds += 1
                continue
            first = self._base + self._next
            used = table.used_until(first, first + count)
            if used is None:
                self._next += count
                return first
            self._next = used - self._base
            passed += 1
        raise Refused(errno.ENOSPC, f"{count} consecutive references: none were found: release some, or ask again")


@dataclass(slots=True)
class Table:
    """What a domain granted and has mapped, in this connection."""

    pools: dict[int, Extent] = field(default_factory=dict)
    """By the block of their references (`hypercalls.pools`)."""
    extents: set[int] = field(default_factory=set)
    """The watch numbers of its extents that are not gone yet."""
    holds: set[int] = field(default_factory=set)
    """The handles of what it was given and still has."""
    owing_extents: set[int] = field(default_factory=set)
    owing_holds: set[int] = field(default_factory=set)
    """Those that notifications are kept for, which are due when the domain goes."""
    notifications: int = 0
    granted_pages: int = 0
    mapped_pages: int = 0
    _firsts: list[int] = field(default_factory=list)
    """Of the extents with live references, pools too; ascending."""
    _granted: dict[int, Extent] = field(default_factory=dict)
    """The same extents by those."""

    def add(self, extent: Extent) -> None:
        """Its references are live from here on."""
        first = extent.first_reference
        if not self._firsts or first > self._firsts[-1]:
            self._firsts.append(first)
        else:
            bisect.insort(self._firsts, first)
        self._granted[first] = extent
        if extent.pool is not None:
            self.pools[block_of(first)] = extent

    def remove(self, extent: Extent) -> None:
        """None of its references is live. May be called again."""
        first = extent.first_reference
        if self._granted.pop(first, None) is not None:
            del self._firsts[bisect.bisect_left(self._firsts, first)]
            if extent.pool is not None:
                del self.pools[block_of(first)]

    def extent_of(self, reference: int) -> Extent | None:
        """What a live reference names a page of."""
        extent = self._around(reference)
        return extent if extent is not None and extent.grants(reference) else None

    def find(self, first: int, count: int) -> Extent | None:
        """The extent of which all of [first, first + count) are live references."""
        extent = self.extent_of(first)
        if extent is None or count == 1:
            return extent
        if extent.pool is not None or first + count > extent.first_reference + extent.count:
            return None
        whole = extent.live == extent.count
        return extent if whole or all(map(extent.grants, range(first, first + count))) else None

    def find_any(self, first: int, count: int) -> Extent | None:
        """The extent, no pool, that has all of [first, first + count), of which at least one is a live reference."""
        extent = self._around(first)
        if extent is None or first + count > extent.first_reference + extent.count:
            return None
        return extent if any(map(extent.grants, range(first, first + count))) else None

    def used_until(self, first: int, end: int) -> int | None:
        """Where the first extent ends that has numbers in [first, end), all of which it keeps until the last ended;
        None: they are free."""
        extent = self._around(first)
        if extent is None:
            at = bisect.bisect_left(self._firsts, first)
            if at == len(self._firsts) or self._firsts[at] >= end:
                return None
            extent = self._granted[self._firsts[at]]
        return extent.first_reference + extent.span

    def _around(self, number: int) -> Extent | None:
        """The extent that has this number, live or not."""
        extent = self._granted.get(number)
        if extent is None:
            at = bisect.bisect_right(self._firsts, number) - 1
            extent = self._granted[self._firsts[at]] if at >= 0 else None
        return extent if extent is not None and number < extent.first_reference + extent.span else None
