"""An extent: the memory of one allocation, for one grantee in one mode, and who holds it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from usermm.hypercalls.pools import BLOCK
from usermm.hypervisor import locks, memfds
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.memfds import PAGE_BYTES
from usermm.hypervisor.pools import Pool

NAME = "usermm:grant"


@dataclass(slots=True)
class UnmapNotification:
    """What happens once the page is no longer mapped: a byte is cleared, an event is sent, or both."""

    page: int
    offset_bytes: int
    actions: int
    port: int


@dataclass(slots=True)
class Hold:
    """One open file of the extent that a domain was given. `first` and `pages` count from the extent's start."""

    handle: int
    domid: int
    first: int
    pages: int
    writable: bool
    of_grantor: bool = False
    is_attached: bool = False
    """All of a pool: what of it is mapped, the grantee's marks tell."""
    notifications: dict[int, UnmapNotification] = field(default_factory=dict)


@dataclass(slots=True)
class Extent:
    """`live` of `count` references are still granted; `ended` says which are not."""

    memfd: int
    grantor: int
    grantor_uid: int
    grantee: int
    writable: bool
    first_reference: int
    count: int
    live: int
    watch: int
    pool: Pool | None = None
    ended: bytearray | None = None
    """A byte for each page; None while all references are live, or none is."""
    is_slow: bool = False
    """Its locks are somebody's toy: nobody looks at them, and its holds end by their domains' word, or with them."""
    grantee_uid: int | None = None
    """The user of the grantee, once it was seen: another one's domain may follow it under its number."""
    charged: int = 0
    """Pages that count on its grantor: all but those that were revoked, until it is free."""
    grantor_holds: int = 0
    taken_back: list[tuple[int, int]] = field(default_factory=list)
    """(page, count) that were revoked, and that the grantor, who could still write there, has not let go of."""
    holds: dict[int, Hold] = field(default_factory=dict)
    grantor_notifications: dict[int, UnmapNotification] = field(default_factory=dict)

    @property
    def span(self) -> int:
        """How many numbers it has."""
        return self.count if self.pool is None else BLOCK

    @property
    def revoked(self) -> bool:
        """Whether all of it was taken back."""
        return not self.charged and not self.live

    def grants(self, reference: int) -> bool:
        """Whether this number of its own is a live reference."""
        if self.pool is not None:
            return self.pool.grants(reference)
        return self.live > 0 and (self.ended is None or not self.ended[reference - self.first_reference])

    def end(self, page: int, count: int) -> None:
        """No reference to these pages is live any more; of an extent that is no pool."""
        if count < self.count and self.live:
            ended = self.ended = self.ended or bytearray(self.count)
            self.live -= ended.count(0, page, page + count)
            ended[page : page + count] = b"\1" * count
        else:
            self.live = 0
        if not self.live:
            self.ended = None

    def page_of(self, reference: int) -> int:
        """The page of this extent that `reference` names."""
        return (reference - self.first_reference) % self.count  # a pool has many references for each page

    def close(self) -> None:
        """Closes the hypervisor's descriptors: whoever holds the memory keeps it."""
        os.close(self.memfd)
        if self.pool is not None:
            self.pool.close()

    def open(self, handle: int, *, writable: bool) -> int:
        """A descriptor for a domain: its own open file, with the lock that tells when it is gone."""
        if not self.is_slow:
            with contextlib.suppress(BlockingIOError):  # somebody's write lock is on our byte
                return locks.open_held(self.memfd, handle, writable=writable)
            self.is_slow = True
        return memfds.reopened(self.memfd, writable=writable)

    def is_for(self, domain: DomainRecord) -> bool:
        """Whether this is the grantee: its number, and the user who had it, if anybody had."""
        return self.grantee == domain.domid and self.grantee_uid in (None, domain.uid)

    def clear_byte(self, page: int, offset_bytes: int) -> None:
        """The unmap notification's; of a page that was revoked it is a zero already, which nobody has any more."""
        with contextlib.suppress(OSError):
            os.pwrite(self.memfd, b"\0", page * PAGE_BYTES + offset_bytes)
