"""Granted memory under attack: by its grantee, by its grantor, by somebody who has nothing to do with it.

The hypervisor, grantor and grantee are three users, as real isolation needs it; docs/isolation.md has the table.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import types
from collections.abc import Callable, Iterator

import pytest
from support import memory_attacks as attacks
from support.attackers import (
    ALICE,
    BOB,
    CAROL,
    DONE,
    HYPERVISOR,
    KEPT,
    PAGE_BYTES,
    Actor,
    Client,
    World,
    hand_over,
    handed_over,
    map_payload,
    outcome,
)
from support.users import root_only

from usermm.commands import hypervisor as command
from usermm.hypercalls import pools as pool_layouts
from usermm.hypercalls.grants import MAP_ATTACH
from usermm.hypercalls.wire import PEER, PEER_IS, Operation
from usermm.hypervisor import locks, memfds

pytestmark = root_only
SECRET = b"the grantor's"

Attack = Callable[[int], str]
AttackOnProcess = Callable[[int, int, int], str]


# What the actors do


def join(path: str) -> int:
    KEPT["client"] = Client(path)
    return KEPT["client"].hello()


def grant(grantee: int, writable: bool) -> int:
    """The reference of a page with the secret, which is mapped here."""
    reference, KEPT["descriptor"] = KEPT["client"].allocate(grantee, writable=writable)
    os.pwrite(KEPT["descriptor"], SECRET, 0)
    KEPT["address"] = attacks.mapped(KEPT["descriptor"], mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    return reference


def content() -> bytes:
    return os.pread(KEPT["descriptor"], len(SECRET), 0)


def map_it(grantor: int, reference: int, writable: bool) -> None:
    KEPT["handle"], KEPT["descriptor"] = KEPT["client"].map(grantor, reference, writable=writable)


def where_it_is() -> tuple[int, int, int]:
    return os.getpid(), KEPT["address"], KEPT["descriptor"]


def attack(function: Attack) -> str:
    return function(KEPT["descriptor"])


def is_isolated(domid: int) -> bool:
    return bool(PEER_IS.unpack_from(KEPT["client"].ask(Operation.PEER, PEER.pack(domid))[0])[1])


class Pair:
    """A grantor, a grantee, and a page of the first that the second was given."""

    def __init__(self, world: World, grantor_uid: int, grantee_uid: int, *, writable: bool = False) -> None:
        self.world = world
        self.grantor, self.grantee = Actor(grantor_uid), Actor(grantee_uid)
        try:
            self.grantor_domid, self.grantee_domid = (each(join, world.socket) for each in (self.grantor, self.grantee))
            reference = self.grantor(grant, self.grantee_domid, writable)
            self.grantee(map_it, self.grantor_domid, reference, writable)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self.grantor.end()
        self.grantee.end()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(scope="module")
def read_only(world: World) -> Iterator[Pair]:
    with Pair(world, ALICE, BOB) as pair:
        yield pair


@pytest.fixture
def writable(world: World) -> Iterator[Pair]:
    with Pair(world, ALICE, BOB, writable=True) as pair:
        yield pair


# A grantee of another user, and what it was given to read

REFUSED: list[tuple[Attack, str]] = [
    (attacks.map_it_writable, "EACCES"),
    (attacks.make_a_shared_mapping_writable, "EACCES"),
    (attacks.make_a_shared_mapping_writable_by_key, "EACCES"),
    (attacks.map_it_again_writable_from_the_mapping, "EACCES"),
    (attacks.rearrange_its_mapping, "EINVAL"),
    (attacks.punch_through_the_mapping, "EACCES"),
    (attacks.write_own_memory_file, "EIO"),
    (attacks.read_a_file_into_it, "EFAULT"),
    (attacks.fill_it_by_userfaultfd, "EPERM"),
    (attacks.write_it, "EBADF"),
    (attacks.write_it_after_setting_flags, "EBADF"),
    (attacks.truncate_it, "EINVAL"),
    (attacks.punch_a_hole, "EBADF"),
    (attacks.seal_it, "EPERM"),
    (attacks.send_a_file_into_it, "EBADF"),
    (attacks.splice_into_it, "EBADF"),
    (attacks.copy_a_range_into_it, "EBADF"),
    (attacks.write_it_by_io_uring, "EBADF"),
    (attacks.read_into_it_by_io_uring, "EFAULT"),
    (attacks.reopen_it, "EACCES"),
    (attacks.reopen_it_to_read, "EACCES"),
    (attacks.reopen_it_by_its_mapping, "EPERM"),
    (attacks.reopen_it_by_a_handle, "EPERM"),
    (attacks.reopen_it_in_a_user_namespace, "EACCES"),
    (attacks.reopen_it_after_changing_its_mode, "EPERM,EPERM"),
    (attacks.take_it_into_possession, "EPERM"),
    (attacks.set_its_attributes, "refused"),
    (attacks.in_a_forked_child, "EACCES,EACCES,EBADF"),
]
OWN_COPY: list[Attack] = [
    attacks.make_a_private_mapping_writable,
    attacks.write_own_memory_file_privately,
    attacks.write_to_its_page_in_a_pipe,
    attacks.gift_its_page_to_a_pipe,
]
ON_PROCESS: list[tuple[AttackOnProcess, str]] = [
    (attacks.write_by_its_memory_file, "EACCES"),
    (attacks.write_by_process_vm_writev, "EPERM"),
    (attacks.trace_it, "EPERM"),
    (attacks.take_its_descriptor, "EPERM"),
    (attacks.open_its_descriptor, "EACCES"),
    (attacks.open_its_mapping, "EACCES"),
]


def names(attack: object) -> str | None:
    return getattr(attack, "__name__", None)


@pytest.mark.parametrize(("way", "expected"), REFUSED, ids=names)
def test_a_grantee_writes_to_what_it_may_read(read_only: Pair, way: Attack, expected: str) -> None:
    assert read_only.grantee(attack, way) == expected
    assert read_only.grantor(content) == SECRET


@pytest.mark.parametrize("way", OWN_COPY, ids=names)
def test_what_a_grantee_can_write_is_a_copy_of_its_own(read_only: Pair, way: Attack) -> None:
    assert read_only.grantee(attack, way) == DONE
    assert read_only.grantor(content) == SECRET


@pytest.mark.parametrize("way", [attacks.map_it_writable, attacks.reopen_it, attacks.write_it], ids=names)
def test_a_third_user_gets_no_more_than_the_grantee_who_passes_the_descriptor_on(read_only: Pair, way: Attack) -> None:
    """A grantee can pass on what it reads, by descriptor or by mail; nobody can write by it."""
    with Actor(CAROL) as carol:
        carol.start(take_and_attack, way)
        while read_only.grantee(outcome_of_handing_over) != DONE:
            pass
        assert carol.result() in ("EACCES", "EBADF")
    assert read_only.grantor(content) == SECRET


def take_and_attack(way: Attack) -> str:
    with handed_over("third") as wait:
        descriptor = wait()
        assert os.pread(descriptor, len(SECRET), 0) == SECRET
        return way(descriptor)


def outcome_of_handing_over() -> str:
    return outcome(hand_over, "third", KEPT["descriptor"])


@pytest.mark.parametrize(("way", "expected"), ON_PROCESS, ids=names)
def test_a_grantee_goes_for_the_grantor(read_only: Pair, way: AttackOnProcess, expected: str) -> None:
    assert read_only.grantee(way, *read_only.grantor(where_it_is)) == expected
    assert read_only.grantor(content) == SECRET


@pytest.mark.parametrize(("way", "expected"), ON_PROCESS, ids=names)
@pytest.mark.parametrize("uid", [BOB, HYPERVISOR], ids=["another user", "its own user"])
def test_somebody_goes_for_the_hypervisor(
    read_only: Pair, way: AttackOnProcess, expected: str, uid: int
) -> None:
    """Also a process of its own user cannot look into it: it is not dumpable (prctl(2))."""
    with Actor(uid) as attacker:
        assert attacker(way, read_only.world.pid, *read_only.grantor(where_it_is)[1:]) == expected


def stop_it(pid: int) -> str:
    return outcome(os.kill, pid, 0) + "," + outcome(resource.prlimit, pid, resource.RLIMIT_NOFILE)


def test_signals_and_limits_are_for_its_own_user(read_only: Pair) -> None:
    """Domains of the hypervisor's user could stop it, as root can."""
    assert read_only.grantee(stop_it, read_only.world.pid) == "EPERM,EPERM"
    assert read_only.grantee(stop_it, read_only.grantor.pid) == "EPERM,EPERM"
    with Actor(HYPERVISOR) as own:
        assert own(stop_it, read_only.world.pid).startswith(DONE)


