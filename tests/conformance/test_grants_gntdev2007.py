"""The contract of the first gntdev (seed2007): slots, and every errno of every call."""

from __future__ import annotations

import errno

import pytest
from conformance.grants_client import PRIVATE, READ_WRITE, SHARED, Owner, User2007
from conformance.grants_world import PAGE, World, errno_of, eventually

from usermm.uapi import xen_gntdev

SLOTS = xen_gntdev.SLOTS_2007
NOWHERE = [(1, 0xFFFF_FFFF)]
"""A reference that nobody checks before mmap."""


def free_slots(user: User2007) -> int:
    """How many there are, by taking and freeing them all."""
    taken = []
    while errno_of(lambda: taken.append(user.take(NOWHERE))) == "success":
        pass
    for slot in taken:
        user.free(slot)
    return len(taken)


# MAP_GRANT_REF


def test_a_fresh_file_gives_slot_0_first(user2007: User2007) -> None:
    assert [user2007.take(NOWHERE) for _ in range(SLOTS)] == list(range(SLOTS))


def test_single_grants_are_last_in_first_out(user2007: User2007) -> None:
    slots = [user2007.take(NOWHERE) for _ in range(6)]
    for slot in (4, 1, 3):
        user2007.free(slots[slot])
    assert [user2007.take(NOWHERE) for _ in range(4)] == [3, 1, 4, 6]


def test_a_file_has_128_slots(user2007: User2007) -> None:
    """ENOMEM: no slot. Nothing is lost by asking."""
    for _ in range(SLOTS):
        user2007.take(NOWHERE)
    assert errno_of(user2007.take, NOWHERE) == "ENOMEM"
    user2007.free(77)
    assert user2007.take(NOWHERE) == 77
    assert errno_of(user2007.take, NOWHERE) == "ENOMEM"


def test_files_have_slots_of_their_own(user2007: User2007) -> None:
    other = User2007(user2007.domain)
    assert user2007.take(NOWHERE) == other.take(NOWHERE) == 0


def test_a_range_is_contiguous_and_next_fit(user2007: User2007) -> None:
    """Each search begins where the last range ended, also when there is room before."""
    assert user2007.take(NOWHERE * 10) == 0
    assert user2007.take(NOWHERE * 10) == 10
    user2007.free(0, 10)
    assert user2007.take(NOWHERE * 10) == 20


def test_a_range_search_wraps_around(user2007: User2007) -> None:
    for first in (0, 32, 64, 96):
        assert user2007.take(NOWHERE * 32) == first
    user2007.free(32, 40)
    assert user2007.take(NOWHERE * 20) == 32
    assert user2007.take(NOWHERE * 20) == 52
    assert errno_of(user2007.take, NOWHERE * 2) == "ENOMEM"


def test_the_search_finds_a_range_across_its_own_beginning(user2007: User2007) -> None:
    """Next-fit stands inside the only room there is."""
    assert user2007.take(NOWHERE * 64) == 0
    assert user2007.take(NOWHERE * 64) == 64
    user2007.free(0, 64)
    assert user2007.take(NOWHERE * 40) == 0  # next-fit is 40 now
    user2007.free(0, 40)
    assert user2007.take(NOWHERE * 60) == 0


def test_a_range_ends_with_the_last_slot(user2007: User2007) -> None:
    """Wrapping around is where to look, not what a range may do."""
    assert user2007.take(NOWHERE * 120) == 0
    user2007.free(0, 4)
    assert errno_of(user2007.take, NOWHERE * 12) == "ENOMEM"
    assert user2007.take(NOWHERE * 8) == 120
    assert user2007.take(NOWHERE * 4) == 0


def test_all_128_at_once(user2007: User2007) -> None:
    assert user2007.take(NOWHERE * SLOTS) == 0
    user2007.free(0, SLOTS)
    assert user2007.take(NOWHERE * SLOTS) == 0


def test_ranges_and_single_grants_share_the_slots(user2007: User2007) -> None:
    assert user2007.take(NOWHERE) == 0
    assert user2007.take(NOWHERE * 3) == 1
    assert user2007.take(NOWHERE) == 4
    user2007.free(1, 3)
    assert user2007.take(NOWHERE * 2) == 5
    assert user2007.take(NOWHERE) in (1, 2, 3)


def test_no_room_for_a_range_between_others(user2007: User2007) -> None:
    """ENOMEM: slots enough, but no range of them."""
    for _ in range(SLOTS):
        user2007.take(NOWHERE)
    for slot in range(0, SLOTS, 2):
        user2007.free(slot)
    assert errno_of(user2007.take, NOWHERE * 2) == "ENOMEM"
    assert free_slots(user2007) == SLOTS // 2


