"""Every method of the device and every function of the core, called thousands of times: nothing may grow.

The habit is psutil's: the list is checked against what there is, so a new method without a check fails the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
from support.calls import ADDRESS, ALWAYS_ANSWERED, CALLS, COOKIE, PAGE_BYTES, memory, register_argument
from support.growth import check_no_growth
from support.threads import in_thread

import usermm
from usermm import _core
from usermm.uapi import ummunotify as abi

Device = usermm.Ummunotify


def _unregister(device: Device) -> None:
    device.watch(ADDRESS, ADDRESS + PAGE_BYTES, COOKIE, 0)
    device.unregister(COOKIE)


def _register(device: Device) -> None:
    device.unregister(device.register(memory))


def _register_range(device: Device) -> None:
    device.unregister(device.register_range(ADDRESS, ADDRESS + PAGE_BYTES))


def _ioctl(device: Device) -> None:
    device.ioctl(abi.REGISTER_REGION, register_argument())
    device.ioctl(abi.UNREGISTER_REGION, COOKIE.to_bytes(8, "little"))


def _hit(device: Device) -> None:
    device.watch(ADDRESS, ADDRESS + PAGE_BYTES, COOKIE, 0)
    memory.madvise(mmap.MADV_DONTNEED, 0, PAGE_BYTES)


def _read(device: Device) -> None:
    _hit(device)
    assert len(device.read(timeout=0)) == 2
    device.unregister(COOKIE)


def _read_within(device: Device) -> None:
    _hit(device)
    assert len(device.read_within(0, 4096)) == 64
    device.unregister(COOKIE)


def _read_bytes(device: Device) -> None:
    _hit(device)
    assert len(device.read_bytes(32)) == 32
    assert len(device.read_bytes()) == 32
    device.unregister(COOKIE)


def _readinto(device: Device) -> None:
    _hit(device)
    assert device.readinto(ADDRESS + PAGE_BYTES, 4096) == 64
    device.unregister(COOKIE)


def _drop_while_queued(device: Device) -> None:
    _hit(device)
    device.unregister(COOKIE)


def _retire(device: Device) -> None:
    _hit(device)
    device.retire(COOKIE)


def _iterate(device: Device) -> None:
    async def first() -> None:
        async with contextlib.aclosing(aiter(device)) as events:
            async for _ in events:
                break

    _hit(device)
    _LOOP.run_until_complete(first())
    device.unregister(COOKIE)
    device.read(timeout=0)


def _iterate_over_nothing(device: Device) -> None:
    async def nothing() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(anext(aiter(device)), 0)

    _LOOP.run_until_complete(nothing())


_LOOP: asyncio.AbstractEventLoop


def _with(_: Device) -> None:
    with Device() as device:
        device.watch(ADDRESS, ADDRESS + PAGE_BYTES, COOKIE, 0)


def _drop(_: Device) -> None:
    device = Device(1)
    device.watch(ADDRESS, ADDRESS + PAGE_BYTES, COOKIE, 0)
    device.mmap(8)


SUCCESSES: Final[dict[str, Callable[[Device], Any]]] = {
    "register": _register,
    "register_range": _register_range,
    "watch": _unregister,
    "unregister": _drop_while_queued,
    "retire": _retire,
    "generation": lambda device: device.generation,
    "check": lambda device: device.check(0, probe=True),
    "read": _read,
    "read_within": _read_within,
    "read_bytes": _read_bytes,
    "readinto": _readinto,
    "ioctl": _ioctl,
    "mmap": lambda device: device.mmap().tobytes(),
    "map_page": lambda device: device.map_page(8, 1, 1, 0)[0],
    "fileno": lambda device: device.fileno(),
    "close": _with,
    "closed": lambda device: device.closed,
    "flags": lambda device: device.flags,
    "monitor": lambda device: device.monitor,
    "__new__": _drop,
    "__enter__": _with,
    "__exit__": _with,
    "__aiter__": _iterate,
    "__aiter__ of nothing": _iterate_over_nothing,
    "buffer_range": lambda _: _core.buffer_range(memory),
    "buffer_range of a tensor": lambda _: _core.buffer_range(_TENSOR),
    "process": lambda _: _core.process(),
    "give_way": lambda _: _core.give_way(),
    "has_hung_up": lambda device: _core.has_hung_up(device.fileno()),
    "counts": lambda _: _core.counts(),
    "empty": lambda _: _core.empty(1, 2, 3),
    "track_registrations": lambda _: _core.track_registrations("start", {}),
}

_TENSOR = SimpleNamespace(
    data_ptr=lambda: ADDRESS, nbytes=4096, is_contiguous=lambda: True, device=SimpleNamespace(type="cpu")
)
_GAPS = np.zeros((8, 8))[:, ::2]

ERRORS: Final[dict[str, Callable[[Device], Any]]] = {
    "register wrong type": lambda device: device.register("text"),
    "register gaps": lambda device: device.register(_GAPS),
    "register cookie": lambda device: device.register(memory, -1),
    "register duplicate": lambda device: device.register(memory, 0),
    "register_range hole": lambda device: device.register_range(4096, 8192),
    "register_range reversed": lambda device: device.register_range(8192, 4096),
    "register_range type": lambda device: device.register_range("a", "b"),
    "watch arguments": lambda device: device.watch(1),
    "watch type": lambda device: device.watch(0, 1, "x", 0),
    "unregister unknown": lambda device: device.unregister(99),
    "unregister type": lambda device: device.unregister("x"),
    "retire unknown": lambda device: device.retire(99),
    "retire type": lambda device: device.retire("x"),
    "check type": lambda device: device.check("x"),
    "check names": lambda device: device.check(0, bogus=1),
    "read timeout": lambda device: device.read(timeout=-1),
    "read type": lambda device: device.read(timeout="x"),
    "read_within nan": lambda device: device.read_within(float("nan"), 32),
    "read_bytes nothing": lambda device: device.read_bytes(),
    "read_bytes type": lambda device: device.read_bytes("x"),
    "readinto nothing": lambda device: device.readinto(0, 32),
    "readinto type": lambda device: device.readinto("x", 32),
    "ioctl unknown": lambda device: device.ioctl(0x1234, 0),
    "ioctl fault": lambda device: device.ioctl(abi.REGISTER_REGION, 0),
    "ioctl size": lambda device: device.ioctl(abi.REGISTER_REGION, bytearray(5)),
    "ioctl type": lambda device: device.ioctl(abi.REGISTER_REGION, None),
    "ioctl read-only": lambda device: device.ioctl(abi.EXCHANGE_FEATURES, bytes(4)),
    "ioctl duplicate": lambda device: device.ioctl(abi.REGISTER_REGION, register_argument(cookie=0)),
    "mmap length": lambda device: device.mmap(0),
    "mmap writable": lambda device: device.mmap(prot=3),
    "map_page type": lambda device: device.map_page("x", 1, 1, 0),
    "generation when closed": lambda _: _CLOSED.generation,
    "fileno when closed": lambda _: _CLOSED.fileno(),
    "register when closed": lambda _: _CLOSED.register(memory),
    "__new__ refused": lambda _: Device(3),
    "__new__ type": lambda _: Device("x"),  # type: ignore[arg-type]
    "__new__ for writing": lambda _: Device(flags=os.O_RDWR),
    "has_hung_up": lambda _: _core.has_hung_up("no descriptor"),  # type: ignore[arg-type]
    "buffer_range type": lambda _: _core.buffer_range(1),
    "buffer_range empty": lambda _: _core.buffer_range(b""),
    "buffer_range gaps": lambda _: _core.buffer_range(_GAPS),
}

_CLOSED = Device()
_CLOSED.close()


@pytest.fixture(scope="module", autouse=True)
def _loop() -> Any:
    """One loop for all calls: asyncio's own caches are not what is measured."""
    global _LOOP  # noqa: PLW0603
    _LOOP = asyncio.new_event_loop()
    yield
    _LOOP.close()


