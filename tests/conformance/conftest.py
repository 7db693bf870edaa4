"""Fixtures of the conformance lists: every implementation, and both versions for tests that ask for `abi`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from conformance.client import Client, OpenClient
from conformance.grants_client import Owner, User, User2007
from conformance.grants_world import World, all_worlds
from conformance.implementations import Implementation, all_implementations, closing_all


@pytest.fixture(params=sorted(all_implementations()))
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    kind = all_implementations()[request.param]
    reason = kind.unavailable()
    if reason is not None:
        pytest.skip(f"{kind.name}: {reason}")
    with closing_all(kind()) as found:
        yield found


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def abi(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def open_client(implementation: Implementation) -> Iterator[OpenClient]:
    """Opens further clients: open_client(abi=2, flags=O_NONBLOCK); all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_one(abi: int = 2, flags: int = os.O_RDONLY | os.O_NONBLOCK) -> Client:
            return stack.enter_context(contextlib.closing(Client(implementation, abi, flags)))

        yield open_one


@pytest.fixture
def client(open_client: OpenClient, abi: int) -> Client:
    """A non-blocking client, one of each version."""
    return open_client(abi)


@pytest.fixture
def client2(open_client: OpenClient) -> Client:
    """A non-blocking client of version 2."""
    return open_client(2)


@pytest.fixture(params=sorted(all_worlds()))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Domains that can grant to each other, in every implementation of the grant devices."""
    kind = all_worlds()[request.param]
    reason = kind.unavailable()
    if reason is not None:
        pytest.skip(f"{kind.name}: {reason}")
    with contextlib.closing(kind()) as found:
        yield found


@pytest.fixture
def owner(world: World) -> Owner:
    """A domain that grants."""
    return Owner(world.make_domain())


@pytest.fixture
def user(world: World, owner: Owner) -> User:  # noqa: ARG001 - the owner's number is the lower
    """Another domain, with a mainline gntdev file."""
    return User(world.make_domain())


@pytest.fixture
def user2007(world: World, owner: Owner) -> User2007:  # noqa: ARG001
    """Another domain, with a gntdev file of 2007."""
    world.needs("the personality of 2007")
    return User2007(world.make_domain())
