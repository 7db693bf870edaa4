"""`ModelStore`: the store of a hypervisor, in plain Python and by other means, for tests of it and of its users.

    model = ModelStore()
    front = model.arrive(5)
    front.write("ring", b"8")
    with front.transaction() as transaction:
        transaction.write("ring", transaction.read("ring") + b"!")

The tree is a dictionary that is copied for each step. A transaction is the list of what was done in it, done again on
the tree of the moment whenever somebody looks. It is lost when a step changes a fact that it has asked for: ("node",
path) for a node or its absence, ("names", path) for a directory's names.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from usermm.errors import DeviceError, grant_refused

LETTERS = {"n": "", "r": "r", "w": "w", "b": "rw"}

Fact = tuple[str, str]


@dataclass(frozen=True, eq=False)
class _Entry:
    domid: int
    identity: int
    access: str


@dataclass(frozen=True, eq=False)
class _Node:
    value: bytes
    entries: tuple[_Entry, ...]
    fixed: bool = False


Tree = dict[str, _Node]


@dataclass
class _Step:
    """One look at a tree: it may be changed, what was relied upon and announced is noted."""

    model: ModelStore
    who: ModelDomain
    tree: Tree
    quotas: bool = True
    facts: set[Fact] = field(default_factory=set)
    announced: dict[str, bool] = field(default_factory=dict)

    def announce(self, path: str, exact: bool) -> None:
        self.announced[path] = exact and self.announced.get(path, True)

    def may(self, node: _Node, letter: str) -> bool:
        return self.who.privileged or letter in self.model.rights(self.who, node)

    def find(self, path: str, letter: str) -> _Node | None:
        """None: it is not there, but the nearest directory allows `letter`."""
        if path in self.tree:
            self.facts.add(("node", path))
            node = self.tree[path]
        else:
            nearest = max((other for other in self.tree if _is_below(path, other)), key=len)
            missing = min((each for each in _ladder(path) if _is_below(each, nearest)), key=len)
            self.facts |= {("node", nearest), ("node", missing)}
            node = self.tree[nearest]
        if not self.may(node, letter):
            raise _refused(errno.EACCES, path)
        return self.tree.get(path)

    def existing(self, path: str, letter: str) -> _Node:
        node = self.find(path, letter)
        if node is None:
            raise _refused(errno.ENOENT, path)
        return node

    def afford(self, owner: _Entry, more: int, path: str) -> None:
        if self.quotas and count(self.tree, owner.identity) + more > self.model.most_nodes(owner.domid, self.who):
            raise _refused(errno.ENOSPC, path)

    def make(self, path: str, value: bytes) -> None:
        nearest = max((other for other in self.tree if _is_below(path, other)), key=len)
        first, *others = self.model.in_force(self.tree[nearest])
        if not self.who.privileged:
            first = _Entry(self.who.domid, self.who.identity, first.access)
        missing = [each for each in _ladder(path) if each not in self.tree]
        self.afford(first, len(missing), path)
        for each in missing:
            self.tree[each] = _Node(value if each == path else b"", (first, *others))
        self.announce(path, exact=False)

    def remove_tree(self, path: str) -> None:
        doomed = [each for each in self.tree if each == path or _is_below(each, path)]
        for each in doomed:
            self.facts |= {("node", each), ("names", each)}
            del self.tree[each]
            self.announce(each, exact=each != path)


class ModelNodes:
    """The methods of `Store` that work on nodes. Errors are those of `Store`."""

    def __init__(self, domain: ModelDomain) -> None:
        self.domain = domain

    def read(self, path: str) -> bytes:
        """The value."""
        return self._do(lambda step: step.existing(self._path(path), "r").value)

    def list(self, path: str) -> list[str]:
        """The children's names, sorted."""

        def act(step: _Step) -> Any:
            step.existing(self._path(path), "r")
            step.facts.add(("names", self._path(path)))
            return sorted(children(step.tree, self._path(path)))

        return self._do(act)

    def exists(self, path: str) -> bool:
        """Whether it is there."""
        return self._do(lambda step: step.find(self._path(path), "r") is not None)

    def permissions(self, path: str) -> Any:
        """(domid, letter) of those that are in force."""

        def act(step: _Step) -> Any:
            entries = step.model.in_force(step.existing(self._path(path), "r"))
            return [(entry.domid, entry.access) for entry in entries]

        return self._do(act)

    def write(self, path: str, value: bytes) -> None:
        """Sets a value, making what is missing."""

        def act(step: _Step) -> None:
            where = self._path(path)
            if len(value) > self.domain.most_bytes:
                raise _refused(errno.E2BIG, path)
            node = step.find(where, "w")
            if node is None:
                step.make(where, value)
            else:
                step.tree[where] = replace(node, value=value)
                step.announce(where, exact=False)

        self._do(act)

    def mkdir(self, path: str) -> None:
        """Makes it if it is not there."""

        def act(step: _Step) -> None:
            if step.find(self._path(path), "w") is None:
                step.make(self._path(path), b"")

        self._do(act)

    def remove(self, path: str) -> None:
        """Removes it and all below."""

        def act(step: _Step) -> None:
            where = self._path(path)
            node = step.find(where, "w")
            if node is None and _parent(where) not in step.tree:
                raise _refused(errno.ENOENT, path)
            if node is not None and node.fixed:
                raise _refused(errno.EINVAL if where == "/" else errno.EBUSY, path)
            if node is not None:
                step.remove_tree(where)

        self._do(act)

    def set_permissions(self, path: str, *permissions: tuple[int, str]) -> None:
        """Replaces the list."""
        resolved = tuple(_Entry(domid, self.domain.model.identity(domid), access) for domid, access in permissions)

        def act(step: _Step) -> None:
            where = self._path(path)
            node = step.existing(where, "w")
            if not self.domain.privileged and node.entries[0].identity != self.domain.identity:
                raise _refused(errno.EACCES, path)
            moved = resolved[0].domid != node.entries[0].domid
            if moved and not self.domain.privileged:
                raise _refused(errno.EPERM, path)
            if moved and node.fixed:
                raise _refused(errno.EBUSY, path)
            if any(entry.identity < 0 for entry in resolved):
                raise _refused(errno.ENOENT, path)
            if moved:
                step.afford(resolved[0], 1, path)
            step.tree[where] = replace(node, entries=resolved)
            step.announce(where, exact=False)

        self._do(act)

    def _path(self, path: str) -> str:
        return path if path.startswith("/") else f"/local/domain/{self.domain.domid}/{path}"

    def _do(self, act: Callable[[_Step], Any]) -> Any:
        raise NotImplementedError


