"""What the model of the registration cache is made of: ranges of bytes, entries, and the account of one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

from usermm.errors import ArgumentError

_ADDRESS_LIMIT = 1 << 63


class Range(NamedTuple):
    """Bytes [start, end)."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    def overlaps(self, other: Range) -> bool:
        return self.start < other.end and other.start < self.end

    def touches(self, other: Range) -> bool:
        """They lie side by side, with no byte in common and none between them."""
        return self.start == other.end or other.start == self.end

    def covers(self, other: Range) -> bool:
        return self.start <= other.start and other.end <= self.end

    def rounded(self, granularity: int) -> Range:
        """Outwards, to multiples of `granularity`."""
        return Range(self.start & -granularity, (self.end + granularity - 1) & -granularity)

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


def checked_range(call: str, address: int, length: int) -> Range:
    """ArgumentError: the range is empty, or not one of addresses."""
    if not 0 <= address < address + length <= _ADDRESS_LIMIT:
        raise ArgumentError(f"{call}: {length} bytes at {address:#x} are not a range of addresses")
    return Range(address, address + length)


@dataclasses.dataclass(eq=False)
class Entry:
    """One registration with the device."""

    range: Range
    handle: object
    used: int = 0
    """When a get gave it last; gets are counted."""
    holders: int = 0
    live: bool = True
    """It is in the look-up. What left it never comes back."""
    hit: bool = False
    """A notification took memory of it. It cannot be found any more, and leaves when the next call looks."""
    leaving: bool = False
    """Its deregistration has begun."""

    @property
    def idle(self) -> bool:
        """Nobody holds it, so it may be given up."""
        return self.holders == 0 and not self.leaving


@dataclasses.dataclass(eq=False)
class Pending:
    """A range from when it is watched until it is an entry. It counts as registered already."""

    range: Range
    hit: bool = False


@dataclasses.dataclass
class Outcome:
    """What one call did. The lists are in the order of events."""

    hit: bool = False
    """The look-up had it. False in a miss, and in calls other than get."""
    tries: int = 0
    """How often the registrar was asked to register."""
    merged: list[Range] = dataclasses.field(default_factory=list)
    """What left the look-up because the new range overlaps it (or touches it, with merge_adjacent)."""
    evicted: list[Range] = dataclasses.field(default_factory=list)
    """What was given up to make room, or because the registrar had no resources."""
    deregistered: list[Range] = dataclasses.field(default_factory=list)
    """Everything that was deregistered during this call, for whatever reason."""
    told: Iterator[Range] = dataclasses.field(default_factory=lambda: iter(()), repr=False, compare=False)
    """Whom to give up first, as the caller said."""


class ModelRegistration:
    """What one get gave to one caller; several can share an entry."""

    def __init__(self, entry: Entry, outcome: Outcome, let_go: Callable[[Entry], None]) -> None:
        self.outcome = outcome
        self._entry = entry
        self._let_go: Callable[[Entry], None] | None = let_go

    @property
    def handle(self) -> Any:
        return self._entry.handle

    @property
    def address(self) -> int:
        """Where the registration begins, maybe before the memory that was asked for."""
        return self._entry.range.start

    @property
    def length(self) -> int:
        """Of the registration, in bytes."""
        return self._entry.range.length

    @property
    def valid(self) -> bool:
        """It can still be found: nothing took its memory, and nobody gave it up."""
        return self._entry.live and not self._entry.hit

    def release(self) -> None:
        """Lets go. A second call does nothing."""
        if self._let_go is not None:
            let_go, self._let_go = self._let_go, None
            let_go(self._entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()
