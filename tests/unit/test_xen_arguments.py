"""What a program hands to a real Xen's drivers: nothing that they would read or write beyond the end of."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from usermm._core import process
from usermm.errors import GrantError
from usermm.grants.xen import XenFile, XenGntalloc, XenGntdev
from usermm.uapi import xen_evtchn, xen_gntalloc, xen_gntdev

SHORT = [
    (XenGntalloc, xen_gntalloc.ALLOC_GREF, b"", 24),
    (XenGntalloc, xen_gntalloc.ALLOC_GREF, xen_gntalloc.ALLOC.pack(0, 0, 1, 0) + bytes(7), 24),
    (XenGntalloc, xen_gntalloc.ALLOC_GREF, xen_gntalloc.ALLOC.pack(0, 0, 9, 0) + bytes(35), 52),
    (XenGntalloc, xen_gntalloc.DEALLOC_GREF, bytes(15), 16),
    (XenGntdev, xen_gntdev.MAP_GRANT_REF, xen_gntdev.MAP.pack(1, 0) + bytes(7), 24),
    (XenGntdev, xen_gntdev.MAP_GRANT_REF, xen_gntdev.MAP.pack(0xFFFF_FFFF, 0) + bytes(8), 16 + 8 * 0xFFFF_FFFF),
    (XenGntdev, xen_gntdev.GRANT_COPY, bytes(15), 16),
    (XenFile, xen_evtchn.NOTIFY, b"", 4),
]


@pytest.fixture
def null() -> Iterator[int]:
    """In the place of the device: whatever reaches it is ENOTTY."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def opened(kind: type[XenFile], descriptor: int) -> XenFile:
    file = kind.__new__(kind)
    file._name, file._descriptor, file._owner = "device", os.dup(descriptor), process()
    return file


@pytest.mark.parametrize(("kind", "request_number", "argument", "needed"), SHORT)
def test_an_argument_that_ends_too_early(
    kind: type[XenFile], request_number: int, argument: bytes, needed: int, null: int
) -> None:
    with pytest.raises(GrantError) as caught:
        opened(kind, null).ioctl(request_number, bytearray(argument))
    assert caught.value.errno == errno.EFAULT
    assert f"takes {needed} bytes, and {len(argument)} came" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "request_number", "argument"),
    [
        (XenGntalloc, xen_gntalloc.ALLOC_GREF, xen_gntalloc.ALLOC.pack(0, 0, 9, 0) + bytes(36)),
        (XenGntdev, xen_gntdev.MAP_GRANT_REF, xen_gntdev.MAP.pack(2, 0) + bytes(16)),
        (XenFile, xen_evtchn.NOTIFY, bytes(4)),
    ],
)
def test_one_that_is_long_enough_gets_there(
    kind: type[XenFile], request_number: int, argument: bytes, null: int
) -> None:
    with pytest.raises(GrantError) as caught:
        opened(kind, null).ioctl(request_number, bytearray(argument))
    assert caught.value.errno == errno.ENOTTY
