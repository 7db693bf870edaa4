"""Event channels at the end of a peer, a hypervisor, a file, and in a forked child; the waiter."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from support.event_channels import MOMENT_S, PATIENCE_S, alone, bind, bind_peer, raises
from support.event_peer import Peer
from support.processes import in_child

import usermm
from usermm.errors import ClosedError, ForkedError, GrantError, HypervisorGoneError
from usermm.hypercalls.wire import DOMID_SELF
from usermm.uapi import xen_evtchn


@pytest.fixture
def peer(hypervisor: usermm.Hypervisor) -> Iterator[Peer]:
    with Peer(hypervisor.socket) as peer:
        yield peer


def test_a_killed_peer_is_an_event_and_another_process_takes_its_place(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, peer: Peer
) -> None:
    mine, _ = bind_peer(one, peer)
    domid = peer.domid
    peer.kill()
    assert one.evtchn.read(PATIENCE_S) == [mine]
    one.evtchn.unmask(mine)
    assert one.evtchn.read(MOMENT_S) == [], "one death, one event"
    one.evtchn.notify(mine)
    with Peer(hypervisor.socket, domid) as next_peer:
        theirs = next_peer(f"events.bind_interdomain({one.domid}, {mine})")
        assert next_peer("events.read(20)") == [theirs]
        next_peer(f"events.notify({theirs})")
        assert one.evtchn.read(PATIENCE_S) == [mine]


def test_a_killed_peer_is_seen_although_its_child_has_copies_of_everything(one: usermm.Domain, peer: Peer) -> None:
    """The child is made by the bare system call: no handler closes its copies. Only shutdown(2) reaches them."""
    mine, _ = bind_peer(one, peer)
    child = peer(
        "(lambda libc, pid: pid or (time.sleep(600), os._exit(0)))"
        "(__import__('ctypes').CDLL(None), __import__('ctypes').CDLL(None).syscall(56, 17, 0, 0, 0, 0))"
        if os.uname().machine == "x86_64"
        else "os.fork() or (time.sleep(600), os._exit(0))"
    )
    try:
        peer.kill()
        assert one.evtchn.read(PATIENCE_S) == [mine]
    finally:
        os.kill(child, signal.SIGKILL)


def test_unbinding_is_an_event_and_its_number_is_free(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    one.evtchn.notify(mine)
    two.evtchn.unbind(theirs)
    assert two.evtchn.read(0) == []
    assert one.evtchn.read(PATIENCE_S) == [mine]
    for call in (two.evtchn.unbind, two.evtchn.notify, two.evtchn.mask, two.evtchn.waiter):
        with raises(errno.ENOTCONN, GrantError):
            call(theirs)
    two.evtchn.unmask(theirs)
    assert two.evtchn.bind_unbound_port(one.domid) == theirs
    assert two.evtchn.read(MOMENT_S) == [], "the old owner's event"


def test_closing_the_file_unbinds_its_ports(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    other = two.open_evtchn()
    with other:
        assert other.bind_unbound_port(one.domid) == theirs + 1
        two.evtchn.close()
        assert one.evtchn.read(PATIENCE_S) == [mine]
        assert other.bind_unbound_port(one.domid) == theirs


def test_a_port_is_its_files(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    with one.open_evtchn() as other:
        for call in (other.notify, other.unbind, other.mask):
            with raises(errno.ENOTCONN, GrantError):
                call(mine)
        two.evtchn.notify(theirs)
        assert other.read(MOMENT_S) == []
        other.unmask(mine)
        assert one.evtchn.read(PATIENCE_S) == [mine]
        own = other.bind_unbound_port(DOMID_SELF)
        assert one.evtchn.bind_interdomain(one.domid, own) != own
        assert other.read(MOMENT_S) == []


def test_without_the_hypervisor_bound_ports_go_on_and_a_death_is_still_seen() -> None:
    with alone() as (hypervisor, one, peer):
        mine, theirs = bind_peer(one, peer)
        waiting = one.evtchn.bind_unbound_port(peer.domid)
        hypervisor.kill()
        peer(f"events.notify({theirs})")
        found = set()
        while found != {mine, waiting}:  # what was never bound never will be: that is an event, too
            found |= set(one.evtchn.read(PATIENCE_S))
        one.evtchn.unmask(mine, waiting)
        assert one.evtchn.read(MOMENT_S) == []
        one.evtchn.notify(mine)
        assert peer("events.read(20)") == [theirs]
        with raises(errno.ECONNRESET, HypervisorGoneError):
            one.evtchn.bind_unbound_port(peer.domid)
        peer.kill()
        assert one.evtchn.read(PATIENCE_S) == [mine]
        one.evtchn.unmask(mine)
        one.evtchn.notify(mine)
        assert one.evtchn.read(MOMENT_S) == []
        one.evtchn.unbind(mine)
        one.evtchn.unbind(waiting)


def test_an_orderly_end_of_the_hypervisor_hangs_up_no_bound_port() -> None:
    with usermm.Hypervisor() as hypervisor:
        one, two = usermm.Domain(hypervisor.socket), usermm.Domain(hypervisor.socket)
        mine, theirs = bind(one, two)
    with one, two:
        assert one.evtchn.read(MOMENT_S) == []
        two.evtchn.notify(theirs)
        assert one.evtchn.read(PATIENCE_S) == [mine]


def test_virtual_interrupts_tell_of_ends(hypervisor: usermm.Hypervisor, one: usermm.Domain, peer: Peer) -> None:
    with raises(errno.EPERM):
        one.evtchn.bind_virq(xen_evtchn.VIRQ_DOM_EXC)
    with usermm.Domain(hypervisor.socket, domid=0) as dom0:
        port = dom0.evtchn.bind_virq(xen_evtchn.VIRQ_DOM_EXC)
        assert dom0.evtchn.read(MOMENT_S) == []
        peer.kill()
        assert dom0.evtchn.read(PATIENCE_S) == [port]
        with raises(errno.EEXIST):
            dom0.evtchn.bind_virq(xen_evtchn.VIRQ_DOM_EXC)
        with raises(errno.EINVAL):
            dom0.evtchn.bind_virq(7)


def test_a_waiter_takes_the_ports_events_straight(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    with one.evtchn.waiter(mine) as waiter:
        assert waiter.wait(0) is False and waiter.wait(0.001) is False
        for timeout in (None, 5, 0):
            two.evtchn.notify(theirs)
            assert waiter.wait(timeout) is True
        two.evtchn.notify(theirs)
        assert one.evtchn.read(0) == [] and select.select([waiter], [], [], 0)[0]
        waiter.notify()
        assert two.evtchn.read(PATIENCE_S) == [theirs]
    with raises(errno.EBADF, ClosedError):
        waiter.wait()
    one.evtchn.unmask(mine)
    assert one.evtchn.read(PATIENCE_S) == [mine]


@pytest.mark.parametrize("timeout", [None, PATIENCE_S])
def test_a_waiter_sees_the_peers_death_and_the_next_peer(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, peer: Peer, timeout: float | None
) -> None:
    mine, _ = bind_peer(one, peer)
    with one.evtchn.waiter(mine) as waiter:
        domid = peer.domid
        peer.kill()
        assert waiter.wait(timeout) and waiter.hang_ups == 1
        assert waiter.wait(0) is False
        waiter.notify()
        with Peer(hypervisor.socket, domid) as next_peer:
            theirs = next_peer(f"events.bind_interdomain({one.domid}, {mine})")
            next_peer(f"events.notify({theirs})")
            assert waiter.wait(timeout) and waiter.hang_ups == 1


def test_a_waiter_without_a_hypervisor_sees_the_death_once() -> None:
    with alone() as (hypervisor, one, peer):
        mine, theirs = bind_peer(one, peer)
        with one.evtchn.waiter(mine) as waiter:
            hypervisor.kill()
            peer(f"events.notify({theirs})")
            assert waiter.wait() and waiter.hang_ups == 0
            peer.kill()
            assert waiter.wait() and waiter.hang_ups == 1
            waiter.notify()
            with raises(errno.ECONNRESET, HypervisorGoneError):
                waiter.wait()


def test_a_forked_child_has_none_of_it(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    waiter = one.evtchn.waiter(mine)

    def use() -> list[str]:
        answers = []
        events = one.evtchn
        calls = [
            lambda: events.notify(mine),
            lambda: events.read(0),
            events.read,
            lambda: events.unmask(mine),
            lambda: events.mask(mine),
            events.pending,
            events.fileno,
            lambda: events.unbind(mine),
            lambda: events.bind_unbound_port(1),
            events.reset,
            lambda: events.restrict(1),
            waiter.wait,
            lambda: waiter.wait(0),
            lambda: waiter.wait(1),
            waiter.notify,
        ]
        for call in calls:
            try:
                call()
                answers.append("no error")
            except ForkedError as error:
                answers.append(errno.errorcode[error.errno or 0])
        waiter.close()
        events.close()
        return answers

    assert set(in_child(use)) == {"ECHILD"}
    two.evtchn.notify(theirs)
    assert waiter.wait(PATIENCE_S) and waiter.hang_ups == 0
    waiter.close()
    one.evtchn.unmask(mine)
    two.evtchn.notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_a_child_keeps_no_copies_that_hide_an_end_when_the_hypervisor_is_gone() -> None:
    """Only the handler of fork helps here: without a hypervisor nobody shuts the pair down."""
    with alone() as (hypervisor, one, peer):
        mine, _ = bind_peer(one, peer)
        child = peer("os.fork() or (time.sleep(600), os._exit(0))")
        try:
            hypervisor.kill()
            peer.kill()
            assert one.evtchn.read(PATIENCE_S) == [mine]
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_child_opens_its_own(hypervisor: usermm.Hypervisor, one: usermm.Domain) -> None:
    events = one.evtchn
    tell, told = socket.socketpair()

    def use() -> list[int]:
        with usermm.Domain(hypervisor.socket) as own:
            told.send(bytes([own.domid]))
            port = own.evtchn.bind_interdomain(one.domid, told.recv(1)[0])
            own.evtchn.notify(port)
            return own.evtchn.read(PATIENCE_S)

    answers = threading.Thread(target=lambda: tell.send(bytes([events.bind_unbound_port(tell.recv(1)[0])])))
    answers.start()
    assert in_child(use) == [1]
    answers.join()
    assert events.read(PATIENCE_S) == [1]
    tell.close()
    told.close()
