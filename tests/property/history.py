"""The device a second time, as far from the model as possible: no state, only questions to a log of what happened.

Every answer is worked out from the whole log. Written from the rules alone, for the model to be compared with.
"""

from __future__ import annotations

import dataclasses

Event = tuple[int, ...] | tuple[int, int, int, bool]


@dataclasses.dataclass(frozen=True)
class Registered:
    cookie: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Unregistered:
    cookie: int


@dataclasses.dataclass(frozen=True)
class Notified:
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Delivered:
    """A read took the event of this cookie, or LAST (None)."""

    cookie: int | None


Entry = Registered | Unregistered | Notified | Delivered


class History:
    """The log of one device, and what follows from it."""

    def __init__(self, abi: int) -> None:
        self.abi = abi
        self.log: list[Entry] = []

    def live(self, when: int | None = None) -> dict[int, int]:
        """Cookie -> position in the log of its registration, for the regions alive at `when` (now)."""
        alive: dict[int, int] = {}
        for position, entry in enumerate(self.log[:when]):
            if isinstance(entry, Registered):
                alive[entry.cookie] = position
            elif isinstance(entry, Unregistered):
                del alive[entry.cookie]
        return alive

    def _region(self, position: int) -> Registered:
        entry = self.log[position]
        assert isinstance(entry, Registered)
        return entry

    def _pending(self, cookie: int, registered: int) -> list[int]:
        """Positions of the notifications that hit the region since it was registered or last delivered."""
        region = self._region(registered)
        since = max([registered, *(i for i, entry in enumerate(self.log) if entry == Delivered(cookie))])
        return [i for i, entry in enumerate(self.log) if i > since and _meets(entry, region)]

    def generation(self) -> int:
        return sum(
            any(_meets(entry, self._region(position)) for position in self.live(when).values())
            for when, entry in enumerate(self.log)
        )

    def queue(self) -> list[Event]:
        """The events that wait, in order: by the first hit, then by start, then the newest registration first."""
        waiting = []
        for cookie, registered in self.live().items():
            hits = self._pending(cookie, registered)
            if hits:
                region = self._region(registered)
                waiting.append(((hits[0], region.start, -registered), self._event(region, hits)))
        return [event for _, event in sorted(waiting, key=lambda pair: pair[0])]

    def _event(self, region: Registered, hits: list[int]) -> Event:
        exact = len(hits) == 1 if self.abi == 2 else len(hits) % 2 == 1
        if not exact:
            return (region.cookie, region.start, region.end, False)
        first = self.log[hits[0]]
        assert isinstance(first, Notified)
        start = region.start if region.start >= first.start else first.start
        end = region.end if region.end <= first.end else first.end
        return (region.cookie, start, end, True)

    def owes_last(self) -> bool:
        """Version 2: the latest thing that a read gave was an INVAL."""
        given = [entry for entry in self.log if isinstance(entry, Delivered)]
        return self.abi == 2 and bool(given) and given[-1].cookie is not None

    def readable(self) -> bool:
        return bool(self.queue()) or self.owes_last()

    def read(self, capacity: int) -> list[Event]:
        """What a read with room for so many events gives; it goes into the log."""
        waiting = self.queue()
        given: list[Event] = list(waiting[:capacity])
        self.log += [Delivered(event[0]) for event in given]
        if capacity > len(waiting):
            given.append((self.generation(),))
            self.log.append(Delivered(None))
        return given


def _meets(entry: Entry, region: Registered) -> bool:
    return isinstance(entry, Notified) and entry.start < region.end and entry.end > region.start
