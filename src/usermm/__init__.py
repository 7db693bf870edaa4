"""User-space memory-management devices for stock Linux.

`Ummunotify` tells exactly when memory that was registered with a device (RDMA, io_uring, CUDA, MPI windows) was
unmapped, moved or discarded, and answers "nothing changed" in the time of a system call or less.

`Domain` shares single pages with a named peer, read-only or not, and takes them back; `Hypervisor` is what domains meet
at. They are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

from usermm._core import Registration
from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    BadReferenceError,
    ClosedError,
    ConflictError,
    CookieError,
    DeviceError,
    ForkedError,
    GrantError,
    HypervisorGoneError,
    LimitError,
    MonitorFailedError,
    OverlapError,
    PeerGoneError,
    PermissionDeniedError,
    ProtocolError,
    QuotaError,
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

if TYPE_CHECKING:
    from usermm.channels.channel import Channel
    from usermm.grants.domain import Domain
    from usermm.grants.store import Store, Transaction
    from usermm.grants.store_watch import Watch
    from usermm.hypercalls.store import Permission
    from usermm.hypervisor.embedded import Hypervisor

_LATER = {
    "Channel": "usermm.channels.channel",
    "Domain": "usermm.grants.domain",
    "Hypervisor": "usermm.hypervisor.embedded",
    "Permission": "usermm.hypercalls.store",
    "Store": "usermm.grants.store",
    "Transaction": "usermm.grants.store",
    "Watch": "usermm.grants.store_watch",
}
"""Half of the users need none of these, and importing asyncio takes longer than the rest."""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BadReferenceError",
    "Channel",
    "ClosedError",
    "ConflictError",
    "CookieError",
    "DeviceError",
    "Domain",
    "Event",
    "ForkedError",
    "GrantError",
    "Hypervisor",
    "HypervisorGoneError",
    "Invalidation",
    "Last",
    "LimitError",
    "MonitorFailedError",
    "OverlapError",
    "PeerGoneError",
    "Permission",
    "PermissionDeniedError",
    "ProtocolError",
    "QuotaError",
    "Registration",
    "RegistrationCache",
    "RegistrationError",
    "Statistics",
    "Store",
    "Transaction",
    "Ummunotify",
    "UnavailableError",
    "UnwatchableError",
    "UsermmError",
    "Watch",
    "WatchedElsewhereError",
    "WouldBlockError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'usermm' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
