"""Transactions: alone with the tree of one moment, then everybody's at once or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from support.stores import World, refused, world

from usermm.errors import ArgumentError, ClosedError, ConflictError
from usermm.grants.store import Nodes, Store, Transaction


@pytest.fixture
def here() -> Iterator[World]:
    with world() as here:
        yield here


@pytest.fixture
def store(here: World) -> Store:
    store = here.arrive(5)
    store.write("d/a", b"1")
    store.write("d/b", b"2")
    store.write("e", b"3")
    return store


def test_nobody_sees_it_before_it_commits(store: Store) -> None:
    with store.transaction() as transaction:
        transaction.write("d/a", b"new")
        transaction.write("x/y", b"new")
        transaction.remove("d/b")
        assert (store.read("d/a"), store.list("d"), store.exists("x")) == (b"1", ["a", "b"], False)
        assert (transaction.read("d/a"), transaction.list("d"), transaction.list("x")) == (b"new", ["a"], ["y"])
    assert (store.read("d/a"), store.list("d"), store.read("x/y")) == (b"new", ["a"], b"new")
    assert transaction.ended


def test_an_exception_forgets_everything(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.transaction() as transaction:
        transaction.write("d/a", b"new")
        raise ZeroDivisionError
    assert store.read("d/a") == b"1"
    with pytest.raises(ClosedError, match="it has ended"):
        transaction.read("d/a")
    with pytest.raises(ClosedError):
        transaction.commit()
    transaction.abort()


def test_removed_and_made_again(store: Store) -> None:
    with store.transaction() as transaction:
        transaction.remove("d")
        transaction.write("d/c", b"")
        transaction.write("d/a", b"")
        transaction.remove("d/a")
    assert (store.list("d"), store.read("d")) == (["c"], b"")


CONFLICTS: dict[str, tuple[Callable[[Nodes], object], Callable[[Nodes], object]]] = {
    "read, written": (lambda nodes: nodes.read("d/a"), lambda nodes: nodes.write("d/a", b"1")),
    "read, removed": (lambda nodes: nodes.read("d/a"), lambda nodes: nodes.remove("d")),
    "written, written": (lambda nodes: nodes.write("d/a", b""), lambda nodes: nodes.write("d/a", b"")),
    "written, shared": (lambda nodes: nodes.write("d/a", b""), lambda nodes: nodes.set_permissions("d/a", (5, "r"))),
    "made, made": (lambda nodes: nodes.mkdir("x/y"), lambda nodes: nodes.mkdir("x")),
    "made, directory removed": (lambda nodes: nodes.mkdir("d/x"), lambda nodes: nodes.remove("d")),
    "made, directory shared": (lambda nodes: nodes.mkdir("d/x"), lambda nodes: nodes.set_permissions("d", (5, "r"))),
    "missing, made": (lambda nodes: nodes.exists("x/y/z"), lambda nodes: nodes.mkdir("x")),
    "listed, made": (lambda nodes: nodes.list("d"), lambda nodes: nodes.mkdir("d/x")),
    "listed, removed": (lambda nodes: nodes.list("d"), lambda nodes: nodes.remove("d/a")),
    "removed, made below": (lambda nodes: nodes.remove("d"), lambda nodes: nodes.mkdir("d/x")),
    "removed, written below": (lambda nodes: nodes.remove("d"), lambda nodes: nodes.write("d/a", b"")),
    "seen missing, made and removed": (
        lambda nodes: nodes.exists("x"),
        lambda nodes: (nodes.mkdir("x"), nodes.remove("x")),
    ),
}
NO_CONFLICTS: dict[str, tuple[Callable[[Nodes], object], Callable[[Nodes], object]]] = {
    "elsewhere": (lambda nodes: nodes.write("d/a", b""), lambda nodes: nodes.write("e", b"")),
    "children of one directory": (lambda nodes: nodes.mkdir("d/x"), lambda nodes: nodes.mkdir("d/y")),
    "read, made below": (lambda nodes: nodes.read("d"), lambda nodes: nodes.mkdir("d/x")),
    "listed, child written": (lambda nodes: nodes.list("d"), lambda nodes: nodes.write("d/a", b"")),
    "written, read": (lambda nodes: nodes.write("d/a", b""), lambda nodes: nodes.list("d")),
}


@pytest.mark.parametrize("transacted", [False, True], ids=["by a call", "by a transaction"])
@pytest.mark.parametrize("name", CONFLICTS)
def test_the_first_wins(store: Store, name: str, transacted: bool) -> None:
    mine, others = CONFLICTS[name]
    transaction = store.transaction()
    mine(transaction)
    transaction.write("e", b"never")
    if transacted and name != "seen missing, made and removed":  # as one step that changes nothing
        with store.transaction() as other:
            others(other)
    else:
        others(store)
    with refused(errno.EAGAIN):
        transaction.read("unrelated")
    with pytest.raises(ConflictError, match="begin a new one"):
        transaction.commit()
    assert store.read("e") == b"3"
    assert transaction.ended


@pytest.mark.parametrize("name", NO_CONFLICTS)
def test_what_has_nothing_to_do_with_each_other_goes_through(store: Store, name: str) -> None:
    mine, others = NO_CONFLICTS[name]
    with store.transaction() as transaction:
        mine(transaction)
        others(store)


def test_a_transaction_sees_one_moment(store: Store) -> None:
    """Two values that always change together are never seen apart, not even by a transaction that will be lost."""
    transaction = store.transaction()
    assert transaction.read("d/a") == b"1"
    with store.transaction() as other:
        other.write("d/a", b"one")
        other.write("d/b", b"two")
    with pytest.raises(ConflictError):
        transaction.read("d/b")


def test_a_lost_one_can_be_aborted(here: World, store: Store) -> None:
    transaction = store.transaction()
    transaction.read("e")
    store.write("e", b"")
    transaction.abort()
    assert here.store.status()["domains"][5]["transactions"] == 0


def test_atomically_tries_again(store: Store) -> None:
    seen = []

    def add(nodes: Transaction) -> bytes:
        seen.append(nodes.read("e"))
        if len(seen) < 4:
            store.write("e", b"%d" % len(seen))
        nodes.write("e", seen[-1] + b"!")
        return seen[-1]

    assert store.atomically(add) == b"3"
    assert (seen, store.read("e")) == ([b"3", b"1", b"2", b"3"], b"3!")


def test_atomically_gives_up(store: Store) -> None:
    def fight(nodes: Transaction) -> None:
        nodes.read("e")
        store.write("e", b"")

    with pytest.raises(ConflictError):
        store.atomically(fight, tries=3)
    with pytest.raises(ArgumentError, match="tries"):
        store.atomically(fight, tries=0)


def test_limits(here: World, store: Store) -> None:
    opened = [store.transaction() for _ in range(10)]
    with refused(errno.EDQUOT):
        store.transaction()
    opened.pop().commit()
    opened.append(store.transaction())
    opened.clear()  # whoever drops one without ending it does not lose it for good
    assert here.store.status()["domains"][5]["transactions"] == 0
    with refused(errno.EBUSY):
        here.raw(5, b"\x06\0\0\0\x07\0\0\0")  # one within another
    with refused(errno.ENOENT):
        here.raw(5, b"\x07\0\0\0\x63\0\0\0T\0")


def test_numbers_are_the_domains_own(here: World, store: Store) -> None:
    other = here.arrive(6)
    transaction = store.transaction()
    stolen = Transaction(other._session, transaction._number)
    with refused(errno.ENOENT):
        stolen.read("name")
    with refused(errno.ENOENT):
        stolen.commit()
    transaction.commit()


def test_it_touches_no_more_than_it_may(store: Store) -> None:
    """Or asking for one missing node after the other would fill the hypervisor's memory."""
    transaction = store.transaction()
    with refused(errno.EDQUOT):
        for number in range(2000):
            transaction.exists(f"missing{number}")
    with refused(errno.EDQUOT):
        transaction.write("x/y", b"")
    assert not transaction.exists("missing7")  # what it has touched it can go on using
    transaction.commit()


