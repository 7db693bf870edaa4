"""Quotas: Xen's names and defaults, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from usermm.errors import ArgumentError
from usermm.hypervisor import quotas
from usermm.hypervisor.quotas import Quotas


def test_the_defaults_are_xens() -> None:
    assert Quotas().as_data() == {
        "max_grant_frames": 64,
        "max_maptrack_frames": 1024,
        "max_event_channels": 1023,
        "max_memkb": 1024 * 1024,
        "quota_entries": 1000,
        "quota_maxsize": 2048,
        "quota_maxwatch": 128,
        "quota_transaction": 10,
        "quota_pathmax": 3072,
    }


def test_frames_are_counted_in_entries() -> None:
    assert Quotas().max_grants == 64 * 512
    assert Quotas().max_mapped == 1024 * 256
    assert Quotas(max_grant_frames=0).max_grants == 0


def test_replacing_keeps_the_rest_and_the_original() -> None:
    original = Quotas(quota_maxwatch=7)
    changed = original.replace({"max_memkb": 4, "quota_entries": 10})
    assert (changed.max_memkb, changed.quota_entries, changed.quota_maxwatch) == (4, 10, 7)
    assert original == Quotas(quota_maxwatch=7)


def test_quotas_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Quotas().max_memkb = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", quotas.NAMES)
@pytest.mark.parametrize("value", [-1, 2**63, True, 1.5, "64", None])
def test_what_is_no_number_in_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name} = .*: give a whole number from \d+ to \d+$"):
        Quotas().replace({name: value})
    with pytest.raises(ArgumentError, match=name):
        Quotas(**{name: value})  # type: ignore[arg-type]


def test_an_unknown_quota_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ArgumentError, match=r"^max_grants: there is no such quota: give max_grant_frames, .*pathmax$"):
        Quotas().replace({"max_grants": 1})


def test_the_message_is_one_line_whatever_the_value() -> None:
    with pytest.raises(ArgumentError) as caught:
        Quotas().replace({"max_memkb": "a\nb"})
    assert "\n" not in str(caught.value)
