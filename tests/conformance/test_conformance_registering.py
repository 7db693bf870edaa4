"""Rules 5, 10 and the first half of 14: what can be registered, and what unregistering leaves behind."""

from __future__ import annotations

import errno
import threading

import pytest
from conformance.client import Client, errno_of
from conformance.implementations import PAGE, Implementation

U64 = (1 << 64) - 1


def test_rule_5_any_range_is_accepted(client: Client, implementation: Implementation) -> None:
    """REGISTER checks nothing about the range: unaligned, unmapped, empty and reversed ranges, any cookie."""
    mapped, hole = implementation.map(2), implementation.reserve(2)
    ranges = [
        (mapped + 1, mapped + 2),
        (mapped + 100, mapped + PAGE + 100),
        (mapped, mapped),
        (mapped + 5, mapped + 5),
        (mapped + PAGE, mapped),
        (mapped + PAGE + 7, mapped + 3),
        (hole, hole + 2 * PAGE),
        (hole + 3, hole + 3),
        (mapped, mapped + 4 * PAGE),  # ends beyond the mapping
        (0, 0),
        (0, 1),
        (U64, U64),
        (U64, 0),
        (U64 - 1, U64),
    ]
    for cookie, (start, end) in enumerate(ranges):
        client.register(start, end, U64 - cookie)
    for cookie in range(len(ranges)):
        client.unregister(U64 - cookie)
    assert client.generation == 0


def test_rule_5_equal_ranges(client: Client, implementation: Implementation) -> None:
    """The same range may be registered many times, each time with another cookie."""
    address = implementation.map(1)
    for cookie in range(5):
        client.register(address, address + PAGE, cookie)
    implementation.unmap(address, 1)
    assert client.generation == 1
    assert len(client.read()) == 6


def test_rule_5_flags_are_ignored(client: Client, implementation: Implementation) -> None:
    """Real clients leave `flags` and `reserved` uninitialised: any value does."""
    address = implementation.map(1)
    client.register(address, address + PAGE, 1, flags=0xDEADBEEF)
    implementation.unmap(address, 1)
    assert client.read()[0] == (1, address, address + PAGE, True)


def test_rule_5_a_registered_cookie_is_refused(client: Client, implementation: Implementation) -> None:
    """EINVAL for a cookie already registered, also with another range; the first region stays as it was."""
    address = implementation.map(2)
    client.register(address, address + PAGE, 0)
    assert errno_of(client.register, address, address + PAGE, 0) == errno.EINVAL
    assert errno_of(client.register, address + PAGE, address + 2 * PAGE, 0) == errno.EINVAL
    implementation.unmap(address + PAGE, 1)
    assert client.generation == 0
    implementation.unmap(address, 1)
    assert client.read() == [(0, address, address + PAGE, True), (1,)]


def test_rule_5_a_cookie_is_free_again_after_unregister(client: Client) -> None:
    """Only a cookie that is registered now is refused."""
    for _ in range(3):
        client.register(0, 0, 3)
        client.unregister(3)


def test_rule_5_a_bad_argument(client: Client) -> None:
    """REGISTER and UNREGISTER of a bad address: EFAULT."""
    bad_address = client.implementation.bad_address
    assert errno_of(client.device.ioctl, client.register_request, bad_address) == errno.EFAULT
    assert errno_of(client.device.ioctl, client.unregister_request, bad_address) == errno.EFAULT


def test_rule_5_no_limit_on_the_number(client: Client, implementation: Implementation) -> None:
    """Thousands of regions, read 128 events at a time."""
    pages, each = 64, 33  # no multiple of 128: version 1 gives LAST only where there is room
    address = implementation.map(pages)
    for cookie in range(pages * each):
        page = address + cookie // each * PAGE
        client.register(page, page + PAGE, cookie)
    implementation.unmap(address, pages)
    assert client.generation == 1
    events = client.drain()
    # Ascending by start; equal starts newest first.
    in_order = [page * each + index for page in range(pages) for index in reversed(range(each))]
    assert [event[0] for event in events] == [*in_order, 1]
    for cookie in range(pages * each):
        client.unregister(cookie)


