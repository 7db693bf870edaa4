"""/dev/xen/gntalloc: pages of one's own, granted to another domain. From Linux' xen/gntalloc.h.

SET_UNMAP_NOTIFY has the number that it has on gntdev, and means the page from the granting side.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from usermm.uapi import xen_gntdev
from usermm.uapi._ioctl import _IOC, NONE

DEVICE_PATH: Final = "/dev/xen/gntalloc"

ALLOC: Final = Struct("=HHIQ")
"""u16 domid of the grantee, u16 flags (WRITABLE), u32 count of pages, u64 index (answered); count times REFERENCE
follow (answered). The number speaks of one of them, and of padding after it: 24 bytes."""
REFERENCE: Final = Struct("=I")
DEALLOC: Final = Struct("=QI4x")
"""u64 index, u32 count of pages."""
NOTIFY: Final = xen_gntdev.NOTIFY

WRITABLE: Final = 1

_LETTER: Final = "G"

ALLOC_GREF: Final = _IOC(NONE, _LETTER, 5, ALLOC.size + 8)
DEALLOC_GREF: Final = _IOC(NONE, _LETTER, 6, DEALLOC.size)
SET_UNMAP_NOTIFY: Final = xen_gntdev.SET_UNMAP_NOTIFY

NOTIFY_CLEAR_BYTE: Final = xen_gntdev.NOTIFY_CLEAR_BYTE
NOTIFY_SEND_EVENT: Final = xen_gntdev.NOTIFY_SEND_EVENT

LIMIT_PAGES: Final = 1024
"""How many pages all files of a domain have at most, unless the driver was told otherwise (its parameter `limit`)."""

FIRST_REFERENCE: Final = 8
"""0 to 7 are reserved: 0 is the console's, 1 the store's (GNTTAB_NR_RESERVED_ENTRIES)."""
