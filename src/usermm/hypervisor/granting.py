"""What a grantor asks for: memory for another domain, and to have it back."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from usermm.hypercalls import grants as layouts
from usermm.hypercalls import pools as pool_layouts
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED
from usermm.hypervisor import extents, memfds, pools
from usermm.hypervisor.calls import Refused, Reply
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.extents import Extent, UnmapNotification
from usermm.hypervisor.holding import Audit, Holding
from usermm.hypervisor.notifications import Notifications
from usermm.hypervisor.tables import MOST_PAGES, References, Table

_KIB_PER_PAGE = memfds.PAGE_BYTES // 1024


class Granting:
    """The operations ALLOCATE, POOL, RELEASE, OPEN_OWN, REVOKE and GRANTOR_NOTIFY."""

    def __init__(
        self,
        holding: Holding,
        notifications: Notifications,
        audit: Audit,
        *,
        incarnation_tag: int,
        may_grant: Callable[[DomainRecord, int], bool],
        are_isolated: Callable[[int, int], bool],
        uid_of: Callable[[int], int | None],
    ) -> None:
        self._holding = holding
        self._notifications = notifications
        self._audit = audit
        self._tag = incarnation_tag
        self._may_grant = may_grant
        self._are_isolated = are_isolated
        self._uid_of = uid_of
        self._numbers: dict[int, References] = {}

    def allocate(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """ALLOCATE: `count` fresh pages that `grantee` may map."""
        grantee, flags, count = layouts.ALLOCATE.unpack(payload)
        table = self._check(domain, grantee, count)
        first = self._references(domain).take(count, table)
        extent = self._extent(domain, grantee, flags, count)
        extent.first_reference = first
        try:
            descriptors = []
            if flags & layouts.ALLOCATE_WANT_DESCRIPTOR:
                _, descriptor = self._holding.hold(extent, domain.domid, 0, count, writable=True, of_grantor=True)
                descriptors.append(descriptor)
        except OSError:
            self._forget(extent)
            raise
        table.add(extent)
        self._record(domain, extent)
        return Reply(layouts.ALLOCATED.pack(first, self._isolated(domain, grantee)), descriptors)

    def pool(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """POOL: pages for one grantee that are granted one by one, without the hypervisor."""
        grantee, flags = pool_layouts.POOL.unpack(payload)
        table = self._check(domain, grantee, pool_layouts.PAGES)
        if len(table.pools) >= pool_layouts.MOST_POOLS:
            text = f"pool(for domain {grantee}): domain {domain.domid} has {len(table.pools)}: allocate pages singly"
            raise Refused(errno.ENOSPC, text)
        first = self._references(domain).take_block(table)
        extent = self._extent(domain, grantee, flags, pool_layouts.PAGES)
        descriptors: list[int] = []
        try:
            pool = pools.make(first)
            self._holding.make_pool(extent, pool)
            descriptors.append(memfds.reopened(pool.table, writable=True))
            descriptors.append(memfds.reopened(pool.marks, writable=False))
            _, data = self._holding.hold(extent, domain.domid, 0, extent.count, writable=True, of_grantor=True)
        except OSError:
            for descriptor in descriptors:
                os.close(descriptor)
            self._forget(extent)
            raise
        extent.first_reference = first
        table.add(extent)
        self._record(domain, extent)
        return Reply(pool_layouts.POOL_MADE.pack(first, self._isolated(domain, grantee)), [data, *descriptors])

    def _check(self, domain: DomainRecord, grantee: int, count: int) -> Table:
        call = f"allocate({count} pages for domain {grantee})"
        if grantee >= DOMID_FIRST_RESERVED or not 0 < count <= MOST_PAGES:
            text = f"{call}: pass a domid below {DOMID_FIRST_RESERVED:#x} and a count from 1 to {MOST_PAGES}"
            raise Refused(errno.EINVAL, text)
        if not self._may_grant(domain, grantee):
            self._audit.record("refuse", domid=domain.domid, call="grant", peer=grantee)
            raise Refused(errno.EACCES, f"{call}: the policy does not let domain {domain.domid} grant to it")
        table = self._holding.tables[domain.domid]
        _refuse_beyond_quota(domain, table, call, count)
        return table

    def _extent(self, domain: DomainRecord, grantee: int, flags: int, count: int) -> Extent:
        """Memory, and the hypervisor told of; the caller gives it references. Raises OSError."""
        writable = bool(flags & layouts.ALLOCATE_WRITABLE)
        memfd = memfds.sealed(extents.NAME, count)
        try:
            watch = self._holding.closings.add(memfd)
        except OSError:
            os.close(memfd)
            raise
        extent = Extent(memfd, domain.domid, domain.uid, grantee, writable, 0, count, count, watch)
        extent.grantee_uid = self._uid_of(grantee)
        self._holding.add(extent, self._holding.tables[domain.domid])
        return extent

    def _forget(self, extent: Extent) -> None:
        extent.live = 0
        self._holding.free_if_unused(extent)

    def release(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """RELEASE: the references are no longer granted; what is mapped stays until it is unmapped.

        Some of them may have ended before: revoked. A pool goes as a whole, or one reference of it.
        """
        first, count, _ = layouts.RANGE.unpack(payload)
        table = self._holding.tables[domain.domid]
        pooled = table.pools.get(pool_layouts.block_of(first))
        extent = table.find_any(first, count) if pooled is None else pooled
        if extent is None or (pooled is not None and not (count == 1 or (first, count) == _whole(pooled))):
            text = f"release(references {first}+{count}): domain {domain.domid} grants none of them"
            raise Refused(errno.EINVAL, text)
        if pooled is None:
            self._holding.end(table, extent, extent.page_of(first), count)
        elif count == 1:
            self._holding.end_pooled(pooled, first)
        else:
            self._holding.end_pool(table, pooled)
        self._audit.record("release", domid=domain.domid, reference=first, count=count)
        self._holding.look_at(extent.watch)
        return Reply()

    def open_own(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """OPEN_OWN: a writable descriptor of an extent that the domain granted."""
        table, extent, page, count = self._own(domain, payload, "open_own")
        if len(table.holds) >= domain.quotas.max_mapped:
            most = domain.quotas.max_mapped
            raise Refused(errno.ENOSPC, f"open_own: domain {domain.domid} has all {most} descriptors that it may have")
        _, descriptor = self._holding.hold(extent, domain.domid, page, count, writable=True, of_grantor=True)
        return Reply(layouts.OPENED.pack(page), [descriptor])

    def revoke(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """REVOKE: the references end, and whoever has mapped them has nothing any more."""
        first, _, _ = layouts.RANGE.unpack(payload)
        table, extent, page, count = self._own(domain, payload, "revoke")
        memfds.punch(extent.memfd, page, count)
        if extent.pool is None:
            self._holding.end(table, extent, page, count)
        else:
            self._holding.end_pooled(extent, first)
        self._audit.record("revoke", domid=domain.domid, reference=first, count=count)
        if extent.pool is None:  # a page of one can be granted again
            self._holding.take_back(extent, page, count)
        self._holding.look_at(extent.watch)
        return Reply()

    def grantor_notify(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """GRANTOR_NOTIFY: what happens when the reference ends, also by the domain's death."""
        reference, offset, actions, port = layouts.GRANTOR_NOTIFY.unpack(payload)
        table = self._holding.tables[domain.domid]
        extent = table.extent_of(reference)
        if extent is None:
            raise Refused(errno.EINVAL, f"notify(reference {reference}): domain {domain.domid} grants no such page")
        wanted = UnmapNotification(extent.page_of(reference), offset, actions, port)
        self._notifications.keep(domain, table, wanted, extent.grantor_notifications)
        table.owing_extents.add(extent.watch)
        return Reply()

    def _own(self, domain: DomainRecord, payload: memoryview, call: str) -> tuple[Table, Extent, int, int]:
        first, count, _ = layouts.RANGE.unpack(payload)
        table = self._holding.tables[domain.domid]
        extent = table.find(first, count) if count else None
        if extent is None:
            text = f"{call}(references {first}+{count}): domain {domain.domid} grants no such pages in one allocation"
            raise Refused(errno.EINVAL, text)
        return table, extent, extent.page_of(first), count

    def _references(self, domain: DomainRecord) -> References:
        return self._numbers.setdefault(domain.domid, References(self._tag))

    def _isolated(self, domain: DomainRecord, grantee: int) -> int:
        return layouts.ISOLATED if self._are_isolated(domain.domid, grantee) else 0

    def _record(self, domain: DomainRecord, extent: Extent) -> None:
        self._audit.record(
            "grant" if extent.pool is None else "pool",
            domid=domain.domid,
            peer=extent.grantee,
            reference=extent.first_reference,
            count=extent.count,
            writable=extent.writable,
        )


def _whole(pooled: Extent) -> tuple[int, int]:
    return pooled.first_reference, pool_layouts.BLOCK


def _refuse_beyond_quota(domain: DomainRecord, table: Table, call: str, count: int) -> None:
    quotas = domain.quotas
    if table.granted_pages + count > quotas.max_grants:
        used = f"{table.granted_pages} of max_grant_frames {quotas.max_grant_frames} ({quotas.max_grants} pages)"
        raise Refused(errno.ENOSPC, f"{call}: domain {domain.domid} grants {used}: release some")
    if (table.granted_pages + count) * _KIB_PER_PAGE > quotas.max_memkb:
        used = f"{table.granted_pages * _KIB_PER_PAGE} KiB of max_memkb {quotas.max_memkb}"
        raise Refused(errno.ENOSPC, f"{call}: domain {domain.domid} has {used}: release some")
