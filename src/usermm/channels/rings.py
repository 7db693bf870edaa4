"""The shared layout of a channel, and its two ends: docs/channels.md has it byte by byte.

Each side has control pages and data pages of its own; the other side only reads them. Whoever reads takes a value once
and looks at it before it is used: what the other side writes meanwhile changes nothing any more. Indices run freely
through 32 bits, as vchan's do.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from usermm._core import Memory
from usermm.errors import ArgumentError, ClosedError, GrantError, PeerGoneError
from usermm.grants.files import PAGE_BYTES

MOST_SLOTS = 64
MOST_DIMENSIONS = 8
CONTROL_PAGES = 3

WAITING = 0
"""u32: what the owner sleeps for, the bits below; 0: it is awake."""
MESSAGES_SENT = 64
"""u32: descriptors that the owner has filled in."""
MESSAGES_TAKEN = 128
"""u32: descriptors of the other side that the owner has read."""
BYTES_SENT = 192
"""u32: bytes that the owner has put into its stream."""
BYTES_TAKEN = 256
"""u32: bytes that the owner has taken from the other side's stream."""
RETURNED = 320
"""u32 for each slot of the other side: the tag of the message that the owner gave back last."""
DESCRIPTORS = PAGE_BYTES
DESCRIPTOR_BYTES = 128

WANTS_MESSAGE, WANTS_SLOT, WANTS_BYTES, WANTS_ROOM = 1, 2, 4, 8

DESCRIPTOR = struct.Struct("=IIQ16sI4x8Q")
"""u32 slot, u32 tag, u64 length in bytes, the type of an array's items as NumPy writes it (NUL bytes: no array), u32
number of dimensions, 0, u64 for each of eight dimensions."""

_WORD = 0xFFFFFFFF
_TAG = 0x80000000  # no tag is 0, which is what a fresh page says
_NO_SHAPE = (0,) * MOST_DIMENSIONS


class ProtocolError(GrantError):
    """The other side wrote what no honest side writes (EPROTO); the channel is of no use any more."""


def broken(what: str) -> ProtocolError:
    """The exception for a peer that wrote nonsense."""
    return ProtocolError(errno.EPROTO, f"channel: the peer broke the protocol: {what}: close the channel")


class Geometry(NamedTuple):
    """How large one direction is: its sender chooses. The stream's length is a power of two."""

    slots: int
    slot_pages: int
    stream_pages: int

    @property
    def pages(self) -> int:
        """Of data: the stream, then the slots."""
        return self.stream_pages + self.slots * self.slot_pages

    def check(self) -> None:
        """Raises ArgumentError."""
        if not 1 <= self.slots <= MOST_SLOTS or not 1 <= self.slot_pages < 1 << 20:
            raise ArgumentError(f"channel: from 1 to {MOST_SLOTS} slots of at least a page, not {self}")
        if not 1 <= self.stream_pages <= 1 << 15 or self.stream_pages & (self.stream_pages - 1):
            raise ArgumentError(f"channel: a stream has 2**n pages, at most 2**15, not {self.stream_pages}")


@dataclass(frozen=True, slots=True)
class Side:
    """What one side shares: 3 control pages, and data pages."""

    control: Memory
    data: Memory
    geometry: Geometry


class Descriptor(NamedTuple):
    """A message that was received: its numbers are checked, except the item type against the shape."""

    slot: int
    tag: int
    length: int
    item_type: bytes
    shape: tuple[int, ...]


class Outgoing:
    """The sender's end of one direction. What it knows of itself it keeps here: its pages are never read back."""

    def __init__(self, own: Side, theirs: Side, notify: Callable[[], None]) -> None:
        self._own, self._control, self._peer = own, own.control, theirs.control
        self._descriptors = memoryview(own.control)
        self.data = memoryview(own.data)
        self._notify = notify
        self._out: list[int | None] = [None] * own.geometry.slots
        self._loaned: set[int] = set()
        self._is_closed = False
        self.slot_bytes = own.geometry.slot_pages * PAGE_BYTES
        self._first = self._stream_bytes = own.geometry.stream_pages * PAGE_BYTES
        self._messages = self._bytes = 0

    def take_slot(self) -> int | None:
        """A slot that nobody uses, the caller's until publish() or cancel(); None: all are out."""
        for slot, tag in enumerate(self._out):
            if (tag is None or self._peer.load(RETURNED + 4 * slot) == tag) and slot not in self._loaned:
                self._out[slot] = None
                self._loaned.add(slot)
                return slot
        return None

    def slot(self, number: int, length: int) -> memoryview:
        """Its first `length` bytes, writable."""
        start = self._first + number * self.slot_bytes
        return self.data[start : start + length]

    def cancel(self, slot: int) -> None:
        """It is free again."""
        self._loaned.discard(slot)

    def publish(self, slot: int, length: int, item_type: bytes = b"", shape: tuple[int, ...] = ()) -> int:
        """The message is the receiver's; its number, from 1."""
        if self._is_closed:
            raise ClosedError(errno.EBADF, "send: the channel is closed: connect a new one")
        number = self._messages + 1
        tag = number & ~_TAG & _WORD | _TAG
        place = DESCRIPTORS + self._messages % MOST_SLOTS * DESCRIPTOR_BYTES
        sizes = shape + _NO_SHAPE[len(shape) :]
        DESCRIPTOR.pack_into(self._descriptors, place, slot, tag, length, item_type, len(shape), *sizes)
        self._out[slot] = tag
        self._loaned.discard(slot)
        self._messages = number
        self._control.store(MESSAGES_SENT, number & _WORD)
        self._wake(WANTS_MESSAGE)
        return number

    def room(self) -> int:
        """Bytes that fit into the stream now. Raises ProtocolError."""
        unread = (self._bytes - self._peer.load(BYTES_TAKEN)) & _WORD
        if unread > self._stream_bytes:
            raise broken(f"it has taken bytes that were not sent ({unread} are left of {self._stream_bytes})")
        return self._stream_bytes - unread

    def put(self, data: memoryview) -> int:
        """Copies as much as fits, and says how much."""
        count = min(self.room(), len(data))
        if count:
            at = self._bytes % self._stream_bytes
            first = min(count, self._stream_bytes - at)
            self.data[at : at + first] = data[:first]
            self.data[: count - first] = data[first:count]
            self._bytes += count
            self._control.store(BYTES_SENT, self._bytes & _WORD)
            self._wake(WANTS_BYTES)
        return count

    def unconfirmed(self) -> tuple[int, int, int]:
        """(messages not taken, messages taken but not given back, bytes not taken), as far as the peer said."""
        waiting = (self._messages - self._peer.load(MESSAGES_TAKEN)) & _WORD
        out = sum(
            tag is not None and self._peer.load(RETURNED + 4 * slot) != tag for slot, tag in enumerate(self._out)
        )
        waiting = min(waiting, out)
        unread = (self._bytes - self._peer.load(BYTES_TAKEN)) & _WORD
        return waiting, out - waiting, min(unread, self._stream_bytes)

    def close(self) -> None:
        """Lets the memory go; slots on loan keep theirs."""
        self._is_closed = True
        self._descriptors.release()
        self.data.release()

    def _wake(self, bit: int) -> None:
        self._control.fence()  # what was stored is seen before it is asked who sleeps
        if self._peer.load(WAITING) & bit:
            self._notify()


