"""Readers, closers, signals and frees in many threads at once."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.calls import CALLS, refused_line
from support.threads import alarm, running

import usermm
from usermm import _core
from usermm.monitors import calls

MEBIBYTE = 1 << 20
MAPPED_BYTES = 33 * MEBIBYTE  # above the largest threshold of malloc(3): a mapping of its own, unmapped by free


@pytest.fixture
def device() -> Iterator[usermm.Ummunotify]:
    with usermm.Ummunotify() as device:
        yield device


def unmap_one(device: usermm.Ummunotify, cookie: int | None = None) -> None:
    block = mmap.mmap(-1, MEBIBYTE)
    device.register(block, cookie)
    block.close()


# Blocking reads


def _read_bytes(device: usermm.Ummunotify) -> bytes:
    return device.read_bytes()


def _read(device: usermm.Ummunotify) -> list[usermm.Event]:
    return device.read()


def _read_with_timeout(device: usermm.Ummunotify) -> list[usermm.Event]:
    return device.read(timeout=60)


READS = pytest.mark.parametrize("read", [_read, _read_with_timeout, _read_bytes])


@READS
def test_close_from_another_thread_ends_a_read(device: usermm.Ummunotify, read: Callable[..., Any]) -> None:
    with running(*[lambda: refused_line(lambda: read(device), usermm.ClosedError, errno.EBADF)] * 3):
        time.sleep(0.05)
        device.close()


def test_close_and_read_at_the_same_moment(device: usermm.Ummunotify) -> None:
    """A read that begins while the device is being closed must not go to sleep on it."""
    for _ in range(300):
        other = usermm.Ummunotify()
        gate = threading.Barrier(3)

        def read(other: usermm.Ummunotify = other, gate: threading.Barrier = gate) -> None:
            gate.wait()
            refused_line(other.read, usermm.ClosedError, errno.EBADF)

        with running(read, read):
            gate.wait()
            other.close()
    assert not device.closed


@READS
def test_a_handler_that_raises_ends_a_read(device: usermm.Ummunotify, read: Callable[..., Any]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with alarm(interrupt, 0.1), pytest.raises(KeyboardInterrupt):
        read(device)
    assert time.monotonic() - started < 5
    unmap_one(device, 3)
    assert device.read(timeout=0)[0].cookie == 3


def test_a_read_goes_on_after_a_handler_that_returns(device: usermm.Ummunotify) -> None:
    called = []

    def note(*_: object) -> None:
        called.append(time.monotonic())
        if len(called) == 3:
            unmap_one(device, 3)

    with alarm(note, 0.03, 0.03):
        events = device.read()
    assert len(called) >= 3
    assert [event.cookie for event in events if isinstance(event, usermm.Invalidation)] == [3]


def test_signals_do_not_stretch_the_timeout(device: usermm.Ummunotify) -> None:
    called = []
    with alarm(lambda *_: called.append(1), 0.02, 0.02):
        started = time.monotonic()
        assert device.read(timeout=0.4) == []
        took_s = time.monotonic() - started
    assert len(called) > 5
    assert 0.4 <= took_s < 1.5


def test_a_handler_may_close_the_device_that_is_being_read(device: usermm.Ummunotify) -> None:
    with alarm(lambda *_: device.close(), 0.05):
        refused_line(device.read, usermm.ClosedError, errno.EBADF)


@pytest.mark.parametrize("timeout_s", [0.001, 0.05, 0.3])
def test_a_timeout_is_kept(device: usermm.Ummunotify, timeout_s: float) -> None:
    started = time.monotonic()
    assert device.read(timeout=timeout_s) == []
    assert timeout_s <= time.monotonic() - started < timeout_s + 1


def test_a_timeout_of_zero_does_not_wait(device: usermm.Ummunotify) -> None:
    started = time.monotonic()
    for _ in range(1000):
        assert device.read(timeout=0) == []
    assert time.monotonic() - started < 2


def test_a_reading_thread_leaves_the_interpreter_to_others(device: usermm.Ummunotify) -> None:
    with running(lambda: device.read(timeout=10)):
        time.sleep(0.02)
        started = time.monotonic()
        unmap_one(device)
    assert time.monotonic() - started < 5


def test_several_readers_share_one_queue(device: usermm.Ummunotify) -> None:
    """Each event goes to exactly one of them."""
    wanted = set(range(500))
    got: list[int] = []

    def read() -> None:
        with contextlib.suppress(usermm.ClosedError):
            while True:
                for event in device.read():
                    if isinstance(event, usermm.Invalidation):
                        got.append(event.cookie)

    with running(*[read] * 4):
        # All of them mapped before the first goes: an address that is handed out again would be hit again.
        blocks = [mmap.mmap(-1, mmap.PAGESIZE) for _ in wanted]
        for cookie, block in enumerate(blocks):
            device.register(block, cookie)
        for block in blocks:
            block.close()
        until = time.monotonic() + 10
        while len(got) < len(wanted) and time.monotonic() < until:
            time.sleep(0.01)
        device.close()
    assert sorted(got) == sorted(wanted)


# Frees of watched NumPy arrays


def watched_arrays(device: usermm.Ummunotify, count: int) -> list[np.ndarray]:
    arrays = [np.empty(MAPPED_BYTES, np.uint8) for _ in range(count)]
    for array in arrays:
        device.register(array)
    return arrays


def test_a_handler_may_free_watched_arrays(device: usermm.Ummunotify) -> None:
    """Freed back to back by a handler that interrupts whatever the main thread does with the device."""
    arrays = watched_arrays(device, 60)
    scratch = mmap.mmap(-1, MEBIBYTE)

    def free_three(*_: object) -> None:
        del arrays[-3:]

    with alarm(free_three, 0.002, 0.002):
        until = time.monotonic() + 20
        while arrays and time.monotonic() < until:
            device.unregister(device.register(scratch))
            device.check(device.generation)
            device.read(timeout=0.001)
            _core.counts()
    assert not arrays
    assert device.generation == 60


def test_arrays_freed_back_to_back_in_many_threads(device: usermm.Ummunotify) -> None:
    """The thread that frees holds the interpreter's lock until the event is read, so no reader may need it."""

    def churn() -> None:
        with usermm.Ummunotify() as own:
            for _ in range(25):
                arrays = watched_arrays(own, 4)
                device.register(arrays[0])
                seen = own.generation
                arrays.clear()
                assert not own.check(seen)
                assert not own.check(seen, probe=False)
                hits = [event.cookie for event in own.read(timeout=0) if isinstance(event, usermm.Invalidation)]
                assert len(hits) == len(set(hits)) >= 4
                for cookie in hits:
                    with contextlib.suppress(usermm.CookieError):
                        own.unregister(cookie)

    with running(*[churn] * 8, lambda: device.read(timeout=10)):
        pass
    assert device.generation >= 200


