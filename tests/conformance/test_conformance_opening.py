"""Rules 1 to 4: opening, whose memory it is, unknown requests, EXCHANGE_FEATURES."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from conformance.client import Client, OpenClient, errno_of
from conformance.implementations import PAGE, Implementation

from usermm.uapi import ummunot, ummunotify
from usermm.uapi._ioctl import ioctl_size


def test_rule_1_generation_starts_at_0(client: Client) -> None:
    """Each open is a context with generation 0."""
    assert client.generation == 0
    assert bytes(client.device.mmap()[:8]) == bytes(8)


def test_rule_1_contexts_are_independent(open_client: OpenClient, implementation: Implementation, abi: int) -> None:
    """Each open has regions, cookies, a queue and a generation of its own; a later open starts at 0 again."""
    first, second = open_client(abi), open_client(abi)
    address = implementation.map(2)
    first.register(address, address + PAGE, 7)
    second.register(address + PAGE, address + 2 * PAGE, 7)
    implementation.unmap(address, 1)
    assert (first.generation, second.generation) == (1, 0)
    assert first.poll() == {"readable"}
    assert second.poll() == set()
    assert [event[0] for event in first.read()] == [7, 1]
    third = open_client(abi)
    assert third.generation == 0
    assert errno_of(third.unregister, 7) == errno.EINVAL


@pytest.mark.parametrize("mode", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_NONBLOCK])
def test_rule_1_opening_for_writing_is_refused(implementation: Implementation, abi: int, mode: int) -> None:
    """Opening for writing in any mode: EINVAL."""
    assert errno_of(implementation.open, abi, mode) == errno.EINVAL


def test_rule_2_all_threads_of_the_opener(client: Client, implementation: Implementation) -> None:
    """A context belongs to the address space of the opener: any thread registers, changes memory, reads."""
    address = implementation.map(1)
    events: list[object] = []
    for step in (
        lambda: client.register(address, address + PAGE, 1),
        lambda: implementation.unmap(address, 1),
        lambda: events.extend(client.read()),
    ):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert events == [(1, address, address + PAGE, True), (1,)]


@pytest.mark.parametrize("request_", [0, 1, 0x5501, 0xC0045502, 0x40205503, 0xFFFFFFFF])
def test_rule_3_unknown_ioctl(client: Client, request_: int) -> None:
    """Unknown ioctl: ENOTTY, whatever the argument."""
    assert errno_of(client.device.ioctl, request_, client.implementation.bad_address) == errno.ENOTTY
    assert errno_of(client.device.ioctl, request_, bytes(ioctl_size(request_))) == errno.ENOTTY


def test_rule_3_each_version_refuses_the_other_ones_requests(open_client: OpenClient) -> None:
    """The numbers of the two versions are disjoint: each answers ENOTTY to the other's. Version 1 has no EXCHANGE."""
    for abi, foreign in (
        (1, (ummunotify.EXCHANGE_FEATURES, ummunotify.REGISTER_REGION, ummunotify.UNREGISTER_REGION)),
        (2, (ummunot.REGISTER_REGION, ummunot.UNREGISTER_REGION)),
    ):
        client = open_client(abi)
        for request in foreign:
            assert errno_of(client.device.ioctl, request, bytearray(ioctl_size(request))) == errno.ENOTTY


@pytest.mark.parametrize("wanted", [0, 1, 0x80000000, 0xFFFFFFFF])
def test_rule_4_exchange_grants_nothing(client2: Client, wanted: int) -> None:
    """EXCHANGE_FEATURES writes back the supported subset: none are defined."""
    assert client2.exchange(wanted) == 0


def test_rule_4_exchange_only_once(client2: Client) -> None:
    """Allowed once, else EINVAL."""
    client2.exchange()
    assert errno_of(client2.exchange) == errno.EINVAL


def test_rule_4_a_faulting_exchange_is_a_use(client2: Client) -> None:
    """EXCHANGE sets "used" even when it ends in EFAULT; once used, EINVAL comes before the argument is looked at."""
    bad_address = client2.implementation.bad_address
    assert errno_of(client2.device.ioctl, ummunotify.EXCHANGE_FEATURES, bad_address) == errno.EFAULT
    assert errno_of(client2.device.ioctl, ummunotify.EXCHANGE_FEATURES, bad_address) == errno.EINVAL
    assert errno_of(client2.exchange) == errno.EINVAL


def test_rule_4_register_is_a_use(client2: Client) -> None:
    """REGISTER sets "used"."""
    client2.register(0, 0, 1)
    assert errno_of(client2.exchange) == errno.EINVAL


def test_rule_4_a_faulting_register_is_no_use(client2: Client) -> None:
    """REGISTER sets "used" only after its argument was copied in."""
    bad_address = client2.implementation.bad_address
    assert errno_of(client2.device.ioctl, ummunotify.REGISTER_REGION, bad_address) == errno.EFAULT
    assert client2.exchange() == 0


def test_rule_4_a_read_that_finds_nothing_is_a_use(client2: Client) -> None:
    """read sets "used" even if it ends in EAGAIN."""
    assert errno_of(client2.read) == errno.EAGAIN
    assert errno_of(client2.exchange) == errno.EINVAL


def test_rule_4_unregister_poll_and_mmap_are_no_use(client2: Client) -> None:
    """"Used" is not set by UNREGISTER, poll or mmap."""
    assert errno_of(client2.unregister, 1) == errno.EINVAL
    bad_address = client2.implementation.bad_address
    assert errno_of(client2.device.ioctl, ummunotify.UNREGISTER_REGION, bad_address) == errno.EFAULT
    assert client2.poll() == set()
    assert client2.device.mmap()[0] == 0
    assert errno_of(client2.device.ioctl, 0x5501, bytes(0)) == errno.ENOTTY
    assert client2.exchange() == 0
