"""The contract of gntdev as Linux has it (mainline): maps, and every errno of every call."""

from __future__ import annotations

import pytest
from conformance.grants_client import PRIVATE, READ, READ_WRITE, SHARED, Owner, User, connect
from conformance.grants_world import PAGE, World, errno_of, eventually

from usermm.uapi import xen_gntalloc, xen_gntdev

NOWHERE = [(1, 0xFFFF_FFFF)]
CLEAR, SEND = xen_gntdev.NOTIFY_CLEAR_BYTE, xen_gntdev.NOTIFY_SEND_EVENT


# MAP_GRANT_REF


def test_map_gives_an_index_of_its_own(user: User) -> None:
    """Whole pages, and no two maps overlap."""
    pages: set[int] = set()
    for count in (1, 3, 1, 20, 300, 2):
        page, rest = divmod(user.map_grant_ref(NOWHERE * count), PAGE)
        assert rest == 0
        covered = set(range(page, page + count))
        assert not covered & pages
        pages |= covered


def test_map_checks_no_reference(world: World, user: User) -> None:
    """A bogus reference or a missing domain returns 0; the mmap fails with EINVAL."""
    for reference in ((world.unused_domid, 8), (user.domain.domid, 0xFFFF_FFFF), (0xFFFF_FFFF, 8)):
        index = user.map_grant_ref([reference])
        assert errno_of(user.mmap, index) == "EINVAL"


def test_map_of_nothing(user: User) -> None:
    argument = bytearray(xen_gntdev.MAP.pack(0, 0) + bytes(8))
    assert errno_of(user.file.ioctl, xen_gntdev.MAP_GRANT_REF, argument) == "EINVAL"


def test_map_takes_65536_at_most(user: User) -> None:
    assert xen_gntdev.MOST_GRANTS == 65536
    user.map_grant_ref(NOWHERE * 65536)
    assert errno_of(user.map_grant_ref, NOWHERE * 65537) == "EINVAL"


def test_map_with_fewer_references_than_it_says(user: User) -> None:
    argument = bytearray(xen_gntdev.MAP.pack(2, 0) + xen_gntdev.REFERENCE.pack(1, 8))
    assert errno_of(user.file.ioctl, xen_gntdev.MAP_GRANT_REF, argument) == "EFAULT"


def test_the_layouts_of_the_two_personalities_differ(owner: Owner, user: User) -> None:
    """The same number and the same 24 bytes: where mainline writes the index, 2007 has the pointer."""
    made, _ = owner.share(user.domain.domid, [b"data"])
    argument = bytearray(xen_gntdev.MAP.pack(1, 0xDEAD) + xen_gntdev.REFERENCE.pack(*made.granted[0]))
    assert user.file.ioctl(xen_gntdev.MAP_GRANT_REF, argument) == 0
    assert user.domain.peek(user.mmap(xen_gntdev.MAP.unpack_from(argument)[1]), 4) == b"data"
    assert xen_gntdev.REFERENCE.unpack_from(argument, 16) == made.granted[0]


# mmap


def test_mmap_shows_what_was_granted(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"first", b"second"])
    mapped = user.map(made.granted)
    assert user.domain.peek(mapped, 5) == b"first"
    assert user.domain.peek(mapped + PAGE, 6) == b"second"
    owner.domain.poke(address, b"later")
    assert user.domain.peek(mapped, 5) == b"later"


def test_a_writable_mapping_writes_to_the_owner(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"ping"], writable=True)
    user.domain.poke(user.map(made.granted, READ_WRITE), b"pong")
    assert owner.domain.peek(address, 4) == b"pong"


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
def test_read_only_comes_from_prot_read_alone(owner: Owner, user: User, flags: int) -> None:
    """Also of a grant that could be mapped writable. A write through it faults (SIGSEGV in the program itself)."""
    made, _ = owner.share(user.domain.domid, [b"data"], writable=True)
    mapped = user.mmap(user.map_grant_ref(made.granted), 1, READ, flags)
    assert errno_of(user.domain.poke, mapped, b"x") == "EFAULT"
    assert user.domain.peek(mapped, 4) == b"data"


