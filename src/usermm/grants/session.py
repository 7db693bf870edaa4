"""A domain's connection to the hypervisor: requests, replies, descriptors."""

from __future__ import annotations

import collections
import errno
import json
import os
import socket
from typing import Any

from usermm._core import has_hung_up, process
from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    DeviceError,
    ForkedError,
    HypervisorGoneError,
    grant_refused,
)
from usermm.grants.alone import Alone, Rank
from usermm.grants.undoing import undoing
from usermm.hypercalls import wire
from usermm.hypercalls.addresses import default_addresses
from usermm.hypercalls.wire import Operation

_CMSG_CLOEXEC = 0x40000000  # MSG_CMSG_CLOEXEC, recvmsg(2): no descriptor leaks into a program started meanwhile
_ANCILLARY_BYTES = socket.CMSG_SPACE(wire.MOST_DESCRIPTORS * 4)
_REPLY = (wire.LONGEST_REPLY_BYTES,), (_ANCILLARY_BYTES,), (_CMSG_CLOEXEC,)
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
    """Any thread may call. A forked child has none of it: it opens a domain of its own.

    Not so a signal handler that interrupts a call of its own thread, and finalizers in a hypervisor's thread: they get
    GrantError (EDEADLK), and may tell() and close().
    """

    def __init__(self, path: str) -> None:
        """Connects. Raises HypervisorGoneError (ECONNREFUSED, ENOENT) where no hypervisor listens at `path`."""
        self.path = path
        self._stream = _connect(path)
        self._alone = Alone(Rank.SESSION)
        self._told: collections.deque[bytes] = collections.deque()
        self._arrived: collections.deque[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = collections.deque()
        """The packet that is being looked at."""
        self._serial = 0
        self._left: dict[int, tuple[Operation, bytes]] = {}
        """Requests whose caller was interrupted: their replies come before the next one's."""
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
        """As `call`, but raises Refusal. HypervisorGoneError once the hypervisor ended; ForkedError in a child;
        LimitError (EMFILE): no room for the descriptors of its reply, which is undone."""
        if process() != self._owner:
            raise ForkedError(errno.ECHILD, f"{operation.name.lower()}: the domain is the parent's: open one here")
        return self._alone.run(operation.name.lower(), lambda: self._exchange(operation, payload))

    def check(self) -> None:
        """What needs no request fails as one would: HypervisorGoneError once it ended, ForkedError in a child."""
        if process() != self._owner:
            raise ForkedError(errno.ECHILD, "the domain is the parent's: open one in this child")
        descriptor = self._stream.fileno()
        if descriptor < 0 or has_hung_up(descriptor):
            raise self._gone(None)

    def check_free(self, call: str) -> None:
        """Before what only a request can complete. As check(); GrantError (EDEADLK) where none can be made now."""
        self._alone.check(call)
        self.check()

    def tell(self, operation: Operation, payload: bytes) -> None:
        """Sends a request that has no reply. Never waits and never fails: finalizers call it.

        What cannot be sent at once goes before the next request: this thread may be within one, or be the hypervisor's,
        which reads nothing meanwhile.
        """
        if process() == self._owner:
            self._told.append(wire.REQUEST.pack(operation, wire.NO_REPLY, 0) + payload)
            self._alone.finish(self._send_told, wait=False)

    def say(self, operation: Operation, payload: bytes) -> None:
        """It is carried out on return, wherever this thread may wait for that; else it is told. Never fails."""
        try:
            self.request(operation, payload)
        except Refusal:
            return
        except DeviceError as error:
            if error.errno == errno.EDEADLK:
                self.tell(operation, payload)

    def close(self) -> None:
        """The domain ends. May be called again."""
        if process() != self._owner:
            self._stream.close()  # not shut down: the parent goes on
        else:
            self._alone.finish(self._close, wait=True)

    def _close(self) -> None:
        self._send_told()
        self._stream.close()

    @property
    def is_inherited(self) -> bool:
        """Whether this is a child of the process whose domain it is."""
        return process() != self._owner

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._stream.fileno() < 0

    def _send_told(self, flags: int = socket.MSG_DONTWAIT) -> None:
        while self._told:
            packet = self._told.popleft()
            try:
                self._stream.send(packet, flags)
            except BlockingIOError:
                self._told.appendleft(packet)
                return
            except OSError:
                self._told.clear()  # it ended: it knows

    def _exchange(self, operation: Operation, payload: bytes) -> tuple[bytes, list[int]]:
        self._send_told(0)
        self._serial = serial = self._serial + 1 & 0xFFFFFFFF
        try:
            try:
                self._stream.send(wire.REQUEST.pack(operation, 0, serial) + payload)
            except OSError as error:
                raise self._failed(error) from None
            status, answer, descriptors, is_cut = self._reply(serial)
        except (HypervisorGoneError, ClosedError):
            raise
        except BaseException:  # KeyboardInterrupt, or what else a signal handler raises
            self._left[serial] = operation, payload
            raise
        if status:
            _close_all(descriptors)
            raise _refusal(status, answer)
        if is_cut:
            _close_all(descriptors)
            self._undo(operation, payload, answer)
            text = "no descriptor is free for the reply, nothing was changed: close some (ulimit -n)"
            raise grant_refused(errno.EMFILE, f"{operation.name.lower()}: {text}")
        return answer, descriptors

    def _reply(self, serial: int) -> tuple[int, bytes, list[int], bool]:
        """(status, payload, descriptors, whether some of them are missing)."""
        while True:
            if not self._arrived:
                try:  # without an instruction between receiving it and having it, where a signal handler could raise
                    self._arrived.extend(map(self._stream.recvmsg, *_REPLY))
                except OSError as error:
                    raise self._failed(error) from None
            data, ancillary, flags, _ = self._arrived[0]
            descriptors: list[int] = []
            for level, kind, rights in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors += memoryview(rights).cast("i")
            if not data:
                self._arrived.popleft()
                raise self._gone(None)
            status, answered = wire.REPLY.unpack_from(data)
            answer = data[wire.REPLY.size :]
            if answered == serial:
                self._left.clear()  # replies keep the requests' order
                self._arrived.popleft()
                return status, answer, descriptors, bool(flags & socket.MSG_CTRUNC)
            self._arrived.popleft()
            _close_all(descriptors)
            left = self._left.pop(answered, None)
            if left is not None and not status:
                self._undo(*left, answer)

    def _undo(self, operation: Operation, payload: bytes, answer: bytes) -> None:
        undo = undoing(operation, payload, answer)
        if undo is not None:
            self.tell(*undo)

    def _failed(self, error: OSError) -> OSError:
        """What became of the connection; or a signal handler raised it, as TimeoutError, for example."""
        is_over = self.closed or has_hung_up(self._stream.fileno())
        return self._gone(error) if is_over else error

    def _gone(self, error: OSError | None) -> DeviceError:
        if self.closed:
            return ClosedError(errno.EBADF, "the domain is closed: open a new one")
        why = f" ({error.strerror})" if error is not None else ""
        text = f"hypervisor({self.path}): it ended or dropped this domain{why}: open a new Domain once one is there"
        return HypervisorGoneError(errno.ECONNRESET, text)


def connect(path: str | os.PathLike[str] | None) -> Session:
    """To the hypervisor at `path`, or at the first default address where one listens. Raises as Session."""
    if path is not None:
        try:
            return Session(os.fspath(path))
        except TypeError:
            raise ArgumentTypeError(f"hypervisor({path!r:.60}): pass the path of its socket") from None
    *others, last = default_addresses()
    for address in others:
        try:
            return Session(address)
        except HypervisorGoneError:  # none listens there, or its socket outlived it
            continue
    return Session(last)


def _connect(path: str) -> socket.socket:
    try:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:  # EMFILE, ENFILE
        raise grant_refused(error.errno or errno.EIO, f"hypervisor({path}): socket: {error.strerror}") from None
    stream.settimeout(None)  # not what socket.setdefaulttimeout says
    try:
        stream.connect(path)
    except OSError as error:
        stream.close()
        if error.errno not in _NOT_THERE:
            hint = ": its --mode, or the directory's, is for others" if error.errno == errno.EACCES else ""
            text = f"hypervisor({path}): connect: {error.strerror}{hint}"
            raise grant_refused(error.errno or errno.EIO, text) from None
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


def status(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """What the hypervisor at `path` says of itself; for those whom its policy lets read it, without being a domain."""
    session = connect(path)
    try:
        answer, descriptors = session.call(Operation.STATUS)
    finally:
        session.close()
    with open(descriptors[0], "rb") as text:
        (length,) = wire.STATUS.unpack(answer)
        found: dict[str, Any] = json.loads(os.pread(text.fileno(), length, 0))
    return found
