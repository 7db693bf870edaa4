"""Every extent until its last page is free, and who holds which: what follows when somebody lets go or dies."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from usermm.hypervisor import locks, memfds
from usermm.hypervisor.chores import Chores
from usermm.hypervisor.closings import Closings
from usermm.hypervisor.extents import Extent, Hold, UnmapNotification
from usermm.hypervisor.pools import Pool
from usermm.hypervisor.tables import Table
from usermm.uapi.xen_gntdev import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT

_LOOK_NS = 300_000
"""After this a look is broken off, for `look_on` to go on later."""
_LOOK_ON_NS = 1_000_000
"""For so long it goes on at a time."""
_SLOW_LOOK_NS = 2_000_000
_QUERY_NS = 10_000
_LOCK_NS = 20
"""What a query takes at most, and each lock of ours that the kernel passes on the way: a look that has taken
_SLOW_LOOK_NS, and longer than this explains, meets locks that others have put there."""
_SLOW_QUERY_NS = 200_000


class Events(Protocol):
    """What grants need of event channels."""

    def send(self, domid: int, port: int) -> None:
        """Notifies in the domain's name."""

    def is_bound(self, domid: int, port: int) -> bool:
        """Whether the domain has the port."""


class Audit(Protocol):
    """Where it is written down who was granted what."""

    def record(self, event: str, **fields: object) -> None:
        """Never waits and never fails."""


@dataclass(slots=True)
class _Look:
    """At one extent's holds: those that are left, and what it has taken so far."""

    holds: list[Hold]
    queries: int = 0
    spent_ns: int = 0


