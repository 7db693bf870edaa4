"""Which range the model registers for the one that was asked for: rounded, and joined with what is there."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from usermm.errors import ArgumentError, LimitError
from usermm.registrars.base import Overlap, Traits
from usermm.testing.entries import Entry, Outcome, Range


class Making:
    """One get that found nothing, from its first attempt to its last."""

    def __init__(self, wanted: Range, outcome: Outcome) -> None:
        self.wanted = wanted
        self.outcome = outcome
        self.changes = 0
        """How often the memory changed while it was registered."""
        self.notified = 0
        """How many notifications there had been when the union was found."""
        self._union: Range | None = None
        self._alone = False

    @property
    def is_union(self) -> bool:
        """What is to be registered is more than what was asked for."""
        return self._union is not None

    def target(self, live: Sequence[Entry], traits: Traits, max_bytes: int | None) -> Range:
        """What to register: the range rounded outwards, with all of `live` that it overlaps if the device wants that.

        What has been given back for the union stays in it until that has been tried. A union that is too long is not
        made. ArgumentError: longer than the device takes. LimitError: longer than `max_bytes`.
        """
        rounded = self.wanted.rounded(traits.granularity_bytes)
        if traits.max_length_bytes is not None and rounded.length > traits.max_length_bytes:
            raise ArgumentError(f"get: {rounded} is longer than the device takes ({traits.max_length_bytes} bytes)")
        if max_bytes is not None and rounded.length > max_bytes:
            raise LimitError(errno.ENOMEM, f"get: {rounded} is longer than max_bytes ({max_bytes})")
        if traits.overlap is Overlap.ALLOWED or self._alone:
            return rounded
        union = _union(self._union or rounded, live, traits)
        limits = [limit for limit in (traits.max_length_bytes, max_bytes) if limit is not None]
        self._alone = any(union.length > limit for limit in limits)
        if union == rounded or self._alone:
            return rounded
        self._union = union
        return union

    def forget_union(self, *, alone: bool = False) -> None:
        """It was tried, and what changed meanwhile is in no union any more; with `alone` there is never one again."""
        self._union = None
        self._alone = self._alone or alone

    def drop_union(self, reason: Exception) -> None:
        """A part of it is held by now, gone, or of another kind. Raises `reason` if there is no union."""
        if self._union is None:
            raise reason
        self.forget_union(alone=True)


def _union(union: Range, live: Sequence[Entry], traits: Traits) -> Range:
    """With every entry that overlaps, repeated until nothing changes."""
    while True:
        parts = [union, *(entry.range for entry in live if _joins(entry, union, traits))]
        grown = Range(min(part.start for part in parts), max(part.end for part in parts))
        if grown == union:
            return union
        union = grown


def _joins(entry: Entry, union: Range, traits: Traits) -> bool:
    """Where overlaps are refused, what somebody holds cannot be given back: if it only touches, it stays as it is."""
    if traits.overlap is Overlap.REFUSED and not entry.idle:
        return False
    return entry.range.overlaps(union) or (traits.merge_adjacent and entry.range.touches(union))
