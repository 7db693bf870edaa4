"""The registration cache in C, beside UCX's: hits, misses, and the first look-up after memory went."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import Effort, Figure, Result, Rounds, column, interleave, ratios
from benchmarks.programs import Programs, Worker

UCX_VERSION = "1.22."
COUNTS = (1, 1_000, 100_000)
SEVERAL = 1_000
THREADS = 16
HIT, MISS, OTHER, SAME = "hit", "miss", "other", "same"
OPERATIONS = {HIT: 200_000, MISS: 2_000, OTHER: 1_000, SAME: 1_000}
WHAT = {HIT: "hit", MISS: "miss, new memory", OTHER: "first get after a munmap", SAME: "get of what was unmapped"}
HIT_BAR = 1.0
BARS_US = {MISS: 3.0, OTHER: 1.2, SAME: 1.2}
OURS, UCX, WITH_LRU = "usermm", "UCX", "UCX with LRU"
MEDIAN = -1
"""The last column, and of hit and miss the only one."""
NOTES = (
    "get + release in C of 64 KiB regions aligned to their size, in random order; a registrar that does nothing.",
    f"{THREADS} threads: wall time from the first look-up to the last, divided by the number of all look-ups.",
    "miss: includes watching the memory, all pages of which are in use.",
    "first get: of a cached region, just after another was unmapped. get of what was unmapped: of memory mapped there"
    " since, which is registered anew. Both are timed one by one, two readings of the clock included.",
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
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{WHAT[self.mode]}, {self.regions:,} region{'s' * (self.regions > 1)}{threads}"


def run(programs: Programs, effort: Effort) -> Result:
    """Each row is a process of its own, since a process has one monitor."""
    library, missing = find_ucx()
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


def _rows(*sides: str) -> list[Row]:
    rows = []
    for side in sides:
        rows += [Row(side, HIT, count) for count in COUNTS] + [Row(side, HIT, SEVERAL, THREADS)]
        if side != WITH_LRU:
            rows += [Row(side, mode, SEVERAL) for mode in (MISS, OTHER, SAME)]
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


def find_ucx() -> tuple[Path | None, str]:
    """The path of libucs.so, or why there is none in one line."""
    advice = f"pip install libucx-cu12=={UCX_VERSION}0"
    try:
        package = importlib.import_module("libucx")
    except ImportError:
        return None, f"UCX is not installed, so its rows are missing: {advice}"
    if not package.__version__.startswith(UCX_VERSION):
        return None, f"UCX {package.__version__} is installed, whose cache is another: {advice}"
    return Path(str(package.__file__)).with_name("lib") / "libucs.so", ""
