"""Between the model's objects and the bytes of the ABI: a real device's copies from and to user memory."""

from __future__ import annotations

import errno

from usermm.errors import ArgumentError, ArgumentTypeError, from_errno
from usermm.uapi import ummunotify
from usermm.uapi._ioctl import ioctl_size
from usermm.ummunotify.events import Event, Invalidation

BytesLike = bytes | bytearray | memoryview


def check_size(argument: int | BytesLike, request: int) -> None:
    """ArgumentError unless bytes are as many as `request` says in its number; an address says nothing of its size."""
    size = ioctl_size(request)
    if not isinstance(argument, int) and len(_view(argument)) != size:
        raise ArgumentError(f"ioctl({request:#x}): argument has {len(_view(argument))} bytes, the request takes {size}")


def copy_in(argument: int | BytesLike) -> bytes:
    """The struct's bytes. DeviceError EFAULT: `argument` is an address, and nothing is there."""
    if isinstance(argument, int):
        raise from_errno(errno.EFAULT, f"ioctl: nothing is mapped at {argument:#x}")
    return bytes(_view(argument))


def copy_out(argument: int | BytesLike, data: bytes) -> None:
    """Writes a result. DeviceError EFAULT as `copy_in`; ArgumentError: the bytes cannot be written."""
    if isinstance(argument, int):
        raise from_errno(errno.EFAULT, f"ioctl: nothing is mapped at {argument:#x}")
    view = _view(argument)
    if view.readonly:
        raise ArgumentError("ioctl: the argument is read-only and the device writes a result: pass a bytearray")
    view[:] = data


def _view(argument: BytesLike) -> memoryview:
    try:
        return memoryview(argument).cast("B")
    except TypeError as error:
        raise ArgumentTypeError(f"ioctl: {argument!r} is neither an address nor contiguous bytes") from error


def pack(event: Event) -> bytes:
    """The 32 bytes of an event, the same in both versions."""
    if isinstance(event, Invalidation):
        flags = ummunotify.EVENT_FLAG_HINT if event.hint else 0
        return ummunotify.EVENT.pack(ummunotify.EVENT_TYPE_INVAL, flags, event.start, event.end, event.cookie)
    return ummunotify.EVENT.pack(ummunotify.EVENT_TYPE_LAST, 0, 0, 0, event.generation)
