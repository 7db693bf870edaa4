"""The default monitor: a userfaultfd in write-protect mode that protects nothing and takes the events.

Probing asks the kernel, never its version: every way to a userfaultfd is tried and closed again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from typing import Final

from usermm.monitors import races, trials
from usermm.monitors.base import Availability, Device, Exactness, SelfTest, Way
from usermm.uapi import userfaultfd as uapi
from usermm.uapi.userfaultfd import Feature

NAME: Final = "userfaultfd"

PROMISE: Final = Exactness(
    own_thread=True,
    all_threads=True,
    all_causes=True,
    exceptions=tuple(trial.name for trial in trials.BLIND_SPOTS),
)

REQUIRED: Final = Feature.PAGEFAULT_FLAG_WP | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
WANTED: Final = Feature.WP_HUGETLBFS_SHMEM | Feature.WP_ASYNC
"""The first for shared memory and huge pages, the second for mappings of files."""

FULL: Final = "userfaultfd(2)"
USER_MODE: Final = "userfaultfd(2) with UFFD_USER_MODE_ONLY"
NODE: Final = uapi.DEVICE_NODE

_libc = ctypes.CDLL(None, use_errno=True)


def probe_availability() -> Availability:
    """Tries every way to a userfaultfd in this process; leaves no descriptor behind and raises nothing."""
    features = Feature(0)
    ways = []
    for name, opener in _WAYS:
        number, offered = _try(opener)
        features |= offered
        ways.append(Way(name, number))
    if not any(way.works for way in ways):
        return Availability(tuple(ways), (), ())
    return Availability(tuple(ways), _names(features), _names(REQUIRED & ~features), _names(WANTED & ~features))


def self_test(open_device: Callable[[], Device], *, owns_heap: bool = False) -> SelfTest:
    """Makes every kind of change to memory that a device from `open_device` watches, and runs both races.

    `owns_heap` also shrinks this process's heap (brk), which is safe only in a process that does nothing
    else. A broken monitor can block the thread that unmaps for ever: whoever cannot bear that runs this in a
    child with a time limit.
    """
    events = trials.run_all(open_device, owns_heap=owns_heap)
    return SelfTest(events, races.run_all(open_device))


def _system_call(flags: int) -> int:
    number = uapi.SYSTEM_CALL.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"no number of userfaultfd(2) known for {os.uname().machine}")
    descriptor = int(_libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | flags))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return descriptor


def _device_node() -> int:
    node = os.open(uapi.DEVICE_NODE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(node, uapi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(node)


_WAYS: Final[tuple[tuple[str, Callable[[], int]], ...]] = (
    (FULL, lambda: _system_call(0)),
    (USER_MODE, lambda: _system_call(uapi.UFFD_USER_MODE_ONLY)),
    (NODE, _device_node),
)


def _try(opener: Callable[[], int]) -> tuple[int, Feature]:
    try:
        descriptor = opener()
    except OSError as error:
        return error.errno or errno.EIO, Feature(0)
    try:
        return 0, _features(descriptor)
    except OSError as error:
        return error.errno or errno.EIO, Feature(0)
    finally:
        os.close(descriptor)


def _features(descriptor: int) -> Feature:
    """What UFFDIO_API offers when it is asked for nothing: everything this kernel has."""
    argument = bytearray(uapi.API.pack(uapi.UFFD_API, 0, 0))
    fcntl.ioctl(descriptor, uapi.UFFDIO_API, argument)
    _, features, _ = uapi.API.unpack(argument)
    return Feature(features)


def _names(features: Feature) -> tuple[str, ...]:
    return tuple(feature.name for feature in Feature if feature in features and feature.name)