def test_a_private_mapping_stays_coherent(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"old"])
    mapped = user.mmap(user.map_grant_ref(made.granted), 1, READ, PRIVATE)
    assert user.domain.peek(mapped, 3) == b"old"
    owner.domain.poke(address, b"new")
    assert user.domain.peek(mapped, 3) == b"new"


def test_a_writable_private_mapping(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b""], writable=True)
    index = user.map_grant_ref(made.granted)
    assert errno_of(user.mmap, index, 1, READ_WRITE, PRIVATE) == "EINVAL"
    user.mmap(index, 1, READ_WRITE)


def test_a_writable_mapping_of_a_read_only_grant(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"data"])
    assert errno_of(user.map, made.granted, READ_WRITE) == "EINVAL"
    assert user.domain.peek(user.map(made.granted), 4) == b"data"


def test_mmap_needs_the_exact_size_and_index(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"a", b"b", b"c"])
    index = user.map_grant_ref(made.granted)
    for offset, count in ((0, 1), (0, 2), (0, 4), (1, 2), (1, 3), (2, 1), (3, 1), (1 << 20, 3)):
        assert errno_of(user.mmap, index + offset * PAGE, count) == "EINVAL"
    mapped = user.mmap(index, 3)
    assert [user.domain.peek(mapped + at * PAGE) for at in range(3)] == [b"a", b"b", b"c"]


def test_an_index_is_mapped_once(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"data"])
    index = user.map_grant_ref(made.granted)
    mapped = user.mmap(index)
    assert errno_of(user.mmap, index) == "EINVAL"
    assert user.domain.peek(mapped, 4) == b"data"


def test_a_refused_mmap_spends_the_index(owner: Owner, user: User) -> None:
    """Once the grants themselves were refused; not by a size, an offset or flags that are wrong."""
    made, _ = owner.share(user.domain.domid, [b"data"])
    index = user.map_grant_ref(made.granted)
    assert errno_of(user.mmap, index, 2) == "EINVAL"
    assert errno_of(user.mmap, index, 1, READ_WRITE, PRIVATE) == "EINVAL"
    assert errno_of(user.mmap, index + 1) == "EINVAL"
    assert errno_of(user.mmap, index, 0) == "EINVAL"
    assert errno_of(user.mmap, index, 1, READ_WRITE) == "EINVAL"
    assert errno_of(user.mmap, index) == "EINVAL"
    user.unmap_grant_ref(index)
    assert user.domain.peek(user.map(made.granted), 4) == b"data"


def test_the_same_grant_by_several_maps(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"a"], writable=True)
    one, two = user.map(made.granted, READ_WRITE), user.map(made.granted * 2)
    user.domain.poke(one, b"z")
    assert user.domain.peek(two) == user.domain.peek(two + PAGE) == owner.domain.peek(address) == b"z"


def test_grants_of_several_domains_in_one_map(world: World, owner: Owner, user: User) -> None:
    another = Owner(world.make_domain())
    one, _ = owner.share(user.domain.domid, [b"a", b"b"])
    two, _ = another.share(user.domain.domid, [b"c", b"d"])
    mapped = user.map([two.granted[1], *one.granted, two.granted[0]])
    assert [user.domain.peek(mapped + at * PAGE) for at in range(4)] == [b"d", b"a", b"b", b"c"]


def test_grants_that_cannot_be_mapped(world: World, owner: Owner, user: User) -> None:
    """Another's grant, one that ended: EINVAL at mmap. All or nothing: the good one before it is not mapped."""
    world.needs("several domains")
    mine = user.domain.domid
    good, _ = owner.share(mine, [b"data"])
    for_another = owner.alloc(world.make_domain().domid)
    ended = owner.alloc(mine)
    owner.dealloc(ended.index)
    for bad in (for_another.granted[0], ended.granted[0], (owner.domain.domid, 0xFFFF_FFF0)):
        assert errno_of(user.map, [*good.granted, bad]) == "EINVAL"
    assert user.domain.peek(user.map(good.granted), 4) == b"data"


