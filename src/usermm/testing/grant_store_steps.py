"""What a `ModelStore` does to its tree: a dictionary of nodes by path, that is copied for each step."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from usermm.errors import DeviceError, grant_refused

if TYPE_CHECKING:
    from usermm.testing.grant_store import ModelStore
    from usermm.testing.grant_store_domain import ModelDomain

Fact = tuple[str, str]
LETTERS = {"n": "", "r": "r", "w": "w", "b": "rw"}


@dataclass(frozen=True, eq=False)
class Entry:
    """`identity` tells two domains apart that had the same number one after the other."""

    domid: int
    identity: int
    access: str


@dataclass(frozen=True, eq=False)
class Node:
    """Its entries: the owner first. No two nodes are equal: a value written again is a change."""

    value: bytes
    entries: tuple[Entry, ...]
    fixed: bool = False


Tree = dict[str, Node]


@dataclass
class Step:
    """One look at a tree: it may be changed, what was relied upon and announced is noted."""

    model: ModelStore
    who: ModelDomain
    tree: Tree
    quotas: bool = True
    facts: set[Fact] = field(default_factory=set)
    announced: dict[str, bool] = field(default_factory=dict)

    def announce(self, path: str, exact: bool) -> None:
        """Watches are to hear of it; `exact`: only those on that very path."""
        self.announced[path] = exact and self.announced.get(path, True)

    def may(self, node: Node, letter: str) -> bool:
        """Whether who does it may."""
        return self.who.privileged or letter in self.model.rights(self.who, node)

    def may_remove(self, path: str, node: Node) -> bool:
        """The node's owner may, its directory's owner, and whom the directory names."""
        self.facts.add(("node", path))
        if self.who.privileged or node.entries[0].identity == self.who.identity:
            return True
        directory = self.tree[parent_of(path)]
        self.facts.add(("node", parent_of(path)))
        named = [entry.access for entry in directory.entries[1:] if entry.identity == self.who.identity]
        writes = bool(named) and "w" in LETTERS[named[0]]
        return directory.entries[0].identity == self.who.identity or (writes and self.may(node, "w"))

    def find(self, path: str, letter: str) -> Node | None:
        """None: it is not there, but the nearest directory allows `letter`."""
        if path in self.tree:
            self.facts.add(("node", path))
            node = self.tree[path]
        else:
            nearest = max((other for other in self.tree if is_below(path, other)), key=len)
            missing = min((each for each in ladder(path) if is_below(each, nearest)), key=len)
            self.facts |= {("node", nearest), ("node", missing)}
            node = self.tree[nearest]
        if not self.may(node, letter):
            raise refused(errno.EACCES, path)
        return self.tree.get(path)

    def existing(self, path: str, letter: str) -> Node:
        """The node; ENOENT."""
        node = self.find(path, letter)
        if node is None:
            raise refused(errno.ENOENT, path)
        return node

    def afford(self, owner: Entry, more: int, path: str) -> None:
        """ENOSPC: the owner has no room for so many."""
        if self.quotas and count(self.tree, owner.identity) + more > self.model.most_nodes(owner.domid, self.who):
            raise refused(errno.ENOSPC, path)

    def make(self, path: str, value: bytes) -> None:
        """The node and what is missing above."""
        nearest = max((other for other in self.tree if is_below(path, other)), key=len)
        first, *others = self.model.in_force(self.tree[nearest])
        if not self.who.privileged:
            first = Entry(self.who.domid, self.who.identity, first.access)
        missing = [each for each in ladder(path) if each not in self.tree]
        self.afford(first, len(missing), path)
        for each in missing:
            self.tree[each] = Node(value if each == path else b"", (first, *others))
        self.announce(path, exact=False)

    def remove_tree(self, path: str) -> None:
        """The node and all below."""
        doomed = [each for each in self.tree if each == path or is_below(each, path)]
        for each in doomed:
            self.facts |= {("node", each), ("names", each)}
            del self.tree[each]
            self.announce(each, exact=each != path)


def count(tree: Tree, identity: int) -> int:
    """How many nodes count for an owner."""
    return sum(node.entries[0].identity == identity and not node.fixed for node in tree.values())


def children(tree: Tree, path: str) -> set[str]:
    """The names in a directory."""
    return {other.rpartition("/")[2] for other in tree if other != "/" and parent_of(other) == path}


def kept(value: bytes, domid: int, identity: int, access: str) -> Node:
    """A node that the store itself made, with one entry."""
    return Node(value, (Entry(domid, identity, access),), fixed=True)


def parent_of(path: str) -> str:
    """The directory; the root's is the root."""
    return path.rpartition("/")[0] or "/"


def is_below(path: str, above: str) -> bool:
    """Whether `path` is somewhere in the directory `above`."""
    return path != above and path.startswith("/" if above == "/" else above + "/")


def ladder(path: str) -> list[str]:
    """The paths from below the root down to `path`."""
    parts = path.split("/")[1:]
    return ["/" + "/".join(parts[: number + 1]) for number in range(len(parts))]


def refused(number: int, about: str) -> DeviceError:
    """The exception that a store raises for it."""
    return grant_refused(number, f"store({about}): {errno.errorcode[number]}")
