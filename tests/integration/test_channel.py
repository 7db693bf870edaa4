"""Channels between two processes: data arrives intact, a slow peer slows, a dead one is seen at once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.processes import fork

import usermm
from usermm.channels.channel import Channel
from usermm.errors import ClosedError, PeerGoneError

WAIT_S = 20
PAGE = 4096


@pytest.fixture
def hypervisor() -> Iterator[usermm.Hypervisor]:
    with usermm.Hypervisor() as made:
        yield made


class Peer:
    """A child with a domain and a channel to the listener."""

    def __init__(self, socket: str, work: Callable[[Channel], None], **sizes: int) -> None:
        self.pid = fork()
        if self.pid == 0:
            try:
                with (
                    usermm.Domain(socket, name="child") as domain,
                    Channel.connect(domain, "parent", "test", WAIT_S, **sizes) as channel,
                ):
                    work(channel)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def end(self) -> None:
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0


def meet(
    hypervisor: usermm.Hypervisor, work: Callable[[Channel], None], **sizes: int
) -> tuple[usermm.Domain, Channel, Peer]:
    peer = Peer(hypervisor.socket, work, **sizes)
    domain = usermm.Domain(hypervisor.socket, name="parent")
    with Channel.listen(domain, "test", **sizes) as listener:
        return domain, listener.accept(WAIT_S), peer


def asleep(_: Channel) -> None:
    time.sleep(WAIT_S)


def test_random_data_arrives_intact(hypervisor: usermm.Hypervisor) -> None:
    total, block = 1 << 26, os.urandom(1 << 20)

    def produce(channel: Channel) -> None:
        for _ in range(total >> 20):
            channel.send(block, timeout=WAIT_S)
        channel.receive(1, timeout=WAIT_S)

    domain, channel, peer = meet(hypervisor, produce)
    with domain, channel:
        seen, wanted, left = hashlib.sha256(), hashlib.sha256(), total
        while left:
            data = channel.receive(min(left, 1 << 20), timeout=WAIT_S)
            seen.update(data)
            left -= len(data)
        channel.send(b"!")
        for _ in range(total >> 20):
            wanted.update(block)
        assert seen.digest() == wanted.digest()
        peer.end()


def test_arrays_there_and_back(hypervisor: usermm.Hypervisor) -> None:
    def add_one(channel: Channel) -> None:
        for _ in range(300):
            channel.send_array(channel.receive_array(timeout=WAIT_S) + 1, timeout=WAIT_S)
        channel.receive_message(timeout=WAIT_S)

    domain, channel, peer = meet(hypervisor, add_one)
    with domain, channel:
        for number in range(300):
            sent = np.arange(number % 50 * 3, dtype=(np.float64, np.int16)[number % 2]).reshape(-1, 3)
            channel.send_array(sent)
            got = channel.receive_array(timeout=WAIT_S)
            assert not got.flags.writeable
            assert got.dtype == sent.dtype
            assert np.array_equal(got, sent + 1)
            del got
        channel.send_message(b"")
        peer.end()


def test_a_slow_receiver_slows_and_views_hold_their_slots(hypervisor: usermm.Hypervisor) -> None:
    def produce(channel: Channel) -> None:
        for number in range(5):
            channel.send_array(np.full(4, number), timeout=WAIT_S)
        with pytest.raises(PeerGoneError):
            channel.receive(1, timeout=WAIT_S)

    domain, channel, peer = meet(hypervisor, produce, slots=2)
    with domain, channel:
        first, second = channel.receive_array(timeout=WAIT_S), channel.receive_array(timeout=WAIT_S)
        with pytest.raises(TimeoutError):
            channel.receive_array(timeout=0.05)
        part = first[1:]
        del first
        with pytest.raises(TimeoutError):
            channel.receive_array(timeout=0.05)
        del part
        assert channel.receive_array(timeout=WAIT_S)[0] == 2
        assert second[0] == 1
        assert [int(channel.receive_array(timeout=WAIT_S)[0]) for _ in range(2)] == [3, 4]
        channel.close()
        assert second[0] == 1, "views outlive the channel"
        peer.end()


def fill(channel: Channel) -> None:
    while True:
        channel.send(bytes(PAGE), timeout=WAIT_S)


def take_all(channel: Channel) -> None:
    while True:
        channel.loan(1, timeout=WAIT_S).send()


CALLS: list[Callable[[Channel], object]] = [
    lambda channel: channel.receive(1, timeout=WAIT_S),
    lambda channel: channel.receive_exactly(9, timeout=WAIT_S),
    lambda channel: channel.receive_message(timeout=WAIT_S),
    lambda channel: channel.receive_array(timeout=WAIT_S),
    fill,
    take_all,
    lambda channel: asyncio.run(channel.receive_async()),
    lambda channel: asyncio.run(channel.receive_array_async()),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_killed_peer_ends_every_wait(hypervisor: usermm.Hypervisor, call: Callable[[Channel], object]) -> None:
    domain, channel, peer = meet(hypervisor, asleep)
    with domain, channel:
        helper = fork()
        if helper == 0:
            time.sleep(0.1)
            os.kill(peer.pid, signal.SIGKILL)
            os._exit(0)
        with pytest.raises(PeerGoneError):
            call(channel)
        assert channel.peer_is_gone
        with pytest.raises(PeerGoneError):
            channel.send(b"x")
        os.waitpid(helper, 0)
        os.waitpid(peer.pid, 0)


def test_what_was_sent_before_the_end_is_received(hypervisor: usermm.Hypervisor) -> None:
    def last_words(channel: Channel) -> None:
        channel.send(b"last")
        channel.send_message(b"m")

    domain, channel, peer = meet(hypervisor, last_words)
    with domain, channel:
        peer.end()
        assert channel.receive(10, timeout=WAIT_S) == b"last"
        assert channel.receive_message(timeout=WAIT_S) == b"m"
        with pytest.raises(PeerGoneError):
            channel.receive(1, timeout=WAIT_S)


def test_reconnection_says_what_was_lost(hypervisor: usermm.Hypervisor) -> None:
    with (
        usermm.Domain(hypervisor.socket, name="here") as domain,
        usermm.Domain(hypervisor.socket, name="there") as there,
        Channel.listen(there, "again") as listener,
    ):
        accepted: list[Channel] = []
        acceptor = threading.Thread(target=lambda: accepted.extend(listener.accept(WAIT_S) for _ in range(2)))
        acceptor.start()
        channel = Channel.connect(domain, "there", "again", WAIT_S)
        for _ in range(3):
            channel.send_message(b"work")
        channel.send(b"12345")
        while not accepted:
            time.sleep(0.01)
        held = accepted[0].receive_array(timeout=WAIT_S)
        accepted[0].close()
        lost = channel.reconnect(WAIT_S)
        assert (lost.not_taken, lost.not_returned, lost.stream_bytes) == (2, 1, 5)
        acceptor.join()
        channel.send(b"new")
        assert accepted[1].receive(9, timeout=WAIT_S) == b"new"
        with pytest.raises(TimeoutError):
            accepted[1].receive_message(timeout=0)
        assert bytes(held) == b"work"
        del held
        channel.close()
        accepted[1].close()
        with pytest.raises(ClosedError):
            channel.receive(1)
