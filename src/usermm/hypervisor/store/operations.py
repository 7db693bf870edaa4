"""What can be done with nodes, in terms of a View: the tree itself or a transaction.

Each function checks everything first and changes then, so that a refusal changes nothing. A path that nobody made is
ENOENT only to who could read (or write, as the call needs) the nearest directory that is there; to others it is EACCES.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace

from usermm.hypercalls.store import MOST_PERMISSIONS, READ, WRITE, Permission
from usermm.hypervisor.calls import Refused
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.store import paths
from usermm.hypervisor.store.nodes import Node, Presence, is_privileged
from usermm.hypervisor.store.tree import NAMES, NODE, Listing, View

_TO_DO = {READ: "read", WRITE: "write"}


@dataclass(frozen=True, slots=True)
class Act:
    """`domain` does `call` to `path`, as `view` has it."""

    view: View
    presence: Presence
    domain: DomainRecord
    call: str
    path: str

    def refused(self, number: int, reason: str) -> Refused:
        """With the call's name and path before the reason."""
        return Refused(number, f"{self.call}({paths.shown(self.path.encode())}): {reason}")


def read(act: Act) -> bytes:
    """The value. EACCES, ENOENT."""
    return _existing(act, READ).value


def listing(act: Act) -> Listing:
    """The children's names. EACCES, ENOENT."""
    _existing(act, READ)
    act.view.rely(act.path, NAMES)
    return act.view.listing(act.path)


def permissions(act: Act) -> tuple[Permission, ...]:
    """Those in force, the owner's entry first. EACCES, ENOENT."""
    return act.presence.in_force(_existing(act, READ))


def write(act: Act, value: bytes) -> None:
    """Sets the value; makes the node and the directories above where they are missing. E2BIG, EACCES, ENOSPC."""
    most = act.domain.quotas.quota_maxsize
    if len(value) > most:
        raise act.refused(errno.E2BIG, f"{len(value)} bytes of the {most} that a value may have: split it")
    node, ancestor = _find(act)
    if node is None:
        _make(act, ancestor, value)
        return
    _require(act, node, WRITE)
    act.view.put(act.path, replace(node, value=value))
    act.view.announce(act.path)


def mkdir(act: Act) -> None:
    """Makes a node without a value, and the directories above; one that is there is left alone. EACCES, ENOSPC."""
    node, ancestor = _find(act)
    if node is None:
        _make(act, ancestor, b"")
    else:
        _require(act, node, WRITE)


def removal(act: Act) -> Iterator[None]:
    """The steps that remove the node and everything below. One that is not there is well removed if its directory is.

    It is its owner's to remove, its directory's owner's, and theirs whom the directory's list names, if they may write
    both. Who may write both like everybody else may not: a stranger could take away what others put there.
    EACCES, ENOENT; EINVAL for the root, EBUSY for what the hypervisor keeps.
    """
    node, ancestor = _find(act)
    if node is None:
        _require(act, _there(act, ancestor), WRITE)
        if ancestor == paths.parent(act.path):
            return iter(())
        raise act.refused(errno.ENOENT, "neither the node nor its directory is there")
    _require_removable(act, node)
    if node.fixed:
        if act.path == paths.ROOT:
            raise act.refused(errno.EINVAL, "the root stays")
        raise act.refused(errno.EBUSY, "the hypervisor keeps this node: remove what is below it")
    return removal_of_tree(act.view, act.path)


def removal_of_tree(view: View, path: str) -> Iterator[None]:
    """Removes `path`, which is there, and everything below, whoever may, step by step: nobody may look meanwhile.

    EDQUOT in a transaction: too many.
    """
    doomed = [path]
    for each in doomed:  # it grows meanwhile
        view.rely(each, NODE | NAMES)
        for name in view.listing(each).names:
            doomed.append(paths.below(each, name))
            yield
    for each in reversed(doomed):
        view.drop(each)
        yield
    view.announce(path)
    for each in doomed[1:]:
        view.announce(each, exact=True)
        yield


