"""Rules 11 to 13 and the second half of 14: the descriptor, the mapped page, fork, signals, exactness."""

from __future__ import annotations

import errno
import mmap
import os
import signal

import pytest
from conformance.client import Client, OpenClient, errno_of
from conformance.implementations import PAGE, Implementation

polls = pytest.mark.parametrize("how", ["poll", "select", "epoll"])


@polls
def test_rule_11_readable_while_an_event_is_queued(client: Client, implementation: Implementation, how: str) -> None:
    """Readable iff something can be read; never writable, never an error or hang-up."""
    address = implementation.map(1)
    assert client.poll(how) == set()
    client.register(address, address + PAGE, 1)
    assert client.poll(how) == set()
    implementation.advise(address, 1, 4)
    assert client.poll(how) == {"readable"}
    implementation.advise(address, 1, 4)
    assert client.poll(how) == {"readable"}
    client.read()
    assert client.poll(how) == set()
    implementation.unmap(address, 1)
    assert client.poll(how) == {"readable"}
    client.unregister(1)
    assert client.poll(how) == set()


@polls
def test_rule_11_readable_while_last_is_owed(client2: Client, implementation: Implementation, how: str) -> None:
    """An owed LAST keeps the descriptor readable until it is read."""
    address = implementation.map(1)
    client2.register(address, address + PAGE, 1)
    implementation.unmap(address, 1)
    client2.read(32)
    assert client2.poll(how) == {"readable"}
    client2.unregister(1)
    assert client2.poll(how) == {"readable"}
    client2.read(32)
    assert client2.poll(how) == set()


def test_rule_11_write_is_refused(client: Client, implementation: Implementation) -> None:
    """write: EBADF, the descriptor was opened read-only. Nothing becomes readable by it."""
    assert errno_of(implementation.write, client.device) == errno.EBADF
    assert client.poll() == set()


@pytest.mark.parametrize("length", [1, 8, 4095, 4096])
def test_rule_12_map_the_page(client: Client, length: int) -> None:
    """Offset 0 and length 1 to 4096."""
    page = client.device.mmap(length)
    assert page[0] == 0
    assert page.readonly


@pytest.mark.parametrize(("length", "offset"), [(0, 0), (4097, 0), (8192, 0), (4096, 4096), (8, 4096)])
def test_rule_12_any_other_mapping_is_refused(client: Client, length: int, offset: int) -> None:
    """Any other offset or length: EINVAL."""
    assert errno_of(client.device.mmap, length, mmap.PROT_READ, mmap.MAP_SHARED, offset) == errno.EINVAL


def test_rule_12_a_writable_shared_mapping_is_refused(client: Client) -> None:
    """A writable shared mapping is refused."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    assert errno_of(client.device.mmap, 4096, prot, mmap.MAP_SHARED) in (errno.EACCES, errno.EINVAL)


def test_rule_12_every_mapping_shows_the_generation(client: Client, implementation: Implementation) -> None:
    """All mappings are the same page, whatever their length; early and late ones show the same."""
    early = client.device.mmap(8)
    address = implementation.map(1)
    client.register(address, address + PAGE, 1)
    implementation.advise(address, 1, 4)
    assert client.generation == 1
    assert implementation.load(early) == 1
    assert implementation.load(client.device.mmap()) == 1


def test_rule_12_the_mapping_outlives_close(open_client: OpenClient, implementation: Implementation, abi: int) -> None:
    """The page can be read after the device was closed."""
    client = open_client(abi)
    address = implementation.map(1)
    client.register(address, address + PAGE, 1)
    page = client.device.mmap()
    implementation.advise(address, 1, 4)
    assert client.generation == 1
    client.close()
    assert implementation.load(page) >= 1
    implementation.unmap(address, 1)  # nobody reports it any more, and nobody waits for that
    assert implementation.load(page) >= 1


def test_rule_12_a_childs_own_unmaps_are_not_reported(client: Client, implementation: Implementation) -> None:
    """A forked child inherits the page; its own unmaps do not count, the parent's still do."""
    address = implementation.map(2, shared=True)  # not copied on write: fork itself is no notification for it
    client.register(address, address + 2 * PAGE, 1)
    implementation.advise(address, 1, 4)
    assert client.generation == 1
    page = client.device.mmap()

    def child(child: Implementation) -> int:
        child.unmap(address, 2)
        return child.load(page)

    assert implementation.in_child(child) == 1
    assert client.generation == 1
    assert client.read()[0] == (1, address, address + PAGE, True)
    implementation.unmap(address, 2)
    assert client.generation == 2


