"""Rule 9: read, LAST, and the differences of version 1."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from conformance.client import Client, OpenClient, errno_of
from conformance.implementations import PAGE, Implementation

EVENT = 32
WAIT_S = 10.0


def queue_events(client: Client, number: int) -> int:
    """Queues `number` events with one notification; the regions' cookies are 1 .. number in order."""
    address = client.implementation.map(1)
    for cookie in range(1, number + 1):
        client.register(address + cookie, address + PAGE, cookie)
    client.implementation.advise(address, 1, 4)
    return address


@pytest.mark.parametrize(
    ("count", "expected"), [(32, 1), (63, 1), (64, 2), (100, 3), (4095, 127), (4096, 128), (4097, 128), (1 << 20, 128)]
)
def test_rule_9_capacity(client: Client, count: int, expected: int) -> None:
    """A read gives at most min(count, 4096) / 32 events."""
    queue_events(client, 200)
    assert client.device.read_bytes(count).__len__() == expected * EVENT


@pytest.mark.parametrize("count", [0, 1, 31, 32, 4096])
def test_rule_9_nothing_there(client: Client, count: int) -> None:
    """Nothing queued and no LAST owed: EAGAIN, even for a count of 0."""
    assert errno_of(client.device.read_bytes, count) == errno.EAGAIN


@pytest.mark.parametrize("count", [0, 1, 31])
def test_rule_9_a_short_count_changes_nothing(client: Client, count: int) -> None:
    """Something readable and count < 32: 0, and everything is still there."""
    queue_events(client, 1)
    for _ in range(2):
        assert client.device.read_bytes(count) == b""
        assert client.poll() == {"readable"}
    assert len(client.read()) == 2


def test_rule_9_a_short_count_leaves_an_owed_last(client2: Client) -> None:
    """An owed LAST is something readable: a short count gives 0 and leaves it."""
    queue_events(client2, 1)
    client2.read(EVENT)
    assert client2.device.read_bytes(31) == b""
    assert client2.read(EVENT) == [(1,)]


@pytest.mark.parametrize(("events", "count"), [(1, 64), (1, 4096), (3, 128), (126, 4096), (127, 4096)])
def test_rule_9_last_ends_a_buffer_with_room(client: Client, events: int, count: int) -> None:
    """When the queue has been drained and there is room, one LAST with the current generation ends the buffer."""
    queue_events(client, events)
    got = client.read(count)
    assert [event[0] for event in got] == [*range(1, events + 1), 1]
    assert len(got[-1]) == 1
    assert client.poll() == set()
    assert errno_of(client.read) == errno.EAGAIN


@pytest.mark.parametrize(("events", "count"), [(1, 32), (1, 63), (3, 96), (128, 4096), (128, 8192)])
def test_rule_9_last_is_owed_after_an_exact_fill(client2: Client, events: int, count: int) -> None:
    """Events that filled the buffer exactly: LAST is owed, the descriptor stays readable, the next read gives it."""
    queue_events(client2, events)
    assert [event[0] for event in client2.read(count)] == list(range(1, events + 1))
    assert client2.poll() == {"readable"}
    assert client2.read() == [(1,)]
    assert client2.poll() == set()
    assert errno_of(client2.read) == errno.EAGAIN


@pytest.mark.parametrize(("events", "count"), [(1, 32), (128, 4096)])
def test_version_1_owes_no_last(open_client: OpenClient, events: int, count: int) -> None:
    """Version 1 gives LAST only to a read that finds room after draining; after an exact fill there is none."""
    client = open_client(1)
    queue_events(client, events)
    assert len(client.read(count)) == events
    assert client.poll() == set()
    assert errno_of(client.read) == errno.EAGAIN


def test_rule_9_last_carries_the_current_generation(client2: Client, implementation: Implementation) -> None:
    """An owed LAST tells the generation of the moment it is read, after the events that came meanwhile."""
    address = queue_events(client2, 1)
    client2.read(EVENT)
    implementation.advise(address, 1, 4)
    implementation.advise(address, 1, 4)
    assert client2.read() == [(1, address + 1, address + PAGE, False), (3,)]
    assert client2.poll() == set()


