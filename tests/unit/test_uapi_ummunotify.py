"""The computed numbers and sizes are those of the two device headers, which anybody's binary has compiled in."""

from __future__ import annotations

import pytest

from usermm.uapi import _ioctl, ummunot, ummunotify


@pytest.mark.parametrize(
    ("computed", "published"),
    [
        (ummunotify.EXCHANGE_FEATURES, 0xC0045501),
        (ummunotify.REGISTER_REGION, 0x40205502),
        (ummunotify.UNREGISTER_REGION, 0x40085503),
        (ummunot.REGISTER_REGION, 0xC0205501),
        (ummunot.UNREGISTER_REGION, 0x40085502),
    ],
)
def test_ioctl_numbers(computed: int, published: int) -> None:
    assert computed == published


def test_struct_sizes_in_bytes() -> None:
    assert ummunotify.FEATURES.size == 4
    assert ummunotify.REGISTER.size == 32
    assert ummunotify.COOKIE.size == 8
    assert ummunotify.EVENT.size == 32
    assert ummunot.REGISTER.size == 32
    assert ummunotify.EVENTS_PER_READ == 128


def test_the_two_versions_share_no_ioctl_number() -> None:
    version2 = {ummunotify.EXCHANGE_FEATURES, ummunotify.REGISTER_REGION, ummunotify.UNREGISTER_REGION}
    version1 = {ummunot.REGISTER_REGION, ummunot.UNREGISTER_REGION}
    assert not version1 & version2


def test_cookie_offsets_differ_between_the_versions() -> None:
    assert ummunotify.REGISTER.pack(1, 2, 3, 4, 5)[16:24] == (3).to_bytes(8, "little")
    assert ummunot.REGISTER.pack(1, 0, 1, 2, 3)[24:32] == (3).to_bytes(8, "little")


@pytest.mark.parametrize(("letter", "number", "size"), [("UU", 1, 4), ("U", 256, 4), ("U", 1, 1 << 14), ("U", -1, 4)])
def test_ioc_refuses_what_does_not_fit(letter: str, number: int, size: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        _ioctl._IOW(letter, number, size)
