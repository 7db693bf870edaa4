"""An address space a second time: a dictionary of pages, each knowing its mapping and whether it is watched."""

from __future__ import annotations

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Page:
    mapping: int
    watched: bool


class PageTable:
    """Page numbers only. `told` collects the notifications; with `everything`, of unwatched pages too."""

    def __init__(self, everything: bool) -> None:
        self.everything = everything
        self.told: list[tuple[int, int]] = []
        self._pages: dict[int, Page] = {}
        self._names = itertools.count()

    def is_mapped(self, start: int, end: int) -> bool:
        return all(page in self._pages for page in range(start, end))

    def same_mapping(self, start: int, end: int) -> bool:
        """True if [start, end) is mapped and nothing has cut it."""
        return self.is_mapped(start, end) and len({self._pages[page].mapping for page in range(start, end)}) == 1

    def map(self, start: int, end: int) -> None:
        self.unmap(start, end)
        name = next(self._names)
        self._pages |= {page: Page(name, False) for page in range(start, end)}

    def unmap(self, start: int, end: int) -> None:
        if self._take(start, end):
            self.told.append((start, end))

    def watch(self, start: int, end: int) -> None:
        here = [page for page in range(start, end) if page in self._pages]
        if not self.everything and any(not self._pages[page].watched for page in here):
            self._cut(start, end)
            self._pages |= {page: Page(self._pages[page].mapping, True) for page in here}

    def move(self, start: int, end: int, target: int, target_end: int, keep: bool) -> None:
        self.unmap(target, target_end)
        kept_end = min(end, start + target_end - target)
        watched = self._heard([start])
        tail = [(kept_end, end)] if kept_end < end and self._take(kept_end, end) else []
        if watched:
            self.told += [*tail, (start, kept_end)] if self.everything else [(start, kept_end), *tail]
        self._cut(start, kept_end)
        name, page = next(self._names), self._pages[start]
        if not keep:
            self.unmap(start, kept_end)
        self._pages |= {new: Page(name, page.watched) for new in range(target, target_end)}

    def can_resize(self, start: int, end: int, new_end: int) -> bool:
        return self.same_mapping(start, end) and not any(page in self._pages for page in range(end, new_end))

    def resize(self, start: int, end: int, new_end: int) -> None:
        if new_end < end:
            self.unmap(new_end, end)
        else:
            self._pages |= dict.fromkeys(range(end, new_end), self._pages[start])

    def discard(self, start: int, end: int) -> None:
        """One for each mapping crossed, told from the lowest."""
        here = [page for page in range(start, end) if page in self._pages]
        for _, group in itertools.groupby(here, key=self._run):
            run = list(group)
            if self._heard(run):
                self.told.append((run[0], run[-1] + 1))

    def _run(self, page: int) -> tuple[int, int]:
        """The first page of the uncut run that `page` is in, and its mapping."""
        mapping = self._pages[page].mapping
        while page - 1 in self._pages and self._pages[page - 1].mapping == mapping:
            page -= 1
        return page, mapping

    def _heard(self, pages: list[int]) -> bool:
        return any(self.everything or self._pages[page].watched for page in pages if page in self._pages)

    def _take(self, start: int, end: int) -> bool:
        heard = self._heard(list(range(start, end)))
        self._cut(start, end)
        for page in range(start, end):
            self._pages.pop(page, None)
        return heard

    def _cut(self, start: int, end: int) -> None:
        """Pages before, inside and after [start, end) belong to different mappings from now on."""
        names: dict[tuple[int, int], int] = {}
        for number, page in self._pages.items():
            side = 0 if number < start else 1 if number < end else 2
            name = names.setdefault((page.mapping, side), next(self._names))
            self._pages[number] = Page(name, page.watched)