def test_rule_9_reading_one_at_a_time(client2: Client) -> None:
    """One event per read, then LAST equals the generation: how Open MPI empties the queue."""
    queue_events(client2, 3)
    got = [client2.read(EVENT)[0] for _ in range(4)]
    assert [event[0] for event in got] == [1, 2, 3, 1]
    assert errno_of(client2.read, EVENT) == errno.EAGAIN


def test_rule_9_no_last_without_an_inval(client: Client) -> None:
    """LAST comes only after at least one INVAL: never on a fresh device, never twice."""
    queue_events(client, 1)
    client.read()
    for _ in range(3):
        assert errno_of(client.read) == errno.EAGAIN


def test_rule_9_a_region_stays_registered_after_its_event(client: Client, implementation: Implementation) -> None:
    """Reading an event does not unregister: the cookie is taken and the next change is reported."""
    address = queue_events(client, 1)
    client.read()
    assert errno_of(client.register, address, address + 1, 1) == errno.EINVAL
    implementation.unmap(address, 1)
    assert client.read() == [(1, address + 1, address + PAGE, True), (2,)]


@pytest.mark.parametrize("count", [32, 4096])
def test_rule_9_a_bad_buffer_loses_the_events(client: Client, implementation: Implementation, count: int) -> None:
    """EFAULT loses the events that would have been read; regions stay registered and hints start afresh."""
    address = queue_events(client, 1)
    assert errno_of(client.device.readinto, implementation.bad_address, count) == errno.EFAULT
    if client.abi == 2 and count == EVENT:
        assert client.read() == [(1,)]  # filled exactly: LAST is owed all the same
    assert client.poll() == set()
    assert errno_of(client.read) == errno.EAGAIN
    implementation.advise(address, 1, 4)
    assert client.read() == [(1, address + 1, address + PAGE, True), (2,)]


def test_rule_9_nothing_there_comes_before_a_bad_buffer(client: Client, implementation: Implementation) -> None:
    """A bad buffer is not looked at when there is nothing to copy: EAGAIN, or 0 for a short count."""
    assert errno_of(client.device.readinto, implementation.bad_address, 4096) == errno.EAGAIN
    queue_events(client, 1)
    assert client.device.readinto(implementation.bad_address, 31) == 0
    assert len(client.read()) == 2


@pytest.mark.parametrize("count", [4096, 0])
def test_rule_9_a_blocking_read_waits(
    open_client: OpenClient, implementation: Implementation, abi: int, count: int
) -> None:
    """Without O_NONBLOCK a read waits for an event, even with a count of 0."""
    client = open_client(abi, os.O_RDONLY)
    address = implementation.map(1)
    client.register(address, address + PAGE, 1)
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(client.device.read_bytes(count)), daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    implementation.unmap(address, 1)
    thread.join(WAIT_S)
    assert [len(answer) for answer in answers] == [2 * EVENT if count else 0]


def test_rule_9_a_blocking_read_with_something_there(open_client: OpenClient, abi: int) -> None:
    """Without O_NONBLOCK a read returns at once when an event is queued."""
    client = open_client(abi, os.O_RDONLY)
    queue_events(client, 1)
    assert len(client.read()) == 2


def test_rule_9_several_readers_share_one_queue(open_client: OpenClient, implementation: Implementation) -> None:
    """Each event goes to one of the readers, whatever their number, and none is lost."""
    client = open_client(2, os.O_RDONLY)
    events = 50
    got: list[tuple[object, ...]] = []

    def read_until_zero() -> None:
        while True:
            for event in client.read(EVENT):
                got.append(event)
                if event[0] == 0 and len(event) == 4:
                    return

    threads = [threading.Thread(target=read_until_zero, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    queue_events(client, events)
    stopper = implementation.map(1)
    client.register(stopper, stopper + PAGE, 0)
    for thread in threads:  # each reader ends on one event of region 0
        while thread.is_alive():
            implementation.advise(stopper, 1, 4)
            thread.join(0.01)
    cookies = sorted(int(str(event[0])) for event in got if len(event) == 4 and event[0] != 0)
    assert cookies == list(range(1, events + 1))
