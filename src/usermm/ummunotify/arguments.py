"""What a device over a node takes, refused in the same classes and words as by the C of the other one."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import time
from collections.abc import Iterator
from typing import Any

from usermm.errors import ArgumentError, ArgumentTypeError
from usermm.uapi import ummunotify
from usermm.uapi._ioctl import ioctl_size

_LIMIT = 1 << 31  # of a C int


def opening(abi: Any, flags: Any) -> tuple[int, int] | None:
    """`abi` and `flags` as numbers; None when no device can be opened so (EINVAL). Raises ArgumentTypeError."""
    try:
        version, asked = operator.index(abi), operator.index(flags)
    except TypeError as error:
        raise ArgumentTypeError(f"Ummunotify takes abi=1 or 2 and flags as of open(2): {error}") from error
    if version not in (1, 2) or not 0 <= asked < _LIMIT or asked & os.O_ACCMODE != os.O_RDONLY:
        return None
    return version, asked


def u64(value: Any, name: str) -> int:
    """Raises ArgumentTypeError, ArgumentError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an int, not {type(value)!r}") from None
    if not 0 <= number < 1 << 64:
        raise ArgumentError(f"{name} must be in 0..2**64-1")  # the number may have any length
    return number


def deadline_s(timeout: Any) -> float:
    """The moment (time.monotonic) at which a wait of `timeout` seconds ends; None waits for ever."""
    if timeout is None:
        return math.inf
    try:
        timeout_s = math.fsum((timeout,))  # takes whatever has __float__, but, unlike float(), no text
    except TypeError as error:
        raise ArgumentTypeError(f"timeout must be seconds or None: {error}") from error
    if not timeout_s >= 0:
        raise ArgumentError("timeout must be None or at least 0 seconds")
    return 0 if timeout_s == 0 else time.monotonic() + timeout_s


@contextlib.contextmanager
def ioctl_buffer(request: int, argument: Any) -> Iterator[bytearray]:
    """A copy of the buffer `argument` for one call of `request`, afterwards written back where the request writes."""
    try:
        view = memoryview(argument)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"ioctl: argument must be an address or a contiguous buffer: {error}") from error
    with view:
        if not view.contiguous:
            raise ArgumentTypeError("ioctl: argument must be an address or a contiguous buffer: its items have gaps")
        writes = request == ummunotify.EXCHANGE_FEATURES
        if writes and view.readonly:
            raise ArgumentError("ioctl: the features are written back: pass a bytearray")
        size = ioctl_size(request)
        if view.nbytes != size and request >> 8 & 0xFF == ord("U"):  # others are unknown, whatever their size
            message = f"argument has {view.nbytes} bytes, the request takes {size}: pack it again"
            raise ArgumentError(f"ioctl({request:#x}): {message}")
        room = bytearray(view)
        yield room
        if writes:
            view.cast("B")[:] = room
