"""The contract of evtchn: ports, masks, and every errno of every call."""

from __future__ import annotations

import pytest
from conformance.grants_client import Events, connect
from conformance.grants_world import DomainDriver, World, errno_of, eventually

from usermm.uapi import xen_evtchn

DOMID_SELF = 0x7FF0
_ELSEWHERE = 0x7E00  # no domain here


@pytest.fixture
def one(world: World) -> DomainDriver:
    return world.make_domain()


@pytest.fixture
def other(world: World, one: DomainDriver) -> DomainDriver:  # noqa: ARG001 - the first has the lower number
    return world.make_domain()


def test_ports_from_1(world: World, one: DomainDriver, other: DomainDriver) -> None:
    world.needs("ports from 1")
    events = Events(one)
    assert [events.bind_unbound(other.domid) for _ in range(3)] == [1, 2, 3]
    assert Events(other).bind_unbound(one.domid) == 1


def test_files_of_a_domain_share_the_numbers(one: DomainDriver, other: DomainDriver) -> None:
    first, second = Events(one), Events(one)
    assert first.bind_unbound(other.domid) != second.bind_unbound(other.domid)


def test_a_binding_starts_pending(one: DomainDriver, other: DomainDriver) -> None:
    """At the binder's end: what was sent before nobody could hear."""
    first, second = Events(one), Events(other)
    port = first.bind_unbound(other.domid)
    remote = second.bind_interdomain(one.domid, port)
    assert second.take() == [remote]
    assert not first.file.readable()


def test_events_go_both_ways(one: DomainDriver, other: DomainDriver) -> None:
    pair = connect(one, other)
    pair.one.notify(pair.one_port)
    assert pair.other.take() == [pair.other_port]
    pair.other.notify(pair.other_port)
    assert pair.one.take() == [pair.one_port]


def test_an_event_is_pending_or_not(one: DomainDriver, other: DomainDriver) -> None:
    """However often it was notified: what came after it was delivered, and before it was unmasked, is one more."""
    pair = connect(one, other)
    for _ in range(2000):
        pair.one.notify(pair.one_port)
    assert pair.other.take() == [pair.other_port]
    pair.other.unmask(pair.other_port)
    if pair.other.file.readable():
        assert pair.other.take() == [pair.other_port]
        pair.other.unmask(pair.other_port)
    assert not pair.other.file.readable()
    assert errno_of(pair.other.read) == "EAGAIN"


def test_a_port_is_masked_until_it_is_written_back(one: DomainDriver, other: DomainDriver) -> None:
    pair = connect(one, other)
    pair.one.notify(pair.one_port)
    assert pair.other.take() == [pair.other_port]
    pair.one.notify(pair.one_port)
    assert not pair.other.file.readable()
    assert errno_of(pair.other.read) == "EAGAIN"
    pair.other.unmask(pair.other_port)
    assert pair.other.take() == [pair.other_port]


def test_unmasking_what_is_not_masked(one: DomainDriver, other: DomainDriver) -> None:
    pair = connect(one, other)
    pair.other.unmask(pair.other_port, pair.other_port)
    assert errno_of(pair.other.read) == "EAGAIN"
    pair.one.notify(pair.one_port)
    pair.other.unmask(pair.other_port)
    assert pair.other.take() == [pair.other_port]


def test_several_ports_in_one_read(one: DomainDriver, other: DomainDriver) -> None:
    first, second = Events(one), Events(other)
    ports = [first.bind_unbound(other.domid) for _ in range(4)]
    remote = [second.bind_interdomain(one.domid, port) for port in ports]
    assert second.take() == sorted(remote)


def test_a_short_read_leaves_the_rest(one: DomainDriver, other: DomainDriver) -> None:
    """Rounded down to whole ports."""
    first, second = Events(one), Events(other)
    remote = {second.bind_interdomain(one.domid, first.bind_unbound(other.domid)) for _ in range(3)}
    got = second.read(7)
    assert len(got) == 1
    assert set(got) | set(second.read(100)) == remote


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_read_of_less_than_a_port(one: DomainDriver, other: DomainDriver, size: int) -> None:
    """Gives nothing and takes nothing, whether something is there or not."""
    pair = connect(one, other)
    assert pair.other.file.read(size) == b""
    pair.one.notify(pair.one_port)
    assert pair.other.file.read(size) == b""
    assert pair.other.take() == [pair.other_port]


def test_a_read_without_events(one: DomainDriver) -> None:
    assert errno_of(Events(one).read) == "EAGAIN"


@pytest.mark.parametrize(("length", "taken"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8)])
def test_a_write_is_of_whole_ports(one: DomainDriver, length: int, taken: int) -> None:
    """Ports that are not of this file mean nothing."""
    assert Events(one).file.write(bytes(range(1, length + 1))) == taken


