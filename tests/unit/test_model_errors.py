"""Every error that the reference model's documentation names is provoked once, and leaves everything as it was."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

import pytest

from usermm import ArgumentError, ArgumentTypeError, ClosedError, CookieError, DeviceError, WouldBlockError
from usermm.testing import (
    MADV_DONTNEED,
    MADV_FREE,
    MADV_REMOVE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    AddressSpace,
    Flavour,
    ModelDevice,
    Notification,
)
from usermm.uapi import ummunotify

PAGE = 4096
A = 0x1000_0000  # four private pages, then a hole, then two shared pages at B
B = A + 8 * PAGE


@pytest.fixture
def space() -> AddressSpace:
    space = AddressSpace(Flavour.MMU_NOTIFIER)
    space.mmap(4 * PAGE, address=A, fixed=True)
    space.mmap(2 * PAGE, address=B, fixed=True, shared=True)
    return space


Call = Callable[[AddressSpace], object]

REFUSED: dict[str, tuple[Call, int]] = {
    "mmap of nothing": (lambda space: space.mmap(0), errno.EINVAL),
    "mmap fixed inside a page": (lambda space: space.mmap(1, address=A + 1, fixed=True), errno.EINVAL),
    "mmap noreplace": (lambda space: space.mmap(1, address=A, noreplace=True), errno.EEXIST),
    "munmap of nothing": (lambda space: space.munmap(A, 0), errno.EINVAL),
    "munmap inside a page": (lambda space: space.munmap(A + 1, PAGE), errno.EINVAL),
    "mremap unknown flag": (lambda space: space.mremap(A, PAGE, PAGE, 8), errno.EINVAL),
    "mremap fixed, may not move": (lambda space: space.mremap(A, PAGE, PAGE, MREMAP_FIXED, B), errno.EINVAL),
    "mremap dontunmap, may not move": (lambda space: space.mremap(A, PAGE, PAGE, MREMAP_DONTUNMAP), errno.EINVAL),
    "mremap dontunmap with another size": (
        lambda space: space.mremap(A, PAGE, 2 * PAGE, MREMAP_DONTUNMAP | MREMAP_MAYMOVE),
        errno.EINVAL,
    ),
    "mremap to nothing": (lambda space: space.mremap(A, PAGE, 0), errno.EINVAL),
    "mremap onto itself": (
        lambda space: space.mremap(A, 2 * PAGE, 2 * PAGE, MREMAP_FIXED | MREMAP_MAYMOVE, A + PAGE),
        errno.EINVAL,
    ),
    "mremap of a hole": (lambda space: space.mremap(A + 3 * PAGE, 2 * PAGE, PAGE), errno.EFAULT),
    "mremap has no room": (lambda space: space.mremap(A, PAGE, 2 * PAGE), errno.ENOMEM),
    "madvise inside a page": (lambda space: space.madvise(A + 1, PAGE, MADV_DONTNEED), errno.EINVAL),
    "madvise FREE of shared memory": (lambda space: space.madvise(B, PAGE, MADV_FREE), errno.EINVAL),
    "madvise REMOVE of private memory": (lambda space: space.madvise(A, PAGE, MADV_REMOVE), errno.EINVAL),
    "madvise of a hole": (lambda space: space.madvise(A + 4 * PAGE, PAGE, MADV_DONTNEED), errno.ENOMEM),
    "mprotect inside a page": (lambda space: space.mprotect(A + 1, PAGE, mmap.PROT_READ), errno.EINVAL),
    "mprotect of a hole": (lambda space: space.mprotect(A, 5 * PAGE, mmap.PROT_READ), errno.ENOMEM),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_reports_and_changes_nothing(space: AddressSpace, name: str) -> None:
    call, number = REFUSED[name]
    heard: list[Notification] = []
    space.subscribe(heard.append)
    before = [(each.start, each.end, each.prot) for each in space.mappings()]
    with pytest.raises(DeviceError) as caught:
        call(space)
    assert caught.value.errno == number
    assert heard == []
    assert [(each.start, each.end, each.prot) for each in space.mappings()] == before


def test_free_of_watched_shared_memory_fails_and_is_reported() -> None:
    """Linux tells the userfaultfd of MADV_FREE before it refuses it for a shared mapping (seen on 6.18)."""
    space = AddressSpace(Flavour.USERFAULTFD)
    address = space.mmap(PAGE, shared=True)
    space.watch(address, address + PAGE)
    heard: list[Notification] = []
    space.subscribe(heard.append)
    with pytest.raises(DeviceError):
        space.madvise(address, PAGE, MADV_FREE)
    assert [(each.start, each.end) for each in heard] == [(address, address + PAGE)]


def test_madvise_does_what_it_can_before_a_hole(space: AddressSpace) -> None:
    device = ModelDevice(space)
    device.register_range(A, A + 4 * PAGE, 1)
    with pytest.raises(DeviceError):
        space.madvise(A + 3 * PAGE, 2 * PAGE, MADV_DONTNEED)
    assert device.generation == 1


def test_the_heap_stays_where_it_cannot_go() -> None:
    space = AddressSpace()
    start = space.brk()
    space.mmap(PAGE, address=start + 4 * PAGE, fixed=True)
    assert space.brk(start + 5 * PAGE) == start
    assert space.brk(start - PAGE) == start
    assert space.brk(start + 4 * PAGE) == start + 4 * PAGE


def test_an_unmapped_address_is_handed_out_again() -> None:
    space = AddressSpace()
    address = space.mmap(PAGE)
    space.munmap(address, PAGE)
    assert space.mmap(PAGE) == address


def test_device_arguments(space: AddressSpace) -> None:
    with pytest.raises(ArgumentError):
        ModelDevice(space, 3)
    device = ModelDevice(space, flags=os.O_RDONLY | os.O_NONBLOCK)
    for start, end in ((A, A), (A + 1, A), (-1, A), (A, (1 << 63) + 1)):
        with pytest.raises(ArgumentError):
            device.register_range(start, end)
    for cookie in (-1, 1 << 64):
        with pytest.raises(ArgumentError):
            device.register_range(A, A + 1, cookie)
    with pytest.raises(ArgumentTypeError):
        device.register_range(A, A + 1, "7")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError):
        device.ioctl(ummunotify.REGISTER_REGION, "no bytes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        device.ioctl(ummunotify.REGISTER_REGION, bytes(31))
    with pytest.raises(ArgumentError):
        device.ioctl(ummunotify.EXCHANGE_FEATURES, bytes(4))
    with pytest.raises(WouldBlockError):
        device.read_bytes()
    assert device.read(timeout=0.001) == []


def test_register_range(space: AddressSpace) -> None:
    device = ModelDevice(space)
    with pytest.raises(DeviceError) as caught:
        device.register_range(A, A + 5 * PAGE)
    assert caught.value.errno == errno.EFAULT
    first = device.register_range(A, A + 1)
    assert device.register_range(A, A + 1) != first
    with pytest.raises(CookieError):
        device.register_range(A, A + 1, first)
    device.unregister(first)
    with pytest.raises(CookieError):
        device.unregister(first)


def test_a_closed_device(space: AddressSpace) -> None:
    with ModelDevice(space) as device:
        device.register_range(A, A + 1, 1)
        page = device.mmap()
    device.close()
    assert device.closed
    space.munmap(A, PAGE)
    assert page[0] == 0
    calls: list[Callable[[], object]] = [
        lambda: device.generation,
        lambda: device.check(0),
        lambda: device.register_range(A, A + 1),
        lambda: device.unregister(1),
        device.read,
        device.read_bytes,
        device.poll,
        device.mmap,
        lambda: device.ioctl(0, bytes(0)),
        lambda: device.readinto(0, 32),
        lambda: device.write(b"x"),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