def test_different_users_are_said_to_be_isolated_and_the_same_are_not(world: World) -> None:
    with Pair(world, ALICE, BOB) as apart, Pair(world, ALICE, ALICE) as same, Pair(world, 0, BOB) as root:
        assert apart.grantee(is_isolated, apart.grantor_domid)
        assert not same.grantee(is_isolated, same.grantor_domid)
        assert not root.grantee(is_isolated, root.grantor_domid)
    with Pair(world, HYPERVISOR, BOB) as own:
        assert not own.grantee(is_isolated, own.grantor_domid)


@pytest.mark.parametrize("way", [way for way, _ in ON_PROCESS if way is not attacks.open_its_mapping], ids=names)
def test_a_process_of_the_same_user_can_get_at_the_grantor(world: World, way: AttackOnProcess) -> None:
    """Which is why it is never called isolated. Its memory and descriptors are open; the file itself is not."""
    with Pair(world, ALICE, ALICE) as pair:
        expected = "EACCES" if way is attacks.open_its_descriptor else DONE
        assert pair.grantee(way, *pair.grantor(where_it_is)) == expected


@pytest.mark.parametrize("way", [attacks.reopen_it, attacks.map_it_writable], ids=names)
def test_a_domain_of_the_hypervisors_user_can_reopen_what_it_may_only_read(world: World, way: Attack) -> None:
    """The memory is the hypervisor's user's: nobody runs domains as that user who wants isolation."""
    with Pair(world, ALICE, HYPERVISOR) as pair:
        assert pair.grantee(attack, way) == (DONE if way is attacks.reopen_it else "EACCES")


