"""Which range the model registers for the one that was asked for: rounded, and joined with what is there."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from usermm.errors import ArgumentError, LimitError
from usermm.registrars.base import Overlap, Traits
from usermm.testing.entries import Entry, Range


def target_range(wanted: Range, live: Sequence[Entry], traits: Traits, max_bytes: int | None) -> Range:
    """`wanted` rounded outwards, with all of `live` that it overlaps if the device wants that and the union fits.

    ArgumentError: longer than the device takes. LimitError: longer than `max_bytes`.
    """
    rounded = wanted.rounded(traits.granularity_bytes)
    if traits.max_length_bytes is not None and rounded.length > traits.max_length_bytes:
        raise ArgumentError(f"get: {rounded} is longer than the device takes ({traits.max_length_bytes} bytes)")
    if max_bytes is not None and rounded.length > max_bytes:
        raise LimitError(errno.ENOMEM, f"get: {rounded} is longer than max_bytes ({max_bytes})")
    if traits.overlap is Overlap.ALLOWED:
        return rounded
    union = _union(rounded, live, traits)
    limits = [limit for limit in (traits.max_length_bytes, max_bytes) if limit is not None]
    return union if all(union.length <= limit for limit in limits) else rounded


def _union(union: Range, live: Sequence[Entry], traits: Traits) -> Range:
    """With every entry that overlaps, repeated until nothing changes."""
    while True:
        parts = [union, *(entry.range for entry in live if _joins(entry, union, traits))]
        grown = Range(min(part.start for part in parts), max(part.end for part in parts))
        if grown == union:
            return union
        union = grown


def _joins(entry: Entry, union: Range, traits: Traits) -> bool:
    """Where overlaps are refused, a neighbour that somebody holds cannot be given back, and need not be: it stays."""
    if traits.merge_adjacent and entry.range.touches(union):
        return entry.idle or traits.overlap is Overlap.MERGED
    return entry.range.overlaps(union)
