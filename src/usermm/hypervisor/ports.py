"""Event channels: which ports there are, who may bind them, and the two ends of each.

A pair of ports is a socketpair: an event is a byte. Each domain is given its end, and the hypervisor keeps a copy of
both. So it can send in the name of a domain that crashed, and a death is seen once the hypervisor has seen it: it shuts
the pair down, which holds for every copy that a forked child may have.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import heapq
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from usermm.hypercalls import ports as layouts
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED, DOMID_SELF
from usermm.hypervisor.calls import Refused, Reply
from usermm.hypervisor.closer import MOST_BURDENS, Closer
from usermm.hypervisor.connections import refuse_descriptors
from usermm.hypervisor.domains import DomainRecord
from usermm.uapi.xen_evtchn import VIRQ_DOM_EXC

_EVENT: Final = b"\1"
# Never by O_NONBLOCK: the flag is the socket's, so whoever has a copy of the descriptor could clear it.
_AT_ONCE: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


@dataclass(slots=True, eq=False)
class Port:
    """One domain's port. Without `peer` it waits for `remote` to bind it, or is a virtual interrupt's."""

    domid: int
    number: int
    remote: int
    close: Callable[[socket.socket], None]
    """Closes a copy of an end without waiting for what is in it."""
    virq: int | None = None
    remote_uid: int | None = None
    """Whose the remote domain was, if it was there: another user's that follows it under its number cannot bind."""
    peer: Port | None = None
    end: socket.socket | None = None
    """A copy of the domain's end; None: the pair was shut down, and the next one is made when it is asked for."""
    far: socket.socket | None = None
    """The other end while no domain has it."""

    def waits_for(self, domain: DomainRecord) -> bool:
        """Whether this is the domain that may bind it."""
        return self.remote == domain.domid and self.remote_uid in (None, domain.uid)

    def shut(self) -> None:
        """The pair ends: whoever has an end, or a copy, sees a hang-up. What was sent before can be taken still."""
        if self.end is not None:
            with contextlib.suppress(OSError):
                self.end.shutdown(socket.SHUT_RDWR)
        self.forget()

    def forget(self) -> None:
        """Closes the hypervisor's copies."""
        for end in (self.end, self.far):
            if end is not None:
                self.close(end)
        self.end = self.far = None

    def is_shut(self) -> bool:
        """Whether somebody has shut the pair down: a domain can do that to its own end at any time."""
        return self.end is not None and bool(_ready(self.end) & (select.POLLHUP | select.POLLRDHUP))


@dataclass(slots=True)
class _Table:
    """A domain's ports; the lowest free number is given first."""

    ports: dict[int, Port] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def lowest_free(self) -> int:
        return self._free[0] if self._free else len(self.ports) + 1

    def insert(self, port: Port) -> None:
        if self._free and self._free[0] == port.number:
            heapq.heappop(self._free)
        self.ports[port.number] = port

    def remove(self, port: Port) -> None:
        del self.ports[port.number]
        heapq.heappush(self._free, port.number)


