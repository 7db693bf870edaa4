"""The hypervisor's table of event channel ports, without a domain's code: payloads in, sockets out."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import select
import socket
from collections.abc import Callable, Iterator

import pytest

from usermm.hypercalls import ports as layouts
from usermm.hypercalls.wire import DOMID_SELF
from usermm.hypervisor.calls import Refused, Reply
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.ports import Ports
from usermm.hypervisor.quotas import Quotas

END = b""
VIRQ_DOM_EXC = 3


class Host:
    """Ports, and domains 0 (control), 1, 2 and 3; keeps the sockets of replies until the test ends."""

    def __init__(self) -> None:
        self.domains = {domid: record(domid) for domid in range(4)}
        self.ports = Ports(self.domains.get)
        self.streams: list[socket.socket] = []

    def stream(self, reply: Reply) -> socket.socket:
        (descriptor,) = reply.descriptors
        stream = socket.socket(fileno=descriptor)
        stream.setblocking(False)
        self.streams.append(stream)
        return stream

    def unbound(self, domid: int, remote: int) -> tuple[int, socket.socket]:
        reply = self.ports.bind_unbound(self.domains[domid], memoryview(layouts.UNBOUND.pack(remote)))
        return layouts.PORT.unpack(reply.payload)[0], self.stream(reply)

    def interdomain(self, domid: int, remote: int, port: int) -> tuple[int, socket.socket]:
        payload = memoryview(layouts.INTERDOMAIN.pack(remote, port))
        reply = self.ports.bind_interdomain(self.domains[domid], payload)
        return layouts.PORT.unpack(reply.payload)[0], self.stream(reply)

    def pair(self) -> tuple[int, socket.socket, int, socket.socket]:
        """Domain 1's and domain 2's, with the first event taken."""
        mine, my_end = self.unbound(1, 2)
        theirs, their_end = self.interdomain(2, 1, mine)
        assert their_end.recv(100)
        return mine, my_end, theirs, their_end

    def virq(self, domid: int, virq: int = VIRQ_DOM_EXC) -> tuple[int, socket.socket]:
        reply = self.ports.bind_virq(self.domains[domid], memoryview(layouts.VIRQ.pack(virq)))
        return layouts.PORT.unpack(reply.payload)[0], self.stream(reply)

    def close(self, domid: int, port: int) -> None:
        assert self.ports.close(self.domains[domid], memoryview(layouts.PORT.pack(port))) == Reply()

    def rearm(self, domid: int, port: int) -> socket.socket:
        reply = self.ports.rearm(self.domains[domid], memoryview(layouts.PORT.pack(port)))
        assert reply.payload == b""
        return self.stream(reply)

    def die(self, domid: int) -> None:
        self.ports.domain_gone(self.domains.pop(domid))


def record(domid: int, ports: int = 1023) -> DomainRecord:
    return DomainRecord(domid, f"domain{domid}", 1000, 1000, 1, domid == 0, Quotas(max_event_channels=ports))


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.ports.close_all()
    for stream in host.streams:
        stream.close()


def refused(call: Callable[[], object]) -> int:
    with pytest.raises(Refused) as caught:
        call()
    assert "\n" not in caught.value.reason and ": " in caught.value.reason
    return caught.value.errno


def is_quiet(stream: socket.socket) -> bool:
    try:
        stream.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def test_ports_are_numbered_from_one_lowest_free_first(host: Host) -> None:
    assert [host.unbound(1, 2)[0] for _ in range(4)] == [1, 2, 3, 4]
    host.close(1, 3)
    host.close(1, 1)
    assert [host.unbound(1, 2)[0] for _ in range(3)] == [1, 3, 5]
    assert host.unbound(2, 1)[0] == 1


def test_a_bound_pair_carries_events_both_ways_and_starts_pending_at_the_binder(host: Host) -> None:
    mine, my_end = host.unbound(1, 2)
    theirs, their_end = host.interdomain(2, 1, mine)
    assert their_end.recv(100) == b"\1" and is_quiet(my_end)
    their_end.send(b"\1")
    assert my_end.recv(100) == b"\1"
    my_end.send(b"\1")
    assert their_end.recv(100) == b"\1"
    assert host.ports.is_bound(1, mine) and host.ports.is_bound(2, theirs) and not host.ports.is_bound(2, 7)


def test_only_the_named_domain_binds_and_only_once(host: Host) -> None:
    mine, _ = host.unbound(1, 2)
    assert refused(lambda: host.interdomain(3, 1, mine)) == errno.EINVAL
    assert refused(lambda: host.interdomain(1, 1, mine)) == errno.EINVAL
    host.interdomain(2, 1, mine)
    assert refused(lambda: host.interdomain(2, 1, mine)) == errno.EINVAL
    assert host.ports.status(3) == [] and len(host.ports.status(2)) == 1


def test_another_user_with_the_same_number_inherits_no_port(host: Host) -> None:
    stranger = dataclasses.replace(record(2), uid=4711)
    mine, _, _, _ = host.pair()
    waiting, _ = host.unbound(1, 2)
    early, _ = host.unbound(1, 9)
    host.die(2)
    host.domains[2], host.domains[9] = stranger, dataclasses.replace(record(9), uid=4711)
    assert refused(lambda: host.interdomain(2, 1, mine)) == errno.EINVAL
    assert refused(lambda: host.interdomain(2, 1, waiting)) == errno.EINVAL
    host.interdomain(9, 1, early)
    host.die(9)
    host.domains[9] = record(9)
    assert refused(lambda: host.interdomain(9, 1, early)) == errno.EINVAL


@pytest.mark.parametrize(("remote", "port", "no"), [(9, 1, errno.ESRCH), (1, 7, errno.EINVAL), (1, 0, errno.EINVAL)])
def test_binding_to_what_is_not_there(host: Host, remote: int, port: int, no: int) -> None:
    assert refused(lambda: host.interdomain(2, remote, port)) == no
    assert not host.ports.is_bound(2, 1)


@pytest.mark.parametrize("remote", [0x7FF1, 0x7FFF, 0xFFFF])
def test_a_reserved_domid_cannot_be_waited_for(host: Host, remote: int) -> None:
    assert refused(lambda: host.unbound(1, remote)) == errno.EINVAL


def test_a_domain_binds_to_itself(host: Host) -> None:
    first, first_end = host.unbound(1, DOMID_SELF)
    second, second_end = host.interdomain(1, DOMID_SELF, first)
    assert (first, second) == (1, 2)
    first_end.send(b"\1")
    assert second_end.recv(100) == b"\1\1"
    host.die(1)
    assert first_end.recv(100) == second_end.recv(100) == END


def test_the_quota_is_the_domains_own_and_refuses_without_a_trace(host: Host) -> None:
    host.domains[1] = record(1, ports=2)
    host.unbound(1, 2)
    host.unbound(1, 2)
    before = len(os.listdir("/proc/self/fd"))
    theirs, _ = host.unbound(2, 1)
    assert refused(lambda: host.unbound(1, 2)) == errno.ENOSPC
    assert refused(lambda: host.interdomain(1, 2, theirs)) == errno.ENOSPC
    assert len(os.listdir("/proc/self/fd")) == before + 3  # the pair of domain 2, and its own copy
    host.close(1, 2)
    assert host.interdomain(1, 2, theirs)[0] == 2


def test_closing_is_a_hang_up_and_the_port_waits_for_the_same_domain_again(host: Host) -> None:
    mine, my_end, theirs, their_end = host.pair()
    host.close(2, theirs)
    assert my_end.recv(100) == END and their_end.recv(100) == END
    assert host.ports.status(1) == [{"port": mine, "kind": "unbound", "remote_domid": 2, "pending": False}]
    assert refused(lambda: host.interdomain(3, 1, mine)) == errno.EINVAL
    my_next = host.rearm(1, mine)
    assert is_quiet(my_next)
    _, their_next = host.interdomain(2, 1, mine)
    their_next.send(b"\1")
    assert my_next.recv(100) == b"\1"


def test_a_death_hangs_up_although_a_childs_copy_of_the_end_is_open(host: Host) -> None:
    """Without shutdown(2) on the hypervisor's copy the survivor would never learn: a close closes one descriptor."""
    _, my_end, _, their_end = host.pair()
    copy = their_end.dup()
    their_end.close()
    host.die(2)
    assert my_end.recv(100) == END
    copy.close()


