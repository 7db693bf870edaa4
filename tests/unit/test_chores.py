"""Work in slices: in order, a little a turn, and what waits for it waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from usermm.hypercalls import store as layout
from usermm.hypercalls.store import Type
from usermm.hypervisor.calls import NotNow
from usermm.hypervisor.chores import Chores
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.quotas import Quotas
from usermm.hypervisor.store import service

MANY = 5000  # takes far longer than a slice


class Turns:
    """Stands for the loop."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []
        self.failures: list[Exception] = []
        self.chores = Chores(self.soon.append, self.failures.append)

    def turn(self) -> None:
        calls, self.soon[:] = list(self.soon), []
        for call in calls:
            call()

    def finish(self) -> int:
        """All turns that are left; how many there were."""
        turns = 0
        while self.soon:
            self.turn()
            turns += 1
        return turns


def steps(done: list[int], numbers: range, each_s: float = 0) -> Iterator[None]:
    """Each takes so long of this thread's time: that others run meanwhile is nobody's fault."""
    for number in numbers:
        until = time.thread_time() + each_s
        while time.thread_time() < until:
            pass
        done.append(number)
        yield


def test_what_is_short_is_done_at_once() -> None:
    turns, done = Turns(), list[int]()
    turns.chores.add(steps(done, range(10)))
    assert done == list(range(10)) and not turns.chores.is_busy and not turns.soon


def test_what_is_long_takes_turns_and_keeps_its_order() -> None:
    turns, done, told = Turns(), list[int](), list[int]()
    turns.chores.add(steps(done, range(100), 0.0005))
    assert turns.chores.is_busy and len(done) < 50
    turns.chores.add(steps(done, range(100, 110)))
    turns.chores.when_done(lambda: told.append(len(done)))
    assert turns.finish() > 3
    assert done == list(range(110)) and told == [110] and not turns.chores.is_busy


def test_what_is_dropped_is_not_done() -> None:
    turns, done = Turns(), list[int]()
    turns.chores.add(steps(done, range(100), 0.0005))
    turns.chores.close()
    before = len(done)
    turns.finish()
    turns.chores.add(steps(done, range(100)))
    assert len(done) == before < 100 and not turns.chores.is_busy


def test_a_mistake_in_one_holds_up_no_other() -> None:
    turns, done, told = Turns(), list[int](), list[int]()

    def mistaken() -> Iterator[None]:
        yield
        raise OSError(5, "x")

    turns.chores.add(steps(done, range(20), 0.0005))
    turns.chores.add(mistaken())
    turns.chores.add(steps(done, range(20, 30)))
    turns.chores.when_done(lambda: told.append(1))
    turns.finish()
    assert (done, told, len(turns.failures)) == (list(range(30)), [1], 1)


def record(domid: int) -> DomainRecord:
    return DomainRecord(domid, f"dom{domid}", 1000, 1000, 1, False, Quotas(quota_entries=2 * MANY))


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def store(turns: Turns) -> Iterator[service.Store]:
    made = service.Store(lambda *_: None, lambda _: None, turns.chores)
    for domid in (5, 6):
        made.domain_arrived(record(domid))
    ask(made, 5, Type.SET_PERMS, b"/local/domain/5\0n5\0b6\0")
    for number in range(MANY):
        ask(made, 6, Type.WRITE, b"/local/domain/5/d/%d\0x" % number)
        turns.finish()
    yield made
    made.close()


def ask(store: service.Store, domid: int, kind: Type, data: bytes) -> bytes:
    payload = layout.HEADER.pack(kind, 0, 0) + data
    return store.request(record(domid), memoryview(payload)).payload


def test_nobody_sees_half_a_tree(store: service.Store, turns: Turns) -> None:
    """What comes meanwhile is told to come again, and finds all of it gone."""
    ask(store, 5, Type.RM, b"d\0")
    assert turns.soon, "it was removed at a blow"
    again = []
    for domid, kind, data in ((6, Type.READ, b"/local/domain/5/d/7\0"), (5, Type.WRITE, b"d/new\0")):
        with pytest.raises(NotNow) as caught:
            ask(store, domid, kind, data)
        caught.value.when(lambda: again.append(1))
    with pytest.raises(NotNow):
        store.watch(record(5), memoryview(b"d\0token"))
    assert turns.finish() > 3
    assert again == [1, 1]
    with pytest.raises(Exception, match="no such node"):
        ask(store, 6, Type.READ, b"/local/domain/5/d/7\0")
    assert store.status()["domains"][6]["nodes"] == 0
    ask(store, 5, Type.WRITE, b"d/new\0")


def test_a_domain_that_goes_takes_what_is_below_its_home(store: service.Store, turns: Turns) -> None:
    """Also while something else is being removed; who comes under its number comes after."""
    ask(store, 6, Type.WRITE, b"own\0x")
    ask(store, 5, Type.RM, b"d\0")
    store.domain_gone(record(5))
    with pytest.raises(NotNow):
        store.refuse_while_busy()
    turns.finish()
    store.refuse_while_busy()
    store.domain_arrived(record(5))
    with pytest.raises(Exception, match="no such node"):
        ask(store, 5, Type.READ, b"d\0")
    assert ask(store, 6, Type.READ, b"own\0") == b"x"
