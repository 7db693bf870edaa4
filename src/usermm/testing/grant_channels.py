"""`EventChannels`: the hypervisor's ports, and which are bound to which."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from usermm.errors import grant_refused

DOMID_SELF: Final = 0x7FF0
VIRQ_DOM_EXC: Final = 3
"""The only virtual interrupt here: a domain is gone."""


@dataclass(eq=False)
class Port:
    """One end. `pending`: an event waits to be read. `masked`: it was read, and the port not written back."""

    domid: int
    number: int
    remote_domid: int
    peer: Port | None = None
    virq: int | None = None
    pending: bool = False
    masked: bool = False

    @property
    def readable(self) -> bool:
        return self.pending and not self.masked


class EventChannels:
    """Ports of a domain are numbered from 1, lowest free first."""

    def __init__(self, exists: Callable[[int], bool]) -> None:
        self._exists = exists
        self._ports: dict[tuple[int, int], Port] = {}

    def bind_unbound(self, domid: int, remote_domid: int) -> Port:
        """A port that `remote_domid`, which need not exist yet, can bind to."""
        return self._new(domid, domid if remote_domid == DOMID_SELF else remote_domid)

    def bind_interdomain(self, domid: int, remote_domid: int, remote_port: int) -> Port:
        """Binds to an unbound port of another domain that is meant for this one. The new port starts pending.

        ESRCH: no such domain. EINVAL: no such port, bound already, or meant for another domain.
        """
        remote_domid = domid if remote_domid == DOMID_SELF else remote_domid
        if not self._exists(remote_domid):
            raise grant_refused(errno.ESRCH, f"bind_interdomain({remote_domid}): there is no such domain")
        peer = self._ports.get((remote_domid, remote_port))
        if peer is None or peer.peer is not None or peer.virq is not None or peer.remote_domid != domid:
            raise grant_refused(errno.EINVAL, f"bind_interdomain({remote_domid}, {remote_port}): not open to {domid}")
        port = self._new(domid, remote_domid)
        port.peer, peer.peer = peer, port
        port.pending = True
        return port

    def bind_virq(self, domid: int, virq: int, *, control: bool) -> Port:
        """EINVAL: a virtual interrupt that is not here. EPERM: without `control`. EEXIST: the domain has it."""
        if virq != VIRQ_DOM_EXC:
            raise grant_refused(errno.EINVAL, f"bind_virq({virq}): only {VIRQ_DOM_EXC} is here")
        if not control:
            raise grant_refused(errno.EPERM, f"bind_virq({virq}): domain {domid} has no control")
        if any(port.domid == domid and port.virq == virq for port in self._ports.values()):
            raise grant_refused(errno.EEXIST, f"bind_virq({virq}): bound already")
        port = self._new(domid, domid)
        port.virq = virq
        return port

    def is_bound(self, domid: int, number: int) -> bool:
        """Whether the domain has this port, in any state."""
        return (domid, number) in self._ports

    def send(self, domid: int, number: int) -> None:
        """An event for whoever is at the other end; nothing if nobody is."""
        port = self._ports.get((domid, number))
        if port is not None and port.peer is not None:
            port.peer.pending = True

    def close(self, port: Port) -> None:
        """The other end learns of it by an event and is unbound again, still meant for this domain."""
        del self._ports[port.domid, port.number]
        if port.peer is not None:
            port.peer.peer = None
            port.peer.pending = True

    def domain_gone(self, domid: int) -> None:
        """Raises VIRQ_DOM_EXC wherever it is bound. The domain's ports went with its files."""
        assert not any(port.domid == domid for port in self._ports.values())
        for port in self._ports.values():
            if port.virq == VIRQ_DOM_EXC:
                port.pending = True

    def _new(self, domid: int, remote_domid: int) -> Port:
        number = next(free for free in range(1, len(self._ports) + 2) if (domid, free) not in self._ports)
        port = self._ports[domid, number] = Port(domid, number, remote_domid)
        return port
