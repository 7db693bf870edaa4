"""Arguments that no device accepts: which error of the tree, one line, and nothing is changed by it."""

from __future__ import annotations

import copy
import errno
import mmap
import os
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.calls import ADDRESS, ALWAYS_ANSWERED, CALLS, COOKIE, PAGE_BYTES, memory, refused_line, register_argument

import usermm
from usermm import ArgumentError, ArgumentTypeError, ClosedError, CookieError, DeviceError, _core
from usermm.uapi import ummunot as v1
from usermm.uapi import ummunotify as v2


@pytest.fixture
def device() -> Iterator[usermm.Ummunotify]:
    """Has one region, and must have just that one, quiet and working, after the test."""
    with usermm.Ummunotify() as device:
        device.register_range(ADDRESS + 3 * PAGE_BYTES, ADDRESS + 4 * PAGE_BYTES, COOKIE)
        counts = _core.counts()
        yield device
        assert _core.counts() == counts
        assert (device.generation, device.read(timeout=0)) == (0, [])
        block = mmap.mmap(-1, PAGE_BYTES)
        device.register(block)
        block.close()
        assert device.generation == 1


def released() -> memoryview:
    view = memoryview(bytearray(4096))
    view.release()
    return view


def closed_mapping() -> mmap.mmap:
    mapping = mmap.mmap(-1, 4096)
    mapping.close()
    return mapping


def tensor(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"data_ptr": lambda: ADDRESS, "nbytes": PAGE_BYTES, **attributes})


class RaisesWhenAsked:
    def __index__(self) -> int:
        raise ZeroDivisionError("two\nlines")


