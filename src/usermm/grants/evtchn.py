"""`Evtchn`: event channels, a pleasant API over the exact ABI, on a real Xen or between Linux processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import select
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from usermm.errors import ClosedError, grant_refused
from usermm.grants.arguments import unsigned
from usermm.grants.device import Device
from usermm.grants.event_ports import LONGEST_WAIT_S
from usermm.grants.files import DeviceFile
from usermm.grants.local_evtchn import LocalEvtchn
from usermm.grants.waiter import Waiter
from usermm.uapi import xen_evtchn
from usermm.ummunotify.arguments import deadline_s


class EvtchnFile(DeviceFile, Protocol):
    """A DeviceFile that can be read and written; O_NONBLOCK is set on its descriptor."""

    def read(self, size: int) -> bytes:
        """Ports with an event, u32 each. BlockingIOError: there is none. EFBIG: the ring of a real device overflowed"""

    def write(self, data: bytes) -> int:
        """Unmasks these ports."""


class Evtchn(Device[EvtchnFile]):
    """Event channels of one file: ports that tell another domain "look", and are told.

    A port that read() has given is masked: what comes is kept, as one event however often it comes, until the port is
    given back to unmask(). The peer's end, by close or by death, is an event too; then the port waits for the same
    domain to bind it again. Any thread may call anything; a forked child gets ForkedError (ECHILD).
    """

    def __init__(self, file: EvtchnFile) -> None:
        super().__init__(file)
        self._local = file if isinstance(file, LocalEvtchn) else None
        self._wakers: set[Callable[[], object]] = set()
        if self._local is None:
            os.set_blocking(file.fileno(), False)

    def bind_unbound_port(self, remote_domid: int) -> int:
        """A port that domain `remote_domid` may bind (DOMID_SELF 0x7FF0: this one); the lowest free one from 1.

        Tell the other domain its number, by the store for example. QuotaError (ENOSPC): max_event_channels; LimitError;
        BadReferenceError (EINVAL): no domid; PermissionDeniedError (EACCES): the file is restricted.
        """
        number = _domid(remote_domid, "bind_unbound_port: remote_domid")
        return self._call(xen_evtchn.BIND_UNBOUND_PORT, xen_evtchn.UNBOUND.pack(number))

    def bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        """A port bound to port `remote_port` of domain `remote_domid`, which has made it for this domain.

        It has an event from the start, as on Xen: look whether there is something to do. BadReferenceError (EINVAL): no
        such port, bound already, or made for another; GrantError (ESRCH): no such domain; PermissionDeniedError
        (EACCES): the file is restricted to another; otherwise as the call above.
        """
        domid = _domid(remote_domid, "bind_interdomain: remote_domid")
        fields = domid, unsigned(remote_port, 32, "bind_interdomain: remote_port")
        return self._call(xen_evtchn.BIND_INTERDOMAIN, xen_evtchn.INTERDOMAIN.pack(*fields))

    def bind_virq(self, virq: int) -> int:
        """A port for a virtual interrupt: VIRQ_DOM_EXC (3), a domain has ended.

        PermissionDeniedError (EPERM): only for domain 0 and whom the policy gives control; (EACCES): the file is
        restricted; GrantError (EEXIST): the domain has a port for it; BadReferenceError (EINVAL): no such number.
        """
        return self._call(xen_evtchn.BIND_VIRQ, xen_evtchn.VIRQ.pack(unsigned(virq, 32, "virq")))

    def unbind(self, port: int) -> None:
        """Gives the port up: its events are gone, the peer is told by an event. GrantError (ENOTCONN): not our port."""
        self._call(xen_evtchn.UNBIND, xen_evtchn.PORT.pack(unsigned(port, 32, "port")))

    def notify(self, port: int) -> None:
        """An event for the peer; nothing where nobody is bound. Never waits. GrantError (ENOTCONN): not our port.

        What this thread wrote to shared memory before is seen by who takes the event.
        """
        if self._local is not None:
            self._local.notify(port)
        else:
            self._call(xen_evtchn.NOTIFY, xen_evtchn.PORT.pack(unsigned(port, 32, "port")))

    def read(self, timeout: float | None = None) -> list[int]:
        """The ports that have an event, masked from now on; waits `timeout` seconds at most ([] then), None for ever.

        Signal handlers run while it waits. Without Xen, close() from another thread ends it with ClosedError.
        On Xen DeviceError (EFBIG) tells that events were lost to an overflow: reset(), look at all rings, unmask all.
        """
        if self._local is not None:
            return self._local.take(timeout)
        deadline = deadline_s(timeout)
        while True:
            try:
                data = self._file.read(xen_evtchn.MOST_PORTS_READ * xen_evtchn.PORT.size)
            except BlockingIOError:
                left_s = None if timeout is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return []
                self._wait(left_s)
            else:
                return [port for (port,) in xen_evtchn.PORT.iter_unpack(data)]

    def unmask(self, *ports: int) -> None:
        """Their events are read again: what came since, at once. Ports that are not this file's are passed over."""
        numbers = [unsigned(port, 32, "unmask: port") for port in ports]
        if self._local is not None:
            self._local.unmask(numbers)
        else:
            self._file.write(b"".join(map(xen_evtchn.PORT.pack, numbers)))

    def mask(self, port: int) -> None:
        """Its events are kept until it is unmasked. ENOTCONN; EOPNOTSUPP on Xen, where only reading masks."""
        self._only_local("mask").mask(unsigned(port, 32, "port"))

    def pending(self) -> frozenset[int]:
        """The ports that have an event, masked or not; takes nothing. DeviceError (EOPNOTSUPP) on Xen."""
        return self._only_local("pending").pending()

    def waiter(self, port: int) -> Waiter:
        """The fast path for a thread that waits for one port; masks it. ENOTCONN; DeviceError (EOPNOTSUPP) on Xen."""
        return Waiter(self._only_local("waiter"), unsigned(port, 32, "port"))

    def restrict(self, domid: int) -> None:
        """From now on only ports of domain `domid` can be bound, by bind_interdomain, and nothing else; for good.

        PermissionDeniedError (EACCES): it is restricted already; BadReferenceError (EINVAL): 0, or no domid.
        """
        number = _domid(domid, "restrict: domid")
        self._call(xen_evtchn.RESTRICT_DOMID, xen_evtchn.RESTRICTION.pack(number))

    def reset(self) -> None:
        """Forgets the events that are there now; their ports are masked until unmask() gives them back."""
        self._call(xen_evtchn.RESET, b"")

    def fileno(self) -> int:
        """For poll: readable while read() has something. ClosedError."""
        return self._file.fileno()

    def close(self) -> None:
        """Unbinds all ports of the file; the peers see it as an event. Iterations end. May be called again."""
        self._file.close()
        for wake in list(self._wakers):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                wake()

    async def __aiter__(self) -> AsyncIterator[int]:
        """Ports as their events come, under asyncio, each masked until it is unmasked. Ends when the file is closed."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def wake() -> object:
            return loop.call_soon_threadsafe(ready.set)

        descriptor = -1
        self._wakers.add(wake)
        try:
            descriptor = os.dup(self.fileno())  # ours until it is out of the loop, whenever the file is closed
            while True:
                ready.clear()
                try:
                    data = self._file.read(xen_evtchn.PORT.size)  # one: what is not taken stays when the iteration ends
                except BlockingIOError:
                    loop.add_reader(descriptor, ready.set)  # not longer, or the loop would spin beside a slow consumer
                    try:
                        await ready.wait()
                    finally:
                        loop.remove_reader(descriptor)
                else:
                    yield xen_evtchn.PORT.unpack(data)[0]
        except ClosedError:
            return
        finally:
            self._wakers.discard(wake)
            if descriptor >= 0:
                os.close(descriptor)

    def _wait(self, timeout_s: float | None) -> None:
        poller = select.poll()  # select() knows no descriptor above 1023
        poller.register(self._file.fileno(), select.POLLIN)
        poller.poll(None if timeout_s is None else math.ceil(min(timeout_s, LONGEST_WAIT_S) * 1000))

    def _call(self, request: int, argument: bytes) -> int:
        return self._file.ioctl(request, bytearray(argument))

    def _only_local(self, call: str) -> LocalEvtchn:
        if self._local is None:
            raise grant_refused(errno.EOPNOTSUPP, f"{call}(evtchn): a real Xen's device has no such call: use read()")
        return self._local


def _domid(value: int, name: str) -> int:
    """EINVAL: more than 16 bits, of which Linux' driver would take the lower ones."""
    number = unsigned(value, 32, name)
    if number >= 1 << 16:
        raise grant_refused(errno.EINVAL, f"{name} {number}: a domid has 16 bits")
    return number
