"""Registering and unregistering one page while one, a thousand or a hundred thousand others are registered."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.programs import Programs, Worker
from usermm.measurement.harness import Effort, Figure, Result, Rounds, column, interleave, ratios

COUNTS = (1, 1_000, 100_000)
KINDS = ("new page", "new page, untouched", "page watched before")
LANGUAGES = ("C", "Python")
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
            for language in LANGUAGES
        }
        operations = effort.operations(5000)
        subjects = {f"{language} {count}": worker.subject(operations) for (language, count), worker in workers.items()}
        lines = interleave(subjects, effort.rounds)
    measured = []
    times_us: dict[tuple[str, int], Rounds] = {}
    for language, count in workers:
        rounds = lines[f"{language} {count}"]
        for index in range(len(rounds[0])):
            who = language if index < len(KINDS) else "ioctl"
            what = f"{who}, {KINDS[index % len(KINDS)]}"
            times_us[what, count] = [ns / 1000 for ns in column(index, rounds)]
            bar = None if who == "ioctl" else BAR_US
            measured.append(Figure.of(f"{what}, {_regions(count)}", "us", times_us[what, count], bar))
    compared = [
        Figure.of(f"{what}, {_regions(count)} / 1", "ratio", ratios(times_us[what, count], times_us[what, 1]))
        for what in (f"{language}, {kind}" for language in LANGUAGES for kind in KINDS)
        for count in COUNTS[1:]
    ]
    return Result(
        "register",
        "register + unregister of one page",
        measured,
        compared,
        [
            "Regions are single pages, four pages apart inside one mapping, in random order. Only the pair is timed.",
            "A new page makes the kernel split a mapping. ioctl: UFFDIO_REGISTER alone, with a page of the same kind.",
            "untouched: no page of the mapping was ever written, so the kernel splits it sooner."
            " Every few thousandth registration counts the process's mappings; its cost is spread over all rows.",
            "In 1,000 / 1 and 100,000 / 1, logarithmic growth from one region on would be a factor of 11 and 18.",
        ],
    )


def _regions(count: int) -> str:
    return f"{count:,} region{'s' * (count > 1)}"
