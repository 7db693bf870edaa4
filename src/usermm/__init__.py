"""User-space memory-management devices for stock Linux.

`Ummunotify` tells exactly when memory that was registered with a device (RDMA, io_uring, CUDA, MPI windows) was
unmapped, moved or discarded, and answers "nothing changed" in the time of a system call or less.
"""

from usermm._core import Registration
from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    CookieError,
    DeviceError,
    ForkedError,
    LimitError,
    MonitorFailedError,
    OverlapError,
    RegistrationError,
    UnavailableError,
    UnwatchableError,
    UsermmError,
    WatchedElsewhereError,
    WouldBlockError,
)
from usermm.rcache.cache import RegistrationCache
from usermm.rcache.statistics import Statistics
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
    "OverlapError",
    "Registration",
    "RegistrationCache",
    "RegistrationError",
    "Statistics",
    "Ummunotify",
    "UnavailableError",
    "UnwatchableError",
    "UsermmError",
    "WatchedElsewhereError",
    "WouldBlockError",
    "__version__",
]
