"""The tree as everybody sees it, and what one request changed in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from usermm.hypervisor.store import paths
from usermm.hypervisor.store.nodes import Node

NODE = 1
"""A fact about a path: whether there is a node, its value and permissions."""
NAMES = 2
"""A fact about a path: which children it has."""


class Listing(NamedTuple):
    """The children's names; equal generations of one path mean equal names in equal order."""

    names: list[str]
    generation: int


class Change(NamedTuple):
    """What watches are told: `path` was or is a node. `exact`: for those who watch that very path only."""

    path: str
    exact: bool
    before: Node | None
    after: Node | None


class Reader(Protocol):
    """A transaction, for the tree: somebody who relies on facts."""

    def learn(self, path: str, fact: int) -> None:
        """`fact` about `path` is no longer what it was."""


class View(Protocol):
    """The tree itself or a transaction's idea of it: what the operations work on."""

    def peek(self, path: str) -> Node | None:
        """The node, without relying on it."""

    def rely(self, path: str, fact: int) -> None:
        """What follows depends on `fact` about `path`. Raises Refused (EDQUOT): a transaction relies on too much."""

    def listing(self, path: str) -> Listing:
        """The names below `path`."""

    def reserve(self, changed: list[str]) -> None:
        """Before the first of several changes: makes sure that none of them is refused. Raises Refused (EDQUOT)."""

    def put(self, path: str, node: Node) -> None:
        """Makes or replaces a node whose parent is there."""

    def drop(self, path: str) -> None:
        """Removes a node that has no children."""

    def owned(self, domid: int) -> int:
        """How many nodes count for the quota of `domid`."""

    def announce(self, path: str, *, exact: bool = False) -> None:
        """Watches are to hear of `path`."""


class _Directory:
    __slots__ = ("generation", "names")

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.generation = 0


class Tree:
    """Nodes by their whole path: a look-up is one step. Readers are told of each change to a fact they rely on."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._directories: dict[str, _Directory] = {}
        self._owned: dict[int, dict[str, None]] = {}
        self._readers: dict[str, set[Reader]] = {}
        self._before: dict[str, Node | None] = {}
        self._announced: dict[str, bool] = {}
        self._generation = 0

    def __len__(self) -> int:
        return len(self._nodes)

    # What the operations ask

    def peek(self, path: str) -> Node | None:
        """See View."""
        return self._nodes.get(path)

    def rely(self, path: str, fact: int) -> None:
        """Outside a transaction nothing can change between a look and an act."""

    def reserve(self, changed: list[str]) -> None:
        """There is always room."""

    def listing(self, path: str) -> Listing:
        """See View."""
        directory = self._directories.get(path)
        return Listing([], 0) if directory is None else Listing(list(directory.names), directory.generation)

    def owned(self, domid: int) -> int:
        """See View."""
        return len(self._owned.get(domid, ()))

    def paths_of(self, domid: int) -> list[str]:
        """The nodes that count for `domid`."""
        return list(self._owned.get(domid, ()))

    # What changes it

    def put(self, path: str, node: Node) -> None:
        """See View."""
        old = self._change(path, node)
        self._nodes[path] = node
        if old is None and path != paths.ROOT:
            self._rename(path, added=True)

    def drop(self, path: str) -> None:
        """See View."""
        self._change(path, None)
        del self._nodes[path]
        self._rename(path, added=False)

    def announce(self, path: str, *, exact: bool = False) -> None:
        """See View."""
        self._announced[path] = exact and self._announced.get(path, True)

    def take_changes(self) -> Iterator[Change]:
        """What was announced since the last call, in the order of the first announcement, if it came to anything."""
        before, announced = self._before, self._announced
        self._before, self._announced = {}, {}
        for path, exact in announced.items():
            if path in before:
                change = Change(path, exact, before[path], self._nodes.get(path))
                if change.before is not None or change.after is not None:
                    yield change

    def _change(self, path: str, node: Node | None) -> Node | None:
        old = self._nodes.get(path)
        self._before.setdefault(path, old)
        self._tell(path, NODE)
        if old is not None and not old.fixed:
            owned = self._owned[old.owner]
            if node is None or node.owner != old.owner:
                del owned[path]
                if not owned:
                    del self._owned[old.owner]
        if node is not None and not node.fixed:
            self._owned.setdefault(node.owner, {})[path] = None
        return old

    def _rename(self, path: str, *, added: bool) -> None:
        parent = paths.parent(path)
        directory = self._directories.get(parent)
        if directory is None:
            directory = self._directories[parent] = _Directory()
        if added:
            directory.names[paths.name(path)] = None
        else:
            del directory.names[paths.name(path)]
            if not directory.names:
                del self._directories[parent]
        self._generation += 1
        directory.generation = self._generation
        self._tell(parent, NAMES)

    # Who relies on it

    def follow(self, reader: Reader, path: str) -> None:
        """`reader` learns of changes to facts about `path`."""
        self._readers.setdefault(path, set()).add(reader)

    def unfollow(self, reader: Reader, path: str) -> None:
        """No longer."""
        readers = self._readers[path]
        readers.discard(reader)
        if not readers:
            del self._readers[path]

    def _tell(self, path: str, fact: int) -> None:
        for reader in tuple(self._readers.get(path, ())):
            reader.learn(path, fact)
