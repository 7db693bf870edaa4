"""Nodes: reading, writing, listing, removing; what is made on the way; what the hypervisor keeps."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from support.stores import World, refused, world

from usermm.errors import ArgumentError, ArgumentTypeError, QuotaError
from usermm.grants.store import Nodes, Store


@pytest.fixture
def here() -> Iterator[World]:
    with world() as here:
        yield here


@pytest.fixture
def store(here: World) -> Store:
    return here.arrive(5)


@pytest.fixture(params=["outside", "in a transaction"])
def nodes(request: pytest.FixtureRequest, store: Store) -> Iterator[Nodes]:
    """The same must be true in both."""
    if request.param == "outside":
        yield store
        return
    with store.transaction() as transaction:
        yield transaction


def test_a_value_is_read_back(nodes: Nodes) -> None:
    for value in (b"", b"one", b"\0two\0", bytes(range(256)), b"x" * 2048):
        nodes.write("key", value)
        assert nodes.read("key") == nodes.read("/local/domain/5/key") == value


def test_values_may_be_text_or_any_buffer(nodes: Nodes) -> None:
    nodes.write("a", "grüße")
    nodes.write("b", memoryview(bytearray(b"abcdef"))[::2])
    assert (nodes.read("a"), nodes.read("b")) == ("grüße".encode(), b"ace")
    with pytest.raises(ArgumentTypeError, match="value must be bytes or a str"):
        nodes.write("c", 5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no UTF-8"):
        nodes.write("c", "\ud800")


def test_writing_makes_the_directories_above(nodes: Nodes) -> None:
    nodes.write("a/b/c", b"deep")
    assert nodes.read("a") == nodes.read("a/b") == b""
    assert (nodes.list("a"), nodes.list("a/b"), nodes.list("a/b/c")) == (["b"], ["c"], [])


def test_mkdir_leaves_what_is_there_alone(nodes: Nodes) -> None:
    nodes.write("a", b"value")
    nodes.mkdir("a")
    nodes.mkdir("b/c")
    assert (nodes.read("a"), nodes.read("b/c")) == (b"value", b"")


def test_a_directory_lists_its_children_sorted(nodes: Nodes) -> None:
    for name in ("z", "a", "m"):
        nodes.write(f"d/{name}/below", b"")
    assert nodes.list("d") == ["a", "m", "z"]
    nodes.remove("d/m")
    assert nodes.list("d") == ["a", "z"]
    nodes.write("d/m", b"")
    assert nodes.list("d") == ["a", "m", "z"]


def test_removing_takes_everything_below(nodes: Nodes) -> None:
    for name in ("a/b", "a/c/d", "ab"):
        nodes.write(name, b"")
    nodes.remove("a")
    assert [name for name in ("a", "a/b", "a/c", "a/c/d", "ab") if nodes.exists(name)] == ["ab"]
    nodes.mkdir("a")
    assert nodes.list("a") == []


def test_removing_what_is_not_there_is_fine_if_its_directory_is(nodes: Nodes) -> None:
    nodes.remove("missing")
    with refused(errno.ENOENT):
        nodes.remove("missing/below")


def test_what_is_missing_is_enoent(nodes: Nodes) -> None:
    for call in (nodes.read, nodes.list, nodes.permissions):
        with refused(errno.ENOENT):
            call("missing")
    with refused(errno.ENOENT):
        nodes.set_permissions("missing", (5, "n"))
    assert not nodes.exists("missing")
    assert not nodes.exists("missing/below")


def test_a_listing_that_fits_no_message_comes_in_pieces(here: World) -> None:
    store = here.arrive(5, quota_entries=3000)
    names = [f"{number:04}-{'n' * 60}" for number in range(1500)]
    for name in names:
        store.mkdir(f"d/{name}")
    assert store.list("d") == names
    with store.transaction() as transaction:
        transaction.remove(f"d/{names[0]}")
        transaction.mkdir(f"d/{names[0]}")
        transaction.remove(f"d/{names[7]}")
        assert transaction.list("d") == names[:7] + names[8:]


def test_a_listing_that_changes_between_its_pieces_is_begun_again(here: World) -> None:
    """Names of two moments together would be a directory that never was."""
    store = here.arrive(5, quota_entries=3000)
    names = [f"{number:04}-{'n' * 60}" for number in range(1500)]
    for name in names:
        store.mkdir(f"d/{name}")
    original, calls = store._session.call, []

    def call(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            original(*here_remove)  # type: ignore[arg-type]
        return original(*arguments)  # type: ignore[arg-type]

    here_remove = (40, b"\x0d\0\0\0\0\0\0\0" + f"d/{names[0]}\0".encode())  # RM
    store._session.call = call  # type: ignore[method-assign,assignment]
    assert store.list("d") == names[1:]


def test_homes_and_names(here: World) -> None:
    first, second = here.arrive(5, name="front"), here.arrive(6, name="back")
    assert first.read("/local/domain/6/name") == b"back"
    assert first.read("domid") == b"5"
    assert first.list("/local/domain") == ["5", "6"]
    assert second.list("/names") == ["back", "front"]
    assert second.read("/names/front") == b"5"
    assert first.domain_path(9) == "/local/domain/9"
    assert [first.is_introduced(domid) for domid in (0, 5, 6, 7)] == [False, True, True, False]
    here.leave(6)
    assert (first.list("/local/domain"), first.list("/names")) == (["5"], ["front"])
    assert not first.is_introduced(6)


def test_a_name_that_no_node_can_have_is_in_the_home_only(here: World) -> None:
    store = here.arrive(5, name="a.b/c")
    assert (store.read("name"), store.list("/names")) == (b"a.b/c", [])
    here.leave(5)
    assert here.store.status()["nodes"] == 4


def test_the_second_of_a_name_does_not_take_it(here: World) -> None:
    first, _ = here.arrive(5, name="twin"), here.arrive(6, name="twin")
    assert first.read("/names/twin") == b"5"
    here.leave(6)
    assert first.read("/names/twin") == b"5"


def test_an_empty_path_is_ones_own_home(here: World) -> None:
    store = here.arrive(5)
    store.write("a", b"1")
    assert store.list("") == store.list("/local/domain/5") == ["a", "domid", "name"]
    assert store.permissions("") == [(5, "n")]
    with refused(errno.EBUSY):
        store.remove("")


def test_what_the_hypervisor_keeps_cannot_be_removed(here: World) -> None:
    control, store = here.arrive(0), here.arrive(5)
    with refused(errno.EINVAL):
        control.remove("/")
    for path in ("/local", "/local/domain", "/names", "/local/domain/5", "/names/dom5", "/local/domain/5/name"):
        with refused(errno.EBUSY):
            control.remove(path)
    with refused(errno.EBUSY):
        control.set_permissions("/local/domain/5", (0, "n"))
    for path in ("/local/domain/5", "name", "domid"):
        with refused(errno.EBUSY):
            store.remove(path)
    with refused(errno.EACCES):
        store.remove("/names/dom5")
        with refused(errno.EACCES):
            store.write(path, b"other")


def test_a_domain_that_goes_takes_what_it_owns_and_what_is_below(here: World) -> None:
    control, first, second = here.arrive(0), here.arrive(5), here.arrive(6)
    control.mkdir("/shared")
    control.set_permissions("/shared", (0, "b"))
    first.write("/shared/of5/x", b"")
    first.set_permissions("/shared/of5", (5, "b"))
    second.write("/shared/of5/of6", b"")
    second.write("/shared/other", b"")
    first.write("home", b"")
    here.leave(5)
    assert (control.list("/shared"), control.list("/local/domain")) == (["other"], ["0", "6"])
    here.leave(6)
    here.leave(0)
    assert here.arrive(0).list("/shared") == []
    assert here.store.status()["nodes"] == 4 + 4 + 1


def test_a_home_that_a_control_domain_prepared(here: World) -> None:
    """Configuration may be written before the domain has come; it is the domain's then."""
    here.arrive(0).write("/local/domain/5/config", b"ready")
    store = here.arrive(5)
    assert store.list("/local/domain/5") == ["config", "domid", "name"]
    assert here.store.status()["domains"][0]["nodes"] == 1
    here.leave(5)
    assert here.store.status()["domains"][0]["nodes"] == 0


