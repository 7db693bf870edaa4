"""Rules 6 to 8: what a notification hits, in which order, and the hint."""

from __future__ import annotations

import pytest
from conformance.client import Client, OpenClient, errno_of
from conformance.implementations import PAGE, Implementation

from usermm.uapi import ummunot


@pytest.mark.parametrize(
    ("start", "end", "is_hit"),
    [
        (0, 2, False),  # pages before; the notification is for pages [2, 4)
        (1, 3, True),
        (2, 3, True),
        (2, 4, True),
        (3, 4, True),
        (3, 5, True),
        (0, 6, True),
        (4, 6, False),
    ],
)
def test_rule_6_overlap(client: Client, implementation: Implementation, start: int, end: int, is_hit: bool) -> None:
    """[s, e) hits a region iff region.start < e and s < region.end: touching is not enough."""
    address = implementation.map(6)
    client.register(address + start * PAGE, address + end * PAGE, 1)
    implementation.advise(address + 2 * PAGE, 2, 4)
    assert client.generation == is_hit
    assert client.poll() == ({"readable"} if is_hit else set())


@pytest.mark.parametrize(
    ("start", "end", "is_hit"),
    [(-1, 0, False), (-1, 1, True), (PAGE - 1, PAGE, True), (PAGE, PAGE + 1, False), (PAGE - 1, PAGE + 1, True)],
)
def test_rule_6_unaligned(client: Client, implementation: Implementation, start: int, end: int, is_hit: bool) -> None:
    """Regions are compared to the byte: one that only touches the notification is not hit."""
    address = implementation.map(3) + PAGE
    client.register(address + start, address + end, 1)
    implementation.advise(address, 1, 4)
    assert client.generation == is_hit


@pytest.mark.parametrize(
    ("offset", "is_hit"),
    [(0, False), (1, True), (PAGE, True), (PAGE + 5, True), (2 * PAGE - 1, True), (2 * PAGE, False)],
)
def test_rule_6_empty_region(client: Client, implementation: Implementation, offset: int, is_hit: bool) -> None:
    """[S, S) is hit only by a notification that contains S strictly inside; the hint is empty then."""
    address = implementation.map(4) + PAGE
    client.register(address + offset, address + offset, 1)
    implementation.unmap(address, 2)
    assert client.generation == is_hit
    if is_hit:
        assert client.read() == [(1, address + offset, address + offset, True), (1,)]


@pytest.mark.parametrize(
    ("start", "end", "is_hit"),
    [
        (3 * PAGE, 2 * PAGE, True),
        (4 * PAGE - 1, PAGE + 1, True),
        (4 * PAGE, PAGE + 1, False),
        (4 * PAGE - 1, PAGE, False),
        (5 * PAGE, 2 * PAGE, False),
        (3 * PAGE, 0, False),
    ],
)
def test_rule_6_reversed_region(
    client: Client, implementation: Implementation, start: int, end: int, is_hit: bool
) -> None:
    """A reversed region is hit only by a notification that covers beyond both its ends, here pages [1, 4)."""
    address = implementation.map(6)
    client.register(address + start, address + end, 1)
    implementation.unmap(address + PAGE, 3)
    assert client.generation == is_hit
    if is_hit:
        assert client.read() == [(1, address + start, address + end, True), (1,)]


def test_rule_7_ascending_start_newest_first(client: Client, implementation: Implementation) -> None:
    """One notification queues regions by ascending start, those with equal starts newest first."""
    address = implementation.map(4)
    for cookie, (start, end) in enumerate([(2, 3), (0, 4), (2, 4), (1, 2), (2, 3), (0, 1), (3, 4)]):
        client.register(address + start * PAGE, address + end * PAGE, cookie)
    implementation.unmap(address, 4)
    assert [event[0] for event in client.read()] == [5, 1, 3, 4, 2, 0, 6, 1]


def test_rule_7_newest_counts_from_the_last_registration(client: Client, implementation: Implementation) -> None:
    """A cookie that was unregistered and registered again is the newest."""
    address = implementation.map(1)
    for cookie in range(3):
        client.register(address, address + PAGE, cookie)
    client.unregister(0)
    client.register(address, address + 1, 0)
    implementation.unmap(address, 1)
    assert [event[0] for event in client.read()] == [0, 2, 1, 1]


def test_rule_7_queue_is_in_order_of_first_hits(client: Client, implementation: Implementation) -> None:
    """A region already queued keeps its place; later notifications append behind it."""
    address = implementation.map(3)
    for index in range(3):
        client.register(address + index * PAGE, address + (index + 1) * PAGE, index)
    implementation.advise(address + 2 * PAGE, 1, 4)
    implementation.advise(address, 1, 4)
    implementation.unmap(address, 3)
    assert [event[0] for event in client.read()] == [2, 0, 1, 3]


