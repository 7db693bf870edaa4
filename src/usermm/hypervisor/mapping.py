"""What a grantee asks for: pages that others granted to it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from usermm.hypercalls import grants as layouts
from usermm.hypercalls import pools as pool_layouts
from usermm.hypercalls.wire import LONGEST_REPLY_BYTES, MOST_DESCRIPTORS
from usermm.hypervisor import memfds, pools
from usermm.hypervisor.calls import Refused, Reply
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.extents import Extent, UnmapNotification
from usermm.hypervisor.holding import Audit, Holding
from usermm.hypervisor.notifications import Notifications
from usermm.uapi.xen_gntdev import NOTIFY_CLEAR_BYTE, GrantStatus

_MOST_SEGMENTS = min(MOST_DESCRIPTORS, (LONGEST_REPLY_BYTES - layouts.MAPPED.size) // layouts.SEGMENT.size)


class _Segment(NamedTuple):
    extent: Extent
    reference: int
    pages: int


class Mapping:
    """The operations MAP, UNMAPPED, GRANTEE_NOTIFY and POOL_UNMAPPED."""

    def __init__(
        self,
        holding: Holding,
        notifications: Notifications,
        audit: Audit,
        *,
        are_isolated: Callable[[int, int], bool],
    ) -> None:
        self._holding = holding
        self._notifications = notifications
        self._audit = audit
        self._are_isolated = are_isolated

    def map(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """MAP: descriptors for the pages that these references name: all that fit one reply, or none."""
        flags, _, count = layouts.MAP.unpack_from(payload)
        runs = list(layouts.RUN.iter_unpack(payload[layouts.MAP.size :]))
        if count != len(runs) or not 0 < count <= layouts.MOST_RUNS:
            raise Refused(errno.EINVAL, f"map: {len(runs)} runs of references came, {count} were announced")
        segments: list[_Segment] = []
        for segment in self._segments(domain, runs, bool(flags & layouts.MAP_WRITABLE)):
            segments.append(segment)
            if len(segments) == _MOST_SEGMENTS or segment.extent.is_slow:
                break
        pool = segments[0].extent.pool if len(segments) == 1 else None
        if flags & layouts.MAP_ATTACH and pool is not None and not pool.is_closed:
            return self._attach(domain, segments[0], pool)
        return self._hand_out(domain, segments, bool(flags & layouts.MAP_WRITABLE))

    def _hand_out(self, domain: DomainRecord, segments: list[_Segment], writable: bool) -> Reply:
        pages = sum(segment.pages for segment in segments)
        self._refuse_beyond_quota(domain, pages)
        descriptors = []
        parts = [layouts.MAPPED.pack(len(segments), pages)]
        with contextlib.ExitStack() as undo:
            for segment in segments:
                extent, page = segment.extent, segment.extent.page_of(segment.reference)
                handle, descriptor = self._holding.hold(extent, domain.domid, page, segment.pages, writable=writable)
                undo.callback(os.close, descriptor)
                undo.callback(self._holding.drop, handle)
                descriptors.append(descriptor)
                parts.append(layouts.SEGMENT.pack(handle, page, segment.pages, self._bits(domain, extent)))
                if extent.pool is not None and not extent.pool.grants(segment.reference):
                    raise _ended(domain, extent.grantor, segment.reference, 0)  # while the count of it was written
            undo.pop_all()
        for segment in segments:
            self._record(domain, segment)
        return Reply(b"".join(parts), descriptors)

    def _attach(self, domain: DomainRecord, segment: _Segment, pool: pools.Pool) -> Reply:
        """All of the pool: what it is mapped by from here on, the grantee's marks tell."""
        extent = segment.extent
        self._refuse_beyond_quota(domain, extent.count)
        with contextlib.ExitStack() as undo:
            table = memfds.reopened(pool.table, writable=False)
            undo.callback(os.close, table)
            marks = memfds.reopened(pool.marks, writable=True)
            undo.callback(os.close, marks)
            handle, data = self._holding.hold(
                extent, domain.domid, 0, extent.count, writable=extent.writable, is_attached=True
            )
            undo.pop_all()
        self._record(domain, segment)
        bits = self._bits(domain, extent) | layouts.ATTACHED
        part = layouts.SEGMENT.pack(handle, extent.page_of(segment.reference), 1, bits)
        return Reply(layouts.MAPPED.pack(1, 1) + part, [data, table, marks])

    def _bits(self, domain: DomainRecord, extent: Extent) -> int:
        isolated = layouts.ISOLATED if self._are_isolated(extent.grantor, domain.domid) else 0
        return isolated | (layouts.WRITABLE if extent.writable else 0)

    def _refuse_beyond_quota(self, domain: DomainRecord, pages: int) -> None:
        mapped = self._holding.tables[domain.domid].mapped_pages
        if mapped + pages > domain.quotas.max_mapped:
            raise Refused(
                errno.ENOSPC,
                f"map({pages} pages): domain {domain.domid} has {mapped} mapped of max_maptrack_frames "
                f"{domain.quotas.max_maptrack_frames} ({domain.quotas.max_mapped} pages): unmap some",
                status=GrantStatus.GENERAL_ERROR,
            )

    def _segments(
        self, domain: DomainRecord, runs: list[tuple[int, int, int]], writable: bool
    ) -> Iterator[_Segment]:
        """Consecutive references of one extent together."""
        index = 0
        for grantor, first, count in runs:
            reference, end = first, first + count
            while reference < end:
                extent = self._granted(domain, grantor, reference, writable, index)
                pages = min(end, extent.first_reference + extent.count) - reference
                if extent.pool is not None or extent.live < extent.count:
                    pages = 1
                yield _Segment(extent, reference, pages)
                reference += pages
                index += pages

    def _granted(self, domain: DomainRecord, grantor: int, reference: int, writable: bool, index: int) -> Extent:
        call = f"map(domain {grantor}, reference {reference})"
        table = self._holding.tables.get(grantor)
        if table is None:
            text = f"{call}: there is no such domain: its number comes from the one who grants"
            raise Refused(errno.EINVAL, text, status=GrantStatus.BAD_DOMAIN, index=index)
        extent = table.extent_of(reference)
        if extent is None or not extent.is_for(domain):
            self._audit.record("refuse", domid=domain.domid, call="map", peer=grantor, reference=reference)
            raise _ended(domain, grantor, reference, index)
        if writable and not extent.writable:
            text = f"{call}: the grant is read-only: map it without writable"
            raise Refused(errno.EINVAL, text, status=GrantStatus.PERMISSION_DENIED, index=index)
        return extent

    def unmapped(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """UNMAPPED: the domain says that it let go: if so, it is finished now, not at the next closing."""
        for (handle,) in layouts.HANDLE.iter_unpack(payload):
            found = self._holding.held_by(domain.domid, handle)
            if found is not None and not self._holding.is_held(*found):
                self._holding.finish(*found)
        return Reply()

    def pool_unmapped(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """POOL_UNMAPPED: a page of an attached pool is no longer mapped, which a notification waits for."""
        handle, page = pool_layouts.POOL_UNMAPPED.unpack(payload)
        found = self._holding.held_by(domain.domid, handle)
        if found is not None and (notification := found[1].notifications.pop(page, None)) is not None:
            self._holding.tables[domain.domid].notifications -= 1
            self._holding.carry_out(found[0], domain.domid, notification)
        return Reply()

    def grantee_notify(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """GRANTEE_NOTIFY: what happens when this mapping is gone, also by the domain's death."""
        handle, page, offset, actions, port = layouts.GRANTEE_NOTIFY.unpack(payload)
        if not handle:  # before there is a mapping: whether the device may keep it for one
            self._notifications.check(domain, offset, actions, port)
            return Reply()
        found = self._holding.held_by(domain.domid, handle)
        if found is None or page >= found[1].pages:
            raise Refused(errno.ENOENT, f"notify(handle {handle}): domain {domain.domid} has no such mapping")
        hold = found[1]
        if actions & NOTIFY_CLEAR_BYTE and not hold.writable:
            raise Refused(errno.EINVAL, f"notify(handle {handle}): CLEAR_BYTE needs a writable mapping")
        wanted = UnmapNotification(hold.first + page, offset, actions, port)
        table = self._holding.tables[domain.domid]
        self._notifications.keep(domain, table, wanted, hold.notifications)
        table.owing_holds.add(handle)
        return Reply()

    def _record(self, domain: DomainRecord, segment: _Segment) -> None:
        segment.extent.grantee_uid = domain.uid
        grantor, first = segment.extent.grantor, segment.reference
        self._audit.record("map", domid=domain.domid, peer=grantor, reference=first, count=segment.pages)


def _ended(domain: DomainRecord, grantor: int, reference: int, index: int) -> Refused:
    text = f"map(domain {grantor}, reference {reference}): it is not granted to domain {domain.domid}, or ended, or is "
    return Refused(errno.EINVAL, text + "of an earlier hypervisor", status=GrantStatus.BAD_REFERENCE, index=index)
