"""What a registrar is: the two calls by which a device takes memory and gives it back, and what it says about itself.

A registrar knows nothing of caches. It may be called from any thread (or says otherwise), also while another thread is
inside it, and from a deallocator.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol, TypeVar

from usermm.errors import ArgumentError

Handle = TypeVar("Handle")

PAGE_BYTES = 4096


class Overlap(enum.Enum):
    """What the device thinks of registrations that share bytes."""

    ALLOWED = "allowed"
    """They cost nothing but the pins: io_uring, mlock counted by ourselves, verbs."""
    MERGED = "merged"
    """Allowed, but better one that covers both: the cache grows a new registration to the union."""
    REFUSED = "refused"
    """An error of the device (MPI windows, CUDA, Mooncake): the old ones are deregistered before the union comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a cache has to know of a registrar. The values are fixed while the registrar lives."""

    overlap: Overlap = Overlap.ALLOWED
    merge_adjacent: bool = False
    """With MERGED or REFUSED: neighbours that touch are merged, too."""
    granularity_bytes: int = 1
    """Ranges are rounded outwards to multiples of this: a power of two, 1 to 4096."""
    max_length_bytes: int | None = None
    """The longest range that one registration can have, after rounding; None: no limit."""
    writes: bool = True
    """The device may write into the memory, so read-only buffers are refused."""
    any_thread: bool = True
    """False: every call has to come from the thread that made the registrar."""

    def __post_init__(self) -> None:
        granularity = self.granularity_bytes
        if not 1 <= granularity <= PAGE_BYTES or granularity & (granularity - 1):
            raise ArgumentError(f"Traits: granularity_bytes is {granularity}: pass a power of two up to {PAGE_BYTES}")
        if self.max_length_bytes is not None and not granularity <= self.max_length_bytes < 1 << 63:
            raise ArgumentError(
                f"Traits: max_length_bytes is {self.max_length_bytes}: pass at least granularity_bytes, below 2**63"
            )


class Registrar(Protocol[Handle]):
    """One device. See docs/how-to/registrar.md for one in twenty lines."""

    @property
    def traits(self) -> Traits: ...

    def register(self, address: int, length: int) -> Handle:
        """Hands [address, address + length) to the device (bytes); what it returns becomes `Registration.handle`.

        Raises LimitError (or MemoryError) when resources ran out: a cache gives up others and tries again. After any
        exception nothing is registered.
        """
        ...

    def deregister(self, handle: Handle) -> None:
        """Takes it back. Called once for each handle, in whatever thread; must not fail for memory that is gone."""
        ...