def test_what_was_sent_before_the_death_is_not_lost(host: Host) -> None:
    _, my_end, _, their_end = host.pair()
    their_end.send(b"\1")
    host.die(2)
    assert my_end.recv(100) == b"\1"
    assert my_end.recv(100) == END


def test_the_next_peer_may_bind_before_the_survivor_has_looked(host: Host) -> None:
    mine, my_end, _, _ = host.pair()
    host.die(2)
    host.domains[2] = record(2)
    _, their_next = host.interdomain(2, 1, mine)
    their_next.send(b"\1")
    assert my_end.recv(100) == END
    assert host.rearm(1, mine).recv(100) == b"\1"


def test_rearming_gives_the_same_end_until_it_is_hung_up(host: Host) -> None:
    mine, my_end, _, their_end = host.pair()
    again = host.rearm(1, mine)
    their_end.send(b"\1")
    assert again.recv(100) == b"\1" and is_quiet(my_end)


def test_a_domain_that_shuts_its_own_end_down_parts_the_ports(host: Host) -> None:
    """It has no right to keep the other from a usable port; nor does it lose its own."""
    mine, my_end, theirs, their_end = host.pair()
    their_end.shutdown(socket.SHUT_WR)
    assert my_end.recv(100) == END
    my_next = host.rearm(1, mine)
    assert is_quiet(my_next)
    assert their_end.recv(100) == END
    kinds = [port["kind"] for domid in (1, 2) for port in host.ports.status(domid)]
    assert kinds == ["unbound", "unbound"]
    _, binder = host.interdomain(1, 2, theirs)
    assert binder.recv(100) == b"\1"


