"""Payloads that no client of ours sends, and paths that are none: each is refused, and nothing changes."""

from __future__ import annotations

import contextlib
import errno
import random
import struct
from collections.abc import Iterator

import pytest
from support.stores import World, refused, world

from usermm.errors import ArgumentTypeError, BadReferenceError, DeviceError
from usermm.grants.store import Nodes, Store
from usermm.hypercalls import store as layout
from usermm.hypercalls.store import Permission, Type
from usermm.hypercalls.wire import Operation


@pytest.fixture
def here() -> Iterator[World]:
    with world() as here:
        yield here


@pytest.fixture
def store(here: World) -> Store:
    store = here.arrive(5)
    store.write("a", b"1")
    return store


BAD_PATHS = ["/a/", "//a", "a//b", "a/", "a b", "a.b", "a\n", "@a", "é", "a\0b", "/" + "x" * 3072, "x" * 2049]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_what_is_no_path(store: Store, path: str) -> None:
    for nodes in (store, store.transaction()):
        calls = (Nodes.read, Nodes.list, Nodes.exists, Nodes.mkdir, Nodes.remove, Nodes.permissions)
        for call in (*calls, lambda nodes, path: nodes.write(path, b"")):
            with pytest.raises(BadReferenceError) as caught:
                call(nodes, path)
            assert caught.value.errno == errno.EINVAL
            assert len(str(caught.value)) < 300
    with refused(errno.EINVAL):
        store.watch(path)


def test_the_longest_paths(here: World) -> None:
    store, short = here.arrive(5), here.arrive(6, quota_pathmax=64)
    store.mkdir("x" * 2048)
    here.arrive(0).mkdir("/" + "x" * 3071)
    short.mkdir("x" * (64 - len("/local/domain/6/")))
    with refused(errno.EINVAL):
        short.mkdir("x" * (65 - len("/local/domain/6/")))
    many = "/".join("x" * 999)
    with store.transaction() as transaction:
        transaction.mkdir(many)
        with refused(errno.ENOSPC):
            transaction.mkdir(f"{many}/x/x")
    assert store.exists(many)
    store.remove("x")


def test_a_path_must_be_text(store: Store) -> None:
    with pytest.raises(ArgumentTypeError, match="path must be a str"):
        store.read(b"a")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="domid must be an int"):
        store.is_introduced("5")  # type: ignore[arg-type]


def payload(kind: int, data: bytes = b"", transaction: int = 0, reserved: int = 0) -> bytes:
    return layout.HEADER.pack(kind, reserved, transaction) + data


@pytest.mark.parametrize("kind", [0, Type.WATCH, 8, 9, Type.WATCH_EVENT, 16, 18, 20, 128, 65535])
@pytest.mark.usefixtures("store")
def test_unknown_types(here: World, kind: int) -> None:
    with refused(errno.ENOSYS):
        here.raw(5, payload(kind, b"a\0"))


@pytest.mark.parametrize(
    "data",
    [
        payload(Type.READ, b"a"),
        payload(Type.READ, b"a\0b"),
        payload(Type.READ, b"a\0", reserved=1),
        payload(Type.WRITE, b"a"),
        payload(Type.RM, b"\xff\0"),
        payload(Type.SET_PERMS, b"a\0"),
        payload(Type.SET_PERMS, b"a\0n5"),
        payload(Type.SET_PERMS, b"a\0x5\0"),
        payload(Type.SET_PERMS, b"a\0n\0"),
        payload(Type.SET_PERMS, b"a\0n-5\0"),
        payload(Type.SET_PERMS, b"a\0n5\0\0"),
        payload(Type.SET_PERMS, b"a\0n32752\0"),
        payload(Type.SET_PERMS, b"a\0n99999999999999999999\0"),
        payload(Type.TRANSACTION_START, b"x"),
        payload(Type.TRANSACTION_END, b"T"),
        payload(Type.TRANSACTION_END, b"yes\0"),
        payload(Type.UNWATCH, b"/a/\0x"),
    ],
)
def test_malformed(here: World, store: Store, data: bytes) -> None:
    with refused(errno.EINVAL):
        here.raw(5, data)
    assert store.permissions("a") == [(5, "n")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        payload(Type.READ)[:-1],
        payload(Type.DIRECTORY, b"a\0"),
        payload(Type.DIRECTORY, b"a\0" + b"123"),
        payload(Type.IS_DOMAIN_INTRODUCED, b"5\0"),
        payload(Type.GET_DOMAIN_PATH),
    ],
)
@pytest.mark.usefixtures("store")
def test_too_short(here: World, data: bytes) -> None:
    with pytest.raises(struct.error):  # the server answers EINVAL
        here.raw(5, data)


@pytest.mark.usefixtures("store")
def test_a_list_that_is_skipped_over(here: World) -> None:
    reply = here.raw(5, payload(Type.DIRECTORY, b"/local/domain/5\0" + layout.SKIP.pack(1 << 31)))
    assert len(reply) == layout.LISTING.size
    assert layout.LISTING.unpack(reply)[1] == 0


def test_a_watch_without_a_token(store: Store) -> None:
    for data in (b"", b"a"):
        with refused(errno.EINVAL):
            store._session.call(Operation.WATCH, data)


def test_permissions_as_text() -> None:
    given = (Permission(5, "n"), Permission(32751, "b"))
    assert layout.unpack_permissions(layout.pack_permissions(given)) == given
    for wrong in (b"", b"n5", b"\xff5\0", "n٥\0".encode()):
        with pytest.raises(ValueError):
            layout.unpack_permissions(wrong)


def test_noise(here: World, store: Store) -> None:
    """Whatever comes: an answer or a refusal, and a store that still works."""
    chance = random.Random(7)
    words = [b"a", b"/", b"/local/domain/5", b"\0", b"n5", b"T\0", b"@introduceDomain", b"\xff", b"a/b", b"x" * 70]
    for _ in range(20_000):
        data = b"".join(chance.choices(words, k=chance.randrange(6)))
        request = payload(chance.randrange(20), data, transaction=chance.choice([0, 0, 1, 2, 3]))
        with contextlib.suppress(DeviceError, struct.error):
            here.raw(5, request[: chance.randrange(len(request) + 1)] if chance.random() < 0.1 else request)
    store.write("a", b"still here")
    assert store.read("a") == b"still here"
