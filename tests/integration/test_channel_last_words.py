"""What a peer says just before it goes is heard, wherever its end falls between two looks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from support.channels import WAIT_S, joined

import usermm
from usermm.channels.rings import WANTS_BYTES, WANTS_MESSAGE
from usermm.errors import ClosedError, PeerGoneError


@pytest.fixture
def ends() -> Iterator[tuple[usermm.Channel, usermm.Channel]]:
    with (
        usermm.Hypervisor() as hypervisor,
        usermm.Domain(hypervisor.socket) as one,
        usermm.Domain(hypervisor.socket) as other,
    ):
        here, there = joined(one, other)
        with here, there:
            yield here, there


def speaking(here: usermm.Channel, there: usermm.Channel, when: int) -> Callable[[], bytes | None]:
    """Looks for a message; just after it has looked for the `when`th time the peer sends one, and goes."""
    looks = 0

    def attempt() -> bytes | None:
        nonlocal looks
        looks += 1
        message = here._in.messages.next()
        if looks == when:
            there.send_message(b"last")
            there.close()
        return None if message is None else here._in.copy(message)

    return attempt


@pytest.mark.parametrize("when", [1, 2])
def test_last_words(ends: tuple[usermm.Channel, usermm.Channel], when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = ends
    monkeypatch.setattr(here._sleeper, "_skip", 100)
    attempt = speaking(here, there, when)
    assert here._sleeper.until(attempt, WANTS_MESSAGE, WAIT_S, "receive_message") == b"last"
    with pytest.raises(PeerGoneError):
        here.receive_message(timeout=WAIT_S)


def test_last_words_under_asyncio(ends: tuple[usermm.Channel, usermm.Channel]) -> None:
    here, there = ends
    waits = here._sleeper.until_async(speaking(here, there, 1), WANTS_MESSAGE, "receive_message")
    assert asyncio.run(asyncio.wait_for(waits, WAIT_S)) == b"last"
    with pytest.raises(PeerGoneError):
        here.receive_message(timeout=WAIT_S)


def test_a_loan_outlives_its_channel_and_cannot_be_sent(ends: tuple[usermm.Channel, usermm.Channel]) -> None:
    here, _ = ends
    slot, other = here.loan(4), here.loan(4)
    here.close()
    slot.view[:] = b"late"
    with pytest.raises(ClosedError):
        slot.send()
    other.cancel()


def closing(here: usermm.Channel) -> Callable[[], bytes | None]:
    """Looks at the stream just when another thread has closed the channel."""

    def attempt() -> bytes | None:
        here.close()
        return here._in.take(1) or None

    return attempt


def test_a_channel_that_is_closed_while_somebody_looks(ends: tuple[usermm.Channel, usermm.Channel]) -> None:
    """It answered that memory is unmapped."""
    here, there = ends
    with pytest.raises(ClosedError):
        here._sleeper.until(closing(here), WANTS_BYTES, WAIT_S, "receive")
    with pytest.raises(ClosedError):
        asyncio.run(there._sleeper.until_async(closing(there), WANTS_BYTES, "receive"))