BUFFERS: dict[str, tuple[Callable[[], Any], type[usermm.UsermmError]]] = {
    "nothing": (lambda: None, ArgumentTypeError),
    "text": (lambda: "text", ArgumentTypeError),
    "number": (lambda: ADDRESS, ArgumentTypeError),
    "list": (lambda: [1, 2], ArgumentTypeError),
    "class": (lambda: bytearray, ArgumentTypeError),
    "plain object": (object, ArgumentTypeError),
    "released memoryview": (released, ArgumentError),
    "closed mapping": (closed_mapping, ArgumentError),
    "every other column": (lambda: np.zeros((8, 8))[:, ::2], ArgumentError),
    "backwards": (lambda: np.zeros(8)[::-1], ArgumentError),
    "memoryview with steps": (lambda: memoryview(bytearray(64))[::2], ArgumentError),
    "objects": (lambda: np.zeros((0,)), ArgumentError),
    "empty bytes": (lambda: b"", ArgumentError),
    "empty bytearray": (bytearray, ArgumentError),
    "empty tensor": (lambda: tensor(nbytes=0), ArgumentError),
    "tensor with gaps": (lambda: tensor(is_contiguous=lambda: False), ArgumentError),
    "tensor on a device": (lambda: tensor(device=SimpleNamespace(type="cuda")), ArgumentError),
    "tensor without a size": (lambda: SimpleNamespace(data_ptr=lambda: ADDRESS), ArgumentTypeError),
    "size without an address": (lambda: SimpleNamespace(nbytes=PAGE_BYTES), ArgumentTypeError),
    "address of the wrong type": (lambda: tensor(data_ptr=lambda: "here"), ArgumentTypeError),
    "size of the wrong type": (lambda: tensor(nbytes=1.5), ArgumentTypeError),
    "negative address": (lambda: tensor(data_ptr=lambda: -PAGE_BYTES), ArgumentError),
    "negative size": (lambda: tensor(nbytes=-1), ArgumentError),
    "size beyond 64 bits": (lambda: tensor(nbytes=2**64), ArgumentError),
    "end beyond the addresses": (lambda: tensor(nbytes=2**64 - 1), ArgumentError),
    "address without size": (lambda: SimpleNamespace(address=ADDRESS), ArgumentTypeError),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_is_none(device: usermm.Ummunotify, name: str) -> None:
    make, kind = BUFFERS[name]
    buffer = make()
    line = refused_line(lambda: device.register(buffer, 1), kind)
    assert "buffer" in line or "must be" in line or "register" in line


def test_a_tensor_whose_device_is_a_name(device: usermm.Ummunotify) -> None:
    """The array API leaves open what `device` is: CuPy's and TensorFlow's tell by number or by name."""
    assert "host" in refused_line(lambda: _core.buffer_range(tensor(device="cuda:0")), ArgumentError)
    assert not device.closed


@pytest.mark.parametrize(
    "make",
    [
        lambda: memory,
        lambda: np.zeros((64, 64), order="F"),
        lambda: np.zeros((64, 64)).T,
        lambda: np.zeros(64)[3:9],
        lambda: memoryview(bytearray(100)),
        lambda: b"read-only",
        tensor,
        lambda: tensor(device=SimpleNamespace(type="cpu"), is_contiguous=lambda: True),
        lambda: tensor(device="cpu"),
        lambda: SimpleNamespace(address=ADDRESS, size=PAGE_BYTES),
        lambda: SimpleNamespace(address=np.uint64(ADDRESS), size=np.int32(PAGE_BYTES)),
    ],
)
def test_a_buffer_that_is_one(device: usermm.Ummunotify, make: Callable[[], Any]) -> None:
    buffer = make()
    start, length = _core.buffer_range(buffer)
    assert 0 < start < start + length < 1 << 47
    device.unregister(device.register(buffer))


COOKIES = [
    (-1, ArgumentError),
    (2**64, ArgumentError),
    (-(2**70), ArgumentError),
    ("x", ArgumentTypeError),
    (1.0, ArgumentTypeError),
    (np.float64(3), ArgumentTypeError),
    (np.int64(-1), ArgumentError),
    (b"7", ArgumentTypeError),
    (object(), ArgumentTypeError),
]


@pytest.mark.parametrize(("cookie", "kind"), COOKIES, ids=lambda value: repr(value)[:20])
def test_a_cookie_that_is_none(device: usermm.Ummunotify, cookie: Any, kind: type[usermm.UsermmError]) -> None:
    assert "cookie" in refused_line(lambda: device.register(memory, cookie), kind)
    assert "cookie" in refused_line(lambda: device.unregister(cookie), kind)


def test_a_cookie_of_thousands_of_digits(device: usermm.Ummunotify) -> None:
    with pytest.raises(ArgumentError):
        device.unregister(10**5000)


@pytest.mark.parametrize("cookie", [0, 1, 2**63, 2**64 - 1, True, np.int64(9), np.uint64(2**64 - 1), np.uint8(255)])
def test_a_cookie_that_is_one(device: usermm.Ummunotify, cookie: int) -> None:
    returned = device.register(memory, cookie)
    assert type(returned) is int
    assert returned == cookie
    device.unregister(cookie)


def test_the_exception_of_an_objects_own_conversion_is_kept(device: usermm.Ummunotify) -> None:
    """It may be a MemoryError or a KeyboardInterrupt; at the least it is the cause."""
    with pytest.raises((ZeroDivisionError, ArgumentTypeError)) as caught:
        device.register(memory, RaisesWhenAsked())  # type: ignore[arg-type]
    assert isinstance(caught.value, ZeroDivisionError) or isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_duplicate_cookie(device: usermm.Ummunotify) -> None:
    line = refused_line(lambda: device.register(memory, COOKIE), CookieError, errno.EINVAL)
    assert f"cookie={COOKIE}" in line
    assert "unregister it first" in line


def test_an_unknown_cookie(device: usermm.Ummunotify) -> None:
    assert "unregister(99)" in refused_line(lambda: device.unregister(99), CookieError, errno.EINVAL)


def test_own_cookies_step_aside(device: usermm.Ummunotify) -> None:
    first = device.register(memory)
    device.unregister(first)
    taken = [device.register(memory, first + step) for step in range(1, 5)]
    own = device.register(memory)
    assert own not in taken
    for cookie in [*taken, own]:
        device.unregister(cookie)


RANGES = [
    ((8192, 4096), ArgumentError, None),
    ((4096, 4096), ArgumentError, None),
    ((0, 0), ArgumentError, None),
    ((-4096, 4096), ArgumentError, None),
    ((0, 2**64), ArgumentError, None),
    ((2**64, 2**65), ArgumentError, None),
    ((1 << 63, (1 << 63) + 1), ArgumentError, None),
    ((8192.0, 4096.0), ArgumentTypeError, None),
    ((4096.0, 8192.0), ArgumentTypeError, None),
    (("4096", 8192), ArgumentTypeError, None),
    ((None, 8192), ArgumentTypeError, None),
    ((4096, None), ArgumentTypeError, None),
    ((4096, b""), ArgumentTypeError, None),
    ((1 << 47, 1 << 48), DeviceError, errno.EFAULT),
    ((1 << 62, 1 << 63), DeviceError, errno.EFAULT),
    ((0, 4096), DeviceError, errno.EFAULT),
    ((0, 1), DeviceError, errno.EFAULT),
]


@pytest.mark.parametrize(("limits", "kind", "number"), RANGES, ids=str)
def test_a_range_that_is_none(
    device: usermm.Ummunotify, limits: tuple[Any, Any], kind: type[usermm.UsermmError], number: int | None
) -> None:
    assert "register" in refused_line(lambda: device.register_range(*limits, 1), kind, number)


def test_a_range_with_an_absurd_end_gets_a_short_message(device: usermm.Ummunotify) -> None:
    with pytest.raises(ArgumentError) as caught:
        device.register_range(0, 10**3000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("limits", [(8192, 4096), (4096, 4096), (0, 0), (1 << 47, 1 << 48), (2**64 - 1, 0), (0, 4096)])
@pytest.mark.parametrize("abi", [1, 2])
def test_the_ioctl_takes_every_range(abi: int, limits: tuple[int, int]) -> None:
    """The ABI checks nothing about a range."""
    start, end = limits
    with usermm.Ummunotify(abi) as device:
        if abi == 2:
            device.ioctl(v2.REGISTER_REGION, v2.REGISTER.pack(start, end, COOKIE, 0xFFFF_FFFF, 0xFFFF_FFFF))
        else:
            device.ioctl(v1.REGISTER_REGION, v1.REGISTER.pack(v1.INTERFACE_VERSION, 0, start, end, COOKIE))
        assert _core.counts()["regions"] == 1
        assert device.check(0)
        device.unregister(COOKIE)


OPENINGS: list[tuple[dict[str, Any], type[usermm.UsermmError], int | None]] = [
    ({"abi": 0}, DeviceError, errno.EINVAL),
    ({"abi": 3}, DeviceError, errno.EINVAL),
    ({"abi": -1}, DeviceError, errno.EINVAL),
    ({"flags": os.O_RDWR}, DeviceError, errno.EINVAL),
    ({"flags": os.O_WRONLY}, DeviceError, errno.EINVAL),
]


@pytest.mark.parametrize(("arguments", "kind", "number"), OPENINGS, ids=str)
def test_an_opening_that_is_refused(
    device: usermm.Ummunotify, arguments: dict[str, Any], kind: type[usermm.UsermmError], number: int | None
) -> None:
    assert "open" in refused_line(lambda: usermm.Ummunotify(**arguments), kind, number)
    assert not device.closed


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"abi": "2"}, ArgumentTypeError),
        ({"abi": None}, ArgumentTypeError),
        ({"abi": 2.0}, ArgumentTypeError),
        ({"abi": 2**40}, usermm.UsermmError),
        ({"flags": "r"}, ArgumentTypeError),
        ({"flags": 2**40}, usermm.UsermmError),
    ],
    ids=str,
)
def test_an_opening_with_the_wrong_type(arguments: dict[str, Any], kind: type[usermm.UsermmError]) -> None:
    with pytest.raises(kind):
        usermm.Ummunotify(**arguments)


