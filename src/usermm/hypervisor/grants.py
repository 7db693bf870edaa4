"""Grants: allocating, mapping, ending and revoking them; what happens when whoever held one is gone."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from usermm.hypercalls import grants as layouts
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED, DOMID_SELF, LONGEST_REPLY_BYTES, MOST_DESCRIPTORS
from usermm.hypervisor import extents, locks
from usermm.hypervisor.calls import Refused, Reply
from usermm.hypervisor.closings import Closings
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.extents import Extent, Hold, UnmapNotification
from usermm.hypervisor.tables import MOST_PAGES, References, Table
from usermm.uapi.xen_gntdev import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT, GrantStatus

_KIB_PER_PAGE = extents.PAGE_BYTES // 1024
_MOST_SEGMENTS = min(MOST_DESCRIPTORS, (LONGEST_REPLY_BYTES - layouts.MAPPED.size) // layouts.SEGMENT.size)
_SLOW_LOOK_NS = 2_000_000
_NOTHING = None, None, None


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


class Grants:
    """All grant tables, and every extent until its last page is free."""

    def __init__(
        self,
        domains: Mapping[int, DomainRecord],
        events: Events,
        audit: Audit,
        *,
        incarnation_tag: int,
        may_grant: Callable[[DomainRecord, int], bool],
    ) -> None:
        self._domains = domains
        self._events = events
        self._audit = audit
        self._tag = incarnation_tag
        self._may_grant = may_grant
        self._tables: dict[int, Table] = {}
        self._numbers: dict[int, References] = {}
        self._extents: dict[int, tuple[Extent, Table]] = {}
        self._holds: dict[int, tuple[Extent, Hold, Table]] = {}
        self._next_handle = 1
        self.closings = Closings()

    def domain_arrived(self, domain: DomainRecord) -> None:
        """The domain's table is empty."""
        self._tables[domain.domid] = Table()

    def domain_gone(self, domain: DomainRecord) -> None:
        """Nothing of it can be mapped any more; what is mapped lives until it is unmapped."""
        table = self._tables.pop(domain.domid)
        for watch in list(table.extents):
            extent, _ = self._extents[watch]
            self._end(table, extent, 0, extent.count)
        for handle in list(table.holds):
            extent, hold, _ = self._holds[handle]
            self._finish(extent, hold)
            self._free_if_unused(extent)
        for watch in list(table.extents):
            self._look(watch)

    def allocate(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """ALLOCATE: `count` fresh pages that `grantee` may map."""
        grantee, flags, count = layouts.ALLOCATE.unpack(payload)
        if grantee == DOMID_SELF:
            grantee = domain.domid
        call = f"allocate({count} pages for domain {grantee})"
        if grantee >= DOMID_FIRST_RESERVED or not 0 < count <= MOST_PAGES:
            text = f"{call}: pass a domid below {DOMID_FIRST_RESERVED:#x} and a count from 1 to {MOST_PAGES}"
            raise Refused(errno.EINVAL, text)
        if not self._may_grant(domain, grantee):
            self._audit.record("refuse", domid=domain.domid, call="grant", peer=grantee)
            raise Refused(errno.EACCES, f"{call}: the policy does not let domain {domain.domid} grant to it")
        table = self._tables[domain.domid]
        _charge(domain, table, call, count)
        return self._allocate(domain, table, grantee, flags, count)

    def _allocate(self, domain: DomainRecord, table: Table, grantee: int, flags: int, count: int) -> Reply:
        writable = bool(flags & layouts.ALLOCATE_WRITABLE)
        memfd = extents.memory(count, writable=writable)
        watch = None
        try:
            watch = self.closings.add(memfd)
            extent = Extent(memfd, domain.domid, grantee, writable, 0, count, count, watch)
            descriptors = [self._hold(extent, domain.domid, 0, count, writable=True, of_grantor=True)[1]] if (
                flags & layouts.ALLOCATE_WANT_DESCRIPTOR
            ) else []
        except OSError:
            if watch is not None:
                self.closings.remove(watch)
            os.close(memfd)
            raise
        numbers = self._numbers.setdefault(domain.domid, References(self._tag))
        first = extent.first_reference = numbers.take(count, table.references)
        table.references.update(dict.fromkeys(range(first, first + count), extent))
        table.extents.add(watch)
        table.granted_pages += count
        self._extents[watch] = extent, table
        self._audit.record("grant", domid=domain.domid, peer=grantee, reference=first, count=count, writable=writable)
        isolated = layouts.ISOLATED if self.are_isolated(domain.domid, grantee) else 0
        return Reply(layouts.ALLOCATED.pack(first, isolated), descriptors)

    def release(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """RELEASE: the references are no longer granted; what is mapped stays until it is unmapped.

        Some of them may have ended before: revoked.
        """
        first, count, _ = layouts.RANGE.unpack(payload)
        table = self._tables[domain.domid]
        extent = table.find_any(first, count)
        if extent is None:
            text = f"release(references {first}+{count}): domain {domain.domid} grants none of them"
            raise Refused(errno.EINVAL, text)
        page = extent.page_of(first)
        self._end(table, extent, page, count)
        self._audit.record("release", domid=domain.domid, reference=extent.first_reference + page, count=count)
        self._look(extent.watch)
        return Reply()

    def open_own(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """OPEN_OWN: a writable descriptor of an extent that the domain granted."""
        _, extent, page, count = self._own(domain, payload, "open_own")
        _, descriptor = self._hold(extent, domain.domid, page, count, writable=True, of_grantor=True)
        return Reply(layouts.OPENED.pack(page), [descriptor])

    def revoke(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """REVOKE: the references end, and whoever has mapped them has nothing any more."""
        table, extent, page, count = self._own(domain, payload, "revoke")
        extent.revoke(page, count)
        self._end(table, extent, page, count)
        self._audit.record("revoke", domid=domain.domid, reference=extent.first_reference + page, count=count)
        if not extent.live and count == extent.count:
            extent.revoked = True
            self._discharge(table, extent)
        self._look(extent.watch)
        return Reply()

    def grantor_notify(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """GRANTOR_NOTIFY: what happens when the reference ends, also by the domain's death."""
        reference, offset, actions, port = layouts.GRANTOR_NOTIFY.unpack(payload)
        extent = self._tables[domain.domid].references.get(reference)
        if extent is None:
            raise Refused(errno.EINVAL, f"notify(reference {reference}): domain {domain.domid} grants no such page")
        page = extent.page_of(reference)
        notification = self._notification(domain, page, offset, actions, port)
        if notification is None:
            extent.grantor_notifications.pop(page, None)
        else:
            extent.grantor_notifications[page] = notification
        return Reply()

    def map(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """MAP: descriptors for the pages that these references name: all that fit one reply, or none."""
        flags, _, count = layouts.MAP.unpack_from(payload)
        runs = list(layouts.RUN.iter_unpack(payload[layouts.MAP.size :]))
        if count != len(runs) or not 0 < count <= layouts.MOST_RUNS:
            raise Refused(errno.EINVAL, f"map: {len(runs)} runs of references came, {count} were announced")
        writable = bool(flags & layouts.MAP_WRITABLE)
        segments: list[tuple[Extent, int, int]] = []
        pages = 0
        for segment in self._segments(domain, runs, writable):
            if len(segments) == _MOST_SEGMENTS:
                break
            segments.append(segment)
            pages += segment[2]
        table = self._tables[domain.domid]
        if table.mapped_pages + pages > domain.quotas.max_mapped:
            raise Refused(
                errno.ENOSPC,
                f"map({pages} pages): domain {domain.domid} has {table.mapped_pages} mapped of max_maptrack_frames "
                f"{domain.quotas.max_maptrack_frames} ({domain.quotas.max_mapped} pages): unmap some",
                status=GrantStatus.GENERAL_ERROR,
            )
        return self._hand_out(domain, segments, pages, writable)

    def _hand_out(
        self, domain: DomainRecord, segments: list[tuple[Extent, int, int]], pages: int, writable: bool
    ) -> Reply:
        descriptors: list[int] = []
        handles: list[int] = []
        parts = [layouts.MAPPED.pack(len(segments), pages)]
        try:
            for extent, page, count in segments:
                handle, descriptor = self._hold(extent, domain.domid, page, count, writable=writable)
                descriptors.append(descriptor)
                handles.append(handle)
                isolated = layouts.ISOLATED if self.are_isolated(extent.grantor, domain.domid) else 0
                may_write = layouts.WRITABLE if extent.writable else 0
                parts.append(layouts.SEGMENT.pack(handle, page, count, isolated | may_write))
        except OSError:
            for descriptor in descriptors:
                os.close(descriptor)
            for handle in handles:
                self._drop(handle)
            raise
        for extent, page, count in segments:
            first = extent.first_reference + page
            self._audit.record("map", domid=domain.domid, peer=extent.grantor, reference=first, count=count)
        return Reply(b"".join(parts), descriptors)

    def _segments(
        self, domain: DomainRecord, runs: list[tuple[int, int, int]], writable: bool
    ) -> Iterator[tuple[Extent, int, int]]:
        """(extent, first page, pages) for consecutive references of one extent."""
        index = 0
        for grantor, first, count in runs:
            reference, end = first, first + count
            while reference < end:
                extent = self._granted(domain, grantor, reference, writable, index)
                number = min(end, extent.first_reference + extent.count) - reference
                if extent.live < extent.count:
                    number = 1
                yield extent, extent.page_of(reference), number
                reference += number
                index += number

    def _granted(self, domain: DomainRecord, grantor: int, reference: int, writable: bool, index: int) -> Extent:
        if grantor == DOMID_SELF:
            grantor = domain.domid
        call = f"map(domain {grantor}, reference {reference})"
        table = self._tables.get(grantor)
        if table is None:
            text = f"{call}: there is no such domain: its number comes from the one who grants"
            raise Refused(errno.EINVAL, text, status=GrantStatus.BAD_DOMAIN, index=index)
        extent = table.references.get(reference)
        if extent is None or extent.grantee != domain.domid:
            self._audit.record("refuse", domid=domain.domid, call="map", peer=grantor, reference=reference)
            text = f"{call}: it is not granted to domain {domain.domid}, or ended, or is of an earlier hypervisor"
            raise Refused(errno.EINVAL, text, status=GrantStatus.BAD_REFERENCE, index=index)
        if writable and not extent.writable:
            text = f"{call}: the grant is read-only: map it without writable"
            raise Refused(errno.EINVAL, text, status=GrantStatus.PERMISSION_DENIED, index=index)
        return extent

    def unmapped(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """UNMAPPED: the domain says that it let go: if so, it is finished now, not at the next closing."""
        for (handle,) in layouts.HANDLE.iter_unpack(payload):
            extent, hold, _ = self._holds.get(handle, _NOTHING)
            if extent is None or hold is None or hold.domid != domain.domid or locks.is_held(extent.memfd, handle):
                continue
            self._finish(extent, hold)
            self._free_if_unused(extent)
        return Reply()

    def grantee_notify(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """GRANTEE_NOTIFY: what happens when this mapping is gone, also by the domain's death."""
        handle, page, offset, actions, port = layouts.GRANTEE_NOTIFY.unpack(payload)
        if not handle:  # before there is a mapping: whether the device may keep it for one
            self._notification(domain, page, offset, actions, port)
            return Reply()
        extent, hold, _ = self._holds.get(handle, _NOTHING)
        if hold is None or extent is None or hold.domid != domain.domid or page >= hold.pages:
            raise Refused(errno.ENOENT, f"notify(handle {handle}): domain {domain.domid} has no such mapping")
        if actions & NOTIFY_CLEAR_BYTE and not hold.writable:
            raise Refused(errno.EINVAL, f"notify(handle {handle}): CLEAR_BYTE needs a writable mapping")
        hold.notification = self._notification(domain, hold.first + page, offset, actions, port)
        return Reply()

    def _notification(
        self, domain: DomainRecord, page: int, offset: int, actions: int, port: int
    ) -> UnmapNotification | None:
        if actions & ~(NOTIFY_CLEAR_BYTE | NOTIFY_SEND_EVENT) or offset >= extents.PAGE_BYTES:
            raise Refused(errno.EINVAL, f"notify: actions {actions:#x} at byte {offset} are unknown: 1, 2 or 3")
        if actions & NOTIFY_SEND_EVENT and not self._events.is_bound(domain.domid, port):
            raise Refused(errno.EINVAL, f"notify: domain {domain.domid} has no port {port}: bind it first")
        return UnmapNotification(page, offset, actions, port) if actions else None

    def close(self) -> None:
        """The hypervisor ends; what is mapped lives on in those who map it."""
        self.closings.close()
        for extent, _ in self._extents.values():
            os.close(extent.memfd)

    def usage(self, domid: int) -> tuple[int, int]:
        """Pages that the domain grants, and pages that it has mapped."""
        table = self._tables[domid]
        return table.granted_pages, table.mapped_pages

    def extents(self) -> Iterator[Extent]:
        """Every extent that is not free yet, oldest first."""
        return (extent for extent, _ in self._extents.values())

    def are_isolated(self, grantor: int, grantee: int) -> bool:
        """Whether neither can reach the other's memory, or the hypervisor's, but by grants: three different users.

        A user's own processes can read and write each other's memory through /proc and ptrace, root everybody's.
        """
        one, other = self._domains.get(grantor), self._domains.get(grantee)
        if one is None or other is None:
            return False
        mine = os.geteuid()
        return one.uid != other.uid and 0 not in (one.uid, other.uid) and mine not in (one.uid, other.uid)

    def look(self, watches: set[int]) -> None:
        """Something was closed: finish the holds that are gone."""
        for watch in list(self._extents) if Closings.ALL in watches else watches:
            self._look(watch)

    def _look(self, watch: int) -> None:
        extent, _ = self._extents.get(watch, (None, None))
        if extent is None or extent.is_slow:
            return
        start = time.thread_time_ns()
        for hold in list(extent.holds.values()):
            if not locks.is_held(extent.memfd, hold.handle):
                self._finish(extent, hold)
        self._free_if_unused(extent)
        if time.thread_time_ns() - start > _SLOW_LOOK_NS:
            # Somebody fills the inode with locks of his own, which the kernel searches one by one. Its holds now end
            # with their domains.
            extent.is_slow = True
            self._audit.record("slow", domid=extent.grantor, peer=extent.grantee, reference=extent.first_reference)

    def _hold(
        self, extent: Extent, domid: int, page: int, count: int, *, writable: bool, of_grantor: bool = False
    ) -> tuple[int, int]:
        """A handle and a descriptor; the domain holds the extent by it."""
        handle = self._next_handle
        descriptor = extent.open(handle, writable=writable)
        self._next_handle += 1
        hold = Hold(handle, domid, page, count, writable, of_grantor)
        extent.holds[handle] = hold
        table = self._tables[domid]
        self._holds[handle] = extent, hold, table
        table.holds.add(handle)
        if not of_grantor:
            table.mapped_pages += count
        return handle, descriptor

    def _drop(self, handle: int) -> None:
        extent, hold, table = self._holds.pop(handle)
        del extent.holds[handle]
        table.holds.discard(handle)
        if not hold.of_grantor:
            table.mapped_pages -= hold.pages

    def _finish(self, extent: Extent, hold: Hold) -> None:
        """The hold is gone: its notification is carried out."""
        self._drop(hold.handle)
        if hold.notification is not None:
            self._carry_out(extent, hold.domid, hold.notification)

    def _carry_out(self, extent: Extent, domid: int, notification: UnmapNotification) -> None:
        if notification.actions & NOTIFY_CLEAR_BYTE:
            extent.clear_byte(notification.page, notification.offset_bytes)
        if notification.actions & NOTIFY_SEND_EVENT:
            self._events.send(domid, notification.port)

    def _own(self, domain: DomainRecord, payload: memoryview, call: str) -> tuple[Table, Extent, int, int]:
        first, count, _ = layouts.RANGE.unpack(payload)
        table = self._tables[domain.domid]
        extent = table.find(first, count) if count else None
        if extent is None:
            text = f"{call}(references {first}+{count}): domain {domain.domid} grants no such pages in one allocation"
            raise Refused(errno.EINVAL, text)
        return table, extent, extent.page_of(first), count

    def _end(self, table: Table, extent: Extent, page: int, count: int) -> None:
        """No new mapping of these pages; notifications of the grantor's are carried out."""
        first = extent.first_reference + page
        for number in range(first, first + count):
            if table.references.pop(number, None) is not None:
                extent.live -= 1
        for at in [at for at in extent.grantor_notifications if page <= at < page + count]:
            self._carry_out(extent, extent.grantor, extent.grantor_notifications.pop(at))

    def _discharge(self, table: Table, extent: Extent) -> None:
        if extent.charged:
            extent.charged = False
            table.granted_pages -= extent.count

    def _free_if_unused(self, extent: Extent) -> None:
        if extent.live or extent.holds:
            return
        _, table = self._extents.pop(extent.watch)
        table.extents.discard(extent.watch)
        self._discharge(table, extent)
        self.closings.remove(extent.watch)
        os.close(extent.memfd)


def _charge(domain: DomainRecord, table: Table, call: str, count: int) -> None:
    quotas = domain.quotas
    if table.granted_pages + count > quotas.max_grants:
        used = f"{table.granted_pages} of max_grant_frames {quotas.max_grant_frames} ({quotas.max_grants} pages)"
        raise Refused(errno.ENOSPC, f"{call}: domain {domain.domid} grants {used}: release some")
    if (table.granted_pages + count) * _KIB_PER_PAGE > quotas.max_memkb:
        used = f"{table.granted_pages * _KIB_PER_PAGE} KiB of max_memkb {quotas.max_memkb}"
        raise Refused(errno.ENOSPC, f"{call}: domain {domain.domid} has {used}: release some")
