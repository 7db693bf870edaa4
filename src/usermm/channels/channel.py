"""`Channel`: what most people want: a byte stream, messages and arrays between two domains."""

from __future__ import annotations

import contextlib
import errno
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from usermm.channels import arrays, rendezvous
from usermm.channels.aio import AsyncCalls
from usermm.channels.arrays import Slot
from usermm.channels.listener import Listener
from usermm.channels.offers import release_side
from usermm.channels.rings import WANTS_BYTES, WANTS_MESSAGE, WANTS_ROOM, WANTS_SLOT, Geometry, Incoming, Outgoing
from usermm.channels.waiting import Sleeper
from usermm.errors import ArgumentError, ClosedError, DeviceError
from usermm.grants.arguments import unsigned
from usermm.grants.files import PAGE_BYTES
from usermm.ummunotify.arguments import deadline_s

if TYPE_CHECKING:
    import numpy as np

    from usermm.grants.domain import Domain

SLOTS = 4
SLOT_BYTES = 64 << 10
STREAM_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Lost:
    """What a peer that went had not confirmed. Nothing of it is sent again: whoever knows what it meant decides."""

    not_taken: int
    """Messages that were sent and that it never took."""
    not_returned: int
    """Messages that it took and had not given back: it may have used them, or not."""
    stream_bytes: int
    """Bytes of the stream that it had not taken."""


