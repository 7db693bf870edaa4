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

from usermm._core import Memory, Message, MessageReceiver, MessageSender
from usermm.errors import ArgumentError, PeerGoneError, protocol_broken
from usermm.grants.files import PAGE_BYTES
from usermm.uapi.xen_gntdev import MOST_GRANTS

MOST_SLOTS = 64
MOST_PAGES = MOST_GRANTS
"""Of one direction: what gntdev maps at once."""
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
            text = f"{self.slots} slots of {self.slot_pages * PAGE_BYTES} bytes: 1 to {MOST_SLOTS} of a page at least"
            raise ArgumentError(f"channel: {text}")
        if self.pages > MOST_PAGES:
            text = f"channel: {self.slots} slots and the stream have {self.pages} pages: make them smaller, or fewer: "
            raise ArgumentError(f"{text}{MOST_PAGES} at most")
        if not 1 <= self.stream_pages <= 1 << 15 or self.stream_pages & (self.stream_pages - 1):
            raise ArgumentError(f"channel: a stream has 2**n pages, at most 2**15, not {self.stream_pages}")


@dataclass(frozen=True, slots=True)
class Side:
    """What one side shares: 3 control pages, and data pages."""

    control: Memory
    data: Memory
    geometry: Geometry


class Outgoing:
    """The sender's end of one direction. What it knows of itself it keeps here: its pages are never read back."""

    def __init__(self, own: Side, theirs: Side, notify: Callable[[], None]) -> None:
        self._control, self._peer = own.control, theirs.control
        self._stream_bytes = own.geometry.stream_pages * PAGE_BYTES
        self.slot_bytes = own.geometry.slot_pages * PAGE_BYTES
        self.messages = MessageSender(
            own.control, theirs.control, own.data, notify, own.geometry.slots, self._stream_bytes, self.slot_bytes
        )
        self._stream = memoryview(own.data)[: self._stream_bytes]
        self._notify = notify
        self._bytes = 0

    def room(self) -> int:
        """Bytes that fit into the stream now. Raises ProtocolError."""
        unread = (self._bytes - self._peer.load(BYTES_TAKEN)) & _WORD
        if unread > self._stream_bytes:
            raise protocol_broken(f"it has taken bytes that were not sent ({unread} are left of {self._stream_bytes})")
        return self._stream_bytes - unread

    def put(self, data: memoryview) -> int:
        """Copies as much as fits, and says how much."""
        count = min(self.room(), len(data))
        if count:
            at = self._bytes % self._stream_bytes
            first = min(count, self._stream_bytes - at)
            self._stream[at : at + first] = data[:first]
            self._stream[: count - first] = data[first:count]
            self._bytes += count
            self._control.store(BYTES_SENT, self._bytes & _WORD)
            self._wake(WANTS_BYTES)
        return count

    def unconfirmed(self) -> tuple[int, int, int]:
        """(messages not taken, messages taken but not given back, bytes not taken), as far as the peer said."""
        unread = (self._bytes - self._peer.load(BYTES_TAKEN)) & _WORD
        return *self.messages.unconfirmed(), min(unread, self._stream_bytes)

    def close(self) -> None:
        """Lets the memory go; slots on loan keep theirs."""
        self.messages.close()
        self._stream.release()

    def _wake(self, bit: int) -> None:
        self._control.fence()  # what was stored is seen before it is asked who sleeps
        if self._peer.load(WAITING) & bit:
            self._notify()


class Incoming:
    """The receiver's end of one direction."""

    def __init__(self, own: Side, theirs: Side, notify: Callable[[], None]) -> None:
        self._control, self._peer, self._data = own.control, theirs.control, theirs.data
        self._notify = notify
        slots, slot_pages, stream_pages = theirs.geometry
        self._stream_bytes = stream_pages * PAGE_BYTES
        self.messages = MessageReceiver(
            own.control, theirs.control, theirs.data, notify, slots, self._stream_bytes, slot_pages * PAGE_BYTES
        )
        self._bytes = 0

    def copy(self, message: Message) -> bytes:
        """A copy of its bytes. Raises PeerGoneError: the peer took the memory back."""
        return self._read(message.offset, len(message))

    def available(self) -> int:
        """Bytes that wait in the stream. Raises ProtocolError."""
        waiting = (self._peer.load(BYTES_SENT) - self._bytes) & _WORD
        if waiting > self._stream_bytes:
            raise protocol_broken(f"{waiting} bytes in a stream of {self._stream_bytes}")
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
        self.messages.close()

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
