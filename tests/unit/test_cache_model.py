"""The model of the registration cache: each rule once by hand, then all of them at random against its own promises."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from usermm import ArgumentError, ClosedError, DeviceError, LimitError, OverlapError, RegistrationError, UsermmError
from usermm.registrars import Overlap, Traits
from usermm.testing import AddressSpace, Flavour, ModelCache, ModelRegistration, Notification, Range, ScriptedRegistrar

PAGE = 4096
A = 0x1000_0000
PAGES = 12
REFUSED = Traits(overlap=Overlap.REFUSED)
MERGED = Traits(overlap=Overlap.MERGED)


class Bench:
    """Twelve mapped pages at A, a cache, and what both hear and do; pages are counted from 0."""

    def __init__(self, traits: Traits | None = None, **limits: int) -> None:
        self.space = AddressSpace()
        self.space.mmap(PAGES * PAGE, address=A, fixed=True)
        self.registrar = ScriptedRegistrar(traits)
        self.cache = ModelCache(self.space, self.registrar, **limits)

    def get(self, first: int, end: int, **told: Any) -> ModelRegistration:
        return self.cache.get(A + first * PAGE, (end - first) * PAGE, **told)

    def keep(self, first: int, end: int) -> None:
        """Leaves it in the look-up, idle."""
        self.get(first, end).release()

    def munmap(self, first: int, end: int) -> None:
        self.space.munmap(A + first * PAGE, (end - first) * PAGE)

    def replace(self, first: int, end: int) -> None:
        """New memory at the same address."""
        self.space.mmap((end - first) * PAGE, address=A + first * PAGE, fixed=True)

    @property
    def live(self) -> list[tuple[int, int]]:
        return [in_pages(each) for each in self.cache.live]

    @property
    def registered(self) -> list[tuple[int, int]]:
        assert sorted((pin.address, pin.length) for pin in self.registrar.live) == [
            (each.start, each.length) for each in self.cache.registered
        ]
        return [in_pages(each) for each in self.cache.registered]


def in_pages(each: Range) -> tuple[int, int]:
    return (each.start - A) // PAGE, (each.end - A) // PAGE


def pages(first: int, end: int) -> Range:
    return Range(A + first * PAGE, A + end * PAGE)


# Hits


def test_the_same_range_again_is_a_hit() -> None:
    bench = Bench()
    first, second = bench.get(0, 2), bench.get(0, 2)
    assert (first.outcome.hit, second.outcome.hit) == (False, True)
    assert (first.outcome.tries, second.outcome.tries) == (1, 0)
    assert first.handle is second.handle
    assert (second.address, second.length, second.valid) == (A, 2 * PAGE, True)


def test_a_part_is_a_hit_and_more_is_a_miss() -> None:
    bench = Bench()
    bench.keep(2, 5)
    assert bench.get(3, 4).outcome.hit
    assert not bench.get(3, 6).outcome.hit


def test_whose_start_is_the_same_goes_before_who_covers() -> None:
    bench = Bench()
    bench.keep(0, 6)
    bench.keep(2, 7)
    assert in_pages(pages_of(bench.get(2, 4))) == (2, 7)
    with pytest.raises(ArgumentError):
        bench.get(2, 4, covering=pages(0, 6))


def test_the_caller_can_say_which_of_several_it_was() -> None:
    bench = Bench()
    bench.keep(0, 6)
    bench.keep(1, 7)
    for choice in (pages(0, 6), pages(1, 7)):
        registration = bench.get(2, 4, covering=choice)
        assert registration.outcome.hit
        assert pages_of(registration) == choice


def test_a_hit_compares_unrounded_bytes() -> None:
    bench = Bench(Traits(granularity_bytes=PAGE))
    registration = bench.cache.get(A + 100, 50)
    assert pages_of(registration) == pages(0, 1)
    assert bench.cache.get(A, 10).outcome.hit
    assert pages_of(bench.cache.get(A + PAGE - 1, 2)) == pages(0, 2)


# Notifications


def test_a_hit_entry_leaves_at_once_and_is_deregistered_by_the_next_call() -> None:
    bench = Bench()
    bench.keep(0, 2)
    bench.munmap(1, 2)
    assert (bench.live, bench.registered) == ([], [(0, 2)])
    bench.cache.settle()
    assert bench.registered == []
    assert bench.cache.outcome.deregistered == [pages(0, 2)]


def test_what_is_dead_is_given_back_before_the_next_is_registered() -> None:
    bench = Bench(REFUSED)
    bench.keep(0, 2)
    bench.replace(0, 1)
    bench.get(1, 3)
    assert [call.name for call in bench.registrar.calls] == ["register", "deregister", "register"]


def test_a_held_entry_is_deregistered_when_its_last_holder_lets_go() -> None:
    bench = Bench()
    first, second = bench.get(0, 2), bench.get(0, 1)
    bench.replace(0, 1)
    assert (first.valid, second.valid) == (False, False)
    third = bench.get(0, 2)
    assert not third.outcome.hit
    first.release()
    first.release()
    assert bench.registered == [(0, 2), (0, 2)]
    second.release()
    assert bench.registered == [(0, 2)]
    assert third.valid


def test_memory_that_changes_while_it_is_registered_is_registered_again() -> None:
    bench = Bench()
    bench.registrar.at_register(1, runs_after=lambda: bench.replace(0, 1))
    registration = bench.get(0, 2)
    assert registration.valid
    assert registration.handle == 2
    assert (registration.outcome.tries, registration.outcome.deregistered) == (2, [pages(0, 2)])


def test_what_goes_while_another_is_registered_is_dealt_with_before_the_next_attempt() -> None:
    bench = Bench()
    bench.keep(4, 5)
    bench.registrar.at_register(2, runs_after=lambda: bench.replace(0, 5))
    bench.get(0, 2)
    assert bench.registered == [(0, 2)]


def test_memory_that_keeps_changing_is_given_up() -> None:
    bench = Bench()
    bench.registrar.at_register(None, runs=lambda: bench.replace(0, 1))
    with pytest.raises(RegistrationError) as caught:
        bench.get(0, 2)
    assert caught.value.errno == errno.EAGAIN
    assert (bench.cache.outcome.tries, bench.registered, bench.cache.pinned_bytes) == (8, [], 0)


def test_memory_that_goes_while_it_is_registered_is_not_there() -> None:
    bench = Bench()
    bench.registrar.at_register(1, runs_after=lambda: bench.munmap(0, 1))
    with pytest.raises(DeviceError) as caught:
        bench.get(0, 2)
    assert (caught.value.errno, bench.registered) == (errno.EFAULT, [])


# Overlaps


def test_overlaps_that_are_allowed_stay_apart() -> None:
    bench = Bench()
    bench.keep(0, 3)
    bench.keep(2, 5)
    assert bench.live == [(0, 3), (2, 5)]


@pytest.mark.parametrize("traits", [MERGED, REFUSED])
def test_idle_overlaps_are_merged_until_nothing_changes(traits: Traits) -> None:
    """Registered: what was asked for, what overlaps that, and so on; the old ones are deregistered first."""
    bench = Bench(traits)
    for first, end in ((0, 3), (4, 6), (8, 9)):
        bench.keep(first, end)
    registration = bench.get(2, 5)
    assert pages_of(registration) == pages(0, 6)
    assert registration.outcome.merged == [pages(0, 3), pages(4, 6)]
    assert registration.outcome.deregistered == [pages(0, 3), pages(4, 6)]
    assert [call.name for call in bench.registrar.calls[3:]] == ["deregister", "deregister", "register"]
    assert bench.live == [(0, 6), (8, 9)]


@pytest.mark.parametrize("overlap", [Overlap.MERGED, Overlap.REFUSED])
@pytest.mark.parametrize("adjacent", [False, True])
def test_neighbours_are_merged_if_wished(overlap: Overlap, adjacent: bool) -> None:
    bench = Bench(Traits(overlap=overlap, merge_adjacent=adjacent))
    for first, end in ((0, 1), (1, 2), (4, 5)):
        bench.keep(first, end)
    bench.keep(2, 4)
    assert bench.live == ([(0, 5)] if adjacent else [(0, 1), (1, 2), (2, 4), (4, 5)])


def test_neighbours_of_neighbours_are_merged() -> None:
    bench = Bench(Traits(overlap=Overlap.REFUSED, merge_adjacent=True))
    for registration in [bench.get(0, 1), bench.get(1, 2)]:  # apart, since they are held
        registration.release()
    assert bench.live == [(0, 1), (1, 2)]
    bench.keep(2, 3)
    assert bench.live == [(0, 3)]


@pytest.mark.parametrize("limits", [{"max_bytes": 5 * PAGE}, {}])
def test_a_union_that_does_not_fit_is_not_made(limits: dict[str, int]) -> None:
    bench = Bench(Traits(overlap=Overlap.REFUSED, max_length_bytes=None if limits else 5 * PAGE), **limits)
    bench.keep(0, 4)
    assert pages_of(bench.get(3, 6)) == pages(3, 6)
    assert bench.registered == [(3, 6)]


def test_a_union_that_is_refused_is_not_insisted_on() -> None:
    bench = Bench(REFUSED)
    bench.keep(0, 3)
    bench.registrar.at_register(2, raises=KeyError("no"))
    registration = bench.get(2, 5)
    assert (pages_of(registration), registration.outcome.tries) == (pages(2, 5), 2)
    registration.release()
    bench.registrar.at_register(None, raises=KeyError("no"))
    with pytest.raises(KeyError):
        bench.get(4, 6)
    assert (bench.cache.outcome.tries, bench.registered) == (2, [])


def test_a_union_of_which_a_part_goes_meanwhile() -> None:
    bench = Bench(REFUSED)
    bench.keep(0, 3)
    bench.registrar.at_register(2, runs_after=lambda: bench.munmap(0, 1))
    assert pages_of(bench.get(2, 5)) == pages(2, 5)


def test_a_union_of_which_a_part_changes_meanwhile() -> None:
    bench = Bench(REFUSED)
    bench.keep(0, 3)
    bench.registrar.at_register(2, runs_after=lambda: bench.replace(0, 1))
    registration = bench.get(2, 5)
    assert (pages_of(registration), registration.outcome.tries) == (pages(2, 5), 2)


def test_a_union_of_which_a_part_may_have_changed_before_it_was_watched() -> None:
    bench = Bench(REFUSED)
    bench.keep(0, 3)
    bench.registrar.at_deregister(1, runs=lambda: bench.replace(0, 1))
    registration = bench.get(2, 5)
    assert (pages_of(registration), registration.outcome.tries) == (pages(2, 5), 1)


def test_a_union_keeps_what_was_given_back_for_it() -> None:
    bench = Bench(REFUSED, max_bytes=6 * PAGE)
    bench.keep(6, 8)
    bench.keep(0, 3)
    registration = bench.get(2, 5)  # the merge first, then room: each begins the look-up again
    assert pages_of(registration) == pages(0, 5)
    assert registration.outcome.evicted == [pages(6, 8)]


def test_a_union_that_the_device_has_no_resources_for() -> None:
    bench = Bench(REFUSED)
    bench.keep(6, 8)
    bench.keep(0, 3)
    bench.registrar.at_register(3, raises=MemoryError)
    registration = bench.get(2, 5)
    assert (pages_of(registration), registration.outcome.evicted) == (pages(2, 5), [pages(6, 8)])


def test_a_part_of_a_union_that_somebody_holds_meanwhile() -> None:
    """What touches is given back for the union; while that happens, somebody gets it again and keeps it."""
    bench = Bench(Traits(overlap=Overlap.REFUSED, merge_adjacent=True), max_count=2)
    bench.keep(0, 1)
    bench.keep(2, 3)
    held: list[ModelRegistration] = []
    bench.registrar.at_deregister(2, runs=lambda: held.append(bench.get(0, 1)))
    registration = bench.get(1, 2)
    assert pages_of(registration) == pages(1, 2)
    assert bench.live == [(0, 1), (1, 2)]


def test_a_held_overlap_stays_registered_where_it_may() -> None:
    bench = Bench(MERGED)
    held = bench.get(0, 3)
    union = bench.get(2, 5)
    assert (held.valid, pages_of(union)) == (False, pages(0, 5))
    assert bench.registered == [(0, 3), (0, 5)]
    held.release()
    assert bench.registered == [(0, 5)]


def test_a_held_overlap_is_an_error_where_it_may_not() -> None:
    bench = Bench(REFUSED)
    held = bench.get(0, 3)
    with pytest.raises(OverlapError) as caught:
        bench.get(2, 5)
    assert caught.value.errno == errno.EADDRINUSE
    assert held.valid
    bench.replace(0, 1)
    with pytest.raises(OverlapError):
        bench.get(2, 5)
    held.release()
    assert pages_of(bench.get(2, 5)) == pages(2, 5)


def test_a_held_neighbour_is_left_alone_where_overlaps_are_refused() -> None:
    bench = Bench(Traits(overlap=Overlap.REFUSED, merge_adjacent=True))
    held = bench.get(0, 2)
    assert pages_of(bench.get(2, 4)) == pages(2, 4)
    assert held.valid


# Limits


def test_the_least_recently_used_idle_entry_makes_room() -> None:
    bench = Bench(max_bytes=6 * PAGE)
    for first in (0, 2, 4):
        bench.keep(first, first + 2)
    bench.keep(0, 1)
    held = bench.get(2, 4)
    registration = bench.get(6, 8)
    assert registration.outcome.evicted == [pages(4, 6)]
    assert bench.get(8, 10).outcome.evicted == [pages(0, 2)]
    with pytest.raises(LimitError):
        bench.get(10, 12)
    held.release()
    assert bench.get(10, 12).outcome.evicted == [pages(2, 4)]


def test_the_caller_can_say_who_made_room() -> None:
    bench = Bench(max_count=2)
    bench.keep(0, 1)
    bench.keep(1, 2)
    assert bench.get(2, 3, victims=[pages(1, 2)]).outcome.evicted == [pages(1, 2)]
    with pytest.raises(ArgumentError):
        bench.get(3, 4, victims=[pages(2, 3)])


def test_dead_and_held_registrations_count() -> None:
    bench = Bench(max_bytes=4 * PAGE)
    dead = bench.get(0, 3)
    bench.munmap(0, 1)
    with pytest.raises(LimitError):
        bench.get(4, 6)
    assert bench.get(4, 5).valid
    dead.release()
    assert bench.cache.pinned_bytes == PAGE


def test_longer_than_there_is_room() -> None:
    bench = Bench(Traits(max_length_bytes=4 * PAGE), max_bytes=3 * PAGE)
    bench.keep(0, 1)
    with pytest.raises(ArgumentError):
        bench.get(0, 5)
    with pytest.raises(LimitError):
        bench.get(0, 4)
    assert bench.live == [(0, 1)]


@pytest.mark.parametrize("error", [MemoryError, LimitError(errno.ENOMEM, "full")])
def test_a_device_without_resources_is_given_some(error: Any) -> None:
    bench = Bench()
    bench.keep(0, 1)
    bench.keep(1, 2)
    bench.registrar.at_register(3, raises=error)
    registration = bench.get(2, 3)
    assert (registration.outcome.evicted, registration.outcome.tries) == ([pages(0, 1)], 2)
    bench.registrar.at_register(None, raises=error)
    with pytest.raises((MemoryError, LimitError)):
        bench.get(3, 4)
    assert bench.live == [(2, 3)]


def test_what_is_dead_goes_before_what_is_used_least() -> None:
    bench = Bench()
    bench.keep(0, 1)
    bench.keep(1, 2)
    bench.registrar.at_register(3, runs=lambda: bench.replace(1, 2), raises=MemoryError)
    assert bench.get(2, 3).outcome.evicted == []
    assert bench.live == [(0, 1), (2, 3)]


def test_another_error_of_the_device_goes_to_the_caller() -> None:
    bench = Bench()
    bench.keep(0, 1)
    bench.registrar.at_register(2, raises=KeyError("no"))
    with pytest.raises(KeyError):
        bench.get(1, 2)
    assert (bench.live, bench.cache.pinned_bytes) == ([(0, 1)], PAGE)


def test_an_error_in_deregistering_is_nobodys() -> None:
    bench = Bench()
    bench.keep(0, 1)
    bench.registrar.at_deregister(1, raises_after=OSError("no"))
    assert bench.cache.evict(A, PAGE) == 1
    assert [type(error) for error in bench.cache.lost_errors] == [OSError]
    assert bench.registered == []


# Calls from within the registrar


@pytest.mark.parametrize(("traits", "first", "end"), [(Traits(), 1, 2), (MERGED, 1, 6), (REFUSED, 1, 6)])
def test_a_registrar_that_asks_for_what_it_is_registering(traits: Traits, first: int, end: int) -> None:
    bench = Bench(traits)
    bench.registrar.at_register(1, runs=lambda: bench.get(first, end))
    with pytest.raises(RegistrationError) as caught:
        bench.get(0, 3)
    assert (caught.value.errno, bench.registered) == (errno.EDEADLK, [])


def test_a_registrar_that_asks_for_what_it_is_deregistering() -> None:
    bench = Bench(REFUSED)
    bench.keep(0, 3)
    bench.registrar.at_deregister(1, runs=lambda: bench.get(1, 2))
    bench.cache.clear()
    assert [type(error) for error in bench.cache.lost_errors] == [RegistrationError]
    other = Bench(MERGED)
    other.keep(0, 3)
    other.registrar.at_deregister(1, runs=lambda: other.get(1, 2))
    other.cache.clear()
    assert other.live == [(1, 2)]


def test_a_registrar_that_needs_the_room_that_it_is_making() -> None:
    bench = Bench(max_count=1)
    bench.keep(0, 1)
    bench.registrar.at_deregister(1, runs=lambda: bench.get(1, 2))
    bench.cache.clear()
    assert [type(error) for error in bench.cache.lost_errors] == [RegistrationError]


def test_a_registrar_that_settles_what_is_being_settled() -> None:
    bench = Bench()
    bench.keep(0, 1)
    bench.keep(1, 2)
    bench.munmap(0, 2)
    bench.registrar.at_deregister(1, runs=bench.cache.settle)
    bench.cache.settle()
    assert bench.registered == []
    bench.registrar.check()


def test_a_registrar_that_asks_for_other_memory() -> None:
    bench = Bench(REFUSED, max_bytes=4 * PAGE)
    bench.registrar.at_register(1, runs=lambda: bench.keep(4, 6))
    bench.get(0, 2)
    assert bench.live == [(0, 2), (4, 6)]


def test_a_registrar_that_closes_the_cache() -> None:
    bench = Bench()
    bench.registrar.at_register(1, runs_after=bench.cache.close)
    with pytest.raises(ClosedError):
        bench.get(0, 1)
    assert bench.registered == []


# Leaving


def test_evict_and_clear() -> None:
    bench = Bench()
    for first in (0, 2, 4):
        bench.keep(first, first + 2)
    held = bench.get(2, 3)
    assert bench.cache.evict(A + 2 * PAGE - 1, 2) == 2
    assert (bench.live, bench.registered, held.valid) == ([(4, 6)], [(2, 4), (4, 6)], False)
    with pytest.raises(ArgumentError):
        bench.cache.evict(A + 5 * PAGE, 0)
    assert bench.cache.clear() == 1
    held.release()
    assert bench.registered == []


def test_giving_up_what_lingers() -> None:
    bench = Bench()
    bench.keep(0, 1)
    held = bench.get(1, 2)
    assert bench.cache.give_up_idle() == 1
    assert (bench.registered, held.valid) == ([(1, 2)], True)


def test_giving_up_one() -> None:
    bench = Bench()
    bench.keep(0, 1)
    bench.keep(1, 2)
    held = bench.get(2, 3)
    bench.replace(1, 2)
    bench.cache.give_up(1)
    assert bench.registered == [(1, 2), (2, 3)], "what is dead waits for the next call"
    for handle in (1, 2, held.handle):
        with pytest.raises(ArgumentError):
            bench.cache.give_up(handle)


def test_close() -> None:
    bench = Bench()
    with bench.cache:
        bench.keep(0, 1)
        held = bench.get(1, 2)
    bench.cache.close()
    assert (held.valid, bench.registered) == (False, [(1, 2)])
    with pytest.raises(ClosedError):
        bench.get(1, 2)
    assert bench.cache.clear() == 0
    with held:
        pass
    bench.registrar.check(empty=True)


def test_a_child_begins_with_nothing() -> None:
    bench = Bench()
    bench.keep(0, 1)
    held = bench.get(1, 2)
    child = bench.cache.fork(bench.space.fork())
    assert child.live == ()
    child.close()
    assert bench.registered == [(0, 1), (1, 2)]
    assert held.valid


def test_bad_input() -> None:
    bench = Bench()
    bench.keep(0, 1)
    for address, length in ((A, 0), (A, -1), (-1, 1), ((1 << 63) - 1, 2)):
        with pytest.raises(ArgumentError):
            bench.cache.get(address, length)
    with pytest.raises(DeviceError) as caught:
        bench.get(PAGES - 1, PAGES + 1)
    assert caught.value.errno == errno.EFAULT
    assert bench.live == [(0, 1)]


def pages_of(registration: ModelRegistration) -> Range:
    return Range(registration.address, registration.address + registration.length)


# At random


class TimedRegistrar(ScriptedRegistrar):
    """Knows how many notifications there had been when it began to register a handle."""

    def __init__(self, traits: Traits, notifications: list[Notification]) -> None:
        super().__init__(traits)
        self._notifications = notifications
        self.born: dict[object, int] = {}

    def register(self, address: int, length: int) -> object:
        before = len(self._notifications)
        handle = super().register(address, length)
        self.born[handle] = before
        return handle


some_page = st.integers(0, PAGES // 2)
some_bytes = st.integers(0, PAGES // 2 * PAGE)
some_count = st.integers(1, 4)
mostly = st.sampled_from([True, True, True, False])


class Promises(RuleBasedStateMachine):
    """What must hold whatever happens: see `agree` and `get`."""

    @initialize(
        flavour=st.sampled_from(Flavour),
        traits=st.builds(
            Traits,
            overlap=st.sampled_from(Overlap),
            merge_adjacent=st.booleans(),
            granularity_bytes=st.sampled_from([1, 512, PAGE]),
            max_length_bytes=st.sampled_from([None, 4 * PAGE]),
        ),
        max_pages=st.sampled_from([None, None, 4, 8]),
        max_count=st.sampled_from([None, None, 2, 4]),
    )
    def open(self, flavour: Flavour, traits: Traits, max_pages: int | None, max_count: int | None) -> None:
        self.notifications: list[Notification] = []
        self.space = AddressSpace(flavour)
        self.space.subscribe(self.notifications.append)
        self.space.mmap(PAGES * PAGE, address=A, fixed=True)
        self.registrar = TimedRegistrar(traits, self.notifications)
        max_bytes = max_pages and max_pages * PAGE
        self.cache = ModelCache(self.space, self.registrar, max_bytes=max_bytes, max_count=max_count)
        self.held: list[ModelRegistration] = []
        self.asked = 0
        """By the registrar, from within its calls: what such a call finds or gives up depends on that."""

    @rule(first=some_page, count=some_count, back=mostly)
    def change(self, first: int, count: int, back: bool) -> None:
        """The memory goes; there is new memory in its place, or a hole."""
        if back:
            self.space.mmap(count * PAGE, address=A + first * PAGE, fixed=True)
        else:
            self.space.munmap(A + first * PAGE, count * PAGE)

    @rule(start=some_bytes, length=st.integers(0, 3 * PAGE), kept=mostly)
    def get(self, start: int, length: int, kept: bool) -> None:
        wanted = Range(A + start, A + start + length)
        covered = any(each.covers(wanted) for each in self.cache.live)
        calls, asked = len(self.registrar.calls), self.asked
        try:
            registration = self.cache.get(wanted.start, wanted.length)
        except UsermmError as error:
            assert not covered or self.asked > asked or isinstance(error, ArgumentError)
            self.explain(error, wanted)
            return
        except (MemoryError, KeyError):
            return
        self.held.append(registration)
        assert registration.outcome.hit or not covered or self.asked > asked
        assert covered or self.registered_since(calls) or not registration.outcome.hit
        assert registration.valid
        assert pages_of(registration).covers(wanted)
        if kept:
            self.held.remove(registration)
            registration.release()

    @rule(first=some_page, count=some_count, kept=mostly)
    def get_pages(self, first: int, count: int, kept: bool) -> None:
        self.get(first * PAGE, count * PAGE, kept)

    def explain(self, error: UsermmError, wanted: Range) -> None:
        """An error is raised for its reason only."""
        traits, rounded = self.registrar.traits, wanted.rounded(self.registrar.traits.granularity_bytes)
        if isinstance(error, OverlapError):
            assert traits.overlap is Overlap.REFUSED
            assert any(pages_of(each).overlaps(rounded) for each in self.held)
        elif isinstance(error, LimitError) and (self.cache.max_bytes or rounded.length) >= rounded.length:
            assert all(pin.handle in {each.handle for each in self.held} for pin in self.registrar.live)
        elif isinstance(error, ArgumentError):
            too_long = traits.max_length_bytes is not None and rounded.length > traits.max_length_bytes
            assert wanted.length == 0 or too_long

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1))).release()

    @rule(first=some_page, count=some_count)
    def evict(self, first: int, count: int) -> None:
        calls = len(self.registrar.calls)
        self.cache.evict(A + first * PAGE, count * PAGE)
        if not self.registered_since(calls):
            assert not any(each.overlaps(pages(first, first + count)) for each in self.cache.live)

    @rule(call=st.sampled_from(["clear", "give_up_idle", "settle"]))
    def give_up(self, call: str) -> None:
        getattr(self.cache, call)()

    @rule(error=st.sampled_from([MemoryError, LimitError(errno.ENOMEM, "full"), KeyError("no")]))
    def let_the_next_registration_fail(self, error: Any) -> None:
        self.at_next("register", raises=error)

    @rule(first=some_page, count=some_count, back=mostly, late=st.booleans())
    def let_memory_change_in_the_next_registration(self, first: int, count: int, back: bool, late: bool) -> None:
        self.at_next("register", **{"runs_after" if late else "runs": lambda: self.change(first, count, back)})

    @rule(call=st.sampled_from(["register", "deregister"]), first=some_page, count=some_count)
    def let_the_registrar_ask_for_memory(self, call: str, first: int, count: int) -> None:
        def ask() -> None:
            self.asked += 1
            with contextlib.suppress(UsermmError, MemoryError, KeyError):
                self.held.append(self.cache.get(A + first * PAGE, count * PAGE))

        self.at_next(call, runs=ask)

    def at_next(self, name: str, **step: Any) -> None:
        number = 1 + sum(call.name == name for call in self.registrar.calls)
        schedule: Callable[..., None] = getattr(self.registrar, f"at_{name}")
        schedule(number, **step)

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def agree(self) -> None:
        self.registrar.check()
        assert not self.cache.lost_errors
        pins = {pin.handle: pin for pin in self.registrar.live}
        assert sorted((pin.address, pin.address + pin.length) for pin in pins.values()) == list(self.cache.registered)
        assert self.registrar.pinned_bytes == self.cache.pinned_bytes
        if self.cache.max_bytes is not None:
            assert self.registrar.peak_bytes <= self.cache.max_bytes
        if self.cache.max_count is not None:
            assert self.registrar.peak_count <= self.cache.max_count
        for each in self.held:
            assert each.handle in pins, "deregistered under its holder"
            assert not each.valid or not self.notified_since(each)

    def registered_since(self, calls: int) -> bool:
        """Registering was tried, maybe by a call from within the registrar."""
        return any(call.name == "register" for call in self.registrar.calls[calls:])

    def notified_since(self, registration: ModelRegistration) -> bool:
        since = self.notifications[self.registrar.born[registration.handle] :]
        return any(Range(each.start, each.end).overlaps(pages_of(registration)) for each in since)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            for each in self.held:
                each.release()
            self.registrar.check(empty=True)


TestPromises = Promises.TestCase
TestPromises.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