class ModelTransaction(ModelNodes):
    """As `Transaction`."""

    def __init__(self, domain: ModelDomain) -> None:
        super().__init__(domain)
        self.lost = self.ended = False
        self.facts: set[Fact] = set()
        self.owners: set[int] = set()
        self._log: list[Callable[[_Step], Any]] = []
        domain.transactions.append(self)

    def commit(self) -> None:
        """Everybody's, or EAGAIN, or ENOSPC."""
        self.abort()
        if self.lost:
            raise _refused(errno.EAGAIN, "commit")
        model, step = self.domain.model, self._replayed()
        for domid in {node.entries[0].domid for node in step.tree.values()}:
            had, has = (count(tree, model.identity(domid)) for tree in (model.tree, step.tree))
            if has > had and has > model.most_nodes(domid, self.domain):
                raise _refused(errno.ENOSPC, "commit")
        model.settle(step)

    def abort(self) -> None:
        """It has never been."""
        if not self.ended:
            self.ended = True
            self.domain.transactions.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            self.abort()
        elif not self.ended:
            self.commit()

    def _replayed(self) -> _Step:
        step = _Step(self.domain.model, self.domain, dict(self.domain.model.tree), quotas=False)
        for act in self._log:
            act(step)
        return step

    def _do(self, act: Callable[[_Step], Any]) -> Any:
        if self.lost:
            raise _refused(errno.EAGAIN, "transaction")
        before = self._replayed().tree
        step = _Step(self.domain.model, self.domain, dict(before))
        try:
            answer = act(step)
        finally:
            self.facts |= step.facts
        changed = {path for path, node in step.tree.items() if before.get(path) is not node}
        self.facts |= {("node", path) for path in changed}
        self.owners |= {step.tree[path].entries[0].identity for path in changed}
        if step.announced:
            self._log.append(act)
        return answer


class ModelWatch:
    """`read` gives the paths that came since the last call, each once."""

    def __init__(self, domain: ModelDomain, path: str, relative: bool) -> None:
        self.domain = domain
        self.path = path
        self._skip = len(f"/local/domain/{domain.domid}/") if relative else 0
        self._paths = {path[self._skip :]: None}

    def hear(self, path: str) -> None:
        """An event."""
        self._paths[path[self._skip :]] = None

    def read(self) -> list[str]:
        """Never waits."""
        found, self._paths = list(self._paths), {}
        return found


