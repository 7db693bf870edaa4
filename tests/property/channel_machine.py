"""Channels between two domains beside queues: what is sent arrives once, in order, intact."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from property.channel_link import SLOT_BYTES, STREAM_BYTES, Flow, Link, Message

import usermm
from usermm.channels.rings import MOST_SLOTS
from usermm.errors import ArgumentError, ClosedError, PeerGoneError

MOST_LINKS = 4
# Of each kind some, in both byte orders.
TYPES = ["?", "i1", "u1", "<i2", ">u2", "<i4", ">f4", "<u8", ">i8", "<f2", "<f8", "<c8", ">c16", "<M8[ns]", ">m8[us]"]

picks = st.integers(0, 2 * MOST_LINKS - 1)
"""One end of one channel."""
seeds = st.integers(0, 1 << 32)
lengths = st.sampled_from([0, 1, 7, SLOT_BYTES]) | st.integers(0, SLOT_BYTES)
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
types = st.sampled_from(TYPES)
which = st.integers(0, 100)
counts = st.integers(1, 2 * MOST_SLOTS)


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def array_of(seed: int, shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    """Any bits at all, except that a truth is 0 or 1."""
    dtype = np.dtype(kind)
    data = noise(seed, math.prod(shape) * dtype.itemsize)
    if dtype == np.bool_:
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


class ChannelMachine(RuleBasedStateMachine):
    """Both domains are of this process, and no call waits: what would have to is a TimeoutError, as foretold."""

    @initialize(slots=st.integers(1, 3))
    def begin(self, slots: int) -> None:
        self.hypervisor = usermm.Hypervisor()
        self.domains = usermm.Domain(self.hypervisor.socket), usermm.Domain(self.hypervisor.socket)
        self.slots = slots
        self.links: list[Link] = []
        self.kept: list[Message] = []
        self.open()

    @precondition(lambda self: len(self.links) < MOST_LINKS)
    @rule()
    def open(self) -> None:
        self.links.append(Link(self.domains, f"link-{len(self.links)}", self.slots))

    # Messages

    @rule(pick=picks, seed=seeds, length=lengths)
    def send_message(self, pick: int, seed: int, length: int) -> None:
        channel, _, _, _ = self.at(pick)
        data = noise(seed, length)
        self.send_it(pick, Message(data), lambda: channel.send_message(data, timeout=0))

    @rule(pick=picks, seed=seeds, shape=shapes, kind=types)
    def send_array(self, pick: int, seed: int, shape: tuple[int, ...], kind: str) -> None:
        channel, _, _, _ = self.at(pick)
        array = array_of(seed, shape, kind)
        message = Message(array.tobytes(), array.dtype.str, shape)
        self.send_it(pick, message, lambda: channel.send_array(array, timeout=0))

    @rule(pick=picks, seed=seeds, shape=shapes, kind=types)
    def borrow(self, pick: int, seed: int, shape: tuple[int, ...], kind: str) -> None:
        channel, _, flow, _ = self.at(pick)
        array = array_of(seed, shape, kind)
        if self.refused(pick, flow.free > 0, lambda: channel.loan(shape, kind, timeout=0)):
            return
        slot = channel.loan(shape, kind, timeout=0)
        assert (slot.array.shape, slot.array.dtype) == (shape, array.dtype)
        slot.array[...] = array
        flow.loans.append((slot, Message(array.tobytes(), array.dtype.str, shape)))

    @rule(pick=picks, number=which, send=st.booleans())
    def end_loan(self, pick: int, number: int, send: bool) -> None:
        """In any order; one of a channel that was closed can only be given back."""
        channel, _, flow, _ = self.at(pick)
        if not flow.loans:
            return
        slot, message = flow.loans.pop(number % len(flow.loans))
        if send:
            if not channel.closed:
                assert slot.send() == flow.enter(message)
            with pytest.raises(ClosedError):  # it was sent already, or never can be
                slot.send()
        slot.cancel()

    @rule(pick=picks)
    def borrow_too_much(self, pick: int) -> None:
        with pytest.raises(ArgumentError):
            self.at(pick)[0].loan(SLOT_BYTES + 1, timeout=0)

    @rule(pick=picks, how=st.sampled_from(["message", "view", "view", "copy"]))
    def receive(self, pick: int, how: str) -> None:
        channel, _, _, flow = self.at(pick)
        if not flow.queue or channel.closed:
            assert self.refused(pick, False, lambda: channel.receive_message(timeout=0))
            assert self.refused(pick, False, lambda: channel.receive_array(timeout=0))
            return
        message = flow.queue.popleft()
        if how == "message":
            assert channel.receive_message(timeout=0) == message.data
            return
        message.array = channel.receive_array(timeout=0, copy=how == "copy")
        message.check(writeable=how == "copy")
        if how == "view":
            flow.held.append(message)

    @rule(pick=picks, number=which, through_a_part=st.booleans())
    def let_go(self, pick: int, number: int, through_a_part: bool) -> None:
        """What is held is as it came, also when the channel was closed meanwhile, or connected anew."""
        held = self.at(pick)[3].held or self.kept
        if held:
            message = held.pop(number % len(held))
            message.check(writeable=False)
            message.let_go(through_a_part)

    @rule(pick=picks, seed=seeds, count=counts, how=st.sampled_from(["message", "view", "copy"]))
    def go_round(self, pick: int, seed: int, count: int, how: str) -> None:
        """So many that the descriptors come round, with whatever waits and is held meanwhile."""
        for number in range(count):
            self.send_message(pick, seed + number, number % 9)
            self.receive(pick ^ 1, how)
            if how == "view":
                self.let_go(pick ^ 1, number, number % 2 == 0)

    # The stream

    @rule(pick=picks, seed=seeds, parts=st.lists(st.integers(1, STREAM_BYTES), min_size=2, max_size=6))
    def flow_round(self, pick: int, seed: int, parts: list[int]) -> None:
        """The stream comes round."""
        for length in parts:
            self.send(pick, seed, length)
            self.receive_some(pick ^ 1, length)

    @rule(pick=picks, seed=seeds, length=st.integers(0, 2 * STREAM_BYTES))
    def send(self, pick: int, seed: int, length: int) -> None:
        channel, other, flow, _ = self.at(pick)
        data = noise(seed, length)
        if channel.closed or other.closed:
            assert self.refused(pick, False, lambda: channel.send(data, timeout=0))
            return
        room = flow.room
        flow.stream += data[:room]
        if length <= room:
            channel.send(data, timeout=0)
            return
        with pytest.raises(TimeoutError) as refusal:
            channel.send(data, timeout=0)
        assert refusal.value.sent == room  # type: ignore[attr-defined]

    @rule(pick=picks, most=st.integers(1, 2 * STREAM_BYTES))
    def receive_some(self, pick: int, most: int) -> None:
        channel, _, _, flow = self.at(pick)
        if not flow.stream or channel.closed:
            assert self.refused(pick, False, lambda: channel.receive(most, timeout=0))
            return
        assert channel.receive(most, timeout=0) == flow.stream[:most]
        del flow.stream[:most]

    # Ends

    @rule(pick=picks)
    def close(self, pick: int) -> None:
        link, end = self.where(pick)
        link.close(end)

    @rule(pick=picks)
    def meet_again(self, pick: int) -> None:
        """The acceptor is gone, and comes back. Nothing is sent again; what is held stays."""
        link, _ = self.where(pick)
        link.close(1)
        mine, theirs = link.flows
        expected = None if link.ends[0].closed else mine.lost
        for slot, _ in mine.loans + theirs.loans:
            slot.cancel()
        self.kept += mine.held + theirs.held
        assert link.meet() == expected

    @invariant()
    def what_would_be_lost_is_known(self) -> None:
        for link in getattr(self, "links", []):
            for channel, flow in zip(link.ends, link.flows, strict=True):
                if not channel.closed:
                    assert channel.lost() == flow.lost

    def teardown(self) -> None:
        if not hasattr(self, "links"):
            return
        with suppress(AssertionError):  # one that failed before is the one to tell of
            for link in self.links:
                for channel in link.ends:
                    channel.close()
                for flow in link.flows:
                    for slot, _ in flow.loans:
                        slot.cancel()
                    self.kept += flow.held
        for domain in self.domains:
            domain.close()
        self.hypervisor.close()
        for message in self.kept:
            message.check(writeable=False)

    def where(self, pick: int) -> tuple[Link, int]:
        return self.links[pick // 2 % len(self.links)], pick % 2

    def at(self, pick: int) -> tuple[usermm.Channel, usermm.Channel, Flow, Flow]:
        """The end, the other one, and what each sends."""
        link, end = self.where(pick)
        return link.ends[end], link.ends[1 - end], link.flows[end], link.flows[1 - end]

    def refused(self, pick: int, possible: bool, call: Callable[[], object]) -> bool:
        """Whether the call cannot be done, having seen that it says so in the right way."""
        channel, other, _, _ = self.at(pick)
        if channel.closed:
            error: type[BaseException] = ClosedError
        elif other.closed:
            error = PeerGoneError
        elif not possible:
            error = TimeoutError
        else:
            return False
        with pytest.raises(error):
            call()
        return True

    def send_it(self, pick: int, message: Message, call: Callable[[], int]) -> None:
        flow = self.at(pick)[2]
        if not self.refused(pick, flow.free > 0, call):
            assert call() == flow.enter(message)
