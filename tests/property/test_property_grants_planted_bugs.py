"""The machine is worth something: mistakes of the kind that the first gntdev made are found by it."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from property.slots_machine import SlotsAgainstModel

from usermm.grants.slots import Slots, State, _Slot

_take = Slots.take


def search_does_not_begin_anew(self: Slots, start: int, end: int, count: int) -> int | None:
    free = [slot for slot in range(start, end) if self._slots[slot].state is State.INVALID]
    return free[0] if len(free) >= count else None


def next_fit_never_moves(self: Slots, references: Sequence[tuple[int, int]], call: str) -> int:
    first = _take(self, references, call)
    self._next_fit = 0
    return first


def frees_before_it_has_looked_at_all(self: Slots, first: int, count: int, call: str) -> None:
    for slot in range(first, first + count):
        if not 0 <= slot < len(self._slots) or self._slots[slot].state is not State.NOT_YET_MAPPED:
            raise OSError(errno.EINVAL, call)
        self._slots[slot] = _Slot()
        self._free.append(slot)


def slots_stay_mapped(self: Slots, first: int, count: int) -> None:
    """After munmap, and after an mmap that failed."""


MISTAKES = {
    "UNMAP frees what comes before the offender": ("free", frees_before_it_has_looked_at_all),
    "the next-fit index is never written": ("take", next_fit_never_moves),
    "slots stay MAPPED": ("unmapped", slots_stay_mapped),
    "the search does not begin anew at a busy slot": ("_range", search_does_not_begin_anew),
}


@pytest.fixture(params=sorted(MISTAKES))
def mistake(request: pytest.FixtureRequest) -> Iterator[str]:
    name, replacement = MISTAKES[request.param]
    with mock.patch.object(Slots, name, replacement):
        yield request.param


@pytest.mark.usefixtures("mistake")
def test_a_planted_mistake_is_found() -> None:
    """A machine that cannot fail proves nothing."""
    with pytest.raises((AssertionError, IndexError, ValueError)):
        run_state_machine_as_test(SlotsAgainstModel, settings=settings.get_profile("usermm-planted"))