def test_a_mapping_is_not_inherited_over_fork(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"data"])
    mapped = user.map(made.granted)
    assert errno_of(user.domain.peek_in_child, mapped) == "EFAULT"
    assert user.domain.peek(mapped, 4) == b"data"


def test_munmap(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"data"])
    mapped = user.map(made.granted)
    user.file.munmap(mapped)
    assert errno_of(user.domain.peek, mapped) == "EFAULT"


def test_a_mapping_outlives_the_closing_of_its_file(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"data"])
    mapped = user.map(made.granted)
    user.file.close()
    assert user.domain.peek(mapped, 4) == b"data"
    user.file.munmap(mapped)
    assert errno_of(user.map_grant_ref, NOWHERE) == "EBADF"


def test_a_mapping_outlives_the_grantor(owner: Owner, user: User) -> None:
    """What is in use cannot be ended: the page lives until it is unmapped, but nobody can map it anew."""
    made, _ = owner.share(user.domain.domid, [b"data"])
    mapped = user.map(made.granted)
    owner.domain.crash()
    assert eventually(lambda: errno_of(user.map, made.granted) == "EINVAL")
    assert user.domain.peek(mapped, 4) == b"data"


# UNMAP_GRANT_REF


@pytest.mark.parametrize(("offset", "count"), [(0, 0), (5, 3), (PAGE - 1, 0)])
def test_unmap_by_the_page_alone(user: User, offset: int, count: int) -> None:
    """Linux asks for the count only if there is one, and for the page of the index."""
    index = user.map_grant_ref(NOWHERE * 3)
    user.unmap_grant_ref(index + offset, count)
    assert errno_of(user.mmap, index, 3) == "EINVAL"


def test_unmap_needs_exactly_what_map_made(user: User) -> None:
    index = user.map_grant_ref(NOWHERE * 3)
    for offset, count in ((0, 1), (0, 2), (0, 4), (1, 2), (1, 3), (3, 3), (-1, 3)):
        argument = (index + offset * PAGE) % (1 << 64), count
        assert errno_of(user.unmap_grant_ref, *argument) == "ENOENT"
    user.unmap_grant_ref(index, 3)
    assert errno_of(user.unmap_grant_ref, index, 3) == "ENOENT"
    assert errno_of(user.mmap, index, 3) == "EINVAL"


def test_unmap_does_not_join_maps(user: User) -> None:
    index = user.map_grant_ref(NOWHERE)
    user.map_grant_ref(NOWHERE)
    assert errno_of(user.unmap_grant_ref, index, 2) == "ENOENT"


def test_unmap_succeeds_while_mapped(owner: Owner, user: User) -> None:
    """The pages stay readable until munmap."""
    made, address = owner.share(user.domain.domid, [b"data"])
    index = user.map_grant_ref(made.granted)
    mapped = user.mmap(index)
    user.unmap_grant_ref(index)
    assert user.domain.peek(mapped, 4) == b"data"
    owner.domain.poke(address, b"more")
    assert user.domain.peek(mapped, 4) == b"more"
    user.file.munmap(mapped)


# GET_OFFSET_FOR_VADDR


def test_get_offset_accepts_any_address_inside(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b""] * 3)
    user.map_grant_ref(NOWHERE)
    index = user.map_grant_ref(made.granted)
    mapped = user.mmap(index, 3)
    for offset in (0, 1, PAGE - 1, PAGE, 2 * PAGE + 5, 3 * PAGE - 1):
        assert user.offset_of(mapped + offset) == (index, 3)


def test_get_offset_elsewhere(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b""])
    mapped = user.map(made.granted)
    for address in (0, user.domain.bad_address, user.domain.place(b"x"), (1 << 64) - 1):
        assert errno_of(user.offset_of, address) == "EINVAL"
    user.file.munmap(mapped)
    assert errno_of(user.offset_of, mapped) == "EINVAL"