# Quotas


def test_the_quota_of_nodes(here: World) -> None:
    store = here.arrive(5, quota_entries=3)
    store.mkdir("a/b")
    with pytest.raises(QuotaError, match=r"may own 3 nodes and has 2") as caught:
        store.write("c/d", b"")
    assert caught.value.errno == errno.ENOSPC
    assert store.list("/local/domain/5") == ["a", "domid", "name"]
    store.mkdir("c")
    store.write("c", b"replacing needs no more")
    store.remove("a")
    store.mkdir("c/d/e")
    assert here.store.status()["domains"][5]["nodes"] == 3


def test_the_quota_in_a_transaction_counts_both(here: World) -> None:
    store = here.arrive(5, quota_entries=3)
    store.mkdir("a")
    with store.transaction() as transaction:
        transaction.mkdir("b/c")
        with refused(errno.ENOSPC):
            transaction.mkdir("d")
        transaction.remove("a")
        transaction.mkdir("d")
    assert [name for name in "abd" if store.exists(name)] == ["b", "d"]


def test_a_quota_that_was_used_up_meanwhile(here: World) -> None:
    store = here.arrive(5, quota_entries=3)
    transaction = store.transaction()
    transaction.mkdir("x/y/z")
    store.mkdir("a")
    with refused(errno.ENOSPC):
        transaction.commit()
    assert not store.exists("x")
    assert here.store.status()["domains"][5] == {"nodes": 1, "watches": 0, "transactions": 0}


def test_the_new_owner_pays(here: World) -> None:
    control, store = here.arrive(0), here.arrive(5, quota_entries=3)
    store.mkdir("a/b/c")
    control.mkdir("/gift")
    with refused(errno.ENOSPC):
        control.set_permissions("/gift", (5, "n"))
    store.remove("a/b")
    control.set_permissions("/gift", (5, "n"))
    assert here.store.status()["domains"][5]["nodes"] == 2
    assert here.store.status()["domains"][0]["nodes"] == 0


@pytest.mark.parametrize("transacted", [False, True])
def test_a_value_that_is_too_long(here: World, transacted: bool) -> None:
    store = here.arrive(5, quota_maxsize=100)
    nodes = store.transaction() if transacted else store
    nodes.write("a", b"x" * 100)
    with refused(errno.E2BIG):
        nodes.write("a", b"x" * 101)
    assert nodes.read("a") == b"x" * 100


def test_the_longest_value_that_a_policy_can_allow(here: World) -> None:
    store = here.arrive(5, quota_maxsize=16384)
    store.write("a", b"x" * 16384)
    assert store.read("a") == b"x" * 16384


def test_no_more_than_the_quota_is_left_behind(here: World) -> None:
    """Whatever comes and goes: the store is as large as before."""
    before = here.store.status()
    for _ in range(3):
        store = here.arrive(5)
        for number in range(100):
            store.write(f"a/{number}/b", b"x")
        store.transaction().write("c", b"")
        watch = store.watch("a")
        here.leave(5)
        watch.close()
    assert here.store.status() == before
    tree = here.store._parts.tree
    assert not (tree._owned or tree._readers or tree._before or tree._announced)
    assert set(tree._directories) == {"/", "/local"}
