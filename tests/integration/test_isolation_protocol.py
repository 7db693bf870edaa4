"""The hypervisor's messages under attack: what is others', what is stale, what is malformed, what is passed on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from support.attackers import (
    ALICE,
    BOB,
    CAROL,
    DONE,
    KEPT,
    PAGE_BYTES,
    PATIENCE_S,
    Actor,
    Client,
    World,
    close_all,
    map_payload,
    outcome,
)
from support.bystanders import Bystanders
from support.users import root_only

from usermm import Domain
from usermm._core import buffer_range
from usermm.hypercalls import grants as layouts
from usermm.hypercalls import ports as port_layouts
from usermm.hypercalls import store as store_layouts
from usermm.hypercalls import wire
from usermm.hypercalls.wire import Operation
from usermm.hypervisor import closer, connections, granting, locks, ports, server
from usermm.hypervisor.extents import Extent
from usermm.uapi import xen_gntdev as abi

pytestmark = root_only
EVENT = 2  # NOTIFY_SEND_EVENT
SO_PASSRIGHTS = 83
LINGER_S = 2


def refuses_descriptors() -> bool:
    """Whether this kernel lets a socket do so: Linux 6.16."""
    with socket.socket(socket.AF_UNIX) as trial:
        return outcome(trial.setsockopt, socket.SOL_SOCKET, SO_PASSRIGHTS, 0) == DONE


needs_refusal = pytest.mark.skipif(
    not refuses_descriptors(), reason="sockets cannot refuse descriptors (SO_PASSRIGHTS, Linux 6.16): use a newer one"
)


def join(path: str, domid: int = wire.DOMID_ANY) -> int:
    KEPT["client"] = Client(path)
    return KEPT["client"].hello(domid)


def grant(grantee: int, writable: bool = False) -> int:
    reference, KEPT["descriptor"] = KEPT["client"].allocate(grantee, writable=writable)
    os.pwrite(KEPT["descriptor"], b"secret", 0)
    return int(reference)


def try_to_map(grantor: int, reference: int, writable: bool = False) -> str:
    return str(KEPT["client"].answer_to(Operation.MAP, map_payload([(grantor, reference, 1)], writable=writable)))


def ask(operation: int, payload: bytes) -> str:
    return str(KEPT["client"].answer_to(operation, payload))


def leave() -> None:
    KEPT["client"].close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def three(world: World) -> Iterator[tuple[Actor, Actor, Actor]]:
    """Alice grants to Bob; Carol is the attacker."""
    with Actor(ALICE) as alice, Actor(BOB) as bob, Actor(CAROL) as carol:
        for actor in (alice, bob, carol):
            actor.domid = actor(join, world.socket)
        yield alice, bob, carol


def domid_of(actor: Actor) -> int:
    return actor.domid


# What is others'


def guess(grantor: int, around: int) -> set[str]:
    tried = itertools.chain(range(around - 200, around + 200), range(300), (2**31, 2**32 - 1))
    return {try_to_map(grantor, reference % 2**32) for reference in tried}


def test_guessed_references_map_nothing(three: tuple[Actor, Actor, Actor]) -> None:
    """A reference is no secret: it names its grantee, so that knowing or guessing it is worth nothing."""
    alice, bob, carol = three
    reference = alice(grant, domid_of(bob))
    assert carol(guess, domid_of(alice), reference) == {"EINVAL"}
    assert carol(try_to_map, wire.DOMID_SELF, reference) == "EINVAL"
    assert bob(try_to_map, domid_of(alice), reference, True) == "EINVAL"
    assert bob(try_to_map, domid_of(alice), reference) == DONE


def without_asking_for_whom() -> None:
    Extent.is_for = lambda *_: True


def test_without_asking_for_whom_a_guess_maps() -> None:
    with World(without=without_asking_for_whom) as world, Actor(ALICE) as alice, Actor(CAROL) as carol:
        grantor = alice(join, world.socket)
        carol(join, world.socket)
        assert carol(guess, grantor, alice(grant, 99)) == {"EINVAL", DONE}


def keep_mapped(grantor: int, reference: int) -> int:
    handle, KEPT["descriptor"] = KEPT["client"].map(grantor, reference)
    return int(handle)


def bind_for(domid: int) -> int:
    answer, KEPT["port_end"] = KEPT["client"].ask(Operation.PORT_UNBOUND, port_layouts.UNBOUND.pack(domid))
    return int(port_layouts.PORT.unpack(answer)[0])


def test_nobody_acts_on_what_is_others(world: World, three: tuple[Actor, Actor, Actor]) -> None:
    alice, bob, carol = three
    reference = alice(grant, domid_of(bob))
    handle = bob(keep_mapped, domid_of(alice), reference)
    port = alice(bind_for, domid_of(bob))
    one = layouts.RANGE.pack(reference, 1, 0)
    for operation in (Operation.RELEASE, Operation.REVOKE, Operation.OPEN_OWN):
        assert carol(ask, operation, one) == "EINVAL"
        assert bob(ask, operation, one) == "EINVAL"
    assert carol(ask, Operation.GRANTOR_NOTIFY, layouts.GRANTOR_NOTIFY.pack(reference, 0, 1, 0)) == "EINVAL"
    assert carol(ask, Operation.GRANTEE_NOTIFY, layouts.GRANTEE_NOTIFY.pack(0, 0, 0, EVENT, port)) == "EINVAL"
    assert carol(ask, Operation.GRANTEE_NOTIFY, layouts.GRANTEE_NOTIFY.pack(handle, 0, 0, 0, 0)) == "ENOENT"
    assert carol(ask, Operation.UNMAPPED, layouts.HANDLE.pack(handle)) == DONE  # of which nothing follows
    for operation in (Operation.PORT_CLOSE, Operation.PORT_REARM):
        assert carol(ask, operation, port_layouts.PORT.pack(port)) == "ENOTCONN"
    assert carol(ask, Operation.PORT_INTERDOMAIN, port_layouts.INTERDOMAIN.pack(domid_of(alice), port)) == "EINVAL"
    assert carol(ask, Operation.PORT_VIRQ, port_layouts.VIRQ.pack(3)) == "EPERM"
    assert carol(ask, Operation.STATUS, b"") == "EACCES"
    home = store_layouts.home(domid_of(alice)).encode() + b"/key\0"
    for kind in (store_layouts.Type.READ, store_layouts.Type.WRITE, store_layouts.Type.RM):
        assert carol(ask, Operation.STORE, store_layouts.HEADER.pack(kind, 0, 0) + home) == "EACCES"
    (found,) = [each for each in world.status()["grants"] if each["first_reference"] == reference]
    assert not found["released"] and [hold["domid"] for hold in found["mapped_by"]] == [domid_of(bob)]


@pytest.mark.parametrize(
    ("domid", "name", "answer"),
    [
        (0, b"", "EACCES"),
        (5, b"", "EACCES"),
        (0x7FF0, b"", "EINVAL"),
        (0xFFFE, b"", "EINVAL"),
        (0xFFFF, b"domain-30000", "EINVAL"),  # the name of another number
        (0xFFFF, b"../x", "EINVAL"),
        (0xFFFF, b"a\0b", "EINVAL"),
        (0xFFFF, b"\xff\xfe", "EINVAL"),
        (0xFFFF, b"line\nbreak", "EINVAL"),
        (0xFFFF, b"x" * 60000, "EINVAL"),
    ],
)
def test_nobody_becomes_whom_the_policy_does_not_let_him_be(
    world: World, domid: int, name: bytes, answer: str
) -> None:
    with Actor(CAROL) as carol:
        assert carol(hello, world.socket, domid, name) == answer


def hello(path: str, domid: int, name: bytes, version: int = wire.VERSION) -> str:
    with Client(path) as client:
        return client.answer_to(Operation.HELLO, wire.HELLO.pack(version, domid, 0) + name)


def out_of_order(path: str) -> list[str]:
    with Client(path) as client:
        found = [client.answer_to(operation) for operation in (Operation.ALLOCATE, Operation.STORE, 999)]
        found.append(client.answer_to(Operation.HELLO, wire.HELLO.pack(7, wire.DOMID_ANY, 0)))
        client.hello()
        found.append(client.answer_to(Operation.HELLO, wire.HELLO.pack(wire.VERSION, wire.DOMID_ANY, 0)))
        found.append(client.answer_to(999))
        return found


def test_hello_comes_first_and_once(world: World) -> None:
    with Actor(CAROL) as carol:
        expected = ["EPROTO", "EPROTO", "EPROTO", "EPROTO", "EISCONN", "ENOSYS"]
        assert carol(out_of_order, world.socket) == expected


# What is stale


def test_a_released_or_revoked_reference_maps_nothing(three: tuple[Actor, Actor, Actor]) -> None:
    alice, bob, _ = three
    for operation in (Operation.RELEASE, Operation.REVOKE):
        reference = alice(grant, domid_of(bob))
        assert alice(ask, operation, layouts.RANGE.pack(reference, 1, 0)) == DONE
        assert bob(try_to_map, domid_of(alice), reference) == "EINVAL"
        assert alice(ask, operation, layouts.RANGE.pack(reference, 1, 0)) == "EINVAL"


def test_a_reference_of_before_the_hypervisors_restart_maps_nothing() -> None:
    """Although both come back under their numbers, and the first one granted is the first one granted."""
    policy = '[[rule]]\nuser = 61002\ndomids = [5]\n[[rule]]\nuser = 61003\ndomids = [7]\n'
    with World(policy=policy) as world, Actor(ALICE) as alice, Actor(BOB) as bob:
        for _ in range(2):
            alice(join, world.socket, 5)
            bob(join, world.socket, 7)
            stale = alice(grant, 7)
            world.end(9)
            world.start()
        alice(join, world.socket, 5)
        bob(join, world.socket, 7)
        fresh = alice(grant, 7)
        assert fresh != stale
        assert bob(try_to_map, 5, stale) == "EINVAL"
        assert bob(try_to_map, 5, fresh) == DONE


def without_incarnations() -> None:
    real = granting.References
    granting.References = lambda _: real(0)


def test_without_incarnations_a_stale_reference_is_another_page() -> None:
    policy = "[[rule]]\nuser = 61002\ndomids = [5]\n"
    with World(policy=policy, without=without_incarnations) as world, Actor(ALICE) as alice, Actor(BOB) as bob:
        alice(join, world.socket, 5)
        stale = alice(grant, bob(join, world.socket))
        world.end(9)
        world.start()
        alice(join, world.socket, 5)
        alice(grant, bob(join, world.socket))
        assert bob(try_to_map, 5, stale) == DONE


SHARED_NUMBER = 'domains_per_user = 10\n[[rule]]\nuser = 61003\ndomids = [7]\n[[rule]]\nuser = 61004\ndomids = [7]\n'


def test_whoever_gets_a_number_after_another_user_gets_nothing_that_was_granted_to_it() -> None:
    with World(policy=SHARED_NUMBER) as world, Actor(ALICE) as alice, Actor(BOB) as bob, Actor(CAROL) as carol:
        grantor = alice(join, world.socket)
        bob(join, world.socket, 7)
        reference = alice(grant, 7)
        port = alice(bind_for, 7)
        bob(leave)
        assert wait_for(lambda: carol(try_to_join, world.socket, 7)) == DONE
        assert carol(try_to_map, grantor, reference) == "EINVAL"
        assert carol(ask, Operation.PORT_INTERDOMAIN, port_layouts.INTERDOMAIN.pack(grantor, port)) == "EINVAL"
        carol(leave)
        assert wait_for(lambda: bob(try_to_join, world.socket, 7)) == DONE  # the same user, started again
        assert bob(try_to_map, grantor, reference) == DONE


def test_without_remembering_the_user_the_next_one_would_map_it() -> None:
    world = World(policy=SHARED_NUMBER, without=without_remembering_users)
    with world, Actor(ALICE) as alice, Actor(BOB) as bob, Actor(CAROL) as carol:
        grantor = alice(join, world.socket)
        bob(join, world.socket, 7)
        reference = alice(grant, 7)
        bob(leave)
        assert wait_for(lambda: carol(try_to_join, world.socket, 7)) == DONE
        assert carol(try_to_map, grantor, reference) == DONE


def without_remembering_users() -> None:
    Extent.is_for = lambda self, domain: self.grantee == domain.domid


def try_to_join(path: str, domid: int) -> str:
    return outcome(join, path, domid)


def wait_for(attempt: object) -> str:
    until = time.monotonic() + PATIENCE_S
    while (found := attempt()) != DONE and time.monotonic() < until:
        time.sleep(0.01)
    return str(found)


def test_a_domain_ends_with_the_process_that_connected_whoever_has_its_socket(world: World) -> None:
    with Actor(BOB) as bob:
        domid = bob(join, world.socket)
        child = bob(leave_a_child_with_the_socket)
        assert [each for each in world.status()["domains"] if each["domid"] == domid]
        bob.end()
        try:
            wait_for(lambda: DONE if all(each["domid"] != domid for each in world.status()["domains"]) else "")
            assert all(each["domid"] != domid for each in world.status()["domains"])
        finally:
            os.kill(child, 9)


def without_watching_processes() -> None:
    connections._pidfd_of = lambda *_: None


def test_without_watching_its_process_a_domain_lives_on_in_a_child() -> None:
    with World(without=without_watching_processes) as world, Actor(BOB) as bob:
        domid = bob(join, world.socket)
        child = bob(leave_a_child_with_the_socket)
        bob.end()
        time.sleep(0.2)
        found = world.status()["domains"]
        os.kill(child, 9)
        assert [each["domid"] for each in found] == [domid]


def leave_a_child_with_the_socket() -> int:
    child = os.fork()
    if child == 0:
        time.sleep(PATIENCE_S)
        os._exit(0)
    return child


# What is malformed


def malformed(path: str) -> list[object]:
    found: list[object] = []
    with Client(path) as client:
        client.hello()
        for size in range(1, wire.REQUEST.size):
            client.stream.send(b"\1" * size)
            found.append(client.receive()[0])
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        client.send(Operation.STORE, bytes(wire.LONGEST_REQUEST_BYTES))
        found.append(client.receive()[0])
        client.send(Operation.STORE, bytes(150_000))
        found.append(client.receive()[0])
        client.stream.send(b"")
        try:
            client.receive()
        except EOFError:
            found.append("ended")
    return found


def test_half_empty_and_oversized_messages(world: World) -> None:
    """An empty packet cannot be told from the end, and is one."""
    with Bystanders(world), Actor(BOB) as bob:
        *halves, longest, longer, empty = bob(malformed, world.socket)
        assert set(halves) == {-errno.EINVAL}
        assert (longest, longer, empty) == (-errno.EMSGSIZE, -errno.EMSGSIZE, "ended")


EDGES = {
    "H": (0, 1, 0x7FEF, 0x7FF0, 0xFFFF),
    "I": (0, 1, 8, 0x7FFFFFFF, 0xFFFFFFFF),
    "Q": (0, 1, 1 << 63, (1 << 64) - 1),
}
FIXED: list[tuple[int, struct.Struct]] = [
    (Operation.PEER, wire.PEER),
    (Operation.ALLOCATE, layouts.ALLOCATE),
    (Operation.RELEASE, layouts.RANGE),
    (Operation.OPEN_OWN, layouts.RANGE),
    (Operation.REVOKE, layouts.RANGE),
    (Operation.GRANTOR_NOTIFY, layouts.GRANTOR_NOTIFY),
    (Operation.GRANTEE_NOTIFY, layouts.GRANTEE_NOTIFY),
    (Operation.UNMAPPED, layouts.HANDLE),
    (Operation.PORT_UNBOUND, port_layouts.UNBOUND),
    (Operation.PORT_INTERDOMAIN, port_layouts.INTERDOMAIN),
    (Operation.PORT_VIRQ, port_layouts.VIRQ),
    (Operation.PORT_CLOSE, port_layouts.PORT),
    (Operation.PORT_REARM, port_layouts.PORT),
]


def ask_edges(path: str) -> int:
    """All combinations of edge values of each field, with the payload too short and too long by a byte as well."""
    asked = 0
    with Client(path) as client:
        client.hello()
        for operation, layout in FIXED:
            fields = [letter for letter in layout.format if letter in EDGES]
            for values in itertools.islice(itertools.product(*(EDGES[letter] for letter in fields)), 700):
                payload = layout.pack(*values)
                assert client.answer_to(operation, payload) != "EIO"
                asked += 1
            assert client.answer_to(operation, payload[:-1]) == "EINVAL"
            assert client.answer_to(operation, payload + b"\0") == ("EINVAL" if fields != [] else DONE)
        for grantor, first, count in itertools.product(EDGES["H"], EDGES["I"], EDGES["I"]):
            assert client.answer_to(Operation.MAP, map_payload([(grantor, first, count)])) in ("EINVAL", DONE)
            asked += 1
        for count in (0, 2, 2048, 2049, 0xFFFFFFFF):
            payload = layouts.MAP.pack(0, 0, count) + layouts.RUN.pack(1, 8, 1)
            assert client.answer_to(Operation.MAP, payload) == "EINVAL"
        for kind, transaction in itertools.product((*range(20), 0xFFFF), EDGES["I"]):
            for rest in (b"", b"\0", b"/\0", b"key", b"key\0", b"//\0", b"@introduceDomain\0", b"x" * 4000 + b"\0"):
                payload = store_layouts.HEADER.pack(kind, 0, transaction) + rest
                assert client.answer_to(Operation.STORE, payload) != "EIO"
                asked += 1
    return asked


def test_edge_values_in_every_field(world: World) -> None:
    with Bystanders(world), Actor(BOB) as bob:
        assert bob(ask_edges, world.socket) > 2000


# Descriptors that somebody sends


def lingering_socket() -> tuple[socket.socket, list[socket.socket]]:
    """A TCP connection whose last close sleeps: it has bytes that the other side does not take."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    ours = socket.socket()
    ours.connect(listener.getsockname())
    theirs, _ = listener.accept()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    ours.setblocking(True)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
    return ours, [theirs, listener]


