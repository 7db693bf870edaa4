"""A domain at a `ModelStore`: its calls, transactions and watches, with the methods and errors of the real ones.

A transaction is the list of what was done in it, done again on the tree of the moment whenever somebody looks. It is
lost when a step of others changes a fact that it has asked for.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from usermm.testing.grant_store_steps import Entry, Fact, Step, children, count, parent_of, refused

if TYPE_CHECKING:
    from usermm.testing.grant_store import ModelStore


class ModelNodes:
    """The methods of `Store` that work on nodes. Errors are those of `Store`."""

    def __init__(self, domain: ModelDomain) -> None:
        self.domain = domain

    def read(self, path: str) -> bytes:
        """The value."""
        value: bytes = self._do(lambda step: step.existing(self._path(path), "r").value)
        return value

    def list(self, path: str) -> list[str]:
        """The children's names, sorted."""

        def act(step: Step) -> Any:
            step.existing(self._path(path), "r")
            step.facts.add(("names", self._path(path)))
            return sorted(children(step.tree, self._path(path)))

        names: list[str] = self._do(act)
        return names

    def exists(self, path: str) -> bool:
        """Whether it is there."""
        return bool(self._do(lambda step: step.find(self._path(path), "r") is not None))

    def permissions(self, path: str) -> Any:
        """(domid, letter) of those that are in force."""

        def act(step: Step) -> Any:
            entries = step.model.in_force(step.existing(self._path(path), "r"))
            return [(entry.domid, entry.access) for entry in entries]

        return self._do(act)

    def write(self, path: str, value: bytes) -> None:
        """Sets a value, making what is missing."""

        def act(step: Step) -> None:
            where = self._path(path)
            if len(value) > self.domain.most_bytes:
                raise refused(errno.E2BIG, path)
            node = step.find(where, "w")
            if node is None:
                step.make(where, value)
            else:
                step.tree[where] = replace(node, value=value)
                step.announce(where, exact=False)

        self._do(act)

    def mkdir(self, path: str) -> None:
        """Makes it if it is not there."""

        def act(step: Step) -> None:
            if step.find(self._path(path), "w") is None:
                step.make(self._path(path), b"")

        self._do(act)

    def remove(self, path: str) -> None:
        """Removes it and all below."""

        def act(step: Step) -> None:
            where = self._path(path)
            node = step.tree.get(where)
            if node is None:
                step.find(where, "w")
                if parent_of(where) not in step.tree:
                    raise refused(errno.ENOENT, path)
            elif not step.may_remove(where, node):
                raise refused(errno.EACCES, path)
            if node is not None and node.fixed:
                raise refused(errno.EINVAL if where == "/" else errno.EBUSY, path)
            if node is not None:
                step.remove_tree(where)

        self._do(act)

    def set_permissions(self, path: str, *permissions: tuple[int, str]) -> None:
        """Replaces the list."""
        resolved = tuple(Entry(domid, self.domain.model.identity(domid), access) for domid, access in permissions)

        def act(step: Step) -> None:
            where = self._path(path)
            node = step.existing(where, "w")
            if not self.domain.privileged and node.entries[0].identity != self.domain.identity:
                raise refused(errno.EACCES, path)
            moved = resolved[0].domid != node.entries[0].domid
            if moved and not self.domain.privileged:
                raise refused(errno.EPERM, path)
            if moved and node.fixed:
                raise refused(errno.EBUSY, path)
            if any(entry.identity < 0 for entry in resolved):
                raise refused(errno.ENOENT, path)
            if moved:
                step.afford(resolved[0], 1, path)
            step.tree[where] = replace(node, entries=resolved)
            step.announce(where, exact=False)

        self._do(act)

    def _path(self, path: str) -> str:
        home = f"/local/domain/{self.domain.domid}"
        return path if path.startswith("/") else f"{home}/{path}" if path else home

    def _do(self, act: Callable[[Step], Any]) -> Any:
        raise NotImplementedError


class ModelTransaction(ModelNodes):
    """As `Transaction`."""

    def __init__(self, domain: ModelDomain) -> None:
        super().__init__(domain)
        self.lost = self.ended = False
        self.facts: set[Fact] = set()
        self.owners: set[int] = set()
        self._log: list[Callable[[Step], Any]] = []
        domain.transactions.append(self)

    def commit(self) -> None:
        """Everybody's, or EAGAIN, or ENOSPC."""
        self.abort()
        if self.lost:
            raise refused(errno.EAGAIN, "commit")
        model, step = self.domain.model, self._replayed()
        for domid in {node.entries[0].domid for node in step.tree.values()}:
            had, has = (count(tree, model.identity(domid)) for tree in (model.tree, step.tree))
            if has > had and has > model.most_nodes(domid, self.domain):
                raise refused(errno.ENOSPC, "commit")
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

    def _replayed(self) -> Step:
        step = Step(self.domain.model, self.domain, dict(self.domain.model.tree), quotas=False)
        for act in self._log:
            act(step)
        return step

    def _do(self, act: Callable[[Step], Any]) -> Any:
        if self.lost:
            raise refused(errno.EAGAIN, "transaction")
        before = self._replayed().tree
        step = Step(self.domain.model, self.domain, dict(before))
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
            raise refused(errno.EDQUOT, "transaction")
        return ModelTransaction(self)

    def watch(self, path: str, token: str = "") -> ModelWatch:
        """A watch; `unwatch` ends it."""
        where = path if path.startswith("@") else self._path(path)
        own = [key for key in self.model.watches if key[0] == self.domid]
        if (self.domid, where, token) in own:
            raise refused(errno.EEXIST, path)
        if len(own) >= self.most_watches:
            raise refused(errno.EDQUOT, path)
        watch = ModelWatch(self, where, relative=path[:1] not in "/@")
        self.model.watches[self.domid, where, token] = watch
        return watch

    def unwatch(self, path: str, token: str = "") -> None:
        """What closing a watch does."""
        del self.model.watches[self.domid, path if path.startswith("@") else self._path(path), token]

    def _do(self, act: Callable[[Step], Any]) -> Any:
        step = Step(self.model, self, dict(self.model.tree))
        answer = act(step)
        self.model.settle(step)
        return answer
