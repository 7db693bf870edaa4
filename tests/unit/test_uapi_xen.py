"""The computed numbers and sizes are those of Xen's devices, which anybody's binary has compiled in."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from usermm.uapi import xen_gntalloc, xen_gntdev
from usermm.uapi.xen_gntdev import GrantStatus


@pytest.mark.parametrize(
    ("computed", "published"),
    [
        (xen_gntdev.MAP_GRANT_REF, 0x184700),
        (xen_gntdev.UNMAP_GRANT_REF, 0x104701),
        (xen_gntdev.GET_OFFSET_FOR_VADDR, 0x184702),
        (xen_gntdev.SET_MAX_GRANTS, 0x044703),
        (xen_gntdev.SET_UNMAP_NOTIFY, 0x104707),
        (xen_gntdev.GRANT_COPY, 0x104708),
        (xen_gntalloc.ALLOC_GREF, 0x184705),
        (xen_gntalloc.DEALLOC_GREF, 0x104706),
        (xen_gntalloc.SET_UNMAP_NOTIFY, 0x104707),
    ],
)
def test_ioctl_numbers(computed: int, published: int) -> None:
    assert computed == published


@pytest.mark.parametrize(
    ("layout", "size_bytes"),
    [
        (xen_gntdev.REFERENCE, 8),
        (xen_gntdev.MAP, 16),
        (xen_gntdev.MAP_2007, 24),
        (xen_gntdev.UNMAP, 16),
        (xen_gntdev.UNMAP_2007, 16),
        (xen_gntdev.OFFSET, 24),
        (xen_gntdev.OFFSET_2007, 24),
        (xen_gntdev.NOTIFY, 16),
        (xen_gntdev.COPY, 16),
        (xen_gntdev.SEGMENT, 24),
        (xen_gntdev.COPY_LOCAL, 8),
        (xen_gntdev.COPY_GRANTED, 8),
        (xen_gntalloc.ALLOC, 16),
        (xen_gntalloc.DEALLOC, 16),
        (xen_gntalloc.REFERENCE, 4),
    ],
)
def test_struct_sizes(layout: struct.Struct, size_bytes: int) -> None:
    assert layout.size == size_bytes


def test_the_personalities_share_numbers_and_differ_in_layout() -> None:
    """The index is at 8 in one and at 16 in the other: the same 24 bytes cannot be told apart."""
    assert xen_gntdev.MAP.size + xen_gntdev.REFERENCE.size == xen_gntdev.MAP_2007.size
    assert xen_gntdev.MAP.pack(1, 0xAB)[8] == 0xAB
    assert xen_gntdev.MAP_2007.pack(1, 0, 0xAB)[16] == 0xAB


def test_where_fields_are() -> None:
    assert struct.unpack_from("=H", xen_gntalloc.ALLOC.pack(3, 1, 5, 0))[0] == 3
    assert struct.unpack_from("=H", xen_gntalloc.ALLOC.pack(3, 1, 5, 0), 2)[0] == xen_gntalloc.WRITABLE
    segment = xen_gntdev.SEGMENT.pack(xen_gntdev.COPY_LOCAL.pack(7), xen_gntdev.COPY_GRANTED.pack(8, 9, 10), 11, 2, -3)
    assert struct.unpack("=QIHHHHhH", segment) == (7, 8, 9, 10, 11, 2, -3, 0)


def test_grant_status_codes() -> None:
    assert [int(status) for status in GrantStatus] == [0, -1, -2, -3, -4, -8, -10]


_HEADERS = [
    (Path("/usr/include/xen/gntdev.h"), "IOCTL_GNTDEV_", xen_gntdev),
    (Path("/usr/include/xen/gntalloc.h"), "IOCTL_GNTALLOC_", xen_gntalloc),
]


@pytest.mark.parametrize(("header", "prefix", "module"), _HEADERS, ids=["gntdev", "gntalloc"])
def test_the_system_header_has_these_numbers(header: Path, prefix: str, module: object) -> None:
    """Where Linux' headers are installed (linux-libc-dev), their call numbers are ours."""
    if not header.exists():
        pytest.skip(f"{header} is not installed: apt install linux-libc-dev")
    words = header.read_text().split()
    found = 0
    for name, value in vars(module).items():
        if isinstance(value, int) and prefix + name in words:
            place = words.index(prefix + name, words.index("#define"))
            number = "".join(words[place + 1 :]).split("'G',", 1)[1].split(",", 1)[0]
            assert int(number) == value & 0xFF, name
            found += 1
    assert found >= 3
