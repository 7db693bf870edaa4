"""Version 1 of the ABI, `/dev/ummunot`: what differs from version 2.

The ioctl numbers of the two versions are disjoint, so one ioctl entry point can tell them apart. There is no
EXCHANGE_FEATURES: the interface version is the first field of REGISTER_REGION.
"""

from __future__ import annotations

import struct

from usermm.uapi import ummunotify
from usermm.uapi._ioctl import _IOW, _IOWR

DEVICE_PATH = "/dev/ummunot"

INTERFACE_VERSION = 1
"""The only `intf_version` that REGISTER_REGION accepts; any other is EINVAL."""

REGISTER = struct.Struct("=IIQQQ")
"""u32 intf_version, u32 reserved, u64 start, u64 end (exclusive), u64 user_cookie."""

COOKIE = ummunotify.COOKIE
EVENT = ummunotify.EVENT
GENERATION = ummunotify.GENERATION

REGISTER_REGION = _IOWR("U", 1, REGISTER.size)
UNREGISTER_REGION = _IOW("U", 2, COOKIE.size)
