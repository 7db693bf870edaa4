"""What a call leaves behind when it is interrupted, or when something ran out: nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.hypervisors import PAGE_BYTES, HypervisorProcess, socket_folder, wait_until
from support.processes import in_child, run_quietly
from support.threads import alarm

import usermm
from usermm.errors import DeviceError, LimitError
from usermm.grants import pools
from usermm.grants.gntdev import Copy
from usermm.grants.session import status
from usermm.hypercalls import grants as layouts
from usermm.hypercalls.wire import Operation
from usermm.hypervisor import notifications
from usermm.hypervisor.tables import Table


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt
    pass


def interrupt(*_: object) -> None:
    raise Interrupted


def usage(hypervisor: usermm.Hypervisor | HypervisorProcess) -> tuple[Any, ...]:
    """Of all domains: pages granted and mapped, ports, watches, transactions; and the extents."""
    found = status(hypervisor.socket)
    wanted = ("grants", "mapped", "event_channels", "watches", "transactions")
    return [[domain["usage"][each] for each in wanted] for domain in found["domains"]], len(found["grants"])


CALLS: dict[str, Callable[[usermm.Domain, usermm.Domain, Any], Any]] = {
    "allocate": lambda one, two, _: one.gntalloc.allocate(two.domid, 3),
    "a pool": lambda one, two, _: one.gntalloc.allocate(two.domid),
    "map": lambda one, two, pages: two.gntdev.map(one.domid, pages.references),
    "map one": lambda one, two, pages: two.gntdev.map(one.domid, pages.references[0]),
    "attach": lambda one, two, pages: two.gntdev.map(one.domid, pages.single.references),
    "copy": lambda one, two, pages: two.gntdev.copy([Copy((one.domid, pages.references[0], 0), bytearray(8), 8)]),
    "a port": lambda one, two, _: one.evtchn.bind_unbound_port(two.domid),
    "the other port": lambda one, two, pages: two.evtchn.bind_interdomain(one.domid, pages.port),
    "a watch": lambda one, *_: one.store.watch("x"),
    "a transaction": lambda one, *_: one.store.transaction(),
}


class Pages:
    """What the calls need."""

    def __init__(self, one: usermm.Domain, two: usermm.Domain) -> None:
        for domain in (one, two):
            for each in (domain.gntalloc, domain.gntdev, domain.evtchn, domain.store):
                assert each is not None
        one.gntalloc.allocate(two.domid).close()  # the second single page makes a pool
        self.several = one.gntalloc.allocate(two.domid, 4)
        self.references = self.several.references
        other = one.open_gntalloc()
        other.allocate(two.domid).close()
        self.single = other.allocate(two.domid)
        self.port = one.evtchn.bind_unbound_port(two.domid)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_is_undone(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain, name: str
) -> None:
    """By the next call, which finds its reply."""
    pages = Pages(one, two)
    before = usage(hypervisor)
    with hypervisor.turns.lock, alarm(interrupt, 0.05), pytest.raises(Interrupted):
        CALLS[name](one, two, pages)
    for domain in (one, two, one, two):
        domain.is_isolated_from(domain.domid)
    assert without_watches(usage(hypervisor)) == without_watches(before)
    again = CALLS[name](one, two, pages)
    if hasattr(again, "close"):
        again.close()


def test_a_handler_that_raises_what_a_socket_could(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain
) -> None:
    """TimeoutError is an OSError, and not the hypervisor's end."""

    def late(*_: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "late")

    with hypervisor.turns.lock, alarm(late, 0.05), pytest.raises(TimeoutError, match="late"):
        one.gntalloc.allocate(two.domid, 3)
    one.is_isolated_from(two.domid)
    two.is_isolated_from(two.domid)
    assert usage(hypervisor) == ([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], 0)


