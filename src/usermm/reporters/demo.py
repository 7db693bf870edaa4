"""What ``usermm demo`` shows: a narration, a counter that moves, a table; or one JSON object."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Protocol, TextIO

from usermm.demonstration.record import Happening, Moment, Outcome

BY_HAND = "by_hand"
USERMM = "usermm"

_TITLES = {BY_HAND: "by hand", USERMM: "usermm"}
_CHAPTERS = {
    BY_HAND: "In slow motion. A cache written by hand, {(address, length): slot}:",
    USERMM: "The same with usermm.RegistrationCache, which asks its monitor before it believes itself:",
}
_PAUSE_S = 0.35  # between two moments on a terminal: sixteen of them in less than six seconds
_INDENT = " " * 15
_LINES = 3  # progress lines of each half when nobody watches live


class Report(Protocol):
    """What the demo tells, in this order: begin; chapter, moments (twice); progress (each half); table."""

    def begin(self, reads: int, seed: int, largest_bytes: int) -> None: ...
    def chapter(self, name: str) -> None: ...
    def moment(self, moment: Moment) -> None: ...
    def progress(self, name: str, outcome: Outcome) -> None: ...
    def table(self, outcomes: Mapping[str, Outcome]) -> None: ...


class JsonReport:
    """Exactly one JSON object, when all is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, reads: int, seed: int, largest_bytes: int) -> None:
        """Nothing yet."""

    def chapter(self, name: str) -> None:
        """Nothing yet."""

    def moment(self, moment: Moment) -> None:
        """Nothing yet."""

    def progress(self, name: str, outcome: Outcome) -> None:
        """Nothing yet."""

    def table(self, outcomes: Mapping[str, Outcome]) -> None:
        """Print the figures of both halves."""
        print(json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}), file=self._stream)


class TextReport:
    """For a person. `live` (a terminal): moments come slowly, and the counter overwrites itself."""

    def __init__(self, stream: TextIO, *, live: bool) -> None:
        self._stream = stream
        self._live = live
        self._reads = 0
        self._loop = ""
        self._step = 0

    def begin(self, reads: int, seed: int, largest_bytes: int) -> None:
        """Say what will be seen."""
        self._reads = reads
        self._loop = (
            f"{reads} reads while buffers of up to {largest_bytes >> 10} KiB come and go (seed {seed})"
        )
        self._print(
            "A program reads a file with io_uring, into buffers that it registers once and remembers."
        )

    def chapter(self, name: str) -> None:
        """Head one of the two slow motions."""
        self._step = 0
        self._print(f"\n{_CHAPTERS[name]}\n\n    pinned")

    def moment(self, moment: Moment) -> None:
        """One line: what is pinned now, and what happened. A wrong read gets its explanation."""
        self._step += 1
        self._print(f"  {moment.pinned_bytes >> 10:>4} KiB  {self._step}. {_sentence(moment)}")
        if moment.happening is Happening.READ and moment.buffer != moment.expected:
            self._print(
                f'{_INDENT}WRONG, and no error anywhere: the file has "{moment.expected.strip()}" there.'
            )
            self._print(f"{_INDENT}It went into the old pages: pinned, and out of everybody's sight.")
        if self._live:
            time.sleep(_PAUSE_S)

    def progress(self, name: str, outcome: Outcome) -> None:
        """The counter of one half."""
        done = outcome.reads == self._reads
        if name == BY_HAND and outcome.reads == 1:
            self._print(f"\nNow {self._loop}:")
        if self._live and (done or outcome.reads % 10 == 0):
            self._print(f"\r{_count(name, outcome, self._reads)}", end="\n" if done else "")
        elif not self._live and (done or outcome.reads % -(-self._reads // _LINES) == 0):
            self._print(_count(name, outcome, self._reads))

    def table(self, outcomes: Mapping[str, Outcome]) -> None:
        """The figures side by side."""
        self._print("\n             reads  wrong reads  registrations     hits  pinned bytes (max)")
        for name, figures in outcomes.items():
            title = f"  {_TITLES[name]:8}{figures.reads:>8}{figures.wrong_reads:>13}"
            self._print(f"{title}{figures.registrations:>15}{figures.hits:>9}{figures.pinned_bytes_max:>20,}")

    def _print(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self._stream, flush=True)


def _count(name: str, outcome: Outcome, reads: int) -> str:
    done = f"  {_TITLES[name]:8}{outcome.reads:>8} of {reads} reads reported success"
    return f"{done}, {outcome.wrong_reads} of them wrong"


def _sentence(moment: Moment) -> str:
    key = f"({moment.address:#x}, {moment.length})"
    match moment.happening:
        case Happening.MAPPED:
            text = f"mmap gives {moment.length >> 10} KiB at {moment.address:#x}."
        case Happening.REGISTERED:
            text = f"Look up {key}: {_missing(moment)}. Register it as slot {moment.slot}."
        case Happening.HIT:
            text = f"Look up {key}: there it is, slot {moment.slot}."
        case Happening.READ:
            success = f"success, {moment.transferred} bytes"
            text = f'Read into slot {moment.slot}: {success}. The buffer says "{moment.buffer.strip()}".'
        case Happening.UNMAPPED:
            text = "munmap: the memory is gone for the program, not for the device."
        case Happening.NOTED:
            text = "munmap came back only when the monitor had taken note."
        case Happening.NOT_NOTED:
            text = "Nobody tells the cache."
        case Happening.MAPPED_AGAIN:
            text = f'mmap gives {moment.address:#x} again. The program writes "{moment.buffer}".'
        case Happening.MAPPED_ELSEWHERE:
            text = f"mmap gives another address, {moment.address:#x}: this time nothing can go wrong."
    return text


def _missing(moment: Moment) -> str:
    return "what was there has gone, and is given up" if moment.forgotten else "not there"
