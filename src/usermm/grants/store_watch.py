"""A watch on the store: the paths that changed, to be read, polled or iterated over."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from usermm._core import process
from usermm.errors import ClosedError, ForkedError, LimitError
from usermm.hypercalls import store as layout
from usermm.ummunotify.arguments import deadline_s
from usermm.ummunotify.readiness import readable

_LONGEST_POLL_MS = 1 << 30
_LONGEST_EVENT_BYTES = layout.LONGEST_ABSOLUTE_BYTES + layout.LONGEST_TOKEN_BYTES + 2


class Watch:
    """Tells of changes to `path` and everything below. The first event is there at once: it says "begin by looking".

    Several changes of one path may come as one. Any thread may call; events go to whoever reads first.
    """

    def __init__(self, descriptor: int, path: str, token: str, ask: Callable[[], object]) -> None:
        """`ask` raises HypervisorGoneError if that is why the watch came to its end."""
        self.path = path
        self.token = token
        self._stream = socket.socket(fileno=descriptor)
        self._stream.settimeout(None)  # not what socket.setdefaulttimeout says
        self._ask = ask
        self._owner = process()
        self._is_closed = False

    def read(self, timeout: float | None = None) -> list[str]:
        """The paths that changed, each once, oldest first; relative ones where a relative path is watched.

        Waits until there is one, `timeout` seconds at most ([] then), for 0 not at all. Raises ClosedError;
        LimitError (EOVERFLOW) when nobody read for so long that events were lost: watch again and read everything anew;
        HypervisorGoneError.
        """
        deadline = deadline_s(timeout)
        while True:
            found = self._take_all()
            left_s = deadline - time.monotonic()
            if found or left_s <= 0:
                return found
            poll = select.poll()
            poll.register(self.fileno(), select.POLLIN)
            poll.poll(min(math.ceil(left_s * 1000), _LONGEST_POLL_MS) if left_s < math.inf else None)

    def fileno(self) -> int:
        """Readable while there is something to read, and once the watch came to its end. ClosedError, ForkedError."""
        self._check_process()
        descriptor = self._stream.fileno()
        if descriptor < 0:
            raise self._closed()
        return descriptor

    def close(self) -> None:
        """Ends the watch. May be called again."""
        self._is_closed = True  # first: who wakes up finds the reason
        if self._stream.fileno() >= 0 and process() == self._owner:  # a child's shutdown would end the parent's
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)  # whoever waits wakes up
        self._stream.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Paths as they come, under asyncio; ends when the watch is closed. Raises as read does."""
        try:
            descriptor = os.dup(self.fileno())  # the loop must not watch a number that close() gives to others
        except ClosedError:
            return
        try:
            while True:
                await readable(descriptor)
                try:
                    path = self._take()  # one by one: what is not taken stays there when the iteration ends
                except BlockingIOError:
                    continue
                except ClosedError:
                    return
                yield path
        finally:
            os.close(descriptor)

    def _take_all(self) -> list[str]:
        found: dict[str, None] = {}
        with contextlib.suppress(BlockingIOError):
            while len(found) < layout.MOST_WAITING_PATHS:
                try:
                    found[self._take()] = None
                except (LimitError, ConnectionError):
                    if not found:  # else the next call tells
                        raise
                    break
        return list(found)

    def _check_process(self) -> None:
        if process() != self._owner:
            text = f"watch({self.path}): it is the parent's: watch by a domain of this child's own"
            raise ForkedError(errno.ECHILD, text)

    def _take(self) -> str:
        self._check_process()
        try:
            packet = self._stream.recv(_LONGEST_EVENT_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise
        except OSError:
            raise self._closed() from None
        if not packet:
            raise self._ended()
        return packet.partition(b"\0")[0].decode()

    def _closed(self) -> ClosedError:
        return ClosedError(errno.EBADF, f"watch({self.path}): it is closed: watch again")

    def _ended(self) -> Exception:
        if self.closed:
            return self._closed()
        self._ask()
        return LimitError(
            errno.EOVERFLOW, f"watch({self.path}): events were lost, nobody read: watch again, then read the tree anew"
        )
