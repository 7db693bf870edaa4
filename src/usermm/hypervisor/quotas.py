"""What a domain may use at most, by Xen's names and with Xen's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from usermm.errors import ArgumentError

GRANTS_PER_FRAME: Final = 512
"""Entries of version 1 (8 bytes) in a page of 4096 bytes."""
MAPPED_PER_FRAME: Final = 256
"""Entries of the maptrack table (16 bytes) in a page of 4096 bytes."""

_RANGES: Final[Mapping[str, tuple[int, int]]] = {
    "max_grant_frames": (0, 1024),  # 1024 frames are 2**19 references: half of what an incarnation can number
    "max_maptrack_frames": (0, 65536),
    "max_event_channels": (0, 131071),  # ports of Xen's FIFO event channels, without port 0
    "max_memkb": (0, 2**40),
    "quota_entries": (3, 1_000_000),  # a domain's home has three nodes: itself, "name" and "domid"
    "quota_maxsize": (64, 16384),  # above, a value and its path would not fit a message of the store
    "quota_maxwatch": (0, 65536),
    "quota_transaction": (0, 1024),
    "quota_pathmax": (64, 3072),  # XENSTORE_ABS_PATH_MAX
}


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits of one domain. 0 allows none. Raises `ArgumentError` for a value outside what its name allows."""

    max_grant_frames: int = 64
    """Frames of the grant table, 512 references each."""
    max_maptrack_frames: int = 1024
    """Frames of the table of what the domain maps, 256 pages each."""
    max_event_channels: int = 1023
    """Ports, bound or waiting for somebody to bind."""
    max_memkb: int = 1 << 20
    """KiB of memory in all that the domain shares and the hypervisor keeps for it."""
    quota_entries: int = 1000
    """Nodes of the store that the domain owns."""
    quota_maxsize: int = 2048
    """Bytes of one node's value."""
    quota_maxwatch: int = 128
    """Watches on the store."""
    quota_transaction: int = 10
    """Transactions on the store at a time."""
    quota_pathmax: int = 3072
    """Bytes of an absolute path in the store."""

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ArgumentError(f"{name} = {value!r}: give a whole number from {least} to {most}")

    @property
    def max_grants(self) -> int:
        """References that the domain can have granted at a time."""
        return self.max_grant_frames * GRANTS_PER_FRAME

    @property
    def max_mapped(self) -> int:
        """Pages of others that the domain can have mapped at a time."""
        return self.max_maptrack_frames * MAPPED_PER_FRAME

    def replace(self, changes: Mapping[str, object]) -> Quotas:
        """These quotas with `changes`, by name. Raises `ArgumentError`: key, value, what is allowed."""
        for name in changes:
            if name not in _RANGES:
                raise ArgumentError(f"{name}: there is no such quota: give {', '.join(NAMES)}")
        return replace(self, **changes)  # type: ignore[arg-type]  # __post_init__ looks at the values

    def as_data(self) -> dict[str, int]:
        """Plain data for the status, by name."""
        return {name: getattr(self, name) for name in NAMES}


NAMES: Final = tuple(field.name for field in fields(Quotas))
"""All quotas, in the order of their definition."""