def send_lingering(path: str) -> str:
    with Client(path) as client:
        client.hello()
        ours, others = lingering_socket()
        packet = wire.REQUEST.pack(Operation.PEER, 0, 1) + wire.PEER.pack(client.domid)
        found = outcome(socket.send_fds, client.stream, [packet], [ours.fileno()])
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for each in (ours, *others):
            each.close()
        return found


def answer_time(path: str) -> float:
    start = time.monotonic()
    with Client(path) as client:
        client.hello()
    return time.monotonic() - start


@needs_refusal
def test_nobody_makes_the_hypervisor_sleep_by_a_descriptor(world: World) -> None:
    """Closing what it received could take as long as the sender says: none is taken."""
    with Bystanders(world), Actor(BOB) as bob:
        assert bob(send_lingering, world.socket) == "EPERM"
        assert bob(flood_with_descriptors, world.socket) == "EPERM"


def flood_with_descriptors(path: str) -> str:
    with Client(path) as client:
        return outcome(socket.send_fds, client.stream, [wire.REQUEST.pack(1, 0, 1)], [0] * 253)


def without_refusing_descriptors() -> None:
    connections.refuse_descriptors = lambda _: None
    ports.refuse_descriptors = lambda _: None
    server.refuse_descriptors = lambda _: None


