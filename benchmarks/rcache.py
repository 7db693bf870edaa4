"""The registration cache in C, beside UCX's: hits, misses, and the first look-up after memory went."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks.programs import Programs, Worker
from usermm.measurement import ucx
from usermm.measurement.harness import Effort, Figure, Result, Rounds, column, interleave, ratios
from usermm.measurement.misses import Memory

COUNTS = (1, 1_000, 100_000)
SEVERAL = 1_000
THREADS = 16
HIT, SEEN, OWN, PART, OTHER, SAME = "hit", "seen", "own", "part", "other", "same"
OPERATIONS = {HIT: 200_000, SEEN: 2_000, OWN: 2_000, PART: 2_000, OTHER: 1_000, SAME: 1_000}
AFTER = "first get after a munmap"
WHAT = {
    HIT: "hit",
    SEEN: f"miss, {Memory.SEEN.value}",
    OWN: f"miss, {Memory.OWN.value}",
    PART: f"miss, {Memory.PART.value}",
    OTHER: f"{AFTER}, another region",
    SAME: f"{AFTER}, memory mapped there since",
}
HIT_BAR = 1.0
BARS_US = {SEEN: 3.0, OWN: 3.0, PART: 3.0, OTHER: 1.2, SAME: 1.2}
OURS, UCX, WITH_LRU = "usermm", "UCX", "UCX with LRU"
MEDIAN = -1
"""The last column, and of hit and miss the only one."""
NOTES = (
    "get + release in C of 64 KiB regions aligned to their size, in random order; a registrar that does nothing.",
    f"{THREADS} threads: wall time from the first look-up to the last, divided by the number of all look-ups.",
    f"Misses, first gets: while {SEVERAL:,} regions are registered.",
    "miss: of memory that is in use; usermm has the kernel watch it. Watched before: by an earlier registration.",
    "first get: memory mapped there since is registered anew, another region is still registered. Timed one by one,"
    " two readings of the clock included.",
)
UCX_NOTES = (
    "UCX without a limit, as it is by default, keeps no order of use. with LRU: with a limit that is never reached.",
    "UCX is told of unmapped memory by the program, and libc stays as it is: UCX's own munmap is in no row.",
    "Aligned regions take one entry of UCX's radix tree; regions that begin elsewhere take 16, and longer.",
)


class Row(NamedTuple):
    """What a process measures."""

    side: str
    mode: str
    regions: int
    threads: int = 1

    @property
    def what(self) -> str:
        """All but the side."""
        if self.mode != HIT:
            return WHAT[self.mode]
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{WHAT[self.mode]}, {self.regions:,} region{'s' * (self.regions > 1)}{threads}"


def run(programs: Programs, effort: Effort) -> Result:
    """Each row is a process of its own, since a process has one monitor."""
    library, missing = _library()
    rows = _rows(OURS, *((UCX, WITH_LRU) if library else ()))
    names = {OURS: "usermm", UCX: f"{library}", WITH_LRU: f"lru:{library}"}
    with ExitStack() as stack:
        subjects = {}
        for row in rows:
            worker = Worker(programs.path("rcache"), names[row.side], row.mode, str(row.regions), str(row.threads))
            subjects[str(row)] = stack.enter_context(worker).subject(effort.operations(OPERATIONS[row.mode]))
        lines = interleave(subjects, effort.rounds)
    times_ns = {row: column(MEDIAN, lines[str(row)]) for row in rows}
    return Result(
        "rcache",
        "registration cache: get + release in C",
        [_measured(row, rounds) for row, rounds in times_ns.items()],
        _compared(times_ns) if library else [],
        [*NOTES, *(UCX_NOTES if library else (missing,))],
    )


def _library() -> tuple[Path | None, str]:
    try:
        return ucx.library(), ""
    except ucx.UcxError as error:
        return None, str(error)


def _rows(*sides: str) -> list[Row]:
    rows = []
    for side in sides:
        rows += [Row(side, HIT, count) for count in COUNTS] + [Row(side, HIT, SEVERAL, THREADS)]
        if side == OURS:
            rows += [Row(side, mode, SEVERAL) for mode in (SEEN, OWN)]
        if side != WITH_LRU:
            rows += [Row(side, mode, SEVERAL) for mode in (PART, OTHER, SAME)]
    return rows


def _measured(row: Row, rounds_ns: Rounds) -> Figure:
    name = f"{row.side}, {row.what}"
    if row.mode == HIT:
        return Figure.of(name, "ns", rounds_ns)
    return Figure.of(name, "us", [ns / 1000 for ns in rounds_ns], BARS_US[row.mode] if row.side == OURS else None)


def _compared(times_ns: Mapping[Row, Rounds]) -> list[Figure]:
    """Ours in units of the others'. Only UCX as it is by default sets a bar."""
    return [
        Figure.of(
            f"{row.what} / {row.side}",
            "ratio",
            ratios(times_ns[row._replace(side=OURS)], rounds),
            HIT_BAR if row.mode == HIT and row.side == UCX else None,
        )
        for row, rounds in times_ns.items()
        if row.side != OURS
    ]
