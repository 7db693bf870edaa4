"""The event channels' device between Linux processes: an epoll over one socket a port.

An event is a byte in the port's socket, so any number of notifications is one event once taken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from usermm._core import Memory
from usermm.errors import DeviceError, WouldBlockError, grant_refused
from usermm.grants.alone import Alone, Rank
from usermm.grants.arguments import unsigned
from usermm.grants.event_ports import AT_ONCE, EVENT, LONGEST_WAIT_S, BoundPort, EventPorts, hang_up
from usermm.grants.session import Session
from usermm.hypercalls import ports as layouts
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED, DOMID_SELF, Operation
from usermm.uapi import xen_evtchn
from usermm.ummunotify.arguments import deadline_s

_open_files: weakref.WeakSet[LocalEvtchn] = weakref.WeakSet()


class _Reading:
    """A call of take(): it is inside as long as its frame lives, whatever interrupts it."""

    __slots__ = ("__weakref__",)


class LocalEvtchn:
    """A DeviceFile with read and write. Any thread may call anything; a forked child gets ForkedError (ECHILD).

    There is no overflow (EFBIG of the real device, whose ring of ports can be full): what is pending stays in the
    ports' sockets, and each port is at most once in an answer.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._alone = Alone(Rank.FILE)
        self._inside: weakref.WeakSet[_Reading] = weakref.WeakSet()
        self._restricted_to: int | None = None
        self._refusal = 0  # EBADF once closed, ECHILD in a child
        self._ports = EventPorts(self._ask_for_end)
        self._senders = self._ports.senders
        self._abandoned: deque[BoundPort] = deque()
        _open_files.add(self)

    def __del__(self) -> None:
        if hasattr(self, "_senders"):
            self.close()

    # A driver's calls

    def ioctl(self, request: int, argument: bytearray | memoryview) -> int:
        """The port for the BIND requests, 0 for the others. `argument` may be empty for RESET.

        ENOSYS unknown request; EFAULT `argument` is shorter than the request's; ENOTCONN the port is not this file's;
        EACCES not with a restricted file; EINVAL, EPERM, EEXIST, ESRCH, ENOSPC from the hypervisor.
        """
        self._refuse_if_unusable("ioctl")
        if request == xen_evtchn.NOTIFY:
            self.notify(_fields(argument, "notify", xen_evtchn.PORT.unpack_from)[0])
        elif request == xen_evtchn.UNBIND:
            self._unbind(*_fields(argument, "unbind", xen_evtchn.PORT.unpack_from))
        elif request == xen_evtchn.BIND_UNBOUND_PORT:
            return self._bind_unbound(*_fields(argument, "bind_unbound_port", xen_evtchn.UNBOUND.unpack_from))
        elif request == xen_evtchn.BIND_INTERDOMAIN:
            return self._bind_interdomain(*_fields(argument, "bind_interdomain", xen_evtchn.INTERDOMAIN.unpack_from))
        elif request == xen_evtchn.BIND_VIRQ:
            return self._bind_virq(*_fields(argument, "bind_virq", xen_evtchn.VIRQ.unpack_from))
        elif request == xen_evtchn.RESTRICT_DOMID:
            self._restrict(*_fields(argument, "restrict", xen_evtchn.RESTRICTION.unpack_from))
        elif request == xen_evtchn.RESET:
            while self.take(0):
                pass
        else:
            raise grant_refused(errno.ENOSYS, f"ioctl(evtchn, {request:#x}): no such request: see uapi.xen_evtchn")
        return 0

    def read(self, size: int) -> bytes:
        """Ports with an event, u32 each; they are masked from now on. Never waits: EAGAIN (WouldBlockError).

        `size` is rounded down to whole ports, and 0 gives nothing.
        """
        self._refuse_if_unusable("read")
        most = min(size // xen_evtchn.PORT.size, xen_evtchn.MOST_PORTS_READ)
        if most <= 0:
            return b""
        ports = self.take(0, most)
        if not ports:
            raise WouldBlockError(errno.EAGAIN, "read(evtchn): no port has an event: poll fileno()")
        return b"".join(map(xen_evtchn.PORT.pack, ports))

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Unmasks these ports, u32 each; returns the bytes taken. Ports that are not this file's are passed over."""
        length = min(len(data) - len(data) % xen_evtchn.PORT.size, xen_evtchn.MOST_PORTS_READ * xen_evtchn.PORT.size)
        self.unmask([port for (port,) in xen_evtchn.PORT.iter_unpack(data[:length])])
        return length

    def mmap(self, length: int, prot: int, flags: int, offset: int, kind: Any = Memory) -> Any:  # noqa: ARG002
        """Always raises DeviceError (ENODEV): there is nothing to map."""
        raise grant_refused(errno.ENODEV, f"mmap(evtchn, {length}, {prot}, {flags}, {offset}): it has no memory")

    def fileno(self) -> int:
        """Readable while a port that is not masked has an event."""
        self._refuse_if_unusable("fileno")
        return self._ports.epoll.fileno()

    def close(self) -> None:
        """Unbinds its ports: the peers see a hang-up. Threads that wait get ClosedError. May be called again."""
        self._alone.finish(self._close, wait=True)

    def _close(self) -> None:
        if self._refusal:
            return
        self._refusal = errno.EBADF
        for number, port in list(self._ports.by_number.items()):
            stream = self._ports.remove(port)
            self._session.tell(Operation.PORT_CLOSE, layouts.PORT.pack(number))
            hang_up(stream)
        self._ports.ring()
        if not self._inside:
            self._ports.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called, or this is a forked child."""
        return bool(self._refusal)

    # The same without packing

    def notify(self, port: int) -> None:
        """An event for the peer; nothing where nobody is bound. Never waits. ENOTCONN: not our port."""
        try:
            self._senders[port](EVENT, AT_ONCE)
        except (KeyError, TypeError):
            self._refuse_if_unusable("notify")
            raise _no_such_port("notify", unsigned(port, 32, "notify: port")) from None
        except OSError:
            # EAGAIN: events wait there already, as many as the socket holds. EPIPE, ECONNRESET: the peer is gone, and
            # Xen drops it silently. EBADF: another thread has just closed it.
            pass

    def take(self, timeout: float | None, most: int = xen_evtchn.MOST_PORTS_READ) -> list[int]:
        """The ports with an event, which are masked from now on; waits for one, `timeout` seconds at most."""
        deadline = deadline_s(timeout)
        wait_s = _within(timeout)
        reading = _Reading()
        try:
            self._alone.run("read", lambda: self._enter(reading))
            while True:
                changes = self._ports.changes
                ready = self._ports.epoll.poll(wait_s, most)
                if not ready and time.monotonic() >= deadline:
                    return []
                ports = self._alone.run("read", lambda: self._take(ready, changes))  # noqa: B023 - it is run at once
                if ports:
                    return ports
                wait_s = _within(deadline - time.monotonic())
        finally:
            self._alone.finish(lambda: self._leave(reading), wait=True)

    def _take(self, ready: list[tuple[int, int]], changes: int) -> list[int]:
        self._refuse_if_unusable("read")
        self._ports.try_again()
        return self._ports.take(ready, changes)

    def unmask(self, ports: Collection[int]) -> None:
        """What came since the port was masked is reported now. Ports that are not this file's are passed over."""
        self._alone.do("unmask", lambda: self._unmask(ports))

    def _unmask(self, numbers: Collection[int]) -> None:
        self._refuse_if_unusable("unmask")
        for number in numbers:
            port = self._ports.by_number.get(number)
            if port is not None and port.masked:
                self._ports.unmask(port)

    def mask(self, number: int) -> None:
        """Its events wait until it is unmasked. ENOTCONN."""
        self._alone.do("mask", lambda: self._ports.mask(self._find(number, "mask")))

    def pending(self) -> frozenset[int]:
        """The ports whose events were not taken yet, masked or not."""
        return self._alone.run("pending", self._pending)

    def _pending(self) -> frozenset[int]:
        self._refuse_if_unusable("pending")
        return self._ports.pending()

    def borrow(self, number: int) -> tuple[BoundPort, socket.socket]:
        """The port, masked, and a copy of its socket for a Waiter. ENOTCONN; HypervisorGoneError where it has none."""
        return self._alone.run("waiter", lambda: self._borrow(number))

    def _borrow(self, number: int) -> tuple[BoundPort, socket.socket]:
        port = self._find(number, "waiter")
        self._ports.mask(port)
        return port, self._ports.lend(port)

    def renew(self, port: BoundPort, hang_ups: int) -> socket.socket:
        """As `borrow` after a hang-up, `hang_ups` being how many the Waiter has known of."""
        return self._alone.run("wait", lambda: self._renew(port, hang_ups))

    def _renew(self, port: BoundPort, hang_ups: int) -> socket.socket:
        if self._find(port.number, "wait") is not port:
            raise _no_such_port("wait", port.number)
        if port.hang_ups == hang_ups:
            self._ports.rearm(port)
        return self._ports.lend(port)

    def abandon(self, port: BoundPort) -> None:
        """For finalizers: it is unbound before the next one is bound. Takes no lock."""
        self._abandoned.append(port)

    # Ports come and go

    def _bind_unbound(self, remote: int) -> int:
        self._refuse_if_restricted("bind_unbound_port", None)
        return self._bind(Operation.PORT_UNBOUND, layouts.UNBOUND.pack(_domid(remote, "bind_unbound_port")))

    def _bind_interdomain(self, remote: int, port: int) -> int:
        self._refuse_if_restricted("bind_interdomain", remote)
        payload = layouts.INTERDOMAIN.pack(_domid(remote, "bind_interdomain"), port)
        return self._bind(Operation.PORT_INTERDOMAIN, payload)

    def _bind_virq(self, virq: int) -> int:
        self._refuse_if_restricted("bind_virq", None)
        return self._bind(Operation.PORT_VIRQ, layouts.VIRQ.pack(virq))

    def _bind(self, operation: Operation, payload: bytes) -> int:
        while self._abandoned:
            port = self._abandoned.popleft()
            if self._ports.by_number.get(port.number) is port:
                with contextlib.suppress(DeviceError):
                    self._unbind(port.number)
        self._alone.check("bind")  # before there is a port that nobody has
        answer, descriptors = self._session.call(operation, payload)
        (number,) = layouts.PORT.unpack(answer)
        try:
            self._alone.run("bind", lambda: self._add(number, descriptors))
        except BaseException:
            self._session.tell(Operation.PORT_CLOSE, answer)
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return int(number)

    def _add(self, number: int, descriptors: list[int]) -> None:
        """Takes the descriptor out of the list."""
        self._refuse_if_unusable("bind")
        self._ports.add(number, descriptors.pop())

    def _unbind(self, number: int) -> None:
        self._alone.do("unbind", lambda: self._remove(self._find(number, "unbind")))

    def _remove(self, port: BoundPort) -> None:
        """The hypervisor is told first: whoever sees the hang-up and asks it finds the port closed."""
        stream = self._ports.remove(port)
        self._session.say(Operation.PORT_CLOSE, layouts.PORT.pack(port.number))
        hang_up(stream)

    def _restrict(self, domid: int) -> None:
        if self._restricted_to is not None:
            text = f"restrict({domid}): the file is restricted to {self._restricted_to} already: open another"
            raise grant_refused(errno.EACCES, text)
        if not 0 < domid < DOMID_FIRST_RESERVED:
            raise grant_refused(errno.EINVAL, f"restrict({domid}): pass a domid from 1 to {DOMID_FIRST_RESERVED - 1}")
        self._restricted_to = domid

    def _refuse_if_restricted(self, call: str, remote: int | None) -> None:
        if self._restricted_to not in (None, remote):
            reason = f"the file is restricted to domain {self._restricted_to}: open another"
            raise grant_refused(errno.EACCES, f"{call}({'' if remote is None else f'domain {remote}'}): {reason}")

    def _ask_for_end(self, number: int) -> int:
        _, descriptors = self._session.call(Operation.PORT_REARM, layouts.PORT.pack(number))
        return descriptors[0]

    def _find(self, number: int, call: str) -> BoundPort:
        self._refuse_if_unusable(call)
        port = self._ports.by_number.get(number)
        if port is None:
            raise _no_such_port(call, number)
        return port

    # Closing while others are inside

    def _enter(self, reading: _Reading) -> None:
        self._refuse_if_unusable("read")
        self._inside.add(reading)
        self._ports.try_again()

    def _leave(self, reading: _Reading) -> None:
        if reading in self._inside:
            self._inside.discard(reading)
            if self._refusal == errno.EBADF and not self._inside:
                self._ports.close()

    def _refuse_if_unusable(self, call: str) -> None:
        if self._refusal == errno.ECHILD:
            text = f"{call}(evtchn): it belongs to the parent process: open a domain in this child"
            raise grant_refused(errno.ECHILD, text)
        if self._refusal:
            raise grant_refused(errno.EBADF, f"{call}(evtchn): it is closed: open a new one")

    def _become_a_childs(self) -> None:
        """The child's copies are closed: without a hypervisor they would keep the peers from seeing this domain's end.

        Another thread of the parent may have been inside, so nobody waits for it; there is no other thread here.
        """
        self._alone = Alone(Rank.FILE)
        if not self._refusal:
            self._refusal = errno.ECHILD
            self._ports.close_copies()


def _close_copies_of_all() -> None:
    for file in list(_open_files):
        file._become_a_childs()


os.register_at_fork(after_in_child=_close_copies_of_all)


def _within(seconds: float | None) -> float:
    """What epoll_wait(2) takes at most, and more often than never."""
    return LONGEST_WAIT_S if seconds is None else max(0.0, min(seconds, LONGEST_WAIT_S))


def _fields(argument: bytearray | memoryview, call: str, unpack: Callable[..., tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return unpack(argument)
    except struct.error:
        text = f"{call}: {len(argument)} bytes are too few: see usermm.uapi.xen_evtchn"
        raise grant_refused(errno.EFAULT, text) from None


def _domid(remote: int, call: str) -> int:
    if remote > DOMID_SELF:
        _refuse_domid(remote, call)
    return remote


def _refuse_domid(remote: int, call: str) -> NoReturn:
    raise grant_refused(errno.EINVAL, f"{call}(domain {remote}): domids are below {DOMID_FIRST_RESERVED:#x}")


def _no_such_port(call: str, port: int) -> DeviceError:
    return grant_refused(errno.ENOTCONN, f"{call}(port {port}): this file has not bound it: bind one, or use its file")
