"""Transactions: a private idea of the tree, which becomes everybody's at once or not at all.

Optimistic: nobody is ever locked out. A transaction notes the facts it relies on; the first change to one of them by
somebody else makes it lost, and from then on it answers nothing but EAGAIN. So what it sees is always the tree of one
moment, its own changes included, and when it commits nothing that it saw is untrue.
"""

from __future__ import annotations

import errno

from usermm.hypercalls.store import MOST_TRANSACTION_NODES
from usermm.hypervisor.calls import Refused
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.store import paths
from usermm.hypervisor.store.nodes import DOMAIN_0, Node, Presence
from usermm.hypervisor.store.tree import NODE, Listing, Tree

_LAST_NUMBER = 0xFFFFFFFF


def _lost() -> Refused:
    return Refused(errno.EAGAIN, "transaction: another domain changed what it relies on: begin a new one")


class Transaction:
    """A View (see tree.py) over `tree`. Raises Refused (EAGAIN) from everything once it is lost."""

    def __init__(self, tree: Tree, presence: Presence) -> None:
        self.lost = False
        self._tree = tree
        self._presence = presence
        self._facts: dict[str, int] = {}
        self._nodes: dict[str, Node | None] = {}
        self._directories: dict[str, tuple[dict[str, bool], int]] = {}
        self._growth: dict[int, int] = {}
        self._owners: set[int] = set()
        self._announced: dict[str, bool] = {}

    def learn(self, path: str, fact: int) -> None:
        """See tree.Reader."""
        if self._facts.get(path, 0) & fact:
            self._lose()

    def domain_gone(self, domid: int) -> None:
        """Nothing can be made any more for an owner that has gone; domain 0 never counts as gone."""
        if domid != DOMAIN_0 and domid in self._owners:
            self._lose()

    def end(self) -> None:
        """Forgets everything."""
        for path in self._facts:
            self._tree.unfollow(self, path)
        for kept in (self._facts, self._nodes, self._directories, self._growth, self._owners, self._announced):
            kept.clear()

    # The view

    def peek(self, path: str) -> Node | None:
        """See View."""
        return self._nodes[path] if path in self._nodes else self._tree.peek(path)

    def rely(self, path: str, fact: int) -> None:
        """See View."""
        known = self._facts.get(path)
        if known is None:
            self._admit(1)
            self._tree.follow(self, path)
        self._facts[path] = (known or 0) | fact

    def reserve(self, changed: list[str]) -> None:
        """See View."""
        self._admit(sum(path not in self._facts for path in changed))

    def listing(self, path: str) -> Listing:
        """See View."""
        names, generation = self._tree.listing(path)
        own, changed = self._directories.get(path, ({}, 0))
        if not own:
            return Listing(names, generation)
        kept = [name for name in names if name not in own]
        return Listing(kept + [name for name, there in own.items() if there], changed)

    def owned(self, domid: int) -> int:
        """See View."""
        return self._tree.owned(domid) + self._growth.get(domid, 0)

    def put(self, path: str, node: Node) -> None:
        """See View."""
        if self._change(path, node) is None:
            self._rename(path, there=True)

    def drop(self, path: str) -> None:
        """See View."""
        self._change(path, None)
        self._rename(path, there=False)

    def announce(self, path: str, *, exact: bool = False) -> None:
        """See View."""
        self._announced[path] = exact and self._announced.get(path, True)

    def _lose(self) -> None:
        self.lost = True
        self.end()

    def _admit(self, more: int) -> None:
        if len(self._facts) + more > MOST_TRANSACTION_NODES:
            reason = f"it would touch more than {MOST_TRANSACTION_NODES} paths: do less in one"
            raise Refused(errno.EDQUOT, f"transaction: {reason}")

    def _change(self, path: str, node: Node | None) -> Node | None:
        self.rely(path, NODE)
        old = self.peek(path)
        self._nodes[path] = node
        if node is not None:
            self._owners.add(node.owner)
        for changed, by in ((old, -1), (node, 1)):
            if changed is not None and not changed.fixed:
                self._growth[changed.owner] = self._growth.get(changed.owner, 0) + by
        return old

    def _rename(self, path: str, *, there: bool) -> None:
        """Names that the tree has are True here only while removed and made again: they then come last."""
        names, _ = self._directories.get(paths.parent(path), ({}, 0))
        name = paths.name(path)
        names.pop(name, None)
        if there or self._tree.peek(path) is not None:
            names[name] = there
        # Generations of the tree count up from 0; these cannot be taken for one of them.
        self._directories[paths.parent(path)] = names, 1 << 63 | self._presence.tick()

    # Its end

    def commit(self, domain: DomainRecord) -> None:
        """Makes it the tree's truth. Refused: EAGAIN, or ENOSPC when an owner's quota has been used up meanwhile."""
        if self.lost:
            raise _lost()
        for owner, more in self._growth.items():
            most = self._presence.quotas(owner, domain.quotas).quota_entries
            if more > 0 and self._tree.owned(owner) + more > most:
                raise Refused(errno.ENOSPC, f"transaction: domain {owner} may own {most} nodes: remove some")
        nodes, announced = dict(self._nodes), dict(self._announced)
        self.end()
        for path in sorted(nodes, key=len, reverse=True):
            if nodes[path] is None and self._tree.peek(path) is not None:
                self._tree.drop(path)
        for path in sorted(nodes, key=len):
            node = nodes[path]
            if node is not None:
                self._tree.put(path, node)
        for path, exact in announced.items():
            self._tree.announce(path, exact=exact)


class Transactions:
    """Every domain's open transactions, by number."""

    def __init__(self, tree: Tree, presence: Presence) -> None:
        self._tree = tree
        self._presence = presence
        self._open: dict[int, dict[int, Transaction]] = {}
        self._last = 0

    def start(self, domain: DomainRecord) -> int:
        """The number of a new one. Refused: EDQUOT."""
        own = self._open.setdefault(domain.domid, {})
        most = domain.quotas.quota_transaction
        if len(own) >= most:
            raise Refused(errno.EDQUOT, f"transaction: domain {domain.domid} has {most} open: end one")
        self._last = self._last % _LAST_NUMBER + 1
        while self._last in own:
            self._last = self._last % _LAST_NUMBER + 1
        own[self._last] = Transaction(self._tree, self._presence)
        return self._last

    def get(self, domain: DomainRecord, number: int) -> Transaction:
        """Refused: ENOENT, or EAGAIN when it is lost."""
        transaction = self._of(domain, number)
        if transaction.lost:
            raise _lost()
        return transaction

    def finish(self, domain: DomainRecord, number: int, *, commit: bool) -> None:
        """Ends it in any case. Refused: ENOENT; for a commit EAGAIN and ENOSPC, and nothing of it has happened."""
        transaction = self._of(domain, number)
        del self._open[domain.domid][number]
        try:
            if commit:
                transaction.commit(domain)
        finally:
            transaction.end()

    def domain_gone(self, domid: int) -> None:
        """Its transactions have never been."""
        for transaction in self._open.pop(domid, {}).values():
            transaction.end()
        for others in self._open.values():
            for transaction in others.values():
                transaction.domain_gone(domid)

    def count(self, domid: int) -> int:
        """How many a domain has open."""
        return len(self._open.get(domid, ()))

    def _of(self, domain: DomainRecord, number: int) -> Transaction:
        transaction = self._open.get(domain.domid, {}).get(number)
        if transaction is None:
            raise Refused(errno.ENOENT, f"transaction({number}): the domain has none of this number: begin one")
        return transaction
