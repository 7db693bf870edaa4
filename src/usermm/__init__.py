"""User-space memory-management devices for stock Linux.

`Ummunotify` tells exactly when memory that was registered with a device (RDMA, io_uring, CUDA, MPI windows) was
unmapped, moved or discarded, and answers "nothing changed" in the time of a system call or less.
"""

from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    CookieError,
    DeviceError,
    ForkedError,
    LimitError,
    MonitorFailedError,
    UnavailableError,
    UnwatchableError,
    UsermmError,
    WatchedElsewhereError,
    WouldBlockError,
)
from usermm.ummunotify.device import Ummunotify
from usermm.ummunotify.events import Event, Invalidation, Last
from usermm.version import __version__

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ClosedError",
    "CookieError",
    "DeviceError",
    "Event",
    "ForkedError",
    "Invalidation",
    "Last",
    "LimitError",
    "MonitorFailedError",
    "Ummunotify",
    "UnavailableError",
    "UnwatchableError",
    "UsermmError",
    "WatchedElsewhereError",
    "WouldBlockError",
    "__version__",
]
