"""``python -m benchmarks``: that it runs and what it writes. No figure is held against anything here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.available import needs_userfaultfd

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    *("generation", "check", "munmap", "register", "notifications", "rcache", "cache", "preload", "fresh_grant"),
    *("handover", "hypervisor"),
]
MACHINE = {"cpu", "cores", "virtual", "kernel", "python", "compiler", "usermm", "load"}


pytestmark = needs_userfaultfd


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run printed and what it wrote."""
    path = tmp_path_factory.mktemp("benchmarks") / "figures.json"
    done = benchmarks("--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_every_benchmark_is_in_the_data(quick: tuple[str, dict[str, Any]]) -> None:
    _, data = quick
    assert set(data) == {"machine", "effort", "benchmarks"}
    assert data["effort"] == "quick"
    assert [benchmark["name"] for benchmark in data["benchmarks"]] == NAMES


def test_machine_is_named(quick: tuple[str, dict[str, Any]]) -> None:
    text, data = quick
    assert set(data["machine"]) == MACHINE
    assert all(data["machine"].values())
    assert data["machine"]["kernel"] in text


def test_every_figure_is_a_range_with_its_median_inside(quick: tuple[str, dict[str, Any]]) -> None:
    text, data = quick
    for benchmark in data["benchmarks"]:
        assert benchmark["measured"]
        assert benchmark["title"] in text
        for figure in (*benchmark["measured"], *benchmark["compared"]):
            assert set(figure) == {"name", "unit", "minimum", "median", "maximum", "at_most"}
            values = [figure["minimum"], figure["median"], figure["maximum"]]
            assert values == sorted(values) and all(map(math.isfinite, values))
            assert figure["name"] in text


def test_each_name_is_measured_once(quick: tuple[str, dict[str, Any]]) -> None:
    _, data = quick
    for benchmark in data["benchmarks"]:
        names = [figure["name"] for figure in (*benchmark["measured"], *benchmark["compared"])]
        assert len(names) == len(set(names))


BARRED = ["generation", "check", "munmap", "register", "rcache", "cache", "preload", "hypervisor"]


@pytest.mark.parametrize("name", BARRED)
def test_bars_are_in_the_data(quick: tuple[str, dict[str, Any]], name: str) -> None:
    _, data = quick
    (benchmark,) = (each for each in data["benchmarks"] if each["name"] == name)
    bars = [figure for figure in (*benchmark["measured"], *benchmark["compared"]) if figure["at_most"] is not None]
    assert bars


def test_unknown_name_is_one_line_and_status_2() -> None:
    done = benchmarks("no-such-benchmark")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no-such-benchmark" in line and "generation" in line
