"""The two pages beside the memory of a pool: what its grantor says is granted, what its grantee says is mapped."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from usermm.hypercalls.pools import CLOSED_WORD, HELD_WORDS, PAGES, WORD, page_of
from usermm.hypervisor import memfds


@dataclass(slots=True)
class Pool:
    """`first` is the first reference of its block."""

    first: int
    table: int
    marks: int
    held: dict[int, int] = field(default_factory=dict)
    """How many mappings of a page the hypervisor handed out itself."""
    is_closed: bool = False

    def grants(self, reference: int) -> bool:
        """Whether the grantor says so, now."""
        word = os.pread(self.table, WORD.size, page_of(reference) * WORD.size)
        return word == WORD.pack(reference)

    def live(self) -> list[int]:
        """The references that are granted now, by the grantor's word."""
        words = memoryview(os.pread(self.table, HELD_WORDS, 0)).cast("I")
        return [word for page, word in enumerate(words[:PAGES]) if word and page_of(word) == page]

    def mapped(self) -> int:
        """How many pages the grantee says it has mapped."""
        words = memoryview(os.pread(self.marks, HELD_WORDS, 0)).cast("I")
        return sum(1 for word in words[:PAGES] if word)

    def end(self, reference: int) -> None:
        """It is granted no longer, if it was."""
        if self.grants(reference):
            os.pwrite(self.table, WORD.pack(0), page_of(reference) * WORD.size)

    def end_all(self) -> None:
        """Nothing is granted any more."""
        os.pwrite(self.table, bytes(PAGES * WORD.size), 0)
        self.close_to_new()

    def close_to_new(self) -> None:
        """What is granted stays so, and nothing more is: both sides are told where the other cannot take it back."""
        self.is_closed = True
        for page in (self.table, self.marks):
            os.pwrite(page, WORD.pack(1), CLOSED_WORD * WORD.size)

    def hold(self, page: int, change: int) -> None:
        """One mapping of the page more (1) or less (-1) that the hypervisor handed out."""
        count = self.held[page] = self.held.get(page, 0) + change
        os.pwrite(self.marks, WORD.pack(count), (HELD_WORDS + page) * WORD.size)

    def close_for_good(self) -> None:
        """The grantee's domain went: what it said is void, and whoever comes with its number gets other pages."""
        self.close_to_new()
        os.pwrite(self.marks, bytes(HELD_WORDS), 0)

    def close(self) -> None:
        """Closes the hypervisor's descriptors."""
        os.close(self.table)
        os.close(self.marks)


def make(first: int) -> Pool:
    """A pool with nothing granted. Raises OSError."""
    with contextlib.ExitStack() as undo:
        table = memfds.sealed("usermm:table", 1)
        undo.callback(os.close, table)
        marks = memfds.sealed("usermm:marks", 1)
        undo.pop_all()
        return Pool(first, table, marks)