@needs_refusal
def test_without_refusing_descriptors_everybody_waits_for_the_sender() -> None:
    with World(without=without_refusing_descriptors) as world, Actor(BOB) as bob, Actor(CAROL) as carol:
        assert bob(send_and_close_lingering, world.socket) == DONE
        assert carol(answer_time, world.socket) > LINGER_S / 2


def send_and_close_lingering(path: str) -> str:
    """While the hypervisor does not read us, since we do not read its answers: so its close is the last one."""
    client = KEPT["client"] = Client(path)
    domid = client.hello()
    client.ask(Operation.STORE, store_layouts.HEADER.pack(store_layouts.Type.WRITE, 0, 0) + b"key\0" + bytes(2000))
    for _ in range(80):
        client.send(Operation.STORE, store_layouts.HEADER.pack(store_layouts.Type.READ, 0, 0) + b"key\0")
    time.sleep(0.2)
    ours, KEPT["others"] = lingering_socket()
    packet = wire.REQUEST.pack(Operation.PEER, 0, 1) + wire.PEER.pack(domid)
    found = outcome(socket.send_fds, client.stream, [packet], [ours.fileno()])
    ours.close()
    for _ in range(80):
        client.receive()
    return found


# A port's socket


def victim_joins(path: str) -> int:
    KEPT["domain"] = Domain(path)
    return KEPT["domain"].domid