def without_watches(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """A watch whose descriptor is closed is counted until the next one is made."""
    domains, extents = found
    return [[*each[:3], each[4]] for each in domains], extents


@pytest.fixture
def elsewhere() -> Iterator[HypervisorProcess]:
    """It has a descriptor table of its own."""
    with socket_folder() as folder, HypervisorProcess(folder / "s") as found:
        yield found


KEPT = ("a port", "the other port")
"""What nobody lets go of here."""


@pytest.mark.parametrize("name", [name for name in CALLS if name != "a transaction"])
@pytest.mark.parametrize("room", range(4))
def test_a_full_descriptor_table_costs_nothing(elsewhere: HypervisorProcess, name: str, room: int) -> None:
    """LimitError, and nothing of it is left on either side; with a little more room it works."""
    with usermm.Domain(elsewhere.socket) as one, usermm.Domain(elsewhere.socket) as two:
        pages = Pages(one, two)
        before, descriptors = usage(elsewhere), len(os.listdir("/proc/self/fd"))
        failed = None
        with no_more_than(room):
            try:
                made = CALLS[name](one, two, pages)
            except LimitError as error:
                made, failed = None, error
        if hasattr(made, "close"):
            made.close()
        for domain in (one, two, one, two):
            domain.is_isolated_from(domain.domid)
        if failed is not None:
            assert failed.errno == errno.EMFILE
        if failed is not None or name not in (*KEPT, "attach", "a pool"):
            assert len(os.listdir("/proc/self/fd")) == descriptors
            assert without_watches(usage(elsewhere)) == without_watches(before)
        CALLS[name](one, two, pages) if name not in KEPT else None


@contextlib.contextmanager
def no_more_than(room: int) -> Iterator[None]:
    """So many descriptors can be had."""
    gc.collect()  # what others left behind may need some when it ends
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    stuffing: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                stuffing.append(os.dup(0))
        for _ in range(room):
            os.close(stuffing.pop())
        yield
    finally:
        for each in stuffing:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptor_for_a_domain_or_a_file(elsewhere: HypervisorProcess) -> None:
    with usermm.Domain(elsewhere.socket) as domain:
        for call in (lambda: usermm.Domain(elsewhere.socket), lambda: status(elsewhere.socket), domain.open_evtchn):
            with no_more_than(0), pytest.raises(LimitError) as caught:
                call()
            assert caught.value.errno == errno.EMFILE
        assert len(elsewhere.status()["domains"]) == 1


def test_events_of_ports_are_told_when_no_descriptor_is_free(elsewhere: HypervisorProcess) -> None:
    """A peer's end needs a new one: what other ports had to say was lost with it."""
    with usermm.Domain(elsewhere.socket) as one, usermm.Domain(elsewhere.socket) as two:
        mine = [one.evtchn.bind_unbound_port(two.domid) for _ in range(8)]
        theirs = [two.evtchn.bind_interdomain(one.domid, port) for port in mine]
        for port in theirs[:4]:
            two.evtchn.notify(port)
        for port in theirs[4:]:
            two.evtchn.unbind(port)
        with no_more_than(0):
            found: list[int] = []
            while len(found) < len(mine):
                now = one.evtchn.read(5)
                assert now, found
                found += now
        assert sorted(found) == mine
        one.evtchn.unmask(*mine)
        again = two.evtchn.bind_interdomain(one.domid, mine[7])
        two.evtchn.notify(again)
        assert one.evtchn.read(5) == [mine[7]]


def test_more_pages_than_descriptors(elsewhere: HypervisorProcess) -> None:
    """References in any order need a descriptor each, but not at a time."""
    count = 600
    with usermm.Domain(elsewhere.socket) as one, usermm.Domain(elsewhere.socket) as two:
        pages = one.gntalloc.allocate(two.domid, count, writable=True)
        for page in range(count):
            pages.write(page * PAGE_BYTES, page.to_bytes(4, "little"))
        backwards = list(reversed(pages.references))
        assert two.gntdev is not None
        with no_more_than(255 - len(os.listdir("/proc/self/fd"))):
            with two.gntdev.map(one.domid, backwards) as mapping:
                found = [int.from_bytes(mapping.read(page * PAGE_BYTES, 4), "little") for page in range(count)]
            assert found == list(reversed(range(count)))
            copies = [bytearray(4) for _ in range(count)]
            sources = [(one.domid, reference, 0) for reference in backwards]
            statuses = two.gntdev.copy([Copy(*each, 4) for each in zip(sources, copies, strict=True)])
            assert set(statuses) == {0}
            assert [int.from_bytes(each, "little") for each in copies] == found
        two.is_isolated_from(one.domid)
        usages = {each["domid"]: each["usage"]["mapped"] for each in elsewhere.status()["domains"]}
        assert usages[two.domid] == 0


def test_the_last_of_many_refused_leaves_nothing_mapped(elsewhere: HypervisorProcess) -> None:
    """Hundreds were mapped, a reply at a time, before the one that is not granted."""
    with usermm.Domain(elsewhere.socket) as one, usermm.Domain(elsewhere.socket) as two:
        pages = one.gntalloc.allocate(two.domid, 600)
        before = len(os.listdir("/proc/self/fd")), mapped_grants()
        with pytest.raises(usermm.BadReferenceError):
            two.gntdev.map(one.domid, [*reversed(pages.references), pages.references[-1] + 1])
        assert (len(os.listdir("/proc/self/fd")), mapped_grants()) == before


def mapped_grants() -> int:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        return sum("usermm:grant" in line for line in lines)


@pytest.mark.parametrize("end", ["grantor's", "grantee's"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_mapping_that_fails_while_a_pool_is_made(elsewhere: HypervisorProcess, end: str, nth: int) -> None:
    """vm.max_map_count: the pool would have been nobody's, until its domain ends."""
    original, calls = pools._page, [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise LimitError(errno.ENOMEM, "no mapping is left")
        return original(*arguments, **options)

    with usermm.Domain(elsewhere.socket) as one, usermm.Domain(elsewhere.socket) as two:
        pages = Pages(one, two)
        before, descriptors = usage(elsewhere), len(os.listdir("/proc/self/fd"))
        with mock.patch.object(pools, "_page", failing), pytest.raises(LimitError):
            CALLS["a pool" if end == "grantor's" else "attach"](one, two, pages)
        for domain in (one, two, one, two):
            domain.is_isolated_from(domain.domid)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert usage(elsewhere) == before


def test_closing_while_another_thread_opens(hypervisor: usermm.Hypervisor) -> None:
    for _ in range(200):
        domain = usermm.Domain(hypervisor.socket)
        begin = threading.Barrier(2)

        def use(domain: usermm.Domain = domain, begin: threading.Barrier = begin) -> None:
            begin.wait()
            with contextlib.suppress(DeviceError):
                for each in ("gntdev", "evtchn", "store", "gntalloc"):
                    getattr(domain, each)

        thread = threading.Thread(target=use)
        thread.start()
        begin.wait()
        domain.close()
        thread.join()
        assert domain.closed and domain._session is not None and domain._session.closed
    assert status(hypervisor.socket)["domains"] == []


def test_revoked_pages_do_not_count(hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain) -> None:
    """Whether they are taken back at once or one by one; the others can be released still."""
    for single in (False, True):
        pages = one.gntalloc.allocate(two.domid, 8)
        mapping = two.gntdev.map(one.domid, pages.references)
        if single:
            for reference in pages.references[:6]:
                one.gntalloc.revoke(reference)  # which its grantor could still write, by the mapping of the others
            assert [each["usage"]["grants"] for each in status(hypervisor.socket)["domains"]] == [8, 0]
        else:
            pages.revoke()
        pages.close()
        one.is_isolated_from(two.domid)
        held = 2 if single else 0
        assert [each["usage"]["grants"] for each in status(hypervisor.socket)["domains"]] == [held, 0]
        mapping.close()
        two.is_isolated_from(one.domid)
        assert usage(hypervisor) == ([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], 0)


def test_stale_references_do_not_use_up_the_grantees_quota(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain
) -> None:
    """Each wrong number had the whole pool attached once more."""
    pages = Pages(one, two)
    stale = pages.single.references[0] + pools.PAGES
    two.gntdev.map(one.domid, pages.single.references).close()
    for _ in range(50):
        with pytest.raises(usermm.BadReferenceError):
            two.gntdev.map(one.domid, stale)
    mapped = [each["usage"]["mapped"] for each in status(hypervisor.socket)["domains"]]
    assert mapped == [0, pools.PAGES]


def test_a_pool_that_is_dropped_between_two_looks(one: usermm.Domain, two: usermm.Domain) -> None:
    """By another thread that attached many others: the page is mapped without it."""
    pages = Pages(one, two)
    pages.single.write(0, b"here")
    original = pools.GranteePool.hold

    def dropping(self: pools.GranteePool, reference: int) -> bool:
        held = original(self, reference)
        self.drop()
        return held

    with mock.patch.object(pools.GranteePool, "hold", dropping):
        mapping = two.gntdev.map(one.domid, pages.single.references)
    assert mapping.read(0, 4) == b"here"
    mapping.close()
    reference = pages.single.references[0]
    pages.single.close()
    with pytest.raises(usermm.BadReferenceError):
        two.gntdev.map(one.domid, reference)


def test_a_port_that_is_unbound_before_the_mmap(one: usermm.Domain, two: usermm.Domain) -> None:
    """Its event cannot be sent; the mapping, and the byte that is to be cleared, are not to blame."""
    pages = one.gntalloc.allocate(two.domid, 1, writable=True)
    pages.write(5, b"x")
    index = two.gntdev.map_grant_ref([(one.domid, pages.references[0])])
    port = two.evtchn.bind_unbound_port(one.domid)
    two.gntdev.set_unmap_notify(index + 5, clear_byte=True, port=port)
    two.evtchn.unbind(port)
    mapping = two.gntdev.mmap(index, 1, 3)
    mapping.close()
    two.is_isolated_from(one.domid)
    assert pages.read(5, 1) == b"\0"


def test_a_childs_copies_take_nothing_from_the_parent(one: usermm.Domain, two: usermm.Domain) -> None:
    """Of the parent's events, and of its memory: in the child nothing is mapped."""
    pages = one.gntalloc.allocate(two.domid, 2)
    mapping = two.gntdev.map(one.domid, pages.references)
    watch = one.store.watch("x")

    def child() -> list[Any]:
        answers: list[Any] = [mapping.is_mapped, pages.is_mapped]
        for call in (lambda: watch.read(0), watch.fileno):
            try:
                answers.append(call())
            except DeviceError as error:
                answers.append(error.errno)
        watch.close()
        return answers

    assert in_child(child) == [False, True, errno.ECHILD, errno.ECHILD]
    assert watch.read(5) == ["x"]
    watch.close()


def test_descriptors_of_those_who_went_count_on_their_user(
    hypervisor: usermm.Hypervisor, two: usermm.Domain
) -> None:
    """As long as somebody has the memory the hypervisor has it open; a user could leave, come back and take more."""
    holding = hypervisor._server.grants.holding  # type: ignore[union-attr]
    user = os.getuid()
    before = holding.descriptors(user)
    with usermm.Domain(hypervisor.socket) as one:
        Pages(one, two)
        allocations = [one.gntalloc.allocate(two.domid, 2) for _ in range(3)]
        mappings = [two.gntdev.map(one.domid, pages.references) for pages in allocations]
        assert holding.descriptors(user) >= before + 3
    wait_until(lambda: len(status(hypervisor.socket)["grants"]) == 3, 5)
    assert holding.descriptors(user) == before + 3
    for mapping in mappings:
        mapping.close()
    two.is_isolated_from(two.domid)
    assert holding.descriptors(user) == before


def test_the_end_of_a_hypervisor_closes_nothing_twice(tmp_path: Path) -> None:
    """What its domains leave is cleaned up between turns, of which there are none any more."""
    run_quietly(
        """
        import usermm
        for _ in range(3):
            hypervisor = usermm.Hypervisor()
            one, two = (usermm.Domain(hypervisor.socket, limit=100000) for _ in range(2))
            pages = [one.gntalloc.allocate(two.domid, 2) for _ in range(1500)]
            hypervisor.close()
        """,
        tmp_path,
    )


def test_the_default_timeout_of_sockets_is_not_a_domains(hypervisor: usermm.Hypervisor) -> None:
    """A hypervisor that was busy for a moment was taken for one that had ended."""
    socket.setdefaulttimeout(0.02)
    try:
        with usermm.Domain(hypervisor.socket) as domain, domain.store.watch("x"):
            assert hypervisor._loop is not None
            hypervisor._loop.call_soon_threadsafe(time.sleep, 0.1)
            assert domain.is_isolated_from(domain.domid) is False
    finally:
        socket.setdefaulttimeout(None)


def test_revoked_pages_count_while_their_grantor_can_write_them(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain
) -> None:
    """By the descriptor that it was given; what it wrote there is gone with that."""
    assert one._session is not None
    wanted = layouts.ALLOCATE.pack(two.domid, layouts.ALLOCATE_WANT_DESCRIPTOR, 100)
    answer, (descriptor,) = one._session.call(Operation.ALLOCATE, wanted)
    first, _ = layouts.ALLOCATED.unpack(answer)
    mapping = two.gntdev.map(one.domid, range(first, first + 100))
    one._session.call(Operation.REVOKE, layouts.RANGE.pack(first, 100, 0))
    os.pwrite(descriptor, b"x" * 100 * PAGE_BYTES, 0)
    assert usage(hypervisor)[0][0][0] == 100
    assert os.fstat(descriptor).st_blocks
    os.close(descriptor)
    wait_until(lambda: usage(hypervisor)[0][0][0] == 0, 5)
    assert mapping.read(0, 1) == b"\0"


def test_notifications_end_at_their_limit(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain
) -> None:
    """All of a domain's are carried out at once when it goes; those that were, or were taken back, do not count."""
    pages = one.gntalloc.allocate(two.domid, 8, writable=True)
    with mock.patch.object(notifications, "MOST_NOTIFICATIONS", 8):
        for page in range(8):
            one.gntalloc.set_unmap_notify(pages.index + page * PAGE_BYTES, clear_byte=True)
        others = one.gntalloc.allocate(two.domid, 2)
        with pytest.raises(usermm.QuotaError):
            one.gntalloc.set_unmap_notify(others.index, clear_byte=True)
        one.gntalloc.set_unmap_notify(pages.index, clear_byte=True)
        one.gntalloc.set_unmap_notify(pages.index)
        one.gntalloc.set_unmap_notify(others.index, clear_byte=True)
        pages.close()
        for _ in range(3):
            for _ in range(5):
                index = two.gntdev.map_grant_ref([(one.domid, others.references[0])])
                mapping = two.gntdev.mmap(index, 1)
                port = two.evtchn.bind_unbound_port(one.domid)
                two.gntdev.set_unmap_notify(index, port=port)
                mapping.close()
                two.evtchn.unbind(port)
    tables = hypervisor._server.grants.holding.tables  # type: ignore[union-attr]
    assert [tables[domain.domid].notifications for domain in (one, two)] == [1, 0]


def test_an_heir_has_no_say_in_what_was_anothers(hypervisor: usermm.Hypervisor, one: usermm.Domain) -> None:
    """Handles are numbers that can be guessed; a domain's holds are its own, whoever has its number later."""
    number = one.domid + 100
    with usermm.Domain(hypervisor.socket, domid=number) as two:
        pages = one.gntalloc.allocate(number, 2, writable=True)
        mapping = two.gntdev.map(one.domid, pages.references, writable=True)
        holding = hypervisor._server.grants.holding  # type: ignore[union-attr]
        handles = [handle for handle, (_, hold, _) in holding._holds.items() if hold.domid == number]
        (handle,) = handles
        extent, hold, table = holding._holds[handle]
        assert holding.held_by(number, handle) == (extent, hold)
        holding.tables[number], kept = Table(), table
        assert holding.held_by(number, handle) is None
        holding.tables[number] = kept
        mapping.close()
