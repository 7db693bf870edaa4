"""The ports of one event channel file: their sockets, and the epoll that reports them.

EPOLLONESHOT masks a port when its event is reported. A port that is masked otherwise is not in the epoll at all, since
the kernel reports a hang-up whatever was asked for.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import weakref
from collections.abc import Callable
from typing import Final

from usermm.errors import DeviceError, HypervisorGoneError, grant_refused

EVENT: Final = b"\1"
MOST_BYTES: Final = 4096
"""More than a socket holds of single bytes."""
LONGEST_WAIT_S: Final = 3600.0
"""Of one poll(2) or epoll_wait(2), whose milliseconds are an int: then it waits again."""
AT_ONCE: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
"""Never by O_NONBLOCK: the flag is the socket's, so whoever has a copy of the descriptor could clear it."""

_ARMED: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
_HANG_UP: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class BoundPort:
    """One port. `stream` is None while there is no pair: the hypervisor could not give a new one."""

    __slots__ = ("hang_ups", "masked", "number", "registered", "stream")

    def __init__(self, number: int) -> None:
        self.number = number
        self.stream: socket.socket | None = None
        self.masked = False
        self.registered = False
        self.hang_ups = 0


class EventPorts:
    """Callers hold the file's lock, except for `senders`, which is looked up without.

    `ask_for_end` gives a descriptor for a port whose peer is gone; it raises DeviceError.
    """

    def __init__(self, ask_for_end: Callable[[int], int]) -> None:
        self._ask_for_end = ask_for_end
        self.by_number: dict[int, BoundPort] = {}
        self.senders: dict[int, Callable[[bytes, int], int]] = {}
        self.changes = 0
        """Counts descriptors that came or went: a number of before may be another port's by now."""
        with contextlib.ExitStack() as undo:
            try:
                self.epoll = select.epoll()
                undo.callback(self.epoll.close)
                self._doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError as error:
                text = f"open_evtchn: {error.strerror}: close some descriptors (ulimit -n)"
                raise grant_refused(error.errno or 0, text) from None
            undo.pop_all()
        self.epoll.register(self._doorbell, select.EPOLLIN)
        self._by_descriptor: dict[int, BoundPort] = {}
        self._wanting: set[BoundPort] = set()
        self._streams: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def add(self, number: int, descriptor: int) -> None:
        """A new port, not masked. Its descriptor is closed when something runs out: LimitError (ENOMEM), QuotaError."""
        port = self.by_number[number] = BoundPort(number)
        self._connect(port, descriptor)
        try:
            self.unmask(port)
        except BaseException:
            hang_up(self.remove(port))
            raise

    def remove(self, port: BoundPort) -> socket.socket | None:
        """The port is not ours any more; its socket is the caller's to close."""
        self._disarm(port)
        del self.by_number[port.number], self.senders[port.number]
        if port.stream is not None:
            del self._by_descriptor[port.stream.fileno()]
        self.changes += 1
        return port.stream

    def mask(self, port: BoundPort) -> None:
        """Its events wait."""
        port.masked = True
        self._disarm(port)

    def unmask(self, port: BoundPort) -> None:
        """What waits is reported, and what comes. QuotaError (ENOSPC): fs.epoll.max_user_watches; then it stays masked.
        """
        if port.stream is None:
            try:
                self._ask(port)
            except HypervisorGoneError:  # then nobody can bind it either
                pass
            except DeviceError:  # no room, or this thread, in a signal handler, is in a request: try_again() does
                self._wanting.add(port)
        if port.stream is not None:
            try:
                arm = self.epoll.modify if port.registered else self.epoll.register
                arm(port.stream.fileno(), _ARMED)
            except OSError as error:
                text = f"unmask(port {port.number}): {error.strerror}: raise fs.epoll.max_user_watches"
                raise grant_refused(error.errno or 0, text) from None
            port.registered = True
        port.masked = False

    def try_again(self) -> None:
        """For ports that are not masked and could not be given an end."""
        wanting, self._wanting = self._wanting, set()
        for port in wanting:
            if self.by_number.get(port.number) is port and not port.masked:
                self.unmask(port)

    def pending(self) -> frozenset[int]:
        """The numbers of those whose events were not taken yet, masked or not."""
        poll = select.poll()
        for descriptor in self._by_descriptor:
            poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
        return frozenset(self._by_descriptor[descriptor].number for descriptor, _ in poll.poll(0))

    def take(self, ready: list[tuple[int, int]], changes: int) -> list[int]:
        """Takes the events of what the epoll reported (so masked) when `changes` was as given; the ports' numbers."""
        numbers = []
        reused = changes != self.changes
        for descriptor, flags in ready:
            port = self._by_descriptor.get(descriptor)
            if port is None:  # the doorbell, or unbound meanwhile
                continue
            if reused:  # it may be a new port's number, which nobody has masked
                self._disarm(port)
            if self._take(port, flags):
                port.masked = True
                numbers.append(port.number)
            elif not port.masked:
                self.unmask(port)
        return numbers

    def lend(self, port: BoundPort) -> socket.socket:
        """A copy of the port's socket, which closes with the others in a forked child. Raises DeviceError."""
        if port.stream is None:
            self._ask(port)
        assert port.stream is not None
        try:
            stream = port.stream.dup()
        except OSError as error:
            text = f"waiter(port {port.number}): no descriptor is free: close some (ulimit -n)"
            raise grant_refused(error.errno or 0, text) from None
        self._streams.add(stream)
        return stream

    def rearm(self, port: BoundPort) -> None:
        """The peer is gone: the port waits for a new one, at the end of a new pair, which is not in the epoll."""
        port.hang_ups += 1
        self._drop(port)
        with contextlib.suppress(DeviceError):  # the hypervisor is gone as well: the port is bound to nobody
            self._ask(port)

    def ring(self) -> None:
        """Wakes all who wait, for good."""
        os.eventfd_write(self._doorbell, 1)

    def close(self) -> None:
        """The epoll; the sockets are the ports'."""
        self.epoll.close()
        os.close(self._doorbell)

    def close_copies(self) -> None:
        """In a forked child: all descriptors are closed, and nothing is said to anybody."""
        self.by_number.clear()
        self.senders.clear()
        for stream in list(self._streams):
            stream.close()
        self.close()

    def _take(self, port: BoundPort, flags: int) -> bool:
        assert port.stream is not None
        try:
            data = port.stream.recv(MOST_BYTES, AT_ONCE)
        except BlockingIOError:  # out-of-band bytes wake, and there is nothing to take
            return False
        except OSError:  # ECONNRESET: the peer went and had not taken our events
            data = b""
        if not data or flags & _HANG_UP:
            self.rearm(port)
        return True

    def _disarm(self, port: BoundPort) -> None:
        if port.registered and port.stream is not None:
            self.epoll.unregister(port.stream.fileno())
        port.registered = False

    def _ask(self, port: BoundPort) -> None:
        self._connect(port, self._ask_for_end(port.number))

    def _connect(self, port: BoundPort, descriptor: int) -> None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=descriptor)
        stream.settimeout(None)  # not what socket.setdefaulttimeout says
        port.stream = stream
        self._streams.add(stream)
        self._by_descriptor[descriptor] = port
        self.senders[port.number] = stream.send
        self.changes += 1

    def _drop(self, port: BoundPort) -> None:
        stream = port.stream
        if stream is not None:
            self._disarm(port)  # closing would not: an epoll goes by open files, of which the hypervisor has copies
            port.stream = None
            del self._by_descriptor[stream.fileno()]
            self.senders[port.number] = _to_nobody
            self.changes += 1
            stream.close()


def hang_up(stream: socket.socket | None) -> None:
    """For all copies of it, also one that a thread sleeps on."""
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        stream.close()


def _to_nobody(data: bytes, flags: int) -> int:
    return len(data) if flags else 0