def test_a_foreign_port(one: DomainDriver, other: DomainDriver) -> None:
    """ENOTCONN: never bound, another file's, another domain's, unbound again."""
    pair = connect(one, other)
    mine = pair.one.bind_unbound(other.domid)
    another_file = Events(one)
    for port in (0, 77, (1 << 32) - 1, pair.one_port, mine):
        assert errno_of(another_file.notify, port) == "ENOTCONN"
        assert errno_of(another_file.unbind, port) in ("ENOTCONN", "EINVAL" if port > 1 << 20 else "")
    pair.one.unbind(mine)
    assert errno_of(pair.one.notify, mine) == "ENOTCONN"
    assert errno_of(pair.one.unbind, mine) == "ENOTCONN"
    pair.one.notify(pair.one_port)
    assert pair.other.take() == [pair.other_port]


def test_another_file_does_not_unmask(one: DomainDriver, other: DomainDriver) -> None:
    pair = connect(one, other)
    pair.one.notify(pair.one_port)
    pair.other.take()
    pair.one.notify(pair.one_port)
    Events(other).unmask(pair.other_port)
    assert errno_of(pair.other.read) == "EAGAIN"


def test_notifying_an_unbound_port(one: DomainDriver, other: DomainDriver) -> None:
    """Nobody is there: nothing happens, without an error."""
    events = Events(one)
    events.notify(events.bind_unbound(other.domid))


def test_binding_what_is_not_offered(world: World, one: DomainDriver, other: DomainDriver) -> None:
    """EINVAL: no such port, meant for another domain, bound already. ESRCH: no such domain."""
    world.needs("several domains")
    pair = connect(one, other)
    third = Events(world.make_domain())
    waiting = pair.one.bind_unbound(other.domid)
    assert errno_of(third.bind_interdomain, one.domid, waiting) == "EINVAL"
    assert errno_of(pair.other.bind_interdomain, one.domid, waiting + 1) == "EINVAL"
    assert errno_of(pair.other.bind_interdomain, one.domid, pair.one_port) == "EINVAL"
    assert errno_of(pair.other.bind_interdomain, one.domid, 0) == "EINVAL"
    assert errno_of(pair.other.bind_interdomain, world.unused_domid, 1) == "ESRCH"
    pair.other.bind_interdomain(one.domid, waiting)


def test_a_domain_binds_to_itself(one: DomainDriver) -> None:
    events = Events(one)
    port = events.bind_unbound(DOMID_SELF)
    remote = events.bind_interdomain(one.domid, port)
    assert events.take() == [remote]
    events.notify(remote)
    assert events.take() == [port]


def test_unbind_frees_the_number(one: DomainDriver, other: DomainDriver) -> None:
    events = Events(one)
    ports = [events.bind_unbound(other.domid) for _ in range(3)]
    events.unbind(ports[1])
    assert events.bind_unbound(other.domid) == ports[1]


def test_unbind_takes_its_event_along(world: World, one: DomainDriver, other: DomainDriver) -> None:
    world.needs("unbinding takes an event along")
    pair = connect(one, other)
    pair.one.notify(pair.one_port)
    pair.other.unbind(pair.other_port)
    assert errno_of(pair.other.read) == "EAGAIN"


@pytest.mark.parametrize("how", ["unbind", "close", "crash"])
def test_the_peer_goes(world: World, one: DomainDriver, other: DomainDriver, how: str) -> None:
    """The port that is left learns of it by an event and waits for the same domain again."""
    world.needs("the peer's end is an event")
    pair = connect(one, other)
    if how == "unbind":
        pair.other.unbind(pair.other_port)
    elif how == "close":
        pair.other.file.close()
    else:
        other.crash()
    assert pair.one.take() == [pair.one_port]
    pair.one.unmask(pair.one_port)
    pair.one.notify(pair.one_port)
    assert not pair.one.file.readable(0.05)
    if how != "crash":
        again = Events(other)
        remote = again.bind_interdomain(one.domid, pair.one_port)
        assert again.take() == [remote]
        again.notify(remote)
        assert pair.one.take() == [pair.one_port]


def test_closing_the_file_unbinds(one: DomainDriver, other: DomainDriver) -> None:
    events = Events(one)
    port = events.bind_unbound(other.domid)
    events.file.close()
    assert errno_of(Events(other).bind_interdomain, one.domid, port) == "EINVAL"
    assert errno_of(events.bind_unbound, other.domid) == "EBADF"
    assert errno_of(events.read) == "EBADF"
    events.file.close()


# BIND_VIRQ


def test_virq_of_a_domains_end(world: World) -> None:
    world.needs("several domains")
    world.needs("the end of a domain")
    control, ordinary = Events(world.make_domain(control=True)), world.make_domain()
    port = control.bind_virq(xen_evtchn.VIRQ_DOM_EXC)
    assert not control.file.readable()
    ordinary.crash()
    assert control.take() == [port]


