"""Why a look-up would hit or miss now, in words."""

from __future__ import annotations

from typing import Any, Protocol

from usermm.rcache.refusals import Limits
from usermm.registrars.base import Overlap, Traits

Row = tuple[int, int, int, Any]
"""Address, length, holders, handle."""


class Cache(Protocol):
    """As much of a cache as there is to explain."""

    @property
    def uncached(self) -> bool: ...

    def remembers(self, buffer: object, /) -> bool: ...

    def overlapping(self, address: int, length: int, /) -> list[Row]: ...

    def counts(self) -> dict[str, int]: ...


def explain(cache: Cache, traits: Traits, limits: Limits, buffer: object, memory: tuple[int, int]) -> str:
    """One or more sentences; `memory`: the buffer's address and length."""
    address, length = memory
    what = f"{length} bytes at {address:#x}"
    if cache.uncached:
        return f"miss: {what} are registered anew each time, since no exact monitor can run here"
    rows = cache.overlapping(address, length)
    covering = [row for row in rows if row[0] <= address and address + length <= row[0] + row[1]]
    if covering:
        return f"hit: {what} are inside {_describe(covering[0])}; {_probing(cache, buffer)}"
    return f"miss: {what} are not registered; {_making(cache, traits, limits, memory, rows)}"


def _describe(row: Row) -> str:
    address, length, holders, handle = row
    held = f"held {holders} times" if holders else "held by nobody"
    return f"the registration of {length} bytes at {address:#x} (handle {handle!r}, {held})"


def _probing(cache: Cache, buffer: object) -> str:
    if cache.remembers(buffer):
        return "this very object asked before, so no system call is needed"
    return "this object did not ask before or cannot be remembered, so one system call asks for a quiet moment"


def _making(cache: Cache, traits: Traits, limits: Limits, memory: tuple[int, int], rows: list[Row]) -> str:
    address, length = memory
    never = limits.refusal(address, length)
    if never:
        return f"and cannot be: {never}"
    now = cache.counts()
    parts = [_overlaps(traits, rows)] if rows else ["nothing there overlaps"]
    parts += _gone(traits, now) + _room(now, limits, limits.rounded(address, length))
    return "; ".join(parts)


def _gone(traits: Traits, now: dict[str, int]) -> list[str]:
    gone = now["pinned"] - now["registrations"]
    if traits.overlap is not Overlap.REFUSED or not gone:
        return []
    return [f"{gone} that left the look-up are still held, and the device refuses overlaps: one may be in the way"]


def _room(now: dict[str, int], limits: Limits, length: int) -> list[str]:
    everything_held = now["held"] >= now["pinned"]
    return [
        f"{used} of {limit} {what} are in use, " + ("and all are held: release some" if everything_held else then)
        for used, more, limit, what, then in (
            (now["pinned_bytes"], length, limits.max_bytes, "bytes", "so others make room first"),
            (now["pinned"], 1, limits.max_count, "registrations", "so another makes room first"),
        )
        if limit is not None and used + more > limit
    ]


def _overlaps(traits: Traits, rows: list[Row]) -> str:
    described = f"{len(rows)} that overlap, the first {_describe(rows[0])},"
    if traits.overlap is Overlap.ALLOWED:
        return f"{described} may stay beside it"
    if traits.overlap is Overlap.REFUSED and any(row[2] for row in rows):
        return f"{described} are in the way, and the device refuses overlaps: release what is held first"
    return f"{described} give way to one registration of them all"
