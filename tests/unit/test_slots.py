"""The slot table of the first gntdev, without a device around it."""

from __future__ import annotations

import errno

import pytest

from usermm.errors import BadReferenceError, DeviceError, QuotaError
from usermm.grants.slots import Slots, State

ANY = (1, 8)


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(DeviceError) as caught:
        call(*arguments)  # type: ignore[operator]
    return errno.errorcode[caught.value.errno or 0]


def test_a_slot_goes_through_its_states() -> None:
    slots = Slots()
    assert slots.state(0) is State.INVALID
    assert slots.take([ANY], "take") == 0
    assert slots.state(0) is State.NOT_YET_MAPPED
    assert slots.map(0, 1, "map") == [ANY]
    assert slots.state(0) is State.MAPPED
    slots.unmapped(0, 1)
    assert slots.state(0) is State.NOT_YET_MAPPED
    slots.free(0, 1, "free")
    assert slots.state(0) is State.INVALID


def test_references_come_back_in_order() -> None:
    slots = Slots()
    references = [(domid, domid * 10) for domid in range(128)]
    assert slots.take(references, "take") == 0
    assert slots.map(5, 7, "map") == references[5:12]


def test_errors_and_their_words() -> None:
    slots = Slots()
    slots.take([ANY] * 126, "take")
    with pytest.raises(QuotaError, match="take: 2 of 128 slots are free, and no 3 side by side"):
        slots.take([ANY] * 3, "take")
    with pytest.raises(BadReferenceError, match="free: slot 126 has no grant"):
        slots.free(120, 8, "free")
    slots.map(0, 1, "map")
    with pytest.raises(DeviceError, match="free: slot 0 is mapped: unmap it first"):
        slots.free(0, 127, "free")
    with pytest.raises(BadReferenceError, match="map: slot 0 is mapped"):
        slots.map(0, 2, "map")
    assert refusal(slots.map, 0, 0, "map") == "ENXIO"
    assert refusal(slots.map, -1, 1, "map") == "ENXIO"
    assert refusal(slots.free, -1, 1, "free") == "EINVAL"
    assert all(slots.state(slot) is State.NOT_YET_MAPPED for slot in range(1, 126))


def test_a_refusal_changes_nothing() -> None:
    slots = Slots()
    slots.take([ANY] * 127, "take")
    assert refusal(slots.take, [ANY] * 2, "take") == "ENOMEM"
    assert slots.take([ANY], "take") == 127
    assert refusal(slots.take, [ANY], "take") == "ENOMEM"


@pytest.mark.parametrize("next_fit", range(0, 128, 7))
@pytest.mark.parametrize("hole", [(0, 5), (60, 9), (123, 5)])
def test_the_only_range_there_is_is_found(next_fit: int, hole: tuple[int, int]) -> None:
    """Wherever the search begins: before the range, in the middle of it, behind it."""
    first, count = hole
    slots = Slots()
    slots.take([ANY] * 128, "take")
    slots.free(first, count, "free")
    slots._next_fit = next_fit
    assert slots.take([ANY] * count, "take") == first
