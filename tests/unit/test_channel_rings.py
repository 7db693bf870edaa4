"""The rings against a peer that writes whatever it likes: an error, never a crash or a byte from outside a slot."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
from collections.abc import Iterator

import pytest
from support.growth import check_no_growth
from support.processes import beside, in_child

from usermm._core import Memory, MessageSlot
from usermm.channels import arrays, rings
from usermm.channels.rings import Geometry, Incoming, Outgoing, Side
from usermm.errors import ArgumentError, ClosedError, ForkedError, PeerGoneError, ProtocolError

SIZES = Geometry(4, 1, 1)


class Pages:
    """A memfd, as its owner and as the other side maps it."""

    def __init__(self, pages: int) -> None:
        self.descriptor = os.memfd_create("ring")
        os.ftruncate(self.descriptor, pages * 4096)
        runs = [(self.descriptor, 0, pages * 4096)]
        self.own = Memory(runs, writable=True, shared=True, inherit=False)
        self.seen = Memory(runs, writable=False, shared=True, inherit=False)


class Two:
    """Two sides: `out` sends to `into`."""

    def __init__(self) -> None:
        self.pages = [Pages(rings.CONTROL_PAGES), Pages(SIZES.pages), Pages(rings.CONTROL_PAGES), Pages(SIZES.pages)]
        a, a_data, b, b_data = self.pages
        self.events = 0
        self.sender_control, self.receiver_control = a.own, b.own
        self.out = Outgoing(Side(a.own, a_data.own, SIZES), Side(b.seen, b_data.seen, SIZES), self.notify)
        self.into = Incoming(Side(b.own, b_data.own, SIZES), Side(a.seen, a_data.seen, SIZES), self.notify)

    def notify(self) -> None:
        self.events += 1

    def loan(self, length: int = 1) -> MessageSlot | None:
        return MessageSlot.take(self.out.messages, length, b"", ())

    def send(self, data: bytes) -> None:
        loan = self.loan(len(data))
        assert loan is not None
        loan.view[:] = data
        loan.send()

    def close(self) -> None:
        self.out.close()
        self.into.close()
        for pages in self.pages:
            pages.own.close()
            pages.seen.close()
            os.close(pages.descriptor)


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    yield made
    made.close()


def test_messages_come_in_order_and_slots_are_not_used_while_held(two: Two) -> None:
    for number in range(4):
        two.send(bytes([number]))
    assert two.loan() is None
    held = [two.into.messages.next() for _ in range(4)]
    assert [two.into.copy(message) for message in held if message] == [b"\0", b"\1", b"\2", b"\3"]
    assert two.loan() is None
    held[2] = None
    assert two.loan()


def test_a_slot_on_loan_is_lent_to_nobody_else(two: Two) -> None:
    loans = [two.loan() for _ in range(5)]
    assert loans[4] is None
    loan = loans[2]
    assert loan is not None
    loan.cancel()
    assert two.loan()
    with pytest.raises(ClosedError):
        loan.send()


@pytest.mark.parametrize("wrong", [(4097, b"", ()), (-1, b"", ()), (1, b"x" * 17, ()), (1, b"", (1,) * 9)])
def test_a_loan_that_does_not_fit(two: Two, wrong: tuple[int, bytes, tuple[int, ...]]) -> None:
    with pytest.raises(ArgumentError):
        MessageSlot.take(two.out.messages, *wrong)
    assert [bool(two.loan()) for _ in range(5)] == [True] * 5  # each goes back at once: none was lost
    assert MessageSlot.take(two.out.messages, 4096, b"x" * 16, (1,) * 8)


def test_an_event_only_for_who_sleeps(two: Two) -> None:
    two.send(b"x")
    assert two.events == 0
    two.receiver_control.store(rings.WAITING, rings.WANTS_MESSAGE)
    two.send(b"y")
    assert two.events == 1


def test_the_stream_wraps(two: Two) -> None:
    sent = os.urandom(3 * 4096 + 77)
    got, rest = b"", memoryview(sent)
    while len(got) < len(sent):
        rest = rest[two.out.put(rest[:3001]) :]
        got += two.into.take(1777)
    assert got == sent


@pytest.mark.parametrize(
    "fields",
    [(4, 1, 1, b"", 0), (1 << 31, 1, 1, b"", 0), (0, 1, 4097, b"", 0), (0, 1, 1 << 63, b"", 0), (0, 1, 8, b"", 9)],
)
def test_a_descriptor_that_lies(two: Two, fields: tuple[int, int, int, bytes, int]) -> None:
    rings.DESCRIPTOR.pack_into(two.sender_control, rings.DESCRIPTORS, *fields, *[0] * 8)
    two.sender_control.store(rings.MESSAGES_SENT, 1)
    with pytest.raises(ProtocolError):
        two.into.messages.next()


def test_a_slot_that_is_held_comes_again(two: Two) -> None:
    two.send(b"x")
    held = two.into.messages.next()
    assert held
    rings.DESCRIPTOR.pack_into(two.sender_control, rings.DESCRIPTORS + 128, 0, 9, 1, b"", 0, *[0] * 8)
    two.sender_control.store(rings.MESSAGES_SENT, 2)
    with pytest.raises(ProtocolError, match="still held"):
        two.into.messages.next()


@pytest.mark.parametrize("value", [5, 0x7FFFFFFF, 0xFFFFFFFF])
def test_counts_that_lie(two: Two, value: int) -> None:
    two.sender_control.store(rings.MESSAGES_SENT, value)
    two.sender_control.store(rings.BYTES_SENT, value + 4096 & 0xFFFFFFFF)
    two.receiver_control.store(rings.BYTES_TAKEN, value)
    with pytest.raises(ProtocolError):
        two.into.messages.next()
    if value != 0xFFFFFFFF:
        with pytest.raises(ProtocolError):
            two.into.take(10)
        with pytest.raises(ProtocolError):
            two.out.room()


@pytest.mark.parametrize("seed", range(20))
def test_any_control_pages_at_all(two: Two, seed: int) -> None:
    """Each round other bytes everywhere, half of them plausible: what comes is an error, or inside the slot."""
    chance = random.Random(seed)
    for _ in range(200):
        noise = chance.randbytes(rings.CONTROL_PAGES * 4096)
        two.sender_control.write(0, noise)
        two.receiver_control.write(0, noise)
        if chance.random() < 0.5:
            two.sender_control.store(rings.MESSAGES_SENT, chance.randrange(4))
        for place in range(rings.DESCRIPTORS, rings.CONTROL_PAGES * 4096, 128):
            if chance.random() < 0.5:
                struct.pack_into("=IIQ", two.sender_control, place, chance.randrange(6), 1, chance.randrange(5000))
        try:
            message = two.into.messages.next()
            if message is not None:
                assert len(two.into.copy(message)) == len(message) <= 4096
                arrays.as_array(two.into, message, copy=True)
        except ProtocolError:
            pass
        for call in (lambda: two.into.take(100), two.out.room, two.loan, two.out.unconfirmed):
            with contextlib.suppress(ProtocolError):
                call()


NO_NUMBERS = [b"|O8", b"|O", b"<V8", b"|S4", b"<f3", b"i4", b"<f8,<f8", b"\xff\xfe", b"<U9", b"<M8[0s]", b"<m8[00D]"]


@pytest.mark.parametrize("code", NO_NUMBERS)
def test_items_that_are_no_numbers(two: Two, code: bytes) -> None:
    rings.DESCRIPTOR.pack_into(two.sender_control, rings.DESCRIPTORS, 0, 1, 8, code, 1, 1, *[0] * 7)
    two.sender_control.store(rings.MESSAGES_SENT, 1)
    message = two.into.messages.next()
    assert message
    with pytest.raises(ProtocolError):
        arrays.as_array(two.into, message, copy=False)


@pytest.mark.parametrize("shape", [(2,), (0,), (1 << 63, 2), (1 << 32, 1 << 32)])
def test_a_shape_that_is_not_the_length(two: Two, shape: tuple[int, ...]) -> None:
    two.send(b"12345678")
    sizes = [*shape, *[0] * (8 - len(shape))]
    rings.DESCRIPTOR.pack_into(two.sender_control, rings.DESCRIPTORS, 0, 1, 8, b"<f8", len(shape), *sizes)
    message = two.into.messages.next()
    assert message
    with pytest.raises(ProtocolError):
        arrays.as_array(two.into, message, copy=False)


@pytest.mark.parametrize("shape", [((1 << 64) - 1, 0), (1 << 62, 0, 4)])
def test_a_shape_that_no_array_has(two: Two, shape: tuple[int, ...]) -> None:
    """Its product is the length, which is 0, and still there is no such array."""
    two.send(b"")
    sizes = [*shape, *[0] * (8 - len(shape))]
    rings.DESCRIPTOR.pack_into(two.sender_control, rings.DESCRIPTORS, 0, 1, 0, b"<f8", len(shape), *sizes)
    message = two.into.messages.next()
    assert message is not None
    with pytest.raises(ProtocolError):
        arrays.as_array(two.into, message, copy=False)


class Changing:
    """Control pages of a peer that writes another number as soon as one was read."""

    def __init__(self, pages: Memory, of_owner: Memory, lie: int) -> None:
        self._pages, self._of_owner, self._lie = pages, of_owner, lie

    def load(self, offset: int) -> int:
        value = self._pages.load(offset)
        self._of_owner.store(offset, self._lie)
        return value


def test_counts_are_read_once(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.send(b"x")
    two.out.put(memoryview(b"abc"))
    monkeypatch.setattr(two.into, "_peer", Changing(two.pages[0].seen, two.sender_control, 3000))
    message = two.into.messages.next()
    assert message and two.into.copy(message) == b"x"
    assert two.into.take(100) == b"abc"
    monkeypatch.setattr(two.out, "_peer", Changing(two.pages[2].seen, two.receiver_control, 3000))
    assert two.out.put(memoryview(bytes(8192))) == 4096


def test_a_descriptor_is_read_once(two: Two) -> None:
    """A process that goes on writing, now an honest one, now a lie: what comes is one that was looked at."""
    honest = rings.DESCRIPTOR.pack(0, 7, 1, b"", 0, *[0] * 8).ljust(rings.DESCRIPTOR_BYTES, b"\0")
    lie = rings.DESCRIPTOR.pack(77, 7, 1 << 40, b"", 99, *[0] * 8).ljust(rings.DESCRIPTOR_BYTES, b"\0")
    (honest_page, lying_page), descriptor = (each * rings.MOST_SLOTS for each in (honest, lie)), two.pages[0].descriptor

    def write_on() -> None:
        with mmap.mmap(descriptor, rings.CONTROL_PAGES * 4096) as pages:
            while True:
                pages[rings.DESCRIPTORS :] = honest_page
                pages[rings.DESCRIPTORS :] = lying_page

    came = refused = 0
    with beside(write_on):
        while came < 2000 or refused < 2000:
            two.sender_control.store(rings.MESSAGES_SENT, (came + 1) & 0xFFFFFFFF)
            try:
                message = two.into.messages.next()
            except ProtocolError:
                refused += 1
                continue
            assert message is not None
            came += 1
            assert message.offset in range(4096, 5 * 4096, 4096)
            assert len(message) <= 4096
            assert len(message.shape) <= rings.MOST_DIMENSIONS
            message.release()


def test_data_that_was_taken_back_is_an_error_where_it_is_copied(two: Two) -> None:
    two.send(b"x")
    two.out.put(memoryview(b"abc"))
    os.ftruncate(two.pages[1].descriptor, 0)
    message = two.into.messages.next()
    assert message
    with pytest.raises(PeerGoneError):
        two.into.copy(message)
    with pytest.raises(PeerGoneError):
        two.into.take(3)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (65, 1, 1), (1, 0, 1), (1, 1, 3), (1, 1, 0)])
def test_sizes_that_are_none(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ArgumentError):
        Geometry(*sizes).check()


def test_messages_leak_nothing(two: Two) -> None:
    def calls() -> None:
        two.send(b"12345678")
        message = two.into.messages.next()
        assert message is not None
        arrays.as_array(two.into, message, copy=False)
        del message
        two.out.messages.unconfirmed()

    check_no_growth(calls, times=300)


def test_refusals_leak_nothing(two: Two) -> None:
    two.sender_control.store(rings.MESSAGES_SENT, 99)

    def calls() -> None:
        with pytest.raises(ProtocolError):
            two.into.messages.next()
        with pytest.raises(ArgumentError):
            MessageSlot.take(two.out.messages, 1 << 40, b"", ())
        with pytest.raises(TypeError):
            MessageSlot.take(two.out.messages, 1, b"", ("x",))  # type: ignore[arg-type]
        loan = two.loan()
        assert loan is not None
        with pytest.raises(ArgumentError):
            loan.fill(b"12")
        with pytest.raises(TypeError):
            loan.fill(1)
        loan.cancel()

    check_no_growth(calls, times=300)


def test_a_forked_child_has_neither_end(two: Two) -> None:
    """The peer's pages are not there: an error, where a look at them would be the end of the child."""
    two.send(b"x")
    message = two.into.messages.next()

    def look() -> None:
        for call in (two.into.messages.next, two.loan, two.out.messages.unconfirmed):
            with pytest.raises(ForkedError):
                call()
        with pytest.raises(BufferError):
            memoryview(message)  # type: ignore[arg-type]

    in_child(look)
    assert message is not None and bytes(message) == b"x"
