"""The machines are worth something: each mistake that somebody could make in a device is found by them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from property.model_machines import DeviceAgainstHistory

from usermm.errors import from_errno
from usermm.testing.regions import Region, Regions
from usermm.ummunotify.events import Event, Invalidation, Last


def unclipped_hint(region: Region) -> Invalidation:
    start, end = (region.hint_start, region.hint_end) if region.hint else (region.start, region.end)
    return Invalidation(region.cookie, start, end, region.hint)


def touching_is_a_hit(region: Region, start: int, end: int) -> bool:
    return region.start <= end and start <= region.end


def empty_is_never_hit(region: Region, start: int, end: int) -> bool:
    return region.start < region.end and region.start < end and start < region.end


def hint_survives(regions: Regions, region: Region, start: int, end: int) -> None:
    if region not in regions._queue:
        regions._queue.append(region)
        region.hint, region.hint_start, region.hint_end = True, start, end


def last_after_every_read(regions: Regions, capacity: int) -> list[Event]:
    events: list[Event] = [region.event() for region in regions._queue[:capacity]]
    del regions._queue[:capacity]
    regions._last_owed = False
    return [*events, Last(regions.generation)][:capacity]


def oldest_first(regions: Regions, cookie: int, start: int, end: int) -> None:
    if regions.has(cookie):
        raise from_errno(errno.EINVAL, "register: known")
    regions._newest_first.append(Region(cookie, start, end))


MISTAKES = {
    "the hint is not clipped": (Region, "event", unclipped_hint),
    "touching is a hit": (Region, "is_hit_by", touching_is_a_hit),
    "an empty region is never hit": (Region, "is_hit_by", empty_is_never_hit),
    "the hint survives a second hit": (Regions, "_hit", hint_survives),
    "LAST is never owed": (Regions, "take", last_after_every_read),
    "equal starts come oldest first": (Regions, "register", oldest_first),
}


@pytest.fixture(params=sorted(MISTAKES))
def mistake(request: pytest.FixtureRequest) -> Iterator[str]:
    where, name, replacement = MISTAKES[request.param]
    with mock.patch.object(where, name, replacement):
        yield request.param


@pytest.mark.usefixtures("mistake")
def test_a_planted_mistake_is_found() -> None:
    """A machine that cannot fail proves nothing."""
    with pytest.raises(AssertionError):
        run_state_machine_as_test(DeviceAgainstHistory, settings=settings.get_profile("usermm-planted"))
