"""Interleaved rounds and what they add up to.

Subjects are measured in turns, A B A B..., forwards and backwards, and a ratio is taken within each round: when the
machine becomes slower for a while, it does so for both sides.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Rounds = list[float]
"""One value for each round."""


@dataclass(frozen=True)
class Figure:
    """What the rounds of one row gave. `at_most` is the bar that the median is held against, if the row has one."""

    name: str
    unit: str
    minimum: float
    median: float
    maximum: float
    at_most: float | None = None

    @classmethod
    def of(cls, name: str, unit: str, rounds: Rounds, at_most: float | None = None) -> Figure:
        return cls(name, unit, min(rounds), statistics.median(rounds), max(rounds), at_most)


@dataclass(frozen=True)
class Result:
    """One benchmark: what was measured, what follows from it, and what a reader must know about both."""

    name: str
    title: str
    measured: list[Figure]
    compared: list[Figure]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Effort:
    """How long to measure. Quick figures say that the programs work, and little else."""

    rounds: int
    share: float
    """Of the operations in a round of a full run, above 0 and at most 1."""

    def operations(self, full: int) -> int:
        """How many operations a round has whose full size is `full`."""
        return max(1, round(full * self.share))


FULL = Effort(rounds=61, share=1.0)
QUICK = Effort(rounds=3, share=0.02)


def interleave(subjects: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Calls each subject once a round, in alternating order. The first round warms up and is not counted."""
    values: dict[str, list[T]] = {name: [] for name in subjects}
    order = list(subjects)
    for index in range(rounds + 1):
        for name in order:
            value = subjects[name]()
            if index:
                values[name].append(value)
        order.reverse()
    return values


def ratios(above: Rounds, below: Rounds) -> Rounds:
    """`above` in units of `below`, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def differences(left: Rounds, right: Rounds) -> Rounds:
    """`left` less `right`, round by round."""
    return [a - b for a, b in zip(left, right, strict=True)]


def figures(unit: str, values: Mapping[str, Rounds]) -> list[Figure]:
    """One figure for each row."""
    return [Figure.of(name, unit, rounds) for name, rounds in values.items()]


def statement(
    code: str, number: int, names: Mapping[str, Any], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A subject: ns for one execution of `code`, with its `names` as locals, the loop included as timeit does."""
    setup = "; ".join(f"{name} = _{name}" for name in names) or "pass"
    timer = timeit.Timer(code, setup, clock, globals={f"_{name}": value for name, value in names.items()})
    return lambda: timer.timeit(number) / number * 1e9


def column(index: int, lines: Iterable[list[float]]) -> Rounds:
    """One value of each line."""
    return [line[index] for line in lines]


def walk(
    code: str, items: Sequence[Any], names: Mapping[str, Any], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A subject: ns for one execution of `code` with one of `items` as `buffer`, in their order, the loop included."""
    subject = statement(f"for buffer in items: {code}", 1, {**names, "items": items}, clock)
    return lambda: subject() / len(items)


def own_time(call: Callable[[], object], number: int) -> Callable[[], float]:
    """A subject: ns of this thread's own CPU time for each of the `number` operations of a call."""

    def measure() -> float:
        before_ns = time.thread_time_ns()
        call()
        return (time.thread_time_ns() - before_ns) / number

    return measure


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Keeps this thread, and those that it starts meanwhile, on one core: another one has none of its data in caches.

    For what one thread does. Where the scheduler moves it, or wakes the monitor's thread on another core, decides
    more than what is measured.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
