"""Grant tables, put together: a domain's arrival and end, and the operations of both sides."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Mapping as Dictionary

from usermm.hypervisor.chores import Chores
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.granting import Granting
from usermm.hypervisor.holding import Audit, Events, Holding
from usermm.hypervisor.mapping import Mapping
from usermm.hypervisor.notifications import Notifications
from usermm.hypervisor.tables import Table


class Grants:
    """`granting` and `mapping` have the operations, `holding` the truth."""

    def __init__(
        self,
        domains: Dictionary[int, DomainRecord],
        events: Events,
        audit: Audit,
        *,
        incarnation_tag: int,
        may_grant: Callable[[DomainRecord, int], bool],
        chores: Chores,
    ) -> None:
        self._domains = domains
        self._may_grant = may_grant
        self._chores = chores
        notifications = Notifications(events)
        self.holding = Holding(events, audit, chores)
        self.granting = Granting(
            self.holding,
            notifications,
            audit,
            incarnation_tag=incarnation_tag,
            may_grant=may_grant,
            are_isolated=self.are_isolated,
            uid_of=self._uid_of,
        )
        self.mapping = Mapping(self.holding, notifications, audit, are_isolated=self.are_isolated)

    def domain_arrived(self, domain: DomainRecord) -> None:
        """The domain's table is empty."""
        self.holding.tables[domain.domid] = Table()

    def domain_gone(self, domain: DomainRecord) -> None:
        """Nothing of it can be mapped any more; what is mapped lives until it is unmapped.

        What others are owed is done at once: notifications, and that its pools, and those for it, are closed. The rest,
        which nobody sees, may take a while.
        """
        table = self.holding.tables.pop(domain.domid)
        self.holding.pay_debts(table)
        closed = self.holding.close_pools_for(domain.domid)
        for extent in list(table.pools.values()):
            self.holding.end_pool(table, extent)
        self._chores.add(self.holding.clean_up(table, closed))

    def close_pools(self, domain: DomainRecord) -> None:
        """Those for whom the policy lets the domain grant to no longer: what they grant stays, and nothing more is."""
        for extent in self.holding.tables[domain.domid].pools.values():
            if extent.pool is not None and not self._may_grant(domain, extent.grantee):
                extent.pool.close_to_new()

    def are_isolated(self, grantor: int, grantee: int) -> bool:
        """Whether neither can reach the other's memory, or the hypervisor's, but by grants: three different users.

        A user's own processes can read and write each other's memory through /proc and ptrace, root everybody's.
        """
        one, other = self._domains.get(grantor), self._domains.get(grantee)
        if one is None or other is None:
            return False
        mine = os.geteuid()
        return one.uid != other.uid and 0 not in (one.uid, other.uid) and mine not in (one.uid, other.uid)

    def _uid_of(self, domid: int) -> int | None:
        domain = self._domains.get(domid)
        return None if domain is None else domain.uid
