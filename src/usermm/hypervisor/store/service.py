"""`Store`: the store as the hypervisor's loop uses it."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator
from typing import Any

from usermm.hypercalls import store as layout
from usermm.hypercalls.store import Permission
from usermm.hypervisor.calls import NotNow, Refused, Reply
from usermm.hypervisor.chores import Chores
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.store import operations, paths, requests
from usermm.hypervisor.store.nodes import DOMAIN_0, Node, Presence
from usermm.hypervisor.store.transactions import Transactions
from usermm.hypervisor.store.tree import Change, Tree
from usermm.hypervisor.store.watches import Watches

_HIDDEN = (Permission(DOMAIN_0, "n"),)
_PUBLIC = (Permission(DOMAIN_0, "r"),)
_SKELETON = {paths.ROOT: _HIDDEN, paths.parent(layout.HOMES): _HIDDEN, layout.HOMES: _PUBLIC, layout.NAMES: _PUBLIC}


class Store:
    """One thread only. Nothing waits.

    `when_writable(descriptor, callback)` has `callback` called whenever the descriptor can be written or has hung up,
    until `forget(descriptor)`, which comes before the descriptor is closed.
    """

    def __init__(
        self,
        when_writable: Callable[[int, Callable[[], None]], object],
        forget: Callable[[int], object],
        chores: Chores,
    ) -> None:
        tree, presence = Tree(), Presence()
        watches, self._chores = Watches(when_writable, forget), chores
        self._parts = requests.Parts(tree, presence, Transactions(tree, presence), watches, self._chores)
        for path, permissions in _SKELETON.items():
            self._keep(path, b"", permissions)
        for _ in tree.take_changes():
            pass

    def refuse_while_busy(self) -> None:
        """Raises NotNow while many nodes are being removed: nobody sees some of them gone and others not."""
        if self._chores.is_busy:
            raise NotNow(self._chores.when_done)

    def request(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """STORE. Refused as in hypercalls.store; struct.error for a payload that is too short; NotNow."""
        self.refuse_while_busy()
        try:
            return Reply(requests.answer(self._parts, domain, payload))
        finally:
            self._chores.add(self._telling())

    def watch(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """WATCH: path, NUL, token -> a descriptor. Refused: EINVAL, EEXIST, EDQUOT, those of socketpair(2); NotNow."""
        self.refuse_while_busy()
        raw, nul, token = bytes(payload).partition(b"\0")
        if not nul or b"\0" in token:
            raise Refused(errno.EINVAL, "watch: give a path, a NUL byte and a token without one")
        if len(token) > layout.LONGEST_TOKEN_BYTES:
            raise Refused(errno.EINVAL, f"watch: a token has at most {layout.LONGEST_TOKEN_BYTES} bytes: shorten it")
        home = layout.home(domain.domid)
        path = paths.resolve_watched(raw, home, domain.quotas.quota_pathmax, "watch")
        shown_from = 0 if raw[:1] in (b"/", b"@") else len(home) + 1
        try:
            return Reply(descriptors=(self._parts.watches.add(domain, path, token, shown_from),))
        except OSError as error:
            reason = f"watch: the hypervisor has no descriptor for it: {error.strerror}"
            raise Refused(error.errno or errno.EIO, reason) from None

    def domain_arrived(self, domain: DomainRecord) -> None:
        """Makes its home, and its name known if it can be a node's and nobody has it. Not while it is busy."""
        self._parts.presence.arrived(domain)
        home, named = layout.home(domain.domid), self._named(domain)
        self._keep(home, b"", (Permission(domain.domid, "n"),))
        self._keep(f"{home}/domid", str(domain.domid).encode(), _PUBLIC)
        self._keep(f"{home}/name", domain.name.encode(), _PUBLIC)
        if paths.is_component(domain.name) and self._parts.tree.peek(named) is None:
            self._keep(named, str(domain.domid).encode(), _PUBLIC)
        self._chores.add(self._telling())
        self._announce(layout.INTRODUCE)

    def domain_gone(self, domain: DomainRecord) -> None:
        """Removes its home and every other node that it owns, with what is below; ends its transactions and watches.

        What a domain 0 owns stays: tools come and go.
        """
        self._chores.add(self._going(domain))

    def _going(self, domain: DomainRecord) -> Iterator[None]:
        parts = self._parts
        if not parts.presence.gone(domain):
            return
        parts.watches.domain_gone(domain.domid)
        parts.transactions.domain_gone(domain.domid)
        doomed = [layout.home(domain.domid)]
        if domain.domid != DOMAIN_0:
            doomed += sorted(parts.tree.paths_of(domain.domid))  # directories before what is in them
        named = parts.tree.peek(self._named(domain))
        if named is not None and named.fixed and named.value == str(domain.domid).encode():
            doomed.append(self._named(domain))
        for path in doomed:
            if parts.tree.peek(path) is not None:
                yield from operations.removal_of_tree(parts.tree, path)
        yield from self._telling()
        self._announce(layout.RELEASE)

    def status(self) -> dict[str, Any]:
        """Plain data: how many nodes there are, and what counts for each domain's quotas."""
        parts = self._parts
        return {
            "nodes": len(parts.tree),
            "domains": {
                domain.domid: {
                    "nodes": parts.tree.owned(domain.domid),
                    "watches": parts.watches.count(domain.domid),
                    "transactions": parts.transactions.count(domain.domid),
                }
                for domain in parts.presence.records()
            },
        }

    def descriptors(self, domid: int) -> int:
        """How many of the hypervisor's a domain's watches need."""
        return self._parts.watches.count(domid)

    def close(self) -> None:
        """Ends all watches."""
        self._chores.close()
        self._parts.watches.close()

    def forget(self) -> None:
        """In a forked child: the watches are the parent's."""
        self._parts.watches.forget()

    @staticmethod
    def _named(domain: DomainRecord) -> str:
        return paths.below(layout.NAMES, domain.name)

    def _keep(self, path: str, value: bytes, permissions: tuple[Permission, ...]) -> None:
        self._parts.tree.put(path, Node(value, permissions, self._parts.presence.tick(), fixed=True))
        self._parts.tree.announce(path)

    def _telling(self) -> Iterator[None]:
        for change in self._parts.tree.take_changes():
            may_hear = functools.partial(self._may_hear, change)
            self._parts.watches.fire(change.path, may_hear, exact=change.exact)
            yield

    def _announce(self, special: str) -> None:
        self._parts.watches.fire(special, lambda _: True, exact=True)

    def _may_hear(self, change: Change, domain: DomainRecord) -> bool:
        """Whoever may read the node as it was or as it is."""
        return any(
            node is not None and self._parts.presence.may(domain, node, layout.READ)
            for node in (change.before, change.after)
        )
