"""The contract of gntalloc: pages of one's own for another domain, and every errno of every call."""

from __future__ import annotations

import pytest
from conformance.grants_client import PRIVATE, READ, READ_WRITE, SHARED, Owner, User, connect
from conformance.grants_world import PAGE, World, errno_of, eventually

from usermm.uapi import xen_gntalloc, xen_gntdev

CLEAR, SEND = xen_gntalloc.NOTIFY_CLEAR_BYTE, xen_gntalloc.NOTIFY_SEND_EVENT


# ALLOC_GREF


def test_references_from_8_on(owner: Owner, user: User) -> None:
    """0 to 7 are reserved. No two grants have the same."""
    references = [each for count in (1, 5, 2) for each in owner.alloc(user.domain.domid, count).references]
    assert min(references) >= 8
    assert len(set(references)) == 8


def test_each_domain_has_references_of_its_own(world: World, owner: Owner, user: User) -> None:
    another = Owner(world.make_domain())
    one, _ = owner.share(user.domain.domid, [b"one"])
    two, _ = another.share(user.domain.domid, [b"two"])
    assert user.domain.peek(user.map(one.granted), 3) == b"one"
    assert user.domain.peek(user.map(two.granted), 3) == b"two"


def test_indices_are_whole_pages_and_never_overlap(owner: Owner, user: User) -> None:
    pages: set[int] = set()
    for count in (1, 4, 1, 2):
        page, rest = divmod(owner.alloc(user.domain.domid, count).index, PAGE)
        covered = set(range(page, page + count))
        assert rest == 0 and not covered & pages
        pages |= covered


def test_pages_are_zero_at_first(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid, 2)
    assert user.domain.peek(user.map(made.granted), 2 * PAGE) == bytes(2 * PAGE)


def test_the_argument_keeps_what_it_asked_for(owner: Owner, user: User) -> None:
    """Only the index and the references are answered."""
    argument = bytearray(xen_gntalloc.ALLOC.pack(user.domain.domid, 1, 2, 77) + bytes(8))
    assert owner.file.ioctl(xen_gntalloc.ALLOC_GREF, argument) == 0
    domid, flags, count, index = xen_gntalloc.ALLOC.unpack_from(argument)
    assert (domid, flags, count) == (user.domain.domid, 1, 2)
    assert index % PAGE == 0


def test_1024_pages_in_all(owner: Owner, user: User) -> None:
    """ENOSPC, and nothing is allocated. Of all files of the domain together."""
    made = owner.alloc(user.domain.domid, 1000)
    assert errno_of(owner.alloc, user.domain.domid, 25) == "ENOSPC"
    second = Owner(owner.domain)
    second.alloc(user.domain.domid, 24)
    assert errno_of(owner.alloc, user.domain.domid) == "ENOSPC"
    assert errno_of(second.alloc, user.domain.domid) == "ENOSPC"
    owner.dealloc(made.index, 10)
    second.alloc(user.domain.domid, 10)
    second.file.close()
    owner.alloc(user.domain.domid, 34)


def test_alloc_without_room_for_the_references(owner: Owner, user: User) -> None:
    """EFAULT, and no page is lost."""
    argument = bytearray(xen_gntalloc.ALLOC.pack(user.domain.domid, 0, 1024, 0) + bytes(1023 * 4))
    for _ in range(3):
        assert errno_of(owner.file.ioctl, xen_gntalloc.ALLOC_GREF, argument) == "EFAULT"
    owner.alloc(user.domain.domid, 1024)


# mmap


def test_mmap_is_the_page_itself(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"data"])
    again = owner.map(made.index)
    owner.domain.poke(again, b"more")
    assert owner.domain.peek(address, 4) == user.domain.peek(user.map(made.granted), 4) == b"more"


def test_mmap_read_only(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"data"])
    address = owner.map(made.index, prot=READ)
    assert owner.domain.peek(address, 4) == b"data"
    assert errno_of(owner.domain.poke, address, b"x") == "EFAULT"


def test_mmap_not_shared(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid)
    for prot in (READ, READ_WRITE):
        assert errno_of(owner.map, made.index, 1, prot, PRIVATE) == "EINVAL"
    owner.map(made.index, 1, READ_WRITE, SHARED)


