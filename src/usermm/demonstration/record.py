"""What was observed, as plain data for whoever shows it. Imports nothing of usermm."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


@dataclass
class Outcome:
    """What was counted; `pinned_bytes_max` is the most that the process had pinned."""

    reads: int = 0
    wrong_reads: int = 0
    registrations: int = 0
    hits: int = 0
    pinned_bytes_max: int = 0


class Happening(Enum):
    """What a moment shows."""

    MAPPED = auto()
    REGISTERED = auto()  # the look-up missed, and gave up `forgotten` registrations
    HIT = auto()
    READ = auto()
    UNMAPPED = auto()
    NOTED = auto()  # by the monitor, which the cache asks in its look-up
    NOT_NOTED = auto()
    MAPPED_AGAIN = auto()  # at the same address
    MAPPED_ELSEWHERE = auto()


@dataclass(frozen=True)
class Moment:
    """One step and what was measured right after it; sizes in bytes."""

    happening: Happening
    address: int
    length: int
    pinned_bytes: int
    slot: int = 0
    forgotten: int = 0
    transferred: int = 0  # what the ring reported
    buffer: str = ""  # what the program finds at the start of its buffer
    expected: str = ""  # what the file has there