# SET_UNMAP_NOTIFY


def test_notify_clears_a_byte(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"abcd", b"efgh"], writable=True)
    index = user.map_grant_ref(made.granted)
    mapped = user.mmap(index, 2, READ_WRITE)
    user.notify(index + PAGE + 2, CLEAR)
    assert owner.domain.peek(address + PAGE, 4) == b"efgh"
    user.file.munmap(mapped)
    user.unmap_grant_ref(index, 2)
    assert eventually(lambda: owner.domain.peek(address + PAGE, 4) == b"ef\0h")
    assert owner.domain.peek(address, 4) == b"abcd"


def test_notify_sends_an_event(owner: Owner, user: User) -> None:
    pair = connect(owner.domain, user.domain)
    made, _ = owner.share(user.domain.domid, [b""])
    index = user.map_grant_ref(made.granted)
    mapped = user.mmap(index)
    user.notify(index, SEND, pair.other_port)
    assert not pair.one.file.readable()
    user.file.munmap(mapped)
    user.unmap_grant_ref(index)
    assert pair.one.take() == [pair.one_port]


def test_notify_set_before_mmap(owner: Owner, user: User) -> None:
    pair = connect(owner.domain, user.domain)
    made, address = owner.share(user.domain.domid, [b"abc"], writable=True)
    index = user.map_grant_ref(made.granted)
    user.notify(index + 1, CLEAR | SEND, pair.other_port)
    mapped = user.mmap(index, 1, READ_WRITE)
    user.file.munmap(mapped)
    user.unmap_grant_ref(index)
    assert pair.one.take() == [pair.one_port]
    assert eventually(lambda: owner.domain.peek(address, 3) == b"a\0c")


def test_notify_can_be_changed_and_taken_back(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"abc", b"abc"], writable=True)
    for reference, finally_set in zip(made.granted, (CLEAR, 0), strict=True):
        index = user.map_grant_ref([reference])
        mapped = user.mmap(index, 1, READ_WRITE)
        user.notify(index, CLEAR)
        user.notify(index + 1, finally_set)
        user.file.munmap(mapped)
        user.unmap_grant_ref(index)
    assert eventually(lambda: owner.domain.peek(address, 3) == b"a\0c")
    assert owner.domain.peek(address + PAGE, 3) == b"abc"


def test_a_map_has_one_notification_whichever_page_it_is_of(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"abc", b"def"], writable=True)
    index = user.map_grant_ref(made.granted)
    mapped = user.mmap(index, 2, READ_WRITE)
    user.notify(index, CLEAR)
    user.notify(index + PAGE + 1, CLEAR)
    user.file.munmap(mapped)
    user.unmap_grant_ref(index, 2)
    assert eventually(lambda: owner.domain.peek(address + PAGE, 3) == b"d\0f")
    assert owner.domain.peek(address, 3) == b"abc"


def test_notify_when_the_domain_crashes(owner: Owner, user: User) -> None:
    """The reason why it exists: the other side learns of it."""
    pair = connect(owner.domain, user.domain)
    made, address = owner.share(user.domain.domid, [b"abc"], writable=True)
    index = user.map_grant_ref(made.granted)
    user.mmap(index, 1, READ_WRITE)
    user.notify(index + 2, CLEAR | SEND, pair.other_port)
    user.domain.crash()
    assert pair.one.take() == [pair.one_port]
    assert eventually(lambda: owner.domain.peek(address, 3) == b"ab\0")


@pytest.mark.parametrize("action", [4, 5, 8, 1 << 31])
def test_notify_with_an_unknown_action(user: User, action: int) -> None:
    index = user.map_grant_ref(NOWHERE)
    assert errno_of(user.notify, index, action) == "EINVAL"


