"""Which references a domain's table has, and which numbers are free: the same as by looking at each."""

from __future__ import annotations

import errno
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usermm.hypercalls.pools import BLOCK
from usermm.hypervisor import tables
from usermm.hypervisor.calls import Refused
from usermm.hypervisor.extents import Extent
from usermm.hypervisor.pools import Pool
from usermm.hypervisor.tables import References, Table


class AlwaysGranting(Pool):
    def grants(self, reference: int) -> bool:
        return reference % 3 == 0


def extent(first: int, count: int, *, pool: bool = False) -> Extent:
    made = Extent(-1, 1, 1000, 2, True, first, count, count, first)
    if pool:
        made.pool = AlwaysGranting(first, -1, -1)
    return made


def numbers_of(found: Extent) -> range:
    return range(found.first_reference, found.first_reference + found.span)


class Checked:
    """A table, and the same as a dictionary from each number to its extent, if it is live."""

    def __init__(self) -> None:
        self.table = Table()
        self.numbers = References(0)
        self.live: dict[int, Extent] = {}
        self.extents: list[Extent] = []

    def allocate(self, count: int) -> None:
        first = self.numbers.take(count, self.table)
        assert not any(number in self.spans() for number in range(first, first + count))
        made = extent(first, count)
        self.table.add(made)
        self.extents.append(made)
        self.live.update(dict.fromkeys(range(first, first + count), made))

    def make_pool(self) -> None:
        first = self.numbers.take_block(self.table)
        assert first % BLOCK == 0
        assert not any(number in self.spans() for number in range(first, first + BLOCK))
        made = extent(first, 32, pool=True)
        self.table.add(made)
        self.extents.append(made)
        self.live.update({number: made for number in range(first, first + BLOCK) if number % 3 == 0})

    def end(self, which: int, page: int, count: int) -> None:
        if not self.extents:
            return
        found = self.extents[which % len(self.extents)]
        page %= found.count
        count = min(count, found.count - page)
        if found.pool is not None:
            page, count = 0, found.count
        found.end(page, count)
        span = numbers_of(found)
        for number in span if found.pool is not None else range(span.start + page, span.start + page + count):
            self.live.pop(number, None)
        if not found.live:
            self.table.remove(found)
            self.extents.remove(found)
        else:
            assert found.live == sum(each is found for each in self.live.values())

    def spans(self) -> set[int]:
        return {number for each in self.extents for number in numbers_of(each)}

    def check(self, first: int, count: int) -> None:
        table, numbers = self.table, range(first, first + count)
        assert table.extent_of(first) is self.live.get(first)
        found = {id(self.live.get(number)) for number in numbers}
        one = self.live.get(first)
        whole = one is not None and len(found) == 1 and (one.pool is None or count == 1)
        assert table.find(first, count) is (one if whole else None)
        around = next((each for each in self.extents if first in numbers_of(each)), None)
        expected = None
        if around is not None and around.pool is None and first + count <= around.first_reference + around.count:
            expected = around if any(number in self.live for number in numbers) else None
        if around is None or around.pool is None:
            assert table.find_any(first, count) is expected
        used = table.used_until(first, first + count)
        assert (used is None) == (not self.spans().intersection(numbers))
        assert used is None or used > first


steps = st.one_of(
    st.tuples(st.just("allocate"), st.integers(1, 40)),
    st.tuples(st.just("make_pool")),
    st.tuples(st.just("end"), st.integers(0, 50), st.integers(0, 40), st.integers(1, 40)),
    st.tuples(st.just("check"), st.integers(0, 4200), st.integers(1, 50)),
)


@settings(deadline=None)
@given(st.lists(steps, max_size=40))
def test_it_is_as_by_looking_at_each(script: list[tuple[str, int]]) -> None:
    with mock.patch.object(tables, "_SEQUENCE_LIMIT", 4096):  # so that numbers come round again
        checked = Checked()
        for name, *arguments in script:
            try:
                getattr(checked, name)(*arguments)
            except Refused as refused:
                assert refused.errno == errno.ENOSPC
        for number in range(0, 4200, 7):
            checked.check(number, 3)


def test_a_search_ends_and_the_next_goes_on_from_there() -> None:
    """Thousands of single pages with gaps that are too small; behind them there is room."""
    table, numbers = Table(), References(0)
    for first in range(8, 8 + 100 * 10, 10):
        table.add(extent(first, 1))
    with mock.patch.object(tables, "_MOST_PASSED", 30), mock.patch.object(tables, "_SEQUENCE_LIMIT", 1 << 12):
        tries = 0
        while tries < 5:
            tries += 1
            try:
                first = numbers.take(10, table)
                break
            except Refused as refused:
                assert refused.errno == errno.ENOSPC
    assert tries == 4
    assert first == 8 + 99 * 10 + 1


def test_a_search_looks_at_no_number_by_itself() -> None:
    """Twice a single page at each end of a gap that is just too small was three rounds of a million steps."""
    table, numbers = Table(), References(0)
    gap = 1 << 12
    for first in range(8, 1 << 20, gap):
        table.add(extent(first, 1))
    looks = [0]
    original = Table.used_until

    def counted(self: Table, first: int, end: int) -> int | None:
        looks[0] += 1
        return original(self, first, end)

    with mock.patch.object(Table, "used_until", counted), pytest.raises(Refused):
        numbers.take(2 * gap - 1, table)
    assert looks[0] < 4 * (1 << 20) // gap