class Ports:
    """All ports of all domains."""

    def __init__(self, exists: Callable[[int], DomainRecord | None]) -> None:
        self._exists = exists
        self._tables: dict[int, _Table] = {}
        self._virtual: dict[int, Port] = {}
        self._closer = Closer()

    def bind_unbound(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """PORT_UNBOUND: a port that `remote`, and nobody else, may bind. EINVAL, ENOSPC."""
        remote = _domid(domain, *layouts.UNBOUND.unpack(payload))
        call = f"bind_unbound_port(domain {remote})"
        if remote >= DOMID_FIRST_RESERVED:
            raise Refused(errno.EINVAL, f"{call}: pass a domid below {DOMID_FIRST_RESERVED:#x}, or DOMID_SELF")
        port = Port(domain.domid, self._number(domain, call), remote, self._closing(domain))
        if (there := self._exists(remote)) is not None:
            port.remote_uid = there.uid
        return self._add(port, call)

    def bind_interdomain(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """PORT_INTERDOMAIN: a port bound to one that waits for this domain; pending from the start, as Xen has it.

        ESRCH no such domain; EINVAL the port waits for nobody, or for another; ENOSPC.
        """
        remote, number = layouts.INTERDOMAIN.unpack(payload)
        remote = _domid(domain, remote)
        call = f"bind_interdomain(domain {remote}, port {number})"
        there = self._exists(remote)
        if there is None:
            raise Refused(errno.ESRCH, f"{call}: no such domain: its number comes from the one who made the port")
        theirs = self._tables.get(remote, _Table()).ports.get(number)
        if theirs is None or theirs.peer is not None or theirs.virq is not None or not theirs.waits_for(domain):
            raise Refused(errno.EINVAL, f"{call}: no such port waits for domain {domain.domid}: make it for this domid")
        number = self._number(domain, call)
        ours = Port(domain.domid, number, remote, self._closing(domain), remote_uid=there.uid, peer=theirs)
        _complete(theirs, call)
        ours.end = theirs.far
        assert ours.end is not None
        descriptor = _copy(ours.end, call)
        theirs.far, theirs.peer, theirs.remote_uid = None, ours, domain.uid
        self._table(domain).insert(ours)
        _send(theirs.end)
        return Reply(layouts.PORT.pack(ours.number), [descriptor])

    def bind_virq(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """PORT_VIRQ: a port for the events of the hypervisor itself. EINVAL unknown, EPERM, EEXIST, ENOSPC."""
        (virq,) = layouts.VIRQ.unpack(payload)
        call = f"bind_virq({virq})"
        if virq != VIRQ_DOM_EXC:
            raise Refused(errno.EINVAL, f"{call}: there is none but VIRQ_DOM_EXC ({VIRQ_DOM_EXC}): a domain has ended")
        if not domain.control:
            raise Refused(errno.EPERM, f"{call}: domain {domain.domid} has no control right: let the policy give it")
        if domain.domid in self._virtual:
            raise Refused(errno.EEXIST, f"{call}: domain {domain.domid} has bound it already: close that port first")
        number = self._number(domain, call)
        port = Port(domain.domid, number, domain.domid, self._closing(domain), virq=virq)
        reply = self._add(port, call)
        self._virtual[domain.domid] = port
        return reply

    def close(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """PORT_CLOSE: the port is free; the peer's sees a hang-up and waits for the same domain again. ENOTCONN."""
        port = self._own(domain, payload, "unbind")
        self._table(domain).remove(port)
        if port.virq is not None:
            del self._virtual[domain.domid]
        _part(port)
        return Reply()

    def rearm(self, domain: DomainRecord, payload: memoryview) -> Reply:
        """PORT_REARM: the port's end as it is now, for a domain that saw a hang-up. ENOTCONN.

        The hang-up may be the doing of a domain that shut its own end down. Then the two ports part here: each waits
        for the other domain to bind it.
        """
        port = self._own(domain, payload, "rearm")
        if port.is_shut():
            _part(port)
        call = f"rearm(port {port.number})"
        _complete(port, call)
        assert port.end is not None
        return Reply(b"", [_copy(port.end, call)])

    def domain_gone(self, domain: DomainRecord) -> None:
        """All its ports are closed."""
        self._virtual.pop(domain.domid, None)
        table = self._tables.pop(domain.domid, None)
        for port in table.ports.values() if table is not None else ():
            _part(port)

    def raise_virq(self, virq: int) -> None:
        """An event on every port that is bound to `virq`."""
        for port in self._virtual.values():
            if port.virq == virq:
                _send(port.far)

    def send(self, domid: int, port: int) -> None:
        """Notifies in the domain's name; nothing happens for a port that is unknown, or bound to nobody."""
        found = self._find(domid, port)
        if found is not None:
            _send(found.end)

    def is_bound(self, domid: int, port: int) -> bool:
        """Whether the domain has the port, bound to a peer or still waiting for one."""
        return self._find(domid, port) is not None

    def descriptors(self, domid: int) -> int:
        """How many of the hypervisor's a domain's ports need at most."""
        return 2 * len(self._tables[domid].ports) if domid in self._tables else 0

    def status(self, domid: int) -> list[dict[str, object]]:
        """A domain's ports by number: kind, the remote domain and port, and whether an event waits to be taken."""
        table = self._tables.get(domid, _Table())
        return [_described(port) for _, port in sorted(table.ports.items())]

    def close_all(self) -> None:
        """The hypervisor ends: its copies are closed, and bound pairs go on without it."""
        for table in self._tables.values():
            for port in table.ports.values():
                port.forget()
        self._tables.clear()

    def forget(self) -> None:
        """In a forked child: closes the copies, also of those that the parent's thread is closing."""
        for table in self._tables.values():
            for port in table.ports.values():
                for end in (port.end, port.far):
                    if end is not None:
                        end.close()
        self._closer.forget()

    def _find(self, domid: int, number: int) -> Port | None:
        table = self._tables.get(domid)
        return None if table is None else table.ports.get(number)

    def _own(self, domain: DomainRecord, payload: memoryview, call: str) -> Port:
        (number,) = layouts.PORT.unpack(payload)
        port = self._find(domain.domid, number)
        if port is None:
            raise Refused(errno.ENOTCONN, f"{call}(port {number}): domain {domain.domid} has no such port: bind one")
        return port

    def _table(self, domain: DomainRecord) -> _Table:
        return self._tables.setdefault(domain.domid, _Table())

    def _number(self, domain: DomainRecord, call: str) -> int:
        """The number of the domain's next port. Raises Refused (ENOSPC)."""
        table = self._table(domain)
        if self._closer.burdens(domain.uid) >= MOST_BURDENS:
            reason = f"user {domain.uid} has sent descriptors through its ports, which take long to close"
            raise Refused(errno.EBUSY, f"{call}: {reason}: wait")
        most = domain.quotas.max_event_channels
        if len(table.ports) >= most:
            text = f"{call}: domain {domain.domid} has all its max_event_channels {most}: unbind some"
            raise Refused(errno.ENOSPC, text)
        return table.lowest_free()

    def _closing(self, domain: DomainRecord) -> Callable[[socket.socket], None]:
        return functools.partial(self._closer.close, uid=domain.uid)

    def _add(self, port: Port, call: str) -> Reply:
        _complete(port, call)
        assert port.end is not None
        try:
            descriptor = _copy(port.end, call)
        except Refused:
            port.forget()
            raise
        self._tables[port.domid].insert(port)
        return Reply(layouts.PORT.pack(port.number), [descriptor])


def _domid(domain: DomainRecord, remote: int) -> int:
    return domain.domid if remote == DOMID_SELF else remote


def _part(port: Port) -> None:
    """The pair ends. Both ports are as after PORT_UNBOUND for the other's domain; new pairs are made when asked for."""
    peer, port.peer = port.peer, None
    port.shut()
    if peer is not None:
        peer.peer = None
        peer.forget()


def _complete(port: Port, call: str) -> None:
    """Makes the pair that the port lacks. Raises Refused (EMFILE, ENFILE, ENOMEM)."""
    if port.end is None:
        try:
            port.end, port.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            refuse_descriptors(port.end)
            refuse_descriptors(port.far)
        except OSError as error:
            raise _exhausted(error, call) from None


def _copy(end: socket.socket, call: str) -> int:
    try:
        return os.dup(end.fileno())
    except OSError as error:
        raise _exhausted(error, call) from None


def _exhausted(error: OSError, call: str) -> Refused:
    text = f"{call}: the hypervisor has no descriptor left: raise its limit (ulimit -n)"
    return Refused(error.errno or errno.EMFILE, text)


def _send(end: socket.socket | None) -> None:
    """EAGAIN: as many events are waiting as the socket holds; EPIPE: the other side is gone."""
    if end is not None:
        with contextlib.suppress(OSError):
            end.send(_EVENT, _AT_ONCE)


def _ready(end: socket.socket) -> int:
    poll = select.poll()
    poll.register(end, select.POLLIN | select.POLLRDHUP)
    return sum(flags for _, flags in poll.poll(0))


def _described(port: Port) -> dict[str, object]:
    pending = port.end is not None and bool(_ready(port.end))
    if port.virq is not None:
        return {"port": port.number, "kind": "virq", "virq": port.virq, "pending": pending}
    if port.peer is None:
        return {"port": port.number, "kind": "unbound", "remote_domid": port.remote, "pending": pending}
    return {
        "port": port.number,
        "kind": "interdomain",
        "remote_domid": port.remote,
        "remote_port": port.peer.number,
        "pending": pending,
    }
