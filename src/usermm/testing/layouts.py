"""Between the model's objects and the bytes of the ABI: what a real device does with copy_from_user and copy_to_user."""

from __future__ import annotations

import errno

from ..errors import ArgumentError, ArgumentTypeError, from_errno
from ..uapi import ummunotify
from ..ummunotify.events import Event, Invalidation

BytesLike = bytes | bytearray | memoryview


def _view(argument: BytesLike, size: int) -> memoryview:
    try:
        view = memoryview(argument).cast("B")
    except TypeError as error:
        raise ArgumentTypeError(f"ioctl: {argument!r} is neither an address nor bytes") from error
    if len(view) != size:
        raise ArgumentError(f"ioctl: the argument has {len(view)} bytes, the struct {size}")
    return view


def copy_in(argument: int | BytesLike, size: int) -> bytes:
    """The struct's bytes. DeviceError EFAULT: `argument` is an address. ArgumentError: not `size` bytes."""
    if isinstance(argument, int):
        raise from_errno(errno.EFAULT, f"ioctl: nothing is mapped at {argument:#x}")
    return bytes(_view(argument, size))


def copy_out(argument: int | BytesLike, data: bytes) -> None:
    """Writes a result. Errors as `copy_in`, and ArgumentError for bytes that cannot be written."""
    if isinstance(argument, int):
        raise from_errno(errno.EFAULT, f"ioctl: nothing is mapped at {argument:#x}")
    view = _view(argument, len(data))
    if view.readonly:
        raise ArgumentError("ioctl: the argument is read-only and the device writes a result")
    view[:] = data


def pack(event: Event) -> bytes:
    """The 32 bytes of an event, the same in both versions."""
    if isinstance(event, Invalidation):
        flags = ummunotify.EVENT_FLAG_HINT if event.hint else 0
        return ummunotify.EVENT.pack(ummunotify.EVENT_TYPE_INVAL, flags, event.start, event.end, event.cookie)
    return ummunotify.EVENT.pack(ummunotify.EVENT_TYPE_LAST, 0, 0, 0, event.generation)
