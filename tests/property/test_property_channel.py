"""Channels against queues, the machine against mistakes that somebody could make in them, and much data at once."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from property.channel_machine import ChannelMachine
from support.processes import fork

import usermm
from usermm._core import MessageReceiver
from usermm.channels import arrays, rings

STRESS = os.environ.get("USERMM_STRESS") == "1"
TOTAL, BLOCK = (1 << 30 if STRESS else 1 << 26), 1 << 20
CHANNELS = 4
WAIT_S = 60

# Each example starts a hypervisor.
ChannelMachine.TestCase.settings = settings(max_examples=600 if STRESS else 60, stateful_step_count=50)
TestChannel = ChannelMachine.TestCase


def back_at_once(incoming: Any, message: Any, *, copy: bool) -> Any:
    array = AS_ARRAY(incoming, message, copy=copy)
    message.release()
    return array


KEPT: list[Any] = []
SEEN: list[Any] = []
FOUND = (AssertionError, pytest.fail.Exception, OSError, ValueError)


def never_back(self: Any) -> Any:
    message = NEXT(self)
    KEPT.append(message)
    return message


def twice(self: Any) -> Any:
    """Now and then a message is the one before, of the same channel, once more."""
    message = NEXT(self)
    if message is None:
        return None
    SEEN.append((self, message))
    before, same = SEEN[-2] if len(SEEN) > 1 else (None, None)
    return same if before is self and len(SEEN) % 3 == 0 else message


def without_wrapping(self: Any, data: memoryview) -> int:
    end = self._stream_bytes - self._bytes % self._stream_bytes
    count = min(self.room(), len(data))
    PUT(self, bytes(min(count, end)) if count > end else data[:count])
    return count


AS_ARRAY, PUT = arrays.as_array, rings.Outgoing.put
NEXT = MessageReceiver.next


MISTAKES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a view does not hold its slot": (arrays, "as_array", back_at_once),
    "slots never come back": (MessageReceiver, "next", never_back),
    "a message comes twice": (MessageReceiver, "next", twice),
    "the stream does not wrap": (rings.Outgoing, "put", without_wrapping),
    "nothing is ever lost": (rings.Outgoing, "unconfirmed", lambda _: (0, 0, 0)),
    "a view is a copy": (arrays, "as_array", lambda *two, **_: AS_ARRAY(*two, copy=True)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    owner, name, wrong = MISTAKES[mistake]
    with mock.patch.object(owner, name, wrong), pytest.raises(FOUND):
        run_state_machine_as_test(ChannelMachine, settings=settings.get_profile("usermm-planted"))


def pour(channel: usermm.Channel, seed: int, total: int) -> None:
    """Random bytes, no block as the one before: half by the stream, half as messages."""
    chance = random.Random(seed)
    for _ in range(total // BLOCK):
        channel.send(chance.randbytes(BLOCK // 2), timeout=WAIT_S)
        with channel.loan(BLOCK // 2, timeout=WAIT_S) as slot:
            slot.view[:] = chance.randbytes(BLOCK // 2)
            slot.send()
    channel.receive_message(timeout=WAIT_S)


def source(socket: str, total: int) -> int:
    """A child that pours into all channels in turn."""
    child = fork()
    if child == 0:
        try:
            with usermm.Domain(socket) as domain, ExitStack() as stack:
                channels = []
                for number in range(CHANNELS):
                    made = usermm.Channel.connect(domain, "sink", f"c{number}", WAIT_S, slot_bytes=BLOCK // 2)
                    channels.append(stack.enter_context(made))
                for number, channel in enumerate(channels):
                    pour(channel, number, total)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def digests(channel: usermm.Channel, seed: int, total: int) -> tuple[bytes, bytes]:
    """Of what comes and of what should."""
    chance, seen, wanted = random.Random(seed), hashlib.sha256(), hashlib.sha256()
    for _ in range(total // BLOCK):
        seen.update(channel.receive_exactly(BLOCK // 2, timeout=WAIT_S))
        seen.update(channel.receive_array(timeout=WAIT_S))
        wanted.update(chance.randbytes(BLOCK // 2))
        wanted.update(chance.randbytes(BLOCK // 2))
    return seen.digest(), wanted.digest()


def test_much_data_arrives_intact() -> None:
    """1 GiB with USERMM_STRESS=1, through several channels of one pair of domains."""
    with ExitStack() as stack:
        hypervisor = stack.enter_context(usermm.Hypervisor())
        domain = stack.enter_context(usermm.Domain(hypervisor.socket, name="sink"))
        child = source(hypervisor.socket, TOTAL // CHANNELS)
        listeners = [stack.enter_context(usermm.Channel.listen(domain, f"c{number}")) for number in range(CHANNELS)]
        channels = [stack.enter_context(listener.accept(WAIT_S)) for listener in listeners]
        for number, channel in enumerate(channels):
            seen, wanted = digests(channel, number, TOTAL // CHANNELS)
            assert seen == wanted
            channel.send_message(b"")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
