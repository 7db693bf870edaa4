"""Which operation is how many notifications: what every source has in common, and where they differ."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable

import pytest
from conformance.client import Client
from conformance.implementations import PAGE, Implementation

from usermm.testing import (
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_REMOVE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
)

MADV_WILLNEED, MADV_COLD = 3, 20
MOVE = MREMAP_MAYMOVE | MREMAP_FIXED

Operation = Callable[[Implementation, int], object]


def move(new_pages: int, flags: int = MOVE) -> Operation:
    return lambda memory, address: memory.remap(address, 4, new_pages, flags, memory.reserve(max(4, new_pages)))


def fails(operation: Operation) -> Operation:
    def run(memory: Implementation, address: int) -> None:
        with pytest.raises(OSError):
            operation(memory, address)

    return run


# What is done to 4 registered pages: (name, operation, [(start, end) of each notification, in pages])
OPERATIONS: list[tuple[str, Operation, list[tuple[int, int]]]] = [
    ("munmap whole", lambda memory, address: memory.unmap(address, 4), [(0, 4)]),
    ("munmap part", lambda memory, address: memory.unmap(address + PAGE, 2), [(1, 3)]),
    ("munmap more than is mapped", lambda memory, address: memory.unmap(address - PAGE, 6), [(-1, 5)]),
    ("MAP_FIXED over it", lambda memory, address: memory.map_at(address, 4), [(0, 4)]),
    ("MAP_FIXED over a part", lambda memory, address: memory.map_at(address + PAGE, 1), [(1, 2)]),
    ("grow in place", lambda memory, address: memory.remap(address, 4, 5), []),
    ("shrink", lambda memory, address: memory.remap(address, 4, 1), [(1, 4)]),
    ("same size", lambda memory, address: memory.remap(address, 4, 4), []),
    ("move", move(4), [(0, 4), (0, 4)]),
    ("move and grow", move(6), [(0, 4), (0, 4)]),
    ("move and leave mapped", move(4, MOVE | MREMAP_DONTUNMAP), [(0, 4)]),
    (
        "another mapping moved onto it",
        lambda memory, address: memory.remap(memory.map(4), 4, 4, MOVE, address),
        [(0, 4)],
    ),
    ("DONTNEED", lambda memory, address: memory.advise(address, 4, MADV_DONTNEED), [(0, 4)]),
    ("DONTNEED part", lambda memory, address: memory.advise(address + PAGE, 1, MADV_DONTNEED), [(1, 2)]),
    ("DONTNEED_LOCKED", lambda memory, address: memory.advise(address, 4, MADV_DONTNEED_LOCKED), [(0, 4)]),
    ("FREE", lambda memory, address: memory.advise(address, 4, MADV_FREE), [(0, 4)]),
    ("REMOVE of private memory", fails(lambda memory, address: memory.advise(address, 4, MADV_REMOVE)), []),
    ("WILLNEED", lambda memory, address: memory.advise(address, 4, MADV_WILLNEED), []),
    ("COLD", lambda memory, address: memory.advise(address, 4, MADV_COLD), []),
    ("munmap fails", fails(lambda memory, address: memory.unmap(address + 1, 4)), []),
    ("mremap fails", fails(lambda memory, address: memory.remap(address, 4, 4, MOVE, address + PAGE)), []),
    ("mremap has no room", fails(lambda memory, address: memory.remap(address, 2, 8)), []),
    ("madvise fails", fails(lambda memory, address: memory.advise(address + 1, 4, MADV_DONTNEED)), []),
]


@pytest.mark.parametrize(
    ("operation", "expected"), [each[1:] for each in OPERATIONS], ids=[each[0] for each in OPERATIONS]
)
def test_operation(
    client2: Client, implementation: Implementation, operation: Operation, expected: list[tuple[int, int]]
) -> None:
    """Each operation is this many notifications, with the call's range, which a single one shows as the hint."""
    address = implementation.reserve(7) + PAGE
    implementation.map_at(address, 4)
    # Wider than the mapping on both sides, so that the hint shows the call's range and not a clip.
    client2.register(address - PAGE, address + 5 * PAGE, 1)
    operation(implementation, address)
    assert client2.generation == len(expected)
    if len(expected) == 1:
        start, end = expected[0]
        assert client2.read() == [(1, address + start * PAGE, address + end * PAGE, True), (1,)]
    elif expected:
        assert client2.read() == [(1, address - PAGE, address + 5 * PAGE, False), (len(expected),)]
    assert client2.poll() == set()