NUMBERS: dict[str, tuple[Callable[[usermm.Ummunotify], Any], type[usermm.UsermmError]]] = {
    "check text": (lambda device: device.check("0"), ArgumentTypeError),
    "check float": (lambda device: device.check(0.0), ArgumentTypeError),
    "check negative": (lambda device: device.check(-1), ArgumentError),
    "check too large": (lambda device: device.check(2**64), ArgumentError),
    "check too much": (lambda device: device.check(0, True, True), ArgumentTypeError),
    "check unknown": (lambda device: device.check(0, prob=True), ArgumentTypeError),
    "check nothing": (lambda device: device.check(), ArgumentTypeError),
    "read text": (lambda device: device.read("1"), ArgumentTypeError),
    "read complex": (lambda device: device.read(1j), ArgumentTypeError),
    "read negative": (lambda device: device.read(-0.001), ArgumentError),
    "read not a number": (lambda device: device.read(float("nan")), ArgumentError),
    "read minus infinity": (lambda device: device.read(float("-inf")), ArgumentError),
    "read_bytes text": (lambda device: device.read_bytes("1"), ArgumentTypeError),
    "read_bytes negative": (lambda device: device.read_bytes(-1), ArgumentError),
    "read_bytes None": (lambda device: device.read_bytes(None), ArgumentTypeError),
    "readinto text": (lambda device: device.readinto("0", 32), ArgumentTypeError),
    "readinto buffer": (lambda device: device.readinto(bytearray(32), 32), ArgumentTypeError),
    "readinto negative": (lambda device: device.readinto(ADDRESS, -1), ArgumentError),
    "mmap text": (lambda device: device.mmap("8"), ArgumentTypeError),
    "mmap negative": (lambda device: device.mmap(-8), ArgumentError),
    "mmap unreadable": (lambda device: device.mmap(8, mmap.PROT_WRITE), ArgumentError),
    "mmap float": (lambda device: device.mmap(8, offset=0.0), ArgumentTypeError),
    "ioctl text": (lambda device: device.ioctl("x", 0), ArgumentTypeError),
    "ioctl negative": (lambda device: device.ioctl(-1, 0), ArgumentError),
    "ioctl too large": (lambda device: device.ioctl(2**64, 0), ArgumentError),
    "ioctl None": (lambda device: device.ioctl(v2.REGISTER_REGION, None), ArgumentTypeError),
    "ioctl float": (lambda device: device.ioctl(v2.REGISTER_REGION, 1.5), ArgumentTypeError),
    "ioctl negative address": (lambda device: device.ioctl(v2.REGISTER_REGION, -1), ArgumentError),
    "ioctl short": (lambda device: device.ioctl(v2.REGISTER_REGION, register_argument()[:-1]), ArgumentError),
    "ioctl long": (lambda device: device.ioctl(v2.REGISTER_REGION, bytes(33)), ArgumentError),
    "ioctl empty": (lambda device: device.ioctl(v2.UNREGISTER_REGION, b""), ArgumentError),
    "ioctl other version's": (lambda device: device.ioctl(v2.UNREGISTER_REGION, bytes(32)), ArgumentError),
    "ioctl released": (lambda device: device.ioctl(v2.REGISTER_REGION, released()), ArgumentTypeError),
    "ioctl with gaps": (lambda device: device.ioctl(v2.REGISTER_REGION, memoryview(bytes(64))[::2]), ArgumentTypeError),
    "ioctl without room for the answer": (lambda device: device.ioctl(v2.EXCHANGE_FEATURES, bytes(4)), ArgumentError),
    "watch too few": (lambda device: device.watch(0, 1), ArgumentTypeError),
    "unregister nothing": (lambda device: device.unregister(), ArgumentTypeError),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_an_argument_that_no_method_takes(device: usermm.Ummunotify, name: str) -> None:
    call, kind = NUMBERS[name]
    refused_line(lambda: call(device), kind)


ERRNOS: dict[str, tuple[Callable[[usermm.Ummunotify], Any], int]] = {
    "unknown request": (lambda device: device.ioctl(0x1234, 0), errno.ENOTTY),
    "unknown request with a buffer": (lambda device: device.ioctl(0x1234, b""), errno.ENOTTY),
    "unknown request with a large buffer": (lambda device: device.ioctl(0x00645509, bytes(100)), errno.ENOTTY),
    "request of version 1": (lambda device: device.ioctl(v1.REGISTER_REGION, bytes(32)), errno.ENOTTY),
    "request above 32 bits": (lambda device: device.ioctl(1 << 40 | v2.REGISTER_REGION, ADDRESS), errno.ENOTTY),
    "null": (lambda device: device.ioctl(v2.REGISTER_REGION, 0), errno.EFAULT),
    "kernel address": (lambda device: device.ioctl(v2.REGISTER_REGION, 1 << 63), errno.EFAULT),
    "last address": (lambda device: device.ioctl(v2.REGISTER_REGION, 2**64 - 1), errno.EFAULT),
    "null cookie": (lambda device: device.ioctl(v2.UNREGISTER_REGION, 0), errno.EFAULT),
    "unknown cookie": (lambda device: device.ioctl(v2.UNREGISTER_REGION, bytes(8)), errno.EINVAL),
    "duplicate cookie": (lambda device: device.ioctl(v2.REGISTER_REGION, register_argument()), errno.EINVAL),
    "features after use": (lambda device: device.ioctl(v2.EXCHANGE_FEATURES, bytearray(4)), errno.EINVAL),
    "page of no length": (lambda device: device.mmap(0), errno.EINVAL),
    "page too long": (lambda device: device.mmap(4097), errno.EINVAL),
    "page far too long": (lambda device: device.mmap(2**64 - 1), errno.EINVAL),
    "page elsewhere": (lambda device: device.mmap(offset=4096), errno.EINVAL),
    "writable page": (lambda device: device.mmap(prot=mmap.PROT_READ | mmap.PROT_WRITE), errno.EACCES),
    "page neither shared nor private": (lambda device: device.mmap(flags=0), errno.EINVAL),
}


@pytest.mark.parametrize("name", ERRNOS)
def test_what_the_device_answers_with_an_errno(device: usermm.Ummunotify, name: str) -> None:
    call, number = ERRNOS[name]
    line = refused_line(lambda: call(device), DeviceError, number)
    assert "ioctl" in line or "mmap" in line


def test_a_misaligned_structure_is_read_as_well_as_any(device: usermm.Ummunotify) -> None:
    shifted = bytearray(1) + register_argument(cookie=11)
    device.ioctl(v2.REGISTER_REGION, memoryview(shifted)[1:])
    device.unregister(11)


def test_version_1_refuses_another_interface_version() -> None:
    with usermm.Ummunotify(abi=1) as device:
        argument = bytearray(v1.REGISTER.pack(2, 0, ADDRESS, ADDRESS + PAGE_BYTES, COOKIE))
        refused_line(lambda: device.ioctl(v1.REGISTER_REGION, argument), DeviceError, errno.EINVAL)
        refused_line(lambda: device.ioctl(v2.EXCHANGE_FEATURES, bytearray(4)), DeviceError, errno.ENOTTY)
        assert _core.counts()["regions"] == 0


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("abi", [1, 2])
def test_a_closed_device_refuses_everything(abi: int, name: str) -> None:
    with usermm.Ummunotify(abi) as device:
        pass
    line = refused_line(lambda: CALLS[name](device), ClosedError, errno.EBADF)
    assert "open a new one" in line


def test_what_a_closed_device_still_answers() -> None:
    device = usermm.Ummunotify(flags=os.O_NONBLOCK)
    page = device.mmap(8)
    device.close()
    device.close()
    assert (device.closed, device.flags & os.O_NONBLOCK) == (True, os.O_NONBLOCK)
    assert page.tobytes() == bytes(8)
    assert set(dir(device)) >= ALWAYS_ANSWERED


def test_nothing_to_read_on_a_device_that_does_not_wait() -> None:
    with usermm.Ummunotify(flags=os.O_NONBLOCK) as device:
        for call in (device.read_bytes, lambda: device.read_bytes(0), lambda: device.readinto(ADDRESS, 32)):
            line = refused_line(call, usermm.WouldBlockError, errno.EAGAIN)
            assert "read" in line
        assert device.read(timeout=0) == []


@pytest.mark.parametrize("name", [name for name in dir(usermm) if isinstance(getattr(usermm, name), type)])
def test_errors_are_what_programmers_catch(name: str) -> None:
    kind = getattr(usermm, name)
    if not issubclass(kind, usermm.UsermmError):
        return
    if issubclass(kind, DeviceError):
        assert issubclass(kind, OSError)
    error = kind(errno.EIO, "a: b") if issubclass(kind, DeviceError) else kind("a: b")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_device_is_neither_copied_nor_pickled(device: usermm.Ummunotify) -> None:
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            call(device)


def test_an_exception_from_the_tensor_passes_through(device: usermm.Ummunotify) -> None:
    class Broken:
        @property
        def data_ptr(self) -> int:
            raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        device.register(Broken())
