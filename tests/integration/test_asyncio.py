"""Devices in event loops: async iteration under asyncio, and the descriptor for everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import selectors
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.processes import run_quietly

import usermm

MEBIBYTE = 1 << 20


@pytest.fixture
def device() -> Iterator[usermm.Ummunotify]:
    with usermm.Ummunotify() as device:
        yield device


def unmap(device: usermm.Ummunotify, *cookies: int) -> None:
    blocks = [mmap.mmap(-1, mmap.PAGESIZE) for _ in cookies]
    for cookie, block in zip(cookies, blocks, strict=True):
        device.register(block, cookie)
    for block in blocks:
        block.close()


async def cookies_until_last(device: usermm.Ummunotify) -> list[int]:
    found = []
    async with contextlib.aclosing(aiter(device)) as events:
        async for event in events:
            if isinstance(event, usermm.Last):
                break
            found.append(event.cookie)
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def readers() -> int:
    """What the running loop watches, less its own wake-up."""
    selector: selectors.BaseSelector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    return len(selector.get_map()) - 1


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_events_arrive_as_they_come(device: usermm.Ummunotify) -> None:
    async def main() -> None:
        for round_ in range(3):
            waiting = asyncio.create_task(cookies_until_last(device))
            await settle()
            unmap(device, round_ * 2, round_ * 2 + 1)
            assert await asyncio.wait_for(waiting, 5) == [round_ * 2, round_ * 2 + 1]
            device.unregister(round_ * 2)
            device.unregister(round_ * 2 + 1)

    asyncio.run(main())


def test_an_unmap_by_a_thread_wakes_the_loop(device: usermm.Ummunotify) -> None:
    async def main() -> None:
        waiting = asyncio.create_task(cookies_until_last(device))
        await settle()
        thread = threading.Thread(target=unmap, args=(device, 4))
        thread.start()
        assert await asyncio.wait_for(waiting, 5) == [4]
        thread.join()

    asyncio.run(main())


def test_several_devices_in_one_loop() -> None:
    async def main() -> None:
        with contextlib.ExitStack() as stack:
            devices = [stack.enter_context(usermm.Ummunotify()) for _ in range(5)]
            tasks = [asyncio.create_task(cookies_until_last(device)) for device in devices]
            await settle()
            for number, device in reversed(list(enumerate(devices))):
                unmap(device, number)
            found = await asyncio.wait_for(asyncio.gather(*tasks), 5)
            assert found == [[number] for number in range(5)]

    asyncio.run(main())


def test_two_iterations_share_one_device(device: usermm.Ummunotify) -> None:
    """Each event goes to one of them, and both end when the device is closed."""
    got: list[int] = []

    async def iterate() -> None:
        async for event in device:
            if isinstance(event, usermm.Invalidation):
                got.append(event.cookie)
            await asyncio.sleep(0)

    async def main() -> None:
        tasks = [asyncio.create_task(iterate()) for _ in range(2)]
        await settle()
        for cookie in range(20):
            block = mmap.mmap(-1, MEBIBYTE)
            device.register(block, cookie)
            block.close()
            await asyncio.sleep(0.002)
            if cookie in got:
                device.unregister(cookie)
        async with asyncio.timeout(5):
            while len(set(got)) < 20:
                await asyncio.sleep(0.005)
        device.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)

    asyncio.run(main())
    assert set(got) == set(range(20))


def test_close_from_another_task_ends_the_iteration(device: usermm.Ummunotify) -> None:
    async def main() -> None:
        before = descriptors(), readers()
        waiting = asyncio.create_task(cookies_until_last(device))
        await settle()
        assert readers() == before[1] + 1
        device.close()
        assert await asyncio.wait_for(waiting, 5) == []
        assert readers() == before[1]
        assert descriptors() < before[0]

    asyncio.run(main())


def test_close_from_a_thread_ends_the_iteration(device: usermm.Ummunotify) -> None:
    async def main() -> None:
        waiting = asyncio.create_task(cookies_until_last(device))
        await settle()
        await asyncio.to_thread(device.close)
        assert await asyncio.wait_for(waiting, 5) == []

    asyncio.run(main())


def test_iterating_over_a_closed_device_ends_at_once(device: usermm.Ummunotify) -> None:
    device.close()
    assert asyncio.run(cookies_until_last(device)) == []


def test_a_cancelled_iteration_leaves_nothing_behind(device: usermm.Ummunotify) -> None:
    async def main() -> None:
        before = descriptors(), readers()
        for _ in range(20):
            waiting = asyncio.create_task(cookies_until_last(device))
            await settle()
            assert waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert (descriptors(), readers()) == before

    asyncio.run(main())
    unmap(device, 9)
    assert [event.cookie for event in device.read(timeout=0)[:1]] == [9]


def test_a_timeout_around_the_next_event(device: usermm.Ummunotify) -> None:
    async def main() -> None:
        before = descriptors(), readers()
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(aiter(device)), 0.01)
        await asyncio.get_running_loop().shutdown_asyncgens()
        assert (descriptors(), readers()) == before

    asyncio.run(main())


def test_the_loop_may_end_with_an_iteration_open(device: usermm.Ummunotify) -> None:
    iterators: list[AsyncIterator[usermm.Event]] = []

    async def main() -> None:
        unmap(device, 1)
        iterators.append(aiter(device))
        assert isinstance(await anext(iterators[0]), usermm.Invalidation)

    before = descriptors()
    asyncio.run(main())
    iterators.clear()
    assert descriptors() == before


def test_events_that_were_not_taken_are_there_for_the_next_iteration(device: usermm.Ummunotify) -> None:
    """A loop that is left after the first event must not take the others with it: they are invalidations missed."""

    async def first(device: usermm.Ummunotify) -> int:
        async for event in device:
            assert isinstance(event, usermm.Invalidation)
            return event.cookie
        raise AssertionError("no event")

    async def main() -> list[int]:
        unmap(device, 1, 2, 3)
        taken = [await first(device)]
        return taken + [event.cookie for event in device.read(timeout=0) if isinstance(event, usermm.Invalidation)]

    assert asyncio.run(main()) == [1, 2, 3]


def test_an_iteration_that_is_cancelled_at_work_loses_nothing(device: usermm.Ummunotify) -> None:
    got: list[int] = []

    async def work() -> None:
        async for event in device:
            if isinstance(event, usermm.Invalidation):
                got.append(event.cookie)
            await asyncio.sleep(10)

    async def main() -> None:
        unmap(device, 1, 2, 3)
        task = asyncio.create_task(work())
        while not got:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    got.extend(event.cookie for event in device.read(timeout=0) if isinstance(event, usermm.Invalidation))
    assert got == [1, 2, 3]


def test_more_events_than_one_read_gives(device: usermm.Ummunotify) -> None:
    unmap(device, *range(1000))
    assert asyncio.run(cookies_until_last(device)) == list(range(1000))


def test_two_loops_in_two_threads(device: usermm.Ummunotify) -> None:
    got: list[int] = []

    async def collect() -> None:
        async for event in device:
            if isinstance(event, usermm.Invalidation):
                got.append(event.cookie)

    threads = [threading.Thread(target=lambda: asyncio.run(collect())) for _ in range(2)]
    for thread in threads:
        thread.start()
    unmap(device, *range(300))
    for _ in range(1000):
        if len(got) == 300:
            break
        threading.Event().wait(0.005)
    device.close()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(got) == list(range(300))


# The descriptor


def test_epoll_tells_when_there_is_something(device: usermm.Ummunotify) -> None:
    with select.epoll() as epoll:
        everything = select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI | select.EPOLLRDHUP
        epoll.register(device.fileno(), everything)
        for cookie in range(3):
            assert epoll.poll(0) == []
            unmap(device, cookie)
            assert epoll.poll(0) == [(device.fileno(), select.EPOLLIN)]
            device.read(timeout=0)
        assert epoll.poll(0) == []


def test_edge_triggered_epoll_tells_once_for_each_change(device: usermm.Ummunotify) -> None:
    with select.epoll() as epoll:
        epoll.register(device.fileno(), select.EPOLLIN | select.EPOLLET)
        for cookie in range(3):
            unmap(device, cookie)
            assert len(epoll.poll(1)) == 1
            assert epoll.poll(0) == []


def test_select_and_poll(device: usermm.Ummunotify) -> None:
    poll = select.poll()
    poll.register(device)
    assert (select.select([device], [], [device], 0), poll.poll(0)) == (([], [], []), [])
    unmap(device, 1)
    assert select.select([device], [], [device], 0) == ([device], [], [])
    assert poll.poll(0) == [(device.fileno(), select.POLLIN)]


def test_trio_waits_for_the_descriptor(tmp_path: Path) -> None:
    """In a program of its own, since trio keeps its worker threads for a while."""
    pytest.importorskip("trio", reason="trio is not installed: pip install trio")
    text = """
        import mmap
        import trio
        import usermm

        async def main():
            with usermm.Ummunotify() as device:
                memory = mmap.mmap(-1, 4096)
                device.register(memory, 4)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.to_thread.run_sync, memory.close)
                    await trio.lowlevel.wait_readable(device.fileno())
                print(device.read(timeout=0)[0].cookie)

        trio.run(main)
    """
    assert run_quietly(text, tmp_path) == "4\n"
