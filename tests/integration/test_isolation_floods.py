"""Too much of everything: a hypervisor that others go on using while some user asks for all that there is.

How long the others waited is reported (`pytest -s`), never asserted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from support.attackers import (
    ALICE,
    BOB,
    CAROL,
    DONE,
    KEPT,
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

from usermm.hypercalls import grants as layouts
from usermm.hypercalls import ports as port_layouts
from usermm.hypercalls import store as store_layouts
from usermm.hypercalls import wire
from usermm.hypercalls.store import Type
from usermm.hypercalls.wire import NO_REPLY, Operation
from usermm.hypervisor import connections, holding, reserve, shares

pytestmark = root_only
FLOOD_S = 1.0
_PAGES = 64


@pytest.fixture
def world() -> Iterator[World]:
    """Whatever is done to it, it has in the end what it had at first."""
    with World() as made:
        with Bystanders(made):  # what is loaded and grown once
            pass
        before = made.descriptors(), made.memory_kib()
        yield made
        until = time.monotonic() + PATIENCE_S
        while made.descriptors() > before[0] and time.monotonic() < until:
            time.sleep(0.02)
        assert made.descriptors() <= before[0]
        grown = made.memory_kib() - before[1]
        print(f" the hypervisor kept {grown} KiB more", end="")
        assert grown < 48 * 1024
        with Bystanders(made):
            pass


def report(what: str, bystanders: Bystanders) -> None:
    print(f" {what}: {bystanders.rounds} rounds, the slowest answer {bystanders.slowest_s * 1000:.1f} ms;", end="")


def limit_files(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def join_many(path: str, count: int) -> None:
    KEPT["clients"] = [Client(path) for _ in range(count)]
    for client in KEPT["clients"]:
        client.hello()


def send_until_full(client: Client, operation: int, payload: bytes, flags: int = 0) -> int:
    sent = 0
    client.stream.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(operation, payload, flags)
            sent += 1
    return sent


# Clients that do not receive


def pipeline_without_reading(seconds: float) -> int:
    """A mapping of many segments, asked for again and again by every client."""
    payloads = {}
    for client in KEPT["clients"]:
        first, own = client.allocate(client.domid, _PAGES)
        os.close(own)
        runs = [(client.domid, first + page, 1) for page in range(0, _PAGES, 2)]
        payloads[client] = map_payload([run for run in runs for _ in range(8)][:250])
    sent, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        for client, payload in payloads.items():
            sent += send_until_full(client, Operation.MAP, payload)
        time.sleep(0.001)
    return sent


IN_FLIGHT_FILES = 4000  # the kernel lets the hypervisor's user have as many descriptors under way


def test_descriptors_that_nobody_receives_keep_the_others_from_none() -> None:
    with World(limit_files=IN_FLIGHT_FILES) as world, Actor(BOB) as bob:
        bob(join_many, world.socket, 6)
        with Bystanders(world, at_least=20) as bystanders:
            assert bob(pipeline_without_reading, FLOOD_S) > 10
        report("descriptors under way", bystanders)


def without_a_limit_on_what_is_under_way() -> None:
    connections.Connection._pauses = lambda _: False
    connections.MOST_DESCRIPTORS = 1 << 30


def test_without_a_limit_on_what_is_under_way_nobody_gets_a_descriptor() -> None:
    world = World(limit_files=IN_FLIGHT_FILES, without=without_a_limit_on_what_is_under_way)
    with world, Actor(BOB) as bob, Actor(CAROL) as carol:
        bob(join_many, world.socket, 6)
        bob(pipeline_without_reading, FLOOD_S)
        assert carol(allocate_once, world.socket) == "ENFILE"


def allocate_once(path: str) -> str:
    with Client(path) as client:
        domid = client.hello()
        payload = layouts.ALLOCATE.pack(domid, layouts.ALLOCATE_WANT_DESCRIPTOR, 1)
        return client.answer_to(Operation.ALLOCATE, payload)


def fill_pipes() -> int:
    """Requests of every kind that nobody reads the answers of, and those that have none."""
    sent = 0
    for client in KEPT["clients"]:
        sent += send_until_full(client, Operation.STORE, store_layouts.HEADER.pack(Type.DIRECTORY, 0, 0) + b"/names\0")
        sent += send_until_full(client, Operation.PEER, wire.PEER.pack(1), NO_REPLY)
    return sent


def test_clients_that_stop_reading(world: World) -> None:
    with Actor(BOB) as bob, Bystanders(world, at_least=20) as bystanders:
        bob(join_many, world.socket, 50)
        assert bob(fill_pipes) > 1000
        time.sleep(FLOOD_S / 2)
    report("clients that do not read", bystanders)


# Strangers


def connect_many(path: str, count: int) -> int:
    limit_files(6000)
    KEPT["strangers"] = []
    for _ in range(count):
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if outcome(stranger.connect, path) == DONE:
            KEPT["strangers"].append(stranger)
    return len(KEPT["strangers"])


def test_a_flood_of_connections_without_hello(world: World) -> None:
    with Actor(BOB, limit_files=6000) as bob, Actor(ALICE) as alice, Bystanders(world, at_least=20) as bystanders:
        assert bob(connect_many, world.socket, 3000) == 3000
        assert alice(allocate_once, world.socket) == DONE  # a newcomer gets in
        assert world.descriptors() < 700  # a few hundred strangers, the others were ended
    report("3000 strangers", bystanders)


# Quotas


SMALL = """
domains_per_user = 4
[[rule]]
user = 61003
max_grant_frames = 1
max_maptrack_frames = 1
max_event_channels = 5
max_memkb = 2000
quota_entries = 20
quota_maxsize = 100
quota_maxwatch = 6
quota_transaction = 3
quota_pathmax = 100
"""


def use_up(path: str) -> dict[str, tuple[int, str]]:
    """Of each quota: how often it could be done, and what then came."""
    client = KEPT["client"] = Client(path)
    domid = client.hello()
    kept: list[int] = KEPT.setdefault("kept", [])

    def until_refused(operation: int, payload: Callable[[int], bytes]) -> tuple[int, str]:
        for times in range(5000):
            try:
                _, descriptors = client.ask(operation, payload(times))
            except OSError as error:
                return times, errno.errorcode[error.errno or 0]
            kept.extend(descriptors)
        return times, "no end"

    def store(kind: int, rest: Callable[[int], bytes]) -> tuple[int, str]:
        return until_refused(Operation.STORE, lambda times: store_layouts.HEADER.pack(kind, 0, 0) + rest(times))

    reference, own = client.allocate(domid, 64)
    kept.append(own)
    return {
        "mapped": until_refused(Operation.MAP, lambda _: map_payload([(domid, reference, 64)])),
        "grants": until_refused(Operation.ALLOCATE, lambda _: layouts.ALLOCATE.pack(domid, 0, 1)),
        "own": until_refused(Operation.OPEN_OWN, lambda _: layouts.RANGE.pack(reference, 64, 0)),
        "ports": until_refused(Operation.PORT_UNBOUND, lambda _: port_layouts.UNBOUND.pack(domid)),
        "watches": until_refused(Operation.WATCH, lambda times: b"key\0%d" % times),
        "nodes": store(Type.WRITE, lambda times: b"key%d\0value" % times),
        "size": store(Type.WRITE, lambda times: b"key\0" + bytes(10 * times)),
        "path": store(Type.MKDIR, lambda times: b"k" * 10 * (times + 1) + b"\0"),
        "transactions": store(Type.TRANSACTION_START, lambda _: b""),
    }


def count_domains(path: str) -> tuple[int, str]:
    clients = KEPT["more"] = []
    while True:
        clients.append(Client(path))
        found = outcome(clients[-1].hello)
        if found != DONE:
            return len(clients), found


def test_each_quota_ends_there_and_for_that_domain_alone() -> None:
    with World(policy=SMALL) as world, Actor(BOB) as bob, Bystanders(world):
        found = bob(use_up, world.socket)
        assert found == {
            "mapped": (4, "ENOSPC"),
            "grants": (500 - 64, "ENOSPC"),
            "own": (256 - 5, "ENOSPC"),
            "ports": (5, "ENOSPC"),
            "watches": (6, "EDQUOT"),
            "nodes": (20, "ENOSPC"),
            "size": (0, "ENOSPC"),
            "path": (0, "ENOSPC"),
            "transactions": (3, "EDQUOT"),
        }
        assert bob(count_domains, world.socket) == (4, "ENOSPC")


def use_memory_of_two_domains(path: str) -> str:
    """One after the other; what the first one had is kept by its descriptor."""
    for _ in range(2):
        with Client(path) as client:
            KEPT.setdefault("kept", []).append(client.allocate(client.hello(), 400)[1])
    return ",".join(outcome(os.pwrite, descriptor, b"x", 0) for descriptor in KEPT["kept"])


def test_memory_counts_as_long_as_its_domain_lives() -> None:
    """Not protected: a process can keep what its former domains had. It counts on its control group, as all memory."""
    with World(policy=SMALL) as world, Actor(BOB) as bob:
        assert bob(use_memory_of_two_domains, world.socket) == f"{DONE},{DONE}"


def grant_ten(grantee: int) -> int:
    client: Client = KEPT["clients"][0]
    reference, own = client.allocate(grantee, 10)
    os.close(own)
    KEPT["reference"] = reference
    return reference


def end_it(operation: int) -> str:
    return str(KEPT["clients"][0].answer_to(operation, layouts.RANGE.pack(KEPT["reference"], 10, 0)))


def keep_it_mapped(grantor: int, reference: int) -> None:
    KEPT["descriptor"] = KEPT["clients"][0].map(grantor, reference, 10)[1]


def first_domid() -> int:
    return int(KEPT["clients"][0].domid)


def test_what_a_grantee_never_unmaps_counts_on_the_grantor_unless_it_revokes(world: World) -> None:
    with Actor(ALICE) as alice, Actor(BOB) as bob:
        for actor in (alice, bob):
            actor(join_many, world.socket, 1)
        for operation, counted in ((Operation.REVOKE, 0), (Operation.RELEASE, 10)):
            reference = alice(grant_ten, bob(first_domid))
            bob(keep_it_mapped, alice(first_domid), reference)
            assert alice(end_it, operation) == DONE
            (usage,) = [each["usage"] for each in world.status()["domains"] if each["uid"] == ALICE]
            assert usage["grants"] == counted


# Descriptors, which quotas do not count


def take_all(path: str, domains: int) -> tuple[int, str]:
    """Single pages, which cost the hypervisor a descriptor each and nobody else anything."""
    join_many(path, domains)
    taken = 0
    for client in KEPT["clients"]:
        while (found := client.answer_to(Operation.ALLOCATE, layouts.ALLOCATE.pack(client.domid, 0, 1))) == DONE:
            taken += 1
    return taken, found


def test_one_user_cannot_have_all_descriptors() -> None:
    with World(limit_files=500) as world, Actor(BOB) as bob, Actor(ALICE) as alice:
        with Bystanders(world, at_least=10) as bystanders:
            taken, found = bob(take_all, world.socket, 8)
            assert found == "ENFILE" and 150 < taken < 300
            assert 30 < alice(take_all, world.socket, 4)[0] < 150  # another one has half of what is left
        report("descriptors", bystanders)


def allocate_by_the_first() -> str:
    client: Client = KEPT["clients"][0]
    return client.answer_to(Operation.ALLOCATE, layouts.ALLOCATE.pack(client.domid, 0, 1))


def without_a_reserve() -> None:
    reserve.Reserve.refuse_hog = lambda *_: None


def test_without_a_reserve_one_user_has_them_all() -> None:
    with World(limit_files=500, without=without_a_reserve) as world, Actor(BOB) as bob, Actor(CAROL) as carol:
        carol(join_many, world.socket, 1)
        assert bob(take_all, world.socket, 8)[1] == "EMFILE"
        assert carol(allocate_by_the_first) == "EMFILE"


# Locks without end


LOCK = struct.Struct("@hhqqi4x")
LOCKS = 8000


def lock_many(path: str, count: int) -> int:
    """Between each two is a byte without, or the kernel would make one of them."""
    client = KEPT["client"] = Client(path)
    domid = client.hello()
    first, KEPT["own"] = client.allocate(domid, 300)
    KEPT["holds"] = []
    for _ in range(4):
        runs = [(domid, first + page, 1) for page in range(0, 300, 2)]
        answer, descriptors = client.ask(Operation.MAP, map_payload(runs))
        KEPT["holds"] += [handle for handle, *_ in layouts.SEGMENT.iter_unpack(answer[layouts.MAPPED.size :])]
        KEPT.setdefault("descriptors", []).extend(descriptors)
    for number in range(count, 0, -1):
        where = (1 << 40) + 2 * number
        fcntl.fcntl(KEPT["own"], fcntl.F_OFD_SETLK, LOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, where, 1, 0))
    return len(KEPT["holds"])


def make_it_search(seconds: float) -> int:
    """Handles that are still held, thousands in a message; and closings, after which it looks for itself."""
    client, handles = KEPT["client"], KEPT["holds"]
    payload = b"".join(layouts.HANDLE.pack(handles[number % len(handles)]) for number in range(8000))
    asked, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        client.send(Operation.UNMAPPED, payload, NO_REPLY)
        if KEPT["descriptors"]:
            os.close(KEPT["descriptors"].pop())
        client.ask(Operation.PEER, wire.PEER.pack(client.domid))
        asked += 1
    return asked


def test_locks_without_end_do_not_slow_the_others(world: World) -> None:
    with Actor(BOB, limit_files=4000) as bob:
        assert bob(lock_many, world.socket, LOCKS) == 600
        with Bystanders(world, at_least=20) as bystanders:
            assert bob(make_it_search, FLOOD_S) > 0
        report("locks", bystanders)
        assert wait_for_slow(world)


def wait_for_slow(world: World) -> bool:
    """The audit is written a little later."""
    until = time.monotonic() + PATIENCE_S
    while not (found := any(record["event"] == "slow" for record in world.audit())) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def without_giving_up() -> None:
    holding._SLOW_LOOK_NS = holding._SLOW_QUERY_NS = 1 << 62


def test_what_giving_up_on_locks_is_worth() -> None:
    """The same without: nothing is asserted but that it was at work, since nothing is promised in seconds."""
    with World(without=without_giving_up) as world, Actor(BOB, limit_files=4000) as bob:
        bob(lock_many, world.socket, LOCKS)
        with Bystanders(world, at_least=1) as bystanders:
            bob(make_it_search, FLOOD_S)
        report("without giving up", bystanders)


# Work without end


def keep_it_busy(seconds: float) -> int:
    """The dearest requests there are, by as many domains as one user may have."""
    until, asked = time.monotonic() + seconds, 0
    payloads = {}
    for client in KEPT["clients"]:
        first, own = client.allocate(client.domid, 16_000)
        os.close(own)
        client.ask(Operation.REVOKE, layouts.RANGE.pack(first, 8_000, 0))
        payloads[client] = [
            (Operation.ALLOCATE, layouts.ALLOCATE.pack(client.domid, 0, 16_000)),
            (Operation.RELEASE, layouts.RANGE.pack(first - 1, 16_000, 0)),
            (Operation.RELEASE, layouts.RANGE.pack(0, (1 << 20) - 9, 0)),
            (Operation.OPEN_OWN, layouts.RANGE.pack(first + 8_000, 8_000, 0)),
        ]
        client.stream.setblocking(False)
    while time.monotonic() < until:
        for client, requests in payloads.items():
            for operation, payload in requests:
                with contextlib.suppress(BlockingIOError):
                    client.send(operation, payload)
                    asked += 1
                with contextlib.suppress(BlockingIOError):
                    close_all(client.receive()[2])
    return asked


def test_many_domains_of_one_user_do_not_starve_the_others(world: World) -> None:
    with Actor(BOB) as bob:
        bob(join_many, world.socket, 20)
        with Bystanders(world, at_least=20) as bystanders:
            assert bob(keep_it_busy, 2 * FLOOD_S, patience_s=60) > 100
        report("20 busy domains", bystanders)


def without_shares() -> None:
    shares.SHARE_NS = 1 << 62


def test_what_shares_are_worth() -> None:
    """The same without them: nothing is asserted, since nothing is promised in seconds."""
    with World(without=without_shares) as world, Actor(BOB) as bob:
        bob(join_many, world.socket, 20)
        with Bystanders(world, at_least=3) as bystanders:
            bob(keep_it_busy, FLOOD_S, patience_s=60)
        report("without shares", bystanders)


# The store


def flood_store(seconds: float) -> dict[str, int]:
    """All nodes, all watches, all transactions of several domains; nobody reads an event, nobody ends anything."""
    done: dict[str, int] = {}

    def ask(client: Client, operation: int, payload: bytes) -> None:
        try:
            KEPT.setdefault("watches", []).extend(client.ask(operation, payload)[1])
            found = DONE
        except OSError as error:
            found = errno.errorcode[error.errno or 0]
        done[found] = done.get(found, 0) + 1

    def store(client: Client, kind: int, rest: bytes, transaction: int = 0) -> None:
        ask(client, Operation.STORE, store_layouts.HEADER.pack(kind, 0, transaction) + rest)

    for client in KEPT["clients"]:
        for number in range(130):
            ask(client, Operation.WATCH, b"/local/domain\0%d" % number)
        for number in range(1010):
            store(client, Type.WRITE, b"d%d/key\0" % (number % 100) + bytes(200) + b"%d" % number)
        for _ in range(11):
            store(client, Type.TRANSACTION_START, b"")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for client in KEPT["clients"]:
            for number in range(20):
                store(client, Type.WRITE, b"d%d/key\0x" % number)
            store(client, Type.RM, b"d99\0")
    return done


def test_a_flooded_store(world: World) -> None:
    with Actor(BOB, limit_files=4000) as bob:
        bob(join_many, world.socket, 6)
        with Bystanders(world, at_least=20) as bystanders:
            found = bob(flood_store, FLOOD_S, patience_s=60)
            assert found.keys() <= {DONE, "EDQUOT", "ENOSPC"} and found["EDQUOT"] > 6
        report("the store", bystanders)