# Who may write


def grow(descriptor: int) -> str:
    return outcome(os.ftruncate, descriptor, 2 * PAGE_BYTES)


def write_behind_the_end(descriptor: int) -> str:
    return outcome(os.pwrite, descriptor, b"x", 2 * PAGE_BYTES)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (attacks.truncate_it, "EPERM"),
        (grow, "EPERM"),
        (write_behind_the_end, "EPERM"),
        (attacks.seal_it, "EPERM"),
        (attacks.reopen_it, "EACCES"),
        (attacks.reopen_it_after_changing_its_mode, "EPERM,EPERM"),
        (attacks.take_it_into_possession, "EPERM"),
        (attacks.set_its_attributes, "refused"),
    ],
    ids=names,
)
@pytest.mark.parametrize("side", ["grantor", "grantee"])
def test_nobody_takes_writable_pages_from_the_other(writable: Pair, way: Attack, expected: str, side: str) -> None:
    assert getattr(writable, side)(attack, way) == expected
    assert writable.grantor(content) == SECRET


def test_who_may_write_can_make_a_hole_which_reads_as_zeros(writable: Pair) -> None:
    """No more than writing zeros: neither side faults."""
    assert writable.grantee(attack, attacks.punch_a_hole) == DONE
    assert writable.grantor(content) == bytes(len(SECRET))
    assert writable.grantee(attack, attacks.map_it_writable) == DONE
    assert writable.grantor(content) == attacks.TEXT.ljust(len(SECRET), b"\0")


@pytest.mark.parametrize("way", [grow, attacks.truncate_it, attacks.seal_it], ids=names)
def test_a_grantor_of_read_only_pages_can_neither_resize_nor_seal_them(read_only: Pair, way: Attack) -> None:
    """A truncation would be SIGBUS for the grantee."""
    assert read_only.grantor(attack, way) == "EPERM"