def test_questions_from_threads_during_churn(device: usermm.Ummunotify) -> None:
    """A generation never goes back, and a check of one that was left behind never says that nothing changed."""
    stop = threading.Event()

    def ask() -> None:
        last = 0
        while not stop.is_set():
            now = device.generation
            assert now >= last
            if now > last:
                assert not device.check(last)
                assert not device.check(last, probe=False)
            last = now

    def churn() -> None:
        try:
            for _ in range(150):
                unmap_one(device)
                array = np.empty(MAPPED_BYTES, np.uint8)
                cookie = device.register(array)
                seen = device.generation
                del array
                assert not device.check(seen)
                device.unregister(cookie)
        finally:
            stop.set()

    with running(ask, ask, churn, churn):
        pass


def test_memory_that_stays_is_never_reported_whatever_others_free() -> None:
    kept = np.empty(MAPPED_BYTES, np.uint8)

    def churn() -> None:
        with usermm.Ummunotify() as own:
            for _ in range(100):
                unmap_one(own)

    with usermm.Ummunotify() as watcher:
        watcher.register(kept)
        with running(*[churn] * 4):
            for _ in range(2000):
                assert watcher.check(0)
        assert watcher.read(timeout=0) == []


def test_nothing_from_before_the_registration_is_reported(device: usermm.Ummunotify) -> None:
    """An address that another thread has just given back: its own unmapping is over before the registration.

    The device is hit by others all the time, as any device is that serves more than one cache.
    """
    wrong: list[int] = []
    stop = threading.Event()

    def reuse(number: int) -> None:
        for step in range(300):
            start = calls.map_memory(mmap.PAGESIZE)  # wherever the kernel likes: what was freed last
            cookie = (number << 32) + step
            device.register_range(start, start + mmap.PAGESIZE, cookie)
            if cookie in reported:
                wrong.append(cookie)
            calls.unmap(start, mmap.PAGESIZE)
            device.unregister(cookie)
        stop.set()

    def read() -> None:
        while not stop.is_set():
            reported.update(event.cookie for event in device.read(timeout=0) if isinstance(event, usermm.Invalidation))

    reported: set[int] = set()
    with running(read, *[lambda number=number: reuse(number) for number in range(6)]):
        pass
    assert wrong == []


