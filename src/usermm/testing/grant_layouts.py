"""What the model's devices share: copying an ioctl's argument in and out, and the protection of a mapping."""

from __future__ import annotations

import errno
import mmap as _mmap
from struct import Struct
from typing import Any

from usermm.errors import DeviceError, from_errno, grant_refused
from usermm.uapi.xen_gntdev import PAGE_BYTES

Argument = bytearray | memoryview


def copy_in(argument: Argument, layout: Struct, offset: int = 0) -> tuple[Any, ...]:
    """The fields at `offset`. DeviceError EFAULT: the argument ends before they do."""
    if len(argument) < offset + layout.size:
        raise from_errno(errno.EFAULT, f"ioctl: the argument has {len(argument)} bytes, too few")
    return layout.unpack_from(argument, offset)


def copy_in_array(argument: Argument, layout: Struct, offset: int, count: int) -> list[tuple[Any, ...]]:
    """`count` records from `offset` on. DeviceError EFAULT as copy_in."""
    if len(argument) < offset + count * layout.size:
        raise from_errno(errno.EFAULT, f"ioctl: the argument has {len(argument)} bytes, too few for {count} records")
    return [layout.unpack_from(argument, offset + index * layout.size) for index in range(count)]


def unknown(device: str, request: int, number: int = errno.ENOTTY) -> DeviceError:
    """A request that `device` does not have."""
    return grant_refused(number, f"ioctl({request:#x}): {device} has no such request")


def pages_of(length: int) -> int:
    """mmap(2) maps whole pages."""
    return -(-length // PAGE_BYTES)


def is_shared(flags: int, call: str) -> bool:
    """MAP_SHARED or MAP_PRIVATE. DeviceError EINVAL: neither, or both."""
    kind = flags & (_mmap.MAP_SHARED | _mmap.MAP_PRIVATE)
    if kind not in (_mmap.MAP_SHARED, _mmap.MAP_PRIVATE):
        raise grant_refused(errno.EINVAL, f"{call}: flags {flags:#x} are neither MAP_SHARED nor MAP_PRIVATE")
    return kind == _mmap.MAP_SHARED


def is_writable(prot: int) -> bool:
    """A mapping without PROT_WRITE is a read-only one."""
    return bool(prot & _mmap.PROT_WRITE)