def test_a_grantor_can_take_read_only_pages_away_whatever_the_grantee_does(world: World) -> None:
    """That is revocation: the grantee reads zeros."""
    with Pair(world, ALICE, BOB) as pair:
        assert pair.grantor(attack, attacks.punch_a_hole) == DONE
        assert pair.grantee(content) == bytes(len(SECRET))


# Pools: the grantor writes the table, the grantee the marks


def make_pool(grantee: int) -> int:
    answer, (KEPT["pages"], KEPT["table"], KEPT["marks"]) = KEPT["client"].ask(
        Operation.POOL, pool_layouts.POOL.pack(grantee, 0)
    )
    first: int = pool_layouts.POOL_MADE.unpack(answer)[0]
    os.pwrite(KEPT["pages"], SECRET, 0)
    os.pwrite(KEPT["pages"], b"another page", PAGE_BYTES)
    os.pwrite(KEPT["table"], pool_layouts.WORD.pack(first), 0)
    return first


def attach(grantor: int, reference: int) -> int:
    payload = bytearray(map_payload([(grantor, reference, 1)]))
    payload[0] |= MAP_ATTACH
    _, descriptors = KEPT["client"].ask(Operation.MAP, bytes(payload))
    KEPT["pages"], KEPT["table"], KEPT["marks"] = descriptors
    return len(descriptors)


def attack_named(name: str, way: Attack) -> str:
    return way(KEPT[name])


def second_page() -> bytes:
    return os.pread(KEPT["pages"], 12, PAGE_BYTES)


def test_of_a_pool_each_side_writes_its_own_page_and_no_more(world: World) -> None:
    """What a pool does not keep: its grantee can read all of its pages, not only those that are granted now."""
    with Pair(world, ALICE, BOB) as pair:
        reference = pair.grantor(make_pool, pair.grantee_domid)
        assert pair.grantee(attach, pair.grantor_domid, reference) == 3
        for name, actor in [("pages", pair.grantee), ("table", pair.grantee), ("marks", pair.grantor)]:
            for way, expected in REFUSED:
                assert actor(attack_named, name, way) == expected, (name, way)
        for name, actor in [("marks", pair.grantee), ("table", pair.grantor)]:
            assert actor(attack_named, name, attacks.truncate_it) == "EPERM"
            assert actor(attack_named, name, attacks.reopen_it) == "EACCES"
            assert actor(attack_named, name, attacks.write_it) == DONE
        assert pair.grantee(second_page) == b"another page"


# Each protection was there for something: the same attacks on a hypervisor without it


def without_owner_only() -> None:
    memfds._OWNER_ONLY = 0o666


def without_read_only_files() -> None:
    real = locks.open_held
    locks.open_held = lambda memfd, byte, **_: real(memfd, byte, writable=True)


def without_seals() -> None:
    untouched = types.SimpleNamespace(**{name: getattr(fcntl, name) for name in dir(fcntl) if name.isupper()})
    untouched.fcntl = lambda *_: 0
    memfds.fcntl = untouched


def without_protecting_itself() -> None:
    command._protect = lambda: attacks.libc("prctl", 4, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("without", "way", "writable", "expected"),
    [
        (without_owner_only, attacks.reopen_it, False, attacks.TEXT),
        (without_read_only_files, attacks.map_it_writable, False, attacks.TEXT),
        (without_read_only_files, attacks.write_it_by_io_uring, False, attacks.TEXT),
        (without_read_only_files, attacks.make_a_shared_mapping_writable, False, attacks.TEXT),
        (without_seals, attacks.truncate_it, True, b""),
    ],
    ids=names,
)
def test_without_its_protection_the_attack_succeeds(
    without: Callable[[], None], way: Attack, writable: bool, expected: bytes
) -> None:
    with World(without=without) as world, Pair(world, ALICE, BOB, writable=writable) as pair:
        assert pair.grantee(attack, way) == DONE
        assert pair.grantor(content)[: len(attacks.TEXT)] == expected


def test_without_being_undumpable_a_process_of_its_user_takes_the_hypervisors_descriptors() -> None:
    with World(without=without_protecting_itself) as world, Actor(HYPERVISOR) as attacker:
        assert attacker(attacks.take_its_descriptor, world.pid, 0, 2) == DONE