def test_the_hypervisor_sends_in_a_domains_name(host: Host) -> None:
    mine, my_end, theirs, their_end = host.pair()
    host.ports.send(1, mine)
    assert their_end.recv(100) == b"\1" and is_quiet(my_end)
    host.ports.send(1, 99)
    host.ports.send(77, 1)
    host.close(2, theirs)
    host.ports.send(1, mine)
    assert their_end.recv(100) == END


def test_a_full_socket_does_not_make_the_hypervisor_wait(host: Host) -> None:
    """Not even when a domain has cleared O_NONBLOCK, which is the socket's and so the hypervisor's copy's as well."""
    mine, my_end, _, _ = host.pair()
    my_end.setblocking(True)
    for _ in range(2000):
        host.ports.send(1, mine)


def test_virtual_interrupts(host: Host) -> None:
    _, end = host.virq(0)
    assert is_quiet(end)
    host.ports.raise_virq(VIRQ_DOM_EXC)
    host.ports.raise_virq(4)
    assert end.recv(100) == b"\1"
    assert refused(lambda: host.virq(0)) == errno.EEXIST
    assert refused(lambda: host.virq(1)) == errno.EPERM
    assert refused(lambda: host.virq(0, 4)) == errno.EINVAL
    assert refused(lambda: host.interdomain(0, 0, 1)) == errno.EINVAL
    host.close(0, 1)
    assert end.recv(100) == END
    assert host.virq(0)[0] == 1


def test_a_closed_port_is_nobodys(host: Host) -> None:
    mine, _ = host.unbound(1, 2)
    assert refused(lambda: host.close(2, mine)) == errno.ENOTCONN
    host.close(1, mine)
    assert refused(lambda: host.close(1, mine)) == errno.ENOTCONN
    assert refused(lambda: host.rearm(1, mine)) == errno.ENOTCONN
    assert refused(lambda: host.interdomain(2, 1, mine)) == errno.EINVAL


def test_a_reused_number_has_no_event_of_before(host: Host) -> None:
    mine, _, _, their_end = host.pair()
    their_end.send(b"\1")
    host.close(1, mine)
    again, my_next = host.unbound(1, 2)
    assert again == mine and is_quiet(my_next)
    assert their_end.recv(100) == END


def test_no_descriptor_is_left_behind(host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        mine, _, theirs, _ = host.pair()
        host.virq(0)
        host.close(2, theirs)
        host.rearm(1, mine)
        host.die(0)
        host.die(1)
        host.die(2)
        host.domains = {domid: record(domid) for domid in range(4)}
        host.ports._exists = host.domains.get
    for stream in host.streams:
        stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_running_out_of_descriptors_changes_nothing(host: Host) -> None:
    mine, _ = host.unbound(1, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/", os.O_RDONLY)
    try:
        for room in (0, 1, 2):  # for nothing, for half a pair, for a pair and no copy
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare + room + (room > 0), hard))
            assert refused(lambda: host.unbound(1, 2)) == errno.EMFILE
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        assert refused(lambda: host.interdomain(2, 1, mine)) == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(spare)
    assert host.unbound(1, 2)[0] == mine + 1
    assert host.interdomain(2, 1, mine)[0] == 1


def test_the_status_says_what_waits(host: Host) -> None:
    mine, my_end, theirs, their_end = host.pair()
    their_end.send(b"\1")
    (port,) = host.ports.status(1)
    expected = {"port": mine, "kind": "interdomain", "remote_domid": 2, "remote_port": theirs, "pending": True}
    assert port == expected
    assert host.ports.status(2)[0]["pending"] is False
    assert my_end.recv(100) == b"\1"
    host.virq(0)
    assert host.ports.status(0) == [{"port": 1, "kind": "virq", "virq": VIRQ_DOM_EXC, "pending": False}]


def test_bound_pairs_go_on_without_the_hypervisor_and_then_see_each_other_die(host: Host) -> None:
    _, my_end, _, their_end = host.pair()
    host.ports.close_all()
    their_end.send(b"\1")
    assert my_end.recv(100) == b"\1"
    their_end.close()
    assert select.select([my_end], [], [], 5)[0] and my_end.recv(100) == END