def test_notify_with_a_bad_port(user: User) -> None:
    index = user.map_grant_ref(NOWHERE)
    for port in (0, 1, 1000, (1 << 32) - 1):
        assert errno_of(user.notify, index, SEND, port) == "EINVAL"


def test_notify_clears_nothing_in_a_read_only_map(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b""], writable=True)
    index = user.map_grant_ref(made.granted)
    user.mmap(index)
    assert errno_of(user.notify, index, CLEAR) == "EINVAL"


@pytest.mark.parametrize(("prot", "answer"), [(READ, "EINVAL"), (READ_WRITE, "success")])
def test_notify_after_a_refused_mmap(user: User, prot: int, answer: str) -> None:
    """The map is what that mmap would have made it."""
    index = user.map_grant_ref([(user.domain.domid, 0xFFFF_FFF0)])
    assert errno_of(user.mmap, index, 1, prot) == "EINVAL"
    assert errno_of(user.notify, index, CLEAR) == answer


def test_a_read_only_mmap_of_what_shall_be_cleared(owner: Owner, user: User) -> None:
    """Refused here; Linux' own driver allows it, and faults when the mapping goes. The index is not spent by it."""
    made, address = owner.share(user.domain.domid, [b"abc", b"def"], writable=True)
    index = user.map_grant_ref(made.granted)
    user.notify(index + PAGE, CLEAR)
    assert errno_of(user.mmap, index, 2) == "EINVAL"
    assert errno_of(user.mmap, index, 2, READ, PRIVATE) == "EINVAL"
    user.notify(index, 0)
    mapped = user.mmap(index, 2)
    user.file.munmap(mapped)
    user.unmap_grant_ref(index, 2)
    again = user.map_grant_ref(made.granted)
    user.notify(again, CLEAR)
    mapped = user.mmap(again, 2, READ_WRITE)
    user.file.munmap(mapped)
    user.unmap_grant_ref(again, 2)
    assert eventually(lambda: owner.domain.peek(address, 3) == b"\0bc")
    assert owner.domain.peek(address + PAGE, 3) == b"def"


def test_what_of_a_notification_is_looked_at_first(user: User) -> None:
    """The action, the port, the index."""
    index = user.map_grant_ref(NOWHERE)
    assert errno_of(user.notify, index + PAGE, 4) == "EINVAL"
    assert errno_of(user.notify, index + PAGE, SEND, 1000) == "EINVAL"
    assert errno_of(user.notify, index + PAGE, CLEAR) == "ENOENT"


def test_notify_of_an_unknown_index(user: User) -> None:
    index = user.map_grant_ref(NOWHERE * 2)
    user.notify(index + 2 * PAGE - 1, CLEAR)
    assert errno_of(user.notify, index + 2 * PAGE, CLEAR) == "ENOENT"
    user.unmap_grant_ref(index, 2)
    assert errno_of(user.notify, index, CLEAR) == "ENOENT"


# GRANT_COPY is in test_grants_copy.py


@pytest.mark.parametrize("request_number", [0, 0x5401, xen_gntdev.SET_MAX_GRANTS, xen_gntalloc.ALLOC_GREF, 0x104706])
def test_other_requests(user: User, request_number: int) -> None:
    """SET_MAX_GRANTS is gone; gntalloc's requests are gntalloc's."""
    assert errno_of(user.file.ioctl, request_number, bytearray(64)) == "ENOTTY"


@pytest.mark.parametrize(
    ("request_number", "size"),
    [
        (xen_gntdev.MAP_GRANT_REF, 16),
        (xen_gntdev.UNMAP_GRANT_REF, 16),
        (xen_gntdev.GET_OFFSET_FOR_VADDR, 24),
        (xen_gntdev.SET_UNMAP_NOTIFY, 16),
        (xen_gntdev.GRANT_COPY, 16),
    ],
)
def test_arguments_that_end_too_early(user: User, request_number: int, size: int) -> None:
    for length in (0, size - 1):
        assert errno_of(user.file.ioctl, request_number, bytearray(length)) == "EFAULT"
