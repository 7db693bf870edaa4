"""Watches: what is told to whom, how often, and what becomes of those who do not read."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator

import pytest
from support.stores import World, refused, world

from usermm.errors import ArgumentError, ArgumentTypeError, ClosedError, LimitError
from usermm.grants.store import Store
from usermm.grants.store_watch import Watch


@pytest.fixture
def here() -> Iterator[World]:
    with world() as here:
        yield here


@pytest.fixture
def store(here: World) -> Store:
    store = here.arrive(5)
    store.write("d/a/deep", b"1")
    return store


def watched(store: Store, path: str, token: str = "") -> Watch:
    watch = store.watch(path, token)
    assert watch.read() == [path]
    return watch


def test_one_event_at_once_then_each_change(store: Store) -> None:
    with watched(store, "/local/domain/5/d") as watch:
        assert watch.read(timeout=0) == []
        for path in ("d", "d/a", "d/new/two", "d/a/deep"):
            store.write(path, b"")
            assert watch.read() == [f"/local/domain/5/{path}"]
        store.mkdir("d/b")
        store.set_permissions("d/b", (5, "r"))
        store.remove("d/b")
        assert watch.read() == ["/local/domain/5/d/b"]


def test_what_changes_nothing_or_lies_elsewhere_tells_nothing(store: Store) -> None:
    with watched(store, "d") as watch:
        store.mkdir("d/a")
        store.remove("d/missing")
        store.write("da", b"")
        store.write("e", b"")
        store.read("d")
        assert watch.read(timeout=0) == []


def test_relative_paths_are_told_as_relative(store: Store) -> None:
    with watched(store, "d") as watch:
        store.write("/local/domain/5/d/a", b"")
        assert watch.read() == ["d/a"]


def test_removing_a_directory_above(store: Store) -> None:
    with watched(store, "d/a/deep") as deep, watched(store, "d/a/missing") as missing, watched(store, "d") as top:
        store.remove("d")
        assert (deep.read(), top.read()) == (["d/a/deep"], ["d"])
        assert missing.read(timeout=0) == []
        store.mkdir("d/a/missing")
        assert missing.read() == ["d/a/missing"]


def test_who_may_not_read_a_node_does_not_hear_of_it(here: World, store: Store) -> None:
    other = here.arrive(6)
    with watched(other, "/local/domain/5") as watch, watched(here.arrive(0), "/local/domain/5") as control:
        store.write("secret", b"")
        assert (watch.read(timeout=0), control.read()) == ([], ["/local/domain/5/secret"])
        store.set_permissions("secret", (5, "n"), (6, "r"))
        assert watch.read() == ["/local/domain/5/secret"]
        store.write("secret", b"2")
        assert watch.read() == ["/local/domain/5/secret"]
        store.set_permissions("secret", (5, "n"))  # it could read it until now
        assert watch.read() == ["/local/domain/5/secret"]
        store.remove("secret")
        assert watch.read(timeout=0) == []


def test_a_transaction_tells_once_and_after_it_committed(store: Store) -> None:
    with watched(store, "d") as watch:
        with store.transaction() as transaction:
            transaction.write("d/x", b"1")
            transaction.write("d/x", b"2")
            transaction.write("d/gone", b"")
            transaction.remove("d/gone")
            transaction.remove("d/a")
            assert watch.read(timeout=0) == []
        assert watch.read() == ["d/x", "d/a"]
        with pytest.raises(ZeroDivisionError), store.transaction() as transaction:
            transaction.write("d/x", b"3")
            raise ZeroDivisionError
        assert watch.read(timeout=0) == []


def test_special_names(here: World, store: Store) -> None:
    with watched(store, "@introduceDomain") as came, watched(store, "@releaseDomain") as went:
        here.arrive(6)
        assert (came.read(), went.read(timeout=0)) == (["@introduceDomain"], [])
        here.leave(6)
        assert (came.read(timeout=0), went.read()) == ([], ["@releaseDomain"])
    for path in ("@other", "@introduceDomain/x", "a//b", "/a/"):
        with refused(errno.EINVAL):
            store.watch(path)


def test_a_domain_that_goes_is_seen_at_its_home(here: World, store: Store) -> None:
    here.arrive(6)
    with watched(store, "/names") as names, watched(store, "/local/domain/6/name") as name:
        here.leave(6)
        assert (names.read(), name.read()) == (["/names/dom6"], ["/local/domain/6/name"])


def test_equal_watches_and_tokens(store: Store) -> None:
    with watched(store, "d", "one") as one, watched(store, "d", "two") as two:
        with refused(errno.EEXIST):
            store.watch("/local/domain/5/d", "one")
        store.write("d", b"")
        assert os.read(one.fileno(), 100) == b"d\0one\0"
        assert two.token == "two"
    with watched(store, "d", "one"):  # a closed one is no obstacle
        pass
    for token in ("a\0b", "x" * 1025):
        with refused(errno.EINVAL):
            store.watch("d", token)
    with pytest.raises(ArgumentTypeError, match="token must be a str"):
        store.watch("d", 5)  # type: ignore[arg-type]


def test_the_quota_counts_what_is_open(here: World) -> None:
    store = here.arrive(5, quota_maxwatch=3)
    watches = [watched(store, "d", str(number)) for number in range(3)]
    with refused(errno.EDQUOT):
        store.watch("d", "more")
    for _ in range(5):
        watches.pop().close()
        watches.append(watched(store, "d", "more"))
    for watch in watches:
        watch.close()


def test_unwatch_and_a_domain_that_goes_end_it(here: World, store: Store) -> None:
    first, second = watched(store, "d", "1"), watched(store, "d", "2")
    here.raw(5, b"\x05\0\0\0\0\0\0\0d\x001")
    with refused(errno.ENOENT):
        here.raw(5, b"\x05\0\0\0\0\0\0\0d\x001")
    with pytest.raises(LimitError):
        first.read()
    assert here.store.status()["domains"][5]["watches"] == 1
    here.leave(5)
    assert os.read(second.fileno(), 10) == b""
    first.close()
    second.close()


def test_its_end_is_seen_although_a_forked_child_has_a_copy(here: World, store: Store) -> None:
    """A program that embeds a hypervisor may fork: its child keeps the descriptors that were open then."""
    with watched(store, "d") as watch:
        (ours,) = here.store._parts.watches._by_domain[5].values()
        copy = os.dup(ours.stream.fileno())
        here.leave(5)
        assert select.select([watch], [], [], 0)[0]
        assert os.read(watch.fileno(), 10) == b""
        os.close(copy)


# Those who do not read


def fill(here: World, store: Store) -> int:
    """Writes until the watch's socket takes no more; how many events went in."""
    for number in range(10_000):
        store.write("d/a", b"")
        if here.writers:
            return number
    raise AssertionError("the socket takes everything")


