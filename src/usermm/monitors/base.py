"""What every monitor says about itself: how exact it is, whether it can run here, what a trial showed.

Devices and caches know monitors only through this module.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Exactness:
    """The contract of a monitor. True is a promise without exceptions but those that `exceptions` names."""

    own_thread: bool
    """When a thread's own munmap, mremap, madvise or brk call has returned, a check by that thread sees the
    change."""
    all_threads: bool
    """An address that another thread unmapped, and that was handed out again, is never taken for the old one,
    even while the other thread is still inside its call."""
    all_causes: bool
    """The change is seen whoever makes it: libc, a raw system call, a static binary, another language's
    runtime, the kernel itself; there is no function to patch that could be missed."""
    exceptions: tuple[str, ...] = ()
    """Changes that no monitor of this kind can see and that registration cannot refuse."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to get what the monitor needs: what was called, and 0 or the errno it ended with."""

    name: str
    errno: int

    @property
    def works(self) -> bool:
        return self.errno == 0


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a monitor can run in this process: `ways` in the order in which they were tried."""

    ways: tuple[Way, ...]
    features: tuple[str, ...]
    """What the kernel offers, by the header's names."""
    missing: tuple[str, ...]
    """What the monitor needs and the kernel does not offer."""
    lacking: tuple[str, ...] = ()
    """What widens the memory that can be watched, and the kernel does not offer."""

    @property
    def available(self) -> bool:
        return any(way.works for way in self.ways) and not self.missing


class Outcome(enum.StrEnum):
    """How the trial of one kind of change ended."""

    SEEN = "seen"
    MISSED = "missed"
    ABSENT = "absent"
    """This kernel does not have the call, so nobody can use it either."""
    FAILED = "failed"
    """The trial itself could not be made."""


@dataclass(frozen=True, slots=True)
class EventTrial:
    """One kind of change, made on purpose to watched memory."""

    name: str
    promised: bool
    """False for the known blind spots, which are tried too: a later kernel may report them."""
    outcome: Outcome
    problem: str = ""
    """The error, where the outcome is ABSENT or FAILED."""


@dataclass(frozen=True, slots=True)
class RaceTrial:
    """Many changes, each followed at once by the question whether anything changed."""

    name: str
    trials: int
    wrong: int
    """Answers that took dead memory for live: must be 0."""
    wrong_unprotected: int
    """How often the same question without the protection was wrong: shows that the race was really met."""
    trials_unprotected: int
    """0 where every question that can be asked is protected."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What a monitor did when it was tried on this machine."""

    events: tuple[EventTrial, ...]
    races: tuple[RaceTrial, ...]

    @property
    def exactness(self) -> Exactness:
        """What was seen here, in the words of the contract; `exceptions`: the blind spots not seen."""
        good = (Outcome.SEEN, Outcome.ABSENT)
        promised = [event.outcome for event in self.events if event.promised]
        all_causes = Outcome.SEEN in promised and all(outcome in good for outcome in promised)
        own_thread, all_threads = (
            any(race.name == name for race in self.races)
            and all(race.wrong == 0 and race.trials > 0 for race in self.races if race.name == name)
            for name in (OWN_THREAD, OTHER_THREAD)
        )
        blind = tuple(event.name for event in self.events if not event.promised and event.outcome not in good)
        return Exactness(own_thread, all_threads, all_causes, blind)

    @property
    def exact(self) -> bool:
        found = self.exactness
        return found.own_thread and found.all_threads and found.all_causes


OWN_THREAD = "own thread"
OTHER_THREAD = "other thread"


class Device(Protocol):
    """As much of a device as a trial needs; see `usermm.Ummunotify`."""

    @property
    def generation(self) -> int: ...

    def register_range(self, start: int, end: int, cookie: int | None = None) -> int: ...

    def unregister(self, cookie: int) -> None: ...

    def check(self, seen: int, probe: bool = True) -> bool: ...

    def mmap(self) -> memoryview: ...

    def close(self) -> None: ...


class Monitor(Protocol):
    """How a monitor's module presents itself."""

    @property
    def NAME(self) -> str: ...  # noqa: N802 - a constant of the module

    @property
    def PROMISE(self) -> Exactness: ...  # noqa: N802

    def probe_availability(self) -> Availability: ...

    def self_test(self, open_device: Callable[[], Device], *, owns_heap: bool = False) -> SelfTest: ...