def test_rule_5_nothing_from_before_is_reported(client: Client, implementation: Implementation) -> None:
    """What happened before the registration is not reported, nor what happened between two of the same cookie."""
    address = implementation.map(2)
    implementation.unmap(address, 1)
    client.register(address, address + 2 * PAGE, 1)
    assert client.poll() == set()
    client.unregister(1)
    implementation.unmap(address + PAGE, 1)
    implementation.map_at(address, 2)
    client.register(address, address + 2 * PAGE, 1)
    assert client.generation == 0
    assert errno_of(client.read) == errno.EAGAIN


def test_rule_10_unknown_cookie(client: Client) -> None:
    """UNREGISTER of an unknown cookie: EINVAL, also of one that was unregistered."""
    assert errno_of(client.unregister, 1) == errno.EINVAL
    client.register(0, 0, 1)
    client.unregister(1)
    assert errno_of(client.unregister, 1) == errno.EINVAL


def test_rule_10_a_queued_region_takes_its_event_along(client: Client, implementation: Implementation) -> None:
    """Unregistering a queued region drops its event; the generation stays and no LAST becomes owed."""
    address = implementation.map(1)
    client.register(address, address + PAGE, 1)
    implementation.unmap(address, 1)
    assert client.generation == 1
    client.unregister(1)
    assert client.generation == 1
    assert client.poll() == set()
    assert errno_of(client.read) == errno.EAGAIN


def test_rule_10_the_others_stay_queued(client: Client, implementation: Implementation) -> None:
    """Only the event of the region itself vanishes, wherever in the queue it was."""
    address = implementation.map(3)
    for index in range(3):
        client.register(address + index * PAGE, address + (index + 1) * PAGE, index)
    implementation.unmap(address, 3)
    client.unregister(1)
    assert [event[0] for event in client.read()] == [0, 2, 1]


@pytest.mark.parametrize("read_first", [False, True])
def test_rule_10_an_owed_last_stays_owed(client2: Client, implementation: Implementation, read_first: bool) -> None:
    """Unregistering the rest of the queue neither makes nor takes an owed LAST: it is owed since an INVAL was read.

    Without that LAST a program that waits for "generation == last LAST" would wait for ever.
    """
    address = implementation.map(2)
    client2.register(address, address + PAGE, 1)
    client2.register(address + PAGE, address + 2 * PAGE, 2)
    implementation.unmap(address, 2)
    if read_first:
        assert client2.read(32) == [(1, address, address + PAGE, True)]
        client2.unregister(2)
        assert client2.poll() == {"readable"}
        assert client2.read() == [(1,)]
    else:
        client2.unregister(1)
        client2.unregister(2)
    assert client2.poll() == set()


def test_rule_10_unregister_after_the_event_was_read(client: Client, implementation: Implementation) -> None:
    """A region stays registered after its event was read, and can then be unregistered."""
    address = implementation.map(1)
    client.register(address, address + PAGE, 1)
    implementation.unmap(address, 1)
    client.read()
    client.unregister(1)
    assert client.poll() == set()


def test_rule_14_no_event_after_unregister(client: Client, implementation: Implementation) -> None:
    """After UNREGISTER returned, no event for that cookie is delivered, however busy another thread is."""
    address = implementation.map(1)
    client.register(address, address + PAGE, 1_000_000)
    stop = threading.Event()

    def discard() -> None:
        while not stop.is_set():
            implementation.advise(address, 1, 4)

    thread = threading.Thread(target=discard)
    thread.start()
    try:
        for cookie in range(300):
            client.register(address, address + PAGE, cookie)
            client.unregister(cookie)
            assert cookie not in [event[0] for event in client.drain() if len(event) == 4]
    finally:
        stop.set()
        thread.join()
