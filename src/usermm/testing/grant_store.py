"""`ModelStore`: the store of a hypervisor, in plain Python and by other means, for tests of it and of its users.

    model = ModelStore()
    front = model.arrive(5)
    front.write("ring", b"8")
    with front.transaction() as transaction:
        transaction.write("ring", transaction.read("ring") + b"!")

Facts are what transactions rely on: ("node", path) for a node or its absence, ("names", path) for a directory's names.
"""

from __future__ import annotations

from usermm.testing.grant_store_domain import ModelDomain, ModelWatch
from usermm.testing.grant_store_steps import LETTERS, Entry, Node, Step, Tree, children, is_below, kept, parent_of


class ModelStore:
    """One hypervisor's store. Who arrives again under the same number is somebody else."""

    def __init__(self) -> None:
        self.domains: dict[int, ModelDomain] = {}
        self.watches: dict[tuple[int, str, str], ModelWatch] = {}
        self._arrivals = 0
        self.tree: Tree = {}
        for path, access in (("/", "n"), ("/local", "n"), ("/local/domain", "r"), ("/names", "r")):
            self.tree[path] = kept(b"", 0, 0, access)

    def arrive(
        self,
        domid: int,
        *,
        control: bool = False,
        limits: tuple[int, int, int, int] = (1000, 2048, 128, 10),
    ) -> ModelDomain:
        """A domain named `dom<domid>` comes. `limits`: nodes, bytes of a value, watches, transactions."""
        self._arrivals += 1
        identity = 0 if domid == 0 else self._arrivals
        domain = self.domains[domid] = ModelDomain(self, domid, identity, control, limits)
        step = Step(self, domain, dict(self.tree))
        home, number = f"/local/domain/{domid}", str(domid).encode()
        made = {home: kept(b"", domid, identity, "n"), f"{home}/domid": kept(number, 0, 0, "r")}
        made |= {f"{home}/name": kept(b"dom" + number, 0, 0, "r"), f"/names/dom{domid}": kept(number, 0, 0, "r")}
        step.tree |= made
        for path in made:
            step.announce(path, exact=False)
        self.settle(step)
        self._special("@introduceDomain")
        return domain

    def leave(self, domid: int) -> None:
        """It goes, and what it owns with it; what domain 0 owns stays."""
        domain = self.domains.pop(domid)
        self.watches = {key: watch for key, watch in self.watches.items() if key[0] != domid}
        for other in self.domains.values():
            for transaction in other.transactions:
                transaction.lost |= domid != 0 and domain.identity in transaction.owners
        step = Step(self, domain, dict(self.tree))
        owned = sorted(path for path, node in self.tree.items() if node.entries[0].identity == domain.identity != 0)
        for path in [f"/local/domain/{domid}", *owned, f"/names/dom{domid}"]:
            if path in step.tree:
                step.remove_tree(path)
        self.settle(step)
        self._special("@releaseDomain")

    # For the steps

    def identity(self, domid: int) -> int:
        """What a number means now; -1: nobody."""
        return 0 if domid == 0 else self.domains[domid].identity if domid in self.domains else -1

    def in_force(self, node: Node) -> tuple[Entry, ...]:
        """The entries whose domains are still there."""
        return tuple(entry for entry in node.entries if entry.identity == self.identity(entry.domid))

    def rights(self, domain: ModelDomain, node: Node) -> str:
        """Letters out of "rw"."""
        owner, *others = node.entries
        if owner.identity == domain.identity:
            return "rw"
        named = [entry.access for entry in others if entry.identity == domain.identity]
        return LETTERS[(named or [owner.access])[0]]

    def most_nodes(self, domid: int, otherwise: ModelDomain) -> int:
        """The quota of `domid`."""
        return self.domains.get(domid, otherwise).most_nodes

    def settle(self, step: Step) -> None:
        """A step becomes everybody's: transactions are lost, watches hear."""
        before, self.tree = self.tree, step.tree
        changed = {("node", path) for path in {*before, *self.tree} if before.get(path) is not self.tree.get(path)}
        for path in {parent_of(path) for _, path in changed}:
            if children(before, path) != children(self.tree, path):
                changed.add(("names", path))
        for domain in self.domains.values():
            for transaction in domain.transactions:
                transaction.lost |= bool(transaction.facts & changed)
        for path, exact in step.announced.items():
            nodes = [tree[path] for tree in (before, self.tree) if path in tree]
            for watch in self.watches.values():
                if watch.path == path or (not exact and is_below(path, watch.path)):
                    domain = watch.domain
                    if nodes and (domain.privileged or any("r" in self.rights(domain, node) for node in nodes)):
                        watch.hear(path)

    def _special(self, name: str) -> None:
        for watch in self.watches.values():
            if watch.path == name:
                watch.hear(name)
