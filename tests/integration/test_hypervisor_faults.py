"""Every system call of the hypervisor fails once: what was asked for did not happen, and everybody else goes on."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import pytest
from support.hypervisors import Belongings, HypervisorProcess, settled, socket_folder, wait_until
from support.processes import TESTS
from support.threads import running

from usermm.errors import DeviceError, HypervisorGoneError
from usermm.grants.domain import Domain

PROGRAM = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from support.faulty_hypervisor import main; main()"
GRANTOR, GRANTEE, BYSTANDER = 31, 32, 33
LIMIT_S = 1.0
FEW_DESCRIPTORS = 48
MANY = 200


class World(NamedTuple):
    """A faulty hypervisor, two domains that share something, and one that looks on."""

    hypervisor: HypervisorProcess
    grantor: Domain
    grantee: Domain
    bystander: Domain
    pages: Any
    single: Any
    mapping: Any
    port: int

    def state(self) -> tuple[str, Belongings]:
        """All that a half-made thing would change."""
        belongings = self.hypervisor.belongings()
        status = self.hypervisor.status()
        return json.dumps({name: status[name] for name in ("domains", "grants", "ports")}), belongings


@contextlib.contextmanager
def a_world() -> Iterator[World]:
    with socket_folder() as folder, ExitStack() as stack:
        hypervisor = stack.enter_context(HypervisorProcess(folder / "s", policy="0", program=PROGRAM))
        grantor, grantee, bystander = (
            stack.enter_context(Domain(hypervisor.socket, domid=domid)) for domid in (GRANTOR, GRANTEE, BYSTANDER)
        )
        pages = stack.enter_context(closing(grantor.gntalloc.allocate(GRANTEE, 3, writable=True)))
        single = stack.enter_context(closing(grantor.gntalloc.allocate(GRANTEE, 1)))
        mapping = stack.enter_context(closing(grantee.gntdev.map(GRANTOR, pages.references, writable=True)))
        port = grantor.evtchn.bind_unbound_port(GRANTEE)
        grantor.store.write("x", b"y")
        bystander.store.write("x", b"y")
        grantee.store.read("name")
        yield World(hypervisor, grantor, grantee, bystander, pages, single, mapping, port)


# Each makes something, and returns what undoes it. A domain of its own: a reply that cannot be sent ends it.


def allocate(domain: Domain) -> Callable[[], Any]:
    return domain.gntalloc.allocate(GRANTEE, 2, writable=True).close


def allocate_read_only(domain: Domain) -> Callable[[], Any]:
    return domain.gntalloc.allocate(GRANTEE, 2).close


def allocate_single(domain: Domain) -> Callable[[], Any]:
    return domain.gntalloc.allocate(GRANTEE).close


def allocate_and_map(domain: Domain) -> Callable[[], Any]:
    own = domain.gntalloc.allocate(domain.domid, 5)
    try:
        mapping = domain.gntdev.map(domain.domid, own.references)
    except DeviceError:
        own.close()
        raise
    return lambda: (mapping.close(), own.close())


def map_several(domain: Domain) -> Callable[[], Any]:
    """Of which the last one can fail when the others are made."""
    with ExitStack() as stack:
        own = [stack.enter_context(closing(domain.gntalloc.allocate(domain.domid, 2))) for _ in range(3)]
        references = [(domain.domid, number) for pages in own for number in pages.references]
        stack.enter_context(closing(domain.gntdev.map_many(references)))
        return stack.pop_all().close


def bind(domain: Domain) -> Callable[[], Any]:
    port = domain.evtchn.bind_unbound_port(GRANTEE)
    return lambda: domain.evtchn.unbind(port)


def bind_both(domain: Domain) -> Callable[[], Any]:
    port = domain.evtchn.bind_unbound_port(domain.domid)
    try:
        far = domain.evtchn.bind_interdomain(domain.domid, port)
    except DeviceError:
        domain.evtchn.unbind(port)
        raise
    return lambda: (domain.evtchn.unbind(far), domain.evtchn.unbind(port))


def watch(domain: Domain) -> Callable[[], Any]:
    return domain.store.watch("name").close


def write(domain: Domain) -> Callable[[], Any]:
    domain.store.write("a", b"b")
    return lambda: domain.store.remove("a")


OPERATIONS = [
    allocate,
    allocate_read_only,
    allocate_single,
    allocate_and_map,
    map_several,
    bind,
    bind_both,
    watch,
    write,
]
CALLS = {
    "memfd_create": errno.EMFILE,
    "ftruncate": errno.ENOMEM,
    "fchmod": errno.EPERM,
    "open": errno.EMFILE,
    "fcntl": errno.ENOLCK,
    "dup": errno.EMFILE,
    "socketpair": errno.ENFILE,
    "setsockopt": errno.ENOMEM,
    "inotify_add_watch": errno.ENOSPC,
    "sendmsg": errno.ENOMEM,
    "send": errno.ENOBUFS,
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_world() as world:
        yield world


def fails_well(world: World, domain: Domain, operation: Callable[[Domain], Any], call: str, at: int) -> bool:
    """Whether there was a call number `at` to fail."""
    before = settled(world.state)
    world.hypervisor.tell(f"fail {call} {at} {CALLS[call]}")
    failure = undo = None
    try:
        undo = operation(domain)
    except DeviceError as error:
        failure = error
    struck = int(world.hypervisor.tell(f"count {call}")) >= at
    if failure is None:
        assert undo is not None
        undo()
        return struck
    assert struck, failure
    assert failure.errno in (CALLS[call], errno.ECONNRESET), failure
    assert "\n" not in str(failure)
    if isinstance(failure, HypervisorGoneError):
        assert call in ("sendmsg", "send")  # it cannot hear the answer: the domain was ended
        return True
    wait_until(lambda: world.state() == before, LIMIT_S, world.state)
    operation(domain)()
    return True


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_half_made(world: World, operation: Callable[[Domain], Any], call: str) -> None:
    hypervisor = world.hypervisor
    before = settled(world.state)
    at, struck = 1, True
    while struck:
        with Domain(hypervisor.socket, domid=40) as domain:
            for device in (domain.gntalloc, domain.gntdev, domain.evtchn, domain.store):
                assert device is not None
            struck = fails_well(world, domain, operation, call, at)
        wait_until(lambda: world.state() == before, LIMIT_S, world.state)
        at += 1
    world.pages.write(0, b"on")
    assert world.mapping.read(0, 2) == b"on"
    assert world.bystander.store.read("x") == b"y"


def test_calls_are_really_failing(world: World) -> None:
    """What is written above about system calls is about some: each name strikes in at least one operation."""
    hypervisor = world.hypervisor
    counts = dict.fromkeys(CALLS, 0)
    for operation in OPERATIONS:
        for call in CALLS:
            with Domain(hypervisor.socket, domid=40) as domain:
                hypervisor.tell(f"fail {call} 1000 1")
                operation(domain)()
                counts[call] += int(hypervisor.tell(f"count {call}"))
    assert all(counts.values()), counts


def test_revocation_that_fails_is_none() -> None:
    with a_world() as world:
        world.pages.write(0, b"data")
        before = settled(world.state)
        world.hypervisor.tell(f"fail fallocate 1 {errno.ENOMEM}")
        with pytest.raises(DeviceError) as caught:
            world.grantor.gntalloc.revoke(world.pages.references[0])
        assert caught.value.errno == errno.ENOMEM
        assert settled(world.state) == before
        world.grantor.gntalloc.revoke(world.pages.references[0])
        assert world.mapping.read(0, 4) == bytes(4)
        assert world.pages.read(0, 4) == b"data"


def test_no_descriptor_is_left() -> None:
    """RLIMIT_NOFILE: calls that need one are refused by name, the others are served, and all is well afterwards."""
    with socket_folder() as folder:
        few = HypervisorProcess(folder / "s", policy=str(FEW_DESCRIPTORS), program=PROGRAM)
        with few as hypervisor, ExitStack() as stack:
            grantor = stack.enter_context(Domain(hypervisor.socket, domid=GRANTOR))
            grantee = stack.enter_context(Domain(hypervisor.socket, domid=GRANTEE))
            before = settled(hypervisor.belongings)
            given = []
            with pytest.raises(DeviceError) as caught:
                for _ in range(MANY):
                    given.append(grantor.gntalloc.allocate(GRANTEE, 2))
            assert caught.value.errno == errno.ENFILE  # the user's share
            assert 5 < len(given) < FEW_DESCRIPTORS
            with pytest.raises(DeviceError) as caught:
                grantor.evtchn.bind_unbound_port(GRANTEE)
            assert caught.value.errno == errno.ENFILE
            grantor.store.write("still", b"served")
            assert grantee.store.exists("name")
            given.pop().close()
            mapping = grantee.gntdev.map(GRANTOR, given[0].references)
            given[0].write(0, b"data")
            assert mapping.read(0, 4) == b"data"
            mapping.close()
            for pages in given:
                pages.close()
            wait_until(lambda: hypervisor.belongings() == before, LIMIT_S, hypervisor.belongings)
            with closing(grantor.gntalloc.allocate(GRANTEE, 2)):
                pass


def test_who_connects_while_no_descriptor_is_left_waits() -> None:
    with socket_folder() as folder:
        few = HypervisorProcess(folder / "s", policy=str(FEW_DESCRIPTORS), program=PROGRAM)
        with few as hypervisor, ExitStack() as stack:
            grantor = stack.enter_context(Domain(hypervisor.socket, domid=GRANTOR))
            given = []
            with contextlib.suppress(DeviceError):
                while True:
                    given.append(grantor.gntalloc.allocate(GRANTEE, 2))
            arrived = []

            def come() -> None:
                with Domain(hypervisor.socket, domid=GRANTEE) as late:
                    arrived.append(late.domid)

            with running(come):
                grantor.store.write("still", b"served")
                for pages in given:
                    pages.close()
            assert arrived == [GRANTEE]