class Channel(AsyncCalls):
    """A connection to one other domain, which is not trusted: what it writes is looked at before it is used.

    Each direction has a stream of bytes, and messages (bytes or arrays) in slots of granted memory, which are handed
    over without a copy. The two keep their order, each for itself. One thread at a time sends, one receives; views may
    be let go by any. `timeout`: seconds, None waits for ever, 0 does not wait; TimeoutError.

    Every call raises PeerGoneError (EPIPE) at once when the peer ends, also while it waits; what the peer sent before
    can still be received. ProtocolError (EPROTO): the peer wrote nonsense. ClosedError after close().
    """

    def __init__(self, domain: Domain, met: rendezvous.Met, name: str, called: int | str | None = None) -> None:
        """Made by connect() and Listener.accept(); `called` is the peer as connect() was given it."""
        self._domain, self._called = domain, called
        self._unconfirmed: Lost | None = None
        self.name = name
        """What was listened for."""
        self._use(met)

    def _use(self, met: rendezvous.Met) -> None:
        peer, shared, side, port = met
        self.peer = peer
        """The other domain's number."""
        self._shared, self._side, self._port = shared, side, port
        own = shared.side()
        self._out = Outgoing(own, side, port.notify)
        self._in = Incoming(own, side, port.notify)
        self._sleeper = Sleeper(port, own.control)
        self._closed = False

    @classmethod
    def listen(
        cls, domain: Domain, name: str, peer: int | str | None = None, *, slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES, stream_bytes: int = STREAM_BYTES,
    ) -> Listener:
        """Lets domain `peer`, a domid or a name, or any, connect to `name`; the sizes are of what this side sends on
        each channel: 1 to 64 `slots` of `slot_bytes`, and a stream of `stream_bytes`, in whole pages.

        Raises GrantError (EEXIST): this domain listens for it already; QuotaError of the store.
        """
        only = None if peer is None else rendezvous.domid_of(domain, peer, "listen: peer")
        return Listener(domain, name, only, geometry(slots, slot_bytes, stream_bytes), cls)

    @classmethod
    def connect(
        cls, domain: Domain, peer: int | str, name: str, timeout: float | None = None, *, slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES, stream_bytes: int = STREAM_BYTES,
    ) -> Self:
        """A channel to the listener `name` of `peer`, a domid or a domain's name, once it is there and accepts.

        The sizes are of what this side sends: 1 to 64 messages (`slots`) of `slot_bytes` can be under way, or held by
        the peer, at a time.
        Raises TimeoutError; PeerGoneError (ECONNREFUSED): it does not want this domain, or cannot have it; QuotaError:
        a quota of this domain's is used up (max_grant_frames, max_memkb, max_event_channels: the policy has them).
        """
        sizes = geometry(slots, slot_bytes, stream_bytes)
        return cls(domain, rendezvous.ask(domain, peer, name, sizes, deadline_s(timeout)), name, peer)

    def reconnect(self, timeout: float | None = None) -> Lost:
        """Connects anew to the same peer, by the name or number that connect() was given; says what was lost.

        When it fails it can be tried again, and says then what was lost the first time. For the side that connected;
        the other one accepts a new channel. What was received and is held stays as it is.
        """
        if self._called is None:
            raise ArgumentError("reconnect: this side accepted the channel: accept() a new one")
        deadline = deadline_s(timeout)
        if not self._closed:
            self._unconfirmed = self.lost()
            self.close()
        if self._unconfirmed is None:
            self._check()
        self._use(rendezvous.ask(self._domain, self._called, self.name, self._shared.geometry, deadline))
        lost, self._unconfirmed = self._unconfirmed, None
        return lost  # type: ignore[return-value] # it was checked

    def lost(self) -> Lost:
        """What the peer has not confirmed so far; after its end, or a reconnect() that failed, what was lost."""
        if self._unconfirmed is not None:
            return self._unconfirmed
        self._check()
        return Lost(*self._out.unconfirmed())

    # The stream

    def send(self, data: Any, *, timeout: float | None = None) -> None:
        """All bytes of `data`, waiting for room. On TimeoutError a part was sent: its `sent` says how many bytes."""
        with arrays.bytes_of(data, "send") as given, given.cast("B") as view:
            sent = 0
            try:
                self._check_peer("send")
                deadline = deadline_s(timeout)
                while sent < len(view):
                    left_s = None if timeout is None else max(0.0, deadline - time.monotonic())
                    rest = view[sent:]
                    sent += self._sleeper.until(lambda rest=rest: self._put(rest), WANTS_ROOM, left_s, "send")  # type: ignore[misc]
            except OSError as error:
                error.sent = sent  # type: ignore[attr-defined]
                raise

    def receive(self, most: int = 65536, *, timeout: float | None = None) -> bytes:
        """Between 1 and `most` bytes of the stream, as soon as there are some."""
        if most < 1:
            raise ArgumentError(f"receive({most}): ask for one byte at least")
        self._check()
        return self._sleeper.until(lambda: self._in.take(most) or None, WANTS_BYTES, timeout, "receive")

    def receive_exactly(self, count: int, *, timeout: float | None = None) -> bytes:
        """`count` bytes of the stream. On an error those that came are lost: its `received` has them."""
        parts, missing, deadline = [], count, deadline_s(timeout)
        try:
            while missing:
                left_s = None if timeout is None else max(0.0, deadline - time.monotonic())
                parts.append(self.receive(missing, timeout=left_s))
                missing -= len(parts[-1])
        except OSError as error:
            error.received = b"".join(parts)  # type: ignore[attr-defined]
            raise
        return b"".join(parts)

    # Messages and arrays

    def loan(self, wanted: int | tuple[int, ...], dtype: Any = None, *, timeout: float | None = None) -> Slot:
        """A slot of granted memory to fill in and send: `wanted` bytes, or a shape with a NumPy `dtype`.

        Waits while all slots are out: that is how a slow receiver slows the sender. Its memory has what was in it.
        """
        return self._loan(wanted, dtype, timeout, "loan")

    def _loan(self, wanted: int | tuple[int, ...], dtype: Any, timeout: float | None, call: str) -> Slot:
        sizes = arrays.extent_of(wanted, dtype, self._out.slot_bytes)
        self._check_peer(call)
        slot = Slot.take(self._out.messages, *sizes)
        if slot is None:
            attempt = functools.partial(Slot.take, self._out.messages, *sizes)
            slot = self._sleeper.until(attempt, WANTS_SLOT, timeout, call)
        return slot

    def send_message(self, data: Any, *, timeout: float | None = None) -> int:
        """A copy of `data` (bytes-like) as one message; its number, from 1."""
        with arrays.bytes_of(data, "send_message") as given:
            slot = self._loan(given.nbytes, None, timeout, "send_message")
            slot.fill(given)
        return slot.send()

    def send_array(self, array: Any, *, timeout: float | None = None) -> int:
        """A copy of a NumPy array as one message; its number. To send without a copy fill in a loan()."""
        slot = self._loan(*arrays.form_of(array), timeout, "send_array")
        arrays.copy_into(slot, array)
        return slot.send()

    def receive_message(self, *, timeout: float | None = None) -> bytes:
        """A copy of the next message; its slot goes back at once."""
        self._check()
        message = self._sleeper.until(self._in.messages.next, WANTS_MESSAGE, timeout, "receive_message")
        try:
            return self._in.copy(message)
        finally:
            message.release()

    def receive_array(self, *, timeout: float | None = None, copy: bool = False) -> np.ndarray[Any, Any]:
        """The next message as an array, read-only, where it is: one of bytes, if it was not sent as an array.

        The slot goes back when the last view of it is gone: `del` it, or let the function return. The sender can change
        what it sent, or take the memory back, which leaves zeros. `copy`: an array of one's own, which is writable,
        to be checked and used in peace. NotInstalledError without NumPy.
        """
        self._check()
        arrays.need_numpy("receive_array")
        message = self._sleeper.until(self._in.messages.next, WANTS_MESSAGE, timeout, "receive_array")
        return arrays.as_array(self._in, message, copy=copy)

    # The end

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def peer_is_gone(self) -> bool:
        """Whether the peer closed its side or ended; asks the kernel."""
        return self._closed or self._sleeper.look()

    def fileno(self) -> int:
        """For poll: readable when the peer has done something, or is gone. It does so only for a side that waits."""
        self._check()
        return self._port.fileno()

    def close(self) -> None:
        """Ends the channel: the peer is told. Views of what was received stay valid. May be called again."""
        if self._closed:
            return
        self._closed = True
        if not self._sleeper.is_inherited:
            self._sleeper.wake_all()
            self._out.close()  # before the port: who lets a view go meanwhile notifies nobody
            self._in.close()
            with contextlib.suppress(DeviceError):
                self._domain.evtchn.unbind(self._port.port)
        self._port.close()
        if not self._sleeper.is_inherited:  # in a child locks may be held by threads that are not there
            release_side(self._side)
            self._shared.close()

    def _put(self, data: memoryview) -> int | None:
        return self._out.put(data) or None

    def _check(self) -> None:
        if self._closed:
            raise ClosedError(errno.EBADF, "channel: it is closed: connect a new one")

    def _check_peer(self, call: str) -> None:
        self._check()
        if self._sleeper.look():
            self._sleeper.refuse(call)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not getattr(self, "_closed", True) and not is_finalizing() and not self._sleeper.is_inherited:
            self._port.hang_up()  # takes no lock: it may be held by whoever is interrupted here

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Channel {self.name!r} to domain {self.peer}{', closed' if self._closed else ''}>"


def geometry(slots: int, slot_bytes: int, stream_bytes: int) -> Geometry:
    """Sizes in whole pages; the stream's is rounded up to a power of two. Raises ArgumentError."""
    page = PAGE_BYTES
    pages = -(-unsigned(stream_bytes, 48, "channel: stream_bytes") // page)
    slot_pages = -(-unsigned(slot_bytes, 48, "channel: slot_bytes") // page)
    made = Geometry(unsigned(slots, 32, "channel: slots"), slot_pages, 1 << max(0, pages - 1).bit_length())
    made.check()
    return made
