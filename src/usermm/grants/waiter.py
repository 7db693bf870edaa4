"""Waiting for one port, straight on its socket."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from usermm.errors import DeviceError, grant_refused
from usermm.grants.event_ports import AT_ONCE, EVENT, LONGEST_WAIT_S, MOST_BYTES
from usermm.ummunotify.arguments import deadline_s

if TYPE_CHECKING:
    from usermm.grants.local_evtchn import LocalEvtchn

_NOT_OURS = (errno.ENOTCONN, errno.EBADF, errno.ECHILD)


class Waiter:
    """The fast path for somebody who waits for one port: a wait is one recv(2), and no epoll is in between.

    The port is masked in its file as long as the Waiter is used; `Evtchn.unmask` gives it back to `Evtchn.read`. One
    thread uses it at a time; `notify` may be called by any.
    """

    __slots__ = ("_closed", "_file", "_hang_ups", "_poll", "_port", "_receive", "_send", "_stream", "port")

    def __init__(self, file: LocalEvtchn, port: int) -> None:
        self.port = port
        self._closed = False
        self._file = file
        self._stream: socket.socket | None = None
        self._port, stream = file.borrow(port)
        self._hang_ups = self._port.hang_ups
        self._use(stream)

    @property
    def hang_ups(self) -> int:
        """How often the peer has gone; each was an event as well."""
        return self._hang_ups

    def wait(self, timeout: float | None = None) -> bool:
        """Takes the event, waiting for it `timeout` seconds at most (None: for ever); False when none came.

        Signal handlers run meanwhile. The peer's end is an event, after which the port waits for a new peer.

        Raises GrantError (ENOTCONN) once the port was unbound, ClosedError, ForkedError; HypervisorGoneError after the
        peer's end when there is no hypervisor that could give the port to another.
        """
        if self._stream is None:
            self._renew()
        try:
            if timeout is None:
                try:
                    taken = self._receive(MOST_BYTES)
                except BlockingIOError:  # whoever has a copy of the socket made it non-blocking
                    return self._wait_patiently(None)
            elif timeout == 0:
                taken = self._receive(MOST_BYTES, AT_ONCE)
            else:
                return self._wait_patiently(timeout)
        except BlockingIOError:
            return False
        except OSError:  # ECONNRESET: the peer went and had not taken our events
            taken = b""
        return True if taken else self._hung_up()

    def notify(self) -> None:
        """An event for the peer, as `Evtchn.notify`. Never waits."""
        try:
            self._send(EVENT, AT_ONCE)
        except OSError:  # EAGAIN: it is pending already; EPIPE: nobody is there
            if self._stream is None or self._stream.fileno() < 0:
                self._file.notify(self.port)

    def fileno(self) -> int:
        """Readable when there is an event; another number after the peer's end. ClosedError."""
        if self._stream is None:
            self._renew()
        assert self._stream is not None
        return self._stream.fileno()

    def hang_up(self) -> None:
        """Tells the peer that this end is gone, for finalizers: nothing is asked and no lock is taken.

        The port is unbound before the file binds the next one.
        """
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)
        self._file.abandon(self._port)

    def close(self) -> None:
        """The port stays bound, and masked. May be called again."""
        self._closed = True
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self._drop()

    def _wait_patiently(self, timeout: float | None) -> bool:
        deadline = deadline_s(timeout)
        left_s = timeout
        while True:
            if self._poll.poll(None if left_s is None else min(left_s, LONGEST_WAIT_S) * 1000):
                try:
                    if self._receive(MOST_BYTES, AT_ONCE):
                        return True
                    return self._hung_up()
                except BlockingIOError:  # out-of-band bytes wake, and there is nothing to take
                    pass
                except OSError:
                    return self._hung_up()
            if timeout is not None:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False

    def _hung_up(self) -> bool:
        self._drop()
        try:
            self._renew()
        except DeviceError as error:
            if error.errno in _NOT_OURS:
                raise
        return True

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _renew(self) -> None:
        if self._closed:
            raise grant_refused(errno.EBADF, f"wait(port {self.port}): the waiter is closed: ask for a new one")
        try:
            stream = self._file.renew(self._port, self._hang_ups)
        finally:
            self._hang_ups = self._port.hang_ups
        self._use(stream)

    def _use(self, stream: socket.socket) -> None:
        self._stream = stream
        self._receive = stream.recv
        self._send = stream.send
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN | select.POLLRDHUP)