def test_mmap_of_no_page_and_between_pages(owner: Owner, user: User) -> None:
    """mmap(2) itself wants them whole; a length is rounded up."""
    made = owner.alloc(user.domain.domid, 2)
    assert errno_of(owner.map, made.index, 0) == "EINVAL"
    assert errno_of(owner.map, made.index + 1) == "EINVAL"
    assert errno_of(owner.map, made.index + 16 * PAGE + 8) == "EINVAL"
    owner.domain.peek(owner.file.mmap(PAGE + 1, READ_WRITE, SHARED, made.index), 2 * PAGE)


def test_mmap_of_an_unknown_offset(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid, 2)
    assert errno_of(owner.map, made.index + 2 * PAGE) == "ENOENT"
    assert errno_of(owner.map, made.index, 3) == "ENOENT"
    assert errno_of(owner.map, made.index + (1 << 32)) == "ENOENT"
    owner.dealloc(made.index + PAGE)
    assert errno_of(owner.map, made.index, 2) == "ENOENT"
    assert errno_of(owner.map, made.index + PAGE) == "ENOENT"
    owner.map(made.index)


def test_mmap_of_another_files_pages(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid)
    assert errno_of(Owner(owner.domain).map, made.index) == "ENOENT"


def test_mmap_of_a_part_and_over_allocations(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"a", b"b", b"c"])
    next_one, _ = owner.share(user.domain.domid, [b"d"])
    assert next_one.index == made.index + 3 * PAGE
    address = owner.map(made.index + PAGE, 3)
    assert [owner.domain.peek(address + at * PAGE) for at in range(3)] == [b"b", b"c", b"d"]


def test_a_mapping_is_inherited_over_fork(owner: Owner, user: User) -> None:
    """Unlike gntdev's."""
    _, address = owner.share(user.domain.domid, [b"data"])
    assert owner.domain.peek_in_child(address, 4) == b"data"


# DEALLOC_GREF


def test_dealloc_of_an_unknown_index(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid, 2)
    for index, count in ((made.index + 2 * PAGE, 1), (made.index, 3), (1 << 40, 1), (made.index + 1, 1)):
        assert errno_of(owner.dealloc, index, count) == "EINVAL"
    owner.dealloc(made.index, 2)
    assert errno_of(owner.dealloc, made.index, 2) == "EINVAL"
    assert errno_of(owner.dealloc, made.index) == "EINVAL"


def test_dealloc_of_a_part(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid, 3)
    owner.dealloc(made.index + PAGE)
    assert errno_of(user.map, [made.granted[1]]) == "EINVAL"
    user.map([made.granted[0]])
    user.map([made.granted[2]])


def test_dealloc_ends_the_grant(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid)
    index = user.map_grant_ref(made.granted)
    owner.dealloc(made.index)
    assert errno_of(user.mmap, index) == "EINVAL"


def test_dealloc_while_the_peer_maps(owner: Owner, user: User) -> None:
    """Returns 0, and the peer goes on reading: the page lives until the local and the remote users are gone."""
    made, address = owner.share(user.domain.domid, [b"data"], writable=True)
    mapped = user.map(made.granted, READ_WRITE)
    owner.dealloc(made.index)
    assert user.domain.peek(mapped, 4) == b"data"
    user.domain.poke(mapped, b"more")
    assert owner.domain.peek(address, 4) == b"more"
    owner.file.munmap(address)
    assert user.domain.peek(mapped, 4) == b"more"
    user.file.munmap(mapped)


def test_dealloc_while_mapped_here(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"data"])
    owner.dealloc(made.index)
    assert owner.domain.peek(address, 4) == b"data"
    assert errno_of(owner.map, made.index) == "ENOENT"


def test_references_are_not_used_twice(world: World, owner: Owner, user: User) -> None:
    """A stale reference never leads to somebody's new page."""
    world.needs("references are not used twice")
    seen: set[int] = set()
    for _ in range(20):
        made = owner.alloc(user.domain.domid, 3)
        assert not seen & set(made.references)
        seen |= set(made.references)
        owner.dealloc(made.index, 3)


