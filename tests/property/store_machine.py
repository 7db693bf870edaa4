"""Several domains at the real store and at the model, with transactions, watches, arrivals and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.stores import World

from usermm.errors import DeviceError
from usermm.grants.store import Store, Transaction
from usermm.grants.store_watch import Watch
from usermm.testing.grant_store import ModelStore
from usermm.testing.grant_store_domain import ModelDomain, ModelTransaction, ModelWatch

DOMIDS = (0, 5, 6, 9)
CONTROL = 9
LIMITS = (6, 20, 3, 2)
QUOTAS = {"quota_entries": 6, "quota_maxsize": 64, "quota_maxwatch": 3, "quota_transaction": 2}

domids = st.sampled_from(DOMIDS)
parts = st.sampled_from(["a", "b"])
relative = st.lists(parts, min_size=1, max_size=3).map("/".join)
roots = st.sampled_from(["/s", "/s", "/local/domain/5", "/local/domain/6", "/local/domain", "/names", "/"])
absolute = st.builds(lambda root, rest: "/".join([root.rstrip("/"), *rest]) or "/", roots, st.lists(parts, max_size=2))
shared = st.sampled_from(["/s", "/s/a", "/s/b", "/s/a/a"])
anywhere = relative | absolute | shared
values = st.sampled_from([b"", b"1", b"2", b"x" * 64, b"x" * 65])
entries = st.lists(st.tuples(domids, st.sampled_from("nrwb")), min_size=1, max_size=3)
picks = st.integers(0, 5)
"""0: no transaction, else one of those that are open."""


class StoreMachine(RuleBasedStateMachine):
    """Both get the same calls and must answer the same, errors by their errno."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.model = ModelStore()
        self.sides: dict[int, tuple[Store, ModelDomain]] = {}
        self.transactions: dict[int, list[tuple[Transaction, ModelTransaction]]] = {}
        self.watches: dict[tuple[int, str, str], tuple[Watch, ModelWatch]] = {}
        for domid in DOMIDS[:3]:
            self.arrive(domid)
        for store in self.sides[0]:
            store.mkdir("/s")
            store.set_permissions("/s", (0, "b"))

    @rule(domid=domids)
    def arrive(self, domid: int) -> None:
        if domid not in self.sides:
            control = domid == CONTROL
            real = self.world.arrive(domid, control=control, **QUOTAS)
            limits = (QUOTAS["quota_entries"], QUOTAS["quota_maxsize"], *LIMITS[2:])
            self.sides[domid] = real, self.model.arrive(domid, control=control, limits=limits)
            self.transactions[domid] = []

    @precondition(lambda self: len(self.sides) > 1)
    @rule(domid=domids)
    def leave(self, domid: int) -> None:
        if domid not in self.sides:
            return
        self.world.leave(domid)
        self.model.leave(domid)
        del self.sides[domid]
        for real, _ in self.transactions.pop(domid):
            real._number = 0
        for key in [key for key in self.watches if key[0] == domid]:
            self.watches.pop(key)[0].close()

    @rule(domid=domids, pick=picks, path=anywhere, call=st.sampled_from(["read", "list", "exists", "permissions"]))
    def look(self, domid: int, pick: int, path: str, call: str) -> None:
        self.both(domid, pick, lambda nodes: getattr(nodes, call)(path))

    @rule(domid=domids, pick=picks, path=anywhere, value=values)
    def write(self, domid: int, pick: int, path: str, value: bytes) -> None:
        self.both(domid, pick, lambda nodes: nodes.write(path, value))

    @rule(domid=domids, pick=picks, path=anywhere)
    def mkdir(self, domid: int, pick: int, path: str) -> None:
        self.both(domid, pick, lambda nodes: nodes.mkdir(path))

    @rule(domid=domids, pick=picks, path=anywhere)
    def remove(self, domid: int, pick: int, path: str) -> None:
        self.both(domid, pick, lambda nodes: nodes.remove(path))

    @rule(domid=domids, pick=picks, path=anywhere, permissions=entries, own=st.booleans())
    def set_permissions(self, domid: int, pick: int, path: str, permissions: list[Any], own: bool) -> None:
        if own:
            permissions = [(domid, permissions[0][1]), *permissions[1:]]
        self.both(domid, pick, lambda nodes: nodes.set_permissions(path, *permissions))

    @rule(domid=domids)
    def start(self, domid: int) -> None:
        if domid in self.sides:
            answers = self.both(domid, 0, lambda side: side.transaction())
            if isinstance(answers[0], Transaction):
                self.transactions[domid].append(answers)

    @rule(domid=domids, other=domids, path=shared, name=parts, commit=st.booleans())
    def look_while_another_changes(self, domid: int, other: int, path: str, name: str, commit: bool) -> None:
        """What chance brings together too rarely: a transaction that has looked, and a change to what it saw."""
        self.start(domid)
        if self.transactions.get(domid):
            newest = len(self.transactions[domid])
            self.both(domid, newest, lambda nodes: nodes.list(path))
            self.both(domid, newest, lambda nodes: nodes.write("/s/seen", b""))
            self.both(other, 0, lambda nodes: nodes.mkdir(f"{path}/{name}"))
            self.end(domid, newest - 1, commit)

    @rule(owner=domids, domid=domids, access=st.sampled_from("rwb"), path=shared)
    def let_in_and_come_again(self, owner: int, domid: int, access: str, path: str) -> None:
        """Who is let in by name goes, and somebody else comes under its number."""
        self.both(owner, 0, lambda nodes: nodes.mkdir(path))
        self.both(owner, 0, lambda nodes: nodes.set_permissions(path, (owner, "n"), (domid, access)))
        self.both(domid, 0, lambda nodes: nodes.read(path))
        if domid in self.sides and len(self.sides) > 1:
            self.leave(domid)
            self.arrive(domid)
        self.both(domid, 0, lambda nodes: nodes.read(path))

    @rule(owner=domids, maker=domids, domid=domids, access=st.sampled_from("nrwb"), path=shared, name=parts,
          by_name=st.booleans(), pick=picks)
    def remove_what_another_made(  # noqa: PLR0917
        self, owner: int, maker: int, domid: int, access: str, path: str, name: str, by_name: bool, pick: int
    ) -> None:
        """In a directory of a third one's, which says who may write to it."""
        self.both(owner, 0, lambda nodes: nodes.mkdir(path))
        others = ((owner, "w"), (domid, access)) if by_name else ((owner, access),)
        self.both(owner, 0, lambda nodes: nodes.set_permissions(path, *others))
        self.both(maker, 0, lambda nodes: nodes.write(f"{path}/{name}", b""))
        for doomed in (f"{path}/{name}", path):
            self.both(domid, pick, lambda nodes, doomed=doomed: nodes.remove(doomed))  # type: ignore[misc]

    @rule(domid=domids, pick=picks, commit=st.booleans())
    def end(self, domid: int, pick: int, commit: bool) -> None:
        if self.transactions.get(domid):
            pair = self.transactions[domid].pop(pick % len(self.transactions[domid]))
            call = (lambda each: each.commit()) if commit else (lambda each: each.abort())
            same(*(outcome(call, each) for each in pair))

    @rule(domid=domids, path=anywhere | st.sampled_from(["@introduceDomain", "@releaseDomain"]), token=parts)
    def watch(self, domid: int, path: str, token: str) -> None:
        if domid in self.sides:
            pair = self.both(domid, 0, lambda side: side.watch(path, token))
            if isinstance(pair[0], Watch):
                self.watches[domid, path, token] = pair

    @precondition(lambda self: self.watches)
    @rule(pick=st.integers(0, 20))
    def unwatch(self, pick: int) -> None:
        domid, path, token = sorted(self.watches)[pick % len(self.watches)]
        self.watches.pop((domid, path, token))[0].close()
        self.sides[domid][1].unwatch(path, token)

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def events_agree(self) -> None:
        self.world.turn()
        for key, (real, model) in self.watches.items():
            assert sorted(real.read(timeout=0)) == sorted(model.read()), key

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def trees_agree(self) -> None:
        nodes = self.world.store._parts.tree._nodes
        assert {path: node.value for path, node in nodes.items()} == {
            path: node.value for path, node in self.model.tree.items()
        }
        counts = self.world.store.status()["domains"]
        assert {domid: counts[domid]["transactions"] for domid in counts} == {
            domid: len(domain.transactions) for domid, domain in self.model.domains.items()
        }

    def teardown(self) -> None:
        if hasattr(self, "world"):
            for domid in list(self.sides):
                self.sides.setdefault(-1, self.sides[domid])  # the last one may leave, too
                self.leave(domid)
            assert not self.world.store._parts.tree._readers
            self.world.close()

    def both(self, domid: int, pick: int, call: Callable[[Any], Any]) -> tuple[Any, Any]:
        if domid not in self.sides:
            return None, None
        opened = self.transactions[domid]
        pair: Any = opened[(pick - 1) % len(opened)] if pick and opened else self.sides[domid]
        answers = tuple(outcome(call, each) for each in pair)
        same(*answers)
        return answers  # type: ignore[return-value]


def outcome(call: Callable[[Any], Any], side: Any) -> Any:
    try:
        return call(side)
    except DeviceError as error:
        return error


def same(real: Any, model: Any) -> None:
    if isinstance(model, DeviceError):
        assert isinstance(real, DeviceError), f"{real!r}, where the model refuses with {model}"
        assert (type(real), real.errno) == (type(model), model.errno), f"{real} and {model}"
    elif isinstance(model, (ModelTransaction, ModelWatch)):
        assert not isinstance(real, DeviceError), real
    else:
        assert real == model, f"{real!r}, where the model has {model!r}"
