"""What one ALLOC_GREF made, and how many pages there may be."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from usermm.errors import grant_refused
from usermm.grants.files import PAGE_BYTES
from usermm.grants.pools import GrantorPool


class Limit:
    """How many pages all gntalloc files of a domain have: the driver's parameter `limit`."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._used = 0
        self._lock = threading.RLock()  # a finalizer can come in between

    def take(self, pages: int, domid: int) -> None:
        """Raises QuotaError (ENOSPC)."""
        with self._lock:
            if self._used + pages > self.pages:
                text = f"gntalloc: ALLOC_GREF({pages} pages for domain {domid}): {self._used} of {self.pages} used: "
                raise grant_refused(errno.ENOSPC, text + "deallocate some, or make the Domain with a higher limit")
            self._used += pages

    def give_back(self, pages: int) -> None:
        """They are free for the next."""
        with self._lock:
            self._used -= pages


@dataclass(slots=True, eq=False)
class Allocated:
    """What one ALLOC_GREF made: `users` of each page are the allocation itself and every mapping of it here."""

    first_page: int
    first_reference: int
    count: int
    descriptor: int | None
    """Of the reply; the first mapping uses it up, later ones ask for their own."""
    is_isolated: bool
    users: list[int] = field(default_factory=list)
    removed: int = 0
    pool: GrantorPool | None = None
    is_notified: bool = False
    is_revoked: bool = False

    @property
    def index(self) -> int:
        """Of its first page."""
        return self.first_page * PAGE_BYTES

    @property
    def references(self) -> range:
        """One a page."""
        return range(self.first_reference, self.first_reference + self.count)


def left_of(allocated: Allocated, pages: dict[int, Allocated]) -> Iterator[tuple[int, int]]:
    """(page, pages) of the allocation that are not deallocated."""
    start = None
    for page in range(allocated.count + 1):
        there = page < allocated.count and allocated.first_page + page in pages
        if there and start is None:
            start = page
        elif not there and start is not None:
            yield start, page - start
            start = None