def test_closing_the_file_deallocates(world: World, owner: Owner, user: User) -> None:
    world.needs("closing ends what is not mapped")
    made, address = owner.share(user.domain.domid, [b"data"])
    other = owner.alloc(user.domain.domid)
    mapped = user.map(made.granted)
    owner.file.close()
    assert owner.domain.peek(address, 4) == user.domain.peek(mapped, 4) == b"data"
    assert errno_of(user.map, other.granted) == "EINVAL"
    assert errno_of(owner.alloc, user.domain.domid) == "EBADF"
    assert errno_of(owner.map, made.index) == "EBADF"


# SET_UNMAP_NOTIFY: the grantor's side of the page


def test_notify_clears_a_byte(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"abcd"])
    mapped = user.map(made.granted)
    owner.notify(made.index + 1, CLEAR)
    owner.file.munmap(address)
    assert user.domain.peek(mapped, 4) == b"abcd"
    owner.dealloc(made.index)
    assert eventually(lambda: user.domain.peek(mapped, 4) == b"a\0cd")


def test_notify_sends_an_event(owner: Owner, user: User) -> None:
    pair = connect(owner.domain, user.domain)
    made = owner.alloc(user.domain.domid)
    owner.notify(made.index, SEND, pair.one_port)
    assert not pair.other.file.readable()
    owner.dealloc(made.index)
    assert pair.other.take() == [pair.other_port]


def test_notify_when_the_domain_crashes(owner: Owner, user: User) -> None:
    pair = connect(owner.domain, user.domain)
    made, _ = owner.share(user.domain.domid, [b"abcd"])
    mapped = user.map(made.granted)
    owner.notify(made.index + 3, CLEAR | SEND, pair.one_port)
    owner.domain.crash()
    assert pair.other.take() == [pair.other_port]
    assert eventually(lambda: user.domain.peek(mapped, 4) == b"abc\0")


def test_notify_can_be_taken_back(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"abcd", b"abcd"])
    mapped = user.map(made.granted)
    owner.notify(made.index, CLEAR)
    owner.notify(made.index, 0)
    owner.notify(made.index + PAGE, CLEAR)
    owner.file.munmap(address)
    owner.dealloc(made.index, 2)
    assert eventually(lambda: user.domain.peek(mapped + PAGE, 4) == b"\0bcd")
    assert user.domain.peek(mapped, 4) == b"abcd"


@pytest.mark.parametrize("action", [4, 7, 1 << 31])
def test_notify_with_an_unknown_action(owner: Owner, user: User, action: int) -> None:
    assert errno_of(owner.notify, owner.alloc(user.domain.domid).index, action) == "EINVAL"


def test_notify_with_a_bad_port(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid)
    for port in (0, 1, (1 << 32) - 1):
        assert errno_of(owner.notify, made.index, SEND, port) == "EINVAL"


def test_what_of_a_notification_is_looked_at_first(owner: Owner, user: User) -> None:
    """The index, the action, the port."""
    made = owner.alloc(user.domain.domid)
    assert errno_of(owner.notify, made.index + PAGE, 4) == "ENOENT"
    assert errno_of(owner.notify, made.index + PAGE, SEND, 1000) == "ENOENT"
    assert errno_of(owner.notify, made.index, 4) == "EINVAL"


def test_notify_of_an_unknown_index(owner: Owner, user: User) -> None:
    made = owner.alloc(user.domain.domid)
    assert errno_of(owner.notify, made.index + PAGE, CLEAR) == "ENOENT"
    owner.dealloc(made.index)
    assert errno_of(owner.notify, made.index, CLEAR) == "ENOENT"


# Everything else


@pytest.mark.parametrize("request_number", [0, 0x5401, xen_gntdev.MAP_GRANT_REF, xen_gntdev.GRANT_COPY, 0x44500])
def test_other_requests(owner: Owner, request_number: int) -> None:
    assert errno_of(owner.file.ioctl, request_number, bytearray(64)) == "ENOTTY"


def test_arguments_that_end_too_early(owner: Owner) -> None:
    for request, size in (
        (xen_gntalloc.ALLOC_GREF, 24),
        (xen_gntalloc.DEALLOC_GREF, 16),
        (xen_gntalloc.SET_UNMAP_NOTIFY, 16),
    ):
        for length in (0, size - 1):
            argument = bytearray(xen_gntalloc.ALLOC.pack(1, 0, 2, 0) + bytes(8))[:length]
            assert errno_of(owner.file.ioctl, request, argument) == "EFAULT"
