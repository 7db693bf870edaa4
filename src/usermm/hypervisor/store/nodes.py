"""A node, and who may do what with it."""

from __future__ import annotations

from dataclasses import dataclass

from usermm.hypercalls import store as layout
from usermm.hypercalls.store import Permission
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.quotas import Quotas

DOMAIN_0 = 0


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """`stamp` is when its permissions were given: they mean the domains that were there then, not later ones of the
    same number. `fixed` nodes are made and removed by the hypervisor alone and count for nobody's quota."""

    value: bytes
    permissions: tuple[Permission, ...]
    stamp: int
    fixed: bool = False

    @property
    def owner(self) -> int:
        """Who may do everything with it, and whose quota it counts for."""
        return self.permissions[0].domid


class Presence:
    """The domains that are here, and since when. Domain 0 counts as here always: its nodes outlive a tool's run."""

    def __init__(self) -> None:
        self._clock = 0
        self._arrivals: dict[int, int] = {}
        self._records: dict[int, DomainRecord] = {}

    def tick(self) -> int:
        """A number higher than all before."""
        self._clock += 1
        return self._clock

    def arrived(self, domain: DomainRecord) -> None:
        """`domain` is here from now on."""
        self._arrivals[domain.domid] = self.tick()
        self._records[domain.domid] = domain

    def gone(self, domain: DomainRecord) -> bool:
        """Whether it was here."""
        self._arrivals.pop(domain.domid, None)
        return self._records.pop(domain.domid, None) is not None

    def here(self, domid: int) -> bool:
        """Whether there is such a domain."""
        return domid in self._records

    def records(self) -> list[DomainRecord]:
        """All that are here."""
        return list(self._records.values())

    def known(self, domid: int, stamp: int) -> bool:
        """Whether `domid` in permissions of the time `stamp` is the domain that has this number now."""
        arrival = self._arrivals.get(domid)
        return domid == DOMAIN_0 or (arrival is not None and arrival < stamp)

    def quotas(self, domid: int, otherwise: Quotas) -> Quotas:
        """Those of `domid`; domain 0's, while nobody is domain 0, are `otherwise`."""
        record = self._records.get(domid)
        return otherwise if record is None else record.quotas

    def may(self, domain: DomainRecord, node: Node, wanted: int) -> bool:
        """Whether `domain` may do `wanted` (READ, WRITE or both) with `node`."""
        return is_privileged(domain) or self.granted(domain.domid, node) & wanted == wanted

    def owns(self, domain: DomainRecord, node: Node) -> bool:
        """Whether `domain` may do with `node` what only its owner may."""
        return is_privileged(domain) or (node.owner == domain.domid and self.known(node.owner, node.stamp))

    def granted(self, domid: int, node: Node) -> int:
        """The bits that `domid` has by the node's permissions: the owner all, the first entry for it, or the rest's."""
        if node.owner == domid and self.known(domid, node.stamp):
            return layout.READ | layout.WRITE
        named = self._entry_of(domid, node)
        return layout.ACCESS_LETTERS.index(node.permissions[0].access if named is None else named)

    def named(self, domid: int, node: Node) -> int:
        """The bits that `domid` has because an exception names it."""
        return layout.ACCESS_LETTERS.index(self._entry_of(domid, node) or "n")

    def _entry_of(self, domid: int, node: Node) -> str | None:
        for entry in node.permissions[1:]:
            if entry.domid == domid and self.known(domid, node.stamp):
                return entry.access
        return None

    def in_force(self, node: Node) -> tuple[Permission, ...]:
        """The node's permissions without those of domains that have gone."""
        return tuple(entry for entry in node.permissions if self.known(entry.domid, node.stamp))

    def inherited(self, domain: DomainRecord, parent: Node) -> tuple[Permission, ...]:
        """Of a node that `domain` makes below `parent`: the same, with the maker as owner.

        As in xenstore a privileged maker leaves the owner as it is: what it puts into a domain's home is the domain's.
        """
        owner, *others = self.in_force(parent)
        if not is_privileged(domain):
            owner = Permission(domain.domid, owner.access)
        return (owner, *others)


def is_privileged(domain: DomainRecord) -> bool:
    """Whether permissions do not bind it."""
    return domain.control or domain.domid == DOMAIN_0