def victim_binds(remote: int) -> int:
    port = KEPT["port"] = KEPT["domain"].evtchn.bind_unbound_port(remote)
    return int(port)


def attacker_binds(domid: int, port: int) -> None:
    payload = port_layouts.INTERDOMAIN.pack(domid, port)
    _, descriptors = KEPT["client"].ask(Operation.PORT_INTERDOMAIN, payload)
    KEPT["end"] = socket.socket(fileno=descriptors[0])


def victim_reads(timeout: float) -> tuple[list[int], float]:
    """The events, and how much of a processor it took to wait for them."""
    start = time.process_time()
    evtchn = KEPT["domain"].evtchn
    found = evtchn.read(timeout)
    evtchn.unmask(*found)
    return [port - KEPT["port"] for port in found], time.process_time() - start


def victim_notifies(times: int) -> None:
    for _ in range(times):
        KEPT["domain"].evtchn.notify(KEPT["port"])


@pytest.fixture
def bound(world: World) -> Iterator[tuple[Actor, Actor]]:
    """A victim that uses usermm, and an attacker who has bound its port."""
    with Actor(ALICE) as victim, Actor(BOB) as attacker:
        domid = victim(victim_joins, world.socket)
        attacker(attacker_binds, domid, victim(victim_binds, attacker(join, world.socket)))
        yield victim, attacker


