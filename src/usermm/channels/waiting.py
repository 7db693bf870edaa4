"""How a side sleeps until the other one has done something, without ever missing it: docs/models/channel_ring.pml."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar

from usermm._core import Memory, give_way, has_hung_up, process
from usermm.channels.rings import WAITING, WANTS_BYTES, WANTS_MESSAGE, WANTS_ROOM, WANTS_SLOT
from usermm.errors import ClosedError, DeviceError, ForkedError, PeerGoneError
from usermm.ummunotify.arguments import deadline_s

Got = TypeVar("Got")

_YIELDS, _LOOKS = 40, 50  # about 100 us: longer than a peer takes that is awake, shorter than anybody notices
_LONGEST_WAIT_S = 1e6  # then it looks again: poll(2) takes no more
_WAITED_FOR = {
    WANTS_MESSAGE: "the peer has sent no message",
    WANTS_SLOT: "all slots are out: the peer has to receive, and to let go of the arrays that it has",
    WANTS_BYTES: "the peer has sent nothing",
    WANTS_ROOM: "the stream is full: the peer has to receive",
}
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

    def hang_up(self) -> None:
        """Tells the peer that this end is gone; takes no lock."""

    def close(self) -> None:
        """Gives it up."""


class Sleeper:
    """Waiting for the peer. Threads that wait together elect one that sleeps on the port and wakes the others."""

    def __init__(self, port: Port, control: Memory) -> None:
        self._port, self._control = port, control
        self._descriptor = port.fileno()
        self._lock = threading.RLock()  # a signal handler may close the channel
        self._process = process()
        self._condition = threading.Condition(self._lock)
        self._wanted: list[int] = []
        self._leader = False
        self._events = 0
        self._futures: set[asyncio.Future[None]] = set()
        self._vain = self._skip = 0
        self.gone = port.hang_ups > 0
        self.closed = False

    def look(self) -> bool:
        """Whether the peer is gone; takes no event."""
        if not self.gone and not self._leader and has_hung_up(self._descriptor):
            self._check_process()
            self.gone = True
        return self.gone

    @property
    def is_inherited(self) -> bool:
        """Whether this is a child of the process that has the channel."""
        return process() != self._process

    def _check_process(self) -> None:
        if self.is_inherited:
            text = "channel: it is the parent process's: connect one of this child's own, by a Domain of its own"
            raise ForkedError(errno.ECHILD, text)

    def until(self, attempt: Callable[[], Got | None], bit: int, timeout: float | None, call: str) -> Got:
        """What `attempt` returns once that is not None; `bit` is what the peer has to do for it.

        Raises PeerGoneError at once when the peer ends, ClosedError when this side is closed, TimeoutError.
        """
        try:
            got = attempt()
            if got is None and timeout != 0:
                got = self._spin(attempt)
            return self._wait(attempt, bit, timeout, call) if got is None else got
        except (ValueError, DeviceError):  # of memory and a port that close() took away, maybe in another thread
            self._check(False, call)
            raise

    async def until_async(self, attempt: Callable[[], Got | None], bit: int, call: str) -> Got:
        """As `until`, under asyncio; asyncio.timeout() limits it."""
        try:
            return await self._wait_async(attempt, bit, call)
        except (ValueError, DeviceError):
            self._check(False, call)
            raise

    def wake_all(self) -> None:
        """Whoever sleeps here looks again: this side was closed."""
        self.closed = True
        with self._lock:
            self._events += 1
            self._condition.notify_all()
        self._finish_all(None)

    def _check(self, gone: bool, call: str) -> None:
        if self.closed:
            raise ClosedError(errno.EBADF, f"{call}: the channel is closed: connect a new one")
        if gone:
            self.refuse(call)

    def refuse(self, call: str) -> NoReturn:
        """Raises PeerGoneError."""
        raise PeerGoneError(errno.EPIPE, f"{call}: the peer is gone: reconnect, or accept a new one")

    def _wait(self, attempt: Callable[[], Got | None], bit: int, timeout: float | None, call: str) -> Got:
        deadline = deadline_s(timeout)
        self._want(bit)
        try:
            while True:
                events, gone = self._events, self.gone
                got = attempt()  # after both: what the peer did before it went is not lost
                if got is not None:
                    return got
                self._check(gone, call)
                left_s = None if timeout is None else deadline - time.monotonic()
                if left_s is None or left_s > 0:
                    self._sleep(events, left_s and min(left_s, _LONGEST_WAIT_S))  # for no time, if the peer is gone
                elif not self.look():
                    raise TimeoutError(errno.ETIMEDOUT, f"{call}: {_WAITED_FOR[bit]}: wait longer, or give up")
        finally:
            self._want(-bit)

    async def _wait_async(self, attempt: Callable[[], Got | None], bit: int, call: str) -> Got:
        loop = asyncio.get_running_loop()
        self._want(bit)
        descriptor = -1
        try:
            while True:
                future = loop.create_future()
                self._futures.add(future)
                gone = self.look()
                got = attempt()
                if got is not None:
                    return got
                self._check(gone, call)
                if descriptor < 0:  # of one's own: the loop keeps a number until it is told, whoever closes the port
                    descriptor = os.dup(self._descriptor)
                    loop.add_reader(descriptor, self._event)
                else:
                    await future
                self._futures.discard(future)
        finally:
            self._futures.discard(future)
            if descriptor >= 0:
                loop.remove_reader(descriptor)
                os.close(descriptor)
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
        leads, gone = False, True
        try:
            with self._lock:
                if self._events != events:  # somebody took an event since we looked
                    return
                if self._leader:
                    self._condition.wait(left_s)
                    return
                leads = self._leader = True
            self._port.wait(left_s)
            gone = self._port.hang_ups > 0
        except DeviceError:  # the port was unbound here, or the peer and the hypervisor have gone
            pass
        except BaseException:
            gone = self.gone
            raise
        finally:
            if leads:
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
        self._finish_all(asyncio.get_running_loop())

    def _finish_all(self, here: asyncio.AbstractEventLoop | None) -> None:
        for future in list(self._futures):
            loop = future.get_loop()
            if loop is here:
                _finish(future)
                continue
            with contextlib.suppress(RuntimeError):  # the loop was closed, with the task in it
                loop.call_soon_threadsafe(_finish, future)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