def set_permissions(act: Act, wanted: tuple[Permission, ...]) -> None:
    """Replaces the list; for the owner. EACCES, ENOENT; EPERM to give it away, which only a control domain may;
    EDQUOT for too long a list; ENOENT for a domain that is not there; ENOSPC for the new owner's quota.
    """
    node = _existing(act, WRITE)
    if not act.presence.owns(act.domain, node):
        raise act.refused(errno.EACCES, "only its owner may: ask it")
    if len(wanted) > MOST_PERMISSIONS:
        raise act.refused(errno.EDQUOT, f"{len(wanted)} permissions of at most {MOST_PERMISSIONS}: name fewer domains")
    owner = wanted[0].domid
    if owner != node.owner:
        if not is_privileged(act.domain):
            raise act.refused(errno.EPERM, f"the first entry is the owner's: begin the list with {node.owner}")
        if node.fixed:
            raise act.refused(errno.EBUSY, f"the hypervisor keeps this node: its owner stays {node.owner}")
    stamp = act.presence.tick()
    for entry in wanted:
        if not act.presence.known(entry.domid, stamp):
            reason = f"there is no domain {entry.domid}: wait until it has come (watch @introduceDomain)"
            raise act.refused(errno.ENOENT, reason)
    if owner != node.owner:
        _check_quota(act, owner, 1)
    act.view.put(act.path, replace(node, permissions=wanted, stamp=stamp))
    act.view.announce(act.path)


def _find(act: Act) -> tuple[Node | None, str]:
    """The node, or the nearest directory above that is there; relied upon is just what decides that."""
    view, path = act.view, act.path
    node = view.peek(path)
    if node is not None:
        view.rely(path, NODE)
        return node, path
    missing, ancestor = path, paths.parent(path)
    while view.peek(ancestor) is None:
        missing, ancestor = ancestor, paths.parent(ancestor)
    view.rely(missing, NODE)
    view.rely(ancestor, NODE)
    return None, ancestor


def _there(act: Act, path: str) -> Node:
    node = act.view.peek(path)
    assert node is not None, "_find said that it is there"
    return node


def _existing(act: Act, wanted: int) -> Node:
    node, ancestor = _find(act)
    _require(act, node or _there(act, ancestor), wanted)
    if node is None:
        raise act.refused(errno.ENOENT, "there is no such node")
    return node


def _require(act: Act, node: Node, wanted: int) -> None:
    if not act.presence.may(act.domain, node, wanted):
        reason = f"domain {act.domain.domid} may not {_TO_DO[wanted]} it: its owner can give permission"
        raise act.refused(errno.EACCES, reason)


def _require_removable(act: Act, node: Node) -> None:
    presence, domain = act.presence, act.domain
    if presence.owns(domain, node):
        return
    above = paths.parent(act.path)
    act.view.rely(above, NODE)
    directory = _there(act, above)
    if presence.owns(domain, directory):
        return
    if presence.named(domain.domid, directory) & WRITE and presence.may(domain, node, WRITE):
        return
    reason = f"domain {domain.domid} may not remove it: its owner may, and who has the directory"
    raise act.refused(errno.EACCES, reason)


def _make(act: Act, ancestor: str, value: bytes) -> None:
    parent = _there(act, ancestor)
    _require(act, parent, WRITE)
    missing = paths.between(ancestor, act.path)
    given = act.presence.inherited(act.domain, parent)
    _check_quota(act, given[0].domid, len(missing))
    act.view.reserve(missing)
    stamp = act.presence.tick()
    for each in missing:
        act.view.put(each, Node(value if each == act.path else b"", given, stamp))
    act.view.announce(act.path)


def _check_quota(act: Act, owner: int, more: int) -> None:
    most = act.presence.quotas(owner, act.domain.quotas).quota_entries
    if act.view.owned(owner) + more > most:
        reason = f"domain {owner} may own {most} nodes and has {act.view.owned(owner)}: remove some"
        raise act.refused(errno.ENOSPC, reason)