def send_garbage() -> None:
    KEPT["end"].send(os.urandom(3000), socket.MSG_DONTWAIT)


def flood_events() -> int:
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += KEPT["end"].send(b"\1", socket.MSG_DONTWAIT)
    return sent


def send_out_of_band() -> None:
    KEPT["end"].send(b"\1", socket.MSG_OOB)


def send_descriptor() -> str:
    return outcome(socket.send_fds, KEPT["end"], [b"\1"], [0] * 10)


def make_it_blocking() -> None:
    fcntl.fcntl(KEPT["end"], fcntl.F_SETFL, 0)


def shut_it(how: int) -> None:
    KEPT["end"].shutdown(how)


def test_garbage_and_floods_are_one_event(bound: tuple[Actor, Actor]) -> None:
    victim, attacker = bound
    attacker(send_garbage)
    assert victim(victim_reads, PATIENCE_S)[0] == [0]
    assert victim(victim_reads, 0)[0] == []
    assert attacker(flood_events) > 100
    assert victim(victim_reads, PATIENCE_S)[0] == [0]
    assert victim(victim_reads, 0)[0] == []


def test_out_of_band_bytes_keep_nobody_busy(bound: tuple[Actor, Actor]) -> None:
    victim, attacker = bound
    attacker(send_out_of_band)
    found, busy_s = victim(victim_reads, 0.5)
    assert found in ([], [0]) and busy_s < 0.25
    attacker(flood_events)
    assert victim(victim_reads, PATIENCE_S)[0] == [0]


