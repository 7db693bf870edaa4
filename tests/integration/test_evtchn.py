"""Event channels between domains: masks, coalescing, the ABI, asyncio."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import resource
import select
import threading
from collections.abc import Callable

import pytest
from support.event_channels import MOMENT_S, PATIENCE_S, bind, is_readable, local, raises

import usermm
from usermm.errors import WouldBlockError
from usermm.grants.evtchn import Evtchn
from usermm.grants.local_evtchn import LocalEvtchn
from usermm.uapi import xen_evtchn


def test_events_go_both_ways_and_the_binder_starts_pending(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    assert one.evtchn.read(0) == []
    two.evtchn.notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]
    one.evtchn.notify(mine)
    assert two.evtchn.read(PATIENCE_S) == [theirs]


def test_a_read_port_is_masked_and_what_comes_meanwhile_is_delivered_after(
    one: usermm.Domain, two: usermm.Domain
) -> None:
    mine, theirs = bind(one, two)
    two.evtchn.notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]
    assert one.evtchn.pending() == frozenset()
    two.evtchn.notify(theirs)
    assert one.evtchn.read(MOMENT_S) == [] and not is_readable(one.evtchn)
    assert one.evtchn.pending() == {mine}
    one.evtchn.unmask(mine)
    assert is_readable(one.evtchn)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_a_port_that_was_masked_by_hand_waits_also_for_a_hang_up(one: usermm.Domain, two: usermm.Domain) -> None:
    """The kernel reports EPOLLHUP whatever was asked for: a masked port must not be in the epoll at all."""
    mine, theirs = bind(one, two)
    one.evtchn.mask(mine)
    two.evtchn.notify(theirs)
    assert one.evtchn.read(0) == []
    two.evtchn.unbind(theirs)
    assert one.evtchn.read(0) == [] and not is_readable(one.evtchn)
    one.evtchn.unmask(mine)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_a_million_notifications_are_one_event_and_never_wait(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    notify = two.evtchn.notify
    for _ in range(1_000_000):
        notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]
    one.evtchn.unmask(mine)
    assert one.evtchn.read(MOMENT_S) == []
    two.evtchn.notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_a_thousand_ports_at_once_and_a_short_read(one: usermm.Domain, two: usermm.Domain) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 8192), hard), hard))
    try:
        pairs = dict(bind(one, two) for _ in range(1000))
        for theirs in pairs.values():
            two.evtchn.notify(theirs)
        file = local(one)
        some = array.array("I", file.read(7 * 4 + 3))
        assert len(some) == 7
        rest: list[int] = []
        while ports := one.evtchn.read(0):
            rest += ports
        assert sorted([*some, *rest]) == sorted(pairs)
        one.evtchn.close()
        two.evtchn.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_was_written_before_a_notification_is_seen_after(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    numbers: list[int] = []

    def tell() -> None:
        for number in range(2000):
            numbers.append(number)
            two.evtchn.notify(theirs)

    teller = threading.Thread(target=tell)
    teller.start()
    seen = 0
    while seen < 2000:
        assert one.evtchn.read(PATIENCE_S) == [mine]
        one.evtchn.unmask(mine)
        seen = len(numbers)
    teller.join()


def test_the_devices_own_bytes(one: usermm.Domain, two: usermm.Domain) -> None:
    file, other = local(one), local(two)
    mine = file.ioctl(0x44502, bytearray(array.array("I", [two.domid]).tobytes()))
    theirs = other.ioctl(0x84501, bytearray(array.array("I", [one.domid, mine]).tobytes()))
    assert other.read(4096) == array.array("I", [theirs]).tobytes()
    assert other.ioctl(0x44504, bytearray(array.array("I", [theirs]).tobytes())) == 0
    assert select.select([file], [], [], PATIENCE_S)[0]
    assert file.read(3) == b"" and file.read(0) == b""
    assert file.read(7) == array.array("I", [mine]).tobytes()
    with raises(errno.EAGAIN, WouldBlockError):
        file.read(4)
    assert file.write(array.array("I", [mine, 99]).tobytes() + b"xyz") == 8
    assert file.ioctl(0x4505, bytearray()) == 0
    assert other.ioctl(0x44503, bytearray(array.array("I", [theirs]).tobytes())) == 0
    assert file.read(4) == array.array("I", [mine]).tobytes()
    with raises(errno.ENOTCONN):
        file.ioctl(0x44504, bytearray(array.array("I", [99]).tobytes()))
    with raises(errno.ENOTCONN):
        file.ioctl(0x44503, bytearray(array.array("I", [99]).tobytes()))
    with raises(errno.ENOSYS):
        file.ioctl(0x4507, bytearray(4))
    with raises(errno.EFAULT):
        file.ioctl(0x84501, bytearray(4))
    with raises(errno.ENODEV):
        file.mmap(4096, 1, 1, 0)
    with raises(errno.EINVAL):
        file.ioctl(0x44502, bytearray(array.array("I", [0x10000]).tobytes()))


def test_reset_forgets_and_leaves_masked(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    two.evtchn.notify(theirs)
    one.evtchn.reset()
    assert one.evtchn.read(0) == []
    two.evtchn.notify(theirs)
    assert one.evtchn.read(MOMENT_S) == []
    one.evtchn.unmask(mine)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_restriction_is_for_good_and_to_one_domain(hypervisor: usermm.Hypervisor, two: usermm.Domain) -> None:
    with usermm.Domain(hypervisor.socket, domid=0) as dom0:
        events = dom0.evtchn
        mine = events.bind_unbound_port(two.domid)
        theirs = two.evtchn.bind_interdomain(0, mine)
        for domid in (0, 0x7FF0, 0xFFFF, 0x10000):
            with raises(errno.EINVAL):
                events.restrict(domid)
        events.restrict(two.domid)
        with raises(errno.EACCES):
            events.restrict(two.domid)
        assert events.bind_interdomain(two.domid, two.evtchn.bind_unbound_port(0)) != mine
        for call in (
            lambda: events.bind_unbound_port(0),
            lambda: events.bind_unbound_port(two.domid),
            lambda: events.bind_interdomain(0, mine),
            lambda: events.bind_virq(xen_evtchn.VIRQ_DOM_EXC),
        ):
            with raises(errno.EACCES):
                call()
        two.evtchn.notify(theirs)
        assert mine in events.read(PATIENCE_S)
        with dom0.open_evtchn() as free:
            free.bind_virq(xen_evtchn.VIRQ_DOM_EXC)


class SlowFile:
    """A real device as far as Evtchn can tell: blocking reads are refused, nothing but ioctl, read and write."""

    def __init__(self, file: LocalEvtchn) -> None:
        self._file = file
        self.ioctl, self.read, self.write = file.ioctl, file.read, file.write
        self.mmap, self.fileno, self.close = file.mmap, file.fileno, file.close

    @property
    def closed(self) -> bool:
        return self._file.closed


def test_the_same_class_above_a_file_that_has_only_the_drivers_calls(one: usermm.Domain, two: usermm.Domain) -> None:
    file = SlowFile(local(one))
    events = Evtchn(file)
    assert not os.get_blocking(file.fileno())
    mine = events.bind_unbound_port(two.domid)
    theirs = two.evtchn.bind_interdomain(one.domid, mine)
    assert events.read(0) == [] and events.read(MOMENT_S) == []
    later = threading.Timer(MOMENT_S, two.evtchn.notify, [theirs])
    later.start()
    assert events.read() == [mine]
    later.join()
    events.notify(mine)
    assert two.evtchn.read(PATIENCE_S) == [theirs]
    two.evtchn.notify(theirs)
    assert events.read(0) == []
    events.unmask(mine)
    assert events.read(PATIENCE_S) == [mine]
    for call in (lambda: events.mask(mine), events.pending, lambda: events.waiter(mine)):
        with raises(errno.EOPNOTSUPP):
            call()
    events.reset()
    events.unbind(mine)


def test_ports_are_iterated_as_their_events_come(one: usermm.Domain, two: usermm.Domain) -> None:
    pairs = dict(bind(one, two) for _ in range(3))

    async def iterate() -> list[int]:
        found = []
        async for port in one.evtchn:
            found.append(port)
            one.evtchn.unmask(port)
            if len(found) == 3:
                break
        return found

    async def both() -> list[int]:
        task = asyncio.create_task(iterate())
        for theirs in pairs.values():
            await asyncio.sleep(0.01)
            two.evtchn.notify(theirs)
        return await asyncio.wait_for(task, PATIENCE_S)

    assert asyncio.run(both()) == list(pairs)


def test_what_an_iteration_has_not_given_stays(one: usermm.Domain, two: usermm.Domain) -> None:
    pairs = dict(bind(one, two) for _ in range(3))
    for theirs in pairs.values():
        two.evtchn.notify(theirs)

    async def first() -> int:
        iteration = one.evtchn.__aiter__()
        try:
            return await anext(iteration)
        finally:
            await iteration.aclose()  # type: ignore[attr-defined]

    port = asyncio.run(first())
    assert sorted([port, *one.evtchn.read(PATIENCE_S)]) == sorted(pairs)


@pytest.mark.parametrize("from_thread", [False, True])
def test_an_iteration_ends_with_the_file(one: usermm.Domain, two: usermm.Domain, from_thread: bool) -> None:
    bind(one, two)

    async def iterate() -> list[int]:
        return [port async for port in one.evtchn]

    async def both() -> list[int]:
        task = asyncio.create_task(iterate())
        await asyncio.sleep(0.01)
        if from_thread:
            await asyncio.to_thread(one.evtchn.close)
        else:
            one.evtchn.close()
        return await asyncio.wait_for(task, PATIENCE_S)

    assert asyncio.run(both()) == []
    assert asyncio.run(iterate()) == []


def test_a_slow_consumer_does_not_make_the_loop_spin(one: usermm.Domain, two: usermm.Domain) -> None:
    (mine, theirs), (_, theirs2) = bind(one, two), bind(one, two)

    async def consume() -> int:
        async for port in one.evtchn:
            assert port == mine
            two.evtchn.notify(theirs2)
            turns = 0
            loop = asyncio.get_running_loop()
            run_once = loop._run_once  # type: ignore[attr-defined]

            def counted(run_once: Callable[[], None] = run_once) -> None:
                nonlocal turns
                turns += 1
                run_once()

            loop._run_once = counted  # type: ignore[attr-defined]
            await asyncio.sleep(MOMENT_S)
            return turns
        return -1

    later = threading.Timer(MOMENT_S, two.evtchn.notify, [theirs])  # so that it has waited once
    later.start()
    assert asyncio.run(asyncio.wait_for(consume(), PATIENCE_S)) < 50
    later.join()


@pytest.mark.parametrize("timeout", [1e7, 1e300, float("inf")])
def test_waits_of_any_length(one: usermm.Domain, two: usermm.Domain, timeout: float) -> None:
    """More milliseconds than the system calls take."""
    mine, theirs = bind(one, two)

    def waited(wait: Callable[[], object]) -> object:
        later = threading.Timer(MOMENT_S, two.evtchn.notify, [theirs])
        later.start()
        try:
            return wait()
        finally:
            later.join()

    assert waited(lambda: one.evtchn.read(timeout)) == [mine]
    with one.evtchn.waiter(mine) as waiter:
        assert waited(lambda: waiter.wait(timeout)) is True