class Holding:
    """Tables are told apart, not domains: one domain can follow another under the same number."""

    def __init__(self, events: Events, audit: Audit, chores: Chores) -> None:
        self.tables: dict[int, Table] = {}
        self.closings = Closings()
        self._events = events
        self._audit = audit
        self._chores = chores
        self._extents: dict[int, tuple[Extent, Table]] = {}
        self._holds: dict[int, tuple[Extent, Hold, Table]] = {}
        self._pools_for: dict[int, set[int]] = {}
        """The watches of pools, by their grantee."""
        self._descriptors: collections.Counter[int] = collections.Counter()
        """By the users of the grantors."""
        self._next_handle = 1
        self.when_broken_off: Callable[[], object] = lambda: None
        """Called when a look was broken off: somebody has to call look_on."""
        self._unseen: dict[int, _Look] = {}
        self._closed_since: set[int] = set()

    def add(self, extent: Extent, table: Table) -> None:
        """A new extent, which counts on its grantor."""
        table.extents.add(extent.watch)
        table.granted_pages += extent.count
        extent.charged = extent.count
        self._extents[extent.watch] = extent, table
        self._descriptors[extent.grantor_uid] += 1

    def make_pool(self, extent: Extent, pool: Pool) -> None:
        """It is one from here on."""
        extent.pool = pool
        self._pools_for.setdefault(extent.grantee, set()).add(extent.watch)
        self._descriptors[extent.grantor_uid] += 2

    def _forget_pool(self, extent: Extent) -> None:
        self._descriptors[extent.grantor_uid] -= 2
        watches = self._pools_for.get(extent.grantee)
        if watches is not None:
            watches.discard(extent.watch)
            if not watches:
                del self._pools_for[extent.grantee]

    def close_pools_for(self, domid: int) -> list[Extent]:
        """The grantee is gone: whoever comes with its number gets pages of other pools than these."""
        extents = [self._extents[watch][0] for watch in self._pools_for.pop(domid, ())]
        for extent in extents:
            if extent.pool is not None:
                extent.pool.is_closed = True
        return extents

    def extents(self) -> Iterator[Extent]:
        """Oldest first."""
        return (extent for extent, _ in self._extents.values())

    def descriptors(self, uid: int) -> int:
        """How many of the hypervisor's are a user's, whose domain has gone or not."""
        return self._descriptors[uid]

    def hold(
        self,
        extent: Extent,
        domid: int,
        page: int,
        count: int,
        *,
        writable: bool,
        of_grantor: bool = False,
        is_attached: bool = False,
    ) -> tuple[int, int]:
        """A handle and a descriptor; the domain holds the extent by it. Raises OSError."""
        handle = self._next_handle
        descriptor = extent.open(handle, writable=writable)
        self._next_handle += 1
        hold = Hold(handle, domid, page, count, writable, of_grantor, is_attached)
        table = self.tables[domid]
        extent.holds[handle] = hold
        self._holds[handle] = extent, hold, table
        table.holds.add(handle)
        if of_grantor:
            extent.grantor_holds += 1
        else:
            table.mapped_pages += count
        if extent.pool is not None and not of_grantor and not is_attached:
            extent.pool.hold(page, 1)
        return handle, descriptor

    def held_by(self, domid: int, handle: int) -> tuple[Extent, Hold] | None:
        """What a domain's handle names; not one of a domain before it that had this number."""
        extent, hold, table = self._holds.get(handle, (None, None, None))
        return (extent, hold) if extent is not None and hold is not None and table is self.tables.get(domid) else None

    def drop(self, handle: int) -> None:
        """As if it had never been."""
        extent, hold, table = self._holds.pop(handle)
        del extent.holds[handle]
        table.holds.discard(handle)
        table.owing_holds.discard(handle)
        table.notifications -= len(hold.notifications)
        if hold.of_grantor:
            extent.grantor_holds -= 1
            self._discharge_taken_back(extent)
            return
        table.mapped_pages -= hold.pages
        if extent.pool is not None and not hold.is_attached:
            extent.pool.hold(hold.first, -1)

    def finish(self, extent: Extent, hold: Hold) -> None:
        """The hold is gone: its notifications are carried out, and the extent ends with its last one."""
        self.drop(hold.handle)
        for notification in hold.notifications.values():
            self.carry_out(extent, hold.domid, notification)
        self.free_if_unused(extent)

    def pay_debts(self, table: Table) -> None:
        """The domain is gone: what is to happen when its mappings and its references are."""
        for handle in list(table.owing_holds):
            extent, hold, _ = self._holds[handle]
            for notification in hold.notifications.values():
                self.carry_out(extent, hold.domid, notification)
            hold.notifications.clear()
        for watch in list(table.owing_extents):
            extent, _ = self._extents[watch]
            self._notify_grantor(extent, 0, extent.count)

    def clean_up(self, table: Table, closed: list[Extent]) -> Iterator[None]:
        """Step by step, what a domain that is gone had; `closed` are pools for it."""
        for extent in closed:
            if extent.pool is not None and self._is_here(extent):
                extent.pool.close_for_good()
            yield
        for handle in list(table.holds):
            if handle in self._holds:
                extent, hold, _ = self._holds[handle]
                self.finish(extent, hold)
            yield
        for extent in [self._extents[watch][0] for watch in table.extents]:
            if self._is_here(extent):
                self.end(table, extent, 0, extent.count)
                self.look_at(extent.watch)
            yield

    def _is_here(self, extent: Extent) -> bool:
        """Not freed meanwhile: the number of its watch can be another's."""
        found, _ = self._extents.get(extent.watch, (None, None))
        return found is extent

    def carry_out(self, extent: Extent, domid: int, notification: UnmapNotification) -> None:
        """An unmap notification of `domid`."""
        if notification.actions & NOTIFY_CLEAR_BYTE:
            extent.clear_byte(notification.page, notification.offset_bytes)
        if notification.actions & NOTIFY_SEND_EVENT:
            self._events.send(domid, notification.port)

    def end(self, table: Table, extent: Extent, page: int, count: int) -> None:
        """No new mapping of these pages of an extent that is no pool; notifications of its grantor's are due."""
        extent.end(page, count)
        if not extent.live:
            table.remove(extent)
        self._notify_grantor(extent, page, count)

    def end_pool(self, table: Table, extent: Extent) -> None:
        """Nothing of the pool is granted any more."""
        assert extent.pool is not None
        if extent.live:
            table.remove(extent)
            extent.pool.end_all()
            extent.live = 0
            self._notify_grantor(extent, 0, extent.count)

    def end_pooled(self, extent: Extent, reference: int) -> None:
        """One reference of a pool ends by its grantor's word."""
        assert extent.pool is not None
        extent.pool.end(reference)
        self._notify_grantor(extent, extent.page_of(reference), 1)

    def _notify_grantor(self, extent: Extent, page: int, count: int) -> None:
        if extent.grantor_notifications:
            _, table = self._extents[extent.watch]
            for at in [at for at in extent.grantor_notifications if page <= at < page + count]:
                self.carry_out(extent, extent.grantor, extent.grantor_notifications.pop(at))
                table.notifications -= 1

    def look(self, watches: set[int]) -> None:
        """Something was closed: finish the holds that are gone."""
        if Closings.ALL in watches:
            self._chores.add(self._look_everywhere())
        else:
            for watch in watches:
                self.look_at(watch)

    def _look_everywhere(self) -> Iterator[None]:
        for watch in list(self._extents):
            self.look_at(watch)
            yield

    def look_at(self, watch: int) -> None:
        """Finish the holds of one extent that are gone; of one with very many, some now and the others later."""
        extent, _ = self._extents.get(watch, (None, None))
        if extent is None:
            return
        if watch in self._unseen:
            self._closed_since.add(watch)
            return
        self._look_through(extent, _Look(list(extent.holds.values())), _LOOK_NS)

    @property
    def is_looking(self) -> bool:
        """Whether a look was broken off."""
        return bool(self._unseen)

    def look_on(self) -> None:
        """Goes on where the oldest of them was."""
        if self._unseen:
            watch = next(iter(self._unseen))
            look = self._unseen.pop(watch)
            self._look_through(self._extents[watch][0], look, _LOOK_ON_NS)

    def _look_through(self, extent: Extent, look: _Look, longest_ns: int) -> None:
        start = time.thread_time_ns()
        until, most = start + longest_ns, len(extent.holds)
        while look.holds and not extent.is_slow:
            hold = look.holds.pop()
            if hold.handle in extent.holds and not locks.is_held(extent.memfd, hold.handle):
                self.finish(extent, hold)
            look.queries += 1
            if time.thread_time_ns() > until:
                break
        look.spent_ns += time.thread_time_ns() - start
        if look.spent_ns > max(_SLOW_LOOK_NS, look.queries * (_QUERY_NS + most * _LOCK_NS)):
            self._look_no_more(extent)
        self._end_look(extent, look)

    def _end_look(self, extent: Extent, look: _Look) -> None:
        if not extent.is_slow and extent.watch in self._extents:
            if not look.holds and extent.watch in self._closed_since:
                look = _Look(list(extent.holds.values()))
                self._closed_since.discard(extent.watch)
            if look.holds:
                self._unseen[extent.watch] = look
                self.when_broken_off()
        self.free_if_unused(extent)

    def is_held(self, extent: Extent, hold: Hold) -> bool:
        """Whether its domain, which says that it let go, still has it."""
        if extent.is_slow:
            return False
        start = time.thread_time_ns()
        held = locks.is_held(extent.memfd, hold.handle)
        if time.thread_time_ns() - start > _SLOW_QUERY_NS:
            self._look_no_more(extent)
        return held

    def _look_no_more(self, extent: Extent) -> None:
        """Somebody fills the inode with locks of his own, which the kernel searches one by one."""
        extent.is_slow = True
        self._audit.record("slow", domid=extent.grantor, peer=extent.grantee, reference=extent.first_reference)

    def take_back(self, extent: Extent, page: int, count: int) -> None:
        """These pages were revoked: they no longer count on their grantor, once it has no descriptor to write by."""
        extent.taken_back.append((page, count))
        self._discharge_taken_back(extent)

    def _discharge_taken_back(self, extent: Extent) -> None:
        if extent.grantor_holds or not extent.taken_back:
            return
        _, table = self._extents[extent.watch]
        taken, extent.taken_back = extent.taken_back, []
        for page, count in taken:
            with contextlib.suppress(OSError):  # what was written since
                memfds.punch(extent.memfd, page, count)
            self.discharge(table, extent, count)

    def discharge(self, table: Table, extent: Extent, pages: int) -> None:
        """They no longer count on its grantor: they were revoked, or it is free."""
        extent.charged -= pages
        table.granted_pages -= pages

    def free_if_unused(self, extent: Extent) -> None:
        """Nothing is granted and nobody holds it: the hypervisor lets go of the memory."""
        if extent.live or extent.holds or extent.watch not in self._extents:
            return
        _, table = self._extents.pop(extent.watch)
        self._closed_since.discard(extent.watch)  # the number can be another extent's
        self._unseen.pop(extent.watch, None)
        table.extents.discard(extent.watch)
        table.owing_extents.discard(extent.watch)
        if extent.pool is not None:
            self._forget_pool(extent)
        self.discharge(table, extent, extent.charged)
        self._descriptors[extent.grantor_uid] -= 1
        if not self._descriptors[extent.grantor_uid]:
            del self._descriptors[extent.grantor_uid]
        self.closings.remove(extent.watch)
        extent.close()

    def close(self) -> None:
        """The hypervisor ends; what is mapped lives on in those who map it."""
        self.closings.close()
        for extent, _ in self._extents.values():
            extent.close()
