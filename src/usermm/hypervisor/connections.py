"""One client's socket: packets in, packets out, never waiting for it.

A client that does not read its replies is not read either: at most one reply waits here, the rest in its own socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from usermm.hypercalls.wire import LONGEST_REQUEST_BYTES, MOST_DESCRIPTORS, NO_REPLY, REFUSAL, REPLY, REQUEST
from usermm.hypervisor.calls import NotNow, Refused, Reply
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.shares import TURN_NS, Shares

_PACKETS_A_TURN = 16  # then the others have their turn
_SEND_BUFFER_BYTES = 48 * 1024  # one reply of the longest kind, and a little
_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5
_SO_PASSRIGHTS = 83  # Linux 6.16
_SIOCOUTQ = 0x5411
_PAUSE_SECONDS = 0.05
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_DESCRIPTOR = struct.Struct("=i")
_COUNT = struct.Struct("=i")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected: what the kernel noted at connect(2). The pidfd is None where it could not be had."""

    pid: int
    uid: int
    gid: int


Answer = Callable[["Connection", int, memoryview], Reply]


class Connection:
    """`answer` carries out a request or raises Refused; `gone` is called once, when the client ended or went away."""

    def __init__(
        self,
        stream: socket.socket,
        loop: asyncio.AbstractEventLoop,
        answer: Answer,
        gone: Callable[[Connection], None],
        shares: Shares,
        *,
        buffer: bytearray,
    ) -> None:
        """`buffer` is where requests are taken: one of LONGEST_REQUEST_BYTES for all connections of a loop."""
        self.peer = Peer(*_CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
        self.domain: DomainRecord | None = None
        self._stream = stream
        self._loop = loop
        self._answer = answer
        self._gone = gone
        self._shares = shares
        self._buffer = buffer
        self._unsent: tuple[bytes, tuple[int, ...]] | None = None
        self._held: bytes | None = None
        """A request that waits for something of the hypervisor's."""
        self._under_way = 0  # descriptors that were sent, since it was known last that none is unread
        stream.setblocking(False)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._pidfd = _pidfd_of(stream, self.peer.pid)
        loop.add_reader(stream.fileno(), self._on_readable)
        if self._pidfd is not None:
            # A copy of the socket in a forked child outlives the process that is the domain.
            loop.add_reader(self._pidfd, self.close)

    def close(self) -> None:
        """Ends the connection; `gone` hears of it. May be called again."""
        if self._stream.fileno() < 0:
            return
        self._loop.remove_reader(self._stream.fileno())
        self._loop.remove_writer(self._stream.fileno())
        self._shares.forget(self, self.peer.uid)
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)  # also for copies in the client's children
        self._stream.close()
        if self._unsent is not None:
            _close_all(self._unsent[1])
            self._unsent = None
        self._gone(self)

    def forget(self) -> None:
        """In a forked child: closes its descriptors."""
        self._stream.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        if self._unsent is not None:
            _close_all(self._unsent[1])

    def _on_readable(self) -> None:
        if self._shares.may_go(self, self.peer.uid) and not self._pauses():
            start = time.perf_counter_ns()
            self._take(start + TURN_NS)
            self._shares.went(self.peer.uid, time.perf_counter_ns() - start)

    def _pauses(self) -> bool:
        """Descriptors that nobody receives count on our user, all of whose senders could send none in the end."""
        if self._under_way < MOST_DESCRIPTORS:
            return False
        (unread,) = _COUNT.unpack(fcntl.ioctl(self._stream, _SIOCOUTQ, bytes(_COUNT.size)))
        if not unread:
            self._under_way = 0
            return False
        self._loop.remove_reader(self._stream.fileno())
        self._loop.call_later(_PAUSE_SECONDS, self._go_on)
        return True

    def _go_on(self) -> None:
        if self._stream.fileno() >= 0:
            self._loop.add_reader(self._stream.fileno(), self._on_readable)

    def _take(self, until_ns: int) -> None:
        for _ in range(_PACKETS_A_TURN):
            try:
                size = self._stream.recv_into(self._buffer, 0, socket.MSG_TRUNC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                size = 0
            if size == 0:  # the end, or an empty packet, which is no request either
                self.close()
                return
            self._serve(size)
            if self._unsent is not None or self._held is not None or self._stream.fileno() < 0:
                return
            if self._under_way >= MOST_DESCRIPTORS or time.perf_counter_ns() > until_ns:
                return

    def _serve(self, size: int) -> None:
        if size < REQUEST.size:
            self._send(_refusal(0, Refused(errno.EINVAL, f"a request of {size} bytes: it has {REQUEST.size} at least")))
            return
        operation, flags, serial = REQUEST.unpack_from(self._buffer)
        descriptors: tuple[int, ...] = ()
        try:
            if size > LONGEST_REQUEST_BYTES:
                raise Refused(errno.EMSGSIZE, f"a request of {size} bytes: {LONGEST_REQUEST_BYTES} are the most")
            reply = self._answer(self, operation, memoryview(self._buffer)[REQUEST.size : size])
            packet, descriptors = REPLY.pack(0, serial) + reply.payload, tuple(reply.descriptors)
        except Refused as refused:
            packet = _refusal(serial, refused)
        except NotNow as later:
            self._held = bytes(self._buffer[:size])
            self._loop.remove_reader(self._stream.fileno())
            later.when(self._serve_held)
            return
        if flags & NO_REPLY:
            _close_all(descriptors)
        else:
            self._send(packet, descriptors)

    def _serve_held(self) -> None:
        held, self._held = self._held, None
        if held is not None and self._stream.fileno() >= 0:
            self._loop.add_reader(self._stream.fileno(), self._on_readable)
            self._buffer[: len(held)] = held
            self._serve(len(held))

    def _send(self, packet: bytes, descriptors: tuple[int, ...] = ()) -> None:
        if self._stream.fileno() < 0:
            _close_all(descriptors)
            return
        try:
            if descriptors:
                rights = b"".join(map(_DESCRIPTOR.pack, descriptors))
                self._stream.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                self._under_way += len(descriptors)
            else:
                self._stream.send(packet)
        except (BlockingIOError, InterruptedError):
            self._unsent = packet, descriptors
            self._loop.remove_reader(self._stream.fileno())
            self._loop.add_writer(self._stream.fileno(), self._on_writable)
            return
        except OSError as error:
            _close_all(descriptors)
            if error.errno == errno.ETOOMANYREFS and descriptors:
                _, serial = REPLY.unpack_from(packet)
                self._send(_refusal(serial, Refused(errno.ENFILE, "too many descriptors are under way: read replies")))
            else:
                self.close()
            return
        _close_all(descriptors)

    def _on_writable(self) -> None:
        assert self._unsent is not None
        unsent, self._unsent = self._unsent, None
        self._loop.remove_writer(self._stream.fileno())
        self._loop.add_reader(self._stream.fileno(), self._on_readable)
        self._send(*unsent)


def refuse_descriptors(stream: socket.socket) -> None:
    """Whoever sends some to `stream` gets EPERM. Before Linux 6.16 they come and are closed at once.

    That can take long: a TCP socket with SO_LINGER makes wait whoever closes it last.
    """
    with contextlib.suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def _refusal(serial: int, refused: Refused) -> bytes:
    text = " ".join(refused.reason.split()).encode(errors="backslashreplace")
    return REPLY.pack(-refused.errno, serial) + REFUSAL.pack(refused.status, refused.index) + text[:1024]


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _pidfd_of(stream: socket.socket, pid: int) -> int | None:
    """The process that connected; opened by number where the kernel does not hand it out, which its death can race."""
    try:
        return stream.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
