"""`ModelEvtchn`: /dev/xen/evtchn of a model domain."""

from __future__ import annotations

import errno
import select

from usermm.errors import from_errno, grant_refused
from usermm.testing.grant_channels import Port
from usermm.testing.grant_layouts import Argument, copy_in, unknown
from usermm.testing.grant_machine import DOMID_FIRST_RESERVED, ModelDomain
from usermm.uapi import xen_evtchn as uapi

_PORT_BYTES = uapi.PORT.size
_MOST_BYTES = uapi.MOST_PORTS_READ * _PORT_BYTES


class ModelEvtchn:
    """One open file; a port belongs to the file that bound it. Never blocks: EAGAIN when nothing is there."""

    def __init__(self, domain: ModelDomain) -> None:
        self.closed = False
        self._domain = domain
        self._channels = domain.machine.channels
        self._ports: dict[int, Port] = {}
        self._restricted: int | None = None
        domain.files.append(self)

    def ioctl(self, request: int, argument: Argument) -> int:
        """The bind calls return the port. DeviceError: EBADF, EFAULT, ENOSYS for an unknown request, and below."""
        self._check_open()
        if request == uapi.BIND_VIRQ:
            return self._bind_virq(*copy_in(argument, uapi.VIRQ))
        if request == uapi.BIND_INTERDOMAIN:
            return self._bind_interdomain(*copy_in(argument, uapi.INTERDOMAIN))
        if request == uapi.BIND_UNBOUND_PORT:
            return self._bind_unbound(*copy_in(argument, uapi.UNBOUND))
        if request == uapi.UNBIND:
            port = self._own(*copy_in(argument, uapi.PORT))
            del self._ports[port.number]
            self._channels.close(port)
        elif request == uapi.NOTIFY:
            port = self._own(*copy_in(argument, uapi.PORT))
            self._channels.send(port.domid, port.number)
        elif request == uapi.RESET:
            self._take(len(self._ports))
        elif request == uapi.RESTRICT_DOMID:
            self._restrict(*copy_in(argument, uapi.RESTRICTION))
        else:
            raise unknown("evtchn", request, errno.ENOSYS)
        return 0

    def _bind_virq(self, virq: int) -> int:
        if self._restricted is not None:
            raise grant_refused(errno.EACCES, "BIND_VIRQ: the file is restricted")
        return self._bound(self._channels.bind_virq(self._domain.domid, virq, control=self._domain.control))

    def _bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        if self._restricted not in (None, remote_domid):
            raise grant_refused(errno.EACCES, f"bind({remote_domid}): the file is restricted to {self._restricted}")
        return self._bound(self._channels.bind_interdomain(self._domain.domid, remote_domid, remote_port))

    def _bind_unbound(self, remote_domid: int) -> int:
        """Who would bind it is anybody's choice: a restricted file has none."""
        if self._restricted is not None:
            raise grant_refused(errno.EACCES, "BIND_UNBOUND_PORT: the file is restricted")
        return self._bound(self._channels.bind_unbound(self._domain.domid, remote_domid))

    def _bound(self, port: Port) -> int:
        self._ports[port.number] = port
        return port.number

    def _own(self, number: int) -> Port:
        port = self._ports.get(number)
        if port is None:
            raise grant_refused(errno.ENOTCONN, f"port {number}: not bound by this file")
        return port

    def _restrict(self, domid: int) -> None:
        """EACCES: done before. EINVAL: domain 0, or no domain's number."""
        if self._restricted is not None:
            raise grant_refused(errno.EACCES, f"RESTRICT_DOMID({domid}): restricted to {self._restricted} already")
        if not 0 < domid < DOMID_FIRST_RESERVED:
            raise grant_refused(errno.EINVAL, f"RESTRICT_DOMID({domid}): not a domain to be restricted to")
        self._restricted = domid

    def read(self, size: int) -> bytes:
        """Ports with an event, u32 each, as many as `size` holds; each is masked from here on. EAGAIN: none."""
        self._check_open()
        count = min(size, _MOST_BYTES) // _PORT_BYTES
        if not count:
            return b""
        taken = self._take(count)
        if not taken:
            raise grant_refused(errno.EAGAIN, "read(evtchn): no event")
        return b"".join(uapi.PORT.pack(number) for number in taken)

    def _take(self, count: int) -> list[int]:
        ready = [port for port in self._ports.values() if port.readable][:count]
        for port in ready:
            port.pending, port.masked = False, True
        return [port.number for port in ready]

    def write(self, data: bytes) -> int:
        """Unmasks ports; those that are not of this file mean nothing. Whole u32 only."""
        self._check_open()
        length = min(len(data), _MOST_BYTES) // _PORT_BYTES * _PORT_BYTES
        for (number,) in uapi.PORT.iter_unpack(data[:length]):
            if number in self._ports:
                self._ports[number].masked = False
        return length

    def poll(self) -> int:
        """POLLIN or nothing."""
        self._check_open()
        return select.POLLIN if any(port.readable for port in self._ports.values()) else 0

    def close(self) -> None:
        """Unbinds its ports."""
        if not self.closed:
            self.closed = True
            self._domain.files.remove(self)
            for port in self._ports.values():
                self._channels.close(port)
            self._ports.clear()

    def _check_open(self) -> None:
        if self.closed:
            raise from_errno(errno.EBADF, "evtchn: the file is closed: open another")