class Incoming:
    """The receiver's end of one direction."""

    def __init__(self, own: Side, theirs: Side, notify: Callable[[], None]) -> None:
        self._control, self._peer, self._data = own.control, theirs.control, theirs.data
        self._descriptors = memoryview(theirs.control)
        self._view = memoryview(theirs.data)
        self._notify = notify
        self._slots = theirs.geometry.slots
        self._slot_bytes = theirs.geometry.slot_pages * PAGE_BYTES
        self._first = self._stream_bytes = theirs.geometry.stream_pages * PAGE_BYTES
        self._messages = self._bytes = 0
        self._held: dict[int, int] = {}
        self._closed = False

    def is_there(self) -> bool:
        """Whether a message waits, or nonsense; for spinning."""
        return self._peer.load(MESSAGES_SENT) != self._messages & _WORD

    def next(self) -> Descriptor | None:
        """Takes the next message; the slot is held until give_back(). Raises ProtocolError."""
        waiting = (self._peer.load(MESSAGES_SENT) - self._messages) & _WORD
        if not waiting:
            return None
        if waiting > self._slots:
            raise broken(f"{waiting} messages in {self._slots} slots")
        place = DESCRIPTORS + self._messages % MOST_SLOTS * DESCRIPTOR_BYTES
        slot, tag, length, item_type, dimensions, *sizes = DESCRIPTOR.unpack_from(self._descriptors, place)
        if slot >= self._slots or length > self._slot_bytes or dimensions > MOST_DIMENSIONS:
            raise broken(f"a message in slot {slot} of {length} bytes with {dimensions} dimensions")
        if slot in self._held:
            raise broken(f"a message in slot {slot}, which is still held")
        self._held[slot] = tag
        self._messages += 1
        self._control.store(MESSAGES_TAKEN, self._messages & _WORD)
        return Descriptor(slot, tag, length, item_type.rstrip(b"\0"), tuple(sizes[:dimensions]))

    def view(self, message: Descriptor) -> memoryview:
        """Its bytes where they are, read-only."""
        start = self._first + message.slot * self._slot_bytes
        return self._view[start : start + message.length]

    def address(self, message: Descriptor) -> int:
        """Of its first byte."""
        return self._data.address + self._first + message.slot * self._slot_bytes

    def copy(self, message: Descriptor) -> bytes:
        """A copy of its bytes. Raises PeerGoneError: the peer took the memory back."""
        return self._read(self._first + message.slot * self._slot_bytes, message.length)

    def give_back(self, slot: int) -> None:
        """The sender may use it again. Takes no lock: a finaliser may call it wherever it comes."""
        tag = self._held.pop(slot, None)
        if tag is None or self._closed:
            return
        self._control.store(RETURNED + 4 * slot, tag)
        self._wake(WANTS_SLOT)

    def available(self) -> int:
        """Bytes that wait in the stream. Raises ProtocolError."""
        waiting = (self._peer.load(BYTES_SENT) - self._bytes) & _WORD
        if waiting > self._stream_bytes:
            raise broken(f"{waiting} bytes in a stream of {self._stream_bytes}")
        return waiting

    def take(self, most: int) -> bytes:
        """At most `most` bytes of the stream, b"" for none. Raises PeerGoneError: the peer took the memory back."""
        count = min(self.available(), most)
        if not count:
            return b""
        at = self._bytes % self._stream_bytes
        first = min(count, self._stream_bytes - at)
        data = self._read(at, first)
        if count > first:
            data += self._read(0, count - first)
        self._bytes += count
        self._control.store(BYTES_TAKEN, self._bytes & _WORD)
        self._wake(WANTS_ROOM)
        return data

    def close(self) -> None:
        """Lets the memory go; what is held keeps it."""
        self._closed = True
        self._descriptors.release()
        self._view.release()

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._data.read(offset, length)
        except OSError as error:
            text = "channel: the peer took its memory back: close the channel"
            raise PeerGoneError(errno.EPIPE, text) from error

    def _wake(self, bit: int) -> None:
        self._control.fence()
        if self._peer.load(WAITING) & bit:
            self._notify()