@needs_refusal
def test_descriptors_do_not_pass_through_a_port(bound: tuple[Actor, Actor]) -> None:
    victim, attacker = bound
    assert attacker(send_descriptor) == "EPERM"
    assert victim(victim_reads, 0)[0] == []


def test_nobody_blocks_who_notifies_whoever_does_not_read(bound: tuple[Actor, Actor]) -> None:
    """Whatever the flags of the socket say, which both ends of a fork and the hypervisor share."""
    victim, attacker = bound
    attacker(make_it_blocking)
    victim(victim_notifies, 5000)
    assert attacker(flood_events) > 0
    victim(victim_notifies, 5000)


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_an_end_that_is_shut_is_an_event_and_the_port_waits_again(bound: tuple[Actor, Actor], how: int) -> None:
    victim, attacker = bound
    attacker(shut_it, how)
    victim(victim_notifies, 3)
    found, busy_s = victim(victim_reads, 0.5)
    assert found in ([0], []) and busy_s < 0.25
    victim(victim_notifies, 3)


def unmap_loudly(path: str, times: int) -> str:
    """The hypervisor sends in our name to a port of ours whose peer, ourselves, never reads: it must not wait."""
    with Client(path) as client:
        domid = client.hello()
        answer, ends = client.ask(Operation.PORT_UNBOUND, port_layouts.UNBOUND.pack(domid))
        (port,) = port_layouts.PORT.unpack(answer)
        ends += client.ask(Operation.PORT_INTERDOMAIN, port_layouts.INTERDOMAIN.pack(domid, port))[1]
        for end in ends:
            fcntl.fcntl(end, fcntl.F_SETFL, 0)
        reference, own = client.allocate(domid)
        for _ in range(times):
            handle, descriptor = client.map(domid, reference)
            client.ask(Operation.GRANTEE_NOTIFY, layouts.GRANTEE_NOTIFY.pack(handle, 0, 0, EVENT, port))
            os.close(descriptor)
            client.ask(Operation.UNMAPPED, layouts.HANDLE.pack(handle))
        close_all([*ends, own])
        return DONE


def test_the_hypervisor_is_not_blocked_by_a_full_blocking_port(world: World) -> None:
    with Bystanders(world), Actor(BOB) as bob:
        assert bob(unmap_loudly, world.socket, 600) == DONE


def without_sending_at_once() -> None:
    ports._AT_ONCE = socket.MSG_NOSIGNAL


