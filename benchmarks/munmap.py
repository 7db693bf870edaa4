"""munmap of a watched page against the least that any userfaultfd reader can do, and of memory that nobody watches."""

from __future__ import annotations

import os
from contextlib import ExitStack

from benchmarks.programs import Programs, Worker
from usermm.measurement.harness import Effort, Figure, Result, column, interleave, ratios

MODES = ("alone", "sleeper", "unwatched", "bare", "usermm")
BAR = 1.3
MEAN, MEDIAN = 0, 1


def run(programs: Programs, effort: Effort) -> Result:
    """Each mode is a process of its own; the page lies between the same neighbours in all of them."""
    placements = _placements()
    operations = effort.operations(1000)
    with ExitStack() as stack:
        workers = {
            f"{mode}, {placement}": stack.enter_context(Worker(programs.path("munmap"), mode, caller, reader))
            for placement, (caller, reader) in placements.items()
            for mode in (MODES if placement == "unpinned" else ("bare", "usermm"))
        }
        lines = interleave({name: worker.subject(operations) for name, worker in workers.items()}, effort.rounds)
    means = {name: column(MEAN, rounds) for name, rounds in lines.items()}
    medians = {name: column(MEDIAN, rounds) for name, rounds in lines.items()}
    compared = [
        Figure.of(f"unwatched / {mode}", "ratio", ratios(medians["unwatched, unpinned"], medians[f"{mode}, unpinned"]))
        for mode in ("alone", "sleeper")
    ]
    for placement in placements:
        for kind, values in (("median", medians), ("mean", means)):
            rounds = ratios(values[f"usermm, {placement}"], values[f"bare, {placement}"])
            compared.append(Figure.of(f"usermm / bare, {placement}, {kind} of a round", "ratio", rounds, BAR))
    return Result(
        "munmap",
        "munmap of one touched page",
        [
            Figure.of(f"{name}, {kind} of a round", "us", [ns / 1000 for ns in values[name]])
            for name in workers
            for kind, values in (("median", medians), ("mean", means))
        ],
        compared,
        [
            "alone: no second thread. sleeper: one that sleeps in poll. unwatched: while usermm watches another page.",
            "bare: a second thread with nothing but poll and read, same registration. usermm: watched by usermm.",
            "Unpinned, the scheduler wakes the reader on the caller's core or on another, for long stretches at a time;"
            " which one decides the figure, of bare and usermm alike. The pinned rows compare like with like.",
        ],
    )


def _placements() -> dict[str, tuple[str, str]]:
    """Cores of the calling thread and the reader; -1 leaves a thread where the scheduler likes, as the library runs."""
    cpus = [str(cpu) for cpu in sorted(os.sched_getaffinity(0))]
    placements = {"unpinned": ("-1", "-1"), "same core": (cpus[0], cpus[0])}
    if len(cpus) > 1:
        placements["two cores"] = (cpus[0], cpus[1])
    return placements
