"""/dev/xen/gntdev: mapping pages that another domain granted; numbers and layouts of both personalities.

`mainline` is the device of Linux (its xen/gntdev.h), `seed2007` the first one, of 2007. Calls that both have share the
numbers, with other layouts behind them, so a file has to be told which of the two it is. Layouts are in the byte order
of the machine and have no implicit padding (`=`).
"""

from __future__ import annotations

import enum
from struct import Struct
from typing import Final

from usermm.uapi._ioctl import _IOC, NONE

DEVICE_PATH: Final = "/dev/xen/gntdev"

PAGE_BYTES: Final = 4096
"""The granted unit, and what an index counts in: Xen's page size, whatever the kernel's."""

REFERENCE: Final = Struct("=II")
"""u32 domid of the grantor, u32 reference."""

# mainline

MAP: Final = Struct("=I4xQ")
"""u32 count, u64 index (answered); count times REFERENCE follow. The number speaks of one of them: 24 bytes."""
UNMAP: Final = Struct("=QI4x")
"""u64 index, u32 count: exactly those of one MAP_GRANT_REF."""
OFFSET: Final = Struct("=QQI4x")
"""u64 address, u64 index (answered), u32 count of pages (answered)."""
NOTIFY: Final = Struct("=QII")
"""u64 index of the page plus the offset of the byte within it, u32 action (NOTIFY_*), u32 port. As on gntalloc."""
COPY: Final = Struct("=I4xQ")
"""u32 count, pointer to count times SEGMENT."""
SEGMENT: Final = Struct("=8s8sHHh2x")
"""source and dest (COPY_LOCAL or COPY_GRANTED), u16 length in bytes, u16 flags (COPY_*_GRANTED), s16 status
(answered)."""
COPY_LOCAL: Final = Struct("=Q")
"""Pointer to memory of the caller."""
COPY_GRANTED: Final = Struct("=IHH")
"""u32 reference, u16 offset in bytes within its page, u16 domid of the grantor."""

# seed2007

MAP_2007: Final = Struct("=I4xQq")
"""u32 count, pointer to count times REFERENCE, s64 index (answered)."""
UNMAP_2007: Final = Struct("=qI4x")
"""s64 index, u32 count of slots."""
OFFSET_2007: Final = Struct("=QqI4x")
"""pointer: the address, s64 offset (answered), u32 count of pages (answered)."""

SLOTS_2007: Final = 128
"""Grants of one open file."""

_LETTER: Final = "G"

MAP_GRANT_REF: Final = _IOC(NONE, _LETTER, 0, MAP.size + REFERENCE.size)
UNMAP_GRANT_REF: Final = _IOC(NONE, _LETTER, 1, UNMAP.size)
GET_OFFSET_FOR_VADDR: Final = _IOC(NONE, _LETTER, 2, OFFSET.size)
SET_MAX_GRANTS: Final = _IOC(NONE, _LETTER, 3, 4)
"""Gone from Linux: ENOTTY."""
SET_UNMAP_NOTIFY: Final = _IOC(NONE, _LETTER, 7, NOTIFY.size)
GRANT_COPY: Final = _IOC(NONE, _LETTER, 8, COPY.size)

MOST_GRANTS: Final = 65536
"""In one MAP_GRANT_REF of mainline."""

NOTIFY_CLEAR_BYTE: Final = 1
NOTIFY_SEND_EVENT: Final = 2

COPY_SOURCE_GRANTED: Final = 1
COPY_DEST_GRANTED: Final = 2


class GrantStatus(enum.IntEnum):
    """What Xen answers for one grant, mapped or copied (GNTST_* of its public/grant_table.h)."""

    OKAY = 0
    GENERAL_ERROR = -1
    BAD_DOMAIN = -2
    BAD_REFERENCE = -3
    BAD_HANDLE = -4
    PERMISSION_DENIED = -8
    BAD_COPY_ARGUMENT = -10