def test_map_of_nothing(user2007: User2007) -> None:
    assert errno_of(user2007.map_raw, 0, user2007.domain.place(bytes(8))) == "EINVAL"
    assert errno_of(user2007.map_raw, 0, user2007.domain.bad_address) == "EINVAL"


@pytest.mark.parametrize("count", [129, 130, 1 << 16, (1 << 32) - 1])
def test_map_of_more_than_there_are_slots(user2007: User2007, count: int) -> None:
    assert errno_of(user2007.map_raw, count, user2007.domain.place(bytes(130 * 8))) == "ENOMEM"


def test_map_with_a_bad_pointer(user2007: User2007) -> None:
    for count in (1, 2, 128):
        assert errno_of(user2007.map_raw, count, user2007.domain.bad_address) == "EFAULT"
    assert user2007.take(NOWHERE) == 0


def test_references_are_not_checked_until_mmap(world: World, user2007: User2007) -> None:
    """A missing domain and a missing reference are as good as any."""
    slot = user2007.take([(world.unused_domid, 8), (user2007.domain.domid, 0xFFFF_FFFF), (0xFFFF_FFFF, 0)])
    for each in range(slot, slot + 3):
        assert errno_of(user2007.mmap, each) == "ENOMEM"


# mmap


def test_mmap_shows_what_was_granted(owner: Owner, user2007: User2007) -> None:
    made, address = owner.share(user2007.domain.domid, [b"first", b"second"])
    mapped = user2007.mmap(user2007.take(made.granted), 2)
    assert user2007.domain.peek(mapped, 5) == b"first"
    assert user2007.domain.peek(mapped + PAGE, 6) == b"second"
    owner.domain.poke(address, b"later")
    assert user2007.domain.peek(mapped, 5) == b"later"


def test_a_writable_mapping_writes_to_the_owner(owner: Owner, user2007: User2007) -> None:
    made, address = owner.share(user2007.domain.domid, [b"ping"], writable=True)
    mapped = user2007.mmap(user2007.take(made.granted), prot=READ_WRITE)
    user2007.domain.poke(mapped, b"pong")
    assert owner.domain.peek(address, 4) == b"pong"


def test_a_read_only_mapping_is_not_written(owner: Owner, user2007: User2007) -> None:
    """Also of a grant that could be mapped writable, and by a private mapping."""
    made, _ = owner.share(user2007.domain.domid, [b"data"], writable=True)
    for flags in (SHARED, PRIVATE):
        mapped = user2007.mmap(user2007.take(made.granted), flags=flags)
        assert errno_of(user2007.domain.poke, mapped, b"x") == "EFAULT"
        assert user2007.domain.peek(mapped, 4) == b"data"


def test_a_writable_mapping_needs_map_shared(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b""], writable=True)
    slot = user2007.take(made.granted)
    assert errno_of(user2007.mmap, slot, 1, READ_WRITE, PRIVATE) == "EINVAL"
    user2007.mmap(slot, 1, READ_WRITE, SHARED)


@pytest.mark.parametrize(("slot", "count"), [(0, 129), (127, 2), (128, 1), (129, 1), (1, 128), (1 << 20, 1)])
def test_mmap_beyond_the_slots(user2007: User2007, slot: int, count: int) -> None:
    user2007.take(NOWHERE * SLOTS)
    assert errno_of(user2007.mmap, slot, count) == "ENXIO"


def test_mmap_of_slots_that_are_invalid(owner: Owner, user2007: User2007) -> None:
    """Every covered slot must wait to be mapped: EINVAL if one at either end, or in the middle, is free."""
    made, _ = owner.share(user2007.domain.domid, [b""] * 5)
    assert errno_of(user2007.mmap, 0) == "EINVAL"
    slot = user2007.take(made.granted)
    user2007.free(slot + 2)
    for first, count in ((0, 5), (1, 2), (2, 1), (2, 2), (3, 3)):
        assert errno_of(user2007.mmap, slot + first, count) == "EINVAL"
    user2007.mmap(slot, 2)
    user2007.mmap(slot + 3, 2)


def test_mmap_of_slots_that_are_mapped(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b""] * 3)
    slot = user2007.take(made.granted)
    user2007.mmap(slot + 1)
    for first, count in ((0, 2), (0, 3), (1, 1), (1, 2)):
        assert errno_of(user2007.mmap, slot + first, count) == "EINVAL"
    user2007.mmap(slot)
    user2007.mmap(slot + 2)


