"""What was wrong with the first gntdev of 2007. Each story here is one that must not be told of ours."""

from __future__ import annotations

import threading

import pytest
from conformance.grants_client import READ, READ_WRITE, SHARED, Owner, User2007
from conformance.grants_world import PAGE, World, errno_of, eventually

from usermm.uapi import xen_gntalloc, xen_gntdev

SLOTS = xen_gntdev.SLOTS_2007
NOWHERE = [(1, 0xFFFF_FFFF)]


def take_all(user: User2007) -> list[int]:
    """Single grants until there is no slot."""
    taken: list[int] = []
    while errno_of(lambda: taken.append(user.take(NOWHERE))) == "success":
        assert len(taken) <= SLOTS
    return taken


def test_unmap_does_not_corrupt_the_free_list(user2007: User2007) -> None:
    """The link of the free list and the slot's own index were one union: freeing a slot wrote the one over the other,
    and the list then led to slots in use, or nowhere. Here slots are freed in an order of no use to anybody, again and
    again, and every slot is still there once."""
    for stride in (1, 3, 5, 7, 11, 127):
        assert sorted(take_all(user2007)) == list(range(SLOTS))
        for at in range(SLOTS):
            user2007.free(at * stride % SLOTS)
    assert sorted(take_all(user2007)) == list(range(SLOTS))


