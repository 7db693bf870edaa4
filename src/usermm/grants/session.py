"""A domain's connection to the hypervisor: requests, replies, descriptors."""

from __future__ import annotations

import collections
import errno
import json
import os
import socket
import threading
from typing import Any

from usermm._core import has_hung_up, process
from usermm.errors import ArgumentError, DeviceError, ForkedError, HypervisorGoneError, grant_refused
from usermm.hypercalls import wire
from usermm.hypercalls.wire import Operation

_CMSG_CLOEXEC = 0x40000000  # MSG_CMSG_CLOEXEC, recvmsg(2): no descriptor leaks into a program started meanwhile
_ANCILLARY_BYTES = socket.CMSG_SPACE(wire.MOST_DESCRIPTORS * 4)
_NOT_THERE = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR)


class Refusal(Exception):  # noqa: N818 - an answer, which becomes an error where it is raised to users
    """The hypervisor's no: errno, GNTST_* status, the element it is about, and the reason in one line."""

    def __init__(self, errno: int, status: int, index: int, reason: str) -> None:
        super().__init__(errno, reason)
        self.errno = errno
        self.status = status
        self.index = index
        self.reason = reason

    def error(self) -> DeviceError:
        """As it is raised to users."""
        return grant_refused(self.errno, self.reason)


class Session:
    """Any thread may call. A forked child has none of it: it opens a domain of its own."""

    def __init__(self, path: str) -> None:
        """Connects. Raises HypervisorGoneError (ECONNREFUSED, ENOENT) where no hypervisor listens at `path`."""
        self.path = path
        self._stream = _connect(path)
        self._lock = threading.Lock()
        self._told: collections.deque[bytes] = collections.deque()
        self._serial = 0
        self._owner = process()

    def call(self, operation: Operation, payload: bytes = b"") -> tuple[bytes, list[int]]:
        """The reply's payload and descriptors, which are the caller's to close.

        Raises as `request`, and for what the hypervisor refuses the GrantError of its errno.
        """
        try:
            return self.request(operation, payload)
        except Refusal as refusal:
            raise refusal.error() from None

    def request(self, operation: Operation, payload: bytes = b"") -> tuple[bytes, list[int]]:
        """As `call`, but raises Refusal. HypervisorGoneError once the hypervisor ended; ForkedError in a child."""
        if process() != self._owner:
            raise ForkedError(errno.ECHILD, f"{operation.name.lower()}: the domain is the parent's: open one here")
        with self._lock:
            self._flush()
            self._serial = serial = self._serial + 1 & 0xFFFFFFFF
            self._send(wire.REQUEST.pack(operation, 0, serial) + payload)
            status, answer, descriptors = self._reply(serial)
        self._settle()
        if status:
            _close_all(descriptors)
            raise _refusal(status, answer)
        return answer, descriptors

    def check(self) -> None:
        """What needs no request fails as one would: HypervisorGoneError once it ended, ForkedError in a child."""
        if process() != self._owner:
            raise ForkedError(errno.ECHILD, "the domain is the parent's: open one in this child")
        descriptor = self._stream.fileno()
        if descriptor < 0 or has_hung_up(descriptor):
            raise self._gone(None)

    def tell(self, operation: Operation, payload: bytes) -> None:
        """Sends a request that has no reply. Never waits for another thread and never fails: finalizers call it.

        The lock may be held by this very thread, which a finalizer interrupted: then the request goes with the next.
        """
        if process() == self._owner:
            self._told.append(wire.REQUEST.pack(operation, wire.NO_REPLY, 0) + payload)
            self._settle()

    def close(self) -> None:
        """The domain ends. May be called again."""
        if process() != self._owner:
            self._stream.close()  # not shut down: the parent goes on
            return
        with self._lock:
            self._flush()
            self._stream.close()

    @property
    def is_inherited(self) -> bool:
        """Whether this is a child of the process whose domain it is."""
        return process() != self._owner

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._stream.fileno() < 0

    def _settle(self) -> None:
        while self._told and self._lock.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._lock.release()

    def _flush(self) -> None:
        while self._told:
            try:
                self._send(self._told.popleft())
            except DeviceError:
                self._told.clear()  # it ended: it knows
            except IndexError:
                return

    def _send(self, packet: bytes) -> None:
        try:
            self._stream.send(packet)
        except OSError as error:
            raise self._gone(error) from None

    def _reply(self, serial: int) -> tuple[int, bytes, list[int]]:
        while True:
            try:
                data, ancillary, _, _ = self._stream.recvmsg(wire.LONGEST_REPLY_BYTES, _ANCILLARY_BYTES, _CMSG_CLOEXEC)
            except OSError as error:
                raise self._gone(error) from None
            descriptors: list[int] = []
            for level, kind, rights in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors += memoryview(rights).cast("i")
            if not data:
                raise self._gone(None)
            status, answered = wire.REPLY.unpack_from(data)
            if answered == serial:
                return status, data[wire.REPLY.size :], descriptors
            _close_all(descriptors)  # of a call that an exception (KeyboardInterrupt) left before its reply came

    def _gone(self, error: OSError | None) -> HypervisorGoneError:
        if self.closed:
            return HypervisorGoneError(errno.EBADF, "the domain is closed: open a new one")
        why = f" ({error.strerror})" if error is not None else ""
        text = f"hypervisor({self.path}): it ended or dropped this domain{why}: open a new Domain once one is there"
        return HypervisorGoneError(errno.ECONNRESET, text)


def _connect(path: str) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        stream.connect(path)
    except OSError as error:
        stream.close()
        if error.errno not in _NOT_THERE:
            raise grant_refused(error.errno or errno.EIO, f"hypervisor({path}): connect: {error.strerror}") from None
        text = f"hypervisor({path}): none listens there: start `usermm hypervisor --socket {path}`"
        raise HypervisorGoneError(error.errno, text) from None
    except (TypeError, ValueError) as error:  # a null byte, a name that is too long for a socket
        stream.close()
        raise ArgumentError(f"hypervisor({path!r}): {error}") from None
    return stream


def _refusal(status: int, answer: bytes) -> Refusal:
    code, index = wire.REFUSAL.unpack_from(answer)
    return Refusal(-status, code, index, answer[wire.REFUSAL.size :].decode(errors="replace"))


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def status(path: str) -> dict[str, Any]:
    """What the hypervisor at `path` says of itself; for those whom its policy lets read it, without being a domain."""
    session = Session(path)
    try:
        answer, descriptors = session.call(Operation.STATUS)
    finally:
        session.close()
    with open(descriptors[0], "rb") as text:
        (length,) = wire.STATUS.unpack(answer)
        found: dict[str, Any] = json.loads(os.pread(text.fileno(), length, 0))
    return found