def test_mmap_of_a_part_of_an_allocation(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b"a", b"b", b"c", b"d"])
    slot = user2007.take(made.granted)
    mapped = user2007.mmap(slot + 1, 2)
    assert [user2007.domain.peek(mapped + at * PAGE) for at in range(2)] == [b"b", b"c"]
    assert user2007.domain.peek(user2007.mmap(slot + 3)) == b"d"


def test_mmap_of_several_allocations(world: World, owner: Owner, user2007: User2007) -> None:
    """Of several domains, in any order."""
    another = Owner(world.make_domain())
    one, _ = owner.share(user2007.domain.domid, [b"a", b"b"])
    two, _ = another.share(user2007.domain.domid, [b"c", b"d"])
    slot = user2007.take(one.granted)
    assert user2007.take(two.granted[::-1]) == slot + 2
    mapped = user2007.mmap(slot, 4)
    assert [user2007.domain.peek(mapped + at * PAGE) for at in range(4)] == [b"a", b"b", b"d", b"c"]


def test_the_same_grant_in_several_slots(owner: Owner, user2007: User2007) -> None:
    made, address = owner.share(user2007.domain.domid, [b"a"])
    mapped = user2007.mmap(user2007.take(made.granted * 3), 3)
    owner.domain.poke(address, b"z")
    assert [user2007.domain.peek(mapped + at * PAGE) for at in range(3)] == [b"z"] * 3


def test_mmap_of_grants_that_cannot_be_mapped(world: World, owner: Owner, user2007: User2007) -> None:
    """ENOMEM: no such domain, no such reference, another's grant, one that ended, a read-only one to be written."""
    mine = user2007.domain.domid
    readable, _ = owner.share(mine, [b""])
    for_another = owner.alloc(world.make_domain().domid)
    ended = owner.alloc(mine)
    owner.dealloc(ended.index)
    bad = [(world.unused_domid, 8), (owner.domain.domid, 0xFFFF_FFF0), for_another.granted[0], ended.granted[0]]
    for reference in bad:
        assert errno_of(user2007.mmap, user2007.take([reference])) == "ENOMEM"
    assert errno_of(user2007.mmap, user2007.take(readable.granted), 1, READ_WRITE) == "ENOMEM"


def test_a_mapping_is_not_inherited_over_fork(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b"data"])
    mapped = user2007.mmap(user2007.take(made.granted))
    assert errno_of(user2007.domain.peek_in_child, mapped) == "EFAULT"
    assert user2007.domain.peek(mapped, 4) == b"data"


# munmap and exit


def test_munmap_makes_slots_mappable_again(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b"a", b"b"])
    slot = user2007.take(made.granted)
    for _ in range(3):
        mapped = user2007.mmap(slot, 2)
        assert user2007.domain.peek(mapped + PAGE) == b"b"
        user2007.file.munmap(mapped)
        assert errno_of(user2007.domain.peek, mapped) == "EFAULT"
    user2007.mmap(slot)
    user2007.free(slot + 1)


def test_munmap_is_of_one_mapping(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b"a", b"b"])
    slot = user2007.take(made.granted)
    one, two = user2007.mmap(slot), user2007.mmap(slot + 1)
    user2007.file.munmap(one)
    assert user2007.domain.peek(two) == b"b"
    assert errno_of(user2007.mmap, slot, 2) == "EINVAL"
    user2007.mmap(slot)


def test_a_mapping_outlives_the_closing_of_its_file(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b"data"])
    mapped = user2007.mmap(user2007.take(made.granted))
    user2007.file.close()
    assert user2007.domain.peek(mapped, 4) == b"data"
    user2007.file.munmap(mapped)


def test_exit_unmaps(world: World, owner: Owner) -> None:
    """What a domain mapped when it ended is free for the owner: its pages can be allocated anew."""
    world.needs("the personality of 2007")
    user = User2007(world.make_domain())
    made, _ = owner.share(user.domain.domid, [b""] * 128)
    user.mmap(user.take(made.granted), 128)
    user.domain.crash()
    owner.dealloc(made.index, 128)
    assert eventually(lambda: errno_of(owner.alloc, 1, 896) == "success")


# UNMAP_GRANT_REF


def test_unmap_frees_what_was_never_mapped(user2007: User2007) -> None:
    slot = user2007.take(NOWHERE * 3)
    user2007.free(slot, 3)
    assert errno_of(user2007.mmap, slot) == "EINVAL"
    assert free_slots(user2007) == SLOTS


def test_unmap_of_a_part_and_over_allocations(user2007: User2007) -> None:
    user2007.take(NOWHERE * 4)
    user2007.take(NOWHERE * 4)
    user2007.free(2, 4)
    assert errno_of(user2007.free, 2) == "EINVAL"
    user2007.free(0, 2)
    user2007.free(6, 2)
    assert free_slots(user2007) == SLOTS


