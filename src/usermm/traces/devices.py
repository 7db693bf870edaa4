"""What a trace has said of one device so far."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from usermm.traces.records import Notify, Open, Read, Register, Unregister

MOST_UNDRAINED: Final = 1024
"""Notifications that are kept for comparing with the regions; of more only the first ones are."""

MOST_FORMER: Final = 1 << 16
"""Cookies that are remembered after they left, for a better message."""


@dataclass(slots=True)
class Counts:
    """Calls that succeeded, but `refused`: REGISTER calls that did not."""

    registers: int = 0
    refused: int = 0
    unregisters: int = 0
    notifications: int = 0
    reads: int = 0
    events: int = 0
    lasts: int = 0


@dataclass(slots=True)
class Device:
    """One open of one process. `opened` is None for a device whose open is not in the trace: a parent's, mostly."""

    process: int
    number: int
    opened: Open | None
    counts: Counts = field(default_factory=Counts)
    mapped: bool = False
    first_use: int | None = None
    """The line of the call after which EXCHANGE_FEATURES is refused."""
    regions: dict[int, Register] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    """Registered cookies whose INVAL was read, with the line of that read."""
    former: dict[int, str] = field(default_factory=dict)
    """What became of cookies that are not registered, in words."""
    in_drain: Read | None = None
    """The newest read that gave events, as long as neither LAST nor EAGAIN followed."""
    registered_in_drain: int = 0
    """REGISTER calls since that read by the thread that read."""
    generation: int = 0
    drained: int = 0
    """The newest generation that LAST, or EAGAIN, has confirmed."""
    undrained: list[Notify] = field(default_factory=list)
    registered_undrained: Register | None = None
    """A REGISTER after a notification that is still in `undrained`."""
    closed: int | None = None
    """The line of the close."""
    left: int = 0
    """Regions that were still registered at the end."""
    _early: set[int] = field(default_factory=set)
    """Cookies that were unregistered before their REGISTER was seen."""

    @property
    def abi(self) -> int:
        return self.opened.abi if self.opened else 2

    @property
    def owner(self) -> tuple[int, int]:
        return self.process, self.number

    def use(self, line: int) -> None:
        """EXCHANGE_FEATURES is refused from now on."""
        if self.first_use is None:
            self.first_use = line

    def register(self, record: Register) -> None:
        """A REGISTER that answered 0."""
        self.counts.registers += 1
        if record.cookie in self._early:
            self._early.discard(record.cookie)  # another thread's UNREGISTER of it was written first
            return
        self.regions[record.cookie] = record
        if self.undrained and self.registered_undrained is None:
            self.registered_undrained = record

    def unregister(self, record: Unregister) -> None:
        """An UNREGISTER that answered 0."""
        self.counts.unregisters += 1
        self.gone.pop(record.cookie, None)
        if self.regions.pop(record.cookie, None) is None and self.opened is not None:
            self._early.add(record.cookie)
        self.remember(record.cookie, f"was unregistered at line {record.line}")

    def remember(self, cookie: int, fate: str) -> None:
        """Keep it for the message of a later mistake."""
        if len(self.former) >= MOST_FORMER:
            self.former.clear()
        self.former[cookie] = fate

    def notify(self, record: Notify) -> None:
        """The generation moved."""
        self.counts.notifications += 1
        self.generation = max(self.generation, record.generation)
        # Threads write their lines: a LAST can stand before the notification that it confirms.
        if record.generation > self.drained and len(self.undrained) < MOST_UNDRAINED:
            self.undrained.append(record)

    def events(self, record: Read) -> None:
        """A read that gave some."""
        self.counts.reads += 1
        self.counts.events += len(record.hits) + (record.last is not None)
        for hit in record.hits:
            if hit.cookie in self.regions:
                self.gone.setdefault(hit.cookie, record.line)
        if record.last is not None:
            self.counts.lasts += 1
            self.drain(record.last)
        elif record.hits:
            self.in_drain, self.registered_in_drain = record, 0

    def drain(self, generation: int) -> None:
        """Everything up to `generation` has been read."""
        self.in_drain = None
        self.drained = max(self.drained, generation)
        self.undrained = [record for record in self.undrained if record.generation > self.drained]
        if not self.undrained:
            self.registered_undrained = None

    def undrained_hits(self) -> list[Notify]:
        """Of the notifications in `undrained` those whose memory overlaps a region that is still registered."""
        regions = sorted((region.start, region.end) for region in self.regions.values())
        starts = [start for start, _ in regions]
        ends = list(accumulate((end for _, end in regions), max))  # of all regions up to here the highest end

        def hits(record: Notify) -> bool:
            count = bisect_left(starts, record.end)
            return count > 0 and ends[count - 1] > record.start

        return [record for record in self.undrained if hits(record)]
