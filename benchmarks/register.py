"""Registering and unregistering one page while one, a thousand or a hundred thousand others are registered."""

from __future__ import annotations

import math
from contextlib import ExitStack

from benchmarks.harness import Effort, Figure, Result, Rounds, column, interleave
from benchmarks.programs import Programs, Worker

COUNTS = (1, 1_000, 100_000)
COLUMNS = ("new page", "page watched before", "ioctl, new page", "ioctl, page watched before")
BAR_US = 3.0


def run(programs: Programs, effort: Effort) -> Result:
    """Each size is a process in C and one in Python, since a process has one region tree."""
    with ExitStack() as stack:
        workers = {
            (language, count): stack.enter_context(
                Worker(programs.path("register"), str(count))
                if language == "C"
                else Worker.python("benchmarks.register_worker", str(count))
            )
            for count in COUNTS
            for language in ("C", "Python")
        }
        operations = effort.operations(2000)
        subjects = {f"{language} {count}": worker.subject(operations) for (language, count), worker in workers.items()}
        lines = interleave(subjects, effort.rounds)
    measured, times_us = [], {}
    for language, count in workers:
        rounds = lines[f"{language} {count}"]
        for index in range(len(rounds[0])):
            what = f"{language}, {COLUMNS[index]}" if index < 2 else COLUMNS[index]
            times_us[what, count] = [ns / 1000 for ns in column(index, rounds)]
            bar = BAR_US if index < 2 else None
            measured.append(Figure.of(f"{what}, {count:,} regions", "us", times_us[what, count], bar))
    compared = [
        figure
        for language in ("C", "Python")
        for kind in COLUMNS[:2]
        for figure in _growth(f"{language}, {kind}", [times_us[f"{language}, {kind}", count] for count in COUNTS])
    ]
    return Result(
        "register",
        "register + unregister of one page",
        measured,
        compared,
        [
            "Regions are single pages, four pages apart inside one mapping, in random order. Only the pair is timed.",
            "New pages make the kernel split a mapping, but at 100,000 regions, where vm.max_map_count no longer allows it"
            " and usermm watches the whole mapping at once. ioctl: UFFDIO_REGISTER alone, on a page of the same kind.",
            "Growth: what one doubling of the regions adds, between 1,000 and 100,000 and between 1 and 1,000.",
        ],
    )


def _growth(name: str, times_us: list[Rounds]) -> list[Figure]:
    one, thousand, most = times_us
    early = [(b - a) / math.log2(COUNTS[1] / COUNTS[0]) for a, b in zip(one, thousand, strict=True)]
    late = [(b - a) / math.log2(COUNTS[2] / COUNTS[1]) for a, b in zip(thousand, most, strict=True)]
    return [
        Figure.of(f"{name}, 100,000 / 1 region", "ratio", [b / a for a, b in zip(one, most, strict=True)]),
        Figure.of(f"{name}, added by a doubling up to 1,000", "us", early),
        Figure.of(f"{name}, added by a doubling from 1,000 on", "us", late),
    ]