def test_rule_12_a_child_reads_the_device(client: Client, implementation: Implementation) -> None:
    """A forked child inherits the descriptor and shares the queue with its parent."""
    implementation.needs("a child reads the device")
    address = implementation.map(1, shared=True)
    client.register(address, address + PAGE, 1)
    implementation.advise(address, 1, 4)
    assert implementation.in_child(lambda _child: len(client.read())) == 2
    # The model's child is the same Python object; elsewhere the queue is shared through the descriptor.
    assert client.poll() == set()


def test_difference_6_a_child_opens_its_own(client: Client, implementation: Implementation) -> None:
    """Where a child may not use the device (ECHILD), the page is inherited and a device of the child's own works."""
    if "a child reads the device" not in implementation.cannot:
        pytest.skip(f"{implementation.name}: a child may use the device")
    address = implementation.map(1)
    client.register(address, address + PAGE, 1)
    implementation.advise(address, 1, 4)
    assert client.generation == 1
    page = client.device.mmap()

    def child(child: Implementation) -> int:
        assert errno_of(client.device.read_bytes, 4096) == errno.ECHILD
        assert errno_of(client.device.readinto, child.bad_address, 4096) == errno.ECHILD
        assert errno_of(client.unregister, 1) == errno.ECHILD
        assert child.load(page) == 1
        own = Client(child, client.abi, os.O_NONBLOCK)
        memory = child.map(1)
        own.register(memory, memory + PAGE, 7)
        child.unmap(memory, 1)
        assert own.read() == [(7, memory, memory + PAGE, True), (1,)]
        own.close()
        return child.load(page)

    assert implementation.in_child(child) == 1
    assert client.read() == [(1, address, address + PAGE, True), (1,)]


@pytest.mark.parametrize("number", [0, int(signal.SIGUSR2), int(signal.SIGRTMIN) + 3])
def test_rule_13_a_signal_for_each_notification_that_hit(
    client: Client, implementation: Implementation, number: int
) -> None:
    """F_SETOWN and O_ASYNC deliver SIGIO (or F_SETSIG's signal) on each notification that hit, coalesced or not."""
    address, other = implementation.map(2), implementation.map(1)
    client.register(address, address + 2 * PAGE, 1)
    client.register(address, address + PAGE, 2)
    with implementation.signals(client.device, number) as signals:
        for hits in (1, 2, 3):
            implementation.advise(address, 1, 4)
            assert signals(hits) == hits
        implementation.advise(other, 1, 4)
        client.read()
        assert signals(3) == 3
        implementation.unmap(address, 2)
        assert signals(4) == 4


def test_rule_14_the_generation_has_moved_when_the_call_returns(client: Client, implementation: Implementation) -> None:
    """After the unmapping call returned the generation has moved: the whole point of the device."""
    address = implementation.reserve(1)
    for seen in range(1000):
        implementation.map_at(address, 1)
        client.register(address, address + PAGE, 1)
        implementation.unmap(address, 1)
        assert client.generation == seen + 1
        assert client.poll() == {"readable"}
        client.unregister(1)


def test_rule_14_the_event_is_there_when_the_call_returns(client: Client, implementation: Implementation) -> None:
    """A read right after the unmapping call finds the event, with nothing in between."""
    address = implementation.reserve(1)
    for seen in range(1000):
        implementation.map_at(address, 1)
        client.register(address, address + PAGE, 1)
        implementation.unmap(address, 1)
        assert client.read() == [(1, address, address + PAGE, True), (seen + 1,)]
        client.unregister(1)


def test_rule_14_a_plain_load_shows_it(client: Client, implementation: Implementation) -> None:
    """A plain load of the mapped page shows the new generation when the unmapping call has returned."""
    implementation.needs("exact plain load")
    address = implementation.reserve(1)
    page = client.device.mmap()
    for seen in range(1000):
        implementation.map_at(address, 1)
        client.register(address, address + PAGE, 1)
        assert implementation.unmap_and_load(address, 1, page) == seen + 1
        client.unregister(1)


def test_rule_14_a_plain_load_shows_each_discard(client: Client, implementation: Implementation) -> None:
    """As for unmapping, for every one of many changes of a region that stays queued."""
    implementation.needs("exact plain load")
    address = implementation.map(1)
    client.register(address, address + PAGE, 1)
    page = client.device.mmap()
    for seen in range(1000):
        assert implementation.advise_and_load(address, 1, 4, page) == seen + 1