def test_what_has_no_room_is_kept_once_and_sent_later(here: World, store: Store) -> None:
    with watched(store, "d") as watch:
        sent = fill(here, store)
        for _ in range(1000):
            store.write("d/b", b"")
        store.write("d/c", b"")
        here.turn()
        assert here.writers
        found = []
        while events := watch.read(timeout=0):
            found += events
            here.turn()
        assert list(dict.fromkeys(found)) == ["d/a", "d/b", "d/c"]
        assert len(found) == 4  # only what the socket had taken already comes twice
        assert sent > 10
        assert not here.writers
        store.write("d/e", b"")
        assert watch.read() == ["d/e"]


def test_a_watch_that_nobody_reads_ends(here: World, store: Store) -> None:
    watch = watched(store, "d")
    fill(here, store)
    for number in range(63):
        store.write(f"d/{number}", b"")
    assert here.store.status()["domains"][5]["watches"] == 1
    store.write("d/one-more", b"")
    assert here.store.status()["domains"][5]["watches"] == 0
    assert not here.writers
    assert watch.read() == ["d/a"]  # what it had before its end
    with pytest.raises(LimitError, match="read the tree anew") as caught:
        watch.read()
    assert caught.value.errno == errno.EOVERFLOW
    watch.close()


def test_a_watch_that_is_closed_while_it_is_full(here: World, store: Store) -> None:
    watch = watched(store, "d")
    fill(here, store)
    watch.close()
    here.turn()
    assert not here.writers
    assert here.store.status()["domains"][5]["watches"] == 0


def test_a_domain_cannot_fill_our_memory_by_its_end(store: Store) -> None:
    with watched(store, "d") as watch, pytest.raises(BrokenPipeError):
        os.write(watch.fileno(), b"x")


# The object


def test_closing(store: Store) -> None:
    watch = watched(store, "d")
    watch.close()
    watch.close()
    assert watch.closed
    for call in (watch.read, watch.fileno):
        with pytest.raises(ClosedError, match="watch again"):
            call()


def test_bad_timeouts(store: Store) -> None:
    with watched(store, "d") as watch:
        with pytest.raises(ArgumentTypeError):
            watch.read("1")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError):
            watch.read(-1)
        assert watch.read(0.001) == []
