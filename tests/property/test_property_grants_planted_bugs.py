"""The machine is worth something: mistakes of the kind that the first gntdev made are found by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from property.test_property_grants import SideBySide

from usermm.grants.local_gntdev import LocalGntdev
from usermm.grants.slots import Slots, State, _Slot

_take = Slots.take


def search_does_not_begin_anew(self: Slots, start: int, end: int, count: int) -> int | None:
    free = [slot for slot in range(start, end) if self._slots[slot].state is State.INVALID]
    return free[0] if len(free) >= count and all(each in self._free for each in range(free[0], free[0] + 1)) else None


def next_fit_never_moves(self: Slots, references: Sequence[tuple[int, int]], call: str) -> int:
    first = _take(self, references, call)
    self._next_fit = 0
    return first


def frees_before_it_has_looked_at_all(self: Slots, first: int, count: int, call: str) -> None:
    for slot in range(first, min(first + count, len(self._slots))):
        if self._slots[slot].state is State.NOT_YET_MAPPED:
            self._slots[slot] = _Slot()
            self._free.append(slot)
        else:
            raise OSError(22, call)


def slots_stay_mapped(self: Slots, first: int, count: int) -> None:
    """After munmap, and after an mmap that failed."""


def nobody_is_notified(self: LocalGntdev, found: Any) -> None:
    """The byte is never cleared."""


MISTAKES = {
    "the next-fit index is never written": (Slots, "take", next_fit_never_moves),
    "UNMAP frees what comes before the offender": (Slots, "free", frees_before_it_has_looked_at_all),
    "slots stay MAPPED": (Slots, "unmapped", slots_stay_mapped),
    "the search does not begin anew at a busy slot": (Slots, "_range", search_does_not_begin_anew),
    "an unmap notification is forgotten": (LocalGntdev, "_notify", nobody_is_notified),
}


@pytest.fixture(params=sorted(MISTAKES))
def mistake(request: pytest.FixtureRequest) -> Iterator[str]:
    where, name, replacement = MISTAKES[request.param]
    with mock.patch.object(where, name, replacement):
        yield request.param


@pytest.mark.usefixtures("mistake")
def test_a_planted_mistake_is_found() -> None:
    """A machine that cannot fail proves nothing."""
    with pytest.raises((AssertionError, IndexError, ValueError)):
        run_state_machine_as_test(SideBySide, settings=settings.get_profile("usermm-planted"))
