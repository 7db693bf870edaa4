"""What a cache has done so far, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts since the cache was made (in a forked child: since it first used it); sizes in bytes, times in ns."""

    registrations: int
    """In the look-up now."""
    held: int
    """Held by somebody now, in the look-up or not any more."""
    pinned: int
    """Registered with the device now."""
    pinned_bytes: int
    pinned_bytes_max: int
    """The most that it was."""
    hits: int
    misses: int
    probes: int
    """System calls that asked for a quiet moment: for objects that had not asked before and found something."""
    doubts: int
    """Times that there was none for 100 ms: what was there was given up and registered anew."""
    waits: int
    """For a registration that another thread was making."""
    unmapped: int
    """Invalidations by munmap, a shrinking heap, or a mapping over it."""
    remapped: int
    """By mremap."""
    discarded: int
    """By madvise."""
    evictions: int
    """For want of room: the limits, or the device had none."""
    expirations: int
    """Nobody asked for it any more, and no living object had."""
    retirements: int
    """An array or mapping of up to 512 KiB died whose memory was about to be unmapped."""
    merges: int
    """Registrations that gave way to a larger one."""
    retries: int
    """The memory changed while it was registered."""
    registered: int
    """Registrations that the device made, and the time it took for them."""
    register_failures: int
    register_ns: int
    deregistered: int
    deregister_ns: int

    @property
    def invalidations(self) -> int:
        """By every cause together."""
        return self.unmapped + self.remapped + self.discarded

    @property
    def hit_rate(self) -> float:
        """Hits of all answers, 0 to 1; 0 before the first one."""
        answers = self.hits + self.misses
        return self.hits / answers if answers else 0.0