class ModelDomain(ModelNodes):
    """As `Store`, of one domain. Limits: nodes, bytes of a value, watches and transactions at a time."""

    def __init__(self, model: ModelStore, domid: int, identity: int, control: bool, limits: Iterable[int]) -> None:
        super().__init__(self)
        self.model = model
        self.domid = domid
        self.identity = identity
        self.privileged = control or domid == 0
        self.most_nodes, self.most_bytes, self.most_watches, self.most_transactions = limits
        self.transactions: list[ModelTransaction] = []

    def transaction(self) -> ModelTransaction:
        """Begins one."""
        if len(self.transactions) >= self.most_transactions:
            raise _refused(errno.EDQUOT, "transaction")
        return ModelTransaction(self)

    def watch(self, path: str, token: str = "") -> ModelWatch:
        """A watch; `unwatch` ends it."""
        where = path if path.startswith("@") else self._path(path)
        own = [key for key in self.model.watches if key[0] == self.domid]
        if (self.domid, where, token) in own:
            raise _refused(errno.EEXIST, path)
        if len(own) >= self.most_watches:
            raise _refused(errno.EDQUOT, path)
        watch = ModelWatch(self, where, relative=path[:1] not in "/@")
        self.model.watches[self.domid, where, token] = watch
        return watch

    def unwatch(self, path: str, token: str = "") -> None:
        """What closing a watch does."""
        del self.model.watches[self.domid, path if path.startswith("@") else self._path(path), token]

    def _do(self, act: Callable[[_Step], Any]) -> Any:
        step = _Step(self.model, self, dict(self.model.tree))
        answer = act(step)
        self.model.settle(step)
        return answer


class ModelStore:
    """One hypervisor's store. Who arrives again under the same number is somebody else."""

    def __init__(self) -> None:
        self.domains: dict[int, ModelDomain] = {}
        self.watches: dict[tuple[int, str, str], ModelWatch] = {}
        self._arrivals = 0
        self.tree: Tree = {}
        for path, access in (("/", "n"), ("/local", "n"), ("/local/domain", "r"), ("/names", "r")):
            self.tree[path] = _kept(b"", 0, 0, access)

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
        step = _Step(self, domain, dict(self.tree))
        home, number = f"/local/domain/{domid}", str(domid).encode()
        made = {home: _kept(b"", domid, identity, "n"), f"{home}/domid": _kept(number, 0, 0, "r")}
        made |= {f"{home}/name": _kept(b"dom" + number, 0, 0, "r"), f"/names/dom{domid}": _kept(number, 0, 0, "r")}
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
        step = _Step(self, domain, dict(self.tree))
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

    def in_force(self, node: _Node) -> tuple[_Entry, ...]:
        """The entries whose domains are still there."""
        return tuple(entry for entry in node.entries if entry.identity == self.identity(entry.domid))

    def rights(self, domain: ModelDomain, node: _Node) -> str:
        """Letters out of "rw"."""
        owner, *others = node.entries
        if owner.identity == domain.identity:
            return "rw"
        named = [entry.access for entry in others if entry.identity == domain.identity]
        return LETTERS[(named or [owner.access])[0]]

    def most_nodes(self, domid: int, otherwise: ModelDomain) -> int:
        """The quota of `domid`."""
        return self.domains.get(domid, otherwise).most_nodes

    def settle(self, step: _Step) -> None:
        """A step becomes everybody's: transactions are lost, watches hear."""
        before, self.tree = self.tree, step.tree
        changed = {("node", path) for path in {*before, *self.tree} if before.get(path) is not self.tree.get(path)}
        for path in {_parent(path) for _, path in changed}:
            if children(before, path) != children(self.tree, path):
                changed.add(("names", path))
        for domain in self.domains.values():
            for transaction in domain.transactions:
                transaction.lost |= bool(transaction.facts & changed)
        for path, exact in step.announced.items():
            nodes = [tree[path] for tree in (before, self.tree) if path in tree]
            for watch in self.watches.values():
                if watch.path == path or (not exact and _is_below(path, watch.path)):
                    domain = watch.domain
                    if nodes and (domain.privileged or any("r" in self.rights(domain, node) for node in nodes)):
                        watch.hear(path)

    def _special(self, name: str) -> None:
        for watch in self.watches.values():
            if watch.path == name:
                watch.hear(name)


def count(tree: Tree, identity: int) -> int:
    """How many nodes count for an owner."""
    return sum(node.entries[0].identity == identity and not node.fixed for node in tree.values())


def children(tree: Tree, path: str) -> set[str]:
    """The names in a directory."""
    return {other.rpartition("/")[2] for other in tree if other != "/" and _parent(other) == path}


def _kept(value: bytes, domid: int, identity: int, access: str) -> _Node:
    return _Node(value, (_Entry(domid, identity, access),), fixed=True)


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _is_below(path: str, above: str) -> bool:
    return path != above and path.startswith("/" if above == "/" else above + "/")


def _ladder(path: str) -> list[str]:
    parts = path.split("/")[1:]
    return ["/" + "/".join(parts[: number + 1]) for number in range(len(parts))]


def _refused(number: int, about: str) -> DeviceError:
    return grant_refused(number, f"store({about}): {errno.errorcode[number]}")