def test_a_call_that_has_not_room_enough_is_not_done_by_half(store: Store) -> None:
    transaction = store.transaction()
    for number in range(1020):  # with the home 1021 paths: "x", "x/a" and "x/a/b" would still go in
        transaction.exists(f"missing{number}")
    with refused(errno.EDQUOT):
        transaction.write("x/a/b/c", b"")
    assert not transaction.exists("x")
    transaction.commit()
    assert not store.exists("x")


def test_a_removal_that_is_too_large_for_one_changes_nothing(here: World) -> None:
    store = here.arrive(5, quota_entries=2000)
    for number in range(1100):
        store.mkdir(f"d/{number}")
    transaction = store.transaction()
    with refused(errno.EDQUOT):
        transaction.remove("d")
    transaction.abort()
    store.remove("d")


def test_an_owner_that_goes_takes_it_along(here: World) -> None:
    """Nothing may be made for a number that another domain will have."""
    control, _ = here.arrive(0), here.arrive(6)
    transaction = control.transaction()
    transaction.mkdir("/gift")
    transaction.set_permissions("/gift", (6, "n"))
    here.leave(6)
    here.arrive(6)
    with refused(errno.EAGAIN):
        transaction.permissions("/gift")
    with refused(errno.EAGAIN):
        transaction.commit()
    assert not control.exists("/gift")


def test_nothing_is_left_of_those_of_a_domain_that_goes(here: World, store: Store) -> None:
    transaction = store.transaction()
    transaction.write("d/a", b"")
    here.leave(5)
    assert not here.store._parts.tree._readers
    assert not here.store._parts.transactions._open
