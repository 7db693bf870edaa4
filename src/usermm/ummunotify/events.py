"""What a device reports: `Invalidation` and `Last`."""

from __future__ import annotations

from typing import NamedTuple


class Invalidation(NamedTuple):
    """A registered region lost memory: treat every registration made with this cookie as stale.

    `start` and `end` (exclusive) are addresses in bytes. With `hint` true they are exactly what went, clipped to the
    region; with `hint` false several changes were folded into this event and they are the whole region.
    """

    cookie: int
    start: int
    end: int
    hint: bool


class Last(NamedTuple):
    """The queue is drained: everything up to `generation` has been reported."""

    generation: int


Event = Invalidation | Last
