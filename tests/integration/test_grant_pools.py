"""Single pages to one peer come from pools: what becomes of those when somebody ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from support.processes import fork

import usermm
from usermm.grants.gntalloc import Allocation, Gntalloc
from usermm.grants.session import status
from usermm.hypercalls.pools import block_of
from usermm.hypervisor import locks

PATIENCE_S = 10
NUMBER = 77


def pooled(one: usermm.Domain, domid: int) -> Allocation:
    """A page of a pool: the second one to a peer."""
    with one.gntalloc.allocate(domid):
        return one.gntalloc.allocate(domid)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


def map_and_sleep(socket: str, grantor: int, orders: int, answers: int) -> None:
    with usermm.Domain(socket, domid=NUMBER) as domain:
        os.write(answers, b"!")
        reference = int(os.read(orders, 20))
        page = domain.gntdev.map(grantor, reference)
        os.write(answers, page.read(0, 1))
        time.sleep(60)


@pytest.mark.parametrize("_", range(5))
def test_a_pool_is_closed_when_its_grantee_is_killed(hypervisor: usermm.Hypervisor, one: usermm.Domain, _: int) -> None:
    """Its descriptors are gone before its end is known: the pool's page was never granted again, and whoever came next
    with the number was granted pages that the dead one had looked into."""
    order_end, orders = os.pipe()
    answers, answer_end = os.pipe()
    child = fork()
    if child == 0:
        try:
            map_and_sleep(hypervisor.socket, one.domid, order_end, answer_end)
        finally:
            os._exit(0)
    assert os.read(answers, 1) == b"!"
    page = pooled(one, NUMBER)
    page.write(0, b"x")
    os.write(orders, str(page.references[0]).encode())
    assert os.read(answers, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: NUMBER not in {domain["domid"] for domain in status(hypervisor.socket)["domains"]})
    with usermm.Domain(hypervisor.socket, domid=NUMBER) as heir:
        fresh = one.gntalloc.allocate(NUMBER)
        assert block_of(fresh.references[0]) != block_of(page.references[0])
        with heir.gntdev.map(one.domid, fresh.references) as mapping:
            assert mapping.read(0, 1) == b"\x00"
        fresh.close()
        page.close()
        until(lambda: not any(grant["pooled"] for grant in status(hypervisor.socket)["grants"]))
    for descriptor in (order_end, orders, answers, answer_end):
        os.close(descriptor)


def test_a_lock_that_is_still_there_at_the_first_look_is_looked_at_again(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says that a file is closed before it drops its locks: a mapping seemed to be held for ever."""
    allocation = one.gntalloc.allocate(two.domid, 2)
    mapping = two.gntdev.map(one.domid, allocation.references)
    late = {"looks": 0}
    real = locks.is_held

    def held(memfd: int, byte: int) -> bool:
        late["looks"] += 1
        return late["looks"] <= 2 or real(memfd, byte)

    monkeypatch.setattr(locks, "is_held", held)
    monkeypatch.setattr(two._session, "tell", lambda *_: None)
    mapping.close()
    until(lambda: status(hypervisor.socket)["grants"][0]["mapped_by"] == [])
    allocation.close()


def test_pages_come_again_under_other_references(one: usermm.Domain, two: usermm.Domain) -> None:
    seen = set()
    page = pooled(one, two.domid)
    for number in range(40):
        page.write(0, bytes([number + 1]))
        assert page.references[0] not in seen
        seen.add(page.references[0])
        with two.gntdev.map(one.domid, page.references) as mapping:
            assert mapping.read(0, 2) == bytes([number + 1, 0])
        page.close()
        with pytest.raises(usermm.BadReferenceError):
            two.gntdev.map(one.domid, page.references)
        page = one.gntalloc.allocate(two.domid)
        assert page.read(0, 1) == b"\x00"
    page.close()


def test_a_page_that_is_mapped_is_not_granted_again(one: usermm.Domain, two: usermm.Domain) -> None:
    page = pooled(one, two.domid)
    page.write(0, b"mine")
    mapping = two.gntdev.map(one.domid, page.references)
    page.close()
    others = [one.gntalloc.allocate(two.domid) for _ in range(64)]
    for other in others:
        other.write(0, b"othr")
    assert mapping.read(0, 4) == b"mine"
    mapping.close()
    for other in others:
        other.close()


def test_numbers_run_out_before_anybody_waits_for_them(hypervisor: usermm.Hypervisor) -> None:
    """A domain that has all blocks of numbers for pools gets single pages; the hypervisor once looked for ever."""
    with usermm.Domain(hypervisor.socket, limit=1 << 20) as many, usermm.Domain(hypervisor.socket) as peer:
        pages = [many.gntalloc.allocate(peer.domid) for _ in range(300 * 32)]
        assert len({page.references[0] for page in pages}) == len(pages)
        with peer.gntdev.map(many.domid, pages[-1].references[0]) as mapping:
            assert len(mapping) == 4096
        for page in pages:
            page.close()


def test_pools_that_are_over_are_let_go(hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain) -> None:
    """The grantee unmaps what its grantor gave up, or left behind, when it is attached to the next."""
    for _ in range(3):
        with one.open_gntalloc() as file:
            use_a_pool(file, one.domid, two)
    with usermm.Domain(hypervisor.socket) as three:
        use_a_pool(three.gntalloc, three.domid, two)
    until(lambda: len(status(hypervisor.socket)["domains"]) == 2)
    use_a_pool(one.gntalloc, one.domid, two)
    until(lambda: len(status(hypervisor.socket)["grants"]) == 1)


def use_a_pool(file: Gntalloc, domid: int, grantee: usermm.Domain) -> None:
    for _ in range(3):
        with file.allocate(grantee.domid) as page, grantee.gntdev.map(domid, page.references) as mapping:
            assert mapping.read(0, 1) == b"\0"