def test_unmap_of_nothing_succeeds(user2007: User2007) -> None:
    user2007.free(0, 0)
    user2007.free(127, 0)
    user2007.take(NOWHERE)
    user2007.free(0, 0)
    assert user2007.take(NOWHERE) == 1


def test_unmap_of_a_mapped_slot(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b"data"])
    slot = user2007.take(made.granted)
    mapped = user2007.mmap(slot)
    assert errno_of(user2007.free, slot) == "EBUSY"
    assert user2007.domain.peek(mapped, 4) == b"data"
    user2007.file.munmap(mapped)
    user2007.free(slot)


def test_unmap_looks_at_all_before_it_frees_any(owner: Owner, user2007: User2007) -> None:
    """The first offender decides: EBUSY for a mapped slot, EINVAL for an invalid one. What came before it stays."""
    made, _ = owner.share(user2007.domain.domid, [b""] * 6)
    slot = user2007.take(made.granted)
    user2007.mmap(slot + 2)
    user2007.free(slot + 4)
    assert errno_of(user2007.free, slot, 6) == "EBUSY"
    assert errno_of(user2007.free, slot, 3) == "EBUSY"
    assert errno_of(user2007.free, slot + 3, 3) == "EINVAL"
    assert errno_of(user2007.free, slot + 4, 2) == "EINVAL"
    user2007.mmap(slot, 2)
    user2007.mmap(slot + 3)
    user2007.mmap(slot + 5)
    assert errno_of(user2007.free, slot + 3, 2) == "EBUSY"


def test_get_offset_finds_each_mapping_of_the_file(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b""] * 5)
    user2007.take(NOWHERE)
    slot = user2007.take(made.granted)
    one, two = user2007.mmap(slot, 2), user2007.mmap(slot + 2, 3)
    assert user2007.offset_of(one) == (slot * PAGE, 2)
    assert user2007.offset_of(two) == (slot * PAGE + 2 * PAGE, 3)


def test_get_offset_needs_the_start(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b""] * 2)
    mapped = user2007.mmap(user2007.take(made.granted), 2)
    for inside in (mapped + 1, mapped + PAGE, mapped + 2 * PAGE - 1):
        assert errno_of(user2007.offset_of, inside) == "EINVAL"


def test_get_offset_of_other_memory(owner: Owner, user2007: User2007) -> None:
    """EINVAL: another file's mapping, or no device's at all. EFAULT: nothing is mapped."""
    other = User2007(user2007.domain)
    made, _ = owner.share(user2007.domain.domid, [b""])
    mapped = other.mmap(other.take(made.granted))
    assert errno_of(user2007.offset_of, mapped) == "EINVAL"
    assert errno_of(user2007.offset_of, user2007.domain.place(b"x")) == "EINVAL"
    assert errno_of(user2007.offset_of, user2007.domain.bad_address) == "EFAULT"
    assert errno_of(user2007.offset_of, 0) == "EFAULT"


def test_get_offset_forgets_what_was_unmapped(owner: Owner, user2007: User2007) -> None:
    made, _ = owner.share(user2007.domain.domid, [b""])
    mapped = user2007.mmap(user2007.take(made.granted))
    user2007.file.munmap(mapped)
    assert errno_of(user2007.offset_of, mapped) in ("EFAULT", "EINVAL")  # something else may be there by now


# Everything else


@pytest.mark.parametrize(
    "request_number",
    [0, 0x5401, xen_gntdev.SET_UNMAP_NOTIFY, xen_gntdev.GRANT_COPY, xen_gntdev.SET_MAX_GRANTS, 0x184705, 0x184703],
)
def test_other_requests(user2007: User2007, request_number: int) -> None:
    assert errno_of(user2007.file.ioctl, request_number, bytearray(64)) == "ENOTTY"


@pytest.mark.parametrize(
    ("request_number", "size"),
    [(xen_gntdev.MAP_GRANT_REF, 24), (xen_gntdev.UNMAP_GRANT_REF, 16), (xen_gntdev.GET_OFFSET_FOR_VADDR, 24)],
)
def test_arguments_that_end_too_early(user2007: User2007, request_number: int, size: int) -> None:
    """EFAULT, as for an argument whose end is not mapped."""
    for length in (0, size - 1):
        assert errno_of(user2007.file.ioctl, request_number, bytearray(length)) == "EFAULT"


def test_a_closed_file(user2007: User2007) -> None:
    user2007.file.close()
    user2007.file.close()
    assert errno_of(user2007.take, NOWHERE) == errno.errorcode[errno.EBADF]
    assert errno_of(user2007.mmap, 0) == "EBADF"
