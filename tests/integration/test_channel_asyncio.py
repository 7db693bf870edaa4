"""A channel's calls under asyncio: they do what their twins do, lose nothing when cancelled, end when a peer does."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from support.channels import WAIT_S, joined
from support.processes import fork

import usermm
from usermm.errors import PeerGoneError

SIDES = ("connector", "acceptor")


@pytest.fixture
def ends() -> Iterator[tuple[usermm.Channel, usermm.Channel]]:
    """Both are of this process, and have one slot."""
    with (
        usermm.Hypervisor() as hypervisor,
        usermm.Domain(hypervisor.socket) as one,
        usermm.Domain(hypervisor.socket) as other,
    ):
        here, there = joined(one, other, slots=1)
        with here, there:
            yield here, there


def test_messages_there_and_back(ends: tuple[usermm.Channel, usermm.Channel]) -> None:
    """With one slot each waits for the other all the time."""
    here, there = ends

    async def send() -> None:
        for number in range(300):
            assert await here.send_message_async(b"%d" % number) == number + 1
            assert (await here.receive_array_async(copy=True)).sum() == number

    async def answer() -> None:
        for number in range(300):
            assert await there.receive_message_async() == b"%d" % number
            await there.send_array_async(np.array([number, 0]))

    async def both() -> None:
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(send(), answer())

    asyncio.run(both())


def test_who_is_cancelled_takes_nothing(ends: tuple[usermm.Channel, usermm.Channel]) -> None:
    here, there = ends

    async def cancelled(call: Coroutine[Any, Any, Any], meanwhile: Callable[[], object]) -> None:
        task = asyncio.create_task(call)
        await asyncio.sleep(0)
        meanwhile()  # the event may be on its way
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def all_of_them() -> None:
        async with asyncio.timeout(WAIT_S):
            for number in range(50):
                data = b"%d" % number
                await cancelled(there.receive_message_async(), lambda data=data: here.send_message(data))
                await cancelled(here.send_message_async(b"never"), lambda: None)  # the slot is out
                assert await there.receive_message_async() == data
                await cancelled(there.receive_async(), lambda data=data: here.send(data))
                assert await there.receive_async() == data
        with pytest.raises(TimeoutError):
            there.receive_message(timeout=0)

    asyncio.run(all_of_them())


async def sends_for_ever(channel: usermm.Channel) -> None:
    while True:
        await channel.send_async(bytes(4096))


async def messages_for_ever(channel: usermm.Channel) -> None:
    while True:
        await channel.send_message_async(b"x")


async def arrays_for_ever(channel: usermm.Channel) -> None:
    while True:
        await channel.send_array_async(np.arange(3))


CALLS: dict[str, Callable[[usermm.Channel], Coroutine[Any, Any, Any]]] = {
    "send": sends_for_ever,
    "send_message": messages_for_ever,
    "send_array": arrays_for_ever,
    "receive": lambda channel: channel.receive_async(),
    "receive_message": lambda channel: channel.receive_message_async(),
    "receive_array": lambda channel: channel.receive_array_async(),
}


def side(socket: str, which: str, ready: int, call: Callable[[usermm.Channel], Coroutine[Any, Any, Any]]) -> int:
    """A child that is one side, and ends with 0 when its call says that the peer is gone."""
    child = fork()
    if child:
        return child
    try:

        async def work(channel: usermm.Channel) -> None:
            os.write(ready, b"!")
            async with asyncio.timeout(WAIT_S):
                await call(channel)

        with usermm.Domain(socket, name=which) as domain:
            if which == "acceptor":
                with usermm.Channel.listen(domain, "test") as listener:
                    channel = listener.accept(WAIT_S)
            else:
                channel = usermm.Channel.connect(domain, "acceptor", "test", WAIT_S)
            with channel, pytest.raises(PeerGoneError):
                asyncio.run(work(channel))
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("victim", SIDES)
def test_a_killed_side_ends_the_others_call(victim: str, call: str) -> None:
    """Both are in the call; whichever is killed, the other one hears of it."""
    ready, says = os.pipe()
    with usermm.Hypervisor() as hypervisor:
        children = {which: side(hypervisor.socket, which, says, CALLS[call]) for which in SIDES}
        for _ in SIDES:
            assert select.select([ready], [], [], WAIT_S)[0]
            os.read(ready, 1)
        os.kill(children[victim], signal.SIGKILL)
        statuses = {which: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for which, child in children.items()}
    os.close(ready)
    os.close(says)
    assert statuses == {which: -signal.SIGKILL if which == victim else 0 for which in SIDES}
