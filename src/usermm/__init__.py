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
    from usermm.channels.arrays import Slot
    from usermm.channels.channel import Channel, Lost
    from usermm.channels.listener import Listener
    from usermm.grants.domain import Domain
    from usermm.grants.evtchn import Evtchn
    from usermm.grants.gntalloc import Allocation, Gntalloc
    from usermm.grants.gntdev import Copy, Gntdev, Mapping
    from usermm.grants.store import Store, Transaction
    from usermm.grants.store_watch import Watch
    from usermm.grants.waiter import Waiter
    from usermm.hypercalls.store import Permission
    from usermm.hypervisor.embedded import Hypervisor
    from usermm.hypervisor.policy import Policy
    from usermm.hypervisor.policy_file import PolicyError

_LATER = {
    "Allocation": "usermm.grants.gntalloc",
    "Channel": "usermm.channels.channel",
    "Copy": "usermm.grants.gntdev",
    "Domain": "usermm.grants.domain",
    "Evtchn": "usermm.grants.evtchn",
    "Gntalloc": "usermm.grants.gntalloc",
    "Gntdev": "usermm.grants.gntdev",
    "Hypervisor": "usermm.hypervisor.embedded",
    "Listener": "usermm.channels.listener",
    "Lost": "usermm.channels.channel",
    "Mapping": "usermm.grants.gntdev",
    "Permission": "usermm.hypercalls.store",
    "Policy": "usermm.hypervisor.policy",
    "PolicyError": "usermm.hypervisor.policy_file",
    "Slot": "usermm.channels.arrays",
    "Store": "usermm.grants.store",
    "Transaction": "usermm.grants.store",
    "Waiter": "usermm.grants.waiter",
    "Watch": "usermm.grants.store_watch",
}
"""Half of the users need none of these, and importing asyncio takes longer than the rest."""

__all__ = [
    "Allocation",
    "ArgumentError",
    "ArgumentTypeError",
    "BadReferenceError",
    "Channel",
    "ClosedError",
    "ConflictError",
    "CookieError",
    "Copy",
    "DeviceError",
    "Domain",
    "Event",
    "Evtchn",
    "ForkedError",
    "Gntalloc",
    "Gntdev",
    "GrantError",
    "Hypervisor",
    "HypervisorGoneError",
    "Invalidation",
    "Last",
    "LimitError",
    "Listener",
    "Lost",
    "Mapping",
    "MonitorFailedError",
    "OverlapError",
    "PeerGoneError",
    "Permission",
    "PermissionDeniedError",
    "Policy",
    "PolicyError",
    "ProtocolError",
    "QuotaError",
    "Registration",
    "RegistrationCache",
    "RegistrationError",
    "Slot",
    "Statistics",
    "Store",
    "Transaction",
    "Ummunotify",
    "UnavailableError",
    "UnwatchableError",
    "UsermmError",
    "Waiter",
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
