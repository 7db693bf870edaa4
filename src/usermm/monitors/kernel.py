"""The kernel monitor: a driver behind /dev/ummunotify or /dev/ummunot, called by the kernel before memory goes.

No kernel of today has that driver; libusermm-preload.so stands in for it (`usermm run`), and promises what the
userfaultfd under it does.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from usermm.monitors import races, trials, userfaultfd
from usermm.monitors.base import Availability, Device, Exactness, SelfTest, Way
from usermm.uapi import ummunot, ummunotify

NAME: Final = "kernel"

PROMISE: Final = Exactness(own_thread=True, all_threads=True, all_causes=True)
"""Of a driver over MMU notifiers: it is told of every change, whoever makes it, before the pages are given back."""

PROMISE_PRELOADED: Final = replace(
    userfaultfd.PROMISE,
    exceptions=(
        *userfaultfd.PROMISE.exceptions,
        "an address that another thread is just unmapping, mapped again by a raw system call",
    ),
)
"""A program that only loads the page asks nothing of the userfaultfd: the library's mmap waits for it instead."""

NODES: Final = (ummunotify.DEVICE_PATH, ummunot.DEVICE_PATH)


def probe_availability() -> Availability:
    """Opens both nodes and closes them again; nothing is asked of them, and nothing is raised."""
    return Availability(tuple(Way(path, _try(path)) for path in NODES), features=(), missing=())


def promise_here() -> Exactness:
    """What whoever answers at the nodes of this process promises."""
    return PROMISE_PRELOADED if any(_is_preloaded(path) for path in NODES) else PROMISE


def self_test(open_device: Callable[[], Device], *, owns_heap: bool = False) -> SelfTest:
    """As `userfaultfd.self_test`."""
    events = trials.run_all(open_device, owns_heap=owns_heap)
    return SelfTest(events, races.run_all(open_device))


def _try(path: str) -> int:
    try:
        os.close(_open(path))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _is_preloaded(path: str) -> bool:
    """The descriptor that the library gives out is a pipe; a driver's is a character device."""
    try:
        descriptor = _open(path)
    except OSError:
        return False
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
