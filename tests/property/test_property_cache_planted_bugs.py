"""The machine for caches is worth something: each mistake that somebody could make in a cache is found by it.

The mistakes are made in the model, which is as good as in the real one: what is found is that both differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from property.cache_side_by_side import CacheSideBySide
from property.recency import Recency
from support.available import needs_userfaultfd

from usermm.testing import ModelCache, Notification, Range
from usermm.testing.entries import Entry, Outcome
from usermm.testing.ledger import Ledger
from usermm.testing.merging import Making


def only_what_is_listed_is_hit(cache: ModelCache, notification: Notification) -> None:
    """Memory that changes while it is registered goes unnoticed."""
    for entry in cache._live():
        entry.hit = entry.range.overlaps(Range(notification.start, notification.end))


def touching_is_a_hit(cache: ModelCache, notification: Notification) -> None:
    gone = Range(notification.start - 1, notification.end)
    for each in (*cache._live(), *cache._pending):
        each.hit = each.hit or each.range.overlaps(gone)


def the_start_decides(cache: ModelCache, wanted: Range, _covering: Range | None) -> Entry | None:
    return next((entry for entry in cache._live() if entry.range.start == wanted.start), None)


def rounded_is_good_enough(cache: ModelCache, wanted: Range, _covering: Range | None) -> Entry | None:
    """Pages that are covered in part are taken for covered."""
    wanted = Range(wanted.start | 4095, max(wanted.start | 4095, (wanted.end - 1) & -4096))
    return next((entry for entry in cache._live() if entry.range.covers(wanted)), None)


def only_the_look_up_counts(cache: Ledger) -> int:
    """Limits are passed by what is held and dead."""
    return sum(entry.range.length for entry in cache._live())


def whoever_was_used_longest_ago(cache: Ledger, _outcome: Outcome) -> Entry | None:
    """Held or not."""
    return min(cache._live(), key=lambda entry: entry.used, default=None)


def what_is_dead_goes_now(cache: Ledger, entry: Entry, outcome: Outcome) -> None:
    """Deregistered under its other holders."""
    entry.holders -= 1
    if not entry.live and not entry.leaving:
        cache._deregister(entry, outcome)


def parts_stay(_cache: ModelCache, _target: Range, _outcome: Outcome) -> int:
    """A union is registered beside what it was made of."""
    return 0


def once_more(making: Making, *, alone: bool = False) -> None:
    """A union whose memory changed is tried again, though its parts have left the look-up."""
    if alone:
        making._union, making._alone = None, True


MISTAKES = {
    "memory changes unnoticed while it is registered": (ModelCache, "notify", only_what_is_listed_is_hit),
    "touching is a hit": (ModelCache, "notify", touching_is_a_hit),
    "a hit is looked up by its start alone": (ModelCache, "_hit", the_start_decides),
    "a hit is compared in pages": (ModelCache, "_hit", rounded_is_good_enough),
    "the limits count what is in the look-up": (Ledger, "pinned_bytes", property(only_the_look_up_counts)),
    "what is held makes room": (Ledger, "_victim", whoever_was_used_longest_ago),
    "the first of several holders deregisters": (Ledger, "_let_go", what_is_dead_goes_now),
    "a union leaves its parts": (ModelCache, "_merge", parts_stay),
    "a union that changed stays one": (Making, "forget_union", once_more),
}


@pytest.fixture(params=sorted(MISTAKES))
def mistake(request: pytest.FixtureRequest) -> Iterator[str]:
    where, name, replacement = MISTAKES[request.param]
    with mock.patch.object(where, name, replacement):
        yield request.param


@needs_userfaultfd
@pytest.mark.usefixtures("mistake")
def test_a_planted_mistake_is_found() -> None:
    """A machine that cannot fail proves nothing."""
    with pytest.raises(AssertionError):
        run_state_machine_as_test(CacheSideBySide, settings=settings.get_profile("usermm-planted"))


@pytest.mark.parametrize("again", [1, 2])
def test_an_order_of_use_that_is_turned_round_is_found(again: int) -> None:
    """The real cache has no such mistake to be made in; the judge of its order is tried by itself."""
    recency = Recency()
    recency.sweep()
    recency.hit(again)
    recency.check({3 - again}, {again})
    recency.hit(again)
    recency.check({again}, set())
    recency.hit(again)
    with pytest.raises(AssertionError):
        recency.check({again}, {3})