def test_eleven_two_page_maps(user2007: User2007) -> None:
    """Ranges were taken out of the free list by compressing it, and compression counted its stale tail again: after
    eleven 2-page maps the count of free slots underflowed. Here they go on until there are none."""
    assert [user2007.take(NOWHERE * 2) for _ in range(SLOTS // 2)] == list(range(0, SLOTS, 2))
    assert errno_of(user2007.take, NOWHERE) == "ENOMEM"
    assert errno_of(user2007.take, NOWHERE * 2) == "ENOMEM"
    user2007.free(0, 22)
    assert sorted(take_all(user2007)) == list(range(22))


def test_a_range_has_no_busy_slot(user2007: User2007) -> None:
    """The search for a range did not begin anew at a busy slot: it counted free slots on both sides of it, and handed
    out the one between. Here every second slot is busy but for one run of three."""
    user2007.take(NOWHERE * SLOTS)
    for slot in range(0, SLOTS, 2):
        user2007.free(slot)
    user2007.free(61)
    assert user2007.take(NOWHERE * 3) == 60
    assert errno_of(user2007.take, NOWHERE * 3) == "ENOMEM"
    assert errno_of(user2007.take, NOWHERE * 2) == "ENOMEM"


def test_next_fit_moves_on(user2007: User2007) -> None:
    """The index at which the search for a range begins was read and never written: next-fit was first-fit, and the
    slots at the front were handed out again while others had never been used."""
    firsts = []
    for _ in range(SLOTS // 16):
        firsts.append(user2007.take(NOWHERE * 16))
        user2007.free(firsts[-1], 16)
    assert firsts == list(range(0, SLOTS, 16))
    assert user2007.take(NOWHERE * 16) == 0


def test_a_single_grant_is_copied_as_8_bytes(owner: Owner, user2007: User2007) -> None:
    """For one grant the driver copied 24 bytes, the size of the request, into the 8 of a reference on its stack. Here
    the reference is the last thing in readable memory, so that a ninth byte faults."""
    made, _ = owner.share(user2007.domain.domid, [b"data"])
    pointer = user2007.domain.place(xen_gntdev.REFERENCE.pack(*made.granted[0]), at_end=True)
    slot = user2007.map_raw(1, pointer) // PAGE
    assert user2007.domain.peek(user2007.mmap(slot), 4) == b"data"
    several = b"".join(xen_gntdev.REFERENCE.pack(*each) for each in made.granted * 5)
    assert user2007.map_raw(5, user2007.domain.place(several, at_end=True)) == PAGE


@pytest.mark.parametrize("count", [1, 2, 128])
def test_a_failing_copy_is_efault_and_leaks_no_slot(user2007: User2007, count: int) -> None:
    """When the references could not be read, the number of bytes left was returned, a positive number that programs
    took for success, and the slots were gone until the file was closed. Also when only the last byte is missing."""
    short = user2007.domain.place(bytes(count * xen_gntdev.REFERENCE.size - 1), at_end=True)
    for _ in range(SLOTS + 1):
        assert errno_of(user2007.map_raw, count, user2007.domain.bad_address) == "EFAULT"
        assert errno_of(user2007.map_raw, count, short) == "EFAULT"
    assert user2007.take(NOWHERE * SLOTS) == 0


@pytest.mark.parametrize(
    ("index", "count"),
    [
        (-PAGE, 1),
        (-PAGE, 2),
        (-(1 << 63), 1),
        ((1 << 63) - PAGE, 1),
        (SLOTS * PAGE, 1),
        (127 * PAGE, 2),
        (0, SLOTS + 1),
        (0, (1 << 32) - 1),
        (1, 1),
    ],
)
def test_unmap_checks_its_bounds(user2007: User2007, index: int, count: int) -> None:
    """UNMAP looked at whatever memory the index and the count led to, before the slots and beyond."""
    user2007.take(NOWHERE * SLOTS)
    assert errno_of(user2007.free_raw, index, count) == "EINVAL"
    assert errno_of(user2007.take, NOWHERE) == "ENOMEM"


@pytest.mark.parametrize("excess", [1 << 32, 1 << 33, 1 << 40])
def test_the_page_count_is_not_truncated(owner: Owner, user2007: User2007, excess: int) -> None:
    """The length of an mmap in pages was kept in 32 bits: 2**32 + 1 pages passed for one. Here nothing is mapped."""
    made, _ = owner.share(user2007.domain.domid, [b"", b""])
    slot = user2007.take(made.granted)
    for count in (excess, excess + 1, excess + 2):
        assert errno_of(user2007.mmap, slot, count) == "ENXIO"
    assert errno_of(user2007.mmap, slot + excess) == "ENXIO"
    user2007.free(slot, 2)


def test_read_only_grants_can_be_mapped(owner: Owner, user2007: User2007) -> None:
    """Every grant was mapped writable, whatever was asked for, so a read-only one could not be mapped at all."""
    made, address = owner.share(user2007.domain.domid, [b"read only"], writable=False)
    slot = user2007.take(made.granted)
    assert errno_of(user2007.mmap, slot, 1, READ_WRITE, SHARED) == "ENOMEM"
    mapped = user2007.mmap(slot, 1, READ, SHARED)
    assert user2007.domain.peek(mapped, 9) == b"read only"
    assert errno_of(user2007.domain.poke, mapped, b"x") == "EFAULT"
    assert owner.domain.peek(address, 9) == b"read only"


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_failing_mmap_maps_nothing(owner: Owner, user2007: User2007, bad: int) -> None:
    """When a grant could not be mapped, those before it stayed mapped, with nobody to unmap them: the owner never got
    its pages back. Here the slots wait to be mapped as before, and the owner's pages are free once it lets go."""
    made, _ = owner.share(user2007.domain.domid, [b"a", b"b", b"c", b"d"])
    references = [*made.granted]
    references[bad] = (owner.domain.domid, 0xFFFF_FFF0)
    slot = user2007.take(references)
    assert errno_of(user2007.mmap, slot, 4) == "ENOMEM"
    good = [at for at in range(4) if at != bad]
    for at in good:
        mapped = user2007.mmap(slot + at)
        assert user2007.domain.peek(mapped) == b"abcd"[at : at + 1]
        user2007.file.munmap(mapped)
    user2007.free(slot, 4)
    owner.dealloc(made.index, 4)
    owner.alloc(user2007.domain.domid, xen_gntalloc.LIMIT_PAGES - 4)


def test_a_wrong_address_is_an_error(owner: Owner, user2007: User2007) -> None:
    """GET_OFFSET_FOR_VADDR of an address that was no mapping's start printed a line and returned 0, with an offset that
    nobody had written."""
    made, _ = owner.share(user2007.domain.domid, [b"", b""])
    mapped = user2007.mmap(user2007.take(made.granted), 2)
    argument = bytearray(xen_gntdev.OFFSET_2007.pack(mapped + PAGE, -7, 9))
    assert errno_of(user2007.file.ioctl, xen_gntdev.GET_OFFSET_FOR_VADDR, argument) == "EINVAL"
    assert argument == xen_gntdev.OFFSET_2007.pack(mapped + PAGE, -7, 9)
    assert errno_of(user2007.offset_of, user2007.domain.bad_address) == "EFAULT"
    assert errno_of(user2007.offset_of, (1 << 64) - PAGE) == "EFAULT"


def test_a_file_is_shared_by_threads_and_over_fork(user2007: User2007) -> None:
    """A file that was shared over fork had no lock: two processes took the same slot. A child of ours is refused, or
    takes a slot of its own; threads never get the same one."""
    argument = xen_gntdev.MAP_2007.pack(1, user2007.domain.place(xen_gntdev.REFERENCE.pack(*NOWHERE[0])), -1)
    taken: list[int] = []
    try:
        answer = user2007.domain.ioctl_in_child(user2007.file, xen_gntdev.MAP_GRANT_REF, bytearray(argument))
        taken.append(xen_gntdev.MAP_2007.unpack(answer)[2] // PAGE)
    except OSError:
        pass

    def hammer() -> None:
        for _ in range(SLOTS):
            mine = bytearray(argument)
            try:
                user2007.file.ioctl(xen_gntdev.MAP_GRANT_REF, mine)
            except OSError:
                return
            taken.append(xen_gntdev.MAP_2007.unpack(mine)[2] // PAGE)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(SLOTS))


def test_opens_are_limited(world: World) -> None:
    """Anybody could open the device without end, and with each open went kernel memory. EMFILE; a closed one makes
    room."""
    world.needs("the personality of 2007")
    domain = world.make_domain()
    files = []
    while errno_of(lambda: files.append(domain.open("gntdev", "seed2007"))) == "success":
        assert len(files) <= 1024
    assert errno_of(domain.open, "gntdev", "seed2007") == "EMFILE"
    files.pop().close()
    files.append(domain.open("gntdev", "seed2007"))
    for file in files:
        file.close()


def test_bad_calls_are_not_logged(
    user2007: User2007, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Every bad call wrote a line into the kernel's log, so that any program could fill it."""
    for _ in range(10):
        assert errno_of(user2007.map_raw, 0, 0) == "EINVAL"
        assert errno_of(user2007.map_raw, 1, 0) == "EFAULT"
        assert errno_of(user2007.free, 5) == "EINVAL"
        assert errno_of(user2007.mmap, 500) == "ENXIO"
        assert errno_of(user2007.offset_of, 0) == "EFAULT"
        assert errno_of(user2007.file.ioctl, 0, bytearray(8)) == "ENOTTY"
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_exit_is_no_leak(world: World, owner: Owner) -> None:
    """All of it at once: a domain that ends in the middle of everything leaves the owner whole."""
    world.needs("the personality of 2007")
    user = User2007(world.make_domain())
    made, _ = owner.share(user.domain.domid, [b""] * 4)
    slot = user.take([*made.granted, *made.granted])
    user.mmap(slot, 3)
    user.mmap(slot + 5)
    user.domain.crash()
    owner.dealloc(made.index, 4)
    assert eventually(lambda: errno_of(owner.alloc, 1, xen_gntalloc.LIMIT_PAGES - 4) == "success")
