"""The mappings of an address space: a sorted list that is cut where an operation needs a boundary.

Mappings are never merged again. The kernel merges neighbours when it can, which depends on more than a program sees
(whether a page was ever touched, for one), so an operation that crosses a boundary between two mappings of this list
may be one or two notifications on a kernel, and is two here. Inside one mapping there is no doubt.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator

PAGE_BYTES = 4096


def page_floor(address: int) -> int:
    return address & -PAGE_BYTES


def page_ceiling(address: int) -> int:
    return page_floor(address + PAGE_BYTES - 1)


@dataclasses.dataclass
class Mapping:
    """Addresses [start, end) with one set of properties. `watched` matters to userfaultfd only."""

    start: int
    end: int
    shared: bool = False
    prot: int = mmap.PROT_READ | mmap.PROT_WRITE
    watched: bool = False


class Mappings:
    """All mappings of one address space, ascending and without overlap."""

    def __init__(self) -> None:
        self._all: list[Mapping] = []

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._all)

    def crossing(self, start: int, end: int) -> list[Mapping]:
        """The mappings that share an address with [start, end), whole."""
        return [mapping for mapping in self._all if mapping.start < end and start < mapping.end]

    def at(self, address: int) -> Mapping | None:
        return next(iter(self.crossing(address, address + 1)), None)

    def is_free(self, start: int, end: int) -> bool:
        return not self.crossing(start, end)

    def covers(self, start: int, end: int) -> bool:
        """True if every address of [start, end) is mapped."""
        mapped = sum(min(end, mapping.end) - max(start, mapping.start) for mapping in self.crossing(start, end))
        return mapped == end - start

    def cut_out(self, start: int, end: int) -> list[Mapping]:
        """Cuts at both ends, so that the mappings returned lie inside [start, end)."""
        self._cut(start)
        self._cut(end)
        return self.crossing(start, end)

    def add(self, mapping: Mapping) -> None:
        self._all.append(mapping)
        self._all.sort(key=lambda each: each.start)

    def remove(self, start: int, end: int) -> None:
        for mapping in self.cut_out(start, end):
            self._all.remove(mapping)

    def _cut(self, address: int) -> None:
        mapping = self.at(address)
        if mapping is not None and mapping.start < address:
            self.add(dataclasses.replace(mapping, start=address))
            mapping.end = address
