"""The store through a hypervisor's socket: several domains, watches in loops, ends without a goodbye, races."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest
from support.processes import fork
from support.stores import refused

import usermm
from usermm.errors import ClosedError, ForkedError, HypervisorGoneError, LimitError
from usermm.grants.store import Transaction

PATIENCE_S = 20


@pytest.fixture
def hypervisor() -> Iterator[usermm.Hypervisor]:
    with usermm.Hypervisor() as hypervisor:
        yield hypervisor


@pytest.fixture
def front(hypervisor: usermm.Hypervisor) -> Iterator[usermm.Domain]:
    with usermm.Domain(hypervisor.socket, name="front") as domain:
        yield domain


@pytest.fixture
def back(hypervisor: usermm.Hypervisor) -> Iterator[usermm.Domain]:
    with usermm.Domain(hypervisor.socket, name="back") as domain:
        yield domain


def test_two_domains_find_each_other(front: usermm.Domain, back: usermm.Domain) -> None:
    peer = int(back.store.read("/names/front"))
    assert peer == front.domid
    front.store.write("ring/ref", "8")
    with refused(errno.EACCES):
        back.store.read(f"{back.store.domain_path(peer)}/ring/ref")
    front.store.set_permissions("ring/ref", (front.domid, "n"), (back.domid, "r"))
    assert back.store.read(f"{back.store.domain_path(peer)}/ring/ref") == b"8"


def test_a_watch_in_poll_and_select(front: usermm.Domain, back: usermm.Domain) -> None:
    front.store.mkdir("state")
    front.store.set_permissions("state", (front.domid, "r"))
    path = f"/local/domain/{front.domid}/state"
    with back.store.watch(path) as watch:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        assert len(poll.poll(0)) == 1
        assert watch.read() == [path]
        assert poll.poll(0) == []
        front.store.write("state", b"4")
        assert select.select([watch], [], [], PATIENCE_S) == ([watch], [], [])
        assert watch.read(PATIENCE_S) == [path]
        assert select.select([watch], [], [], 0) == ([], [], [])


def test_a_watch_in_asyncio(front: usermm.Domain) -> None:
    async def main() -> list[str]:
        found = []
        with front.store.watch("d") as watch:
            async for path in watch:
                found.append(path)
                if len(found) == 4:
                    watch.close()
                else:
                    await asyncio.to_thread(front.store.write, f"d/{len(found)}", b"")
        return found

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE_S)) == ["d", "d/1", "d/2", "d/3"]


def test_closing_a_watch_wakes_who_waits(front: usermm.Domain) -> None:
    watch = front.store.watch("d")
    watch.read()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            watch.read()
        except ClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    watch.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert len(raised) == 1


def test_a_client_that_never_reads_loses_its_watch_and_nothing_else(front: usermm.Domain, back: usermm.Domain) -> None:
    store = front.store
    with store.watch("d") as watch, store.watch("d/0") as other:
        for number in range(300):
            store.write(f"d/{number}", b"")
        assert other.read(PATIENCE_S) == ["d/0"]
        with pytest.raises(LimitError, match="read the tree anew"):
            for _ in range(300):
                watch.read(PATIENCE_S)
        assert back.store.read("name") == b"back"
    with store.watch("d") as watch:
        assert watch.read(PATIENCE_S) == ["d"]


def test_what_was_kept_comes_when_there_is_room(front: usermm.Domain) -> None:
    """The hypervisor's loop sends it on its own: no further request is needed."""
    with front.store.watch("d") as watch:
        for number in range(3000):
            front.store.write(f"d/{number % 50}", b"")
        front.store.write("d/last", b"")
        found: list[str] = []
        while "d/last" not in found:
            events = watch.read(PATIENCE_S)
            assert events, "the last event never came"
            found += events
        assert set(found) == {"d", "d/last", *(f"d/{number}" for number in range(50))}


def test_a_domain_that_dies_leaves_nothing(hypervisor: usermm.Hypervisor, front: usermm.Domain) -> None:
    ready, told = os.pipe()
    child = fork()
    if child == 0:
        domain = usermm.Domain(hypervisor.socket, name="mortal")
        domain.store.write("a/b", b"")
        domain.store.transaction().write("c", b"")
        domain.store.watch("a")
        os.write(told, b"%d" % domain.domid)
        signal.pause()
    os.close(told)
    with os.fdopen(ready), front.store.watch("@releaseDomain") as watch:
        domid = int(os.read(ready, 10))
        home = front.store.domain_path(domid)
        assert watch.read(PATIENCE_S) == ["@releaseDomain"]
        assert front.store.exists(f"{home}/name")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert watch.read(PATIENCE_S) == ["@releaseDomain"]
    assert not front.store.is_introduced(domid)
    assert not front.store.exists(f"{home}/name")
    assert front.store.list("/names") == ["front"]


def count_up(socket: str, rounds: int) -> None:
    def add(nodes: Transaction) -> None:
        nodes.write("/local/domain/0/count", str(int(nodes.read("/local/domain/0/count")) + 1))

    with usermm.Domain(socket) as domain:
        for _ in range(rounds):
            domain.store.atomically(add)


def test_racing_transactions_lose_nothing(hypervisor: usermm.Hypervisor) -> None:
    """Two processes count in one node; without transactions increments would be lost."""
    with usermm.Domain(hypervisor.socket, domid=0) as control:
        control.store.write("count", "0")
        control.store.set_permissions("count", (0, "b"))
        children = []
        for _ in range(2):
            child = fork()
            if child == 0:
                status = 1
                try:
                    count_up(hypervisor.socket, 200)
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert control.store.read("count") == b"400"


def test_threads_share_a_store(front: usermm.Domain) -> None:
    def work(number: int) -> None:
        for turn in range(100):
            front.store.write(f"{number}/{turn}", b"%d" % turn)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [len(front.store.list(str(number))) for number in range(4)] == [100] * 4


def test_a_forked_child_has_no_store_and_closes_no_watch(front: usermm.Domain) -> None:
    with front.store.watch("d") as watch:
        watch.read()
        child = fork()
        if child == 0:
            status = 1
            try:
                front.store.read("name")
            except ForkedError:
                watch.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        front.store.write("d", b"")
        assert watch.read(PATIENCE_S) == ["d"]


def test_the_hypervisor_goes(hypervisor: usermm.Hypervisor, front: usermm.Domain) -> None:
    with front.store.watch("d") as watch:
        watch.read()
        transaction = front.store.transaction()
        hypervisor.close()
        with pytest.raises(HypervisorGoneError):
            watch.read(PATIENCE_S)
        for call in (front.store.read, front.store.mkdir, front.store.watch, transaction.read):
            with pytest.raises(HypervisorGoneError):
                call("d")
        with pytest.raises(HypervisorGoneError):
            transaction.commit()