def test_without_its_own_flag_the_hypervisor_waits_for_who_does_not_read() -> None:
    with World(without=without_sending_at_once) as world, Actor(BOB) as bob, Actor(CAROL) as carol:
        bob.start(unmap_loudly, world.socket, 600)
        time.sleep(1)
        carol.start(answer_time, world.socket)
        with pytest.raises(AssertionError, match="no answer"):
            carol.result(0.5)
        world.end(9)


def send_loaded(path: str) -> None:
    """Two domains of one user: one lets its end accept descriptors, the other sends it one that lingers. Both leave."""
    one, two = Client(path), Client(path)
    one.hello(), two.hello()
    answer, (end,) = one.ask(Operation.PORT_UNBOUND, port_layouts.UNBOUND.pack(two.domid))
    (port,) = port_layouts.PORT.unpack(answer)
    _, (other,) = two.ask(Operation.PORT_INTERDOMAIN, port_layouts.INTERDOMAIN.pack(one.domid, port))
    with socket.socket(fileno=end) as sender, socket.socket(fileno=other) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 1)
        ours, KEPT["others"] = lingering_socket()
        socket.send_fds(sender, [b"\1"], [ours.fileno()])
        ours.close()
    one.close()
    two.close()


@needs_refusal
def test_the_hypervisor_does_not_sleep_over_what_lies_in_a_port(world: World) -> None:
    with Actor(BOB) as bob, Actor(CAROL) as carol:
        bob(send_loaded, world.socket)
        carol(answer_time, world.socket)


def without_a_closer() -> None:
    closer._may_take_long = lambda _: False


@needs_refusal
def test_without_a_closer_everybody_waits_for_what_lies_in_a_port() -> None:
    with World(without=without_a_closer) as world, Actor(BOB) as bob, Actor(CAROL) as carol:
        bob(send_loaded, world.socket)
        assert carol(answer_time, world.socket) > LINGER_S / 2


# Locks: how the hypervisor knows who holds what

LOCK = struct.Struct("@hhqqi4x")


def lock(descriptor: int, kind: int, start: int, length: int) -> str:
    command = fcntl.F_OFD_SETLK
    return outcome(fcntl.fcntl, descriptor, command, LOCK.pack(kind, os.SEEK_SET, start, length, 0))


def unlock_own() -> str:
    return lock(KEPT["descriptor"], fcntl.F_UNLCK, 0, 0)


def read_what_is_mapped() -> bytes:
    return os.pread(KEPT["descriptor"], 6, 0)


def mapped_by(world: World, reference: int) -> list[int]:
    found = [each for each in world.status()["grants"] if each["first_reference"] == reference]
    return [hold["domid"] for each in found for hold in each["mapped_by"]]


def test_whoever_unlocks_its_own_lock_is_taken_at_its_word(world: World, three: tuple[Actor, Actor, Actor]) -> None:
    """It seems to have let go, and has not: which is worth no more to it than a copy of what it read."""
    alice, bob, _ = three
    reference = alice(grant, domid_of(bob))
    handle = bob(keep_mapped, domid_of(alice), reference)
    assert mapped_by(world, reference) == [domid_of(bob)]
    assert bob(unlock_own) == DONE
    bob(ask, Operation.UNMAPPED, layouts.HANDLE.pack(handle))
    assert mapped_by(world, reference) == []
    assert bob(read_what_is_mapped) == b"secret"
    assert alice(ask, Operation.REVOKE, layouts.RANGE.pack(reference, 1, 0)) == DONE
    assert bob(read_what_is_mapped) == bytes(6)


def lock_everything(grantor: int, reference: int) -> str:
    """Every byte that no lock is on: those of handles to come. Write locks need a writable descriptor."""
    handle, KEPT["descriptor"] = KEPT["client"].map(grantor, reference, writable=True)
    return lock(KEPT["descriptor"], fcntl.F_WRLCK, handle, 1 << 40)


def test_a_grantee_who_locks_what_is_others_keeps_nobody_from_anything(three: tuple[Actor, Actor, Actor]) -> None:
    alice, bob, _ = three
    reference = alice(grant, domid_of(bob), True)
    assert bob(lock_everything, domid_of(alice), reference) == DONE
    assert alice(ask, Operation.OPEN_OWN, layouts.RANGE.pack(reference, 1, 0)) == DONE
    assert bob(try_to_map, domid_of(alice), reference) == DONE
    assert alice(ask, Operation.RELEASE, layouts.RANGE.pack(reference, 1, 0)) == DONE