def test_virq_is_bound_once(world: World) -> None:
    world.needs("a free virtual interrupt")
    domain = world.make_domain(control=True)
    first, second = Events(domain), Events(domain)
    port = first.bind_virq(xen_evtchn.VIRQ_DOM_EXC)
    assert errno_of(first.bind_virq, xen_evtchn.VIRQ_DOM_EXC) == "EEXIST"
    assert errno_of(second.bind_virq, xen_evtchn.VIRQ_DOM_EXC) == "EEXIST"
    first.unbind(port)
    second.bind_virq(xen_evtchn.VIRQ_DOM_EXC)


def test_virq_needs_control(world: World, one: DomainDriver) -> None:
    world.needs("several domains")
    world.needs("virtual interrupts need control")
    assert errno_of(Events(one).bind_virq, xen_evtchn.VIRQ_DOM_EXC) == "EPERM"


@pytest.mark.parametrize("virq", [24, 1000, (1 << 32) - 1])
def test_virq_that_there_is_not(world: World, virq: int) -> None:
    assert errno_of(Events(world.make_domain(control=True)).bind_virq, virq) == "EINVAL"


def test_nobody_binds_to_a_virq_port(world: World) -> None:
    world.needs("a free virtual interrupt")
    control, other = world.make_domain(control=True), world.make_domain()
    port = Events(control).bind_virq(xen_evtchn.VIRQ_DOM_EXC)
    assert errno_of(Events(other).bind_interdomain, control.domid, port) == "EINVAL"


# RESET and RESTRICT_DOMID


def test_reset_forgets_events(one: DomainDriver, other: DomainDriver) -> None:
    """What was not read yet; its port stays masked until it is written back. Ports stay bound."""
    pair = connect(one, other)
    pair.one.notify(pair.one_port)
    assert pair.other.file.readable(10)
    pair.other.reset()
    assert errno_of(pair.other.read) == "EAGAIN"
    pair.other.unmask(pair.other_port)
    pair.one.notify(pair.one_port)
    assert pair.other.take() == [pair.other_port]


def test_restrict(one: DomainDriver, other: DomainDriver) -> None:
    """EACCES from then on: a virtual interrupt, a port of one's own, and any other domain's, itself by DOMID_SELF too.

    What is bound stays.
    """
    before = connect(one, other)
    before.one.restrict(_ELSEWHERE)
    for domid in (_ELSEWHERE, other.domid, one.domid, DOMID_SELF):
        assert errno_of(before.one.bind_unbound, domid) == "EACCES"
    for domid in (other.domid, DOMID_SELF, _ELSEWHERE + 0x10000):
        assert errno_of(before.one.bind_interdomain, domid, 1) == "EACCES"
    assert errno_of(before.one.bind_virq, xen_evtchn.VIRQ_DOM_EXC) == "EACCES"
    assert errno_of(before.one.bind_interdomain, _ELSEWHERE, 1) in ("ESRCH", "EINVAL")  # gets as far as to be looked up
    before.one.notify(before.one_port)
    assert before.other.take() == [before.other_port]


def test_restricted_to_a_domain_its_ports_can_be_bound(
    world: World, one: DomainDriver, other: DomainDriver
) -> None:
    world.needs("several domains")
    first, second = Events(one), Events(other)
    second.restrict(one.domid)
    remote = second.bind_interdomain(one.domid, first.bind_unbound(other.domid))
    assert second.take() == [remote]


def test_restrict_once(one: DomainDriver) -> None:
    events = Events(one)
    for domid in (0, DOMID_SELF, 0x7FFF, 0xFFFF):
        assert errno_of(events.restrict, domid) == "EINVAL"
    events.restrict(_ELSEWHERE)
    assert errno_of(events.restrict, _ELSEWHERE) == "EACCES"
    Events(one).restrict(_ELSEWHERE + 1)


# Everything else


@pytest.mark.parametrize("request_number", [0, 0x5401, 0x44505, 0x4507, 0x184700])
def test_other_requests(one: DomainDriver, request_number: int) -> None:
    """ENOSYS, not ENOTTY."""
    assert errno_of(Events(one).file.ioctl, request_number, bytearray(32)) == "ENOSYS"


def test_arguments_that_end_too_early(one: DomainDriver) -> None:
    events = Events(one)
    for request in (
        xen_evtchn.BIND_VIRQ,
        xen_evtchn.BIND_INTERDOMAIN,
        xen_evtchn.BIND_UNBOUND_PORT,
        xen_evtchn.UNBIND,
        xen_evtchn.NOTIFY,
        xen_evtchn.RESTRICT_DOMID,
    ):
        size = request >> 16
        for length in (0, size - 1):
            assert errno_of(events.file.ioctl, request, bytearray(length)) == "EFAULT"


def test_a_crash_frees_the_number_of_its_ports(world: World, one: DomainDriver) -> None:
    """EINVAL or ESRCH: what waited at a domain that ended cannot be bound."""
    gone = world.make_domain()
    port = Events(gone).bind_unbound(one.domid)
    gone.crash()
    assert eventually(lambda: errno_of(Events(one).bind_interdomain, gone.domid, port) in ("ESRCH", "EINVAL"))
