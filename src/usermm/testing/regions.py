"""What one open of the device remembers: regions, the queue, the generation. No files, no bytes, no waiting."""

from __future__ import annotations

import dataclasses
import errno

from usermm.errors import CookieError
from usermm.ummunotify.events import Event, Invalidation, Last


@dataclasses.dataclass(eq=False)
class Region:
    """Addresses [start, end) as they were registered: unaligned, empty (start == end) or reversed (start > end)."""

    cookie: int
    start: int
    end: int
    hint: bool = False
    hint_start: int = 0
    hint_end: int = 0

    def is_hit_by(self, start: int, end: int) -> bool:
        """An empty region is hit only from both sides of its address, a reversed one only from beyond both its ends."""
        return self.start < end and start < self.end

    def event(self) -> Invalidation:
        """The event as it stands now: the hint clipped to the region, or the region."""
        if self.hint:
            return Invalidation(self.cookie, max(self.start, self.hint_start), min(self.end, self.hint_end), True)
        return Invalidation(self.cookie, self.start, self.end, False)


class Regions:
    """The rules of the device for `abi` 1 or 2. `generation` counts the notifications that hit something."""

    def __init__(self, abi: int) -> None:
        self.abi = abi
        self.generation = 0
        self._newest_first: list[Region] = []
        self._queue: list[Region] = []
        self._last_owed = False

    def register(self, cookie: int, start: int, end: int) -> None:
        """CookieError (EINVAL): the cookie is registered already."""
        if self.has(cookie):
            raise CookieError(errno.EINVAL, f"register: cookie {cookie} is registered already")
        self._newest_first.insert(0, Region(cookie, start, end))

    def unregister(self, cookie: int) -> None:
        """CookieError (EINVAL): the cookie is not registered. A queued event of the region vanishes without a trace."""
        if not self.has(cookie):
            raise CookieError(errno.EINVAL, f"unregister: cookie {cookie} is not registered")
        self._newest_first = [region for region in self._newest_first if region.cookie != cookie]
        self._queue = [region for region in self._queue if region.cookie != cookie]

    def has(self, cookie: int) -> bool:
        return any(region.cookie == cookie for region in self._newest_first)

    def notify(self, start: int, end: int) -> bool:
        """One notification for [start, end): True if it hit a region, and then the generation is one more."""
        # The sort is stable: regions with equal starts stay newest first.
        in_order = sorted(self._newest_first, key=lambda region: region.start)
        hit = [region for region in in_order if region.is_hit_by(start, end)]
        for region in hit:
            self._hit(region, start, end)
        self.generation += bool(hit)
        return bool(hit)

    def _hit(self, region: Region, start: int, end: int) -> None:
        if region not in self._queue:
            self._queue.append(region)
            region.hint, region.hint_start, region.hint_end = True, start, end
        elif self.abi == 1:
            region.hint = not region.hint  # Version 1's quirk: a third hit claims an exact range that is wrong.
        else:
            region.hint = False

    @property
    def readable(self) -> bool:
        """An event is queued or, in version 2, a LAST is owed."""
        return bool(self._queue) or (self._last_owed and self.abi == 2)

    def take(self, capacity: int) -> list[Event]:
        """What a read with room for `capacity` events gives: queued events, then LAST if the queue ran dry in time.

        LAST is owed from the first INVAL that was read until a LAST was, whatever happens to the queue meanwhile.
        """
        events: list[Event] = []
        while len(events) < capacity:
            if not self._queue:
                events.append(Last(self.generation))
                self._last_owed = False
                break
            events.append(self._queue.pop(0).event())
            self._last_owed = True
        return events
