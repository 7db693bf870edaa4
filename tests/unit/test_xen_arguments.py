"""What a program hands to a real Xen's drivers: nothing that they would read or write beyond the end of."""

from __future__ import annotations

import errno
import mmap
import os
from unittest import mock

import pytest
from support.processes import in_child

from usermm.errors import BadReferenceError, ForkedError, GrantError
from usermm.grants.files import PAGE_BYTES
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


def opened(kind: type[XenFile]) -> XenFile:
    """With /dev/null in the place of the device: whatever reaches it is ENOTTY."""
    null = os.open(os.devnull, os.O_RDWR)
    with mock.patch("usermm.grants.xen.os.open", return_value=null):
        return kind("gntdev")


@pytest.mark.parametrize(("kind", "request_number", "argument", "needed"), SHORT)
def test_an_argument_that_ends_too_early(
    kind: type[XenFile], request_number: int, argument: bytes, needed: int
) -> None:
    with pytest.raises(GrantError) as caught:
        opened(kind).ioctl(request_number, bytearray(argument))
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
    kind: type[XenFile], request_number: int, argument: bytes
) -> None:
    with pytest.raises(GrantError) as caught:
        opened(kind).ioctl(request_number, bytearray(argument))
    assert caught.value.errno == errno.ENOTTY


def test_a_child_has_nothing_but_its_copy_to_close() -> None:
    file = opened(XenFile)

    def use_and_close() -> str:
        for call in (file.fileno, lambda: file.ioctl(xen_evtchn.RESET, bytearray()), lambda: file.read(4)):
            with pytest.raises(ForkedError, match="the file is the parent's"):
                call()
        file.close()
        return "closed"

    assert in_child(use_and_close) == "closed"
    os.fstat(file.fileno())


def test_a_file_that_is_dropped_is_closed() -> None:
    file = opened(XenGntdev)
    descriptor = file.fileno()
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def set_unmap_notify(file: XenFile, index: int, actions: int) -> None:
    file.ioctl(xen_gntdev.SET_UNMAP_NOTIFY, bytearray(xen_gntdev.NOTIFY.pack(index, actions, 0)))


def test_what_would_end_the_kernel_is_not_tried() -> None:
    """What the driver answers is pretended here; tests/integration/test_on_xen.py asks it."""
    file = opened(XenGntdev)
    assert isinstance(file, XenGntdev)
    with mock.patch("usermm.grants.xen.fcntl.ioctl", return_value=0):
        first = file.map_grant_ref([(0, 8), (0, 9)])
        set_unmap_notify(file, first + PAGE_BYTES + 3, xen_gntdev.NOTIFY_CLEAR_BYTE)
        with pytest.raises(BadReferenceError, match="CLEAR_BYTE is set for it"):
            file.mmap(2 * PAGE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, first)
        set_unmap_notify(file, first, 0)
        with pytest.raises(GrantError, match="from Xen"):  # it gets to the device, which is none
            file.mmap(2 * PAGE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, first)
        set_unmap_notify(file, first, xen_gntdev.NOTIFY_CLEAR_BYTE)
        file.unmap_grant_ref(first, 2)
        assert file.map_grant_ref([(0, 8)]) == first
        with pytest.raises(GrantError, match="from Xen"):
            file.mmap(PAGE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, first)
