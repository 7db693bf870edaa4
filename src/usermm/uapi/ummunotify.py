"""Version 2 of the ABI, `/dev/ummunotify`: ioctl numbers, layouts, flags.

Every layout is in the byte order of the machine and has no implicit padding (`=`).
"""

from __future__ import annotations

import struct

from usermm.uapi._ioctl import _IOW, _IOWR

DEVICE_PATH = "/dev/ummunotify"

FEATURES = struct.Struct("=I")
"""u32: the features asked for; the device writes back those that it grants."""

REGISTER = struct.Struct("=QQQII")
"""u64 start, u64 end (exclusive), u64 user_cookie, u32 flags (ignored: clients leave it garbage), u32 reserved."""

COOKIE = struct.Struct("=Q")
"""u64 user_cookie of the region to unregister."""

EVENT = struct.Struct("=IIQQQ")
"""u32 type, u32 flags, u64 hint_start, u64 hint_end, u64 user_cookie_counter (the cookie; LAST: the generation)."""

GENERATION = struct.Struct("=Q")
"""u64 at offset 0 of the mapped page."""

EXCHANGE_FEATURES = _IOWR("U", 1, FEATURES.size)
REGISTER_REGION = _IOW("U", 2, REGISTER.size)
UNREGISTER_REGION = _IOW("U", 3, COOKIE.size)

SUPPORTED_FEATURES = 0

EVENT_TYPE_INVAL = 0
EVENT_TYPE_LAST = 1
EVENT_FLAG_HINT = 1

READ_LIMIT_BYTES = 4096
"""One read gives at most this much, whatever its count: `EVENTS_PER_READ` events."""

EVENTS_PER_READ = READ_LIMIT_BYTES // EVENT.size

MMAP_LIMIT_BYTES = 4096
"""The longest mapping of the device, at offset 0."""