def test_rule_7_coalescing_loses_the_hint(client: Client, implementation: Implementation) -> None:
    """A second hit before the event is read takes HINT away, even for an identical range; the event is the region."""
    address = implementation.map(2)
    client.register(address, address + 2 * PAGE, 1)
    for _ in range(2):
        implementation.advise(address, 1, 4)
    assert client.generation == 2
    assert client.read() == [(1, address, address + 2 * PAGE, False), (2,)]


def test_rule_7_the_hint_comes_back_after_reading(client: Client, implementation: Implementation) -> None:
    """Once its event was read the region starts afresh: it is still registered and the next hit has HINT."""
    address = implementation.map(2)
    client.register(address, address + 2 * PAGE, 1)
    for generation in (2, 4):
        implementation.advise(address, 1, 4)
        implementation.advise(address, 1, 4)
        assert client.read() == [(1, address, address + 2 * PAGE, False), (generation,)]
    implementation.advise(address + PAGE, 1, 4)
    assert client.read() == [(1, address + PAGE, address + 2 * PAGE, True), (5,)]


def test_rule_7_one_step_for_each_notification(client: Client, implementation: Implementation) -> None:
    """The generation goes up by exactly 1 for a notification that hit, however many regions, coalesced or not."""
    address, other = implementation.map(4), implementation.map(2)
    for cookie in range(8):
        client.register(address, address + (4 - cookie % 4) * PAGE, cookie)  # the widest first: one mapping
    for expected in (1, 2, 3):
        implementation.advise(address, 4, 4)
        assert client.generation == expected
    implementation.advise(other, 2, 4)
    implementation.unmap(other, 2)
    assert client.generation == 3


def test_rule_7_version_2_third_hit_has_no_hint(client2: Client, implementation: Implementation) -> None:
    """Without HINT is without HINT until read, in version 2."""
    address = implementation.map(2)
    client2.register(address, address + 2 * PAGE, 1)
    for hits in range(2, 6):
        for _ in range(hits):
            implementation.advise(address, 1, 4)
        assert client2.read()[0] == (1, address, address + 2 * PAGE, False)


@pytest.mark.parametrize("hits", [1, 2, 3, 4, 5])
def test_version_1_the_hint_toggles(open_client: OpenClient, implementation: Implementation, hits: int) -> None:
    """Version 1's quirk: HINT toggles on each further hit, and an odd one claims the first hit's range."""
    client = open_client(1)
    address = implementation.map(4)
    client.register(address, address + 4 * PAGE, 1)
    for hit in range(hits):
        implementation.advise(address + hit % 4 * PAGE, 1, 4)
    expected = (1, address, address + PAGE, True) if hits % 2 else (1, address, address + 4 * PAGE, False)
    assert client.read() == [expected, (hits,)]


def test_version_1_only_interface_1(open_client: OpenClient) -> None:
    """Version 1: `intf_version` other than 1 is EINVAL."""
    client = open_client(1)
    for version in (0, 2, 0xFFFFFFFF):
        argument = ummunot.REGISTER.pack(version, 0, 0, PAGE, 1)
        assert errno_of(client.device.ioctl, ummunot.REGISTER_REGION, argument) == 22
    client.register(0, PAGE, 1)


@pytest.mark.parametrize(
    ("region", "hint"),
    [
        ((0, 6 * PAGE), (2 * PAGE, 4 * PAGE)),
        ((2 * PAGE, 4 * PAGE), (2 * PAGE, 4 * PAGE)),  # the whole region was hit: HINT all the same
        ((3 * PAGE, 4 * PAGE), (3 * PAGE, 4 * PAGE)),
        ((3 * PAGE, 6 * PAGE), (3 * PAGE, 4 * PAGE)),
        ((0, 3 * PAGE), (2 * PAGE, 3 * PAGE)),
        ((2 * PAGE + 1, 4 * PAGE - 1), (2 * PAGE + 1, 4 * PAGE - 1)),
        ((PAGE + 5, 2 * PAGE + 5), (2 * PAGE, 2 * PAGE + 5)),
        ((4 * PAGE - 1, 5 * PAGE), (4 * PAGE - 1, 4 * PAGE)),
    ],
)
def test_rule_8_the_hint_is_clipped(
    client: Client, implementation: Implementation, region: tuple[int, int], hint: tuple[int, int]
) -> None:
    """The hint is the part of the region that went, here of pages [2, 4)."""
    address = implementation.map(6)
    client.register(address + region[0], address + region[1], 1)
    implementation.unmap(address + 2 * PAGE, 2)
    assert client.read() == [(1, address + hint[0], address + hint[1], True), (1,)]


def test_rule_8_a_call_wider_than_the_region(client: Client, implementation: Implementation) -> None:
    """The clip is to the region also when the call began and ended outside all mappings."""
    address = implementation.reserve(8)
    implementation.map_at(address + 2 * PAGE, 4)
    client.register(address + 3 * PAGE, address + 4 * PAGE, 1)
    implementation.unmap(address, 8)
    assert client.read() == [(1, address + 3 * PAGE, address + 4 * PAGE, True), (1,)]
