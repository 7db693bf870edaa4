"""How a side sleeps until the other one has done something, without ever missing it: docs/models/channel_ring.pml."""

from __future__ import annotations

import asyncio
import errno
import select
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar

from usermm._core import Memory, give_way, has_hung_up
from usermm.channels.rings import WAITING
from usermm.errors import ClosedError, DeviceError, PeerGoneError

Got = TypeVar("Got")

_YIELDS, _LOOKS = 40, 50  # about 100 us: longer than a peer takes that is awake, shorter than anybody notices
_SELDOM = 31  # waits without spinning, at most, after some in vain
_HUNG_UP = select.POLLHUP | select.POLLRDHUP | select.POLLERR | select.POLLNVAL


class Port(Protocol):
    """What is needed of `usermm.grants.waiter.Waiter`."""

    @property
    def hang_ups(self) -> int:
        """Not 0 once the peer is gone."""

    def notify(self) -> None:
        """Wakes the peer, never waits."""

    def wait(self, timeout: float | None = None) -> bool:
        """Takes an event; the peer's end is one."""

    def fileno(self) -> int:
        """Readable when there is an event."""

    def close(self) -> None:
        """Gives it up."""


class Sleeper:
    """Waiting for the peer. Threads that wait together elect one that sleeps on the port and wakes the others."""

    def __init__(self, port: Port, control: Memory) -> None:
        self._port, self._control = port, control
        self._descriptor = port.fileno()
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._wanted: list[int] = []
        self._leader = False
        self._events = 0
        self._futures: set[asyncio.Future[None]] = set()
        self._vain = self._skip = 0
        self.gone = False
        self.closed = False

    def look(self) -> bool:
        """Whether the peer is gone; takes no event."""
        if not self.gone and not self._leader and has_hung_up(self._descriptor):
            self.gone = True
        return self.gone

    def until(self, attempt: Callable[[], Got | None], bit: int, timeout: float | None, call: str) -> Got:
        """What `attempt` returns once that is not None; `bit` is what the peer has to do for it.

        Raises PeerGoneError at once when the peer ends, ClosedError when this side is closed, TimeoutError.
        """
        try:
            got = attempt()
            if got is None and timeout != 0:
                got = self._spin(attempt)
            return self._wait(attempt, bit, timeout, call) if got is None else got
        except ValueError:  # of memory that close() has unmapped, maybe in another thread
            self._check(False, call)
            raise

    async def until_async(self, attempt: Callable[[], Got | None], bit: int, call: str) -> Got:
        """As `until`, under asyncio; asyncio.timeout() limits it."""
        try:
            return await self._wait_async(attempt, bit, call)
        except ValueError:
            self._check(False, call)
            raise

    def wake_all(self) -> None:
        """Whoever sleeps here looks again: this side was closed."""
        self.closed = True
        with self._lock:
            self._events += 1
            self._condition.notify_all()
        for future in list(self._futures):
            future.get_loop().call_soon_threadsafe(_finish, future)

    def _check(self, gone: bool, call: str) -> None:
        if self.closed:
            raise ClosedError(errno.EBADF, f"{call}: the channel is closed: connect a new one")
        if gone:
            self.refuse(call)

    def refuse(self, call: str) -> NoReturn:
        """Raises PeerGoneError."""
        raise PeerGoneError(errno.EPIPE, f"{call}: the peer is gone: reconnect, or accept a new one")

    def _wait(self, attempt: Callable[[], Got | None], bit: int, timeout: float | None, call: str) -> Got:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._want(bit)
        try:
            while True:
                events, gone = self._events, self.gone
                got = attempt()  # after both: what the peer did before it went is not lost
                if got is not None:
                    return got
                self._check(gone, call)
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is None or left_s > 0:
                    self._sleep(events, left_s)  # for no time, if the peer is gone
                elif not self.look():
                    raise TimeoutError(errno.ETIMEDOUT, f"{call}: nothing within {timeout} s: wait longer, or give up")
        finally:
            self._want(-bit)

    async def _wait_async(self, attempt: Callable[[], Got | None], bit: int, call: str) -> Got:
        loop = asyncio.get_running_loop()
        self._want(bit)
        try:
            while True:
                future = loop.create_future()
                if not self._futures and not self.look():
                    loop.add_reader(self._descriptor, self._event)
                self._futures.add(future)
                try:
                    gone = self.look()
                    got = attempt()
                    if got is not None:
                        return got
                    self._check(gone, call)
                    await future
                finally:
                    self._futures.discard(future)
                    if not self._futures:
                        loop.remove_reader(self._descriptor)
        finally:
            self._want(-bit)

    def _spin(self, attempt: Callable[[], Got | None]) -> Got | None:
        """Looks again for a moment, if that was of use lately."""
        if self._skip:
            self._skip -= 1
            return None
        for _ in range(_YIELDS):
            give_way()  # a peer on the same core has to run first
            for _ in range(_LOOKS):
                got = attempt()
                if got is not None:
                    self._vain = 0
                    return got
        self._vain = min(self._vain * 2 + 1, _SELDOM)
        self._skip = self._vain
        return None

    def _want(self, bit: int) -> None:
        """Says what is waited for, before one looks for the last time."""
        with self._lock:
            if bit > 0:
                self._wanted.append(bit)
            else:
                self._wanted.remove(-bit)
            word = 0
            for wanted in self._wanted:
                word |= wanted
            if not self._control.closed:
                self._control.store(WAITING, word)
                self._control.fence()

    def _sleep(self, events: int, left_s: float | None) -> None:
        with self._lock:
            if self._events != events:  # somebody took an event since we looked
                return
            if self._leader:
                self._condition.wait(left_s)
                return
            self._leader = True
        gone = True
        try:
            self._port.wait(left_s)
            gone = self._port.hang_ups > 0
        except DeviceError:  # the port was unbound here, or the peer and the hypervisor have gone
            pass
        except BaseException:
            gone = self.gone
            raise
        finally:
            with self._lock:
                self._leader = False
                self._events += 1
                self.gone = self.gone or gone
                self._condition.notify_all()

    def _event(self) -> None:
        if not self.look():
            try:
                self._port.wait(0)
                self.gone = self._port.hang_ups > 0
            except DeviceError:
                self.gone = True
        if self.gone:
            for future in self._futures:
                future.get_loop().remove_reader(self._descriptor)
        for future in list(self._futures):
            _finish(future)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