def test_one_call_over_several_mappings(client2: Client, implementation: Implementation) -> None:
    """munmap over several mappings and holes is one notification with the call's range."""
    address = implementation.reserve(8)
    for page, shared in ((0, False), (1, True), (4, False), (7, True)):
        implementation.map_at(address + page * PAGE, 1, shared=shared)
    client2.register(address, address + 8 * PAGE, 1)
    implementation.unmap(address, 8)
    assert client2.read() == [(1, address, address + 8 * PAGE, True), (1,)]


def test_a_discard_is_one_for_each_mapping(client2: Client, implementation: Implementation) -> None:
    """MADV_DONTNEED over two mappings that cannot merge (private beside shared) is two notifications."""
    address = implementation.reserve(4)
    implementation.map_at(address, 2)
    implementation.map_at(address + 2 * PAGE, 2, shared=True)
    client2.register(address, address + 2 * PAGE, 1)
    client2.register(address + 2 * PAGE, address + 4 * PAGE, 2)
    implementation.advise(address + PAGE, 2, MADV_DONTNEED)
    assert client2.generation == 2
    assert client2.read() == [
        (1, address + PAGE, address + 2 * PAGE, True),
        (2, address + 2 * PAGE, address + 3 * PAGE, True),
        (2,),
    ]


def test_remove_of_own_shared_memory(client2: Client, implementation: Implementation) -> None:
    """MADV_REMOVE through the registered mapping itself is a notification."""
    address = implementation.map(4, shared=True)
    client2.register(address, address + 4 * PAGE, 1)
    implementation.advise(address + PAGE, 2, MADV_REMOVE)
    assert client2.read() == [(1, address + PAGE, address + 3 * PAGE, True), (1,)]


def test_mremap_target_is_reported_first(client2: Client, implementation: Implementation) -> None:
    """MREMAP_FIXED: what was at the target goes first, then the old place twice."""
    source, target = implementation.map(2), implementation.map(2)
    client2.register(source, source + 2 * PAGE, 1)
    client2.register(target, target + 2 * PAGE, 2)
    implementation.remap(source, 2, 2, MOVE, target)
    assert client2.generation == 3
    assert client2.read() == [(2, target, target + 2 * PAGE, True), (1, source, source + 2 * PAGE, False), (3,)]


def test_mremap_new_place_is_watched(client2: Client, implementation: Implementation) -> None:
    """A region over the new place, registered before the move into a hole, is hit when the moved memory goes."""
    source, target = implementation.map(2), implementation.reserve(2)
    client2.register(source, source + 2 * PAGE, 1)
    client2.register(target, target + 2 * PAGE, 2)
    implementation.remap(source, 2, 2, MOVE, target)
    client2.drain()
    implementation.unmap(target, 2)
    assert client2.read() == [(2, target, target + 2 * PAGE, True), (3,)]


def test_brk(client2: Client, implementation: Implementation) -> None:
    """Shrinking the heap is a notification for what goes; growing it is none."""
    address = implementation.grow_heap(4)
    client2.register(address, address + 4 * PAGE, 1)
    implementation.grow_heap(1)
    assert client2.generation == 0
    implementation.shrink_heap(3)
    assert client2.read() == [(1, address + 2 * PAGE, address + 4 * PAGE, True), (1,)]
    implementation.shrink_heap(2)


def test_nothing_for_other_memory(client2: Client, implementation: Implementation) -> None:
    """Portals waits for LAST to equal the generation: no notification may count that hit nothing."""
    address = implementation.map(3)
    client2.register(address + PAGE, address + 2 * PAGE, 1)
    implementation.unmap(address, 1)
    implementation.advise(address + 2 * PAGE, 1, MADV_DONTNEED)
    implementation.map_at(address, 1)
    assert client2.generation == 0
    assert client2.poll() == set()


def test_mprotect_and_fork_are_harmless(client2: Client, implementation: Implementation) -> None:
    """An MMU notifier reports mprotect and fork, which invalidate no registration; userfaultfd does not."""
    address = implementation.map(2)
    client2.register(address, address + 2 * PAGE, 1)
    implementation.protect(address + PAGE, 1, mmap.PROT_READ)
    after_protect = client2.generation
    implementation.in_child(lambda _child: 0)
    if "mprotect and fork are reported" in implementation.cannot:
        assert (after_protect, client2.generation) == (0, 0)
    else:
        assert after_protect == 1
        assert client2.generation > 1


def test_many_threads_lose_nothing(client2: Client, implementation: Implementation) -> None:
    """Each of many unmaps in four threads is counted exactly once."""
    threads_count, rounds = 4, 100
    pages = [implementation.reserve(1) for _ in range(threads_count)]

    def work(index: int) -> None:
        for _ in range(rounds):
            implementation.map_at(pages[index], 1)
            client2.register(pages[index], pages[index] + PAGE, index)
            implementation.unmap(pages[index], 1)
            client2.unregister(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(threads_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client2.generation == threads_count * rounds