def without_a_way_around_locks() -> None:
    Extent.open = (
        lambda self, handle, *, writable: locks.open_held(self.memfd, handle, writable=writable)
    )


def test_without_a_way_around_locks_the_grantee_keeps_the_grantor_out() -> None:
    with World(without=without_a_way_around_locks) as world, Actor(ALICE) as alice, Actor(BOB) as bob:
        grantor = alice(join, world.socket)
        reference = alice(grant, bob(join, world.socket), True)
        assert bob(lock_everything, grantor, reference) == DONE
        assert alice(ask, Operation.OPEN_OWN, layouts.RANGE.pack(reference, 1, 0)) == "EAGAIN"


def wait_for_a_lock_for_ever() -> int:
    """F_OFD_SETLKW on a byte that is locked: the waiter waits, the hypervisor only ever asks."""
    child = os.fork()
    if child == 0:
        lock(KEPT["descriptor"], fcntl.F_WRLCK, 0, 0)
        fcntl.fcntl(KEPT["descriptor"], fcntl.F_OFD_SETLKW, LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        os._exit(0)
    return child


def test_waiting_for_locks_deadlocks_nobody_else(world: World, three: tuple[Actor, Actor, Actor]) -> None:
    alice, bob, _ = three
    reference = alice(grant, domid_of(bob), True)
    bob(keep_writable, domid_of(alice), reference)
    child = bob(wait_for_a_lock_for_ever)
    try:
        with Bystanders(world):
            assert alice(ask, Operation.RELEASE, layouts.RANGE.pack(reference, 1, 0)) == DONE
            assert alice(ask, Operation.STATUS, b"") == "EACCES"
    finally:
        os.kill(child, 9)


def keep_writable(grantor: int, reference: int) -> None:
    _, KEPT["descriptor"] = KEPT["client"].map(grantor, reference, writable=True)


# GRANT_COPY: carried out in the caller, who can only spoil its own


def copy_badly(grantor: int, reference: int) -> list[str]:
    gntdev = KEPT["domain"].gntdev
    granted = abi.COPY_GRANTED.pack(reference, 0, grantor)

    def one(source: bytes, destination: bytes, length: int, flags: int) -> str:
        segment = bytearray(abi.SEGMENT.pack(source, destination, length, flags, 0))
        argument = bytearray(abi.COPY.pack(1, _address(segment)))
        found = outcome(gntdev.ioctl, abi.GRANT_COPY, argument)
        return found if found != DONE else str(abi.SEGMENT.unpack(segment)[-1])

    local = bytearray(PAGE_BYTES)
    here = abi.COPY_LOCAL.pack(_address(local))
    nowhere = abi.COPY_LOCAL.pack(0xDEAD0000)
    kernel = abi.COPY_LOCAL.pack(0xFFFF_8000_0000_0000)
    return [
        one(granted, here, 6, 1),
        one(granted, nowhere, 6, 1),
        one(granted, kernel, 6, 1),
        one(granted, here, 0xFFFF, 1),
        one(abi.COPY_GRANTED.pack(reference, 4095, grantor), here, 2, 1),
        one(here, here, 6, 0),
        one(here, granted, 6, 2),
        one(granted, granted, 6, 3),
        one(granted, here, 6, 0xFF),
        one(abi.COPY_GRANTED.pack(reference + 1, 0, grantor), here, 6, 1),
        one(abi.COPY_GRANTED.pack(reference, 0, 0x7FFF), here, 6, 1),
        outcome(gntdev.ioctl, abi.GRANT_COPY, bytearray(abi.COPY.pack(3, 8))),
        outcome(gntdev.ioctl, abi.GRANT_COPY, bytearray(abi.COPY.pack(0xFFFFFFFF, _address(local)))),
    ]


def _address(buffer: bytearray) -> int:
    return buffer_range(buffer)[0]


def test_copies_with_bad_pointers_lengths_and_references(world: World) -> None:
    with Actor(ALICE) as alice, Actor(BOB) as bob:
        grantor = alice(join, world.socket)
        reference = alice(grant, bob(victim_joins, world.socket))
        expected = ["0", "EFAULT", "EFAULT", "EINVAL", "EINVAL", "EINVAL", "-8", "-8", "EINVAL", "-3", "-2"]
        assert bob(copy_badly, grantor, reference) == [*expected, "EFAULT", "EFAULT"]
        assert alice(read_what_is_mapped) == b"secret"
