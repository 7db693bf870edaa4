"""What tests of event channels share: bound pairs, a port's own socket, refusals."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import usermm
from support.event_peer import Peer
from support.hypervisors import HypervisorProcess, socket_folder
from usermm.errors import DeviceError
from usermm.grants.evtchn import Evtchn
from usermm.grants.local_evtchn import LocalEvtchn

PATIENCE_S = 20
MOMENT_S = 0.05


def bind(one: usermm.Domain, two: usermm.Domain) -> tuple[int, int]:
    """A port of each, bound to each other, with the binder's first event taken."""
    mine = one.evtchn.bind_unbound_port(two.domid)
    theirs = two.evtchn.bind_interdomain(one.domid, mine)
    assert two.evtchn.read(PATIENCE_S) == [theirs]
    two.evtchn.unmask(theirs)
    return mine, theirs


def bind_peer(one: usermm.Domain, peer: Peer) -> tuple[int, int]:
    """As `bind`, with a process."""
    mine = one.evtchn.bind_unbound_port(peer.domid)
    theirs = peer(f"events.bind_interdomain({one.domid}, {mine})")
    assert peer("events.read(20)") == [theirs]
    assert peer(f"events.unmask({theirs})") is None
    return mine, theirs


def local(domain: usermm.Domain) -> LocalEvtchn:
    file = domain.evtchn._file
    assert isinstance(file, LocalEvtchn)
    return file


def stream_of(domain: usermm.Domain, port: int) -> socket.socket:
    """The port's socket, as a hostile domain has it."""
    stream = local(domain)._ports.by_number[port].stream
    assert stream is not None
    return stream


@contextmanager
def raises(number: int, kind: type[DeviceError] = DeviceError) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.errno == number
    assert "\n" not in str(caught.value) and ": " in str(caught.value)


def is_readable(events: Evtchn) -> bool:
    return bool(select.select([events], [], [], 0)[0])


@contextmanager
def alone() -> Iterator[tuple[HypervisorProcess, usermm.Domain, Peer]]:
    """A domain here, one in a process, and a hypervisor that can be killed."""
    with (
        socket_folder() as folder,
        HypervisorProcess(folder / "h.sock") as hypervisor,
        usermm.Domain(hypervisor.socket) as one,
        Peer(hypervisor.socket) as peer,
    ):
        yield hypervisor, one, peer
