"""What was measured, as text and as plain data: for `usermm bench` and for the benchmarks of this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from usermm.measurement.harness import Figure, Result

WIDTH = 66


def as_data(machine: Mapping[str, str], effort: str, results: list[Result]) -> dict[str, Any]:
    """What --json writes."""
    return {"machine": dict(machine), "effort": effort, "benchmarks": [asdict(result) for result in results]}


def machine_lines(machine: Mapping[str, str]) -> Iterator[str]:
    """One line for each fact."""
    for name, value in machine.items():
        yield f"{name:10} {value}"


def result_lines(result: Result) -> Iterator[str]:
    """The rows of one benchmark, then its notes."""
    yield ""
    yield f"{result.title:{WIDTH}} {'minimum':>10} {'median':>10} {'maximum':>10}"
    for figure in (*result.measured, *result.compared):
        yield _row(figure)
    for note in result.notes:
        yield f"  {note}"


def _row(figure: Figure) -> str:
    unit = "" if figure.unit == "ratio" else f" ({figure.unit})"
    numbers = " ".join(f"{_number(value):>10}" for value in (figure.minimum, figure.median, figure.maximum))
    return f"  {figure.name + unit:{WIDTH - 2}} {numbers}{_bar(figure)}"


def _bar(figure: Figure) -> str:
    if figure.at_most is None:
        return ""
    return f"  bar {_number(figure.at_most)}: {'met' if figure.median <= figure.at_most else 'NOT met'}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
