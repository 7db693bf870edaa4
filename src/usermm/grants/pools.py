"""Both ends of a pool: pages that are granted, mapped and returned without a word to the hypervisor.

Who writes what, and why neither end has to trust the other, is in `hypercalls.pools`. The two loads and stores that
must not pass each other are the grantor's "ended, is it mapped?" and the grantee's "mapped, is it granted?": with
sequentially consistent exchanges at least one of the two sees the other.
"""

from __future__ import annotations

import contextlib
import os

from usermm._core import Memory
from usermm.grants.alone import Alone, Rank
from usermm.grants.files import PAGE_BYTES
from usermm.grants.watched_memory import PoolMapping, file_of
from usermm.grants.watching import Watching
from usermm.hypercalls.pools import BLOCK, CLOSED_WORD, HELD_WORDS, PAGES, USES, WORD, page_of

_ZEROS = bytes(PAGE_BYTES)


def _page(descriptor: int, *, writable: bool) -> Memory:
    return Memory([(descriptor, 0, PAGE_BYTES)], writable=writable, shared=True, inherit=False)


class GrantorPool:
    """The grantor's end. Its owner's lock guards it. `descriptors` are the pages', the table's and the marks'."""

    def __init__(self, first: int, descriptors: list[int], watching: Watching, *, is_isolated: bool) -> None:
        with contextlib.ExitStack() as unneeded:
            for descriptor in descriptors:
                unneeded.callback(os.close, descriptor)
            self._table = _page(descriptors[1], writable=True)
            self._marks = _page(descriptors[2], writable=False)
            # A child keeps what its parent granted, as with the device of Xen.
            size = PAGES * PAGE_BYTES
            self.memory = PoolMapping([(descriptors[0], 0, size)], writable=True, shared=True, inherit=True)
            self.memory.watch(watching, frozenset({file_of(descriptors[0])}))
        self.first = first
        self.is_isolated = is_isolated
        self.granted = 0
        self._view = memoryview(self.memory)
        self._free = list(range(PAGES - 1, -1, -1))
        self._waiting: list[int] = []
        self._uses = [0] * PAGES

    def grant(self) -> int | None:
        """A reference to a page of zeros; None: no page is left, no number for one, or somebody unmapped one of them.
        """
        if self.memory.is_torn:
            return None
        if not self._free:
            self._reclaim()
        if not self._free or self.is_closed:
            return None
        page = self._free.pop()
        uses = self._uses[page]
        if uses:
            self._view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = _ZEROS
        self._uses[page] = uses + 1
        reference = self.first + page + PAGES * uses
        self._table.exchange(page * WORD.size, reference)
        self.granted += 1
        return reference

    def end(self, reference: int) -> None:
        """It is granted no longer; the page is granted again once nobody has it mapped."""
        page = page_of(reference)
        self._table.exchange(page * WORD.size, 0)
        self.granted -= 1
        if self._uses[page] < USES:
            (self._waiting if self._is_mapped(page) else self._free).append(page)

    @property
    def is_used_up(self) -> bool:
        """Whether nothing more is ever granted from it: no number is given twice."""
        return (not self._free and not self._waiting) or self.memory.is_torn

    def lose(self, reference: int) -> None:
        """It was revoked: this page is never granted again."""
        self._table.exchange(page_of(reference) * WORD.size, 0)
        self.granted -= 1

    @property
    def is_closed(self) -> bool:
        """Whether nothing more may be granted from it, says the hypervisor: the grantee went, or the policy changed."""
        return self._table.load(CLOSED_WORD * WORD.size) != 0

    @property
    def references(self) -> tuple[int, int]:
        """(first, count) of its block."""
        return self.first, BLOCK

    def close(self) -> None:
        """Nothing of it is granted any more; parts of the memory that are still mapped stay."""
        self._view.release()
        self._table.close()
        self._marks.close()
        del self.memory

    def _reclaim(self) -> None:
        waiting, self._waiting = self._waiting, []
        for page in waiting:
            (self._waiting if self._is_mapped(page) else self._free).append(page)

    def _is_mapped(self, page: int) -> bool:
        return bool(self._marks.load(page * WORD.size) or self._marks.load((HELD_WORDS + page) * WORD.size))


class GranteePool:
    """The grantee's end. Any thread may call anything, finalizers too: a mark is one atomic addition.

    It lives as long as a mapping of one of its pages refers to it.
    """

    def __init__(
        self, handle: int, descriptors: list[int], watching: Watching, *, writable: bool, is_isolated: bool
    ) -> None:
        with contextlib.ExitStack() as unneeded, contextlib.ExitStack() as undo:
            for descriptor in descriptors[1:]:
                unneeded.callback(os.close, descriptor)
            undo.callback(os.close, descriptors[0])
            self._table = _page(descriptors[1], writable=False)
            self._marks = _page(descriptors[2], writable=True)
            self._files = frozenset({file_of(descriptors[0])})
            undo.pop_all()
        self._descriptor = descriptors[0]
        self._alone = Alone(Rank.FILE)
        self._mappings: dict[bool, PoolMapping] = {}
        self._watching = watching
        self.handle = handle
        self.writable = writable
        self.is_isolated = is_isolated

    def hold(self, reference: int) -> bool:
        """Marks its page as mapped once more, if the reference is granted."""
        at = page_of(reference) * WORD.size
        self._marks.add(at, 1)
        if self._table.load(at) == reference:
            return True
        self._marks.add(at, -1)
        return False

    @property
    def is_over(self) -> bool:
        """Whether nothing more is granted from it, says the hypervisor."""
        return self._marks.load(CLOSED_WORD * WORD.size) != 0

    def release(self, page: int) -> None:
        """One mapping of the page less."""
        self._marks.add(page * WORD.size, -1)

    def mapping(self, *, writable: bool) -> PoolMapping | None:
        """All pages, mapped with this protection; None once it was dropped. Raises OSError (ENOMEM)."""
        found = self._mappings.get(writable)
        if found is None or found.is_torn:
            return self._alone.run("map", lambda: self._map(writable))
        return found

    def _map(self, writable: bool) -> PoolMapping | None:
        if self._descriptor < 0:
            return None
        run = self._descriptor, 0, PAGES * PAGE_BYTES
        # Private, so that a userfaultfd can watch it; a private mapping that is only read stays the file's pages.
        made = PoolMapping([run], writable=writable, shared=writable, inherit=False)
        made.watch(self._watching, self._files)
        self._mappings[writable] = made
        return made

    def drop(self) -> None:
        """Nothing more is mapped from it; what is mapped is still accounted for."""
        self._alone.finish(self._drop, wait=True)

    def _drop(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
