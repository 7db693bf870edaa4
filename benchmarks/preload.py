"""A program under the preload library against the same program without: calls that are not ours, ours, starting."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.programs import ROOT, BenchmarkError, Programs, Worker
from usermm.measurement.harness import Effort, Figure, Result, Rounds, column, differences, interleave, ratios

LIBRARY = ROOT / "src" / "usermm" / "lib" / "libusermm-preload.so"
UNRELATED = ("read of /dev/null", "read of an empty pipe", "ioctl of a pipe", "mmap + munmap")
OURS = ("load of the generation", "REGISTER + UNREGISTER", "REGISTER", "REGISTER, new page", "read of nothing")
UNRELATED_BARS = (1.03, 1.03, 1.03, None)
OURS_BARS_NS = (2.0, None, 2000.0, 2000.0, None)
START_BAR_MS = 3.0
START, START_SHELL = "/bin/true", "sh -c true"


def run(programs: Programs, effort: Effort) -> Result:
    """Each mode is a process of its own, with the library and without."""
    if not LIBRARY.exists():
        raise BenchmarkError(f"{LIBRARY} is missing: make build")
    program, operations = programs.path("clean"), effort.operations(20_000)
    with ExitStack() as stack:
        subjects: dict[str, Callable[[], list[float]]] = {}
        for name, mode, preloaded in (
            ("without", "plain", False),
            ("preloaded", "plain", True),
            ("two threads", "thread", False),
            ("a device open", "opened", True),
            ("ours", "device", True),
        ):
            worker = Worker(*_environment(preloaded), program, mode)
            subjects[name] = stack.enter_context(worker).subject(operations)
        for command in (START, START_SHELL):
            for preloaded in (False, True):
                subjects[_start_name(command, preloaded)] = _start(command, preloaded, effort.operations(50))
        lines = interleave(subjects, effort.rounds)
    return Result("preload", "A program under the preload library", _measured(lines), _compared(lines), NOTES)


NOTES = [
    "without, preloaded: a program that opens no device. a device open: it has one open, and with it the monitor's"
    " thread; a second thread makes each call dearer for the kernel, so that is compared with two threads, without.",
    "mmap asks whether a change is under way when a device is open, and waits: so loads are exact for such addresses.",
    "start: from fork to the end of the process, the mean of a round.",
]


def _environment(preloaded: bool) -> list[str]:
    return ["env", f"LD_PRELOAD={LIBRARY}"] if preloaded else ["env", "-u", "LD_PRELOAD"]


def _start_name(command: str, preloaded: bool) -> str:
    return f"{command}, {'preloaded' if preloaded else 'without'}"


def _start(command: str, preloaded: bool, number: int) -> Callable[[], list[float]]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if preloaded:
        environment["LD_PRELOAD"] = str(LIBRARY)

    def measure() -> list[float]:
        start_s = time.perf_counter()
        for _ in range(number):
            subprocess.run(command.split(), env=environment, check=True)
        return [(time.perf_counter() - start_s) / number * 1000]

    return measure


def _measured(lines: dict[str, list[list[float]]]) -> list[Figure]:
    figures = [
        Figure.of(f"{call}, {name}", "ns", column(index, lines[name]))
        for index, call in enumerate(UNRELATED)
        for name in ("without", "preloaded", "two threads", "a device open")
    ]
    figures += [
        Figure.of(call, "ns", column(index, lines["ours"]), bar)
        for index, (call, bar) in enumerate(zip(OURS, OURS_BARS_NS, strict=True))
    ]
    for command in (START, START_SHELL):
        for preloaded in (False, True):
            name = _start_name(command, preloaded)
            figures.append(Figure.of(f"start of {name}", "ms", column(0, lines[name])))
    return figures


def _compared(lines: dict[str, list[list[float]]]) -> list[Figure]:
    def of(index: int, name: str) -> Rounds:
        return column(index, lines[name])

    figures = [
        Figure.of(f"{call}, preloaded / without", "ratio", ratios(of(index, "preloaded"), of(index, "without")), bar)
        for index, (call, bar) in enumerate(zip(UNRELATED, UNRELATED_BARS, strict=True))
    ]
    figures += [
        Figure.of(
            f"{call}, a device open / two threads",
            "ratio",
            ratios(of(index, "a device open"), of(index, "two threads")),
            bar,
        )
        for index, (call, bar) in enumerate(zip(UNRELATED, UNRELATED_BARS, strict=True))
    ]
    for command in (START, START_SHELL):
        more_ms = differences(of(0, _start_name(command, True)), of(0, _start_name(command, False)))
        figures.append(Figure.of(f"start of {command}, preloaded - without", "ms", more_ms, START_BAR_MS))
    return figures