# Lives of devices


def test_register_against_close_is_refused_as_closed(device: usermm.Ummunotify) -> None:
    """A device that closes under a register is no failure of the monitor."""
    for _ in range(100):
        _register_until_closed(device.generation)


def test_register_against_the_last_close_is_refused_as_closed() -> None:
    """The userfaultfd goes with the last device: a register that comes too late must not take that for a failure.

    It answered MonitorFailedError, and the descriptors of the next monitor were never closed.
    """
    for _ in range(1500):
        _register_until_closed(0)


def _register_until_closed(_: int) -> None:
    scratch = mmap.mmap(-1, MEBIBYTE)
    short = usermm.Ummunotify()

    def register() -> None:
        line = refused_line(lambda: [short.register(scratch) for _ in range(10**6)], usermm.ClosedError, errno.EBADF)
        assert "closed" in line

    with running(register):
        while _core.counts()["regions"] == 0:
            time.sleep(0)
        short.close()
        with usermm.Ummunotify() as following:
            assert following.check(0)
    scratch.close()


def test_every_method_against_close(device: usermm.Ummunotify) -> None:
    def call(short: usermm.Ummunotify, name: str) -> None:
        while True:
            try:
                CALLS[name](short)
            except usermm.ClosedError:
                return
            except usermm.DeviceError as error:
                assert error.errno in (errno.EINVAL, errno.EAGAIN), error

    for _ in range(5):
        short = usermm.Ummunotify(flags=os.O_NONBLOCK)
        calls = [lambda name=name, short=short: call(short, name) for name in CALLS]
        with running(*calls):
            unmap_one(device)
            short.close()


def test_close_may_be_called_again_and_by_everybody(device: usermm.Ummunotify) -> None:
    unmap_one(device)
    with running(*[device.close] * 6):
        pass
    device.close()
    assert device.closed


def test_a_dropped_device_is_closed_while_others_live(device: usermm.Ummunotify) -> None:
    block = mmap.mmap(-1, MEBIBYTE)
    device.register(block, 1)
    for _ in range(50):
        dropped = usermm.Ummunotify()
        dropped.register(block, 1)
        dropped.mmap()
        del dropped
    assert _core.counts() | {"notifications": 0} == {"devices": 1, "regions": 1, "monitors": 1, "notifications": 0}
    block.close()
    assert device.generation == 1


def test_devices_are_dropped_in_many_threads(device: usermm.Ummunotify) -> None:
    def drop() -> None:
        for _ in range(100):
            unmap_one(usermm.Ummunotify())

    with running(*[drop] * 6):
        for _ in range(100):
            assert device.check(0)


def test_a_weak_reference_to_a_device() -> None:
    device = usermm.Ummunotify()
    told: list[str] = []
    weak = weakref.ref(device, lambda _: told.append("gone"))
    assert weak() is device
    del device
    assert (weak(), told) == (None, ["gone"])
    assert _core.counts()["devices"] == 0


def test_a_device_in_a_cycle_is_collected() -> None:
    class Holder(usermm.Ummunotify):
        me: Any

    holder = Holder()
    holder.register(mmap.mmap(-1, MEBIBYTE))
    holder.me = [holder]
    weak = weakref.ref(holder)
    del holder
    gc.collect()
    assert weak() is None
    assert _core.counts()["devices"] == _core.counts()["regions"] == 0


def test_the_collector_may_run_while_a_device_is_being_read(device: usermm.Ummunotify) -> None:
    with running(lambda: device.read(timeout=10)):
        for _ in range(20):
            cycle: list[Any] = [usermm.Ummunotify()]
            cycle.append(cycle)
            del cycle
            gc.collect()
        assert _core.counts()["devices"] == 1
        unmap_one(device)