@pytest.mark.parametrize("name", SUCCESSES)
def test_success_leaks_nothing(name: str) -> None:
    with Device() as device:
        check_no_growth(lambda: SUCCESSES[name](device))


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaks_nothing(name: str) -> None:
    with Device(flags=os.O_NONBLOCK) as device:
        device.register_range(ADDRESS, ADDRESS + PAGE_BYTES, 0)

        def call() -> None:
            try:
                ERRORS[name](device)
            except (usermm.UsermmError, TypeError):
                return
            raise AssertionError("accepted")

        check_no_growth(call)


def _methods() -> set[str]:
    own = {*vars(usermm.Ummunotify), *vars(_core.Device), "monitor"}
    return {name for name in own if not name.startswith("_")} | {"__new__", "__enter__", "__exit__", "__aiter__"}


def _functions() -> set[str]:
    return {name for name, value in vars(_core).items() if callable(value) and not isinstance(value, type)}


def _listed(calls: dict[str, Any]) -> set[str]:
    return {name.split()[0] for name in calls}


def test_the_first_and_last_device_leak_nothing() -> None:
    """With it the monitor and its thread start and stop."""
    check_no_growth(lambda: _with(_CLOSED))
    check_no_growth(lambda: _drop(_CLOSED))


def test_every_method_and_function_is_in_the_lists() -> None:
    assert _listed(SUCCESSES) == _methods() | _functions()
    cannot_fail = {"close", "closed", "flags", "monitor", "counts", "empty", "__enter__", "__exit__", "__aiter__"} | {
        "give_way",
        "process",
        "track_registrations",
    }
    assert _listed(ERRORS) == (_methods() | _functions()) - cannot_fail


def test_the_list_of_refusals_has_every_method() -> None:
    """support.calls: what a closed or a foreign device must refuse."""
    names = {name for name in _methods() if not name.startswith("_")}
    assert _listed(CALLS) == names - ALWAYS_ANSWERED


def test_a_leak_would_be_seen() -> None:
    kept: list[object] = []
    with pytest.raises(AssertionError, match="grows in every round"):
        check_no_growth(lambda: kept.append(object()))


def test_trying_a_lock_leaks_nothing() -> None:
    """Neither the lock nor a reference to it, whether it was free, taken, or none."""
    lock, taken = threading.RLock(), threading.Lock()
    taken.acquire()

    def try_both() -> None:
        with _core.TryLock(lock) as got, _core.TryLock(lock) as again, _core.TryLock(taken) as not_got:
            assert (got, again, not_got) == (True, True, False)
        with pytest.raises(AttributeError), _core.TryLock(3):
            pass

    check_no_growth(try_both)
    assert in_thread(lambda: lock.acquire(blocking=False)), "it was released as often as it was taken"
    assert taken.locked()
